"""The whole job, once, as a newcomer starts it: an empty cache, no network, no GPU."""

import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import constants as C
import forks
from conftest import STEP_LINE, copy_checkout
from harness.manifest import load_manifest
from harness.tokenizer import Tokenizer

ROOT = Path(C.__file__).parent
KEYS = re.findall(r"^(\w+): ", C.SUMMARY, re.MULTILINE)


def environment(folder: Path) -> dict[str, str]:
    """Return an environment in which the network and the home directory cannot be used."""
    nowhere = {
        name: "http://127.0.0.1:9"
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "HF_ENDPOINT")
    }
    env = os.environ | nowhere | {"AUTORESEARCH_SMOKE": "1", "PYTHONUNBUFFERED": "1"}
    return env | {
        "AUTORESEARCH_CACHE": str(folder / "cache"),
        "HOME": str(folder / "home"),
    }


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> subprocess.CompletedProcess:
    folder = tmp_path_factory.mktemp("smoke")
    copy_checkout(folder / "checkout")
    command, env = (
        [sys.executable, str(folder / "checkout" / "train.py")],
        environment(folder),
    )
    done = subprocess.run(
        command, env=env, cwd=folder, capture_output=True, text=True, timeout=300
    )
    done.folder = folder
    return done


@pytest.fixture(scope="module")
def values(job) -> dict[str, str]:
    lines = job.stdout.splitlines()[-len(KEYS) :]
    return dict(line.split(": ", 1) for line in lines)


def test_it_succeeds_and_complains_about_nothing(job):
    assert (job.returncode, job.stderr) == (0, "")


def test_the_summary_comes_last_and_is_complete(job, values):
    lines = job.stdout.splitlines()
    assert lines[-len(KEYS) - 1] == "---" and list(values) == KEYS


def test_exactly_one_line_of_the_log_starts_with_val_bpb(job):
    assert len(re.findall("^val_bpb:", job.stdout, re.MULTILINE)) == 1


def test_it_says_that_it_prepares_first(job):
    lines = job.stdout.splitlines()
    said = next(i for i, line in enumerate(lines) if "preparing first" in line)
    assert said < next(i for i, line in enumerate(lines) if line.startswith("step "))


def test_nobody_waits_for_the_evaluation_without_a_word(job):
    *_, said = (
        line for line in job.stdout.splitlines() if line.startswith("evaluation: ")
    )
    assert (
        said
        == f"evaluation: {C.EVAL_TOKENS // C.MAX_SEQ_LEN} rows of {C.MAX_SEQ_LEN} tokens"
    )


def test_it_ran_under_the_smoke_rules_within_the_budget(values):
    assert re.fullmatch("smoke-[0-9a-f]{8}", values["rules"])
    assert values["gpu"] == "none (cpu)" and values["seed"] == "42"
    assert 0.5 * C.TIME_BUDGET < float(values["training_seconds"])
    assert float(values["training_seconds"]) <= C.TIME_BUDGET * (1 + C.OVERRUN_TOLERANCE)


def test_the_model_has_learned(job, values):
    folder = job.folder / "cache" / "smoke"
    tokenizer = Tokenizer.load(folder / "tokenizer")
    rows = load_manifest(folder)["rows"]
    (val,) = (name for name, about in rows.items() if about["split"] == "val")
    ids = np.fromfile(folder / "rows" / val, "<u2").reshape(-1, C.MAX_SEQ_LEN + 1)[:, 1:]
    text = ids[ids < C.BOS_ID].tolist()
    nbytes = sum(len(tokenizer.encoding.decode_single_token_bytes(i)) for i in text)
    untrained = math.log2(C.VOCAB_SIZE) * len(text) / nbytes
    assert 0.0 < float(values["val_bpb"]) < 0.8 * untrained


def test_the_log_is_short_whole_lines_that_a_pager_can_read(job, values):
    assert (
        "\r" not in job.stdout and "\x1b" not in job.stdout and job.stdout.endswith("\n")
    )
    assert len(job.stdout) < 20_000
    steps = [line for line in job.stdout.splitlines() if line.startswith("step ")]
    # Every tenth, however slow the machine is.
    assert len(steps) == math.ceil(int(values["num_steps"]) / 10)
    assert all(map(STEP_LINE.fullmatch, steps))
    shares = [float(re.search(r"\((.*)%\)", line)[1]) for line in steps]
    assert (
        shares[0] == 0.0 and shares == sorted(shares) and len(set(shares)) == len(shares)
    )


def test_nothing_is_written_outside_the_cache_but_the_model(job):
    assert {path.name for path in job.folder.iterdir()} == {"cache", "checkout"}
    there = {path.name for path in (job.folder / "checkout").iterdir()}
    assert there - {"__pycache__"} == {path.name for path in ROOT.glob("*.py")} | {
        "harness",
        "smoke.npz",
    }
    ignored = (ROOT / ".gitignore").read_text("utf-8").splitlines()
    assert {"model.npz", "smoke.npz"} <= {*ignored}


def test_the_model_continues_a_text(job, values):
    text, script = "def main(", str(job.folder / "checkout" / "sample.py")
    done = forks.run(script, text, env=environment(job.folder))
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"model of commit none, val_bpb {values['val_bpb']}\n"
    assert done.stdout.startswith(text) and len(done.stdout) > len(text) + 1


UNTIL_WARM = """import os, runpy, sys
class Out:
    def __init__(self, out): self.out = out
    def __getattr__(self, name): return getattr(self.out, name)
    def write(self, text):
        self.out.write(text)
        if text.startswith("batch:"):
            self.out.flush()
            os._exit(7)
sys.stdout = Out(sys.stdout)
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def test_a_second_run_starts_at_once(job):
    before = {path: path.stat().st_mtime_ns for path in (job.folder / "cache").rglob("*")}
    started, checkout = time.monotonic(), job.folder / "checkout"
    env = environment(job.folder) | {"PYTHONPATH": str(checkout)}
    done = forks.run("-c", UNTIL_WARM, checkout / "train.py", env=env, folder=job.folder)
    assert (done.returncode, done.stderr) == (7, "")
    # The data is open and the model warm.
    assert done.stdout.splitlines()[-1].startswith("batch:")
    assert "prepar" not in done.stdout
    assert time.monotonic() - started < 60
    assert before == {
        path: path.stat().st_mtime_ns for path in (job.folder / "cache").rglob("*")
    }
