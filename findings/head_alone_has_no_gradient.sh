#!/usr/bin/env bash
# liger-kernel 0.8.5: LigerFusedLinearCrossEntropyLoss gives the head no gradient where the hidden
# states need none: a frozen or cached body with a head that is trained, or a first stage that trains
# new embeddings of an untied head. The loss is right and requires a gradient, backward() runs, and
# weight.grad and bias.grad stay None, so that an optimizer skips both without a word and the loss
# stands still. One would expect that which inputs get a gradient depends on which of them want one,
# as for the linear layer and the loss that it fuses; the other way round (a frozen head) it does.
# (fused_linear_cross_entropy_forward makes all gradients only if its input requires one.)
#
# Output seen (2026-12-01, Python 3.12, Linux x86-64; Triton's interpreter, no GPU needed):
#   hidden states and head      loss off by 0.0, gradients off by: hidden 0.0, weight 0.0, bias 0.0
#   hidden states alone         loss off by 0.0, gradients off by: hidden 0.0
#   head alone                  loss off by 0.0, gradients off by: weight None, bias None
#   head alone, 10 steps of SGD: torch 5.221 to 2.513, liger 5.221 to 5.221
# Fails if that changes. Way out: hidden.requires_grad_() in front of the loss.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# Triton 3.6.0's interpreter fails with numpy 2.5.5 (an error); with 2.3.5 it works.
"$folder/venv/bin/pip" install -q torch==2.11.0 triton==3.6.0 numpy==2.3.5 liger-kernel==0.8.5 packaging==26.0 \
    2>"$folder/pip.log" || {
    cat "$folder/pip.log"
    exit 1
}
TRITON_INTERPRET=1 TRITON_CACHE_DIR=$folder/cache "$folder/venv/bin/python" - 2>"$folder/log" <<'PYTHON' || {
from importlib.metadata import version

import torch
import torch.nn.functional as F
from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

TOKENS, WIDTH, IDS = 32, 16, 40
torch.manual_seed(0)
HIDDEN, WEIGHT, BIAS = torch.randn(TOKENS, WIDTH), torch.randn(IDS, WIDTH) * 0.3, torch.randn(IDS)
TARGET = torch.randint(IDS, (TOKENS,))


def liger(hidden, weight, bias):
    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, TARGET, bias)


def plain(hidden, weight, bias):
    return F.cross_entropy(F.linear(hidden, weight, bias), TARGET)


def gradients(loss_of, wanted):
    inputs = {"hidden": HIDDEN, "weight": WEIGHT, "bias": BIAS}
    inputs = {name: x.clone().requires_grad_(name in wanted) for name, x in inputs.items()}
    loss = loss_of(**inputs)
    assert loss.requires_grad
    loss.backward()
    return loss.item(), {name: inputs[name].grad for name in wanted}


def head_alone(loss_of):
    weight, bias = (torch.nn.Parameter(x.clone()) for x in (WEIGHT, BIAS))
    optimizer = torch.optim.SGD([weight, bias], lr=0.5)
    losses = []
    for _ in range(11):
        optimizer.zero_grad()
        loss = loss_of(HIDDEN, weight, bias)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


print("liger-kernel", version("liger-kernel"), "triton", version("triton"))
for name, wanted in (
    ("hidden states and head", ("hidden", "weight", "bias")),
    ("hidden states alone", ("hidden",)),
    ("head alone", ("weight", "bias")),
):
    (loss, got), (right, expected) = gradients(liger, wanted), gradients(plain, wanted)
    off = {key: None if g is None else (g - expected[key]).abs().max() for key, g in got.items()}
    told = ", ".join(f"{key} {x if x is None else f'{x:.1f}'}" for key, x in off.items())
    print(f"{name:27} loss off by {abs(loss - right):.1f}, gradients off by: {told}")
    assert abs(loss - right) < 1e-5, "it has changed"
    if name == "head alone":
        assert set(off.values()) == {None}, "it has changed"
    else:
        assert max(off.values()) < 1e-5, "it has changed"
(first, last), (of_liger, stays) = head_alone(plain), head_alone(liger)
print(f"head alone, 10 steps of SGD: torch {first:.3f} to {last:.3f}, "
      f"liger {of_liger:.3f} to {stays:.3f}")
assert last < 0.9 * first and stays == of_liger, "it has changed"
hidden = HIDDEN.clone().requires_grad_()  # the way out
weight = WEIGHT.clone().requires_grad_()
liger(hidden, weight, BIAS).backward()
right = gradients(plain, ("weight", "bias"))[1]["weight"]
assert (weight.grad - right).abs().max() < 1e-5
PYTHON
    cat "$folder/log"
    exit 1
}
