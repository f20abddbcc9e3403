"""What a run refuses outside its clock: training, and files that only the harness reads.

All of it catches accidents, not malice; docs/reliability.md says what it cannot see.
"""

import concurrent.futures.process  # noqa: F401  (their exit hooks come before ours)
import concurrent.futures.thread  # noqa: F401
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from harness import gpu
from harness.output import plural, warning

# Backward passes before the clock beside the warm-up's: enough to look at a gradient or to
# scale an initialisation, too few to train.
MAX_EARLY_PASSES = 64
PASSES = {name: getattr(torch.autograd, name) for name in ("backward", "grad")}
# Files that hold weights, rows or text.
KEPT_IN = (".npz", ".npy", ".pt", ".pth", ".safetensors", ".u16", ".parquet")
WRITES = os.O_WRONLY | os.O_TRUNC | os.O_EXCL  # nothing of before is read


class Guard:
    """Watches for training outside the clock; does nothing before `start`.

    It sees torch.autograd.backward and .grad, by which Tensor.backward and torch.func
    work too, and the step of every torch.optim.Optimizer. Not gradients by hand, nor a
    function that was imported by its name before.
    """

    def __init__(self):
        self.started = False
        self.passes = 0  # before the clock
        self.hook = None

    def start(self) -> None:
        """Begin to count backward passes."""
        self.started = True
        self._watch(self._count)

    @contextmanager
    def warm_up(self) -> Iterator[None]:
        """Do not count in this block, nor be in the way of what it compiles."""
        self._watch(None)
        try:
            yield
        finally:
            self._watch(self._count)

    def clock_starts(self) -> None:
        """Leave training alone; RuntimeError if there was too much of it before."""
        if self.passes > MAX_EARLY_PASSES:
            passes = f"{self.passes} backward passes before the clock starts"
            advice = "training belongs into run.steps()"
            raise RuntimeError(f"{passes}, {MAX_EARLY_PASSES} at most; {advice}")
        self._watch(None)

    def clock_ended(self) -> None:
        """Refuse every backward pass and optimizer step, by RuntimeError, from here on."""
        self._watch(self._refuse)

    def evaluated(self) -> None:
        """Leave training alone: there is a result, and it stays."""
        self._watch(None)

    def _watch(self, act: Callable[[str], None] | None) -> None:
        """Have `act` told of every backward pass and optimizer step, or nobody."""
        if not self.started:
            return
        _tell(act)
        if self.hook is not None:
            self.hook.remove()
            self.hook = None
        if act is not None:
            self.hook = register_optimizer_step_pre_hook(
                lambda *_: act("an optimizer step")
            )

    def _count(self, what: str) -> None:
        self.passes += what == "a backward pass"

    def _refuse(self, what: str) -> None:
        problem = f"{what} after training has ended"
        raise RuntimeError(f"evaluation refused: {problem}; the run is void")


def _tell(act: Callable[[str], None] | None) -> None:
    """Have `act` told of every backward pass, or nobody."""
    for name, function in PASSES.items():
        watched = function if act is None else _told_first(function, act)
        setattr(torch.autograd, name, watched)


def _told_first(function: Callable, act: Callable[[str], None]) -> Callable:
    @functools.wraps(function)
    def told(*args, **kwargs):
        # torch.compile traces a backward pass where it compiles one: that trains nothing.
        if torch._guards.TracingContext.try_get() is None:
            act("a backward pass")
        return function(*args, **kwargs)

    return told


@contextmanager
def no_passes(problem: str) -> Iterator[None]:
    """Refuse every backward pass in this block, by RuntimeError with this problem.

    Where nobody is told of them otherwise, as within `Guard.warm_up`.
    """

    def refuse(what: str) -> None:
        raise RuntimeError(problem)

    _tell(refuse)
    try:
        yield
    finally:
        _tell(None)


# ---- Compilation ---------------------------------------------------------------------------------
# Graphs that may be compiled while the clock runs: a few come from new shapes, many mean that a
# Python number changes every step.
MAX_LATE_GRAPHS = 16


class LateGraphs:
    """Watches what torch.compile makes from now on, which costs training time."""

    def __init__(self):
        self.before, self.late = count_graphs(), 0

    def check(self, step: int) -> None:
        """Print a warning at the first graph; RuntimeError from MAX_LATE_GRAPHS + 1 on."""
        late = count_graphs() - self.before
        were = "was" if late == 1 else "were"
        graphs = plural(late, "graph")
        text = f"step {step}: {graphs} {were} compiled while the clock runs"
        if late > MAX_LATE_GRAPHS:
            advice = "a Python number that changes? pass it as a 0-dim tensor"
            raise RuntimeError(f"{text}: {advice}; the run is void")
        if late and not self.late:
            print(warning("edit", f"{text}, which costs training time"), flush=True)
        self.late = late


def count_graphs() -> int:
    """Return how many graphs torch.compile has made in this process."""
    utils = sys.modules.get("torch._dynamo.utils")  # there once something is compiled
    return utils.counters["stats"]["unique_graphs"] if utils else 0


# ---- Files --------------------------------------------------------------------------------------
def refuse_to_open(folder: Path, root: Path) -> None:
    """From here on, refuse by RuntimeError to open files that hold rows, text or weights.

    In `folder`, that of the prepared data: all. Below it, its parent and the checkout
    `root`: by their ending, unless they are written from scratch. What the harness reads itself
    is open by now. For the whole process, for good: Python has no way back.
    """
    prepared = _inside(folder)
    watched = (_inside(folder.parent), _inside(root))
    installed = {_inside(Path(prefix)) for prefix in (sys.prefix, sys.base_prefix)}
    # Not where the checkout itself lies in one, such as /usr/src.
    installed = tuple(x for x in installed if not watched[1].startswith(x))

    def look(event: str, args: tuple) -> None:
        if event != "open" or not isinstance(args[0], str | bytes | os.PathLike):
            return
        path = os.path.realpath(os.fsdecode(args[0]))
        if not path.startswith(prepared):
            kept = path.endswith(KEPT_IN) and path.startswith(watched)
            if not kept or path.startswith(installed) or args[2] & WRITES:
                return
        raise RuntimeError(
            f"{path} is the harness's to read; train.py has its batches from run.steps(), its "
            "weights from the seed, and keeps in memory what it needs again"
        )

    sys.addaudithook(look)


def _inside(folder: Path) -> str:
    return os.path.join(os.path.realpath(folder), "")


# ---- The end ------------------------------------------------------------------------------------
SPARSE = (
    "a table that is made with sparse=True has a sparse gradient, which clipping, norms and most "
    "optimizers cannot take: leave the table out of it, or make it with sparse=False (more memory)"
)


def demand_result(run) -> None:
    """From here on, end the process with status 0 only if `run` has printed its result.

    At once in either case: torch waits up to 300 s for compile workers that it has only just
    started, and Python for threads that may never end.
    """
    mine = os.getpid()

    def end(status: int = 0) -> None:
        if os.getpid() != mine:  # a child of this process
            return
        if not run.printed:
            print("train.py: the run ended without a result", flush=True)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(status if run.printed else 1)

    def explain(kind: type, error: BaseException, trace) -> None:
        if gpu.is_out_of_memory(error):
            print(gpu.explain_memory(run, error), file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)
            if isinstance(error, RuntimeError) and "sparse" in str(error).lower():
                print(f"train.py: {SPARSE}", file=sys.stderr)  # torch says it in 40 lines
        end(status=1)

    threading._register_atexit(
        end
    )  # before Python waits for threads; atexit comes after that
    sys.excepthook = explain
