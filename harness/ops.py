"""Fused operations of the model, each with its plain form inside. Not edited; a part of the rules.

Each is the kernel where that runs, plain torch elsewhere.
To change what one computes, write plain torch in its place in train.py.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from harness import kernels
from harness.gpu import compute_capability


def compiled(function: Callable) -> Callable:
    """Decorate a function or method of tensors: compiled on a GPU, once for all layers.

    A Python number in its arguments, or in an attribute that it reads, is compiled in: one that
    changes from step to step goes in as a 0-dim tensor.
    """

    @functools.cache
    def fused() -> Callable:  # when first needed: a CPU does without
        prepare_compiler()
        return torch.compile(function, dynamic=False, fullgraph=True)

    @functools.wraps(function)
    def call(*args):
        on_gpu = next(a for a in args if isinstance(a, torch.Tensor)).is_cuda
        return (fused() if on_gpu else function)(*args)

    return call


def any_length(*tensors: torch.Tensor) -> None:
    """Have what is compiled for these serve any first length, such as a number of layers."""
    if tensors[0].is_cuda:
        for t in tensors:
            torch._dynamo.maybe_mark_dynamic(t, 0)


@functools.cache
def prepare_compiler() -> None:
    """Import torch.compile, which takes seconds, and set it up."""
    import torch._dynamo  # first, as optimizers do beside this thread
    import torch._inductor.compile_fx

    # For each batch size tried and layers that differ; by default 8 at most.
    torch._dynamo.config.recompile_limit = 64
    # A forward hook on a layer fires inside what is compiled too, as on a CPU.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch.compiler.assume_constant_result(has_tensor_memory_access)


# ---- fp8 ----------------------------------------------------------------------------------------
EPS = 1e-7  # added to a mean square, so that a vector of zeros has a norm
E4M3_MAX = 448.0
GRAD_TOP = 1024.0  # of a gradient's scaled entries, about; e5m2 ends at 57344
GRAD_ROWS = 2048  # of a gradient, whose largest entry sets its scale


def runs_fp8(x: torch.Tensor, *lengths: int) -> bool:
    """Return whether products of x (..., C) run in fp8: in bf16, where kernels.py runs."""
    fits = all(n % 16 == 0 for n in (x[..., 0].numel(), x.size(-1), *lengths))
    return x.is_cuda and x.dtype == torch.bfloat16 and fits and has_tensor_memory_access()


def has_tensor_memory_access() -> bool:
    """Return whether the GPU copies tiles by descriptors: Hopper, server Blackwell."""
    return compute_capability()[0] in (9, 10)


def normed_scale(x: torch.Tensor) -> float:
    """Return the factor on the entries of normed rows x (N, C), at most sqrt(C)."""
    return E4M3_MAX / x.size(1) ** 0.5


def to_fp8(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return w in e4m3, up to its largest number, and what to multiply that by, (1,)."""
    scale = (w.abs().amax().float() / E4M3_MAX).clamp_min(1e-12)
    return (w / scale).to(kernels.E4M3), scale.view(1)


def matmul_fp8(
    a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor, dtype=torch.float32
) -> torch.Tensor:
    """Return a (M, K) @ b.T * scale, of b (N, K) and scale (1,)."""
    return torch._scaled_mm(a, b.T, scale, torch.ones_like(scale), out_dtype=dtype)


# ---- ReLU^2 MLP ---------------------------------------------------------------------------------
def norm_relu2_mlp(
    x: torch.Tensor, w_fc: torch.Tensor, w_proj: torch.Tensor
) -> torch.Tensor:
    """Return relu(norm(x) @ w_fc.T)^2 @ w_proj.T, in x's dtype. Source: arXiv:2109.08668.

    x (..., C), w_fc (H, C), w_proj (C, H) -> (..., C); norm: RMSNorm without weights. In fp8 on
    Hopper, forward and backward, the square and its gradient inside the products. There, an
    activation above 21 counts as 21, one below 0.03 as 0.
    """
    if runs_fp8(x, len(w_fc)):
        return FP8MLP.apply(x.flatten(0, -2), w_fc, w_proj).view_as(x)
    x = F.rms_norm(x, x.shape[-1:], eps=EPS)
    w_fc, w_proj = w_fc.to(x.dtype), w_proj.to(x.dtype)
    return F.linear(F.relu(F.linear(x, w_fc)).square(), w_proj)


