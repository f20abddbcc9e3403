"""Fused operations against their plain forms in float64: on a CPU, compiled, and on a GPU."""

import math

import pytest
import torch
import torch.nn.functional as F

from harness import ops

T, H, D = 16, 4, 8  # positions, heads, head size
BASE = 10_000
SIZES = [  # rows, width, hidden
    (512, 128, 256),
    (1000, 96, 200),
    (77, 40, 136),
    (4096, 640, 2560),
]


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
    return F.relu(x @ fc.T).square() @ proj.T


def mlp_errors(call, inputs: list[torch.Tensor], gradient: torch.Tensor) -> list[float]:
    """Return the relative errors of the result and of each gradient, against float64."""
    inputs = [t.clone().requires_grad_() for t in inputs]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    y, expected = call(ops.relu2_mlp, *inputs), exact_mlp(*exact)
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
    errors = mlp_errors(call, inputs, gradient)
    assert max(errors) < tolerance, errors


def test_the_mlp_takes_any_number_of_leading_dimensions_and_weights_in_float32():
    x, fc, proj, _ = operands(24, 16, 32, torch.float32, "cpu")
    y = ops.relu2_mlp(x.view(2, 3, 4, 16).bfloat16(), fc, proj)
    assert y.shape == (2, 3, 4, 16) and y.dtype == torch.bfloat16
    assert torch.allclose(
        y.view(24, 16).float(), exact_mlp(x, fc, proj), rtol=0.1, atol=0.1
    )


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.bfloat16, 5e-3), (torch.float32, 2e-6)]
)
@pytest.mark.parametrize("rows, width, hidden", SIZES)
def test_the_fused_mlp_and_its_gradients_are_those_of_float64(
    call, rows, width, hidden, dtype, tolerance
):
    *inputs, gradient = operands(rows, width, hidden, dtype)
    errors = mlp_errors(call, inputs, gradient)
    assert max(errors) < tolerance, errors


@pytest.mark.gpu
def test_the_mlp_of_a_width_that_the_kernel_cannot_take_is_the_plain_one(call):
    *inputs, gradient = operands(64, 36, 100, torch.bfloat16)  # rows of 72 bytes
    errors = mlp_errors(call, inputs, gradient)
    assert max(errors) < 1e-2, errors


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_comes_out_of_the_fused_mlp_as_out_of_the_plain_one(bad):
    x, fc, proj, _ = operands(300, 128, 256, torch.bfloat16)
    x[7, 3] = bad
    got, plain = ops.relu2_mlp(x, fc, proj), exact_mlp(x, fc, proj)
    assert torch.equal(got.isnan(), plain.isnan()) and not got[7].isfinite().any()
    assert got[:7].isfinite().all() and got[8:].isfinite().all()


@pytest.mark.parametrize("backward", [False, True])
def test_the_kernel_compiles_for_hopper_and_fits_its_shared_memory(
    backward, monkeypatch, tmp_path
):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    m, n, k = ops.BLOCK_M, ops.BLOCK_N, ops.BLOCK_K_BYTES // 2
    half_tile = f"tensordesc<bf16[{m},{n // 2}]>"
    b_tile = f"[{k},{n}]" if backward else f"[{n},{k}]"
    signature = {"a": f"tensordesc<bf16[{m},{k}]>", "b": f"tensordesc<bf16{b_tile}>"}
    signature |= {
        "squares": half_tile,
        "out": half_tile,
        "M": "i32",
        "N": "i32",
        "K": "i32",
    }
    constants = {"BACKWARD": backward, "BM": m, "BN": n, "BK": k}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(ops.relu_square_kernel, signature, constants)
    options = {"num_warps": ops.NUM_WARPS, "num_stages": ops.NUM_STAGES}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.metadata.shared <= 227 * 1024
    assert "wgmma" in compiled.asm["ptx"]  # on the tensor cores
    assert backward or "max.NaN.f32" in compiled.asm["ptx"]  # a NaN stays one


# ---- QK-norm of a rotary embedding --------------------------------------------------------------
def tables() -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin (T, 1, D) of angles t * BASE^(-d / (D / 2)), as rotary_norm wants them."""
    frequency = BASE ** -(torch.arange(D // 2, dtype=torch.float64) / (D // 2))
    angle = torch.outer(torch.arange(T, dtype=torch.float64), frequency)
    cos, sin = torch.cat([angle, angle], 1).cos(), torch.cat([angle, -angle], 1).sin()
    return cos.float()[:, None], sin.float()[:, None]


def rotated_by_complex_numbers(x: torch.Tensor) -> torch.Tensor:
    """Return x (B, T, H, D) turned by its position: a half each for real and imaginary part."""
    frequency = BASE ** -(torch.arange(D // 2, dtype=torch.float64) / (D // 2))
    angle = torch.arange(T)[:, None, None] * frequency
    number = torch.complex(x[..., : D // 2], x[..., D // 2 :])
    turned = number * torch.polar(torch.ones_like(angle), -angle)
    return torch.cat([turned.real, turned.imag], -1)


def normed(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + ops.EPS).sqrt()


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
def test_a_compiled_function_is_the_plain_one_on_a_cpu():
    @ops.compiled
    def twice(factor, x):
        """Return factor * x."""
        return factor * x

    assert twice.__name__ == "twice" and twice.__doc__ == "Return factor * x."
    assert torch.equal(twice(2, torch.ones(3)), torch.full((3,), 2.0))


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
