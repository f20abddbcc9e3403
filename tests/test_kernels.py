"""The Triton kernels: compiled for each kind of GPU, and on one against torch's own casts."""

import pytest
import torch
import torch.nn.functional as F

from harness import kernels, ops

HOPPER, BLACKWELL = 90, 100
SHARED_MEMORY = 227 * 1024  # bytes of a block, on both


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_for(capability: int, kernel, types: dict, constants: dict, **options):
    """Return what Triton compiles `kernel` to, without a GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = types | dict.fromkeys(constants, "constexpr")
    target = GPUTarget("cuda", capability, 32)
    source = ASTSource(kernel, types, constants)
    return triton.compile(source, target=target, options=options)


def tile(dtype: str, rows: int, columns: int) -> str:
    return f"tensordesc<{dtype}[{rows},{columns}]>"


@pytest.mark.parametrize("capability", [HOPPER, BLACKWELL])
@pytest.mark.parametrize("gradient", [False, True])
def test_the_products_compile_for_tensor_cores_and_fit_shared_memory(
    gradient, capability
):
    dtype, options = ("fp8e5" if gradient else "fp8e4nv"), kernels.OPTIONS[gradient]
    n, k = kernels.BLOCK, options["BK"]
    types = {"a": tile(dtype, n, k), "b": tile("fp8e4nv", n, k)}
    types |= {"squares": tile("fp8e4nv", n, n), "out": tile(dtype, n, n)}
    types |= {"transposed": tile(dtype, n, n), "scale": "*fp32"}
    types |= dict.fromkeys("MNK", "i32")
    constants = {"GRADIENT": gradient, "BM": n, "BN": n, "BK": k}
    rest = {key: options[key] for key in ("num_warps", "num_stages")}
    code = compile_for(capability, kernels.matmul_kernel, types, constants, **rest)
    assert code.metadata.shared <= SHARED_MEMORY
    product = {HOPPER: "wgmma", BLACKWELL: "tcgen05.mma"}[capability]
    assert product in code.asm["ptx"]
    assert gradient or "max.NaN.f32" in code.asm["ptx"]  # a NaN stays one


@pytest.mark.parametrize("capability", [HOPPER, BLACKWELL])
def test_the_casts_compile(capability):
    m, n = kernels.CAST_ROWS, kernels.CAST_COLUMNS
    types = {"x": tile("bf16", m, n), "scale": "*fp32", "M": "i32", "column": "i32"}
    types |= {"out": tile("fp8e4nv", m, n), "transposed": tile("fp8e4nv", n, m)}
    constants = {"PER_ROW": True, "BM": m, "BN": n}
    code = compile_for(capability, kernels.cast_both_kernel, types, constants)
    assert "satfinite" in code.asm["ptx"]  # what is too large is the largest number


@pytest.mark.parametrize("capability", [HOPPER, BLACKWELL])
@pytest.mark.parametrize("size", [64, 128, 256])  # of a head
@pytest.mark.parametrize("offset", [False, True])
def test_queries_and_keys_and_their_gradients_compile(capability, size, offset):
    m, quarter = kernels.HEAD_ROWS, size // 4
    constants = {"OFFSET": offset, "BM": m, "Q": quarter}
    numbers = dict.fromkeys(("N", "T", "H"), "i32")
    tables = dict.fromkeys(("rstd", "cos", "sin"), "*fp32")
    types = {"x": "*bf16", "y": "*bf16", "part": "i32", "eps": "fp32"} | tables | numbers
    assert compile_for(capability, kernels.rotate_kernel, types, constants).asm["ptx"]
    types = {"grad": "*bf16", "y": "*bf16", "scale": "*fp32"} | tables | numbers
    types |= {"out": tile("fp8e5", m, quarter), "transposed": tile("fp8e5", quarter, m)}
    types |= {"column": "i32"}
    kernel = kernels.rotate_gradient_kernel
    code = compile_for(capability, kernel, types, constants)
    assert code.metadata.shared <= SHARED_MEMORY


@pytest.mark.parametrize("capability", [80, 89, HOPPER, BLACKWELL, 120])
def test_the_loss_compiles_for_every_gpu(capability):
    types = {"raw": "*bf16", "y": "*i64", "loss": "*fp32", "softcap": "fp32"}
    constants = {"V": 8192, "BLOCK": 8192}
    kernel = kernels.cross_entropy_kernel
    assert compile_for(capability, kernel, types, constants, num_warps=8).asm["ptx"]


@pytest.mark.parametrize("capability", [80, 89, HOPPER, BLACKWELL, 120])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_gradients_of_tables_compile_for_every_gpu(capability, dtype):
    types = {"grad": f"*{dtype}", "ids": "*i32", "order": "*i64", "out": "*fp32"}
    types |= {"N": "i32", "C": "i32"}
    constants = {"BM": kernels.SUM_ROWS, "BN": kernels.SUM_COLUMNS}
    kernel = kernels.embedding_gradient_kernel
    code = compile_for(capability, kernel, types, constants)
    assert code.metadata.shared <= 99 * 1024  # the least, of an RTX 3090
    del types["out"]
    types |= dict.fromkeys(("param", "moment", "last"), "*fp32")
    types |= dict.fromkeys(("step", "beta2", "lr"), "fp32")
    constants = {"BM": kernels.ENTRY_ROWS, "BN": 512}
    assert compile_for(capability, kernels.row_rmsprop_kernel, types, constants).asm[
        "ptx"
    ]


# ---- On a GPU -----------------------------------------------------------------------------------
SIZES = [(80, 336, 48), (2048, 2560, 640), (2064, 144, 80)]  # M, N, K


def random_fp8(*shape: int, dtype=kernels.E4M3) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def same_both_ways(result: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the first in float32; the second has to be its transpose, bit for bit."""
    out, transposed = (t.float() for t in result)
    assert torch.equal(out.T, transposed)
    return out


