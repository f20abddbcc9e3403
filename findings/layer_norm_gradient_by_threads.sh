#!/usr/bin/env bash
# torch 2.14.1 (and 2.11.0, 2.15.0), on a CPU, eager: where LayerNorm's input is bf16, the gradient
# of its weight and bias grows with the number of threads. Each thread adds its rows up in bf16,
# one after another, and 256 + 1 is 256 there. Float32 weights do not help, nor does autocast: their
# gradient is float32 and just as wrong. nn.Embedding with bf16 weights stops at 256 in the same
# way, for a token that is frequent. Nothing is raised or said. One would expect a sum in float32,
# rounded once, as of Linear's bias, of RMSNorm's weight, and of LayerNorm under torch.compile.
#
# Output seen (2026-12-01, Python 3.12, Linux x86-64):
#   8192 rows, each with a gradient of 1; threads 1, 2, 4
#   LayerNorm in bf16             256 512 1024 (torch.bfloat16)
#   LayerNorm under autocast      256 512 1024 (torch.float32)
#   LayerNorm in bf16, compiled   8192 8192 8192 (torch.bfloat16)
#   Embedding                     256 256 256 (torch.bfloat16)
#   Linear                        8192 8192 8192 (torch.bfloat16)
#   65536 rows, each a normal gradient: relative error against float64; threads 1, 2
#   layer_norm weight 26.3% 20.3%
#   layer_norm bias 28.1% 21.7%
#   rms_norm weight 0.2% 0.2%
# Fails if that changes. Way out: float32 for LayerNorm's input and weights, or torch.compile; for
# an embedding, float32 weights.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.5.5 2>"$folder/pip.log" || {
    cat "$folder/pip.log"
    exit 1
}
TORCHINDUCTOR_CACHE_DIR=$folder/cache "$folder/venv/bin/python" - <<'PYTHON'
import torch
import torch.nn.functional as F
from torch import nn

BF16, WIDTH = torch.bfloat16, 64


def of_ones(layer, x, parameter, run):
    """Return one entry of a parameter's gradient where each row's gradient is 1, and its dtype."""
    run(layer, x).sum().backward()
    return parameter.grad.flatten()[0].item(), parameter.grad.dtype


def eager(layer, x):
    return layer(x)


def autocast(layer, x):
    with torch.autocast("cpu", BF16):
        return layer(x)


def check(name, make, x, run, expected):
    seen = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        layer, parameter = make()
        number, dtype = of_ones(layer, x, parameter, run)
        seen.append(number)
    print(f"{name:29}", *(f"{number:.0f}" for number in seen), f"({dtype})")
    assert seen == expected, "it has changed"


def norm(dtype):
    layer = nn.LayerNorm(WIDTH, dtype=dtype)
    return layer, layer.bias


def embedding():
    layer = nn.Embedding(4, WIDTH, dtype=BF16)
    return layer, layer.weight


def linear():
    layer = nn.Linear(WIDTH, WIDTH, dtype=BF16)
    return layer, layer.bias


print("torch", torch.__version__)
print("8192 rows, each with a gradient of 1; threads 1, 2, 4")
rows, tokens = torch.randn(8192, WIDTH).to(BF16), torch.zeros(8192, dtype=torch.long)
right, wrong = [8192.0] * 3, [256.0, 512.0, 1024.0]
one_by_one = torch.zeros((), dtype=BF16)
for _ in range(8192):
    one_by_one += 1
assert one_by_one == 256
check("LayerNorm in bf16", lambda: norm(BF16), rows, eager, wrong)
check("LayerNorm under autocast", lambda: norm(torch.float32), rows, autocast, wrong)
check("LayerNorm in bf16, compiled", lambda: norm(BF16), rows, torch.compile(eager), right)
check("Embedding", embedding, tokens, eager, [256.0] * 3)
check("Linear", linear, rows, eager, right)


def gradients(function, dtype, x, grad):
    parameters = [torch.ones(WIDTH, dtype=dtype, requires_grad=True)]
    if function is F.layer_norm:
        parameters.append(torch.zeros(WIDTH, dtype=dtype, requires_grad=True))
    function(x.to(dtype), (WIDTH,), *parameters).backward(grad.to(dtype))
    return [parameter.grad.double() for parameter in parameters]


def errors(function, threads):
    """Return the relative error of each parameter's gradient in bf16."""
    torch.set_num_threads(threads)
    exact = gradients(function, torch.float64, x, grad)
    got = gradients(function, BF16, x, grad)
    return [((a - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True)]


print("65536 rows, each a normal gradient: relative error against float64; threads 1, 2")
torch.manual_seed(0)
x, grad = torch.randn(2, 65_536, WIDTH).to(BF16)
for function, least, most in ((F.layer_norm, 0.1, 0.5), (F.rms_norm, 0.0, 0.004)):
    seen = errors(function, 1), errors(function, 2)
    for i, name in enumerate(("weight", "bias")[: len(seen[0])]):
        values = seen[0][i], seen[1][i]
        print(function.__name__, name, *(f"{value:.1%}" for value in values))
        assert all(least < value < most for value in values), "it has changed"
PYTHON
