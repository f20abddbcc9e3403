"""Fused operations against their plain forms in float64: on a CPU, compiled, and on a GPU."""

import copy
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from harness import fp8, functions, ops
from harness.kernels import EPS

ROOT = Path(ops.__file__).parent.parent
T, H, D = 16, 4, 8  # positions, heads, head size
BASE = 10_000
SIZES = [  # rows, width, hidden
    (512, 128, 256),
    (1000, 96, 200),
    (77, 40, 136),
    (4096, 640, 2560),
]
FP8_SIZES = [(512, 128, 256), (1008, 96, 208), (80, 48, 144), (4096, 640, 2560)]


@pytest.fixture(autouse=True)
def full_precision():
    """Multiply float32 in float32, whatever a test before this one has asked for."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def gradients(y: torch.Tensor, inputs: list[torch.Tensor], grad: torch.Tensor):
    return torch.autograd.grad(y, inputs, grad)


@pytest.fixture(params=["eager", "compiled"])
def call(request):
    """Call a function as it is, or as torch.compile traces it, without the compiler behind."""
    if request.param == "eager":
        return lambda function, *args: function(*args)
    torch._dynamo.reset()
    return lambda function, *args: torch.compile(
        function, backend="aot_eager", fullgraph=True, dynamic=False
    )(*args)


# ---- ReLU^2 MLP ---------------------------------------------------------------------------------
def operands(
    rows: int, width: int, hidden: int, dtype: torch.dtype, device: str = "cuda"
) -> list[torch.Tensor]:
    """Return x (rows, width), the two matrices of the MLP and a gradient of its result."""
    torch.manual_seed(0)
    x, gradient = torch.randn(2, rows, width)
    fc = torch.randn(hidden, width) * width**-0.5
    proj = torch.randn(width, hidden) * hidden**-0.5
    return [t.to(device, dtype) for t in (x, fc, proj, gradient)]


def exact_mlp(x, fc, proj):
    x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    return F.relu(x @ fc.T).square() @ proj.T


def errors(op, exact_op, inputs: list[torch.Tensor], gradient=None) -> list[float]:
    """Return the relative errors of the result and of each gradient, against float64."""
    inputs = [t.clone().requires_grad_() for t in inputs]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    y, expected = op(*inputs), exact_op(*exact)
    gradient = torch.ones_like(y) if gradient is None else gradient
    got = [y, *gradients(y, inputs, gradient)]
    wanted = [expected, *gradients(expected, exact, gradient.double())]
    pairs = zip(got, wanted, strict=True)
    return [relative_error(a.detach(), b.detach()) for a, b in pairs]


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float32, 2e-6)]
)
@pytest.mark.parametrize("rows, width, hidden", SIZES[:3])
def test_the_mlp_of_a_cpu_is_that_of_float64(call, rows, width, hidden, dtype, tolerance):
    *inputs, gradient = operands(rows, width, hidden, dtype, "cpu")
    found = errors(partial(call, ops.norm_relu2_mlp), exact_mlp, inputs, gradient)
    assert max(found) < tolerance, found


def test_the_mlp_takes_any_number_of_leading_dimensions_and_weights_in_float32():
    x, fc, proj, _ = operands(24, 16, 32, torch.float32, "cpu")
    y = ops.norm_relu2_mlp(x.view(2, 3, 4, 16).bfloat16(), fc, proj)
    assert y.shape == (2, 3, 4, 16) and y.dtype == torch.bfloat16
    assert torch.allclose(
        y.view(24, 16).float(), exact_mlp(x, fc, proj), rtol=0.1, atol=0.1
    )


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e4])  # of the gradient
@pytest.mark.parametrize("rows, width, hidden", FP8_SIZES)
def test_the_mlp_in_fp8_and_its_gradients_are_near_those_of_float64(
    call, rows, width, hidden, scale
):
    """e4m3 rounds by up to 1/16, e5m2 by 1/8; a result sums up thousands of such errors."""
    x, fc, proj, gradient = operands(rows, width, hidden, torch.float32)
    x, gradient = (5 * x).bfloat16(), (scale * gradient).bfloat16()
    assert ops.runs_fp8(x, hidden)
    op = partial(call, ops.norm_relu2_mlp)
    found = errors(op, exact_mlp, [x, fc, proj], gradient)
    assert max(found) < 0.1, found
    plain = errors(plain_mlp, exact_mlp, [x, fc, proj], gradient)
    assert max(plain) < max(found)  # so it was fp8


def plain_mlp(x, fc, proj):
    """Compute it as where fp8 is not to be had: rows of 15 are no multiple of 16."""
    parts = [ops.norm_relu2_mlp(part, fc, proj) for part in x.split(15)]
    return torch.cat(parts)


@pytest.mark.gpu
@pytest.mark.parametrize("rows, width, hidden", SIZES[1:3])
def test_the_mlp_of_a_size_that_fp8_cannot_take_is_the_plain_one(
    call, rows, width, hidden
):
    *inputs, gradient = operands(rows, width, hidden, torch.bfloat16)
    found = errors(partial(call, ops.norm_relu2_mlp), exact_mlp, inputs, gradient)
    assert max(found) < 2e-2, found


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_comes_out_of_the_fused_mlp_as_out_of_the_plain_one(bad):
    x, fc, proj, _ = operands(304, 128, 256, torch.bfloat16)
    x[7, 3] = bad
    got, plain = ops.norm_relu2_mlp(x, fc, proj), plain_mlp(x, fc, proj)
    assert torch.equal(got.isnan(), plain.isnan()) and not got[7].isfinite().any()
    assert got[:7].isfinite().all() and got[8:].isfinite().all()


@pytest.mark.gpu
def test_no_row_of_the_fused_mlp_depends_on_another():
    x, fc, proj, _ = operands(2048, 640, 2560, torch.bfloat16)
    y = ops.norm_relu2_mlp(x, fc, proj)
    x[::2] *= 100
    x[::2] += 1
    assert torch.equal(ops.norm_relu2_mlp(x, fc, proj)[1::2], y[1::2])


class PlainKernels:
    """What the kernels behind fp8.py do, in torch on a CPU."""

    E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

    @staticmethod
    def both(x: torch.Tensor, dtype: torch.dtype):
        top = torch.finfo(dtype).max
        return x.clamp(-top, top).to(dtype), x.T.clamp(-top, top).to(dtype).contiguous()

    def cast_both(self, x, scale, dtype):
        return self.both(x.float() * scale[:, None], dtype)

    def relu_square(self, a, b, scale):
        return self.both((a.float() @ b.float().T * scale).relu().square(), self.E4M3)

    def relu_square_gradient(self, a, b, squares, scale):
        slope = 2 * squares.float().sqrt().T
        return self.both(a.float() @ b.float().T * scale * slope, self.E5M2)

    @staticmethod
    def moved(qkv, offset):
        """Return q, k, v of what the product is, (B, T, 3, H, D)."""
        q, k, v = qkv.float().unbind(2)
        if offset:
            slow = torch.arange(k.size(-1)) % (k.size(-1) // 2) >= k.size(-1) // 4
            k = torch.where(slow, F.pad(k[:, :-1], (0, 0, 0, 0, 1, 0)), k)
        return q, k, v

    def rotate(self, x, cos, sin, part, offset):
        t = self.moved(torch.cat([x, x[:, :, :1]], 2), offset)[part]
        rstd = (t.square().mean(-1) + EPS).rsqrt()
        return ops.rotary_norm(t, cos, sin).to(x.dtype), rstd

    def qkv_gradient(self, dq, dk, dv, q, k, q_rstd, k_rstd, cos, sin, offset, scale):
        parts = []
        for grad, y, rstd in ((dq, q, q_rstd), (dk, k, k_rstd)):
            grad, y, half = grad.float(), y.float(), y.size(-1) // 2
            dx = rstd[..., None] * (grad - y * (grad * y).mean(-1, keepdim=True))
            parts.append(dx * cos - dx.roll(half, -1) * sin)
        before = torch.zeros(*q.shape[:2], 3, *q.shape[2:], requires_grad=True)
        with torch.enable_grad():
            after = torch.stack(self.moved(before, offset), 2)
        (made,) = torch.autograd.grad(after, before, torch.stack([*parts, dv.float()], 2))
        return self.both(made.flatten(2).flatten(0, 1) * scale, self.E5M2)


def use_kernels(patch: pytest.MonkeyPatch, kernels: PlainKernels) -> None:
    """Have fp8.py use these, and a product that a CPU has."""

    def matmul(a, b, scale, dtype=torch.float32):
        return (a.float() @ b.float().T * scale).to(dtype)

    patch.setattr(fp8, "kernels", kernels)
    patch.setattr(fp8, "matmul_fp8", matmul)


@pytest.fixture
def plain_kernels(monkeypatch):
    use_kernels(monkeypatch, PlainKernels())


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [512, 4096])
@pytest.mark.parametrize("trained", ["all", "odd"])  # rows with a gradient
def test_a_loss_of_every_second_token_reaches_the_fp8_mlp(
    plain_kernels, rows, trained, weights
):
    x, fc, proj, gradient = operands(rows, 64, 128, torch.bfloat16, "cpu")
    fc, proj = fc.to(weights), proj.to(weights)
    if trained == "odd":
        gradient[::2] = 0
    found = errors(fp8.MLP.apply, exact_mlp, [x, fc, proj], gradient)
    assert max(found) < 0.1, found


# ---- Cross-entropy ------------------------------------------------------------------------------
class ReadsMemory:
    """A kernel's launch, which reads targets one after another whatever the strides say."""

    def __getitem__(self, grid):
        def launch(raw, y, loss, softcap, *_, **__):
            y = y.as_strided((len(raw),), (1,))
            logits = softcap * torch.tanh(raw / softcap)
            loss.copy_(F.cross_entropy(logits, y, reduction="none"))

        return launch


