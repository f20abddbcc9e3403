"""One experiment: clock, steps, rules and summary; and what is said where it cannot run."""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.async_compile import AsyncCompile

import constants as C
import forks
import prepare
from conftest import STEP_LINE, copy_checkout, sentence
from harness import download, gpu
from harness.files import PREPARE, data_dir
from harness.guard import MAX_LATE_GRAPHS
from harness.loader import Rows
from harness.manifest import load_manifest
from harness.run import LOG_EVERY, Clock, Run, Step, open_run
from harness.summary import summarise

CPU = torch.device("cpu")
ROOT = Path(C.__file__).parent
HARNESS = ROOT / "harness"
GUESS = math.log(C.VOCAB_SIZE)  # the loss that the first step is expected to have
FIRST_NINE = (
    "val_bpb training_seconds total_seconds peak_vram_mb mfu_percent total_tokens_M"
)
FIRST_NINE = f"{FIRST_NINE} num_steps num_params_M depth".split()


# ---- The clock ----------------------------------------------------------------------------------
class Machine:
    """A host and a device with one time line: work is queued in order, an event waits for it."""

    def __init__(self):
        self.time, self.free_at = 1000.0, 1000.0  # of the host; of the device
        self.unfinished: list[Event] = []

    def now(self) -> float:
        return self.time

    def queue(self, seconds: float) -> "Event":
        event = Event(self, max(self.time, self.free_at), seconds)
        self.free_at = event.end
        self.unfinished.append(event)
        return event

    def ahead(self) -> int:
        """Return how many queued steps the device has not finished."""
        self.unfinished = [event for event in self.unfinished if event.end > self.time]
        return len(self.unfinished)


class Event:
    def __init__(self, machine: Machine, start: float, seconds: float):
        self.machine, self.start, self.end = machine, start, start + seconds

    def query(self) -> bool:
        return self.end <= self.machine.time

    def synchronize(self) -> None:
        self.machine.time = max(self.machine.time, self.end)

    def elapsed_time(self, other: "Event") -> float:
        assert max(self.end, other.end) <= self.machine.time
        return 1e3 * (other.end - self.end)


def drive(budget: float, device_seconds, host_seconds: float = 0.0):
    """Run steps as the run's loop does; device_seconds(k): what step k takes on the device.

    Return the clock, the machine, and of each step (Step, Event, steps ahead when it was queued).
    """
    machine, log = Machine(), []
    clock = Clock(budget, machine.now)
    clock.start()
    while clock.fits():
        step = Step(len(log), min(clock.next_start() / budget, 1.0), 1)
        ahead = machine.ahead()
        machine.time += host_seconds
        event = machine.queue(device_seconds(len(log)))
        log.append((step, event, ahead))
        clock.queue(event, step)
        list(clock.settle(Clock.MAX_AHEAD))
    list(clock.settle(0))
    return clock, machine, log


# Binary fractions, so that sums are exact and "the last one that fits" has one answer.
@pytest.mark.parametrize("host", [0.0, 0.125, 0.5])
@pytest.mark.parametrize("step", [0.125, 0.375, 1.0])
def test_constant_steps_fill_the_budget_and_never_exceed_it(step, host):
    clock, machine, log = drive(16.0, lambda k: step, host)
    each = max(step, host)  # what a step costs once the pipeline is full
    used = log[-1][1].end - 1000.0
    assert clock.seconds == used <= 16.0
    assert used + each + host > 16.0  # one more would not have fitted


def launch(steps: int, launches: int, host: float, device: float) -> Clock:
    """Queue steps launch by launch, with at most 1000 unfinished ones, as CUDA does.

    host, device: seconds of a launch on each. Return the clock.
    """
    machine, ends = Machine(), deque()
    clock = Clock(1e9, machine.now)
    clock.start()
    for number in range(steps):
        machine.time += 1e-4  # schedules, a batch
        clock.begin()
        for _ in range(launches):
            machine.time += host
            ends.append(machine.queue(device))
            if len(ends) > 1000:
                ends.popleft().synchronize()
        clock.queue(ends[-1], Step(number, 0.0, 1))
        list(clock.settle(Clock.MAX_AHEAD))
    return clock


