"""How well the GPU is: its speed before and after training, and whether it is alone."""

import math
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Shares by which speed before and after may differ without a warning. A GPU that comes from
# compiling is cool and clocks higher: over 300 s healthy H100s lost 8.5 and 10.1 % on products
# and 0.1 % on copies (docs/LOG.md), which do not depend on the clock of the cores.
PRODUCT_TOLERANCE, COPY_TOLERANCE = 0.15, 0.03
# Of GPU memory that is not torch's and still no other process: contexts.
CONTEXT_BYTES = 2 << 30


@dataclass(frozen=True)
class Health:
    """What the GPU did at one moment; nan where there was no memory to measure it."""

    tflops: float  # of a bf16 matrix product, 10^12 a second
    gb_per_sec: float  # of a copy on the device, read and written
    company: str  # alone, shared (another process holds the GPU) or unknown


def measure_rate(
    work: Callable[[], object], amount: float, seconds: float = 0.15
) -> float:
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
    n, generator = (
        8192,
        torch.Generator(device).manual_seed(0),
    )  # three matrices of 128 MiB
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
    text = ", ".join(
        f"{first:.0f}/{last:.0f} {unit}" for _, unit, first, last, _ in rates
    )
    warnings = [
        f"the GPU's {what} went from {first:.0f} to {last:.0f} {unit} over the run "
        f"({100 * (last / first - 1):+.1f} %): throttled or shared, so do not trust the result; "
        "see nvidia-smi -q -d PERFORMANCE and run again"
        for what, unit, first, last, tolerance in rates
        if abs(last / first - 1) > tolerance
    ]
    if company == "shared":
        what = "another process holds the GPU, so both were slower than they can be"
        warnings.append(f"{what}; see nvidia-smi, end it and run again")
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
