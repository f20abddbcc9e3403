"""The check that fused operations are right on a GPU, with kernels in plain torch that may err."""

import pytest
import torch
from test_ops import PlainKernels

from harness import fp8, kernel_check
from harness.kernel_check import MAX_ERROR, check_kernels, largest_errors

CPU = torch.device("cpu")


class Kernels(PlainKernels):
    """Plain kernels, for queries and keys too; `wrong` is what a compiler gets wrong."""

    def __init__(self, wrong: str = ""):
        self.wrong = wrong

    def stale(self, name: str, both: tuple[torch.Tensor, torch.Tensor]):
        """Every fourth column of what the kernel `name` gives transposed was not written."""
        if name == self.wrong:
            both[1].view(torch.uint8)[:, 1::4] = 0
        return both

    def cast_both(self, x, scale, dtype):
        top = torch.finfo(dtype).max
        x = (x.float() * scale.view(-1, 1)).clamp(-top, top)
        return self.stale("cast_both", (x.to(dtype), x.T.contiguous().to(dtype)))

    def relu_square(self, *args):
        return self.stale("relu_square", super().relu_square(*args))

    def relu_square_gradient(self, *args):
        return self.stale("relu_square_gradient", super().relu_square_gradient(*args))

    @staticmethod
    def turn(x, cos, sin, part, offset):
        x = x[:, :, part].float()
        if offset:
            slow = torch.arange(x.size(-1)) % (x.size(-1) // 2) >= x.size(-1) // 4
            before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
            x = torch.where(slow, before, x)
        rstd = (x.square().mean(-1, keepdim=True) + 1e-7).rsqrt()
        return rstd * (x * cos + x.roll(x.size(-1) // 2, -1) * sin), rstd

    def rotate(self, x, cos, sin, part, offset):
        self.kept = x
        y, rstd = self.turn(x, cos, sin, part, offset)
        if self.wrong == "rotate":
            y[..., 1::4] = 0
        return y.to(x.dtype), rstd[..., 0]

    def qkv_gradient(self, dq, dk, dv, q, k, q_rstd, k_rstd, cos, sin, offset, scale):
        with torch.enable_grad():
            x = self.kept.float().requires_grad_()
            turned = [self.turn(x, cos, sin, i, offset and i == 1)[0] for i in (0, 1)]
            (dx,) = torch.autograd.grad(turned, [x], [dq.float(), dk.float()])
        parts = torch.cat([dx.flatten(2), dv.float().flatten(2)], 2).flatten(0, 1)
        return self.stale("qkv_gradient", self.both(parts * scale, self.E5M2))


@pytest.fixture
def use(monkeypatch):
    """Return a function that has the fused operations run by such kernels on a CPU."""

    def matmul(a, b, scale, dtype=torch.float32):
        return (a.float() @ b.float().T * scale).to(dtype)

    def use(kernels: Kernels) -> None:
        monkeypatch.setattr(fp8, "kernels", kernels)
        monkeypatch.setattr(fp8, "matmul_fp8", matmul)
        for module in (fp8, kernel_check.ops):
            runs = lambda x, *_: fp8.trusted and x.dtype == torch.bfloat16  # noqa: E731
            monkeypatch.setattr(module, "runs_fp8", runs)
        monkeypatch.setattr(fp8, "trusted", True)

    return use


def test_kernels_that_round_as_they_should_are_trusted(use, capsys):
    use(Kernels())
    check_kernels(CPU)
    assert fp8.trusted and not capsys.readouterr().out
    assert max(largest_errors(CPU).values()) < MAX_ERROR / 2


@pytest.mark.parametrize(
    "wrong",
    ["cast_both", "relu_square", "relu_square_gradient", "rotate", "qkv_gradient"],
)
def test_a_kernel_that_leaves_every_fourth_entry_unwritten_is_not_used(
    use, wrong, capsys
):
    use(Kernels(wrong))
    check_kernels(CPU)
    assert not fp8.trusted
    assert "in fp8 is wrong on this GPU" in capsys.readouterr().out
    assert max(largest_errors(CPU).values()) < 0.05  # of plain torch, in bf16


def test_a_nan_is_an_error(use, monkeypatch):
    use(Kernels())
    monkeypatch.setattr(kernel_check, "largest_errors", lambda _: {"op": float("nan")})
    check_kernels(CPU)
    assert not fp8.trusted


def test_the_check_draws_no_numbers_of_the_run(use):
    use(Kernels())
    before = torch.get_rng_state()
    check_kernels(CPU)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
def test_the_kernels_are_right_on_this_gpu():
    device = torch.device("cuda")
    assert max(largest_errors(device).values()) < MAX_ERROR / 2
