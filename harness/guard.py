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
        yield
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
        for name, function in PASSES.items():
            watched = function if act is None else _told_first(function, act)
            setattr(torch.autograd, name, watched)
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


def _told_first(function: Callable, act: Callable[[str], None]) -> Callable:
    @functools.wraps(function)
    def told(*args, **kwargs):
        # torch.compile traces a backward pass where it compiles one: that trains nothing.
        if torch._guards.TracingContext.try_get() is None:
            act("a backward pass")
        return function(*args, **kwargs)

    return told


# ---- Files --------------------------------------------------------------------------------------
def refuse_to_open(folder: Path, root: Path) -> None:
    """From here on, refuse by RuntimeError to open files that hold rows, text or weights.

    In `folder`, that of the prepared data: all. Below it, its parent and the checkout
    `root`: by their ending, unless they are written anew. What the harness reads itself
    is open by now. For the whole process, for good: Python has no way back.
    """
    prepared = _inside(folder)
    watched = (_inside(folder.parent), _inside(root))
    installed = (_inside(Path(sys.prefix)), _inside(Path(sys.base_prefix)))

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
def end_process(status: int) -> None:
    """End the process at once, whatever threads and compile workers it has."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def at_exit(end: Callable[[], None]) -> None:
    """Have `end` called when this process, not a child of it, leaves its main thread.

    Before Python waits for other threads, which may never end; atexit comes after that.
    """
    mine = os.getpid()
    threading._register_atexit(lambda: end() if os.getpid() == mine else None)
