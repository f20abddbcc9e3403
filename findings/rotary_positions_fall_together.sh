#!/usr/bin/env bash
# rotary-embedding-torch 0.9.1 (and 0.8.4): under autocast to bf16, with all weights in float32, it
# gives neighbours one rotation: of 1024 positions 513 are left. It switches autocast off for its
# angles, but counts the positions in the dtype of the queries, and bf16 has each whole number up to
# 256 only, then every second, from 512 on every fourth. It keeps the angles of its first call for
# all later ones, of any dtype. So float32 queries then get the wrong ones too, and a first call in
# float32, such as a test, hides it all. Nothing is raised or said. One would expect bf16 to cost
# digits of the sine, not the position. x-transformers 2.31.10, by the same author, is right under
# autocast. After .bfloat16() on the module both are wrong.
#
# Output seen (2026-12-01, Python 3.12, Linux x86-64): different rotations of 1024 positions, largest
# error against float64 (2.83 is the largest possible)
#   rotary-embedding-torch, float32                     1024, 0.00
#   rotary-embedding-torch, float32, then autocast      1024, 0.00
#   rotary-embedding-torch, autocast                     513, 2.38
#   rotary-embedding-torch, autocast, then float32       513, 2.38
#   rotary-embedding-torch, .bfloat16()                  513, 2.82
#   x-transformers, float32                             1024, 0.00
#   x-transformers, autocast                            1024, 0.00
#   x-transformers, .bfloat16()                          513, 2.82
# Fails if that changes. Way out: right after the module is made, call rotate_queries_or_keys once
# with float32 zeros of the full length (8192 at most, as cache_max_seq_len), as the second line shows;
# and no .bfloat16() on it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.3.5 rotary-embedding-torch==0.9.1 \
    x-transformers==2.31.10 2>"$folder/pip.log" || {
    cat "$folder/pip.log"
    exit 1
}
"$folder/venv/bin/python" - 2>"$folder/log" <<'PYTHON' || {
from importlib.metadata import version

import torch
from rotary_embedding_torch import RotaryEmbedding
from torch import nn
from x_transformers.x_transformers import RotaryEmbedding as OtherRotary
from x_transformers.x_transformers import apply_rotary_pos_emb

LENGTH, WIDTH = 1024, 64
layer = nn.Linear(WIDTH, WIDTH, bias=False)  # what makes the queries; all ones
nn.init.eye_(layer.weight)


def oracle():
    """Rotate pairs of ones by position times frequency, in float64."""
    frequency = 10000.0 ** -(torch.arange(0, WIDTH, 2, dtype=torch.float64) / WIDTH)
    angle = torch.arange(LENGTH, dtype=torch.float64)[:, None] * frequency
    sine, cosine = angle.sin(), angle.cos()
    return torch.stack([cosine - sine, cosine + sine], dim=-1).flatten(1)


class One:
    def __init__(self):
        self.module = RotaryEmbedding(WIDTH)

    def rotate(self, q):
        return self.module.rotate_queries_or_keys(q)


class Other:
    def __init__(self):
        self.module = OtherRotary(WIDTH)

    def rotate(self, q):
        angles, _ = self.module.forward_from_seq_len(LENGTH)
        return apply_rotary_pos_emb(q, angles)


def call(rotary, how):
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        q = layer(torch.ones(1, 1, LENGTH, WIDTH))
        assert q.dtype == (torch.bfloat16 if how == "autocast" else torch.float32)
        if how == ".bfloat16()":
            rotary.module.bfloat16()
            q = q.bfloat16()
        return rotary.rotate(q).detach()[0, 0].double()


def attempt(name, make, *calls):
    rotary = make()
    for how in calls:
        rotated = call(rotary, how)
    count = len(torch.unique(rotated, dim=0))
    error = (rotated - oracle()).abs().max().item()
    print(f"{name + ', ' + ', then '.join(calls):50} {count:5}, {error:.2f}")
    return count, error


print(*(f"{name} {version(name)}" for name in ("torch", "rotary-embedding-torch", "x-transformers")))
for name, make, good, bad in (
    (
        "rotary-embedding-torch",
        One,
        [("float32",), ("float32", "autocast")],
        [("autocast",), ("autocast", "float32"), (".bfloat16()",)],
    ),
    ("x-transformers", Other, [("float32",), ("autocast",)], [(".bfloat16()",)]),
):
    for calls in good:
        count, error = attempt(name, make, *calls)
        assert count == LENGTH and error < 0.03, "it has changed"
    for calls in bad:
        count, error = attempt(name, make, *calls)
        assert count == 513 and error > 1, "it has changed"
PYTHON
    cat "$folder/log"
    exit 1
}
