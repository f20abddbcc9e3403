"""One experiment under the rules: clock, steps, evaluation, summary. What train.py is given."""

import atexit
import math
import os
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

import constants as C
from harness import gpu
from harness.data import load_manifest
from harness.evaluation import Model, check_model, evaluate_bpb
from harness.files import PREPARE, content_key, data_dir, describe
from harness.health import Watch
from harness.loader import Batch, Rows, load_batches
from harness.peaks import peak_flops
from harness.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent


class Clock:
    """Counts the time budget, in seconds, by what the device has finished; the host runs ahead."""

    MAX_AHEAD = (
        2  # steps that the host may have queued: enough to hide launches, and no more
    )

    def __init__(self, budget: float, now: Callable[[], float] = time.perf_counter):
        self.budget, self.now, self.running = budget, now, False
        self.started_at: float | None = None
        self.seconds = 0.0  # from the start to the end of the last finished step
        self.durations: deque[float] = deque(
            maxlen=8
        )  # of the last steps, to judge the next by
        self.queued: deque = deque()  # (CUDA event at its end, None on a CPU; step)

    def start(self) -> None:
        self.started_at, self.running = self.now(), True

    def settle(self, ahead: int) -> Iterator["Step"]:
        """Wait until at most `ahead` steps are unfinished; yield the finished ones, timed."""
        while len(self.queued) > ahead:
            event, step = self.queued.popleft()
            if event is not None:
                event.synchronize()
            end = self.now() - self.started_at
            step.seconds, self.seconds = end - self.seconds, end
            self.durations.append(step.seconds)
            yield step

    def next_start(self) -> float:
        """Return the seconds after the start at which the device will begin the next step."""
        mean = sum(self.durations) / max(len(self.durations), 1)
        return self.seconds + len(self.queued) * mean

    def fits(self) -> bool:
        """Return whether one more step, as slow as the slowest of late, ends within the budget."""
        return self.next_start() + max(self.durations, default=0.0) <= self.budget


@dataclass
class Step:
    """One optimizer step: what the loop needs for it, and what is known when it is done."""

    number: int
    progress: float  # share of the time budget gone when the device begins it, 0 to 1
    epoch: int  # 1 is the first
    batches: Iterator[Batch] = iter(())  # one for each micro-step
    loss: torch.Tensor | float | None = (
        None  # set by the loop: mean over all micro-steps, nats
    )
    lrm: float = 1.0  # set by the loop, for its step line
    tokens: int = 0
    seconds: float = 0.0


