"""Which GPU there is, what it can do, what fits its memory, and how well it is. Not edited.

The only place that asks for the device: prepare.py and train.py are told. A part of the rules.
"""

import gc
import math
import os
import re
import subprocess
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import constants as C


# ---- Device and memory --------------------------------------------------------------------------
def compute_capability() -> tuple[int, int]:
    """Return the GPU's compute capability, (0, 0) without a CUDA GPU."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)


def choose_device(training: bool = True) -> torch.device:
    """Return the device of a run, the GPU, or under the smoke rules the CPU.

    ValueError if there is no GPU that can train; where no training is wanted the CPU will do.
    """
    if C.SMOKE:  # leaves a GPU to whoever is using it
        return torch.device("cpu")
    if (capability := compute_capability()) >= (8, 0):
        return torch.device("cuda")
    if not training:
        return torch.device("cpu")
    problem = "no CUDA GPU is available, and a full run needs one"
    if capability > (0, 0):
        problem = f"{torch.cuda.get_device_name()} has compute capability {capability[0]}."
        problem += f"{capability[1]}, and training in bf16 needs 8.0 (Ampere) or higher"
    smoke = "AUTORESEARCH_SMOKE=1 uv run train.py tries the same code on a CPU in about a minute"
    raise ValueError(f"{problem}; {smoke}")


def free_memory(device: torch.device) -> float:
    """Return the bytes that tensors can still take on `device`; infinity on a CPU."""
    if device.type != "cuda":
        return math.inf
    free, total = torch.cuda.mem_get_info(device)
    share = torch.cuda.get_per_process_memory_fraction()
    held = torch.cuda.memory_reserved(device)  # by torch, in use or not
    return min(free + held, share * total) - torch.cuda.memory_allocated(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` is for want of memory, also where a library says so in its words."""
    said = any(words in str(error) for words in ("out of memory", "ALLOC_FAILED"))
    return isinstance(error, torch.OutOfMemoryError) or isinstance(error, RuntimeError) and said


def largest_power_of_two(n: int) -> int:
    """Return the largest power of two that is not above n, at least 1."""
    return 1 << (max(1, n).bit_length() - 1)


