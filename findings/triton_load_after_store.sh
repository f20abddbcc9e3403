#!/usr/bin/env bash
# Triton 3.6.0, compiled for sm_90: a program that loads a number and then stores a block over it can
# read what it has stored. The language is written as if one thread did one line after another. On
# the GPU the block is shared out over warps, and no barrier stands between the load and the store:
# a warp that is late loads what another warp has written meanwhile. Triton puts barriers only where
# it passes data through shared memory itself, as a sum does. One would expect the order of the lines
# to hold for memory that one program alone touches, as it does in Triton's interpreter.
#
# Output seen (2026-11-30, Python 3.12, Linux x86-64; no GPU is needed):
#   triton 3.6.0
#   load behind the sum: barriers before it 2, between it and the store 0
#   load ahead of the sum: barriers before it 0, between it and the store 2
# Fails if that changes. Way out: load before a sum or another reduction over the block, or put
# tl.debug_barrier() between the two.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q triton==3.6.0 2>"$folder/pip.log" || {
    cat "$folder/pip.log"
    exit 1
}
cat >"$folder/look.py" <<'PYTHON'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def behind(x, old_last, N: tl.constexpr):
    block = tl.load(x + tl.arange(0, N))
    total = tl.sum(block, 0)
    tl.store(old_last, tl.load(x + N - 1))  # the last warp stores over this place
    tl.store(x + tl.arange(0, N), block / total)


@triton.jit
def ahead(x, old_last, N: tl.constexpr):
    last = tl.load(x + N - 1)
    block = tl.load(x + tl.arange(0, N))
    total = tl.sum(block, 0)
    tl.store(old_last, last)
    tl.store(x + tl.arange(0, N), block / total)


def barriers(kernel):
    """Return how many stand before the load of one number, and from there to the block's store."""
    source = ASTSource(kernel, {"x": "*fp32", "old_last": "*fp32", "N": "constexpr"}, {"N": 4096})
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    lines = code.asm["ptx"].splitlines()
    (place,) = re.findall(rf"add\.s64\s+(%rd\d+), %rd\d+, {4 * 4095};", code.asm["ptx"])
    (load,) = [i for i, line in enumerate(lines) if "ld.global" in line and f" {place} " in line]
    store = max(i for i, line in enumerate(lines) if "st.global" in line)
    count = [i for i, line in enumerate(lines) if "bar.sync" in line]
    return sum(i < load for i in count), sum(load < i < store for i in count)


print("triton", triton.__version__)
before, between = barriers(behind)
print(f"load behind the sum: barriers before it {before}, between it and the store {between}")
assert before > 0 and between == 0, "it has changed"
before, between = barriers(ahead)
print(f"load ahead of the sum: barriers before it {before}, between it and the store {between}")
assert before == 0 and between > 0, "it has changed"
PYTHON
TRITON_CACHE_DIR=$folder/cache "$folder/venv/bin/python" "$folder/look.py"
