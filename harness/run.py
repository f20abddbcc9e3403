"""One experiment under the rules: warm-up, clock, steps, evaluation, summary. Not edited.

What train.py is given: `open_run()` returns a `Run`, whose methods stand here in the order in
which train.py calls them.
"""

import math
import random
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import constants as C
from harness import dry_run, gpu, guard, repeat
from harness.clock import Clock
from harness.compile_cache import start_compiler, use_compile_cache
from harness.evaluation import Model, evaluate_bpb
from harness.files import data_dir
from harness.guard import Guard, LateGraphs
from harness.health import Watch
from harness.kernel_check import check_kernels
from harness.loader import Batch, Once, Rows, load_batches
from harness.machine import advise_late_start
from harness.output import host_line, step_line
from harness.rules import compare_with_last, open_basis
from harness.streams import keep_output
from harness.summary import summarise
from harness.warmup import check_first_loss, plan_batch, warm_up, warn_of_untrained

ROOT = Path(__file__).parent.parent
LOG_EVERY = 10  # steps between two lines in the log


@dataclass
class Step:
    """One optimizer step: what the loop needs for it, and what is known when it is done."""

    number: int
    progress: float  # fraction of the time budget gone when the device begins it, 0 to 1
    epoch: int  # 1 is the first
    micro_steps: int = 1
    batches: Iterator[Batch] = iter(())  # x, y of (B, T), one pair per micro-step
    # Set by the loop: mean over all micro-steps, nats per token; lrm is for the log alone.
    loss: torch.Tensor | float | None = None
    lrm: float = 1.0
    tokens: int = 0
    seconds: float = 0.0


