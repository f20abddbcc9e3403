"""Rows to batches, and the rules of a run: batches only while the clock runs, losses that count."""

import itertools
import math
import time

import numpy as np
import pytest
import torch

import constants as C
from harness import gpu
from harness.loader import Batch, Rows, load_batches
from harness.run import Clock, Run, Step

CPU = torch.device("cpu")
T = 5


@pytest.fixture
def rows(tmp_path, monkeypatch) -> Rows:
    """Seven rows in three files; row r holds r * 10, r * 10 + 1, ..."""
    monkeypatch.setattr(C, "MAX_SEQ_LEN", T)
    everything = 10 * np.arange(7)[:, None] + np.arange(T + 1)
    paths = []
    for k, part in enumerate(np.split(everything, [3, 4])):
        paths.append(tmp_path / f"{k}.u16")
        paths[-1].write_bytes(part.astype("<u2").tobytes())
    return Rows(paths)


def row_numbers(batch: Batch) -> list[int]:
    return (batch[0][:, 0] // 10).tolist()


class Seconds:
    """A time that passes only when the test says so."""

    def __init__(self):
        self.time = 0.0

    def now(self) -> float:
        return self.time


@pytest.fixture
def seconds() -> Seconds:
    return Seconds()


@pytest.fixture
def run(prepared, monkeypatch, seconds) -> Run:
    """A run on the smoke data whose budget is 8 of those seconds."""
    monkeypatch.setattr(C, "TIME_BUDGET", 8.0)
    monkeypatch.setattr(C, "OVERRUN_TOLERANCE", 0.25)
    run = Run(prepared, CPU)
    run.clock.now = seconds.now
    return run


def train(run: Run, seconds: Seconds, batch_size: int = 2, **kwargs) -> list[Step]:
    """Go through all steps of a run, one second each; return them."""
    steps = []
    for step in run.steps(batch_size, kwargs.get("grad_accum_steps", 1)):
        assert all(x.shape == (batch_size, C.MAX_SEQ_LEN) for x, _ in step.batches)
        step.loss = kwargs.get("loss", 1.0)
        seconds.time += 1.0
        steps.append(step)
    return steps


def zeros(idx: torch.Tensor) -> torch.Tensor:
    return torch.zeros(*idx.shape, C.VOCAB_SIZE)


# ---- Rows and batches ---------------------------------------------------------------------------
def test_rows_of_several_files_are_one_array(rows):
    assert len(rows) == 7
    assert [int(row[0]) for row in rows] == [0, 10, 20, 30, 40, 50, 60]
    with pytest.raises(IndexError):
        rows[7]


def test_y_is_x_shifted_by_one(rows):
    for x, y in itertools.islice(load_batches(rows, 2, CPU), 9):
        assert x.shape == y.shape == (2, T) and x.dtype == y.dtype == torch.int64
        assert torch.equal(x[:, 1:], y[:, :-1]) and torch.equal(y[:, -1], x[:, 0] + T)


def test_the_largest_ids_survive_the_way_to_the_device(tmp_path, monkeypatch):
    monkeypatch.setattr(C, "MAX_SEQ_LEN", T)
    path = tmp_path / "rows.u16"
    path.write_bytes(
        np.arange(8186, 8192, dtype="<u2").tobytes()
    )  # as large as ids here can be
    x, y = next(load_batches(Rows([path]), 1, CPU))
    assert y[0].tolist() == [8187, 8188, 8189, 8190, 8191]


def test_the_first_epoch_reads_the_rows_as_they_lie(rows):
    batches = itertools.islice(load_batches(rows, 2, CPU), 3)
    assert [row_numbers(batch) for batch in batches] == [[0, 1], [2, 3], [4, 5]]


def test_later_epochs_are_other_permutations_and_the_same_every_time(rows):
    orders = []
    for batch_size in (1, 7):  # whatever the batch size
        batches = load_batches(rows, batch_size, CPU)
        read = [
            n for b in itertools.islice(batches, 21 // batch_size) for n in row_numbers(b)
        ]
        orders.append([read[0:7], read[7:14], read[14:21]])
    assert orders[0] == orders[1]
    first, second, third = orders[0]
    assert sorted(second) == sorted(third) == first == list(range(7))
    assert first != second != third != first


def test_a_batch_straddles_the_end_of_an_epoch(rows):
    batches = [row_numbers(b) for b in itertools.islice(load_batches(rows, 4, CPU), 7)]
    read = [n for batch in batches for n in batch]
    assert read[:7] == list(range(7))
    assert all(sorted(read[k : k + 7]) == list(range(7)) for k in (7, 14, 21))


def test_batches_in_hand_do_not_change_when_the_next_is_read(rows):
    batches = load_batches(rows, 2, CPU)
    x, y = next(batches)
    before = x.clone(), y.clone()
    for _ in range(5):
        next(batches)
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])


