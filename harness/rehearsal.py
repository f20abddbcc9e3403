"""The start of a first run, when the data is prepared: the night's first experiment is then warm.

A second process runs train.py up to the first step, and the evaluation on random ids, so that all
is in the compile cache. Nothing is trained or measured, and nothing depends on it.
"""

import constants  # noqa: F401  (first: it sets what torch reads)

# isort: split
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch

from harness import run

SECONDS = 600  # at most


class Rehearsal(run.Run):
    """Stands in for `run.Run` up to the warm-up, which ends the process with status 0."""

    def warm_up(self, model: torch.nn.Module, *args, **kwargs) -> NoReturn:
        super().warm_up(model, *args, **kwargs)
        model.eval()
        sizes = torch.from_numpy(self.tokenizer.token_bytes).to(self.device)
        self._fit_evaluation(model, sizes)
        self.printed = True  # there is no result to wait for
        sys.exit(0)


def rehearse(script: Path) -> str:
    """Run `script` up to its first step; return a line on how that went."""
    call = [sys.executable, "-m", __name__, str(script)]
    how = {"capture_output": True, "text": True, "errors": "replace", "timeout": SECONDS}
    start = time.perf_counter()
    try:
        done = subprocess.run(call, cwd=script.parent, **how)
        said = (done.stderr + done.stdout).strip().splitlines() or ["it said nothing"]
        problem = said[-1] if done.returncode else None
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        return f"compile: left to the first experiment, which starts later; {problem}"
    return f"compile: done in {time.perf_counter() - start:.0f} s"


def main(script: Path) -> None:
    """Run `script` as the process that `rehearse` starts."""
    run.Run = Rehearsal
    run.compare_with_last = lambda *_: None  # the first run itself will say
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