class Run:
    """One experiment under the rules, on what `prepare` wrote; ValueError says what is amiss."""

    def __init__(self, folder: Path, device: torch.device):
        self.opened_at, self.device, self.commit = (
            time.perf_counter(),
            device,
            git_commit(),
        )
        manifest, path = load_manifest(folder), folder / "manifest.json"
        if manifest.get("rules") != C.DATA_RULES:
            raise ValueError(
                f"{path} is missing, damaged or of other rules; run {PREPARE}"
            )
        self.tokenizer = Tokenizer.load(folder / "tokenizer")
        if manifest.get("tokenizer") != self.tokenizer.sha256:
            raise ValueError(
                f"the rows in {folder} are of another tokenizer; run {PREPARE}"
            )
        hashes = [describe(ROOT / name) for name in ("constants.py", "prepare.py")]
        hashes += [describe(path) for path in sorted((ROOT / "harness").glob("*.py"))]
        hashes.append(self.tokenizer.sha256)
        paths: dict[str, list[Path]] = {"train": [], "val": []}
        for name, entry in manifest["rows"].items():
            path = folder / "rows" / name
            paths[entry["split"]].append(path)
            if not path.is_file() or path.stat().st_size != entry["size"]:
                raise ValueError(f"{path} is missing or cut short; run {PREPARE}")
            if entry["split"] == "val":
                if describe(path)["sha256"] != entry["sha256"]:
                    raise ValueError(
                        f"{path} is damaged: its bytes changed; run {PREPARE}"
                    )
                hashes.append(entry["sha256"])
        own = {"SEED", "SAVE", "STARTED_AT"}  # not rules, but of this run alone
        values = {k: vars(C)[k] for k in dir(C) if k.isupper() and k not in own}
        self.rules = (
            f"{'smoke' if C.SMOKE else 'full'}-{content_key(*hashes, values)[:8]}"
        )
        self.train_rows, self.val_rows = Rows(paths["train"]), Rows(paths["val"])
        self.epoch_tokens = len(self.train_rows) * C.MAX_SEQ_LEN
        self.clock, self.seed, self.cuda = (
            Clock(C.TIME_BUDGET),
            C.SEED,
            device.type == "cuda",
        )
        self.tokens, self.num_steps, self.batch_size, self.val_bpb = 0, 0, 0, math.nan
        self.evaluated = self.printed = False
        self.finished: deque[Step] = (
            deque()
        )  # steps that the device is through with, for the log
        self.random_ids = torch.Generator(device).manual_seed(C.SEED)
        torch.manual_seed(C.SEED)
        self.import_seconds = self.opened_at - C.STARTED_AT
        self.open_seconds = time.perf_counter() - self.opened_at
        self.waits: list[tuple] = []  # gpu.mark before and after each batch
        self.watch = Watch(device)

    def random_batch(self, batch_size: int) -> Batch:
        """Return random ids for warm-up; torch's own generator is left alone."""
        shape = (batch_size, C.MAX_SEQ_LEN + 1)
        ids = torch.randint(
            C.VOCAB_SIZE, shape, generator=self.random_ids, device=self.device
        )
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def steps(self, batch_size: int, grad_accum_steps: int) -> Iterator[Step]:
        """Start the clock, which can be done once, and yield steps while it runs.

        A step holds `grad_accum_steps` batches of `batch_size` rows, to be used before the next
        is asked for; the loop sets its loss. RuntimeError for a late start or a loss not finite.
        """
        if self.clock.started_at is not None:
            raise RuntimeError("the clock has been started; one run trains once")
        if torch.initial_seed() != self.seed:
            raise RuntimeError(
                "train.py set a seed; it comes from the rules (AUTORESEARCH_SEED)"
            )
        batches = load_batches(self.train_rows, batch_size, self.device)
        self.watch.look()
        if (waited := time.perf_counter() - self.opened_at) > C.STARTUP_LIMIT:
            raise RuntimeError(
                f"start-up took {waited:.0f} of {C.STARTUP_LIMIT} s; compile less"
            )
        self.startup_seconds = time.perf_counter() - C.STARTED_AT
        self.compile_seconds = (
            self.startup_seconds - self.import_seconds - self.open_seconds
        )
        self.batch_size = batch_size
        self.clock.start()
        return self._steps(batches, batch_size * C.MAX_SEQ_LEN, grad_accum_steps)

    def _steps(self, batches: Iterator[Batch], tokens: int, count: int) -> Iterator[Step]:
        while self.clock.fits():
            progress = min(self.clock.next_start() / self.clock.budget, 1.0)
            step = Step(self.num_steps, progress, self.tokens // self.epoch_tokens + 1)
            step.batches = self._batches(step, batches, tokens, count)
            yield step
            if step.loss is None:
                raise RuntimeError(
                    f"step {step.number} ended without a loss; set step.loss"
                )
            step.loss = torch.as_tensor(step.loss).detach().to("cpu", non_blocking=True)
            event = torch.cuda.current_stream().record_event() if self.cuda else None
            self.num_steps += 1
            self.clock.queued.append((event, step))
            self._settle(Clock.MAX_AHEAD if self.cuda else 0)
        self._settle(0)
        if self.cuda:
            torch.cuda.synchronize(
                self.device
            )  # what ran beside the steps counts as well
            self.clock.seconds = self.clock.now() - self.clock.started_at
        self.clock.running = False
        if (
            late := self.clock.seconds - C.TIME_BUDGET
        ) > C.TIME_BUDGET * C.OVERRUN_TOLERANCE:
            raise RuntimeError(
                f"the last step ended {late:.1f} s late; the run is void, repeat it"
            )

    def _batches(
        self, step: Step, batches: Iterator, tokens: int, count: int
    ) -> Iterator[Batch]:
        for _ in range(count):
            if self.num_steps != step.number or not self.clock.running:
                raise RuntimeError(
                    f"step {step.number} is over; its batches cannot be had now"
                )
            step.tokens += tokens
            self.tokens += tokens
            start, batch = gpu.mark(self.device), next(batches)
            self.waits.append((start, gpu.mark(self.device)))
            yield batch

    def _settle(self, ahead: int) -> None:
        for step in self.clock.settle(ahead):
            step.loss = float(step.loss)
            if not math.isfinite(step.loss):
                what = f"training loss is {step.loss} at step {step.number} (lrm {step.lrm:.2f})"
                raise RuntimeError(
                    f"{what}; the run is void, lower a learning rate or revert"
                )
            self.finished.append(step)

    def evaluate(self, model: Model) -> float:
        """Measure `model` on the validation rows, see `evaluate_bpb`; training must be over.

        In batches of as many rows as training's, which are compiled, or fewer if they do not fit.
        That is tried on random ids: a model that runs out of memory has not seen the text.
        """
        if self.clock.running or not self.num_steps or self.evaluated:
            raise RuntimeError(
                "evaluate after training, once, and do not break out of run.steps"
            )
        self.evaluated = True  # also if the model is refused: it has seen validation text
        sizes = torch.from_numpy(self.tokenizer.token_bytes).to(
            self.device
        )  # waits for the GPU
        late = self.clock.now() - self.clock.started_at - self.clock.seconds
        extra = self.train_rows.reads + self.val_rows.reads - self.tokens // C.MAX_SEQ_LEN
        if (
            late > C.TIME_BUDGET * C.OVERRUN_TOLERANCE or extra > self.batch_size
        ):  # read ahead
            what = f"{late:.1f} s and {extra - self.batch_size} rows were used outside the clock"
            raise RuntimeError(f"evaluation refused: {what}; the run is void")
        self.watch.look()
        start, ids = (
            time.perf_counter(),
            np.concatenate(self.val_rows.files).view(np.int16),
        )
        rows = torch.from_numpy(ids).to(self.device)
        batch_size = gpu.find_batch_size(
            lambda size: check_model(model, self.random_batch(size)[0]),
            limit=min(
                max(self.batch_size, 2), C.EVAL_ROWS
            ),  # two show whether rows are mixed
            row_bytes=3
            * 4
            * C.MAX_SEQ_LEN
            * C.VOCAB_SIZE,  # logits in float32, about thrice
            device=self.device,
        )
        self.val_bpb = evaluate_bpb(model, rows, sizes, batch_size)
        self.eval_seconds = time.perf_counter() - start
        return self.val_bpb

    def print_summary(
        self, num_params: int, depth: int, flops_per_token: float, attention: str
    ):
        """Print the result, once and last of all; RuntimeError if there is none."""
        if not math.isfinite(self.val_bpb) or self.printed:
            raise RuntimeError("there is no result to print; evaluate first, print once")
        self.num_params, self.depth, self.attention = num_params / 1e6, depth, attention
        self.tok_per_sec = self.tokens / self.clock.seconds
        waited = sum(gpu.seconds_between(*wait) for wait in self.waits)
        self.wait_percent = 100 * waited / self.clock.seconds
        self.gpu = torch.cuda.get_device_name(self.device) if self.cuda else "none (cpu)"
        self.tflops = flops_per_token * self.tok_per_sec / 1e12
        self.mfu_percent = 100e12 * self.tflops / peak_flops(self.gpu)
        self.peak_vram_mb = self.watch.peak_bytes() / 2**20
        self.gpu_health, warnings = self.watch.report()
        self.epochs, self.tokens_M = self.tokens / self.epoch_tokens, self.tokens / 1e6
        self.total_seconds = time.perf_counter() - C.STARTED_AT
        print("\n".join([*warnings, C.SUMMARY.format(run=self)]), flush=True)
        self.printed = True


def git_commit() -> str:
    """Return the short hash of the checkout, `+dirty` when tracked files differ from it."""
    git = f"git -C {shlex.quote(str(ROOT))} describe --always --exclude='*'"
    status, text = subprocess.getstatusoutput(f"{git} --dirty=+dirty")
    return "none" if status else text


def open_run(device: torch.device) -> Run:
    """Return the run on prepared data, preparing it first (and saying so) if there is none."""
    if not (data_dir() / "manifest.json").exists():
        import prepare

        print(f"nothing is prepared in {data_dir()}: preparing first", flush=True)
        prepare.main([])
    atexit.register(demand_result, run := Run(data_dir(), device))
    sys.excepthook = partial(end_at_once, run)
    return run


def end_at_once(run: Run, kind: type, error: BaseException, trace) -> None:
    """Print an uncaught error, for want of memory in one line, and end the process with status 1.

    At once: torch waits up to 300 s for compile workers that it has only just started.
    """
    if gpu.is_out_of_memory(error):
        print(gpu.explain_memory(run, error), file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
    sys.stderr.flush()
    demand_result(run)
    os._exit(1)


def demand_result(run: Run) -> None:
    """End the process with status 1, whatever it was to end with, if `run` printed no result."""
    if not run.printed:
        print("prepare.py: the run ended without a result", flush=True)
        os._exit(1)
