"""The device, and batches that fit its memory; what is said if there is none or none fits."""

import math
import types
import warnings
import weakref

import pytest
import torch

import constants as C
from harness import gpu
from harness.run import Run

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Memory:
    """An attempt that fits up to so many rows; the sizes that were tried."""

    def __init__(self, rows: int):
        self.rows, self.tried = rows, []

    def __call__(self, size: int) -> None:
        self.tried.append(size)
        if size > self.rows:
            raise torch.OutOfMemoryError("does not fit")


# ---- The device ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "smoke, capability, training, expected",
    [
        (True, (9, 0), True, "cpu"),
        (True, None, True, "cpu"),
        (False, (8, 0), True, "cuda"),
        (False, (12, 0), False, "cuda"),
        (
            False,
            None,
            True,
            r"no CUDA GPU is available( \(torch .*\))?, .* needs one; "
            "`AUTORESEARCH_SMOKE=1 uv run train.py`",
        ),
        (False, None, False, "cpu"),
        (
            False,
            (7, 5),
            True,
            r"^Tesla T4 has compute capability 7.5, .* needs 8.0 .*; `AUTORES",
        ),
        (False, (7, 5), False, "cpu"),
    ],
)
def test_the_device_is_chosen_by_what_is_there(
    monkeypatch, smoke, capability, training, expected
):
    monkeypatch.setattr(C, "SMOKE", smoke)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    if " " in expected:
        with pytest.raises(ValueError, match=expected):
            gpu.choose_device(training)
    else:
        assert gpu.choose_device(training).type == expected


def test_no_run_warns_of_a_context_that_torch_makes_itself(monkeypatch):
    monkeypatch.setattr(C, "SMOKE", False)
    monkeypatch.setattr(gpu, "compute_capability", lambda: (9, 0))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        gpu.choose_device()
        # As torch 2.11.0 says it, from CublasHandlePool.cpp.
        why = "but there was no current CUDA context! Attempting to set the primary"
        warnings.warn(f"Attempting to run cuBLAS, {why} context...", stacklevel=1)
        warnings.warn("Attempting to run cuBLAS with an odd shape", stacklevel=1)
    assert [str(w.message)[-9:] for w in seen] == ["odd shape"]


@pytest.mark.parametrize(
    "error, words",
    [
        (
            RuntimeError(
                "The NVIDIA driver on your system is too old (found version 12040). Please"
                " update your GPU driver by downloading and installing a new version."
            ),
            "The NVIDIA driver on your system is too old (found version 12040)",
        ),
        (
            RuntimeError(
                "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions"
                " before that might have already set an error? Error 802: system not yet"
                " initialized"
            ),
            "Error 802: system not yet initialized",
        ),
        (AssertionError("Torch not compiled with CUDA enabled"),) * 2,
    ],
)
def test_a_gpu_that_torch_cannot_use_is_explained(monkeypatch, error, words):
    def init():
        raise error

    monkeypatch.setattr(C, "SMOKE", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(ValueError) as refused:
        gpu.choose_device()
    found = (
        f"no CUDA GPU is available (torch {torch.__version__}: {words}), and a full run"
    )
    assert str(refused.value).startswith(found)


# ---- The largest batch that fits ----------------------------------------------------------------
@pytest.mark.parametrize(
    "fits, limit, tried",
    [
        (1000, 128, [128]),
        (1000, 96, [96]),  # any number of rows
        (1000, 1, [1]),
        (127, 128, [128, 64]),
        (5, 128, [128, 64, 32, 16, 8, 4]),
        (30, 96, [96, 48, 24]),
        (3, 96, [96, 48, 24, 12, 6, 3]),  # an odd number is not halved
    ],
)
def test_a_number_of_rows_that_fits_is_found_by_halving(fits, limit, tried, capsys):
    memory = Memory(fits)
    assert gpu.find_batch_size(memory, limit, 1.0, CPU) == tried[-1]
    assert memory.tried == tried
    assert (
        capsys.readouterr().out.count(" rows do not fit in memory, trying ")
        == len(tried) - 1
    )


@pytest.mark.parametrize(
    "free, first", [(1e9, 128), (127.9, 64), (64.0, 64), (3.0, 2), (0.1, 1)]
)
def test_what_cannot_fit_is_not_tried(monkeypatch, free, first):
    monkeypatch.setattr(gpu, "free_memory", lambda device: free)
    memory = Memory(1000)
    assert gpu.find_batch_size(memory, 128, 1.0, GPU) == first
    assert memory.tried == [first]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError(
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
        ),
    ],
)
def test_want_of_memory_that_a_library_puts_in_its_own_words_halves_the_batch_too(error):
    def attempt(size):
        if size > 2:
            raise error

    assert gpu.find_batch_size(attempt, 8, 1.0, CPU) == 2


