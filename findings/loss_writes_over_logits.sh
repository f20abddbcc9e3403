#!/usr/bin/env bash
# liger-kernel 0.8.5: LigerCrossEntropyLoss, where its logits require a gradient, writes that gradient
# over them. Its kernel does so behind autograd's back: the version of the tensor stays 0, so that
# autograd, which refuses to go on after such a write by torch, notices nothing. An accuracy that is
# read off the logits after the loss is 0 % where it is 100 %. A z-loss (the same for an entropy)
# beside the loss trains with a wrong gradient whether it is computed before or after: its backward
# pass reads the logits too. Computed before, its value is right, so that the total loss shows nothing.
# Under torch.no_grad() the logits stay whole, so that a validation is right. One would expect a
# drop-in for nn.CrossEntropyLoss to leave its input alone, or autograd to see the write.
# (The kernel of cross_entropy_forward, in liger_kernel/ops/cross_entropy.py.)
#
# Output seen (2026-12-01, Python 3.12, Linux x86-64; Triton's interpreter, no GPU needed):
#   accuracy after the loss: torch 100%, liger 0% (under no_grad 100%)
#   the loss: torch 0.0635, liger 0.0635; the logits' version: torch 0, liger 0
#   with a z-loss that is computed
#     after the loss:  torch 5.0528, liger 1.4243; gradient off by 104%
#     before the loss: torch 5.0528, liger 5.0528; gradient off by 105%
#     after the loss of a clone: torch 5.0528, liger 5.0528; gradient off by 0%
# Fails if that changes. Way out: hand in logits.clone() where anything else reads them, or take what
# the loss itself can do (lse_square_scale for a z-loss, return_token_accuracy).
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
from liger_kernel.transformers import LigerCrossEntropyLoss
from torch import nn

TOKENS, IDS = 32, 40
torch.manual_seed(0)
TARGET = torch.randint(IDS, (TOKENS,))
START = torch.randn(TOKENS, IDS)
START[torch.arange(TOKENS), TARGET] = 7.0  # the right id has the largest logit
PLAIN, LIGER = nn.CrossEntropyLoss(), LigerCrossEntropyLoss()


def accuracy(criterion):
    raw = START.clone().requires_grad_()
    logits = raw * 1.0
    loss = criterion(logits, TARGET)
    share = (logits.argmax(-1) == TARGET).float().mean().item()
    return share, loss.item(), logits._version


def with_z_loss(criterion, where):
    raw = START.clone().requires_grad_()
    logits = raw * 1.0
    if where == "before the loss":
        z = logits.logsumexp(-1).square().mean()
    loss = criterion(logits.clone() if "clone" in where else logits, TARGET)
    if where != "before the loss":
        z = logits.logsumexp(-1).square().mean()
    total = loss + 0.1 * z
    total.backward()
    return total.item(), raw.grad


print("liger-kernel", version("liger-kernel"), "triton", version("triton"))
plain, plain_loss, plain_version = accuracy(PLAIN)
liger, liger_loss, liger_version = accuracy(LIGER)
with torch.no_grad():
    whole = accuracy(LIGER)[0]
print(f"accuracy after the loss: torch {plain:.0%}, liger {liger:.0%} (under no_grad {whole:.0%})")
print(f"the loss: torch {plain_loss:.4f}, liger {liger_loss:.4f}; the logits' version: "
      f"torch {plain_version}, liger {liger_version}")
assert plain == whole == 1 and liger == 0, "it has changed"
assert abs(plain_loss - liger_loss) < 1e-5 and liger_version == 0, "it has changed"
print("with a z-loss that is computed")
for where in ("after the loss", "before the loss", "after the loss of a clone"):
    (right, expected), (total, grad) = with_z_loss(PLAIN, where), with_z_loss(LIGER, where)
    off = ((grad - expected).norm() / expected.norm()).item()
    print(f"  {where + ':':16} torch {right:.4f}, liger {total:.4f}; gradient off by {off:.0%}")
    assert (abs(total - right) > 1) == (where == "after the loss"), "it has changed"
    assert off < 1e-4 if "clone" in where else off > 0.5, "it has changed"
PYTHON
    cat "$folder/log"
    exit 1
}
