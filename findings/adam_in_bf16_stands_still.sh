#!/usr/bin/env bash
# torch 2.14.1 (and 2.11.0), on a CPU: where weights are bf16, Adam keeps its moments in bf16, and with
# torch's own beta2, 0.999, the second moment never falls: 0.999 v, rounded to 8 bits, is v again. One
# early spike in the gradient thus holds the steps of a weight down for good. With beta2 = 0.99 it
# does fall, to where rounding stops it, and that differs between foreach=False, foreach=True and
# fused=True: three step lengths for one gradient, all wrong. Nothing is raised or said. An average of
# bf16 weights with 0.999 (AveragedModel, get_ema_multi_avg_fn) does not move at all, here while the
# weights go from 1 to 2. One would expect bf16 to cost some digits, not the forgetting.
#
# Output seen (2026-12-01, Python 3.12, Linux x86-64): 5000 gradients of 0.01 behind one of 1; the
# length of the last step, in learning rates
#   beta2 0.999  float32: loop 0.97, foreach 0.97, fused 0.97  bf16: loop 0.32, foreach 0.32, fused 0.32
#   beta2 0.99   float32: loop 1.00, foreach 1.00, fused 1.00  bf16: loop 0.61, foreach 0.92, fused 0.84
#   beta2 0.95   float32: loop 1.00, foreach 1.00, fused 1.00  bf16: loop 0.98, foreach 0.99, fused 1.00
#   average of weights that were 1 and are 2, after 10000 updates
#   decay 0.999  float32: 2.000  bf16: 1.000
#   decay 0.99   float32: 2.000  bf16: 1.609
# Fails if that changes. Way out: float32 weights, cast where they are used; or a beta2 of 0.95.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.3.5 2>"$folder/pip.log" || {
    cat "$folder/pip.log"
    exit 1
}
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

torch.set_num_threads(1)
WAYS = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def last_step(dtype, beta2, way):
    """Return the first moment over the root of the second, both without bias."""
    p = nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = torch.optim.Adam([p], lr=0.0, betas=(0.9, beta2), **WAYS[way])
    for step in range(5001):
        p.grad = torch.full_like(p, 0.01 if step else 1.0)
        optimizer.step()
    state = optimizer.state[p]
    steps = state["step"].item()
    first = state["exp_avg"][0].item() / (1 - 0.9**steps)
    second = state["exp_avg_sq"][0].item() / (1 - beta2**steps)
    return first / second**0.5


def average(dtype, decay):
    model = nn.Linear(8, 8, bias=False).to(dtype)
    nn.init.ones_(model.weight)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    averaged.update_parameters(model)  # the first one copies
    nn.init.constant_(model.weight, 2)
    for _ in range(10_000):
        averaged.update_parameters(model)
    return averaged.module.weight[0, 0].item()


def tell(lengths):
    return ", ".join(f"{way} {length:.2f}" for way, length in lengths.items())


print("torch", torch.__version__)
for beta2 in (0.999, 0.99, 0.95):
    wide = {way: last_step(torch.float32, beta2, way) for way in WAYS}
    narrow = {way: last_step(torch.bfloat16, beta2, way) for way in WAYS}
    print(f"beta2 {beta2:<6} float32: {tell(wide)}  bf16: {tell(narrow)}")
    assert min(wide.values()) > 0.95, "it has changed"
    if beta2 == 0.999:
        assert max(narrow.values()) < 0.35, "it has changed"
    elif beta2 == 0.99:
        lengths = sorted(narrow.values())
        assert lengths[0] < 0.7 and lengths[2] - lengths[1] > 0.05, "it has changed"
    else:
        assert min(narrow.values()) > 0.95, "it has changed"
print("average of weights that were 1 and are 2, after 10000 updates")
for decay, expected in ((0.999, 1.0), (0.99, 1.609375)):
    wide, narrow = average(torch.float32, decay), average(torch.bfloat16, decay)
    print(f"decay {decay:<6} float32: {wide:.3f}  bf16: {narrow:.3f}")
    assert wide > 1.999 and narrow == expected, "it has changed"
PYTHON