def test_another_error_of_an_attempt_is_not_taken_for_want_of_memory():
    def attempt(size):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        gpu.find_batch_size(attempt, 8, 1.0, CPU)


def test_what_is_taken_for_any_number_of_rows_is_left_out_of_what_rows_can_take(
    monkeypatch,
):
    monkeypatch.setattr(gpu, "free_memory", lambda device: 100.0)
    for fixed, first in ((0, 64), (60, 32), (99.5, 1), (200, 1)):
        memory = Memory(1000)
        assert gpu.find_batch_size(memory, 64, 1.0, GPU, fixed) == first


@pytest.mark.parametrize("limit, tried", [(4, [4, 2, 1]), (6, [6, 3]), (5, [5])])
def test_an_odd_number_of_rows_that_does_not_fit_is_an_error(limit, tried):
    memory = Memory(0)
    with pytest.raises(torch.OutOfMemoryError):
        gpu.find_batch_size(memory, limit, 1.0, CPU)
    assert memory.tried == tried


def test_everything_of_a_failed_attempt_is_let_go_before_the_next():
    alive = []

    def attempt(size):
        assert alive == [], "the attempt before still holds memory"
        held = Memory(size)
        held.itself = held  # only the collector finds it
        alive.append(size)
        weakref.finalize(held, alive.remove, size)
        if size > 1:
            raise torch.OutOfMemoryError

    assert gpu.find_batch_size(attempt, 8, 1.0, CPU) == 1


def test_free_memory_is_what_the_driver_has_and_torch_holds_unused_within_its_share(
    monkeypatch,
):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50, 100))
    card = types.SimpleNamespace(is_integrated=False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10)
    for share, free in ((1.0, 70), (0.4, 30)):
        monkeypatch.setattr(
            torch.cuda, "get_per_process_memory_fraction", lambda share=share: share
        )
        assert gpu.free_memory(GPU) == free
    assert gpu.free_memory(CPU) == math.inf


# ---- Out of memory ------------------------------------------------------------------------------
CUDA_SAYS = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of "
    "which 12.00 MiB is free. Of the allocated memory 9 GiB is allocated by PyTorch. If reserved "
    "but unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True."
)


@pytest.mark.parametrize(
    "state, what",
    [
        ({}, "before training; lower DEPTH or N_EMBD, or end"),
        (
            {"batch_size": 64, "num_steps": 12},
            "at step 12 with 64 rows per micro-step; set DEVICE_BATCH_SIZE below 64, or lower",
        ),
        (
            {"batch_size": 1},
            "at step 0 with 1 row per micro-step; lower DEPTH or N_EMBD",
        ),
        (
            {"batch_size": 64, "evaluated": True},
            "in the evaluation; lower DEPTH or N_EMBD",
        ),
    ],
)
def test_out_of_memory_is_one_line_that_says_what_to_lower(prepared, state, what):
    run = Run(prepared, CPU)
    vars(run).update(state)
    line = gpu.explain_memory(run, torch.OutOfMemoryError(CUDA_SAYS))
    assert line.startswith(f"train.py: out of GPU memory {what}") and "\n" not in line
    assert "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB" in line
    assert "PYTORCH_ALLOC_CONF" not in line


# ---- On a GPU -----------------------------------------------------------------------------------
@pytest.mark.gpu
def test_a_batch_is_found_in_the_memory_that_a_process_may_use():
    total = torch.cuda.get_device_properties(GPU).total_memory
    before = torch.cuda.memory_allocated()
    torch.cuda.set_per_process_memory_fraction(2**32 / total)
    try:
        tried = []

        def attempt(size):
            tried.append(size)
            torch.empty(size << 28, dtype=torch.uint8, device=GPU).zero_()

        # An estimate that is too low, as the memory of 16 rows of 4 GiB.
        row_bytes = 2**28 / 2.1
        assert gpu.find_batch_size(attempt, 128, row_bytes, GPU) in (8, 16)
        assert tried[0] <= 32 and len(tried) > 1
        assert torch.cuda.memory_allocated() == before
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
