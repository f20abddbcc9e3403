"""Nights for tests: a throw-away clone with real git, and a train.py that takes no time.

`AUTORESEARCH_RUN` runs that train.py, which prints what a real one would print.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The knobs of a train.py here, the first lines of it, and what they do.
KNOBS = {
    "VAL_BPB": 0.44,
    "SPEED": 1.2,
    "MEMORY": 58.7,
    "ATTENTION": "fa3",
    "FAULT": "",
    "ONCE": "",  # a fault of the first run that comes here
    "SMOKE": "",  # a fault of the smoke check
}
LUCK = {42: 0.0, 43: 0.0005, 44: -0.0004}
TRAIN = """
import os, sys, time
here, seed = os.environ["NIGHT_HOME"], int(os.environ.get("AUTORESEARCH_SEED", 42))
if os.environ.get("AUTORESEARCH_SMOKE") and not os.getcwd().endswith("tree"):
    raise SystemExit(SMOKE or 0)  # the check, not a night of smoke runs
if ONCE:
    try:
        os.mkdir(os.path.join(here, ONCE + str(VAL_BPB)))
        FAULT = ONCE
    except FileExistsError:
        pass
try:
    *of_seed, speed = open(os.path.join(here, "speed")).read().split()
    runs = len(open(os.path.join(here, "environment")).readlines())
    if of_seed in ([], [str(seed)]):
        steps = {"wanders": 0.1 * runs, "climbs": 0.04 * (seed - 42)}
        steps["rises"] = 0.04 * (seed - 43) if seed > 44 else 0
        SPEED *= 1 + steps[speed] if speed in steps else float(speed)
except FileNotFoundError:
    pass
print("step 00000 (0.0%) | loss: 9.0110", flush=True)
if FAULT == "crash":
    raise SystemExit("train.py: training loss is nan at step 3 (lrm 1.00); lower a rate")
if FAULT == "refused":
    raise SystemExit("evaluation refused: the model sees the future from 1 on")
if FAULT == "hangs":
    time.sleep(60)
while FAULT == "slow" and not os.path.exists(os.path.join(here, "go")):
    time.sleep(0.01)
if FAULT in ("leaves", "escapes"):
    if not (child := os.fork()):
        FAULT == "escapes" and os.setsid()
        time.sleep(60)
    open(os.path.join(here, "left"), "w").write(str(child))
if FAULT == "twice":
    print("val_bpb: 0.100000")
if FAULT in ("gpu", "edit", "host"):
    print(f"warning: {FAULT}: the GPU's matmul went from 581 to 176 TFLOP/s")
print("warning: `VIRTUAL_ENV=x` does not match the project environment path")
with open(os.path.join(here, "environment"), "a") as file:
    names = ("VIRTUAL_ENV", "CUDA_VISIBLE_DEVICES")
    file.write(repr([os.environ.get(name) for name in names]) + "\\n")
luck = LUCK.get(seed, 0.0)
rules = "smoke" if os.environ.get("AUTORESEARCH_SMOKE") else "full"
rules += "-11111111" if FAULT == "rules" else "-0a1b2c3d"
if os.path.exists(os.path.join(here, "other rules")):
    rules = "full-22222222"
if FAULT == "attention":
    ATTENTION = "flex"
steps = round(2747 * (SPEED / 1.2 if rules.startswith("smoke") else 1))
tail = f"attention: {ATTENTION}\\nseed: {seed}\\ndata: 8fe0ad1f\\nrules: {rules}"
print(f"---\\nval_bpb: {VAL_BPB + luck:.6f}\\npeak_vram_mb: {MEMORY * 1024:.1f}\\n"
      f"num_steps: {steps}\\ntok_per_sec: {SPEED * 1e6:.0f}\\n{tail}", flush=True)
