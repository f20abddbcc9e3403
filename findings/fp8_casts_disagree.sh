#!/usr/bin/env bash
# torch 2.11.0 with triton 3.6.0: a float32 that is too large for fp8 becomes NaN (e4m3fn) or inf
# (e5m2) by torch's cast, eager and compiled on a CPU, but the largest number, 448 or 57344, by the
# cast in a Triton kernel: its instructions are `satfinite`, also for inf. So a scale that is too
# large shows at once in the one and clips in silence in the other. And Triton's cast is not one
# cast: for Ada (sm_89) it first cuts the float32 off to float16, towards zero, and rounds that;
# for Hopper and Blackwell (sm_90, sm_100) it rounds once, from float32. One would expect one
# answer from `x.to(float8)` everywhere. No GPU is needed: the kernel is compiled, not run.
#
# Output seen (2026-11-29, Python 3.12, Linux x86-64):
#   torch  465 -> nan (e4m3fn), 65000 -> inf (e5m2); eager and compiled alike
#   fp8e4nv sm_89   cvt.rz.f16.f32 cvt.rn.satfinite.e4m3x2.f16x2
#   fp8e4nv sm_90   cvt.rn.satfinite.e4m3x2.f32
#   fp8e4nv sm_100  cvt.rn.satfinite.e4m3x2.f32
#   fp8e5 sm_89   cvt.rz.f16.f32 cvt.rn.satfinite.e5m2x2.f16x2
#   fp8e5 sm_90   cvt.rn.satfinite.e5m2x2.f32
#   fp8e5 sm_100  cvt.rn.satfinite.e5m2x2.f32
# Fails if that changes. Way out: clamp, or choose scales that cannot overflow. From torch 2.13.0 on
# its cast to e4m3fn stops at 448 too: see fp8_cast_hides_infinity.sh.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.11.0 triton==3.6.0 numpy==2.5.5 2>"$folder/pip.log" || {
    cat "$folder/pip.log"
    exit 1
}
cat > "$folder/casts.py" <<'PYTHON'
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def cast(x, y):
    at = tl.arange(0, 128)
    tl.store(y + at, tl.load(x + at).to(y.dtype.element_ty))


def instructions(kind, sm):
    source = ASTSource(cast, {"x": "*fp32", "y": f"*{kind}"}, {})
    ptx = triton.compile(source, target=GPUTarget("cuda", sm, 32)).asm["ptx"]
    words = [line.split()[0] for line in ptx.splitlines() if line.strip()]
    return [word for word in words if word.startswith("cvt.r")]


print("torch", torch.__version__, "triton", triton.__version__)
for dtype, value, expected in (
    (torch.float8_e4m3fn, 465.0, "nan"),
    (torch.float8_e5m2, 65000.0, "inf"),
):
    x = torch.tensor([value])
    for function in (torch.Tensor.to, torch.compile(lambda t, d: t.to(d))):
        got = function(x, dtype).float().item()
        print(dtype, value, "->", got)
        assert str(got) == expected, "it has changed"
for kind, short in (("fp8e4nv", "e4m3x2"), ("fp8e5", "e5m2x2")):
    for sm in (89, 90, 100):
        found = instructions(kind, sm)
        print(kind, f"sm_{sm} ", *found)
        once = [f"cvt.rn.satfinite.{short}.f32"]
        twice = ["cvt.rz.f16.f32", f"cvt.rn.satfinite.{short}.f16x2"]
        assert found == (twice if sm == 89 else once), "it has changed"
PYTHON
TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/casts.py"
