"""The summary of a run, and the warnings above it."""

import time
from pathlib import Path

import torch

import constants as C
from harness import gpu, repeat
from harness.output import warning
from harness.peaks import peak_flops


def summarise(run, root: Path, flops_per_token: float) -> str:
    """Return the lines that end the log of an evaluated `run.Run` of the checkout `root`.

    What only they need is computed here, and kept in the run.
    """
    run.num_params_M = run.num_params / 1e6
    run.tok_per_sec = run.tokens / run.clock.seconds
    waited = sum(gpu.seconds_between(*wait) for wait in run.waits)
    run.wait_percent = 100 * waited / run.clock.seconds
    run.gpu = torch.cuda.get_device_name(run.device) if run.cuda else "none (cpu)"
    run.tflops = flops_per_token * run.tok_per_sec / 1e12
    run.mfu_percent = 100e12 * run.tflops / peak_flops(run.gpu)
    run.peak_vram_mb = run.watch.peak_bytes() / 2**20
    run.gpu_health, problems = run.watch.report()
    run.epochs = run.tokens / run.epoch_tokens
    run.tokens_M = run.tokens / 1e6
    run.total_seconds = time.perf_counter() - C.STARTED_AT
    warnings = [warning("gpu", problem) for problem in problems]
    if run.tokens > run.epoch_tokens and not C.SMOKE:
        there = run.epoch_tokens / 1e6
        what = f"trained on {run.tokens_M:.1f} M tokens, but there are {there:.1f} M"
        harm = "tables memorise rows that come again; prepare more shards (docs/data.md)"
        warnings.append(warning("data", f"{what}: {harm}"))
    problems = repeat.explain(root, run.variables)
    warnings += [warning("repeat", problem) for problem in problems]
    return "\n".join([*warnings, C.SUMMARY.format(run=run)])