def test_a_loss_of_every_second_token_has_its_own_targets(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(ops.kernels, "cross_entropy_kernel", ReadsMemory())
    raw, y = torch.randn(8, 64), torch.randint(64, (2, 8))[:, ::2].flatten()
    assert not y.is_contiguous()
    loss = ops.kernels.cross_entropy(raw.clone(), y, 7.0)
    expected = F.cross_entropy(7 * torch.tanh(raw / 7), y, reduction="none")
    torch.testing.assert_close(loss, expected)


def test_a_target_that_is_no_id_is_an_error_on_a_cpu_and_not_skipped():
    x, w, y = torch.randn(4, 8), torch.randn(64, 8), torch.tensor([3, -100, 5, 7])
    with pytest.raises(IndexError, match="-100"):
        ops.linear_cross_entropy(x, w, y, 15.0)


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [-100, 64])
def test_a_target_that_is_no_id_makes_the_loss_nan_on_a_gpu(bad):
    x, w = torch.randn(16, 32, device="cuda"), torch.randn(64, 32, device="cuda")
    y = torch.full((16,), 3, device="cuda")
    assert ops.linear_cross_entropy(x, w, y, 15.0).isfinite()
    y[5] = bad
    assert ops.linear_cross_entropy(x, w, y, 15.0).isnan()


