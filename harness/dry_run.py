"""The full rules beside a smoke run: train.py once more, with shapes and no memory.

A smoke run has a tiny model, so a knob or a shape that cannot work at full size would show only
after the agent has waited for a GPU. A second process runs train.py under the full rules up to its
warm-up, on fake tensors: no data, no memory, no GPU.
"""

import functools
import gc
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

import constants as C
from harness.evaluation import call_model
from harness.loader import Once
from harness.machine import end_with
from harness.output import plural
from harness.warmup import check_groups, check_loss, plan_batch

SECONDS = 120  # for imports on a busy machine; the work itself takes two or three


class NotHere(Exception):
    """What a real run has, and shapes alone have not."""


def beyond_shapes() -> tuple[type[Exception], ...]:
    """Return what is raised where a real run may go on: a value is read, or shapes something."""
    from torch._subclasses import fake_tensor

    return (
        NotHere,
        fake_tensor.DataDependentOutputException,
        fake_tensor.DynamicOutputShapeException,
        fake_tensor.UnsupportedOperatorException,
        fake_tensor.UnsupportedFakeTensorException,
    )


class DryRun:
    """Stands in for `run.Run` up to the warm-up, which ends the process with status 0."""

    device, cuda, seed = torch.device("cpu"), False, C.SEED

    def __init__(self):
        from torch._subclasses import fake_tensor  # here: no other run needs it

        end_with(os.getppid())  # also if its warm-up fails, and nobody waits for this
        gc.disable()  # a tenth of the time of a process this short

        fake_tensor.FakeTensorMode().__enter__()  # from here on every tensor is a shape
        # Of shapes alone, torch 2.11 can neither copy what was made by torch.tensor of a number
        # nor change a module's dtype or device (findings/fake_tensor_made_of_a_number.sh).
        fake_tensor.FakeTensor.__deepcopy__ = copy_shape
        torch.utils.swap_tensors = take_data
        # Nor can it print one, or say that there are no numbers, in words of its own.
        fake_tensor.FakeTensor.__format__ = lambda t, how: str(t)
        fake_tensor.FakeTensor.numpy = give_no_numbers
        sys.excepthook = self.explain

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotHere(f"run.{name} is not there without data")

    def explain(self, kind: type, error: BaseException, trace) -> None:
        """End the process: with status 0 if shapes were not enough, also before the warm-up."""
        if not isinstance(error, beyond_shapes()):
            sys.__excepthook__(kind, error, trace)
            return
        what = str(error).splitlines()[0]
        print(f"full rules: not checked, shapes alone do not tell ({what})", flush=True)
        os._exit(0)

    def warm_up(
        self, model, optimizers, train_step, *, total_batch_size, device_batch_size, **_
    ):
        check_groups(model, optimizers)
        rows, micro_steps = plan_batch(total_batch_size, device_batch_size)
        for optimizer in optimizers:
            optimizer.step = lambda *args, **kwargs: None
        untried = ""
        idx = torch.zeros(rows, C.MAX_SEQ_LEN, dtype=torch.long)
        try:
            check_loss(train_step(model, optimizers, Once([(idx, idx)]), 1))
            model.eval()
            with torch.no_grad():
                call_model(model, idx)
        except beyond_shapes() as error:
            untried = (
                f"; the full model's step was not tried: {str(error).splitlines()[0]}"
            )
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        batch = (
            f"{plural(micro_steps, 'micro-step')} of up to {plural(rows, 'row')} per step"
        )
        size = f"{millions:.1f} M parameters, {batch}"
        print(f"also checked under the full rules: {size}{untried}", flush=True)
        os._exit(0)  # torch would take half a second to end


def trace(function: Callable, args: tuple) -> object:
    """Return function(*args), on shapes; RuntimeError if a GPU could not compile it whole."""
    import torch._dynamo as dynamo

    from harness.ops import MOST_GRAPHS  # here: it needs this file

    try:  # as it is, first: what fails so has its own words, and no compiler's
        result, error = function(*args), None
    except beyond_shapes() as raised:
        error = raised
    # TORCH_COMPILE_DISABLE is for what train.py compiles by itself, with code for real memory.
    with dynamo.config.patch(disable=False, recompile_limit=MOST_GRAPHS):
        try:
            traced(function)(*args)
        except (dynamo.exc.Unsupported, dynamo.exc.UserError) as refusal:
            what = str(refusal).strip().splitlines()[0]
            name = f"@compiled {function.__name__}"
            raise RuntimeError(f"{name} cannot be compiled on a GPU: {what}") from refusal
    if error is not None:
        raise error
    return result


@functools.cache
def traced(function: Callable) -> Callable:
    return torch.compile(function, backend="eager", dynamic=False, fullgraph=True)


def copy_shape(t: torch.Tensor, memo: dict) -> torch.Tensor:
    """Stand in for the `__deepcopy__` of a tensor."""
    copied = t.detach().clone()
    if isinstance(t, torch.nn.Parameter):
        return torch.nn.Parameter(copied, t.requires_grad)
    return copied


def give_no_numbers(t: torch.Tensor, *args, **kwargs) -> NoReturn:
    """Stand in for torch.Tensor.numpy."""
    raise NotHere("numpy wants the numbers of a tensor")


def take_data(t: torch.Tensor, new: torch.Tensor) -> None:
    """Stand in for torch.utils.swap_tensors, by which a module changes its tensors."""
    t.data = new.data


def start(script: Path) -> subprocess.Popen | None:
    """Start `script` under the full rules, if it is what this process runs."""
    main = getattr(sys.modules["__main__"], "__file__", None)
    if not C.SMOKE or main is None or Path(main).resolve() != script.resolve():
        return None
    env = os.environ | {"AUTORESEARCH_SMOKE": "0", "AUTORESEARCH_DRY_RUN": "1"}
    env["TORCH_COMPILE_DISABLE"] = "1"  # code for real memory would end the process
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, str(script)], env=env, **pipes)


def finish(process: subprocess.Popen) -> str:
    """Return the last line of the dry run; RuntimeError with it if it failed."""
    try:
        log = process.communicate(timeout=SECONDS)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return f"full rules: not checked, the dry run took over {SECONDS} s"
    if process.returncode < 0:
        return f"full rules: not checked, signal {-process.returncode} ended the dry run"
    last = (log.strip().splitlines() or ["the dry run said nothing"])[-1]
    if process.returncode:
        lines = re.findall(r'^  File ".*train\.py", line (\d+)', log, re.MULTILINE)
        where = f" (train.py, line {lines[-1]})" if lines else ""
        raise RuntimeError(f"under the full rules: {last}{where}")
    return last
