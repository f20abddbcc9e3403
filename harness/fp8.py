"""What ops.py computes in fp8, with its gradients. Not edited; a part of the rules.

Products want both operands in rows along their sum, so each operand of a forward product is
cast once, as it is and transposed: its gradient needs the other. Weights and activations are in
e4m3, which is finer, gradients in e5m2, which reaches further.
"""

import torch

from harness import kernels
from harness.gpu import compute_capability
from harness.kernels import EPS

E4M3_MAX = 448.0
GRAD_TOP = 1024.0  # of a gradient's scaled entries, about; e5m2 ends at 57344
GRAD_ROWS = 2048  # of a gradient, whose largest entry sets its scale

trusted = True  # until kernel_check.py finds an error


def runs_fp8(x: torch.Tensor, *lengths: int) -> bool:
    """Return whether products of x (..., C) run in fp8: in bf16, where kernels.py runs."""
    fits = all(n % 16 == 0 for n in (x[..., 0].numel(), x.size(-1), *lengths))
    fits = fits and trusted and x.dtype == torch.bfloat16
    return x.is_cuda and fits and has_tensor_memory_access()


def has_tensor_memory_access() -> bool:
    """Return whether the GPU copies tiles by descriptors: Hopper, server Blackwell."""
    return compute_capability()[0] in (9, 10)


def to_fp8(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return w in e4m3, up to its largest number, and what to multiply that by, (1,)."""
    scale = (w.abs().amax().float() / E4M3_MAX).clamp_min(1e-12)
    return (w / scale).to(kernels.E4M3), scale.view(1)


def matmul_fp8(
    a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor, dtype=torch.float32
) -> torch.Tensor:
    """Return a (M, K) @ b.T * scale, of b (N, K) and scale (1,)."""
    return torch._scaled_mm(a, b.T, scale, torch.ones_like(scale), out_dtype=dtype)


def gradient_scale(*grads: torch.Tensor) -> torch.Tensor:
    """Return the scale of gradients (N, ...) in e5m2, (1,), by a sample of their rows."""
    stride = len(grads[0]) // GRAD_ROWS | 1  # odd: of all positions
    some = torch.cat([grad[::stride] for grad in grads])
    return (some.abs().amax().float() / GRAD_TOP).clamp_min(1e-30).view(1)


# ---- RMSNorm ------------------------------------------------------------------------------------
def cast_normed(x: torch.Tensor):
    """Return norm(x) of x (N, C) in e4m3 both ways, its scale, and 1 / root mean square (N,).

    The scale is fixed, so that no token has a part in another's rounding.
    """
    rstd = (x.float().square().mean(-1) + EPS).rsqrt()
    scale = E4M3_MAX / x.size(1) ** 0.5  # normed entries are at most sqrt(C)
    return *kernels.cast_both(x, rstd * scale, kernels.E4M3), 1 / scale, rstd


def norm_gradient(
    x: torch.Tensor, rstd: torch.Tensor, grad: torch.Tensor
) -> torch.Tensor:
    """Return the gradient of x (N, C) for that of norm(x), in its dtype."""
    rstd, wide = rstd[:, None], grad.float()
    normed = x.float() * rstd
    dx = rstd * (wide - normed * (wide * normed).mean(-1, keepdim=True))
    return dx.to(grad.dtype)


# ---- ReLU^2 MLP ---------------------------------------------------------------------------------
class MLP(torch.autograd.Function):
    """ops.norm_relu2_mlp of x (N, C)."""

    @staticmethod
    def forward(ctx, x, w_fc, w_proj):
        x8, x8_t, x_scale, rstd = cast_normed(x)
        fc8, fc_scale = to_fp8(w_fc)
        proj8, proj_scale = to_fp8(w_proj)
        squares, squares_t = kernels.relu_square(x8, fc8, fc_scale * x_scale)
        ctx.x_scale = x_scale
        saved = (x, rstd, x8_t, squares_t, fc8, fc_scale, proj8, proj_scale)
        ctx.save_for_backward(*saved)
        return matmul_fp8(squares, proj8, proj_scale, x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, rstd, x8_t, squares_t, fc8, fc_scale, proj8, proj_scale = ctx.saved_tensors
        scale = gradient_scale(grad)
        grad8, grad8_t = kernels.cast_both(grad, 1 / scale, kernels.E5M2)
        proj8_t, fc8_t = proj8.T.contiguous(), fc8.T.contiguous()
        pre = kernels.relu_square_gradient(grad8, proj8_t, squares_t, proj_scale)
        d_proj = matmul_fp8(grad8_t, squares_t, scale)
        d_fc = matmul_fp8(pre[1], x8_t, scale * ctx.x_scale)
        d_normed = matmul_fp8(pre[0], fc8_t, scale * fc_scale, grad.dtype)
        return norm_gradient(x, rstd, d_normed), d_fc, d_proj


# ---- Queries, keys, values ----------------------------------------------------------------------
class QKV(torch.autograd.Function):
    """ops.norm_qkv of x (B, T, C). The gradients of q and k are computed from these."""

    @staticmethod
    def forward(ctx, x, w, cos, sin, offset):
        (B, T, _), D = x.shape, cos.size(-1)
        x8, x8_t, ctx.x_scale, rstd = cast_normed(x.flatten(0, 1))
        w8, w_scale = to_fp8(w)
        HD = len(w) // 3
        # v apart: attention keeps it, and would keep what is below q and k with it.
        qk = matmul_fp8(x8, w8[: 2 * HD], w_scale * ctx.x_scale, x.dtype)
        v = matmul_fp8(x8, w8[2 * HD :], w_scale * ctx.x_scale, x.dtype)
        qk, v = qk.view(B, T, 2, -1, D), v.view(B, T, -1, D)
        q, q_rstd = kernels.rotate(qk, cos, sin, 0, False)
        k, k_rstd = kernels.rotate(qk, cos, sin, 1, offset)
        ctx.offset = offset
        saved = (x, rstd, x8_t, w8, w_scale, q, k, q_rstd, k_rstd, cos, sin)
        ctx.save_for_backward(*saved)
        return q, k, v

    @staticmethod
    def backward(ctx, dq, dk, dv):
        x, rstd, x8_t, w8, w_scale, *turned, cos, sin = ctx.saved_tensors
        q_rstd, k_rstd = turned[2:]
        parts = (dq * q_rstd[..., None], dk * k_rstd[..., None], dv)  # about what is cast
        scale = gradient_scale(*(part.flatten(0, 1) for part in parts))
        grad8, grad8_t = kernels.qkv_gradient(
            dq, dk, dv, *turned, cos, sin, ctx.offset, 1 / scale
        )
        dw = matmul_fp8(grad8_t, x8_t, scale * ctx.x_scale)
        d_normed = matmul_fp8(grad8, w8.T.contiguous(), scale * w_scale, dq.dtype)
        dx = norm_gradient(x.flatten(0, 1), rstd, d_normed)
        return dx.view_as(x), dw, None, None, None