@pytest.mark.parametrize("launches", [200, 900, 1500, 12_000])
def test_that_python_sets_the_pace_is_true_for_steps_of_any_length(launches):
    """Of 1500 launches, 1000 fill CUDA's queue: the last step is over, the GPU 60 ms behind.

    The default was told that Python sets its pace, in 100 % of its steps.
    """
    for host, device, share in [(1e-5, 6.5e-5, 0), (1e-5, 1.3e-5, 0), (2e-5, 1e-5, 1)]:
        clock = launch(40, launches, host, device)
        assert clock.starved == pytest.approx(share * 40, abs=2), (host, device)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "products, wait, share", [(50, 0, 0), (3000, 0, 0), (1, 0.02, 1)]
)
def test_on_a_gpu_the_clock_sees_who_sets_the_pace(products, wait, share):
    device = torch.device("cuda")
    clock, x = Clock(60.0), torch.ones(2048, 2048, device=device)
    (x @ x).sum().item()
    clock.start()
    for number in range(20):
        clock.begin()
        for _ in range(products):
            x @ x
        time.sleep(wait)
        clock.queue(gpu.mark(device), Step(number, 0.0, 1))
        time.sleep(wait / 20)
        list(clock.settle(Clock.MAX_AHEAD))
    assert clock.starved == pytest.approx(share * 20, abs=2)


def test_the_budget_holds_for_a_single_step_that_fills_it():
    clock, _, log = drive(1.0, lambda k: 0.25)
    assert (clock.seconds, len(log)) == (1.0, 4)


def test_a_run_of_uneven_steps_expects_the_slowest_of_late():
    clock, _, log = drive(16.0, lambda k: 1.0 if k % 5 == 4 else 0.25)
    assert clock.seconds <= 16.0
    assert clock.seconds > 16.0 - 2 * 1.0


def test_the_host_is_never_more_than_max_ahead_ahead():
    _, _, log = drive(16.0, lambda k: 0.25)
    aheads = [ahead for _, _, ahead in log]
    assert max(aheads) == Clock.MAX_AHEAD  # it does run ahead, and no further
    assert set(aheads[Clock.MAX_AHEAD :]) == {Clock.MAX_AHEAD}


def test_progress_is_the_share_gone_when_the_device_begins_the_step():
    _, _, log = drive(16.0, lambda k: 0.25)
    for step, event, _ in log[Clock.MAX_AHEAD + 1 :]:
        assert step.progress == pytest.approx((event.start - 1000.0) / 16.0)
    progresses = [step.progress for step, *_ in log]
    assert progresses[0] == 0.0 and progresses == sorted(progresses)
    assert progresses[-1] == pytest.approx(1 - 0.25 / 16.0)  # schedules reach their end


def queue_steps(count: int) -> tuple[Clock, Machine, list[Step]]:
    """Return a clock of 16 s that has started and the steps queued on it, of 2 s each."""
    machine = Machine()
    clock = Clock(16.0, machine.now)
    clock.start()
    steps = [Step(k, 0.0, 1) for k in range(count)]
    for step in steps:
        clock.queue(machine.queue(2.0), step)
    return clock, machine, steps


def test_seconds_count_finished_steps_only():
    clock, machine, steps = queue_steps(3)
    assert clock.seconds == 0.0 and machine.time == 1000.0  # queueing waits for nothing
    assert list(clock.settle(2)) == steps[:1] and clock.seconds == 2.0
    assert clock.next_start() == 6.0  # two more of the same are queued
    assert list(clock.settle(0)) == steps[1:] and clock.seconds == 6.0
    assert [step.seconds for step in steps] == [2.0, 2.0, 2.0]


def test_a_host_that_stops_between_steps_pays_for_it():
    machine = Machine()
    clock = Clock(4.0, machine.now)
    clock.start()
    clock.queue(machine.queue(1.0), Step(0, 0.0, 1))
    list(clock.settle(0))
    machine.time += 2.5
    clock.queue(machine.queue(0.5), Step(1, 0.0, 1))
    list(clock.settle(0))
    assert clock.seconds == 4.0 and not clock.fits()


def test_a_step_whose_end_the_host_sees_late_has_not_taken_0_seconds():
    clock, machine, steps = queue_steps(4)
    list(clock.settle(3))
    machine.time += 5.0
    list(clock.settle(0))
    assert [step.seconds for step in steps] == [2.0, 2.0, 2.0, 2.0]
    assert clock.seconds == 8.0  # and none is later than the last ended


def test_setting_the_time_of_the_machine_changes_nothing(monkeypatch):
    jumps = iter(range(0, 10**9, 3600))
    monkeypatch.setattr(time, "time", lambda: float(next(jumps)))
    clock, started = Clock(0.2), time.perf_counter()
    assert clock.now in (time.perf_counter, time.monotonic)
    clock.start()
    begun, steps = time.perf_counter(), 0
    while clock.fits():
        time.sleep(0.01)
        clock.queue(None, Step(steps, 0.0, 1))
        list(clock.settle(Clock.MAX_AHEAD))
        steps += 1
    ended = time.perf_counter()
    list(clock.settle(0))
    assert steps > 3
    assert ended - begun <= clock.seconds <= time.perf_counter() - started


