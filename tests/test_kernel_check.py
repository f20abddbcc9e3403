"""The check that fused operations are right on a GPU, with kernels in plain torch that may err."""

import pytest
import torch

from harness import fp8, kernel_check
from harness.kernel_check import MAX_ERROR, check_kernels, largest_errors
from loop.ledger import read_run
from test_ops import PlainKernels, use_kernels

CPU = torch.device("cpu")


def faulty(name: str) -> PlainKernels:
    """Return kernels of which one leaves every fourth column unwritten, of what it transposes."""
    kernels = PlainKernels()
    kernel, which = getattr(kernels, name), 0 if name == "rotate" else 1

    def stale(*args):
        results = [*kernel(*args)]
        written = torch.arange(results[which].size(-1)) % 4 != 1
        results[which] = (results[which].float() * written).to(results[which].dtype)
        return results

    setattr(kernels, name, stale)
    return kernels


@pytest.fixture
def use(monkeypatch):
    """Return a function that has the fused operations run by such kernels on a CPU."""

    def use(kernels: PlainKernels) -> None:
        use_kernels(monkeypatch, kernels)
        for module in (fp8, kernel_check.ops):
            runs = lambda x, *_: fp8.trusted and x.dtype == torch.bfloat16  # noqa: E731
            monkeypatch.setattr(module, "runs_fp8", runs)
        monkeypatch.setattr(fp8, "trusted", True)

    return use


def test_kernels_that_round_as_they_should_are_trusted(use, capsys):
    use(PlainKernels())
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
    use(faulty(wrong))
    check_kernels(CPU)
    assert not fp8.trusted
    out = capsys.readouterr().out
    assert "in fp8 on this GPU" in out and "is wrong" in out
    assert max(largest_errors(CPU).values()) < 0.05  # of plain torch, in bf16


def test_a_nan_is_an_error(use, monkeypatch):
    use(PlainKernels())
    monkeypatch.setattr(kernel_check, "largest_errors", lambda _: {"op": float("nan")})
    check_kernels(CPU)
    assert not fp8.trusted


def test_the_check_draws_no_numbers_of_the_run(use):
    use(PlainKernels())
    before = torch.get_rng_state()
    check_kernels(CPU)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
def test_the_kernels_are_right_on_this_gpu():
    device = torch.device("cuda")
    assert max(largest_errors(device).values()) < MAX_ERROR / 2


def test_kernels_that_do_not_compile_on_a_gpu_are_not_used(use, monkeypatch, capsys):
    use(PlainKernels())

    def fail(device):
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(kernel_check, "largest_errors", fail)
    check_kernels(CPU)
    assert not fp8.trusted
    said = capsys.readouterr().out
    assert "PassManager::run failed; plain torch serves" in said
    ended = read_run(f"{said}val_bpb: 1.0\nexit status 0\n", {}, {"kernels": "fused"})
    assert ended.ok and ended.void == "kernels"  # it does not compare with others