def batch_limit(device_batch_size: int, total_batch_size: int) -> int:
    """Return the most rows of a micro-step that rows and tokens allow, a power of two.

    ValueError if they allow none.
    """
    if device_batch_size < 1 or total_batch_size < 1:
        raise ValueError(
            f"DEVICE_BATCH_SIZE ({device_batch_size} rows) and TOTAL_BATCH_SIZE "
            f"({total_batch_size} tokens) must be at least 1; change them in train.py"
        )
    return largest_power_of_two(min(device_batch_size, total_batch_size // C.MAX_SEQ_LEN))


def grad_accumulation(total_batch_size: int, limit: int, batch_size: int) -> int:
    """Return the micro-steps of `batch_size` rows in a step; print it if the total is rounded.

    To whole batches of `limit` rows, so that a step is the same whatever fits the memory.
    """
    whole = limit * C.MAX_SEQ_LEN
    total = max(1, total_batch_size // whole) * whole
    if total != total_batch_size:
        print(f"batch: TOTAL_BATCH_SIZE ({total_batch_size} tokens) is rounded to {total}")
    return total // (batch_size * C.MAX_SEQ_LEN)


def find_batch_size(
    attempt: Callable[[int], object],
    limit: int,
    row_bytes: float,
    device: torch.device,
    fixed_bytes: float = 0,
) -> int:
    """Return the largest power of two, up to `limit`, of rows for which attempt(rows) has memory.

    row_bytes, fixed_bytes: what a row takes, and what is taken for any number of rows, roughly: a
    size that cannot fit is not attempted, which would have to compile it. RuntimeError, of which
    torch.OutOfMemoryError is one, if a single row does not fit.
    """
    size = largest_power_of_two(int(min(limit, (free_memory(device) - fixed_bytes) / row_bytes)))
    while True:
        try:
            attempt(size)
            return size
        except RuntimeError as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        gc.collect()  # here, where the failed attempt's tensors are let go
        torch.cuda.empty_cache()
        print(f"batch: {size} rows do not fit in memory, trying {size // 2}", flush=True)
        size //= 2


def explain_memory(run, error: BaseException) -> str:
    """Return one line on where a `prepare.Run` ran out of GPU memory, and what to lower."""
    where, lower = f"at step {run.num_steps} with {run.batch_size} rows a micro-step", ""
    if run.evaluated:
        where = "in the evaluation"
    elif not run.batch_size:
        where = "before training"
    elif run.batch_size > 1:
        lower = f"set DEVICE_BATCH_SIZE below {run.batch_size}, or "
    stack = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in stack if Path(frame.filename).name == "train.py"]
    line = f" (line {lines[-1]})" if lines else ""
    said = ". ".join(str(error).split(". ")[1:3])  # how much of how much; advice on torch follows
    return (
        f"train.py: out of GPU memory {where}{line}; {lower}lower DEPTH or N_EMBD, or end what "
        f"else uses the GPU ({said or error})"
    )


# ---- Peaks --------------------------------------------------------------------------------------
# Dense bf16 tensor-core peaks with float32 accumulation, TFLOP/s, by card; see peak_flops.
# Where a data sheet says "with sparsity", half of it. Cards not found there are left out.
PEAK_TFLOPS = {
    # Data sheets; for A40 and RTX A6000 the white paper on GA102, v2, for RTX PRO that on RTX
    # Blackwell PRO, v1.1
    "A100": 312.0,
    "H100 PCIe": 756.0,  # before the bare name, which stands for the SXM module
    "H100 NVL": 835.0,
    "H100": 989.5,
    "H200 NVL": 835.0,
    "H200": 989.5,
    "GH200": 989.5,
    "B200": 2250.0,
    "B300 SXM6 AC": 2250.0,
    "GB200": 2500.0,
    "GB300": 2500.0,
    "A10": 125.0,
    "A10G": 70.0,
    "A30": 165.0,
    "A40": 149.7,
    "A800": 312.0,
    "H20": 148.0,
    "L4": 121.0,
    "L20": 119.5,
    "L40": 181.05,
    "L40S": 362.05,  # as printed; half of the 733 with sparsity is 366.5
    "RTX A4000": 76.7,
    "RTX A5000": 111.1,
    "RTX A6000": 154.8,
    "RTX 5000 Ada": 261.1,
    "RTX 6000 Ada": 364.25,
    "RTX PRO 6000 Blackwell Workstation Edition": 503.8,
    "RTX PRO 6000 Blackwell Max-Q Workstation Edition": 438.9,
    # GeForce: 4 * CUDA cores * boost clock, half of what a professional card of the chip does, as
    # in the appendices of the white papers on GA102 (RTX 3080 59.5, 3090 71), AD102 (RTX 4090
    # 165.2) and RTX Blackwell (RTX 5090 209.5); cores and clocks from NVIDIA's pages of the cards.
    "RTX 3060": 25.5,
    "RTX 3060 Ti": 32.4,
    "RTX 3070": 40.6,
    "RTX 3070 Ti": 43.5,
    "RTX 3080": 59.5,  # of 10 GB; that of 12 GB has the same name and 61.3
    "RTX 3080 Ti": 68.2,
    "RTX 3090": 71.2,
    "RTX 3090 Ti": 80.0,
    "RTX 4060": 30.2,
    "RTX 4060 Ti": 44.1,
    "RTX 4070": 58.3,
    "RTX 4070 SUPER": 71.0,
    "RTX 4070 Ti": 80.2,
    "RTX 4070 Ti SUPER": 88.2,
    "RTX 4080": 97.5,
    "RTX 4080 SUPER": 104.4,
    "RTX 4090": 165.2,
    "RTX 4090 D": 147.1,
    "RTX 5050": 26.3,
    "RTX 5060": 38.4,
    "RTX 5060 Ti": 47.4,
    "RTX 5070": 61.7,
    "RTX 5070 Ti": 87.9,
    "RTX 5080": 112.6,
    "RTX 5090": 209.5,
    "RTX 5090 D": 209.5,
}


def peak_flops(gpu_name: str) -> float:
    """Return the dense bf16 peak of the GPU that torch calls `gpu_name`, FLOP/s; nan if unknown.

    Behind the card's name only memory and form may follow: a laptop's chip, a slice of a card
    (MIG, vGPU) or a variant that is not in the table is not the card.
    """
    form = r"([ -](SXM\d|PCIe|PCIE|\d+GB?|HBM3\w*|Generation))*"
    for card, tflops in PEAK_TFLOPS.items():
        if re.fullmatch(f"NVIDIA (GeForce )?{card}{form}", gpu_name):
            return tflops * 1e12
    return math.nan


# ---- Time ---------------------------------------------------------------------------------------
def mark(device: torch.device) -> torch.cuda.Event | float:
    """Return this place in the work queued on `device`; on a CPU, which queues none, the time."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    """Return the seconds from one mark to another, which the device must have passed."""
    return end - start if isinstance(end, float) else start.elapsed_time(end) / 1e3


# ---- Health -------------------------------------------------------------------------------------
# Shares by which speed before and after may differ without a warning. A GPU that comes from
# compiling is cool and clocks higher: over 300 s healthy H100s lost 8.5 and 10.1 % on products
# and 0.1 % on copies (LOG.md), which do not depend on the clock of the cores.
PRODUCT_TOLERANCE, COPY_TOLERANCE = 0.15, 0.03
CONTEXT_BYTES = 2 << 30  # of GPU memory that is not torch's and still no other process: contexts


@dataclass(frozen=True)
class Health:
    """What the GPU did at one moment; nan where there was no memory to measure it."""

    tflops: float  # of a bf16 matrix product, 10^12 a second
    gb_per_sec: float  # of a copy on the device, read and written
    company: str  # alone, shared (another process holds the GPU) or unknown


def measure_rate(work: Callable[[], object], amount: float, seconds: float = 0.15) -> float:
    """Return `amount` of one work() over its time on the GPU, in a mean of about `seconds`."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed(count: int) -> float:
        start.record()
        for _ in range(count):
            work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count

    timed(2)  # sets libraries up
    return amount / timed(max(3, int(seconds / timed(2))))


def measure_health(device: torch.device) -> Health:
    """Measure the GPU in about half a second, from memory that is free again afterwards.

    The ids of the matrices come from a generator of their own: torch's is left alone, and numbers
    that are all zero would cost less power than those of a model.
    """
    n, generator = 8192, torch.Generator(device).manual_seed(0)  # three matrices of 128 MiB
    try:
        a, b = (
            torch.randn(n, n, dtype=torch.bfloat16, device=device, generator=generator)
            for _ in range(2)
        )
        c = torch.empty_like(a)
        tflops = measure_rate(lambda: torch.mm(a, b, out=c), 2 * n**3 / 1e12)
        gb_per_sec = measure_rate(lambda: c.copy_(a), 2 * a.nbytes / 1e9)
    except torch.OutOfMemoryError:
        tflops = gb_per_sec = math.nan
    free, total = torch.cuda.mem_get_info(device)
    foreign = total - free - torch.cuda.memory_reserved(device)
    return Health(tflops, gb_per_sec, judge_company(list_gpu_processes(device), foreign))


def list_gpu_processes(device: torch.device) -> list[int]:
    """Return the process ids that nvidia-smi shows to compute on `device`; none if it fails."""
    uuid = torch.cuda.get_device_properties(device).uuid
    command = ["nvidia-smi", f"--id=GPU-{uuid}", "--query-compute-apps=pid"]
    try:
        done = subprocess.run(
            [*command, "--format=csv,noheader"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [int(line) for line in done.stdout.split() if line.isdigit()]


def judge_company(pids: list[int], foreign: int) -> str:
    """Return whether others hold the GPU, by the processes on it and the bytes not held by torch.

    In a container the ids may be of another name space. If this process is not among them, only
    memory can tell, beyond what contexts and a desktop take.
    """
    if os.getpid() in pids:
        return "shared" if len({*pids}) > 1 else "alone"
    if foreign > CONTEXT_BYTES:
        return "shared"
    return "alone" if pids else "unknown"


def judge_health(before: Health, after: Health) -> tuple[str, list[str]]:
    """Return the summary's words on the GPU before and after training, and warnings."""
    both = {before.company, after.company}
    company = next(word for word in ("shared", "unknown", "alone") if word in both)
    rates = [
        ("matrix product", "TFLOP/s", before.tflops, after.tflops, PRODUCT_TOLERANCE),
        ("copy", "GB/s", before.gb_per_sec, after.gb_per_sec, COPY_TOLERANCE),
    ]
    text = ", ".join(f"{first:.0f}/{last:.0f} {unit}" for _, unit, first, last, _ in rates)
    warnings = [
        f"warning: the GPU's {what} went from {first:.0f} to {last:.0f} {unit} over the run "
        f"({100 * (last / first - 1):+.1f} %): throttled or shared, so do not trust the result; "
        "see nvidia-smi -q -d PERFORMANCE and run again"
        for what, unit, first, last, tolerance in rates
        if abs(last / first - 1) > tolerance
    ]
    if company == "shared":
        what = "another process holds the GPU, so both were slower than they can be"
        warnings.append(f"warning: {what}; see nvidia-smi, end it and run again")
    return f"{text}, {company}", warnings


class Watch:
    """Looks at the GPU between the parts of a run: its health then, its memory's peak in them."""

    def __init__(self, device: torch.device):
        self.device, self.health, self.peak = device, [], 0

    def look(self) -> None:
        """Measure a GPU while it is warm and has nothing else to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            if self.health:  # what came before the first look is not counted
                self.peak = max(self.peak, torch.cuda.max_memory_allocated(self.device))
            self.health.append(measure_health(self.device))
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int:
        """Return the most that tensors held at once since the first look, measuring left out."""
        if self.device.type != "cuda":
            return 0
        return max(self.peak, torch.cuda.max_memory_allocated(self.device))

    def report(self) -> tuple[str, list[str]]:
        """Return the summary's words and warnings of the first look and the last."""
        if self.device.type != "cuda":
            return "none (cpu)", []
        return judge_health(self.health[0], self.health[-1])
