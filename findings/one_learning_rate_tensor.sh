#!/usr/bin/env bash
# torch 2.14.1 (and 2.11.0): with the learning rate as a tensor, as torch.compile wants it of an
# optimizer, all parameter groups share that one tensor, and a schedule writes into it. So a
# scheduler with a factor per group leaves all groups with the factor of the last; get_last_lr()
# says the same number for all. And `group["lr"] *= 0.5`, over all groups, halves once per group: it
# is in place for a tensor. With a float both are right. Nothing is raised or said. One would expect
# the groups of AdamW([...], lr=x) to be as separate as with a float, for whatever x.
# (Optimizer.add_param_group fills in the default itself, no copy of it; lr_scheduler's
# _update_param_group_val calls fill_.)
#
# Output seen (2026-12-01, Python 3.12, Linux x86-64), the rates of three groups:
#   float    LambdaLR 1, 0.5, 0.1: [0.01, 0.005, 0.001], then each *= 0.5: [0.005, 0.0025, 0.0005]
#   tensor   LambdaLR 1, 0.5, 0.1: [0.001, 0.001, 0.001], then each *= 0.5: [0.000125, 0.000125, 0.000125]
#   a tensor per group   LambdaLR 1, 0.5, 0.1: [0.01, 0.005, 0.001], then each *= 0.5: [0.005, 0.0025, 0.0005]
# Fails if that changes. Way out: a tensor of its own in each group, {"params": ..., "lr": lr.clone()}.
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
from torch.optim.lr_scheduler import LambdaLR

FACTORS = (1.0, 0.5, 0.1)


def rates(optimizer):
    return [round(float(group["lr"]), 8) for group in optimizer.param_groups]


def attempt(name, lr, own=False):
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))]} for _ in FACTORS]
    if own:
        for group in groups:
            group["lr"] = lr.clone()
    optimizer = torch.optim.AdamW(groups, lr=lr)
    scheduler = LambdaLR(optimizer, [lambda step, factor=factor: factor for factor in FACTORS])
    scheduled = rates(optimizer)
    assert [round(float(x), 8) for x in scheduler.get_last_lr()] == scheduled
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
    print(f"{name:8} LambdaLR 1, 0.5, 0.1: {scheduled}, then each *= 0.5: {rates(optimizer)}")
    moved = []
    for group in optimizer.param_groups:  # what a step does
        (p,) = group["params"]
        p.grad = torch.ones(2)
    optimizer.step()
    for group in optimizer.param_groups:
        moved.append(round(1 - group["params"][0][0].item(), 5))
    return scheduled, rates(optimizer), moved


print("torch", torch.__version__)
right = [0.01, 0.005, 0.001], [0.005, 0.0025, 0.0005]
floats = attempt("float", 0.01)
shared = attempt("tensor", torch.tensor(0.01))
apart = attempt("a tensor per group  ", torch.tensor(0.01), own=True)
assert floats[:2] == right and apart[:2] == right, "it has changed"
assert shared[:2] == ([0.001] * 3, [0.000125] * 3), "it has changed"
assert len(set(shared[2])) == 1 and len(set(floats[2])) == 3, "it has changed"
PYTHON