# ---- What cannot run ----------------------------------------------------------------------------
def test_a_full_run_without_a_gpu_names_the_command_that_needs_none(tmp_path):
    env = os.environ | {"AUTORESEARCH_SMOKE": "0", "CUDA_VISIBLE_DEVICES": ""}
    env["AUTORESEARCH_CACHE"] = str(tmp_path)
    done = forks.run(ROOT / "train.py", env=env)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "no CUDA GPU" in line and "AUTORESEARCH_SMOKE=1 uv run train.py" in line
    assert list(tmp_path.iterdir()) == []  # it does not download first


def test_no_data_and_no_network(full_rules, monkeypatch, tmp_path):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(download, "RETRY_SECONDS", (0, 0))
    assert C.DATASET in sentence(prepare.main, [])
    # The same through a run, which prepares first.
    monkeypatch.setattr(gpu, "choose_device", lambda: torch.device("cuda"))
    assert C.DATASET in sentence(open_run)
    assert not (data_dir() / "manifest.json").exists()


def test_a_run_that_cannot_start_does_not_wait_300_s_for_processes_that_compile(
    prepared_copy, monkeypatch
):
    garbage(prepared_copy / "manifest.json")
    started = []
    monkeypatch.setattr(AsyncCompile, "use_process_pool", lambda: started.append(True))
    monkeypatch.setattr(
        "harness.compile_cache.prepare_compiler", lambda: None
    )  # is imported
    monkeypatch.setattr(gpu, "choose_device", lambda: torch.device("cuda"))
    assert "manifest.json" in sentence(open_run)
    time.sleep(0.5)
    assert not started


def rows_of(folder: Path, split: str) -> Path:
    rows = load_manifest(folder)["rows"]
    return next(
        folder / "rows" / name for name, about in rows.items() if about["split"] == split
    )


def change_a_byte(path: Path) -> Path:
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    path.write_bytes(body)
    return path


def cut_short(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-2])
    return path


def remove(path: Path) -> Path:
    path.unlink()
    return path


def garbage(path: Path) -> Path:
    path.write_text("[1, 2", "utf-8")
    return path


