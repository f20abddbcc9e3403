#!/usr/bin/env bash
# torch 2.14.1 (and 2.11.0), Linux, CPU memory: from 32,769 numbers on, copy_, clone and a cast are
# spread over threads, of two bytes each or of eight. So is a batch of 64 x 2049 ids, 262 KB, which one
# core copies in 0.02 ms. Each other thread then waits for more work by spinning, for 8 ms of a core.
# pin_memory() copies in the same way: a loader that pins one batch per step keeps all cores
# busy for a part of each step, beside the thread that launches the GPU's kernels (seen on 16 cores:
# 15 threads at 10 to 25 % each). Nothing says so. One would expect a memcpy.
#
# Output seen (2026-12-01, Python 3.12, Linux x86-64): CPU time of the other thread of two per
# copy, 20 ms apart
#   torch, 32768 ids of int16            0.0 ms
#   torch, 32769 ids of int16            7.7 ms
#   torch, 64 x 2049 ids of int16        7.7 ms
#   numpy, 64 x 2049 ids of int16        0.0 ms
#   with OMP_WAIT_POLICY=PASSIVE set before torch is loaded:
#   torch, 64 x 2049 ids of int16        0.0 ms
# Fails if that changes; needs two idle cores. Way out: let numpy write into pinned memory, as in
# np.stack(rows, out=torch.empty(shape, dtype=torch.int16, pin_memory=True).numpy()).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.3.5 2>"$folder/pip.log" || {
    cat "$folder/pip.log"
    exit 1
}
unset OMP_WAIT_POLICY GOMP_SPINCOUNT OMP_NUM_THREADS
cat >"$folder/copies.py" <<'PYTHON'
import sys
import time

import numpy as np
import torch

torch.set_num_threads(2)


def others(copy):
    """Return the milliseconds that threads other than this one were busy per copy."""
    for step in range(55):
        copy()
        time.sleep(0.02)
        if step == 4:
            before = time.process_time() - time.thread_time()
    return 20 * (time.process_time() - time.thread_time() - before)


def by_torch(*shape):
    old = torch.zeros(shape, dtype=torch.int16)
    new = torch.empty_like(old)
    return lambda: new.copy_(old)


def by_numpy(rows, length):
    old = [np.zeros(length, np.int16)] * rows
    new = torch.empty((rows, length), dtype=torch.int16).numpy()
    return lambda: np.stack(old, out=new)


def check(name, copy, least, most):
    seen = others(copy)
    print(f"{name:36} {seen:.1f} ms")
    assert least <= seen <= most, "it has changed, or the cores are busy"


if sys.argv[1:] == ["passive"]:
    print("with OMP_WAIT_POLICY=PASSIVE set before torch is loaded:")
    check("torch, 64 x 2049 ids of int16", by_torch(64, 2049), 0, 0.5)
    raise SystemExit
print("torch", torch.__version__)
check("torch, 32768 ids of int16", by_torch(32_768), 0, 0.5)
check("torch, 32769 ids of int16", by_torch(32_769), 1, 20)
check("torch, 64 x 2049 ids of int16", by_torch(64, 2049), 1, 20)
check("numpy, 64 x 2049 ids of int16", by_numpy(64, 2049), 0, 0.5)
PYTHON
"$folder/venv/bin/python" "$folder/copies.py"
OMP_WAIT_POLICY=PASSIVE "$folder/venv/bin/python" "$folder/copies.py" passive
