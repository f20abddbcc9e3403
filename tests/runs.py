"""Runs of edited copies of the repository, for tests that need many.

One process imports torch and forks a child for each run, two at a time; what the child does is
`python train.py`. Rules are those of smoke, made smaller still.
"""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

Edit = tuple[str, str, str]  # a file, a text that it holds once, what to put in its place
Result = tuple[int, str]  # exit status, log

SMALLER: list[Edit] = [
    ("constants.py", "MAX_SEQ_LEN = 256 if SMOKE", "MAX_SEQ_LEN = 64 if SMOKE"),
    ("constants.py", "EVAL_TOKENS = 2**16 if SMOKE", "EVAL_TOKENS = 2**10 if SMOKE"),
    ("constants.py", "20 if SMOKE", "0.5 if SMOKE"),  # TIME_BUDGET
    ("constants.py", "180 if SMOKE", "600 if SMOKE"),  # STARTUP_LIMIT, on a busy machine
    ("constants.py", "NCE = 1.0 if SMOKE", "NCE = 4.0 if SMOKE"),  # OVERRUN_TOLERANCE
]
# The second process of a smoke run, which takes as long as ten of these runs.
NO_DRY_RUN: Edit = (
    "harness/run.py",
    'dry_run.start(ROOT / "train.py")',
    "None",
)
SHARED = Path(os.environ["AUTORESEARCH_CACHE"]) / "runs"  # what the first run prepares
LONGEST = 300  # seconds that a child may take


def apply(folder: Path, edits: Iterable[Edit]) -> None:
    """Edit files of `folder`; AssertionError unless each text is there, once."""
    for name, old, new in edits:
        text = (folder / name).read_text("utf-8")
        assert text.count(old) == 1, f"{name} holds {old!r} {text.count(old)} times"
        (folder / name).write_text(text.replace(old, new), "utf-8")


def run_all(folders: list[Path]) -> dict[str, Result]:
    """Run train.py of each folder; return the results by the folders' names."""
    env = {"AUTORESEARCH_CACHE": str(SHARED), "AUTORESEARCH_SAVE": "0"}
    env = os.environ | env | {"OMP_NUM_THREADS": "1"}
    # It warns of a fork beside a thread, which is pyarrow's and idle.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", __file__]
    command += map(str, folders)
    done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    statuses = {Path(path): status for path, status in json.loads(done.stdout).items()}
    return {
        path.name: (status, (path / "run.log").read_text("utf-8"))
        for path, status in statuses.items()
    }


def values(log: str) -> dict[str, str]:
    """Return the summary's values by their keys; none if there is no summary."""
    return dict(re.findall(r"^(\w+): (.*)$", log.partition("\n---\n")[2], re.MULTILINE))


def stopped(result: Result, why: str) -> None:
    """Assert that the run ended with status 1, said why and printed no result."""
    status, log = result
    assert status == 1 and re.search(why, log), log
    assert "\n---\n" not in log and log.endswith("the run ended without a result\n"), log


# ---- The process that forks ---------------------------------------------------------------------
def main(folders: list[str]) -> None:
    """Fork a child for each folder; print their exit statuses by folder, as JSON."""
    import numpy  # noqa: F401  (what every child would import)
    import pyarrow.parquet  # noqa: F401
    import requests  # noqa: F401
    import rustbpe  # noqa: F401
    import tiktoken  # noqa: F401
    import torch._inductor.async_compile
    import torch.nn.attention.flex_attention

    torch.compile(len)  # imports the rest of what train.py imports
    running: dict[int, str] = {}
    statuses: dict[str, int] = {}

    def wait() -> None:
        pid, status = os.wait()
        statuses[running.pop(pid)] = os.waitstatus_to_exitcode(status)

    for folder in folders:
        if len(running) == (2 if statuses else 1):  # the first run prepares for all
            wait()
        if (pid := os.fork()) == 0:
            return child(folder)
        running[pid] = folder
    while running:
        wait()
    json.dump(statuses, sys.stdout)


def child(folder: str) -> None:
    signal.alarm(LONGEST)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    os.chdir(folder)
    with open("run.log", "wb") as log:
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    sys.argv[:], sys.path[0] = ["train.py"], folder
    runpy.run_path("train.py", run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
