"""Fused operations of the model, each with its plain form inside. Not edited; a part of the rules.

An operation picks its form by the device: the kernel where that runs, plain torch everywhere else,
on a CPU too. To change what one of them computes, write plain torch in train.py in its place.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from harness.gpu import compute_capability

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # a platform without CUDA
    triton = None


def compiled(function: Callable) -> Callable:
    """Decorate a function or method of tensors: compiled on a GPU, once for all layers.

    A Python number in its arguments, or in an attribute that it reads, is compiled in: one that
    changes from step to step goes in as a 0-dim tensor.
    """

    @functools.cache
    def fused() -> Callable:  # when it is first needed: a CPU does without the compiler
        prepare_compiler()
        return torch.compile(function, dynamic=False, fullgraph=True)

    @functools.wraps(function)
    def call(*args):
        on_gpu = next(a for a in args if isinstance(a, torch.Tensor)).is_cuda
        return (fused() if on_gpu else function)(*args)

    return call


@functools.cache
def prepare_compiler() -> None:
    """Set torch.compile up; here, since the import of torch._dynamo takes seconds."""
    # A function is compiled for each batch size that is tried, and for layers that differ; by
    # default the ninth time is an error.
    torch._dynamo.config.recompile_limit = 64
    # A forward hook on a layer fires also inside what is compiled, as it does on a CPU.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch.compiler.assume_constant_result(has_tensor_memory_access)


# ---- ReLU^2 MLP ---------------------------------------------------------------------------------
BLOCK_M, BLOCK_N = 128, 256  # of a tile of the result: rows, columns
BLOCK_K_BYTES = 128  # of a row of an operand that are read at once
NUM_WARPS, NUM_STAGES = 8, 3
ALIGNMENT = 16  # bytes of which a row has a whole number: tensor descriptors need it


def has_tensor_memory_access() -> bool:
    """Return whether the GPU copies tiles by tensor descriptors: Hopper, Blackwell of servers."""
    return compute_capability()[0] in (9, 10)


def relu2_mlp(x: torch.Tensor, w_fc: torch.Tensor, w_proj: torch.Tensor) -> torch.Tensor:
    """Return relu(x @ w_fc.T)^2 @ w_proj.T, in x's dtype. Source: arXiv:2109.08668.

    x (..., C), w_fc (H, C), w_proj (C, H) -> (..., C). On a GPU of compute capability 9.0 or 10
    the square and its gradient are part of the matmuls: no pass over memory of their own.
    """
    w_fc, w_proj = w_fc.to(x.dtype), w_proj.to(x.dtype)
    whole = all(n * x.element_size() % ALIGNMENT == 0 for n in w_fc.shape)
    if x.is_cuda and whole and has_tensor_memory_access():
        return FusedReLU2MLP.apply(x.flatten(0, -2), w_fc, w_proj).view_as(x)
    return F.linear(F.relu(F.linear(x, w_fc)).square(), w_proj)


class FusedReLU2MLP(torch.autograd.Function):
    """relu2_mlp of x (N, C), by the kernel below; keeps the squares, not what was squared."""

    @staticmethod
    def forward(ctx, x, w_fc, w_proj):
        squares = relu_square(x, w_fc, None)  # (N, H)
        ctx.save_for_backward(x, w_fc, w_proj, squares)
        return squares @ w_proj.T

    @staticmethod
    def backward(ctx, grad):
        x, w_fc, w_proj, squares = ctx.saved_tensors
        pre = relu_square(grad, w_proj, squares)  # (N, H), of what was squared
        return pre @ w_fc, pre.T @ x, grad.T @ squares


@torch.library.custom_op("autoresearch::relu_square", mutates_args=())
def relu_square(
    a: torch.Tensor, b: torch.Tensor, squares: torch.Tensor | None
) -> torch.Tensor:
    """Return relu(a @ b.T)^2 of a (M, K), b (N, K); or, given these squares, the gradient.

    The gradient of what was squared is (a @ b) * 2 sqrt(squares), where a (M, K) is the gradient
    behind a second matmul with b (K, N). Rows of whole 16 bytes.
    """
    M, K = a.shape
    N = b.size(0) if squares is None else b.size(1)
    out, block_k = a.new_empty(M, N), BLOCK_K_BYTES // a.element_size()
    b_block = [BLOCK_N, block_k] if squares is None else [block_k, BLOCK_N]
    half_tile = [BLOCK_M, BLOCK_N // 2]
    programs = torch.cuda.get_device_properties(a.device).multi_processor_count
    relu_square_kernel[(programs,)](
        TensorDescriptor.from_tensor(a.contiguous(), [BLOCK_M, block_k]),
        TensorDescriptor.from_tensor(b.contiguous(), b_block),
        TensorDescriptor.from_tensor(out if squares is None else squares, half_tile),
        TensorDescriptor.from_tensor(out, half_tile),
        *(M, N, K, squares is not None, BLOCK_M, BLOCK_N, block_k),
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    return out


@relu_square.register_fake
def _(a, b, squares):
    return a.new_empty(len(a), b.size(0) if squares is None else b.size(1))


@triton.jit if triton else lambda kernel: kernel
def relu_square_kernel(
    a, b, squares, out, M, N, K,
    BACKWARD: "tl.constexpr", BM: "tl.constexpr", BN: "tl.constexpr", BK: "tl.constexpr",
):  # fmt: skip
    """Write relu(a @ b.T)^2, or (a @ b) * 2 sqrt(squares), in tiles of (BM, BN).

    Every number is an argument: Triton's cache does not see what a kernel reads elsewhere.
    """
    columns = tl.cdiv(N, BN)
    tiles = tl.cdiv(M, BM) * columns
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        m, n = tile // columns * BM, tile % columns * BN
        total = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            b_tile = b.load([k, n]) if BACKWARD else b.load([n, k]).T
            total = tl.dot(a.load([m, k]), b_tile, total, input_precision="ieee")
        # In two halves, for want of shared memory.
        halves = total.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
        for i in tl.static_range(2):
            at, half = [m, n + i * (BN // 2)], halves[i]
            if BACKWARD:
                half *= 2 * tl.sqrt(squares.load(at).to(tl.float32))
            else:  # the default maximum drops a NaN, which torch.relu keeps
                half = tl.maximum(half, 0.0, propagate_nan=tl.PropagateNan.ALL)
                half *= half
            out.store(at, half.to(out.dtype))


# ---- QK-norm of a rotary embedding --------------------------------------------------------------
EPS = 1e-7  # added to the mean square, so that a vector of zeros has a norm


def rotary_norm(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return x (B, T, H, D) turned by its position, then RMS-normalised per head.

    cos and sin (T, 1, D) hold each angle twice, for both halves of x; the second sin is negative.
    Computed in float32. Sources: RoPE arXiv:2104.09864, QK-norm arXiv:2010.04245.
    """
    return RotaryNorm.apply(x, cos, sin)


class RotaryNorm(torch.autograd.Function):
    """rotary_norm whose gradient is computed from its result, which attention keeps anyway."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        wide = x.float()
        scale = (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()
        y = scale * (wide * cos + wide.roll(x.size(-1) // 2, -1) * sin)
        if x.dtype != torch.float32:
            # Not without need: compiled (torch 2.11), a cast that changes nothing, of a result
            # that is saved as well, makes the whole gradient zero.
            y = y.to(x.dtype)
        ctx.save_for_backward(y, scale, cos, sin)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, scale, cos, sin = ctx.saved_tensors
        dtype, grad, y = grad.dtype, grad.float(), y.float()
        dx = scale * (grad - y * (grad * y).mean(-1, keepdim=True))
        dx = dx * cos - dx.roll(dx.size(-1) // 2, -1) * sin
        return dx.to(dtype), None, None
