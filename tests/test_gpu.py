"""Batches fit the memory there is, in training and evaluation; and what is said if none does."""

import math
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from test_optimizer import tiny_batch, tiny_model

import constants as C
import train
from harness import gpu
from harness.evaluation import evaluate_bpb
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


# ---- The largest batch that fits ----------------------------------------------------------------
@pytest.mark.parametrize(
    "fits, limit, tried",
    [
        (1000, 128, [128]),
        (1000, 96, [64]),  # a power of two, not above the limit
        (1000, 1, [1]),
        (127, 128, [128, 64]),
        (5, 128, [128, 64, 32, 16, 8, 4]),
        (1, 3, [2, 1]),
    ],
)
def test_the_largest_power_of_two_that_fits_is_found_by_halving(
    fits, limit, tried, capsys
):
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


def test_a_single_row_that_does_not_fit_is_an_error():
    with pytest.raises(torch.OutOfMemoryError):
        gpu.find_batch_size(Memory(0), 4, 1.0, CPU)


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
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10)
    for share, free in ((1.0, 70), (0.4, 30)):
        monkeypatch.setattr(
            torch.cuda, "get_per_process_memory_fraction", lambda share=share: share
        )
        assert gpu.free_memory(GPU) == free
    assert gpu.free_memory(CPU) == math.inf


# ---- Training -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "total, device, limit",
    [(64, 16, 16), (64, 128, 64), (3, 128, 2), (96, 80, 64), (0.5, 128, 1)],  # in rows
)
def test_a_micro_step_has_a_power_of_two_of_rows_within_the_knob_and_the_whole_batch(
    total, device, limit
):
    assert gpu.batch_limit(device, int(total * C.MAX_SEQ_LEN)) == limit


@pytest.mark.parametrize(
    "total, rows, count, rounded",
    [
        (64 * C.MAX_SEQ_LEN, 64, 1, None),
        (64 * C.MAX_SEQ_LEN, 8, 8, None),
        (100 * C.MAX_SEQ_LEN, 32, 2, 64 * C.MAX_SEQ_LEN),  # the same as with 64 rows
        (100 * C.MAX_SEQ_LEN, 64, 1, 64 * C.MAX_SEQ_LEN),
        (64 * C.MAX_SEQ_LEN + 1, 64, 1, 64 * C.MAX_SEQ_LEN),
        (7, 1, 1, C.MAX_SEQ_LEN),
    ],
)
def test_a_total_that_is_not_whole_batches_is_rounded_with_a_notice_whatever_fits_the_memory(
    capsys, total, rows, count, rounded
):
    assert gpu.grad_accumulation(total, gpu.batch_limit(128, total), rows) == count
    notice = f"batch: TOTAL_BATCH_SIZE ({total} tokens) is rounded to {rounded}\n"
    assert capsys.readouterr().out == (notice if rounded else "")


def test_the_losses_do_not_depend_on_the_accumulation():
    losses = {}
    for count in (1, 2, 8):
        model = tiny_model()
        optimizers = train.build_optimizers(model)
        losses[count] = []
        for number in range(3):
            train.set_schedules(optimizers, 0.5)
            x, y = tiny_batch(8)
            x, y = (x + number) % 50, (y + number) % 50  # another batch each time
            batches = zip(x.chunk(count), y.chunk(count), strict=True)
            losses[count].append(
                train.train_step(model, optimizers, batches, count).item()
            )
    assert (
        len(set(losses[1])) == 3 and max(losses[1]) - min(losses[1]) > 1e-2
    )  # it does move
    assert losses[2] == pytest.approx(losses[1], rel=2e-4)
    assert losses[8] == pytest.approx(losses[1], rel=2e-4)


# ---- Evaluation ---------------------------------------------------------------------------------
def a_trained_run(prepared, monkeypatch, rows: int) -> Run:
    monkeypatch.setattr(C, "TIME_BUDGET", 0.1)
    run = Run(prepared, CPU)
    for step in run.steps(rows, 1):
        step.loss = float(len(list(step.batches)))
    run.val_rows.files = [run.val_rows.files[0][:40]]  # enough to tell, and quick
    return run


def some_model(idx: torch.Tensor) -> torch.Tensor:
    weights = torch.randn(C.VOCAB_SIZE, 2, generator=torch.Generator().manual_seed(0))
    return weights[idx] @ weights.T


