#!/usr/bin/env bash
# torch 2.11.0: under `python -O` (or PYTHONOPTIMIZE=1) torch.compile raises for nearly every
# function with an `if not`, with every backend: InternalTorchDynamoError: StopIteration. So F.pad
# cannot be compiled, for it begins with one. One would expect -O to leave out asserts and to change
# nothing else. The cause: to know an assert when it meets one, the compiler reads the bytecode of
# an assert of its own, which -O has taken out.
#
# Output seen (2026-12-01, Python 3.12, Linux x86-64):
#   python     if: right, if not: right, F.pad: right
#   python -O  if: right, if not: StopIteration, F.pad: StopIteration
# Fails if that changes. Way out: torch._dynamo.config.rewrite_assert_with_torch_assert = False, as
# is shown too, or run without -O. torch 2.13.0 is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.11.0 numpy==2.3.5 2>"$folder/pip.log" || {
    cat "$folder/pip.log"
    exit 1
}
cat >"$folder/try.py" <<'PYTHON'
import sys

import torch
import torch.nn.functional as F


def plain(x):
    return x + 1 if x.dim() == 1 else x


def negated(x):
    return x if not x.dim() == 1 else x + 1


def pad(x):
    return F.pad(x, (1, 0))


def attempt(function):
    torch._dynamo.reset()
    x = torch.ones(2)
    try:
        got = torch.compile(function, backend="eager")(x)
    except Exception as error:
        return f"{error}".partition(":")[0]
    return "right" if torch.equal(got, function(x)) else "wrong"


torch._dynamo.config.rewrite_assert_with_torch_assert = sys.argv[1:] != ["way-out"]
said = [attempt(function) for function in (plain, negated, pad)]
print(*sys.argv[1:], "if: {}, if not: {}, F.pad: {}".format(*said))
PYTHON
python="$folder/venv/bin/python"
printf 'python     '; "$python" "$folder/try.py" | tee "$folder/plain"
printf 'python -O  '; "$python" -O "$folder/try.py" | tee "$folder/optimized"
printf 'python -O  '; "$python" -O "$folder/try.py" way-out | tee "$folder/way-out"
grep -q 'if: right, if not: right, F.pad: right' "$folder/plain"
grep -q 'if: right, if not: StopIteration, F.pad: StopIteration' "$folder/optimized" || {
    echo "it has changed"
    exit 1
}
grep -q 'if: right, if not: right, F.pad: right' "$folder/way-out"
