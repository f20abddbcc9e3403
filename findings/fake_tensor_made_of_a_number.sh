#!/usr/bin/env bash
# torch 2.11.0: under FakeTensorMode, where tensors are shapes alone, a parameter that was made by
# torch.tensor(0.5) cannot be deep-copied, and neither can a model that holds one; made by torch.full,
# of the same shape and dtype, it can. Without the mode, and on the meta device, all of it works. One
# would expect two tensors of one shape to be the same there. The first keeps its number, in a real
# storage that the copy tries to give to a tensor of the meta device.
# And module.to(dtype) raises for every module that was made under the mode, even if the dtype is the
# one that it has. An average of weights, or a table in bf16, thus fails a check of shapes that the
# real model passes.
#
# Output seen (2026-11-30, Python 3.12, Linux x86-64):
#   fake   deepcopy, of torch.tensor  RuntimeError: Attempted to set the storage of a tensor on device "meta"
#   fake   deepcopy, of torch.full    works
#   fake   to(float32)                RuntimeError: _apply(): Couldn't swap Scale.weight
#   meta, real: all work
# Fails if that changes. Way out: a __deepcopy__ that detaches and clones; for `to`, p.data = p.data.to(...).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.11.0 numpy==2.5.5 2>"$folder/pip.log" || {
    cat "$folder/pip.log"
    exit 1
}
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import contextlib
import copy

import torch
from torch._subclasses.fake_tensor import FakeTensorMode


class Scale(torch.nn.Module):
    def __init__(self, number):
        super().__init__()
        self.weight = torch.nn.Parameter(number)


def tried(action):
    try:
        action()
        return "works"
    except RuntimeError as error:
        return f"RuntimeError: {error}"[:75]


print("torch", torch.__version__)
seen = {}
for name in ("fake", "meta", "real"):
    mode = FakeTensorMode() if name == "fake" else contextlib.nullcontext()
    place = torch.device("meta") if name == "meta" else contextlib.nullcontext()
    with mode, place:
        number, full = Scale(torch.tensor(0.5)), Scale(torch.full((), 0.5))
        seen[name] = {
            "deepcopy, of torch.tensor": tried(lambda: copy.deepcopy(number)),
            "deepcopy, of torch.full": tried(lambda: copy.deepcopy(full)),
            "to(float32)": tried(lambda: full.to(torch.float32)),
        }
    for what, result in seen[name].items():
        print(f"{name:6} {what:26} {result}")
assert all(result == "works" for name in ("meta", "real") for result in seen[name].values())
copied, other, moved = seen["fake"].values()
assert "set the storage" in copied and other == "works" and "Couldn't swap" in moved, "it has changed"
PYTHON
