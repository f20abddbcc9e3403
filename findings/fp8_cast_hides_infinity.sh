#!/usr/bin/env bash
# torch 2.14.1 (and 2.13.0, 2.15.0), on a CPU, eager and compiled: infinity cast to float8_e4m3fn
# becomes 448, its largest number. Nothing is raised or said, and isfinite() is true behind the
# cast. float8_e5m2 keeps infinity, and both keep NaN. Up to 2.12.1 the same cast gave NaN, as
# e4m3fn has no infinity. One would expect what is not finite to stay visible, or a word: with a
# scale that does not follow the largest entry, a check for NaN behind an fp8 product no longer
# finds a gradient or an activation that has overflowed in bf16 or float32.
#
# Output seen (2026-11-30, Python 3.12, Linux x86-64), the same eager and compiled:
#   torch.float8_e4m3fn  465 -> 448, inf -> 448, -inf -> -448, nan -> nan
#   torch.float8_e5m2    65000 -> inf, inf -> inf, -inf -> -inf, nan -> nan
# Fails if that changes. Way out: look for infinity before the cast.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.5.5 2>"$folder/pip.log" || {
    cat "$folder/pip.log"
    exit 1
}
"$folder/venv/bin/python" - <<'PYTHON'
import torch


@torch.compile
def compiled(x, dtype):
    return x.to(dtype)


def number(x):
    return f"{x:.0f}"


print("torch", torch.__version__)
inf, nan = float("inf"), float("nan")
for dtype, values, expected in (
    (torch.float8_e4m3fn, (465.0, inf, -inf, nan), ["448", "448", "-448", "nan"]),
    (torch.float8_e5m2, (65000.0, inf, -inf, nan), ["inf", "inf", "-inf", "nan"]),
):
    for cast in (torch.Tensor.to, compiled):
        got = [number(x) for x in cast(torch.tensor(values), dtype).float().tolist()]
        print(dtype, ", ".join(f"{number(x)} -> {y}" for x, y in zip(values, got)))
        assert got == expected, "it has changed"
PYTHON