class FP8MLP(torch.autograd.Function):
    """norm_relu2_mlp of x (N, C). Each operand is cast once, both ways.

    The scale of the normed x is fixed, so that no token has a part in another's rounding.
    """

    @staticmethod
    def forward(ctx, x, w_fc, w_proj):
        rstd = (x.float().square().mean(-1) + EPS).rsqrt()  # (N,)
        x8, x8_t = kernels.cast_both(x, rstd * normed_scale(x), kernels.E4M3)
        fc8, fc_scale = to_fp8(w_fc)
        proj8, proj_scale = to_fp8(w_proj)
        squares, squares_t = kernels.relu_square(x8, fc8, fc_scale / normed_scale(x))
        saved = (x, rstd, x8_t, squares_t, fc8, fc_scale, proj8, proj_scale)
        ctx.save_for_backward(*saved)
        return matmul_fp8(squares, proj8, proj_scale, x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, rstd, x8_t, squares_t, fc8, fc_scale, proj8, proj_scale = ctx.saved_tensors
        some = grad[:: len(grad) // GRAD_ROWS | 1]  # odd: of all positions
        scale = (some.abs().amax().float() / GRAD_TOP).clamp_min(1e-30).view(1)
        grad8, grad8_t = kernels.cast_both(grad, 1 / scale, kernels.E5M2)
        proj8_t, fc8_t = proj8.T.contiguous(), fc8.T.contiguous()
        pre = kernels.relu_square_gradient(grad8, proj8_t, squares_t, proj_scale)
        d_proj = matmul_fp8(grad8_t, squares_t, scale)
        d_fc = matmul_fp8(pre[1], x8_t, scale / normed_scale(x))
        d_normed = matmul_fp8(pre[0], fc8_t, scale * fc_scale, grad.dtype).float()
        rstd = rstd[:, None]
        normed = x.float() * rstd
        dx = rstd * (d_normed - normed * (d_normed * normed).mean(-1, keepdim=True))
        return dx.to(grad.dtype), d_fc, d_proj


# ---- Cross-entropy ------------------------------------------------------------------------------
MAX_SOFTCAP = 60.0  # below it, the sum of V exponentials stays finite


def linear_cross_entropy(
    x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, softcap: float
) -> torch.Tensor:
    """Return the mean cross-entropy of softcap * tanh(x @ w.T / softcap) for y, nats per token.

    x (..., C), w (V, C), ids y (...) -> 0-dim, float32. On a GPU the logits are read once, for
    loss and gradient. Source of the cap: arXiv:2408.00118.
    """
    x, y = x.flatten(0, -2), y.flatten()
    if x.is_cuda and softcap <= MAX_SOFTCAP:
        return LinearCrossEntropy.apply(x, w, y, softcap)
    raw = F.linear(x, w.to(x.dtype)).float()
    logits = softcap * torch.tanh(raw / softcap)
    return F.cross_entropy(logits, y, ignore_index=-(2**31))  # -100 is an error


class LinearCrossEntropy(torch.autograd.Function):
    """linear_cross_entropy of x (N, C), y (N,); keeps the logits' gradient, not the logits."""

    @staticmethod
    def forward(ctx, x, w, y, softcap):
        slope = x @ w.to(x.dtype).T  # (N, V): the logits, until the kernel has read them
        loss = kernels.cross_entropy(slope, y, softcap)
        ctx.save_for_backward(x, w, slope)
        return loss.mean()

    @staticmethod
    def backward(ctx, grad):
        x, w, slope = ctx.saved_tensors
        grad = grad / len(x)
        dx = (slope @ w.to(x.dtype)) * grad
        return dx.to(x.dtype), ((slope.T @ x) * grad).to(w.dtype), None, None


# ---- QK-norm of a rotary embedding --------------------------------------------------------------
def rotary_norm(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return x (B, T, H, D) turned by its position, then RMS-normalised per head.

    cos and sin (T, 1, D) hold each angle twice, for both halves of x; the second sin is negative.
    The gradient takes them for a rotation. Computed in float32. Sources: RoPE arXiv:2104.09864,
    QK-norm arXiv:2010.04245.
    """
    return RotaryNorm.apply(x, cos, sin)


class RotaryNorm(torch.autograd.Function):
    """Its gradient is computed from its result, which attention keeps anyway."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        wide = x.float()
        scale = (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()
        y = scale * (wide * cos + wide.roll(x.size(-1) // 2, -1) * sin)
        if x.dtype != torch.float32:
            # Compiled (torch 2.11), a cast that changes nothing, of a result that is saved
            # as well, makes the whole gradient zero.
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
