#!/usr/bin/env bash
# torch 2.11.0, on a CPU as on a GPU: an autograd.Function whose forward ends in a cast to the dtype
# that the tensor has already has a gradient of zeros under torch.compile, with every backend,
# whether it saves that tensor (as here), its input or something else. Nothing is raised or said; in
# eager mode the gradient is right. One would expect a cast that changes nothing to change nothing:
# `y.to(x.dtype)` is how such functions return the dtype that came in, so one that trains in bf16
# (where the cast is real) stops learning when it is run in float32.
#
# Output seen (2026-11-29, Python 3.12, Linux x86-64):
#   eager      with the cast 0.8776, without 0.8776
#   aot_eager  with the cast 0.0000, without 0.8776
#   inductor   with the cast 0.0000, without 0.8776
# Fails if that changes. Way out: cast only if the dtype differs. torch 2.12.1 to 2.15.0 are right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.11.0 numpy==2.5.5 2>"$folder/pip.log" || {
    cat "$folder/pip.log"
    exit 1
}
"$folder/venv/bin/python" - <<'PYTHON'
import torch


def sine(cast):
    class Sine(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = x.sin()
            if cast:
                y = y.to(x.dtype)
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx, grad):
            (y,) = ctx.saved_tensors
            return grad * (1 - y * y).sqrt()  # the cosine, for x in (0, pi / 2)

    return Sine


def gradient(cast, backend):
    torch._dynamo.reset()
    function = sine(cast).apply
    if backend != "eager":
        function = torch.compile(function, backend=backend, fullgraph=True)
    x = torch.full((2,), 0.5, requires_grad=True)
    function(x).sum().backward()
    return x.grad[0].item()


print("torch", torch.__version__)
right, wrong = torch.tensor(0.5).cos().item(), 0.0
for backend in ("eager", "aot_eager", "inductor"):
    with_cast, without = gradient(True, backend), gradient(False, backend)
    print(f"{backend:10} with the cast {with_cast:.4f}, without {without:.4f}")
    expected = right if backend == "eager" else wrong
    assert abs(with_cast - expected) < 1e-4 and abs(without - right) < 1e-4, "it has changed"
PYTHON