@pytest.mark.parametrize(
    "device, dtype, tolerance",
    [
        ("cpu", torch.float32, 2e-6),
        ("cpu", torch.bfloat16, 2e-2),
        pytest.param("cuda", torch.float32, 2e-5, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.bfloat16, 2e-2, marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("vocabulary", [64, 1000])
def test_the_loss_and_its_gradients_are_those_of_float64(
    call, device, dtype, tolerance, vocabulary
):
    torch.manual_seed(0)
    x = torch.randn(2, 24, 32, device=device, dtype=dtype)
    w = torch.randn(vocabulary, 32, device=device)
    y = torch.randint(vocabulary, (2, 24), device=device)

    def exact(x, w):
        logits = 7 * torch.tanh(x @ w.T / 7)
        picked = logits.gather(-1, y[..., None]).squeeze(-1)
        return (logits.exp().sum(-1).log() - picked).mean()

    op = partial(call, lambda x, w: ops.linear_cross_entropy(x, w, y, 7.0))
    found = errors(op, exact, [x, w])
    assert max(found) < tolerance, found


@pytest.mark.gpu
def test_a_nan_among_the_logits_is_one_in_the_loss_and_large_ones_are_none():
    x = torch.full((16, 32), 1e4, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(64, 32, device="cuda")
    y = torch.zeros(16, dtype=torch.long, device="cuda")
    assert ops.linear_cross_entropy(x, w, y, 15.0).isfinite()
    x[3, 3] = math.nan
    assert ops.linear_cross_entropy(x, w, y, 15.0).isnan()


# ---- Embeddings ---------------------------------------------------------------------------------
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.01)]
)
@pytest.mark.parametrize("entries, width", [(1, 16), (37, 40), (5000, 320)])
def test_an_embedding_and_its_gradient_are_those_of_a_product_with_the_ids(
    call, device, dtype, tolerance, entries, width
):
    torch.manual_seed(0)
    weight = torch.randn(entries, width, device=device)
    ids = torch.randint(entries, (3, 111), device=device)
    ids[1] = ids[1, 0]  # one that fills more than a program
    gradient = torch.randn(3, 111, width, device=device, dtype=dtype)

    def exact(weight):
        return F.one_hot(ids, entries).double() @ weight

    op = partial(call, lambda w: ops.embedding(ids, w, dtype))
    assert op(weight).dtype == dtype
    found = errors(op, exact, [weight], gradient)
    assert max(found) < tolerance, found


def test_an_embedding_in_the_dtype_of_its_table_has_a_gradient_also_compiled(
    call, monkeypatch
):
    """torch 2.11: zeros, after a cast that changes nothing."""

    class Plain:
        @staticmethod
        def embedding_gradient(grad, ids, entries):
            return F.one_hot(ids, entries).float().T @ grad

    monkeypatch.setattr(functions, "kernels", Plain)
    ids = torch.randint(5, (2, 7))
    op = partial(call, lambda w: functions.Embedding.apply(ids, w, w.dtype))
    found = errors(op, lambda w: F.one_hot(ids, 5).double() @ w, [torch.randn(5, 3)])
    assert max(found) < 1e-6, found


@pytest.mark.parametrize("device", DEVICES)
def test_the_gradient_of_a_fan_out_is_the_sum_also_if_one_is_not_used(device):
    x = torch.randn(4, 5, device=device, dtype=torch.bfloat16).requires_grad_()
    a, b, _, c = ops.fan_out(x, 4)
    assert all(torch.equal(t, x) for t in (a, b, c))
    weights = torch.randn(3, 4, 5, device=device, dtype=torch.bfloat16)
    sum((t * w).sum() for t, w in zip((a, b, c), weights, strict=True)).backward()
    assert torch.equal(x.grad, weights.float().sum(0).bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize("entries, width", [(1, 8), (50, 40), (2**16, 320)])
def test_rows_move_on_a_gpu_as_on_a_cpu(entries, width):
    torch.manual_seed(0)
    state = [torch.randn(entries, n) for n in (width, 1, 1)]
    state[1:] = (t.zero_() for t in state[1:])
    on_gpu = [t.cuda() for t in state]
    for step in range(1, 4):
        ids, rows = torch.randint(entries, (1, 1000)), torch.randn(1000, width)
        for param, *others in (state, on_gpu):
            grad = torch.sparse_coo_tensor(
                ids, rows, (entries, width), check_invariants=True
            )
            grad = grad.to(param.device)
            ops.row_rmsprop_(param, grad, *others, step, 0.9, 0.1)
    for exact, got in zip(state, on_gpu, strict=True):
        torch.testing.assert_close(got.cpu(), exact, rtol=1e-4, atol=1e-4)


# ---- Queries, keys, values ----------------------------------------------------------------------
def tables(size: int = D) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin (T, 1, D) of angles t * BASE^(-d / (D / 2)), as rotary_norm wants them."""
    frequency = BASE ** -(torch.arange(size // 2, dtype=torch.float64) / (size // 2))
    angle = torch.outer(torch.arange(T, dtype=torch.float64), frequency)
    cos, sin = torch.cat([angle, angle], 1).cos(), torch.cat([angle, -angle], 1).sin()
    return cos.float()[:, None], sin.float()[:, None]


def rotated_by_complex_numbers(x: torch.Tensor) -> torch.Tensor:
    """Return x (B, T, H, D) turned by its position: a half each for real and imaginary part."""
    half = x.size(-1) // 2
    frequency = BASE ** -(torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angle = torch.arange(T, device=x.device)[:, None, None] * frequency
    number = torch.complex(x[..., :half], x[..., half:])
    turned = number * torch.polar(torch.ones_like(angle), -angle)
    return torch.cat([turned.real, turned.imag], -1)


def normed(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def exact_qkv(x: torch.Tensor, w: torch.Tensor, size: int, offset: bool):
    """Return q, k and v side by side, of x (B, T, C), token by token."""
    q, k, v = (normed(x) @ part.T for part in w.chunk(3))  # (B, T, H D)
    q, k, v = (t.unflatten(-1, (-1, size)) for t in (q, k, v))
    if offset:
        quarter = size // 4
        slow = [*range(quarter, 2 * quarter), *range(3 * quarter, size)]
        rows = [torch.zeros_like(k[:, 0]), *k.unbind(1)]
        moved = []
        for before, row in zip(rows, rows[1:], strict=False):
            row = row.clone()
            row[..., slow] = before[..., slow]
            moved.append(row)
        k = torch.stack(moved, 1)
    q, k = (rotated_by_complex_numbers(normed(t)) for t in (q, k))
    return torch.stack([q, k, v])


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize(
    "device, dtype, size, tolerance",
    [
        ("cpu", torch.float32, 8, 1e-5),
        ("cpu", torch.bfloat16, 8, 3e-2),
        pytest.param("cuda", torch.bfloat16, 32, 3e-2, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.bfloat16, 64, 0.1, marks=pytest.mark.gpu),  # fp8
        pytest.param("cuda", torch.bfloat16, 128, 0.1, marks=pytest.mark.gpu),
    ],
)
def test_queries_keys_and_values_and_their_gradients_are_those_of_float64(
    call, device, dtype, size, tolerance, offset
):
    torch.manual_seed(0)
    heads, width = 3, 96
    x = 5 * torch.randn(4, T, width, device=device, dtype=dtype)
    w = torch.randn(3 * heads * size, width, device=device) * width**-0.5
    cos, sin = (t.to(device) for t in tables(size))
    weights = torch.randn(3, 4, T, heads, size, device=device, dtype=dtype)

    def op(x, w):
        return torch.stack(call(ops.norm_qkv, x, *w.chunk(3), cos, sin, offset))

    def exact(x, w):
        return exact_qkv(x, w, size, offset)

    found = errors(op, exact, [x, w], weights)
    assert max(found) < tolerance, found


def qkv_inputs(size: int = 64):
    """Return x (2, T, 96) and the matrices of 3 heads below one another."""
    torch.manual_seed(0)
    x = 5 * torch.randn(2, T, 96, dtype=torch.bfloat16)
    return x, torch.randn(3 * 3 * size, 96) * 96**-0.5


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("used", [(0, 1, 2), (0,), (1,), (2,)])  # outputs with a gradient
@pytest.mark.parametrize("in_rows", [True, False])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_fp8_queries_and_keys_take_any_strides_and_an_output_that_nobody_reads(
    plain_kernels, offset, used, in_rows, weights
):
    x, w = qkv_inputs()
    x = x if in_rows else x.mT.contiguous().mT
    weight = torch.randn(3, 2, T, 3, 64, dtype=torch.bfloat16)[[*used]]

    def op(x, w):
        out = fp8.QKV.apply(x, w, *tables(64), offset)
        return torch.stack([out[i] for i in used])

    def exact(x, w):
        return exact_qkv(x, w, 64, offset)[[*used]]

    found = errors(op, exact, [x, w.to(weights)], weight)
    assert max(found) < 0.1, found


def test_angles_that_differ_by_head_are_not_read_as_those_of_one(monkeypatch):
    """They are broadcast by the plain form, and the kernels know one table for all heads."""
    monkeypatch.setattr(ops, "runs_fp8", lambda *_: True)  # as on Hopper
    monkeypatch.setattr(fp8, "QKV", None)
    x, w = qkv_inputs()
    cos, sin = (t.repeat(1, 3, 1) for t in tables(64))  # (T, H, D)
    q, _, _ = ops.norm_qkv(x, *w.chunk(3), cos, sin, False)
    assert q.shape == (2, T, 3, 64)


def test_fewer_heads_of_keys_and_values_than_of_queries():
    x, w = torch.randn(2, T, 24), torch.randn(8 * D, 24)
    parts = w.split([4 * D, 2 * D, 2 * D])
    q, k, v = ops.norm_qkv(x, *parts, *tables(), True)
    assert (q.size(2), k.size(2), v.size(2)) == (4, 2, 2)
    twice = [
        part.view(2, D, 24).repeat_interleave(2, 0).flatten(0, 1) for part in parts[1:]
    ]
    all_heads = ops.norm_qkv(x, parts[0], *twice, *tables(), True)
    assert torch.allclose(all_heads[1][:, :, ::2], k, atol=1e-5)
    assert torch.allclose(all_heads[2][:, :, ::2], v, atol=1e-5)


@pytest.mark.gpu
def test_no_row_of_fused_queries_and_keys_depends_on_a_later_one():
    x = torch.randn(1, 2048, 640, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(3, 640, 640, device="cuda") * 640**-0.5
    angle = torch.rand(2048, 1, 64, device="cuda")
    cos = torch.cat([angle, angle], -1).cos()
    sin = torch.cat([angle, -angle], -1).sin()
    before = ops.norm_qkv(x, *w, cos, sin, True)
    x[:, 1000:] *= 100
    x[:, 1000:] += 1
    after = ops.norm_qkv(x, *w, cos, sin, True)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:, :1000], b[:, :1000]) and not torch.equal(a, b)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float32, 1e-5)]
)
def test_rotary_norm_and_its_gradient_are_those_of_complex_numbers(
    call, dtype, tolerance
):
    torch.manual_seed(0)
    x, weights = torch.randn(2, 2, T, H, D)
    x = x.to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y = call(ops.rotary_norm, x, *tables())
    expected = rotated_by_complex_numbers(normed(exact))
    assert y.dtype == dtype and relative_error(y.detach(), expected.detach()) < tolerance
    (got,) = gradients(y, [x], weights.to(dtype))
    (wanted,) = gradients(expected, [exact], weights.to(dtype).double())
    assert relative_error(got, wanted) < tolerance


def test_what_rotary_norm_has_no_right_gradient_for_is_refused():
    x, (cos, sin) = torch.randn(1, T, 1, D), tables()
    fade = torch.linspace(1, 0.5, D // 2).repeat(2)
    for wrong in ((cos * fade, sin * fade), (cos, sin.abs()), (cos.roll(1, -1), sin)):
        with pytest.raises(ValueError, match="no rotation.*plain torch"):
            ops.rotary_norm(x, *wrong)
    learnt = cos.clone().requires_grad_()
    with pytest.raises(ValueError, match="no gradient.*plain torch"):
        ops.rotary_norm(x, learnt, sin)


@torch.no_grad()
def test_rotary_scores_depend_on_the_distance_alone():
    torch.manual_seed(0)
    pair = (t.expand(1, T, 1, D) for t in torch.randn(2, 1, 1, 1, D))
    q, k = (ops.rotary_norm(t, *tables())[0, :, 0] for t in pair)
    scores = q @ k.T  # (T, T) of one query and one key at every pair of positions
    for distance in range(-T + 1, T):
        along = scores.diagonal(distance)
        assert torch.allclose(along, along[:1].expand_as(along), atol=1e-4)
    assert scores[0].std() > 0.05  # and do depend on it


@torch.no_grad()
def test_a_vector_of_zeros_stays_one():
    assert not ops.rotary_norm(torch.zeros(1, T, 1, D), *tables()).any()


# ---- compiled -----------------------------------------------------------------------------------
FIRST_IMPORT = """
import sys, torch
from harness import ops
class Finder:
    def find_spec(name, *_):
        if name in ("torch._dynamo", "torch._inductor"):
            sys.exit(name)
sys.meta_path.insert(0, Finder)
ops.prepare_compiler()
"""


def test_the_import_thread_and_an_optimizer_take_the_same_module_first():
    """Else each may wait for the other; Python then shows one of them half a module."""
    call = [sys.executable, "-c", FIRST_IMPORT]
    how = {"cwd": ROOT, "stderr": subprocess.PIPE, "text": True}
    assert subprocess.run(call, **how).stderr == "torch._dynamo\n"


def test_a_compiled_function_is_the_plain_one_on_a_cpu():
    @ops.compiled
    def twice(factor, x):
        """Return factor * x."""
        return factor * x

    assert twice.__name__ == "twice" and twice.__doc__ == "Return factor * x."
    assert torch.equal(twice(2, torch.ones(3)), torch.full((3,), 2.0))


def test_a_copy_of_a_module_with_a_compiled_method_calls_its_own():
    class Layer(torch.nn.Linear):
        def __init__(self):
            super().__init__(1, 1, bias=False)
            self.double = ops.compiled(self.compute)

        def compute(self, x):
            return 2 * self(x)

    layer, x = Layer(), torch.ones(1, 1)
    average = copy.deepcopy(layer)  # as torch's AveragedModel does
    torch.nn.init.constant_(layer.weight, 1.0)
    torch.nn.init.constant_(average.weight, 3.0)
    assert (layer.double(x).item(), average.double(x).item()) == (2.0, 6.0)


@pytest.mark.gpu
def test_a_forward_hook_on_a_compiled_layer_fires_whenever_it_was_put_on():
    layer, seen = torch.nn.Linear(8, 8, device="cuda"), []

    @ops.compiled
    def forward(x):
        return layer(x)

    x = torch.randn(2, 8, device="cuda")
    forward(x)
    layer.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    forward(x)
    assert len(seen) == 1


def test_a_compiled_function_without_a_tensor_is_named():
    @ops.compiled
    def ones(n):
        return torch.ones(n)

    with pytest.raises(TypeError, match="ones: @compiled needs a tensor"):
        ones(3)
