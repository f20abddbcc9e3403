"""The hand-written kernel of train.py against plain torch, in float64 on the same GPU; compilation.

What is compiled is kept between runs, so an edit must never be answered by the code before it.
"""

import pytest
import torch
import torch._functorch.config
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import train

SIZES = [
    (512, 128, 256),
    (1000, 96, 200),
    (77, 40, 136),
    (4096, 640, 2560),
]  # rows, width, hidden


def operands(
    rows: int, width: int, hidden: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Return x (rows, width), the two matrices of the MLP and a gradient of its result."""
    torch.manual_seed(0)
    x, gradient = torch.randn(2, rows, width)
    fc, proj = (
        torch.randn(hidden, width) * width**-0.5,
        torch.randn(width, hidden) * hidden**-0.5,
    )
    return [t.to("cuda", dtype) for t in (x, fc, proj, gradient)]


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.bfloat16, 5e-3), (torch.float32, 2e-6)]
)
@pytest.mark.parametrize("rows, width, hidden", SIZES)
def test_the_fused_mlp_and_its_gradients_are_those_of_plain_torch(
    rows, width, hidden, dtype, tolerance
):
    if torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("the kernel needs compute capability 9.0 or 10")
    *inputs, gradient = operands(rows, width, hidden, dtype)
    fused = [t.clone().requires_grad_() for t in inputs]
    exact = [t.double().requires_grad_() for t in inputs]
    y = train.ReluSquareMLP.apply(*fused)
    y.backward(gradient)
    x, fc, proj = exact
    expected = F.relu(x @ fc.T).square() @ proj.T
    expected.backward(gradient.double())
    pairs = [
        (y, expected),
        *((a.grad, b.grad) for a, b in zip(fused, exact, strict=True)),
    ]
    errors = [relative_error(got.detach(), e.detach()) for got, e in pairs]
    assert max(errors) < tolerance, errors


@pytest.mark.gpu
def test_the_model_with_the_fused_mlp_is_the_model_without_it():
    config = train.GPTConfig(256, 512, 2, 128, 64, "SL", 64, 10_000, 15.0, 1.3, 1024)
    losses, gradients = [], []
    for fused in (True, False):
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = train.GPT(config, train.masked_attention, torch.bfloat16)
            idx = torch.randint(512, (4, 256))
        model.init_weights(0.7, train.LAMBDA_INIT)
        for block in model.h:
            torch.nn.init.normal_(
                block.mlp.c_proj.weight, std=0.05
            )  # not zero, as at the start
            block.mlp.fused = block.mlp.fused and fused
        loss = model.loss(idx, idx)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert relative_error(gradients[0], gradients[1].double()) < 0.02


@pytest.mark.parametrize("backward", [False, True])
def test_the_kernel_compiles_for_hopper_and_fits_its_shared_memory(
    backward, monkeypatch, tmp_path
):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tile, b_tile = "tensordesc<bf16[128,128]>", "[64,256]" if backward else "[256,64]"
    signature = {"a": "tensordesc<bf16[128,64]>", "b": f"tensordesc<bf16{b_tile}>"}
    signature |= {"post": tile, "out": tile, "M": "i32", "N": "i32", "K": "i32"}
    constants = {"BACKWARD": backward, "BM": 128, "BN": 256, "BK": 64}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(train.relu_square_kernel, signature, constants)
    options = {"num_warps": 8, "num_stages": 3}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.metadata.shared <= 227 * 1024
    assert "wgmma" in compiled.asm["ptx"]  # on the tensor cores


def test_an_edited_gradient_is_not_taken_from_the_cache_of_the_one_before():
    a = torch.arange(4.0).view(2, 2)

    def gradient(turned: bool) -> tuple:
        """Compile x @ a with a gradient, right if `turned`; return that and what the cache said."""

        class Product(
            torch.autograd.Function
        ):  # needs no kernel, which takes long to compile
            @staticmethod
            def forward(ctx, x, a):
                ctx.save_for_backward(a)
                return x @ a

            @staticmethod
            def backward(ctx, grad):
                (a,) = ctx.saved_tensors
                return grad @ (a.T if turned else a), None

        torch._dynamo.reset()
        counters.clear()
        x = torch.eye(2, requires_grad=True)
        torch.compile(Product.apply, fullgraph=True)(x, a).backward(torch.eye(2))
        said = [
            key
            for key in counters["aot_autograd"]
            if key.endswith(("hit", "miss", "bypass"))
        ]
        return x.grad.tolist(), *said

    name = "autograd_cache_allow_custom_autograd_functions"  # train.py sets it for its own process
    with fresh_cache(), torch._functorch.config.patch({name: True}):
        answers = [gradient(turned) for turned in (True, True, False)]
    right, wrong = a.T.tolist(), a.tolist()
    hit, miss = "autograd_cache_hit", "autograd_cache_miss"
    assert answers == [(right, miss), (right, hit), (wrong, miss)]
