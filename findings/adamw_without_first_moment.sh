#!/usr/bin/env bash
# heavyball 3.2.1 (and 3.1.1): HyperBallAdamW has no first moment. It takes betas=(0.9, 0.99) and uses
# the second number alone. Vectors, which get standard AdamW by its documentation, are moved by the
# last gradient over the root of the second moment; so are matrices, whose steps stay on a sphere.
# With beta1 = 0 and beta1 = 0.99 the weights are the same bit for bit. In the same way LaProp takes
# eps and does not use it. Nothing is raised or said. One would expect the first moment that the
# name and the arguments promise, as heavyball's own AdamW and MuonAdamW have it for the same vector.
#
# Output seen (2026-12-01, Python 3.12, Linux x86-64), after 60 steps with gradients of mean 0.2, noise 1
#   a vector, distance from        Adam in float64   the same without first moment
#     torch AdamW                    0.0000          0.0566
#     heavyball AdamW                0.0000          0.0566
#     heavyball MuonAdamW            0.0000          0.0566
#     heavyball HyperBallAdamW       0.0566          0.0000
#     its chain, with scale_by_adam  0.0000          0.0566
#   a matrix on the sphere
#     heavyball HyperBallAdamW       0.3193          0.0000
#     its chain, with scale_by_adam  0.0000          0.3193
#   what changes between           beta1 0 and 0.99   eps 1e-8 and 1
#     heavyball AdamW                0.2182           0.0538
#     heavyball LaProp               0.1927           0.0000
#     heavyball HyperBallAdamW       0.0000           0.0228
# Fails if that changes. Way out: a chain of one's own with scale_by_adam in the first place, as `Chain`
# below; for LaProp none by its arguments.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.3.5 heavyball==3.2.1 2>"$folder/pip.log" || {
    cat "$folder/pip.log"
    exit 1
}
"$folder/venv/bin/python" - 2>"$folder/log" <<'PYTHON' || {
from importlib.metadata import version

import heavyball
import torch

heavyball.utils.compile_mode = None  # plain torch: no compiler is needed
STEPS, LR, BETA1, BETA2 = 60, 0.01, 0.9, 0.99


def gradients(shape):
    generator = torch.Generator().manual_seed(0)
    return [0.2 + torch.randn(shape, generator=generator) for _ in range(STEPS)]


def start(shape):
    return torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape)


def by_library(optimizer_class, shape, betas=(BETA1, BETA2), **settings):
    p = torch.nn.Parameter(start(shape))
    optimizer = optimizer_class([p], lr=LR, betas=betas, weight_decay=0, **settings)
    for g in gradients(shape):
        p.grad = g.clone()
        optimizer.step()
    return p.detach().double()


def by_hand(shape, beta1=BETA1, eps=1e-8, sphere=False):
    """Adam in float64; on the sphere a step has the length lr times the first norm."""
    p = start(shape).double()
    radius = p.norm()
    first, second = torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(gradients(shape), 1):
        g = g.double()
        first = beta1 * first + (1 - beta1) * g
        second = BETA2 * second + (1 - BETA2) * g * g
        step = (first / (1 - beta1**t)) / ((second / (1 - BETA2**t)).sqrt() + eps)
        if sphere:
            p = p - LR * radius * step / step.norm()
            p = p * radius / p.norm()
        else:
            p = p - LR * step
    return p


class Chain(heavyball.chainable.BaseOpt):
    """HyperBallAdamW with scale_by_adam in the place of scale_by_exp_avg_sq."""

    def __init__(self, params, **settings):
        chain = heavyball.chainable
        others = {"caution": False, "warmup_steps": 0, "storage_dtype": "float32"}
        route = chain.route(
            (lambda p: p.ndim >= 2, chain.update_by_hyperball), default=chain.apply_update
        )
        defaults = {"eps": 1e-8, "multi_tensor": True, **others, **settings}
        super().__init__(params, defaults, fns=(chain.scale_by_adam, route))


def off(x, y):
    return (x - y).abs().max().item()


def close(x, y):
    return off(x, y) < 1e-5


print("heavyball", version("heavyball"), "torch", torch.__version__)
vector, matrix = (8,), (8, 6)
adam, without = by_hand(vector), by_hand(vector, beta1=0.0)
CHAIN = "its chain, with scale_by_adam"
print("a vector, distance from        Adam in float64   the same without first moment")
for name, optimizer_class in (
    ("torch AdamW", torch.optim.AdamW),
    ("heavyball AdamW", heavyball.AdamW),
    ("heavyball MuonAdamW", heavyball.MuonAdamW),
    ("heavyball HyperBallAdamW", heavyball.HyperBallAdamW),
    (CHAIN, Chain),
):
    p = by_library(optimizer_class, vector)
    print(f"  {name:30} {off(p, adam):.4f}          {off(p, without):.4f}")
    wrong = "Hyper" in name
    assert close(p, without if wrong else adam), "it has changed"
    assert off(p, adam if wrong else without) > 0.05, "it has changed"
adam, without = by_hand(matrix, sphere=True), by_hand(matrix, beta1=0.0, sphere=True)
print("a matrix on the sphere")
for name, optimizer_class, right, wrong in (
    ("heavyball HyperBallAdamW", heavyball.HyperBallAdamW, without, adam),
    (CHAIN, Chain, adam, without),
):
    p = by_library(optimizer_class, matrix)
    print(f"  {name:30} {off(p, adam):.4f}          {off(p, without):.4f}")
    assert close(p, right) and off(p, wrong) > 0.05, "it has changed"
print("what changes between           beta1 0 and 0.99   eps 1e-8 and 1")
for name, by_beta, by_eps in (
    ("AdamW", True, True),
    ("LaProp", True, False),
    ("HyperBallAdamW", False, True),
):
    make = getattr(heavyball, name)
    beta, eps = 0.0, 0.0
    for shape in (vector, matrix):
        with_beta = [by_library(make, shape, (beta1, BETA2)) for beta1 in (0.0, 0.99)]
        with_eps = [by_library(make, shape, eps=number) for number in (1e-8, 1.0)]
        beta, eps = max(beta, off(*with_beta)), max(eps, off(*with_eps))
    print(f"  {'heavyball ' + name:30} {beta:.4f}           {eps:.4f}")
    assert (beta > 0, eps > 0) == (by_beta, by_eps), "it has changed"
PYTHON
    cat "$folder/log"
    exit 1
}
