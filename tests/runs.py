"""Runs of edited copies of the repository, for tests that need many.

Each is `python train.py` in a fork. Rules are those of smoke, made smaller still.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

import forks
from forks import Job

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


def apply(folder: Path, edits: Iterable[Edit]) -> None:
    """Edit files of `folder`; AssertionError unless each text is there, once."""
    for name, old, new in edits:
        text = (folder / name).read_text("utf-8")
        assert text.count(old) == 1, f"{name} holds {old!r} {text.count(old)} times"
        (folder / name).write_text(text.replace(old, new), "utf-8")


def run_all(folders: list[Path]) -> dict[str, Result]:
    """Run train.py of each folder; return the results by the folders' names."""
    env = {"AUTORESEARCH_CACHE": str(SHARED), "AUTORESEARCH_SAVE": "0"}
    logs = [folder / "run.log" for folder in folders]
    jobs = [
        Job(["train.py"], os.environ | env, str(folder), str(log), str(log))
        for folder, log in zip(folders, logs, strict=True)
    ]
    statuses = []
    for part in (jobs[:1], jobs[1:]):  # the first run prepares for all
        forks.start(part, at_once=1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
        statuses += forks.finish()
    results = zip(statuses, (log.read_text("utf-8") for log in logs), strict=True)
    return {folder.name: result for folder, result in zip(folders, results, strict=True)}


def values(log: str) -> dict[str, str]:
    """Return the summary's values by their keys; none if there is no summary."""
    return dict(re.findall(r"^(\w+): (.*)$", log.partition("\n---\n")[2], re.MULTILINE))


def stopped(result: Result, why: str) -> None:
    """Assert that the run ended with status 1, said why and printed no result."""
    status, log = result
    assert status == 1 and re.search(why, log), log
    assert "\n---\n" not in log and log.endswith("the run ended without a result\n"), log
