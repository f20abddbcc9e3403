"""Which GPU there is and what fits its memory. Not edited.

The only place that asks for the device: everything else is told. A part of the rules.
"""

import gc
import math
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

import constants as C
from harness.files import smoke_command
from harness.machine import available_memory, is_wsl
from harness.output import plural


def compute_capability() -> tuple[int, int]:
    """Return the GPU's compute capability, (0, 0) without a CUDA GPU."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)


def why_no_gpu() -> str:
    """Return in brackets why torch finds no GPU: no driver, an old one, a build without CUDA."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        said = str(error).partition(" Please")[0]  # general advice follows
        said = said.partition("an error? ")[2] or said  # and precedes
        return f" (torch {torch.__version__}: {said.rstrip('.')})"
    return ""


def choose_device(training: bool = True) -> torch.device:
    """Return the device of a run: the GPU, or under the smoke rules the CPU.

    ValueError if there is no GPU that can train; without `training` the CPU will do.
    """
    if C.SMOKE:  # leaves a GPU to whoever is using it
        return torch.device("cpu")
    capability = compute_capability()
    if capability >= (8, 0):
        # From torch 2.11, two lines in every run: its backward thread had no context yet.
        warnings.filterwarnings("ignore", "Attempting to run cuBLAS, but there was no")
        return torch.device("cuda")
    if not training:
        return torch.device("cpu")
    if capability > (0, 0):
        major, minor = capability
        found = f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}"
        problem = f"{found}, and training in bf16 needs 8.0 (Ampere) or higher"
    else:
        problem = f"no CUDA GPU is available{why_no_gpu()}, and a full run needs one"
    command = smoke_command("uv run train.py")
    advice = f"`{command}` tries the same code on a CPU in about a minute"
    raise ValueError(f"{problem}; {advice}")


def has_own_memory(device: torch.device) -> bool:
    """Return whether what the driver says of `device`'s memory is of this system's GPU work.

    It is not where CPU and GPU have one memory, in which files and programs are counted, nor
    under WSL2, where Windows and its driver hold up to 16 GB that belong to no process here.
    """
    return not (is_wsl() or torch.cuda.get_device_properties(device).is_integrated)


def free_memory(device: torch.device) -> float:
    """Return the bytes that tensors can still take on `device`; infinity on a CPU."""
    if device.type != "cuda":
        return math.inf
    free, total = torch.cuda.mem_get_info(device)
    if torch.cuda.get_device_properties(device).is_integrated:
        free = max(free, available_memory())  # the driver counts cached files as used
    fraction = torch.cuda.get_per_process_memory_fraction()
    held = torch.cuda.memory_reserved(device)  # by torch, in use or not
    return min(free + held, fraction * total) - torch.cuda.memory_allocated(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` is for want of memory, torch's own or a library's."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    said = any(words in str(error) for words in ("out of memory", "ALLOC_FAILED"))
    return isinstance(error, RuntimeError) and said


def has_room(attempt: Callable[..., object], *args) -> bool:
    """Call attempt(*args); return False, its memory given back, if it ran out of memory."""
    try:
        attempt(*args)
        return True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    gc.collect()  # here, where the failed attempt's tensors are let go
    torch.cuda.empty_cache()
    return False


def find_batch_size(
    attempt: Callable[[int], object],
    limit: int,
    row_bytes: float,
    device: torch.device,
    fixed_bytes: float = 0,
) -> int:
    """Return `limit`, or a half, a quarter, ... of it, for which attempt(rows) has room.

    row_bytes, fixed_bytes: roughly what each row takes, and what is taken for any number
    of rows. A size that cannot fit is not attempted, for it would have to be compiled. An
    odd number of rows is not halved. RuntimeError, such as torch.OutOfMemoryError, if the
    smallest does not fit.
    """
    room = (free_memory(device) - fixed_bytes) / row_bytes
    rows = limit
    while rows > room and rows % 2 == 0:
        rows //= 2
    while rows % 2 == 0:
        if has_room(attempt, rows):
            return rows
        print(f"batch: {rows} rows do not fit in memory, trying {rows // 2}", flush=True)
        rows //= 2
    attempt(rows)
    return rows


def explain_memory(run, error: BaseException) -> str:
    """Return one line on where a `run.Run` ran out of GPU memory, and what to lower."""
    where = f"at step {run.num_steps} with {plural(run.batch_size, 'row')} per micro-step"
    advice = "lower DEPTH or N_EMBD, or end what else uses the GPU"
    if run.evaluated:
        where = "in the evaluation"
    elif not run.batch_size:
        where = "before training"
    elif run.batch_size > 1:
        advice = f"set DEVICE_BATCH_SIZE below {run.batch_size}, or {advice}"
    stack = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in stack if Path(frame.filename).name == "train.py"]
    if lines:
        where += f" (line {lines[-1]})"
    # How much of how much; the sentences behind it are advice on torch.
    said = ". ".join(str(error).split(". ")[1:3])
    return f"train.py: out of GPU memory {where}; {advice} ({said or error})"


def mark(device: torch.device) -> torch.cuda.Event | float:
    """Return this place in the work queued on `device`; on a CPU, the time in seconds."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(
    start: torch.cuda.Event | float, end: torch.cuda.Event | float
) -> float:
    """Return the seconds from one mark to another, which the device must have passed."""
    if isinstance(end, float):
        return end - start
    return start.elapsed_time(end) / 1e3  # of milliseconds


def settle_host() -> None:
    """Turn the garbage collector off: in training it stalls a step for half a second."""
    gc.collect()
    gc.freeze()
    gc.disable()