"""
# The product's times are for people; these are for tests.
FASTER = [
    ("experiment.py", "POLL = 1.0", "POLL = 0.02"),
    ("experiment.py", "IDLE = 5", "IDLE = 50"),  # a second: git on a busy machine
    ("loop/night.py", "LIMIT = 900", "LIMIT = 5"),
    ("loop/night.py", "LATE = 30", "LATE = 1"),
]


def train_py(val_bpb: float = 0.44, lines: int = 0, **knobs) -> str:
    """Return a train.py with this result, longer by some lines."""
    knobs = KNOBS | {"VAL_BPB": val_bpb} | knobs
    text = "".join(f"{name} = {value!r}\n" for name, value in knobs.items())
    return text + f"LUCK = {LUCK}\n" + TRAIN + "LINE = 0\n" * (20 + lines)


def make_origin(folder: Path) -> Path:
    """Make a repository of the loop, with a train.py of `train_py`."""
    (folder / "harness").mkdir(parents=True)
    names = ("experiment.py", "constants.py", "program.md", ".gitignore", "loop")
    for name in (*names, "harness/__init__.py", "harness/streams.py"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    for name, old, new in FASTER:
        text = (folder / name).read_text("utf-8")
        assert text.count(old) == 1, name
        (folder / name).write_text(text.replace(old, new), "utf-8")
    (folder / "train.py").write_text(train_py())
    (folder / "notes.md").write_text("the owner's\n")
    (folder / "prepare.py").write_text('print("prepared")\n')
    for command in (["init", "-qb", "main"], ["add", "."], ["commit", "-qm", "start"]):
        call = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run([*call, *command], check=True)
    return folder


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for a condition, 30 s at most."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def runs_begun(folder: Path) -> int:
    """Return how many runs of a tree have made a step."""
    return sum("step 0" in path.read_text() for path in folder.glob("runs/*/*.log"))


class Clone:
    """A clone in which an agent works; HOME, and what else is its, lies in `home`."""

    def __init__(self, origin: Path, home: Path, **env: str):
        home.mkdir(exist_ok=True)
        self.folder = home / "clone"
        if not self.folder.exists():
            subprocess.run(["git", "clone", "-q", origin, self.folder], check=True)
        apart = ("GIT_", "AUTORESEARCH_", "CUDA_", "VIRTUAL_ENV")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(apart)}
        self.env = clean | {
            "HOME": str(home),
            "NIGHT_HOME": str(home),
            "GIT_CONFIG_NOSYSTEM": "1",
            "AUTORESEARCH_CACHE": str(home / "cache"),
            "AUTORESEARCH_RUN": f"{sys.executable} -S -E train.py",
        }
        for role in ("AUTHOR", "COMMITTER"):
            self.env[f"GIT_{role}_NAME"] = "night"
            self.env[f"GIT_{role}_EMAIL"] = "night@localhost"
        self.env |= env

    def copy(self, home: Path) -> "Clone":
        """Return a clone in `home` that is as this one is now."""
        shutil.copytree(self.folder.parent, home, symlinks=True, dirs_exist_ok=True)
        night = home / "clone" / "runs" / "night.json"
        night.write_text(night.read_text().replace(str(self.folder.parent), str(home)))
        return Clone(self.folder, home)

    def until_it_trains(self) -> None:
        """Wait for the first step of the first run after the baseline."""
        wait_until(lambda: runs_begun(self.folder) > 3)

    def run_slowly(self, *args) -> None:
        """Begin an experiment that trains until `go`."""
        self.edit(*args, FAULT="slow")
        self.do("run", "slow", "--minutes=0", status=3)
        self.until_it_trains()

    def go(self) -> None:
        """Let a slow run end."""
        (self.folder.parent / "go").touch()

    def do(self, *command: str, status: int | None = 0, cwd: Path | None = None) -> str:
        """Run experiment.py; return what it prints, its refusal included."""
        call = [sys.executable, "experiment.py", *command]
        return self.call(call, status, cwd)

    def call(self, call: list, status: int | None = 0, cwd: Path | None = None) -> str:
        how = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "text": True}
        how |= {"stderr": subprocess.STDOUT, "timeout": 60}
        done = subprocess.run(call, cwd=cwd or self.folder, env=self.env, **how)
        assert status in (None, done.returncode), done.stdout
        return done.stdout

    def git(self, *command: str, **how) -> str:
        return self.call(["git", *command], **how).strip()

    def edit(self, *args, **knobs) -> None:
        (self.folder / "train.py").write_text(train_py(*args, **knobs))

    def experiment(self, idea: str, *args, status: int = 0, **knobs) -> str:
        self.edit(*args, **knobs)
        return self.do("run", idea, status=status)

    def attempts(self) -> list[str]:
        """Return the names under refs/attempts."""
        return self.git(
            "for-each-ref", "--format=%(refname:lstrip=2)", "refs/attempts"
        ).split()

    def rows(self) -> list[list[str]]:
        """Return val_bpb, memory, status and description of each line of the log."""
        text = (self.folder / "results.tsv").read_text("utf-8", "surrogateescape")
        return [line.split("\t")[1:] for line in text.splitlines()[1:]]

    def said(self) -> list[str]:
        """Return each line's status and description, steps and speed left out."""
        tail = r", 2747 steps, \d\.\d+ M tok/s"
        return [f"{row[2]} {re.sub(tail, '', row[3])}" for row in self.rows()]

    def value(self) -> float:
        """Return the VAL_BPB of train.py here."""
        return float((self.folder / "train.py").read_text().split("\n")[0].split()[-1])