def rounded(got: torch.Tensor, exact: torch.Tensor, bits: int, near: float) -> bool:
    """Return whether got is exact but for rounding to `bits` behind the point, and `near`.

    Hopper's tensor cores add up products of fp8 with about 13 bits.
    """
    near = 2.0 ** -(bits + 1) * exact.abs() * 1.01 + near
    return bool(((got - exact).abs() <= near).all())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [kernels.E4M3, kernels.E5M2])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("of", [torch.bfloat16, torch.float32])
def test_a_cast_rounds_as_torch_does_and_is_given_both_ways(dtype, per_row, of):
    x = torch.randn(2064, 80, device="cuda", dtype=of)
    scale = torch.rand(len(x) if per_row else 1, device="cuda")
    got = same_both_ways(kernels.cast_both(x, scale, dtype))
    assert torch.equal(got, (x.float() * scale[:, None]).to(dtype).float())


@pytest.mark.gpu
@pytest.mark.parametrize("M, N, K", SIZES)
def test_squares_and_their_gradient_are_those_of_float32(M, N, K):
    torch.backends.cuda.matmul.allow_tf32 = False
    scale = torch.full((1,), K**-0.5, device="cuda")
    a, b = random_fp8(M, K), random_fp8(N, K)
    result = kernels.relu_square(a, b, scale)
    squares = same_both_ways(result)
    exact = torch.relu(a.float() @ b.float().T * scale).square()
    assert rounded(squares, exact.clamp_max(448), bits=3, near=2e-3)
    grad = random_fp8(M, K, dtype=kernels.E5M2)
    got = same_both_ways(kernels.relu_square_gradient(grad, b, result[1], scale))
    exact = grad.float() @ b.float().T * scale * 2 * squares.sqrt()
    assert rounded(got, exact, bits=2, near=5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("rows, heads, size", [(48, 3, 64), (2048, 5, 128), (17, 2, 256)])
def test_queries_and_keys_and_their_gradient_are_those_of_autograd(
    rows, heads, size, offset
):
    x = torch.randn(16, rows, 2, heads, size, device="cuda").requires_grad_()
    angle = torch.rand(rows, 1, size // 2, device="cuda")
    cos = torch.cat([angle, angle], -1).cos()
    sin = torch.cat([angle, -angle], -1).sin()
    q, k = x.unbind(2)
    if offset:
        slow = torch.arange(size, device="cuda") % (size // 2) >= size // 4
        k = torch.where(slow, F.pad(k[:, :-1], (0, 0, 0, 0, 1, 0)), k)
    exact = [ops.rotary_norm(q, cos, sin), ops.rotary_norm(k, cos, sin)]
    got, rstd = zip(
        kernels.rotate(x.detach(), cos, sin, 0, False),
        kernels.rotate(x.detach(), cos, sin, 1, offset),
        strict=True,
    )
    torch.testing.assert_close(
        list(got), [t.detach() for t in exact], rtol=1e-4, atol=1e-4
    )
    dq, dk, dv = torch.randn(3, *q.shape, device="cuda")
    (wanted,) = torch.autograd.grad(exact, [x], [dq, dk])
    wanted = torch.cat([wanted, dv[:, :, None]], 2)
    scale = torch.full((1,), 4.0, device="cuda")
    made = kernels.qkv_gradient(dq, dk, dv, *got, *rstd, cos, sin, offset, scale)
    made = same_both_ways(made).view_as(wanted) / scale
    assert rounded(made, wanted, bits=2, near=2e-5)
