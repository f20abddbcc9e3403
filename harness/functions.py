"""Operations in ops.py that have a gradient of their own. Not edited; a part of the rules."""

import torch
import torch.nn.functional as F

from harness import kernels
from harness.kernels import EPS


class RotaryNorm(torch.autograd.Function):
    """Its gradient is computed from its result, which attention keeps anyway."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        wide = x.float()
        rstd = (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()
        y = rstd * (wide * cos + wide.roll(x.size(-1) // 2, -1) * sin)
        if x.dtype != torch.float32:
            y = y.to(x.dtype)  # elsewhere see Embedding
        ctx.save_for_backward(y, rstd, cos, sin)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, rstd, cos, sin = ctx.saved_tensors
        dtype, grad, y = grad.dtype, grad.float(), y.float()
        dx = rstd * (grad - y * (grad * y).mean(-1, keepdim=True))
        dx = dx * cos - dx.roll(dx.size(-1) // 2, -1) * sin
        return dx.to(dtype), None, None


class Embedding(torch.autograd.Function):
    """Its gradient is read in `dtype`, where torch's own would first write it in float32."""

    @staticmethod
    def forward(ctx, ids, weight, dtype):
        ctx.save_for_backward(ids)
        ctx.entries = len(weight)
        rows = F.embedding(ids, weight)
        # Compiled (torch 2.11), a cast that changes nothing makes the whole gradient zero.
        return rows if rows.dtype == dtype else rows.to(dtype)

    @staticmethod
    def backward(ctx, grad):
        grad, ids = grad.reshape(-1, grad.size(-1)), ctx.saved_tensors[0].flatten()
        return None, kernels.embedding_gradient(grad, ids, ctx.entries), None


class FanOut(torch.autograd.Function):
    """n names of x (...). Autograd by itself would add up their gradients one by one."""

    @staticmethod
    def forward(ctx, x, n):
        return tuple(x.view_as(x) for _ in range(n))

    @staticmethod
    def backward(ctx, *grads):
        if grads[0].is_cuda and not torch.is_grad_enabled():  # else of the second order
            return kernels.total(grads), None
        return sum(grad.float() for grad in grads).to(grads[0].dtype), None


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