@pytest.mark.parametrize(
    "fits, rows, calls", [(1000, 4, 4), (5, 16, 4), (1, 4, 1), (1000, 1, 2)]
)
def test_the_evaluation_finds_its_batch_and_its_result_does_not_depend_on_it(
    prepared, monkeypatch, fits, rows, calls
):
    run, sizes = a_trained_run(prepared, monkeypatch, rows), []

    def model(idx):
        if len(idx) > fits:
            raise torch.OutOfMemoryError
        sizes.append(len(idx))
        return some_model(idx)

    value, rows = run.evaluate(model), np.concatenate(run.val_rows.files).astype(np.int64)
    token_bytes = torch.from_numpy(run.tokenizer.token_bytes)
    expected = evaluate_bpb(some_model, torch.from_numpy(rows), token_bytes, 32)
    assert value == pytest.approx(expected, rel=1e-7)
    assert set(sizes) == {calls}


def test_the_evaluation_has_no_more_rows_at_once_than_the_rules_say(
    prepared, monkeypatch
):
    monkeypatch.setattr(C, "EVAL_ROWS", 8)
    run, sizes = a_trained_run(prepared, monkeypatch, 64), set()
    run.evaluate(lambda idx: sizes.add(len(idx)) or some_model(idx))
    assert sizes == {8}


def test_a_model_that_runs_out_of_memory_has_not_seen_validation_text(
    prepared, monkeypatch
):
    run, seen = a_trained_run(prepared, monkeypatch, 4), []

    def model(idx):
        seen.append(idx.clone())
        if len(idx) > 2:
            raise torch.OutOfMemoryError
        return some_model(idx)

    run.evaluate(model)
    text = {tuple(row[:-1].tolist()) for row in run.val_rows.files[0]}
    failed = [tuple(row.tolist()) for idx in seen for row in idx if len(idx) > 2]
    assert failed and not text & set(failed)
    assert tuple(seen[-1][0].tolist()) in text


def test_a_model_that_mixes_rows_is_refused_also_after_training_of_single_rows(
    prepared, monkeypatch
):
    run = a_trained_run(prepared, monkeypatch, 1)
    with pytest.raises(RuntimeError, match="evaluation refused: the model mixes rows"):
        run.evaluate(lambda idx: some_model(idx) + some_model(idx).mean(0, keepdim=True))


@pytest.mark.parametrize("rows", [1, 9])
def test_logits_of_a_batch_are_let_go_before_those_of_the_next_are_made(prepared, rows):
    run, alive = Run(prepared, CPU), []
    most = []

    def model(idx):
        most.append(len(alive))
        logits = some_model(idx)
        alive.append(number := len(most))
        weakref.finalize(logits, alive.remove, number)
        return logits

    ids = torch.from_numpy(run.val_rows.files[0][: 5 * rows].astype(np.int64))
    evaluate_bpb(model, ids, torch.from_numpy(run.tokenizer.token_bytes), rows)
    assert most == [0] * 12


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
            "at step 12 with 64 rows a micro-step; set DEVICE_BATCH_SIZE below 64, or lower DEPTH",
        ),
        ({"batch_size": 1}, "at step 0 with 1 rows a micro-step; lower DEPTH or N_EMBD"),
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


def test_a_run_that_is_out_of_memory_ends_with_the_line_and_status_1(prepared, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import torch\n"
        "from harness.run import open_run\n"
        "run = open_run(torch.device('cpu'))\n"
        "for step in run.steps(4, 1):\n"
        "    if step.number == 3:\n"
        "        raise torch.OutOfMemoryError('does not fit')\n"
        "    step.loss = float(len(list(step.batches)))\n"
    )
    (tmp_path / "smoke").symlink_to(prepared)
    env = {"AUTORESEARCH_CACHE": str(tmp_path), "AUTORESEARCH_SMOKE": "1"}
    env |= {"PYTHONPATH": str(Path(C.__file__).parent)}
    done = subprocess.run(
        [sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "val_bpb" not in done.stdout
    assert done.stderr == (
        "train.py: out of GPU memory at step 3 with 4 rows a micro-step (line 6); set "
        "DEVICE_BATCH_SIZE below 4, or lower DEPTH or N_EMBD, or end what else uses the GPU "
        "(does not fit)\n"
    )


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

        row_bytes = (
            2**28 / 2.1
        )  # an estimate that is too low, as the memory of 16 rows of 4 GiB
        assert gpu.find_batch_size(attempt, 128, row_bytes, GPU) in (8, 16)
        assert tried[0] <= 32 and len(tried) > 1
        assert torch.cuda.memory_allocated() == before
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
