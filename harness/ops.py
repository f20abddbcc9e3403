"""Fused operations of the model, each with its plain form inside. Not edited; a part of the rules.

Each is the kernel where that runs (on a GPU; fp8.py on Hopper), plain torch elsewhere.
To change what one computes, write plain torch in its place in train.py.
"""

import functools
import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F

import constants as C
from harness import fp8, functions, kernels
from harness.fp8 import runs_fp8
from harness.kernels import EPS

# Of a function: for each batch size tried and layers that differ; torch's own limit is 8.
MOST_GRAPHS = 64


def compiled(function: Callable) -> Callable:
    """Decorate a function or method of tensors: compiled on a GPU, once for all layers.

    A Python number in its arguments, or in an attribute that it reads, is compiled in: one that
    changes from step to step goes in as a 0-dim tensor.
    """
    if inspect.ismethod(function):  # else a copied module calls the original
        return compiled(function.__func__).__get__(function.__self__)

    @functools.cache
    def fused() -> Callable:  # when first needed: a CPU does without
        prepare_compiler()
        return torch.compile(function, dynamic=False, fullgraph=True)

    @functools.wraps(function)
    def call(*args):
        first = next((a for a in args if isinstance(a, torch.Tensor)), None)
        if first is None:
            raise TypeError(f"{function.__name__}: @compiled needs a tensor, by position")
        if C.DRY_RUN:
            from harness import dry_run  # it needs this file

            return dry_run.trace(function, args)
        return (fused() if first.is_cuda else function)(*args)

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

    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    # Else a norm's input is kept for the gradient in float32 too.
    torch._functorch.config.ban_recompute_used_far_apart = False
    # A forward hook on a layer fires inside what is compiled too, as on a CPU.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch.compiler.assume_constant_result(fp8.has_tensor_memory_access)


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
        return fp8.MLP.apply(x.flatten(0, -2), w_fc, w_proj).view_as(x)
    x = F.rms_norm(x, x.shape[-1:], eps=EPS)
    w_fc, w_proj = w_fc.to(x.dtype), w_proj.to(x.dtype)
    return F.linear(F.relu(F.linear(x, w_fc)).square(), w_proj)


# ---- Queries, keys, values ----------------------------------------------------------------------
def norm_qkv(
    x: torch.Tensor,
    w_q: torch.Tensor,
    w_k: torch.Tensor,
    w_v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    offset: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q, k, v (B, T, heads, D): norm(x) times each matrix, q and k by `rotary_norm`.

    x (B, T, C), matrices (heads * D, C), cos and sin (T, 1, D).
    With `offset`, the half of a key that has the slow angles is taken from the token before, of
    a row's first token 0. In fp8 on Hopper, forward and backward, if all have the same heads.
    """
    D = cos.size(-1)
    w = torch.cat([w_q, w_k, w_v])  # one product
    fits = len(w_q) == len(w_k) == len(w_v) and D in (64, 128, 256)
    fits = fits and cos.shape == sin.shape == (x.size(1), 1, D)  # else they are broadcast
    if fits and runs_fp8(x, len(w)):
        return fp8.QKV.apply(x, w, cos, sin, offset)
    qkv = F.linear(F.rms_norm(x, x.shape[-1:], eps=EPS), w.to(x.dtype))
    heads = [len(part) // D for part in (w_q, w_k, w_v)]
    q, k, v = qkv.unflatten(-1, (-1, D)).split(heads, dim=2)
    if offset:
        slow = torch.arange(D, device=x.device) % (D // 2) >= D // 4
        k = torch.where(slow, F.pad(k[:, :-1], (0, 0, 0, 0, 1, 0)), k)
    return rotary_norm(q, cos, sin), rotary_norm(k, cos, sin), v


def rotary_norm(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return x (B, T, H, D) turned by its position, then RMS-normalised per head.

    cos and sin (T, 1, D) hold each angle twice, for both halves of x; the second sin is negative.
    The gradient takes them for a rotation, and they get none. ValueError, on a CPU, if they are
    not. Computed in float32. Sources: RoPE arXiv:2104.09864, QK-norm arXiv:2010.04245.
    """
    if not (x.is_cuda or torch.compiler.is_compiling()):
        check_rotation(cos, sin)
    return functions.RotaryNorm.apply(x, cos, sin)


def check_rotation(cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Refuse, by ValueError, what `rotary_norm` has no gradient for, or a wrong one."""
    advice = "turn queries and keys in plain torch"
    if cos.requires_grad or sin.requires_grad:
        raise ValueError(f"rotary_norm gives cos and sin no gradient; {advice}")
    if type(cos) is not torch.Tensor:  # of shapes alone
        return
    cos, sin, half = cos.float(), sin.float(), cos.size(-1) // 2
    off = (cos.square() + sin.square() - 1).abs() + (cos - cos.roll(half, -1)).abs()
    if not ((off + (sin + sin.roll(half, -1)).abs()).max() < 0.02):
        what = "cos and sin are no rotation, so the gradient of rotary_norm is wrong"
        raise ValueError(f"{what}; {advice}")


# ---- Embeddings ---------------------------------------------------------------------------------
def embedding(
    ids: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return rows of weight (V, C) for ids (...), in `dtype`: (..., C)."""
    if weight.is_cuda:
        return functions.Embedding.apply(ids, weight, dtype)
    return F.embedding(ids, weight).to(dtype)


def fan_out(x: torch.Tensor, n: int) -> tuple[torch.Tensor, ...]:
    """Return x, n times, for n users whose gradients are then summed in one pass."""
    return functions.FanOut.apply(x, n)


def row_rmsprop_(
    param: torch.Tensor,
    grad: torch.Tensor,
    moment: torch.Tensor,
    last: torch.Tensor,
    step: int,
    beta2: float,
    lr: float,
) -> None:
    """Move the entries of param (E, C) that a gradient holds, all if it is not sparse, by RMSprop.

    moment (E, 1): each entry's running mean of its mean square gradient, as of step `last` (E, 1),
    when it was moved; step counts from 1.
    """
    if grad.is_sparse:
        ids, grad = grad._indices()[0], grad._values()
    else:
        ids = torch.arange(len(grad), device=grad.device)
    if param.is_cuda:
        kernels.row_rmsprop(param, moment, last, ids, grad, step, beta2, lr)
        return
    ids, place = ids.unique(return_inverse=True)
    grad = moment.new_zeros(len(ids), grad.size(1)).index_add_(0, place, grad.float())
    kept = beta2 ** (step - last[ids]) * moment[ids]
    square = kept + (1 - beta2) * grad.square().mean(-1, keepdim=True)
    moment[ids], last[ids] = square, torch.full_like(square, step)
    update = lr * grad * square.clamp_min(1e-30).rsqrt()
    param[ids] = (param[ids] - update).to(param.dtype)


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
        return functions.LinearCrossEntropy.apply(x, w, y, softcap)
    raw = F.linear(x, w.to(x.dtype)).float()
    logits = softcap * torch.tanh(raw / softcap)
    return F.cross_entropy(logits, y, ignore_index=-(2**31))  # -100 is an error