class Run:
    """One experiment under the rules, on what `prepare` wrote; ValueError says what is amiss."""

    def __init__(self, folder: Path, device: torch.device, since: float | None = None):
        self.opened_at = time.perf_counter()
        self.since = self.opened_at if since is None else since  # when start-up began
        self.device = device
        self.cuda = device.type == "cuda"
        self.commit = repeat.git_commit(ROOT)
        self.guard = Guard()
        self.seed = C.SEED
        self.variables = repeat.environment_read(ROOT / "train.py")
        self.dry_run = dry_run.start(ROOT / "train.py")
        self.basis = open_basis(ROOT, folder)
        self.tokenizer = self.basis.tokenizer
        self.rules, self.data = self.basis.rules, self.basis.data
        self._train_rows = Rows(self.basis.paths["train"])
        self._val_rows = Rows(self.basis.paths["val"])
        self.epoch_tokens = len(self._train_rows) * C.MAX_SEQ_LEN
        self.clock = Clock(C.TIME_BUDGET)
        self.watch = Watch(device)
        self.paces: list[float] = []  # of the steps on a GPU, tokens per second
        self.waits: list[tuple] = []  # gpu.mark before and after each batch
        self.batch_size = self.micro_steps = 0  # set by the warm-up
        self.trained: tuple = ()  # model and optimizers, by the warm-up
        self.measured: Model | None = None  # what was evaluated
        self.tokens = self.num_steps = self.num_params = 0
        self.val_bpb = math.nan
        self.evaluated = self.printed = False
        self.dry_run_seconds = 0.0  # that the warm-up waited for it
        self.random_ids = torch.Generator(device).manual_seed(C.SEED)
        torch.manual_seed(C.SEED)
        random.seed(C.SEED)
        np.random.seed(C.SEED)
        self.import_seconds = self.opened_at - C.STARTED_AT
        self.open_seconds = time.perf_counter() - self.opened_at

    def random_batch(self, batch_size: int) -> Batch:
        """Return random ids for warm-up; torch's own generator is left alone."""
        shape = (batch_size, C.MAX_SEQ_LEN + 1)
        where = {"generator": self.random_ids, "device": self.device}
        ids = torch.randint(C.VOCAB_SIZE, shape, **where)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    # ---- Before the clock -----------------------------------------------------------------------
    def warm_up(
        self,
        model: torch.nn.Module,
        optimizers: list[torch.optim.Optimizer],
        train_step: Callable[..., torch.Tensor],
        *,
        total_batch_size: int,
        device_batch_size: int,
        row_bytes: float = 1.0,
        may_stand_still: Iterable[str] = (),
    ) -> None:
        """Compile everything, find the batch that fits, refuse an edit that does nothing.

        A few calls of train_step(model, optimizers, batches, micro_steps) on random ids, and of the
        model in evaluation mode; afterwards it and the optimizers are as before, bit for bit. What
        else train_step keeps (an average, a scheduler) is not: make it in the loop.

        total_batch_size: tokens per step; device_batch_size: rows per micro-step, at most: halved
        until they fit. row_bytes: memory that a row takes, roughly.

        ValueError: a parameter in no optimizer group or in two, an empty group, a batch that cannot
        be made. RuntimeError: a parameter without a gradient or with zeros alone, unless its name
        is in may_stand_still; a first loss below 0.95 ln V; a model that in evaluation mode is
        random or sees the future; under the smoke rules, an edit that fails at full size.
        A line `warning: edit: ...`: a first loss above 1.05 ln V, a parameter that does not move.
        """
        if self.clock.started_at is not None:
            raise RuntimeError("run.warm_up comes before run.steps")
        batch = plan_batch(total_batch_size, device_batch_size)
        with self.guard.warm_up():
            check_kernels(self.device)
            self.batch_size, self.micro_steps = warm_up(
                *(self.random_batch, model, optimizers, train_step, batch),
                *(row_bytes, self.device, may_stand_still),
            )
        self.trained = model, optimizers
        if self.dry_run is not None:  # it worked beside the warm-up
            start = time.perf_counter()
            print(dry_run.finish(self.dry_run), flush=True)
            self.dry_run_seconds = time.perf_counter() - start
        self.num_params = sum(p.numel() for p in model.parameters())
        rows = f"{self.batch_size} rows of {C.MAX_SEQ_LEN} tokens"
        print(f"batch: {self.micro_steps} micro-steps of {rows}", flush=True)

    # ---- While the clock runs -------------------------------------------------------------------
    def steps(self) -> Iterator[Step]:
        """Start the clock, which can be done once, and yield steps while it runs.

        A step holds `micro_steps` batches, to be used before the next step is asked for; the loop
        sets its loss. RuntimeError for a late start, a step without a batch, a loss that is not
        finite, a first loss below 0.95 ln V, code that is compiled over and over, or training
        and rows read before the clock.
        """
        if self.clock.started_at is not None:
            raise RuntimeError("the clock has been started; one run trains once")
        if not self.batch_size:
            raise RuntimeError("there is no batch yet; call run.warm_up before run.steps")
        if torch.initial_seed() != self.seed:
            why = "it comes from the rules (AUTORESEARCH_SEED)"
            raise RuntimeError(f"train.py set a seed; {why}")
        batches = load_batches(self._train_rows, self.batch_size, self.device)
        if self.cuda:
            gpu.settle_host()
        self.watch.look()
        waited = time.perf_counter() - self.since - self.dry_run_seconds
        if waited > C.STARTUP_LIMIT:
            early = f"{self.opened_at - self.since:.0f} s of it before open_run"
            took = f"start-up took {waited:.0f} of {C.STARTUP_LIMIT} s, {early}"
            age = time.perf_counter() - C.STARTED_AT
            raise RuntimeError(f"{took}: {advise_late_start(age)}")
        self._refuse_extra_rows()
        self.guard.clock_starts()
        self.startup_seconds = time.perf_counter() - C.STARTED_AT
        other = self.import_seconds + self.open_seconds
        self.compile_seconds = self.startup_seconds - other
        self.graphs = LateGraphs()
        self.clock.start()
        return self._steps(batches)

    def _steps(self, batches: Iterator[Batch]) -> Iterator[Step]:
        while self.clock.fits():
            progress = min(self.clock.next_start() / self.clock.budget, 1.0)
            epoch = self.tokens // self.epoch_tokens + 1
            step = Step(self.num_steps, progress, epoch, self.micro_steps)
            step.batches = Once(self._batches(step, batches))
            self.clock.begin()
            yield step
            if step.loss is None:
                raise RuntimeError(f"step {step.number} has no loss; set step.loss")
            if not step.tokens:
                raise RuntimeError(f"step {step.number} took no batch; use step.batches")
            step.loss = torch.as_tensor(step.loss).detach().to("cpu", non_blocking=True)
            event = gpu.mark(self.device) if self.cuda else None
            self.num_steps += 1
            self.clock.queue(event, step)
            self._settle(Clock.MAX_AHEAD if self.cuda else 0)
        self._settle(0)
        if self.cuda:  # what ran beside the steps counts as well
            torch.cuda.synchronize(self.device)
            self.clock.seconds = self.clock.now() - self.clock.started_at
        if self.trained:
            warn_of_untrained(*self.trained)
        if line := host_line(self.clock.starved, self.num_steps, self.paces):
            print(line, flush=True)
        late = self.clock.seconds - C.TIME_BUDGET
        if late > C.TIME_BUDGET * C.OVERRUN_TOLERANCE:
            what = f"the last step ended {late:.1f} s late"
            raise RuntimeError(f"{what}; the run is void, repeat it")
        self.clock.running = False
        self.guard.clock_ended()

    def _batches(self, step: Step, batches: Iterator[Batch]) -> Iterator[Batch]:
        for _ in range(step.micro_steps):
            if self.num_steps != step.number or not self.clock.running:
                over = f"step {step.number} is over"
                raise RuntimeError(f"{over}; its batches cannot be had now")
            step.tokens += self.batch_size * C.MAX_SEQ_LEN
            self.tokens += self.batch_size * C.MAX_SEQ_LEN
            start, batch = gpu.mark(self.device), next(batches)
            self.waits.append((start, gpu.mark(self.device)))
            yield batch

    def _settle(self, ahead: int) -> None:
        """Check and log the finished steps; wait until at most `ahead` steps are unfinished."""
        for step in self.clock.settle(ahead):
            step.loss = float(step.loss)
            if not math.isfinite(step.loss):
                where = f"at step {step.number} (lrm {step.lrm:.2f}); the run is void"
                advice = "lower a learning rate or revert"
                raise RuntimeError(f"training loss is {step.loss} {where}, {advice}")
            if self.cuda:
                self.paces.append(step.tokens / step.seconds)
            if step.number == 0:
                check_first_loss(step.loss, "of step 0")
            if step.number % LOG_EVERY == 0:
                print(step_line(step, C.TIME_BUDGET - self.clock.seconds), flush=True)
            self.graphs.check(step.number)

    # ---- After the clock ------------------------------------------------------------------------
    def evaluate(self, model: Model) -> float:
        """Measure `model`, in evaluation mode, on the validation rows; training must be over."""
        if self.clock.running or not self.num_steps or self.evaluated:
            why = "and do not break out of run.steps"
            raise RuntimeError(f"evaluate after training, once, {why}")
        self.measured = model
        self.evaluated = True  # also if the model is refused: it has seen validation text
        sizes = torch.from_numpy(self.tokenizer.token_bytes)
        sizes = sizes.to(self.device)  # waits for the GPU
        late = self.clock.now() - self.clock.started_at - self.clock.seconds
        if late > C.TIME_BUDGET * C.OVERRUN_TOLERANCE:
            what = f"{late:.1f} s were used outside the clock"
            raise RuntimeError(f"evaluation refused: {what}; the run is void")
        self._refuse_extra_rows()
        for module in (model, *self.trained[:1]):  # which a function may call
            if isinstance(module, torch.nn.Module):
                module.eval()
        self.watch.look()
        start = time.perf_counter()
        rows = torch.from_numpy(self._val_rows.read_all()).to(self.device)
        print(f"evaluation: {len(rows)} rows of {C.MAX_SEQ_LEN} tokens", flush=True)
        batch_size = self._fit_evaluation(model, sizes)
        val_bpb = evaluate_bpb(model, rows, sizes, batch_size)
        self._refuse_extra_rows(len(rows))
        self.guard.evaluated()
        self.val_bpb = val_bpb
        self.eval_seconds = time.perf_counter() - start
        return self.val_bpb

    def _fit_evaluation(self, model: Model, sizes: torch.Tensor) -> int:
        """Return the rows of an evaluation's batch: training's, which are compiled, if they fit.

        That is tried on random ids: a model that runs out of memory has not seen the text.
        """

        def try_size(size: int) -> None:
            x, y = self.random_batch(size)
            ids = torch.cat([x, y[:, -1:]], 1)  # (size, T + 1)
            evaluate_bpb(model, ids, sizes, size, checks=1)

        return gpu.find_batch_size(
            try_size,
            # Two rows show whether rows are mixed; float32 logits are there about thrice.
            limit=min(max(self.batch_size, 2), C.EVAL_BATCH_ROWS),
            row_bytes=3 * 4 * C.MAX_SEQ_LEN * C.VOCAB_SIZE,
            device=self.device,
        )

    def _refuse_extra_rows(self, evaluated: int = 0) -> None:
        """Refuse rows read beside those of the steps, a batch ahead, and of the evaluation."""
        steps = self.tokens // C.MAX_SEQ_LEN + self.batch_size
        extra = self._train_rows.reads + self._val_rows.reads - steps - evaluated
        if extra > 0:
            raise RuntimeError(f"{extra} rows were read off the clock; the run is void")

    def print_summary(self, depth: int, flops_per_token: float, attention: str) -> None:
        """Print the result, once and last of all; RuntimeError if there is none."""
        if not math.isfinite(self.val_bpb) or self.printed:
            raise RuntimeError("there is no result to print; evaluate first, print once")
        self.depth, self.attention = depth, attention
        print(summarise(self, ROOT, flops_per_token), flush=True)
        self.printed = True


def open_run() -> Run | dry_run.DryRun:
    """Return the run on prepared data, preparing it first (and saying so) if there is none.

    Ends the process with a sentence if there is no GPU or the data is not as it was prepared.
    """
    keep_output()
    if C.DRY_RUN:
        return dry_run.DryRun()
    since, opened = C.STARTED_AT, threading.Event()
    try:
        device = gpu.choose_device()
        use_compile_cache(ROOT / "train.py", data_dir().parent / "compiled")
        if device.type == "cuda":  # seconds, in which this thread opens data and GPU
            threading.Thread(target=start_compiler, args=[opened], daemon=True).start()
        if not (data_dir() / "manifest.json").exists():
            import prepare  # here: train.py is rarely the first to need it

            print(f"nothing is prepared in {data_dir()}: preparing first", flush=True)
            prepare.main([])
            since = time.perf_counter()
        run = Run(data_dir(), device, since)
        if changed := compare_with_last(data_dir(), run.basis.parts):
            print(changed, flush=True)
    except (OSError, ValueError) as error:
        sys.exit(f"train.py: {error}")
    guard.demand_result(run)
    opened.set()
    guard.refuse_to_open(data_dir(), ROOT)
    run.guard.start()
    return run
