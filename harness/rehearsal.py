"""The start of a first run, when the data is prepared: the night's first experiment is then warm.

A second process runs train.py up to the first step, and the evaluation on random ids, so that all
is in the compile cache. Nothing is trained or measured, and nothing depends on it.
"""

import constants  # noqa: F401  (first: it sets what torch reads)

# isort: split
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

import torch

from harness import run
from harness.files import data_dir
from harness.health import find_company
from harness.machine import end_with

SECONDS = 600  # at most
# Last lines that do not say what failed: of every run without a result, and of torch.compile.
ASIDE = ("train.py: the run ended without a result", "Set TORCHDYNAMO_VERBOSE=1")


class Rehearsal(run.Run):
    """Stands in for `run.Run` up to the warm-up, which ends the process with status 0."""

    def __init__(self, folder: Path, device: torch.device, since: float | None = None):
        if device.type == "cuda" and find_company(device, os.getppid()) == "shared":
            sys.exit("another process uses the GPU, and may be measuring")
        super().__init__(folder, device, since)

    def warm_up(self, model: torch.nn.Module, *args, **kwargs) -> NoReturn:
        super().warm_up(model, *args, **kwargs)
        model.eval()
        sizes = torch.from_numpy(self.tokenizer.token_bytes).to(self.device)
        self._fit_evaluation(model, sizes)
        self.printed = True  # there is no result to wait for
        sys.exit(0)


def rehearse(script: Path) -> str:
    """Run `script` up to its first step; return a line on how that went."""
    call = [sys.executable, "-u", "-m", __name__, str(script), str(os.getpid())]
    # data_dir: the same, though a relative path would be another from there.
    env = os.environ | {"AUTORESEARCH_CACHE": str(data_dir().parent)}
    how = {"cwd": script.parent, "env": env, "timeout": SECONDS}
    start = time.perf_counter()
    try:
        # No pipe, which would wait for what it leaves behind.
        with tempfile.TemporaryFile() as log:
            done = subprocess.run(
                call, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **how
            )
            log.seek(0)
            said = log.read().decode(errors="replace").strip().splitlines()
        why = [line for line in said if line.strip() and not line.startswith(ASIDE)]
        problem = (why or said or ["it said nothing"])[-1] if done.returncode else None
        if done.returncode < 0:
            problem = f"signal {-done.returncode} ended it"
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        return f"compile: left to the first experiment, which starts later; {problem}"
    return f"compile: done in {time.perf_counter() - start:.0f} s"


def main(script: str, parent: str) -> None:
    """Run `script` as the process that `rehearse` starts."""
    end_with(int(parent))
    run.Run = Rehearsal
    run.compare_with_last = lambda *_: None  # the first run itself will say
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
