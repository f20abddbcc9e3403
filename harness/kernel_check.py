"""Whether the fused operations are right on this GPU: a compiler can be wrong without a word.

Seen: ptxas 12.8 filled every fourth entry of a gradient with what a register happened to hold. The
loss fell all the same.
"""

from collections.abc import Callable
from contextlib import suppress

import torch

from harness import fp8, ops
from harness.gpu import is_out_of_memory
from harness.output import clean

ROWS, WIDTH, HEAD = (4, 64), 256, 128
MAX_ERROR = 0.2  # relative; fp8 alone stays below 0.1


def check_kernels(device: torch.device) -> None:
    """Have products run in plain torch from here on, and say so, if those in fp8 are wrong."""
    if not fp8.runs_fp8(torch.empty(*ROWS, WIDTH, dtype=torch.bfloat16, device=device)):
        return
    hash_compiler()
    ops.prepare_compiler()  # not while another thread imports it: Triton would be half there
    try:
        errors = largest_errors(device)
        wrong = [
            f"{name} is wrong (relative error {error:.2f})"
            for name, error in errors.items()
            if not error < MAX_ERROR  # nor NaN
        ]
    except Exception as error:  # of a compiler, whatever it is
        if is_out_of_memory(error):
            raise
        wrong = [f"{type(error).__name__}: {clean(str(error))}"]
    if wrong:
        fp8.trusted = False
        print(
            f"kernels: in fp8 on this GPU {'; '.join(wrong)}; plain torch serves",
            flush=True,
        )


def hash_compiler() -> None:
    """Have Triton hash its own files, for the keys of its cache: 0.3 s, once per process.

    Here another thread is still importing, and this one would wait for it.
    """
    with suppress(ImportError):  # where a later Triton keeps it
        from triton.runtime.cache import triton_key

        triton_key()


def largest_errors(device: torch.device) -> dict[str, float]:
    """Return the largest relative error of each operation's results and gradients."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    angle = random(ROWS[1], 1, HEAD // 2)
    cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, -angle], -1).sin()
    matrices = random(7, WIDTH, WIDTH) * WIDTH**-0.5
    fc, proj, qkv = matrices[:2].flatten(0, 1), matrices[2:4], matrices[4:]
    cases = {
        "norm_relu2_mlp": (ops.norm_relu2_mlp, [fc, torch.cat([*proj], 1)]),
        "norm_qkv": (lambda *a: torch.stack(ops.norm_qkv(*a, cos, sin, True)), [*qkv]),
    }
    errors = {}
    for name, (op, weights) in cases.items():
        x = random(*ROWS, WIDTH).bfloat16()
        grad = random(*op(x.float(), *weights).shape)
        exact = results(op, x.float(), weights, grad)  # in plain torch
        pairs = zip(results(op, x, weights, grad), exact, strict=True)
        found = [float((got - want).norm() / want.norm()) for got, want in pairs]
        errors[name] = max(found, key=lambda error: (error != error, error))
    return errors


def results(op: Callable, x: torch.Tensor, weights: list, grad: torch.Tensor) -> list:
    """Return op(x, *weights) and the gradients of all inputs for that of the result."""
    inputs = [t.detach().clone().requires_grad_() for t in (x, *weights)]
    with torch.enable_grad():
        y = op(*inputs)
        grads = torch.autograd.grad(y, inputs, grad.to(y.dtype))
    return [t.detach().float() for t in (y, *grads)]