@pytest.mark.gpu
def test_the_gpu_gets_the_rows_that_the_cpu_gets(rows):
    on_gpu = load_batches(rows, 2, torch.device("cuda"))
    on_cpu = load_batches(rows, 2, CPU)
    for (x, y), (x_cpu, y_cpu) in itertools.islice(zip(on_gpu, on_cpu, strict=True), 200):
        busy = torch.randn(1000, 1000, device="cuda")
        for _ in range(5):  # the device lags behind the copies
            busy = busy @ busy / 1000
        assert torch.equal(x.cpu(), x_cpu) and torch.equal(y.cpu(), y_cpu)


# ---- Waiting for batches -------------------------------------------------------------------------
class SlowRows:
    """Two rows, each of which takes 20 ms to read."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        time.sleep(0.02)
        return np.zeros(T + 1, "<u2")


def waits(device: torch.device, work=lambda: None) -> list[float]:
    """Return how long the device waited for each of five batches with `work` between them."""
    batches, marks = load_batches(SlowRows(), 2, device), []
    for _ in range(5):
        start, _, end = gpu.mark(device), next(batches), gpu.mark(device)
        marks.append((start, end))
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return [gpu.seconds_between(*both) for both in marks]


def test_the_wait_for_a_slow_disk_is_counted():
    assert all(0.04 <= wait < 0.5 for wait in waits(CPU))


@pytest.mark.gpu
def test_an_idle_gpu_waits_for_a_slow_disk_and_a_busy_one_does_not():
    assert all(0.04 <= wait < 0.5 for wait in waits(torch.device("cuda"))[1:])
    busy = waits(
        torch.device("cuda"), lambda: torch.cuda._sleep(400_000_000)
    )  # 0.2 s at 2 GHz
    assert max(busy[1:]) < 0.004


# ---- Steps of a run -----------------------------------------------------------------------------
def test_a_run_hands_out_the_training_rows_in_order(run, seconds):
    read = []
    for step in run.steps(2, 3):
        read += [x for x, _ in step.batches]
        step.loss = 1.0
        seconds.time += 1.0
    assert len(read) == 3 * 8
    read = torch.cat(read).numpy()
    assert np.array_equal(
        read, np.stack([run.train_rows[i] for i in range(2 * 3 * 8)])[:, :-1]
    )


def test_no_batch_after_its_step(run):
    steps = run.steps(2, 2)
    first = next(steps)
    next(first.batches)
    first.loss = 1.0
    next(steps)
    with pytest.raises(
        RuntimeError, match="step 0 is over; its batches cannot be had now"
    ):
        next(first.batches)


def test_no_batch_after_the_clock_has_stopped(run, seconds):
    for step in run.steps(2, 2):
        next(step.batches)
        step.loss = 1.0
        seconds.time += 1.0
    with pytest.raises(
        RuntimeError, match="step 7 is over; its batches cannot be had now"
    ):
        next(step.batches)


def test_a_step_holds_as_many_batches_as_were_asked_for(run):
    step = next(run.steps(3, 4))
    assert [tuple(x.shape) for x, _ in step.batches] == [(3, C.MAX_SEQ_LEN)] * 4


def test_a_run_trains_once(run, seconds):
    train(run, seconds)
    with pytest.raises(RuntimeError, match="one run trains once"):
        run.steps(2, 1)


def test_asking_for_the_steps_twice_does_not_set_the_clock_back(run, seconds):
    with pytest.raises(RuntimeError, match="one run trains once"):
        first, second = run.steps(2, 1), run.steps(2, 1)
        step = next(first)
        step.loss, seconds.time = 1.0, 4.0
        next(second)


def test_start_up_has_a_limit(run, monkeypatch):
    monkeypatch.setattr(C, "STARTUP_LIMIT", 0.001)
    time.sleep(0.002)
    with pytest.raises(RuntimeError, match="start-up took .* of 0.001 s; compile less"):
        run.steps(2, 1)


def test_a_step_without_a_loss_is_an_error(run):
    steps = run.steps(2, 1)
    next(steps)
    with pytest.raises(RuntimeError, match="step 0 ended without a loss; set step.loss"):
        next(steps)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_voids_the_run_within_the_steps_ahead(
    run, seconds, bad
):
    with pytest.raises(
        RuntimeError, match=f"loss is {bad} at step 3 .lrm 0.25.; the run is void"
    ):
        for step in run.steps(2, 1):
            step.loss, step.lrm = torch.tensor(bad if step.number == 3 else 1.0), 0.25
            seconds.time += 1.0
    assert step.number <= 3 + Clock.MAX_AHEAD
    with pytest.raises(RuntimeError):  # and there is no result of it
        run.evaluate(zeros)


def test_every_step_is_reported_with_its_loss_and_tokens(run, seconds):
    train(run, seconds, loss=torch.tensor(2.5), grad_accum_steps=3)
    assert (
        [step.number for step in run.finished]
        == list(range(run.num_steps))
        == list(range(8))
    )
    assert {step.loss for step in run.finished} == {2.5}
    assert {step.tokens for step in run.finished} == {3 * 2 * C.MAX_SEQ_LEN}


def test_a_step_on_a_cpu_takes_its_own_time_not_that_of_the_steps_after_it(run, seconds):
    train(run, seconds)
    assert [step.seconds for step in run.finished] == [1.0] * 8
    assert run.clock.seconds == 8.0


def test_progress_on_a_cpu_is_the_share_of_the_budget_gone(run, seconds):
    assert [step.progress for step in train(run, seconds)] == [k / 8 for k in range(8)]


def test_tokens_and_epochs_are_counted(run, seconds):
    batch_size = len(run.train_rows) // 3  # an epoch is a little over three steps
    steps = train(run, seconds, batch_size)
    assert run.tokens == len(steps) * batch_size * C.MAX_SEQ_LEN
    rows_before = [k * batch_size for k in range(len(steps))]
    assert [step.epoch for step in steps] == [
        1 + n // len(run.train_rows) for n in rows_before
    ]
    assert steps[-1].epoch > 1


def test_a_last_step_that_ends_late_voids_the_run(run, seconds):
    with pytest.raises(RuntimeError, match="ended 3.0 s late; the run is void"):
        for step in run.steps(2, 1):
            seconds.time += 4.0 if step.number == 7 else 1.0
            step.loss = 1.0
    with pytest.raises(RuntimeError):
        run.print_summary(1, 1, 1.0, "masked")


def test_a_last_step_that_ends_a_little_late_is_tolerated(run, seconds):
    for step in run.steps(2, 1):
        seconds.time += 2.0 if step.number == 7 else 1.0
        step.loss = 1.0
    assert run.clock.seconds == 9.0


def test_no_evaluation_before_or_during_training(run):
    with pytest.raises(RuntimeError, match="evaluate after training"):
        run.evaluate(zeros)
    for step in run.steps(2, 1):
        step.loss = 1.0
        with pytest.raises(RuntimeError, match="evaluate after training"):
            run.evaluate(zeros)
        if step.number == 2:
            break  # an abandoned loop leaves no result either
    with pytest.raises(RuntimeError, match="evaluate after training"):
        run.evaluate(zeros)


def test_no_summary_without_a_result(run, seconds, capsys):
    train(run, seconds)
    with pytest.raises(RuntimeError, match="no result"):
        run.print_summary(1, 1, 1.0, "masked")
    assert "val_bpb" not in capsys.readouterr().out


def test_random_ids_are_in_range_and_leave_torchs_generator_alone(run):
    before = torch.get_rng_state()
    x, y = run.random_batch(3)
    assert x.shape == y.shape == (3, C.MAX_SEQ_LEN) and torch.equal(x[:, 1:], y[:, :-1])
    assert 0 <= x.min() and x.max() < C.VOCAB_SIZE and x.unique().numel() > 100
    assert torch.equal(torch.get_rng_state(), before)


def test_the_seed_of_the_rules_seeds_torch(prepared, monkeypatch):
    draws = []
    for seed in (1, 1, 2):
        monkeypatch.setattr(C, "SEED", seed)
        run = Run(prepared, CPU)
        assert run.seed == seed
        draws.append([torch.rand(4).tolist(), run.random_batch(2)[0].tolist()])
    assert draws[0] == draws[1]
    assert draws[0][0] != draws[2][0] and draws[0][1] != draws[2][1]


def test_the_first_batch_is_read_before_the_clock_starts(run, monkeypatch):
    read, row = [], Rows.__getitem__
    monkeypatch.setattr(
        Rows, "__getitem__", lambda rows, i: read.append(i) or row(rows, i)
    )
    run.steps(2, 1)
    assert read == [0, 1]
