"""How well the GPU is: its speed before and after training, and whether it is alone."""

import math
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

import torch

from harness import gpu

# Fractions by which speed before and after may differ without a warning. A GPU that comes
# from compiling is cool and clocks higher: over 300 s healthy H100s lost 8.5 and 10.1 %
# on matmuls and 0.1 % on copies (docs/LOG.md), which do not depend on the cores' clock.
MATMUL_TOLERANCE = 0.15
COPY_TOLERANCE = 0.03
# GPU memory that is not torch's and still not another process's: contexts.
CONTEXT_BYTES = 2 << 30


@dataclass(frozen=True)
class Health:
    """What the GPU did at one moment; nan where there was no memory to measure it."""

    tflops: float  # of a bf16 matmul, 10^12 FLOPs per second
    gb_per_sec: float  # of a copy on the device, read and written
    company: str  # alone, shared (another process holds the GPU) or unknown


def measure_rate(
    work: Callable[[], object], amount: float, seconds: float, windows: int = 1
) -> float:
    """Return `amount`, that of one work(), per second on the GPU.

    seconds: about how long each of the windows is, of which the fastest counts.
    """
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)

    def timed(count: int) -> float:
        start.record()
        for _ in range(count):
            work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count

    timed(2)  # sets libraries up
    count = max(3, int(seconds / timed(2)))
    return amount / min(timed(count) for _ in range(windows))


def measure_health(device: torch.device) -> Health:
    """Measure the GPU in about half a second, from memory that is free again afterwards.

    The matrices come from a generator of their own: torch's is left alone, and numbers
    that are all zero would cost less power than those of a model.
    """
    n = 8192  # three matrices of 128 MiB
    generator = torch.Generator(device).manual_seed(0)
    options = {"dtype": torch.bfloat16, "device": device, "generator": generator}
    try:
        a = torch.randn(n, n, **options)
        b = torch.randn(n, n, **options)
        c = torch.empty_like(a)
        tflops = measure_rate(lambda: torch.mm(a, b, out=c), 2 * n**3 / 1e12, 0.15)
        # No power limit slows copies. A host that is busy for 2 ms does: 4 % of 0.05 s.
        gb_per_sec = measure_rate(lambda: c.copy_(a), 2 * a.nbytes / 1e9, 0.01, windows=5)
    except torch.OutOfMemoryError:
        tflops = gb_per_sec = math.nan
    return Health(tflops, gb_per_sec, find_company(device))


def find_company(device: torch.device, parent: int | None = None) -> str:
    """Return what `judge_company` says of the GPU now; a process `parent` does not count."""
    free, total = torch.cuda.mem_get_info(device)
    foreign = total - free - torch.cuda.memory_reserved(device)
    pids = [pid for pid in list_gpu_processes(device) if pid != parent]
    return judge_company(pids, foreign if gpu.has_own_memory(device) else None)


def list_gpu_processes(device: torch.device) -> list[int]:
    """Return the ids of processes that nvidia-smi shows on `device`; none if it fails."""
    uuid = torch.cuda.get_device_properties(device).uuid
    command = ["nvidia-smi", f"--id=GPU-{uuid}"]
    command += ["--query-compute-apps=pid", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return []
    return [int(line) for line in done.stdout.split() if line.isdigit()]


def judge_company(pids: list[int], foreign: int | None) -> str:
    """Return "alone", "shared" or "unknown": whether other processes hold the GPU.

    pids: the processes on it. foreign: bytes of its memory that torch does not hold here,
    None where these do not tell (gpu.has_own_memory).
    In a container the ids may be of another name space: if this process is not among
    them, only memory can tell, beyond what contexts and a desktop take.
    """
    if os.getpid() in pids:
        return "shared" if len({*pids}) > 1 else "alone"
    if foreign is None:
        return "unknown"
    if foreign > CONTEXT_BYTES:
        return "shared"
    return "alone" if pids else "unknown"


def judge_health(before: Health, after: Health) -> tuple[str, list[str]]:
    """Return the summary's words on the GPU before and after training, and warnings."""
    rates = [
        ("matmul", "TFLOP/s", before.tflops, after.tflops, MATMUL_TOLERANCE),
        ("copy", "GB/s", before.gb_per_sec, after.gb_per_sec, COPY_TOLERANCE),
    ]
    words = []
    warnings = []
    for what, unit, first, last, tolerance in rates:
        words.append(f"{first:.0f}/{last:.0f} {unit}")
        change = last / first - 1
        if abs(change) > tolerance:
            speeds = f"from {first:.0f} to {last:.0f} {unit} over the run"
            warnings.append(
                f"the GPU's {what} went {speeds} ({100 * change:+.1f} %): "
                "throttled or shared, so do not trust the result; "
                "see `nvidia-smi -q -d PERFORMANCE` and run again"
            )
    both = {before.company, after.company}
    company = next(word for word in ("shared", "unknown", "alone") if word in both)
    if company == "shared":
        problem = "another process holds the GPU, so both were slower than they can be"
        warnings.append(f"{problem}; see `nvidia-smi`, end it and run again")
    return ", ".join([*words, company]), warnings


class Watch:
    """Looks at the GPU between the parts of a run; on a CPU it does nothing.

    health: what each look found. peak: most bytes in tensors between the looks.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.health: list[Health] = []
        self.peak = 0

    def look(self) -> None:
        """Measure a GPU while it is warm and has nothing else to do."""
        if self.device.type != "cuda":
            return
        torch.cuda.synchronize(self.device)
        if self.health:  # what came before the first look is not counted
            self.peak = max(self.peak, torch.cuda.max_memory_allocated(self.device))
        self.health.append(measure_health(self.device))
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int:
        """Return the most bytes in tensors since the first look, measuring left out."""
        if self.device.type != "cuda":
            return 0
        return max(self.peak, torch.cuda.max_memory_allocated(self.device))

    def report(self) -> tuple[str, list[str]]:
        """Return the summary's words and warnings of the first look and the last."""
        if self.device.type != "cuda":
            return "none (cpu)", []
        return judge_health(self.health[0], self.health[-1])
