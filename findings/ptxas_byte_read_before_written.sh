#!/usr/bin/env bash
# ptxas 12.8.93 and 12.9.86, as Triton 3.6.0 brings them, for sm_90a: of two fp8 pairs that are
# stored as one word and then byte by byte, the second byte of the first pair is wrong.
#
# PTX: two cvt.rn.satfinite.e5m2x2.f32 give 16 bits each; both are stored together; later each
# byte is stored alone, the upper ones by shr.u16. One would expect four right bytes.
# Seen: the two conversions become one 32-bit register, and the shift of the first pair reads a
# register that nothing has written. An H200 showed it as every fourth byte of the transposed
# copy of an fp8 tile with no error. A second conversion for the bytes, of a sum
# with 0, is right.
#
# Output seen (2026-11-30, Python 3.12, Linux x86-64, no GPU needed), for both versions:
#   LOP3.LUT R0, R0, 0xffff, RZ, 0xc0, !PT
# Fails if that changes. ptxas 13.1.80, 13.3.33 and 13.4.59 (Triton 3.7.1, 3.8.0, 3.9.0) are right,
# but Triton takes those for sm_90 from 3.9.0 on only; 3.7.1 takes its 12.8.93, 3.8.0 its 12.9.86.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-deps triton==3.6.0 2> "$folder/pip.log" || {
    cat "$folder/pip.log"
    exit 1
}
tools=$(echo "$folder"/venv/lib/python3*/site-packages/triton/backends/nvidia/bin)
cat > "$folder/pairs.ptx" <<'PTX'
.version 8.7
.target sm_90a
.address_size 64
.visible .entry pairs(.param .u64 input, .param .u64 output)
{
  .reg .b64 %rd<6>;
  .reg .b32 %r<9>;
  .reg .f32 %f<5>;
  .reg .b16 %h<5>;
  .shared .align 16 .b8 tile[2048];
  ld.param.u64 %rd1, [input];
  ld.param.u64 %rd2, [output];
  mov.u32 %r1, %tid.x;
  mul.wide.u32 %rd3, %r1, 16;
  add.s64 %rd4, %rd1, %rd3;
  ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd4];
  cvt.rn.satfinite.e5m2x2.f32 %h1, %f2, %f1;
  shr.u16 %h3, %h1, 8;
  cvt.rn.satfinite.e5m2x2.f32 %h2, %f4, %f3;
  shr.u16 %h4, %h2, 8;
  shl.b32 %r2, %r1, 2;
  mov.u32 %r3, tile;
  add.s32 %r4, %r3, %r2;
  st.shared.v2.b16 [%r4], {%h1, %h2};
  bar.sync 0;
  xor.b32 %r5, %r2, 124;
  add.s32 %r5, %r3, %r5;
  ld.shared.b32 %r6, [%r5];
  bar.sync 0;
  add.s32 %r8, %r3, %r1;
  st.shared.b8 [%r8], %h1;
  st.shared.b8 [%r8+32], %h3;
  st.shared.b8 [%r8+64], %h2;
  st.shared.b8 [%r8+96], %h4;
  bar.sync 0;
  ld.shared.b32 %r7, [%r4];
  mul.wide.u32 %rd5, %r1, 8;
  add.s64 %rd5, %rd2, %rd5;
  st.global.v2.b32 [%rd5], {%r6, %r7};
  ret;
}
PTX
cat > "$folder/unwritten.py" <<'PY'
"""Print the instructions of a listing that read a register which nothing has written before."""
import re
import sys

written = {"R1", "RZ"}  # the stack pointer is set before
for line in sys.stdin:
    if not (found := re.match(r"\s+/\*[0-9a-f]{4}\*/\s+(?:@!?\S+ )?(\S+) (.*?);", line)):
        continue
    name, operands = found.groups()
    registers = re.findall(r"(?<![A-Z])R(?:\d+|Z)\b", operands)
    stores = name.startswith(("ST", "BAR", "EXIT", "BRA"))
    reads = registers if stores else registers[1:]
    # A mask or a shift alone: PRMT keeps a part of what it writes to, so it may read nothing.
    if name.startswith(("LOP3", "SHF")) and any(r not in written for r in reads):
        print(" ".join([name, operands]))
    if not stores and registers:
        first = int(registers[0][1:]) if registers[0] != "RZ" else 0
        width = 4 if ".128" in name else 2 if ".64" in name or ".WIDE" in name else 1
        written |= {f"R{first + i}" for i in range(width)}
PY
for ptxas in ptxas ptxas-blackwell; do
    "$tools/$ptxas" --version | tail -1
    "$tools/$ptxas" -arch=sm_90a "$folder/pairs.ptx" -o "$folder/pairs.cubin"
    "$tools/nvdisasm" -c "$folder/pairs.cubin" > "$folder/listing" 2> "$folder/warnings"
    unwritten=$("$folder/venv/bin/python" "$folder/unwritten.py" < "$folder/listing")
    echo "$unwritten"
    [[ $(wc -l <<< "$unwritten") == 1 && $unwritten == LOP3*0xffff* ]]
done
echo "as described: a mask reads a register that was never written"