DAMAGES = {
    "manifest that is no JSON": lambda folder: garbage(folder / "manifest.json"),
    "tokenizer.json gone": lambda folder: remove(folder / "tokenizer" / "tokenizer.json"),
    "tokenizer.json is no JSON": lambda folder: garbage(
        folder / "tokenizer" / "tokenizer.json"
    ),
    "ranks gone": lambda folder: remove(folder / "tokenizer" / "ranks.tiktoken"),
    "ranks changed": lambda folder: change_a_byte(
        folder / "tokenizer" / "ranks.tiktoken"
    ),
    "validation rows changed": lambda folder: change_a_byte(rows_of(folder, "val")),
    "validation rows cut short": lambda folder: cut_short(rows_of(folder, "val")),
    "validation rows gone": lambda folder: remove(rows_of(folder, "val")),
    "training rows cut short": lambda folder: cut_short(rows_of(folder, "train")),
    "training rows gone": lambda folder: remove(rows_of(folder, "train")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_artifact_is_named_with_what_to_do(prepared_copy, damage):
    path = damage(prepared_copy)
    said = sentence(open_run)
    assert said.startswith("train.py: ") and PREPARE in said
    assert str(path) in said or str(path.parent) in said


@pytest.mark.parametrize(
    "damage", ["ranks changed", "validation rows changed", "ranks gone"]
)
def test_the_advice_of_the_error_repairs_it(prepared_copy, damage, capsys):
    before = Run(prepared_copy, CPU).rules
    DAMAGES[damage](prepared_copy)
    prepare.main([])
    assert Run(prepared_copy, CPU).rules == before


def test_data_prepared_under_other_rules_is_refused(prepared_copy, monkeypatch):
    monkeypatch.setattr(C, "DATA_RULES", [*C.DATA_RULES[:-1], -1])
    said = sentence(open_run)
    assert "other rules" in said and str(prepared_copy) in said and PREPARE in said


def test_a_folder_with_nothing_in_it_is_refused(tmp_path):
    with pytest.raises(
        (FileNotFoundError, ValueError),
        match="nothing is prepared in .*; run .*prepare.py",
    ):
        Run(tmp_path, CPU)


def test_a_tokenizer_retrained_under_old_rows_is_refused(prepared_copy):
    # What a preparation killed between tokenizer and rows leaves: the byte lengths would be wrong.
    folder = prepared_copy / "tokenizer"
    lines = (folder / "ranks.tiktoken").read_bytes().splitlines(keepends=True)
    (a, i), (b, j) = lines[-1].split(), lines[-2].split()
    body = b"".join([*lines[:-2], b"%s %s\n" % (a, j), b"%s %s\n" % (b, i)])
    (folder / "ranks.tiktoken").write_bytes(body)
    about = json.loads((folder / "tokenizer.json").read_text())
    about["ranks_sha256"] = hashlib.sha256(body).hexdigest()
    (folder / "tokenizer.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="of another tokenizer; run .*prepare.py"):
        Run(prepared_copy, CPU)


@pytest.mark.parametrize("entry", [{}, {"split": "val"}, 3, None])
def test_a_manifest_with_half_an_entry_is_a_sentence_not_a_key_error(
    prepared_copy, entry
):
    manifest = json.loads((prepared_copy / "manifest.json").read_text())
    manifest["rows"][next(iter(manifest["rows"]))] = entry
    (prepared_copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="manifest.json is damaged; run `.*prepare.py"):
        Run(prepared_copy, CPU)


def test_what_was_prepared_by_other_rules_is_not_called_damaged(prepared_copy):
    path = prepared_copy / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["rules"][0] += 1
    path.write_text(json.dumps({k: v for k, v in manifest.items() if k != "key"}))
    with pytest.raises(ValueError, match="manifest.json is of other rules; run"):
        Run(prepared_copy, CPU)


def test_a_crash_in_the_first_compilation_does_not_hang_in_torchs_exit(
    prepared, tmp_path
):
    # At exit torch waits for its compile workers, for up to 300 s if they are still starting.
    code = "from harness.run import open_run; run = open_run();"
    code += (
        "from torch._inductor.async_compile import maybe_warm_pool; maybe_warm_pool();"
    )
    code += "raise ValueError('a mistake')"
    shutil.copytree(prepared, tmp_path / "smoke")
    env = os.environ | {
        "AUTORESEARCH_CACHE": str(tmp_path),
        "PYTHONPATH": str(Path(C.__file__).parent),
    }
    done = forks.run("-c", code, env=env, seconds=60)
    assert done.returncode == 1 and done.stderr.endswith("ValueError: a mistake\n")
    assert done.stdout.endswith("train.py: the run ended without a result\n")


def test_a_run_that_is_out_of_memory_ends_with_the_line_and_status_1(prepared, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import torch\n"
        "from harness.run import open_run\n"
        "run = open_run()\n"
        "run.batch_size, run.micro_steps = 4, 1\n"
        "for step in run.steps():\n"
        "    if step.number == 3:\n"
        "        raise torch.OutOfMemoryError('does not fit')\n"
        "    step.loss = 7.0 * len(list(step.batches))\n"
    )
    (tmp_path / "smoke").symlink_to(prepared)
    env = {"AUTORESEARCH_CACHE": str(tmp_path), "AUTORESEARCH_SMOKE": "1"}
    env |= {"PYTHONPATH": str(Path(C.__file__).parent)}
    done = forks.run(script, env=env, seconds=60)
    assert done.returncode == 1 and "val_bpb" not in done.stdout
    assert done.stderr == (
        "train.py: out of GPU memory at step 3 with 4 rows per micro-step (line 7); set "
        "DEVICE_BATCH_SIZE below 4, or lower DEPTH or N_EMBD, or end what else uses the GPU "
        "(does not fit)\n"
    )


# ---- Steps --------------------------------------------------------------------------------------
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
    """A run on the smoke data, warmed up, whose budget is 8 of those seconds."""
    monkeypatch.setattr(C, "TIME_BUDGET", 8.0)
    monkeypatch.setattr(C, "OVERRUN_TOLERANCE", 0.25)
    run = Run(prepared, CPU)
    run.clock.now = seconds.now
    return warmed(run)


def warmed(run: Run, batch_size: int = 2, micro_steps: int = 1) -> Run:
    """Return `run` with the batch that a warm-up would have found."""
    run.batch_size, run.micro_steps = batch_size, micro_steps
    return run


def go_through(run: Run, seconds: Seconds, losses=lambda number: GUESS) -> list[Step]:
    """Go through all steps of a run, one second each; return them."""
    steps = []
    for step in run.steps():
        shapes = [(tuple(x.shape), tuple(y.shape)) for x, y in step.batches]
        assert shapes == [((run.batch_size, C.MAX_SEQ_LEN),) * 2] * run.micro_steps
        step.loss = losses(step.number)
        seconds.time += 1.0
        steps.append(step)
    return steps


def use(step: Step, loss: float = GUESS) -> None:
    """Take the step's batches and set its loss."""
    step.loss = loss * len(list(step.batches)) / step.micro_steps


def zeros(idx: torch.Tensor) -> torch.Tensor:
    return torch.zeros(*idx.shape, C.VOCAB_SIZE)


def test_a_run_hands_out_the_training_rows_in_the_order_of_the_rules(run, seconds):
    read = []
    for step in warmed(run, 2, 3).steps():
        read += [x for x, _ in step.batches]
        step.loss = GUESS
        seconds.time += 1.0
    assert len(read) == 3 * 8
    read = torch.cat(read).numpy()
    order = np.random.default_rng(1).permutation(len(run._train_rows))[: 2 * 3 * 8]
    assert np.array_equal(read, np.stack([run._train_rows[i] for i in order])[:, :-1])


def test_no_step_before_the_warm_up(run):
    with pytest.raises(RuntimeError, match="call run.warm_up before run.steps"):
        warmed(run, 0, 0).steps()


def test_the_warm_up_sets_the_batch_that_the_steps_have(prepared, capsys):
    run, model = Run(prepared, CPU), torch.nn.Embedding(C.VOCAB_SIZE, C.VOCAB_SIZE)
    torch.nn.init.zeros_(model.weight)

    def train_step(model, optimizers, batches, micro_steps):
        total = 0.0
        for x, y in batches:
            logits = model(x).flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, y.flatten()) / micro_steps
            loss.backward()
            total += loss.detach()
        optimizers[0].step()
        optimizers[0].zero_grad()
        return total

    sgd, rows = torch.optim.SGD(model.parameters(), lr=1.0), C.FULL_SEQ_LEN
    run.warm_up(
        *(model, [sgd], train_step),
        **{"total_batch_size": 48 * rows, "device_batch_size": 16},
    )
    assert (run.batch_size, run.micro_steps) == (16 * C.MAX_SEQ_LEN // rows, 3)
    assert run.num_params == C.VOCAB_SIZE**2 and not model.weight.any()
    line = f"batch: 3 micro-steps of {run.batch_size} rows of {C.MAX_SEQ_LEN} tokens\n"
    assert capsys.readouterr().out == line
    step = next(run.steps())
    assert step.micro_steps == 3
    assert [tuple(x.shape) for x, _ in step.batches] == [(2, C.MAX_SEQ_LEN)] * 3


def test_no_batch_after_its_step(run, seconds):
    steps = warmed(run, 2, 2).steps()
    first = next(steps)
    next(first.batches)
    first.loss, seconds.time = GUESS, 1.0
    next(steps)
    with pytest.raises(
        RuntimeError, match="step 0 is over; its batches cannot be had now"
    ):
        next(first.batches)


def test_no_batch_after_the_clock_has_stopped(run, seconds):
    for step in warmed(run, 2, 2).steps():
        next(step.batches)
        step.loss = GUESS
        seconds.time += 1.0
    with pytest.raises(
        RuntimeError, match="step 7 is over; its batches cannot be had now"
    ):
        next(step.batches)


def test_a_step_holds_as_many_batches_as_the_warm_up_found(run):
    step = next(warmed(run, 3, 4).steps())
    assert step.micro_steps == 4
    assert [tuple(x.shape) for x, _ in step.batches] == [(3, C.MAX_SEQ_LEN)] * 4


def test_a_run_trains_once(run, seconds):
    go_through(run, seconds)
    with pytest.raises(RuntimeError, match="one run trains once"):
        run.steps()


def test_asking_for_the_steps_twice_does_not_set_the_clock_back(run, seconds):
    with pytest.raises(RuntimeError, match="one run trains once"):
        first, second = run.steps(), run.steps()
        use(next(first))
        seconds.time = 4.0
        next(second)


def test_start_up_has_a_limit(run, monkeypatch):
    monkeypatch.setattr(C, "STARTUP_LIMIT", 0.001)
    time.sleep(0.002)
    said = "start-up took .* of 0.001 s, .*: (compile less|the machine is busy)"
    with pytest.raises(RuntimeError, match=said):
        run.steps()


def test_a_seed_of_train_pys_own_is_an_error(run):
    torch.manual_seed(C.SEED + 1)
    with pytest.raises(RuntimeError, match="train.py set a seed"):
        run.steps()


def test_a_step_without_a_loss_is_an_error(run):
    steps = run.steps()
    list(next(steps).batches)
    with pytest.raises(RuntimeError, match="step 0 has no loss; set step.loss"):
        next(steps)


def test_a_step_that_takes_no_batch_is_an_error(run, seconds):
    steps = run.steps()
    use(next(steps))
    seconds.time = 1.0
    next(steps).loss = 1.0
    with pytest.raises(RuntimeError, match="step 1 took no batch; use step.batches"):
        next(steps)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_voids_the_run_within_the_steps_ahead(
    run, seconds, bad
):
    with pytest.raises(
        RuntimeError, match=f"loss is {bad} at step 3 .lrm 0.25.; the run is void"
    ):
        for step in run.steps():
            list(step.batches)
            step.loss, step.lrm = torch.tensor(bad if step.number == 3 else GUESS), 0.25
            seconds.time += 1.0
    assert step.number <= 3 + Clock.MAX_AHEAD
    with pytest.raises(RuntimeError):  # and there is no result of it
        run.evaluate(zeros)


def test_a_first_loss_that_no_untrained_model_has_voids_the_run(run, seconds):
    with pytest.raises(RuntimeError, match="the loss of step 0 is .*; the run is void"):
        go_through(run, seconds, lambda number: 0.94 * GUESS)
    assert run.num_steps <= 1 + Clock.MAX_AHEAD
    with pytest.raises(RuntimeError):
        run.evaluate(zeros)


def test_a_later_loss_may_be_as_low_as_it_is(run, seconds, capsys):
    go_through(run, seconds, lambda number: 0.1 if number else GUESS)
    assert run.num_steps == 8 and "warning" not in capsys.readouterr().out


def test_a_high_first_loss_is_a_warning_that_voids_nothing(run, seconds, capsys):
    go_through(run, seconds, lambda number: 1.06 * GUESS)
    lines = capsys.readouterr().out.splitlines()
    (warning,) = (line for line in lines if line.startswith("warning"))
    assert warning.startswith("warning: edit: the loss of step 0 is ")
    assert run.num_steps == 8


def test_every_step_has_its_loss_and_tokens_when_it_is_done(run, seconds):
    steps = go_through(warmed(run, 2, 3), seconds, lambda number: torch.tensor(GUESS))
    assert [step.number for step in steps] == list(range(run.num_steps)) == list(range(8))
    assert all(isinstance(step.loss, float) for step in steps)
    assert [step.loss for step in steps] == pytest.approx([GUESS] * 8)
    assert {step.tokens for step in steps} == {3 * 2 * C.MAX_SEQ_LEN}


def test_the_log_has_whole_lines_of_every_tenth_step(run, seconds, capsys, monkeypatch):
    monkeypatch.setattr(C, "TIME_BUDGET", 25.0)
    run.clock.budget = 25.0
    go_through(run, seconds, lambda number: GUESS - number / 8)
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert out.endswith("\n") and "\r" not in out and all(map(STEP_LINE.fullmatch, lines))
    assert [line[:10] for line in lines] == [f"step {n:05d}" for n in (0, 10, 20)]
    assert LOG_EVERY == 10 and f"| loss: {GUESS - 10 / 8:.4f} |" in lines[1]
    assert lines[1].endswith("remaining: 14s")  # eleven are done


def test_a_step_on_a_cpu_takes_its_own_time_not_that_of_the_steps_after_it(run, seconds):
    steps = go_through(run, seconds)
    assert [step.seconds for step in steps] == [1.0] * 8
    assert run.clock.seconds == 8.0


def test_progress_on_a_cpu_is_the_share_of_the_budget_gone(run, seconds):
    assert [step.progress for step in go_through(run, seconds)] == [
        k / 8 for k in range(8)
    ]


def test_tokens_and_epochs_are_counted(run, seconds):
    batch_size = len(run._train_rows) // 3  # an epoch is a little over three steps
    steps = go_through(warmed(run, batch_size), seconds)
    assert run.tokens == len(steps) * batch_size * C.MAX_SEQ_LEN
    rows_before = [k * batch_size for k in range(len(steps))]
    assert [step.epoch for step in steps] == [
        1 + n // len(run._train_rows) for n in rows_before
    ]
    assert steps[-1].epoch > 1


def test_a_last_step_that_ends_late_voids_the_run(run, seconds):
    with pytest.raises(RuntimeError, match="ended 3.0 s late; the run is void"):
        for step in run.steps():
            use(step)
            seconds.time += 4.0 if step.number == 7 else 1.0
    with pytest.raises(RuntimeError, match="evaluate after training"):  # was it caught?
        run.evaluate(zeros)
    with pytest.raises(RuntimeError):
        run.print_summary(1, 1.0, "masked")


def test_a_last_step_that_ends_a_little_late_is_tolerated(run, seconds):
    for step in run.steps():
        use(step)
        seconds.time += 2.0 if step.number == 7 else 1.0
    assert run.clock.seconds == 9.0


# ---- Code that is compiled while the clock runs --------------------------------------------------
@pytest.fixture
def graphs(monkeypatch):
    """Return a function that pretends that torch compiled so many graphs."""

    def compiled(count: int) -> None:
        stats = counters["stats"]
        monkeypatch.setitem(stats, "unique_graphs", stats["unique_graphs"] + count)

    compiled(1000)  # before the clock: any number
    return compiled


def test_graphs_compiled_while_the_clock_runs_are_one_warning(
    run, seconds, graphs, capsys
):
    for step in run.steps():
        graphs({2: 3, 5: MAX_LATE_GRAPHS - 3}.get(step.number, 0))
        use(step)
        seconds.time += 1.0
    lines = capsys.readouterr().out.splitlines()
    (warning,) = (line for line in lines if line.startswith("warning"))
    assert warning.startswith("warning: edit: step 2: 3 graphs were compiled while the ")
    assert run.num_steps == 8


def test_graphs_compiled_over_and_over_void_the_run(run, seconds, graphs):
    what = f"step 5: {MAX_LATE_GRAPHS + 1} graphs were compiled .*; the run is void"
    assert MAX_LATE_GRAPHS == 16
    with pytest.raises(RuntimeError, match=what):
        for step in run.steps():
            graphs({2: MAX_LATE_GRAPHS, 5: 1}.get(step.number, 0))
            use(step)
            seconds.time += 1.0
    with pytest.raises(RuntimeError):
        run.evaluate(zeros)


def test_graphs_compiled_before_the_clock_are_no_matter(run, seconds, graphs, capsys):
    go_through(run, seconds)
    assert "warning" not in capsys.readouterr().out


# ---- After the steps ----------------------------------------------------------------------------
def test_no_evaluation_before_or_during_training(run, seconds):
    with pytest.raises(RuntimeError, match="evaluate after training"):
        run.evaluate(zeros)
    for step in run.steps():
        use(step)
        seconds.time += 1.0
        with pytest.raises(RuntimeError, match="evaluate after training"):
            run.evaluate(zeros)
        if step.number == 2:
            break  # an abandoned loop leaves no result either
    with pytest.raises(RuntimeError, match="evaluate after training"):
        run.evaluate(zeros)


def test_no_summary_without_a_result(run, seconds, capsys):
    go_through(run, seconds)
    with pytest.raises(RuntimeError, match="no result"):
        run.print_summary(1, 1.0, "masked")
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
    run.steps()
    assert len(read) == 2


def test_a_run_is_evaluated_once_so_that_nothing_is_selected_on_validation_text(
    prepared, monkeypatch
):
    monkeypatch.setattr(C, "TIME_BUDGET", 1.0)
    for model in (zeros, lambda idx: "refused"):
        run = warmed(Run(prepared, CPU))
        for step in run.steps():
            use(step)
        with contextlib.suppress(
            RuntimeError
        ):  # a refused model has seen the text as well
            run.evaluate(model)
        with pytest.raises(RuntimeError, match="evaluate after training, once"):
            run.evaluate(zeros)


# ---- The rules ----------------------------------------------------------------------------------
FIXED = [
    "constants.py",
    "prepare.py",
    *(f"harness/{p.name}" for p in HARNESS.glob("*.py")),
]


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A copy of the files that are not edited, which a run takes for its own."""
    monkeypatch.setattr("harness.run.ROOT", tmp_path / "checkout")
    return copy_checkout(tmp_path / "checkout")


def rules_of(folder: Path) -> str:
    return Run(folder, CPU).rules


@pytest.mark.parametrize("name", sorted(FIXED))
def test_a_changed_byte_of_any_fixed_file_changes_the_rules(prepared, checkout, name):
    before, path = rules_of(prepared), checkout / name
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    path.write_bytes(body)
    assert rules_of(prepared) != before


def test_a_fixed_file_that_is_added_or_gone_changes_the_rules(prepared, checkout):
    before = rules_of(prepared)
    (checkout / "harness" / "more.py").write_text("")
    more = rules_of(prepared)
    (checkout / "harness" / "more.py").unlink()
    assert rules_of(prepared) == before
    (checkout / "harness" / "peaks.py").unlink()
    assert len({before, more, rules_of(prepared)}) == 3


def test_what_is_edited_and_what_is_compiled_is_no_rule(prepared, checkout):
    before = rules_of(prepared)
    assert re.fullmatch("smoke-[0-9a-f]{8}", before)
    with pytest.MonkeyPatch.context() as patch:  # wherever the checkout lies
        patch.setattr("harness.run.ROOT", HARNESS.parent)
        assert rules_of(prepared) == before
    (checkout / "train.py").write_text("")
    (checkout / "harness" / "__pycache__").mkdir()
    (checkout / "harness" / "__pycache__" / "run.cpython-312.pyc").write_bytes(b"x")
    assert rules_of(prepared) == before


def test_a_constant_that_is_changed_in_memory_shows_in_the_rules_and_the_seed_does_not(
    prepared, monkeypatch
):
    before = rules_of(prepared)
    monkeypatch.setattr(C, "SEED", C.SEED + 1)
    assert rules_of(prepared) == before
    monkeypatch.setattr(C, "TIME_BUDGET", C.TIME_BUDGET + 1)
    assert rules_of(prepared) != before


# ---- The summary --------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def summary(prepared) -> str:
    """The summary of a run whose model knows nothing, with 8 steps of a pretended second."""
    patch, seconds = pytest.MonkeyPatch(), iter(range(100))
    patch.setattr(C, "TIME_BUDGET", 8.0)
    run = Run(prepared, CPU)
    patch.undo()
    time = 0.0
    run.clock.now = lambda: time
    for step in warmed(run, 2, 3).steps():
        use(step)
        time = float(next(seconds) + 1)
    run.evaluate(zeros)
    run.num_params, lines = 1_234_567, []  # the warm-up counts them
    patch.setattr("builtins.print", lambda *args, **kwargs: lines.append(*args))
    run.print_summary(depth=3, flops_per_token=1e9, attention="masked")
    patch.undo()
    (text,) = lines
    return text


def parse(summary: str) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in summary.splitlines()[1:])


def test_the_summary_has_its_keys_in_order_the_familys_nine_first(summary):
    keys = [line.split(":")[0] for line in summary.splitlines()]
    assert keys == [line.split(":")[0] for line in C.SUMMARY.splitlines()]
    assert keys[:10] == ["---", *FIRST_NINE] and keys[10:12] == ["tok_per_sec", "tflops"]
    ours = {
        "tok_per_sec",
        "startup_seconds",
        "import_seconds",
        "open_seconds",
        "compile_seconds",
    }
    ours |= {"data_wait_percent", "eval_seconds", "epochs", "attention", "gpu", "seed"}
    assert ours | {"commit", "data", "rules"} <= set(keys) and len(set(keys)) == len(keys)


def test_every_line_of_the_summary_is_a_key_and_a_value(summary):
    first, *lines = summary.splitlines()
    assert first == "---"
    assert all(re.fullmatch(r"[a-zA-Z_]+: \S.*", line) for line in lines)
    assert "\r" not in summary and summary.count("val_bpb:") == 1


def test_the_numbers_of_the_summary_are_those_of_the_run(summary, prepared):
    values = parse(summary)
    tokens = 8 * 3 * 2 * C.MAX_SEQ_LEN
    assert values["num_steps"] == "8" and values["depth"] == "3"
    assert values["training_seconds"] == "8.0" and values["num_params_M"] == "1.2"
    assert values["tok_per_sec"] == str(tokens // 8)
    assert (
        values["tflops"] == f"{tokens / 8 * 1e9 / 1e12:.2f}" == "1.54"
    )  # 1e9 FLOPs per token
    assert values["total_tokens_M"] == f"{tokens / 1e6:.1f}"
    manifest = load_manifest(prepared)["rows"]
    sizes = [about["size"] for about in manifest.values() if about["split"] == "train"]
    there = sum(sizes) // 2 // (C.MAX_SEQ_LEN + 1)
    assert values["epochs"] == f"{8 * 3 * 2 / there:.2f}"
    assert values["attention"] == "masked" and values["seed"] == str(C.SEED)
    assert float(values["eval_seconds"]) >= 0 and float(values["startup_seconds"]) > 0
    assert float(values["total_seconds"]) >= float(values["startup_seconds"])
    parts = sum(
        float(values[f"{part}_seconds"]) for part in ("import", "open", "compile")
    )
    assert parts == pytest.approx(
        float(values["startup_seconds"]), abs=0.2
    )  # four roundings
    assert 0 < float(values["data_wait_percent"]) < 100  # of pretended seconds


def test_the_bits_per_byte_of_the_summary_are_those_of_a_guess(summary, prepared):
    run = Run(prepared, CPU)
    targets = np.concatenate([row[1:] for row in run._val_rows])
    assert len(targets) == C.EVAL_TOKENS
    text = targets[targets < C.BOS_ID]
    nbytes = sum(
        len(run.tokenizer.encoding.decode_single_token_bytes(int(i))) for i in text
    )
    expected = math.log2(C.VOCAB_SIZE) * len(text) / nbytes
    assert float(parse(summary)["val_bpb"]) == pytest.approx(expected, abs=2e-6)


def test_a_run_without_a_gpu_says_so(summary):
    values = parse(summary)
    assert values["gpu"] == "none (cpu)" and values["peak_vram_mb"] == "0.0"
    assert values["mfu_percent"] == "nan"


def test_text_that_ran_out_is_told_of(run, seconds, monkeypatch):
    def warnings(there: int, smoke: bool = False) -> list[str]:
        monkeypatch.setattr(C, "SMOKE", smoke)
        run.epoch_tokens = there
        lines = summarise(run, ROOT, 1.0).splitlines()
        return [line for line in lines if line.startswith("warning: data:")]

    go_through(run, seconds)
    run.evaluate(zeros)
    run.tokens, run.depth, run.attention = 3_000_000, 1, "masked"
    assert not warnings(3_000_000) and not warnings(2_000_000, smoke=True)
    (line,) = warnings(2_900_000)
    assert "3.0 M tokens, but there are 2.9 M" in line
    assert not C.WARNINGS["data"]  # own text may be short


def test_the_commit_is_a_short_hash_or_none(summary):
    assert re.fullmatch(r"[0-9a-f]{7,}(\+dirty)?|none", parse(summary)["commit"])
