"""A scripted agent follows program.md to the letter, with its own commands, for one short night.

The commands are taken from program.md; only what stands for something else is filled in. `uv run`
is the Python of the tests, the time limit two seconds, and train.py a stand-in that prints at once
what a real one would (prepare.py says just "prepared"). The agent remembers nothing: all that it
knows it reads from git and results.tsv.
"""

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cells import HEADER, sources

import constants as C

ROOT = Path(C.__file__).parent
TRAIN = """import os, time
from types import SimpleNamespace
import constants as C

VAL_BPB = 0.44
{lines}
end = "smoke" if C.SMOKE else "full"
if FAULTS.get(end) == "crash":
    raise RuntimeError("training loss is nan at step 3 (lrm 1.00); the run is void")
if FAULTS.get(end) == "refused":
    raise RuntimeError("evaluation refused: the model sees the future from 1 on; moved 3")
if FAULTS.get(end) == "hangs":
    time.sleep(60)
cool = os.path.expanduser("~/cool")
if FAULTS.get(end) == "hot" and not os.path.exists(cool):
    open(cool, "w").close()
    VAL_BPB += 0.04
    print("warning: the GPU's matmul went from 581 to 176 TFLOP/s: throttled or shared")
luck = {{42: 0.0, 43: 0.0005, 44: -0.0004}}[C.SEED]
named = dict(clock=SimpleNamespace(seconds=299.9), peak_vram_mb=60108.8, attention="fa3",
             gpu="none", commit="none", rules="full-0a1b2c3d", seed=C.SEED)


class Run(SimpleNamespace):
    def __getattr__(self, name):
        return 0


print(C.SUMMARY.format(run=Run(val_bpb=VAL_BPB + luck, **named)))
"""


def train_py(val_bpb: float, **faults: str) -> str:
    """Return a train.py of this result; faults: how it ends instead, in a `smoke` or `full` run."""
    return TRAIN.format(lines=f"FAULTS = {faults}").replace("= 0.44\n", f"= {val_bpb}\n")


class Commands:
    """The commands of program.md, blocks, lines of them and inline, found by how they begin."""

    def __init__(self, text: str):
        blocks = re.findall(r"^ *```sh\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
        lines = [line for block in blocks for line in block.splitlines()]
        self.blocks = [*blocks, *re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text), *lines]

    def __call__(self, start: str, **fill: str) -> str:
        found = [block for block in self.blocks if block.strip().startswith(start)]
        assert found, f"program.md has no command that begins with {start!r}"
        command = start if start in found else found[0]
        for placeholder, value in fill.items():
            assert PLACEHOLDERS[placeholder] in command, (placeholder, command)
            command = command.replace(PLACEHOLDERS[placeholder], value)
        return command


PLACEHOLDERS = {
    "tag": "<tag>",
    "idea": "<the idea>",
    "row": '0.441800 58.7 discard "wider MLP, seed 42"',
    "limit": "timeout -k 30 900",
}


class Lost(Exception):
    """The agent's context is gone."""


class Agent:
    def __init__(self, folder: Path, env: dict[str, str], die_at: str = ""):
        self.folder, self.env, self.die_at = folder, env, die_at
        self.commands = Commands((folder / "program.md").read_text("utf-8"))

    def sh(self, command: str) -> str:
        run = {"cwd": self.folder, "env": self.env, "capture_output": True, "text": True}
        done = subprocess.run(["bash", "-c", command], **run)
        assert done.returncode == 0 or "run.log" in command, (command, done.stderr)
        return done.stdout

    def at(self, place: str) -> None:
        if place == self.die_at:
            raise Lost(place)

    # ---- What it reads --------------------------------------------------------------------------
    def head(self) -> str:
        return self.sh("git rev-parse --short HEAD").strip()

    def rows(self) -> list[list[str]]:
        lines = (self.folder / "results.tsv").read_text("utf-8").splitlines()
        return [line.split("\t") for line in lines[1:]]

    def statistics(self) -> tuple[dict[str, tuple[float, int]], float]:
        printed = self.sh(self.commands("awk"))
        means = re.findall(r"^(\w+) mean (\S+) runs (\d+)$", printed, re.MULTILINE)
        noise = re.search(r"^noise (\S+)$", printed, re.MULTILINE)
        return {c: (float(m), int(n)) for c, m, n in means}, float(noise[1])

    # ---- What it does ---------------------------------------------------------------------------
    def set_up(self, tag: str) -> None:
        self.sh(self.commands("git switch -c", tag=tag))
        assert self.sh("uv run prepare.py; echo $?").endswith("0\n")
        self.sh(self.commands("printf 'commit"))
        for seed in (42, 43, 44):
            assert self.run_and_log("baseline", seed, "keep", ", rules full-0a1b2c3d")

    def run_and_log(
        self, idea: str, seed: int = 42, status: str = "discard", end: str = ""
    ) -> bool:
        """Do steps 4 and 5; return whether there was a result."""
        command = self.commands("timeout", limit="timeout -k 1 2").lstrip()
        printed = self.sh(
            f"AUTORESEARCH_SEED={seed} {command}" if seed != 42 else command
        )
        lines = printed.splitlines()
        values = dict(line.split(": ", 1) for line in lines if ": " in line)
        void = ", void" if "warning" in values else ""
        valid = lines[0] == "exit status 0" and lines[1] == "1" and not void
        self.at(f"{idea}: no row")
        row = f'0.000000 0.0 crash "{idea}, seed {seed}{end}{void}"'
        if valid:
            assert values["rules"] == "full-0a1b2c3d" and values["attention"] == "fa3"
            memory = float(values["peak_vram_mb"]) / 1024
            row = f'{values["val_bpb"]} {memory:.1f} {status} "{idea}, seed {seed}{end}"'
        self.sh(self.commands("printf '%s", row=row))
        return valid

    def experiment(self, idea: str, text: str, mended: str = "") -> None:
        (self.folder / "train.py").write_text(text, "utf-8")
        self.at(f"{idea}: not committed")
        if self.sh(self.commands("AUTORESEARCH_SMOKE=1")) != "exit status 0\n":
            self.sh(self.commands("git checkout train.py"))
            return
        self.sh(self.commands('git commit -m "<the idea>"', idea=idea))
        self.at(f"{idea}: not run")
        if not self.run_and_log(idea) and mended:
            (self.folder / "train.py").write_text(mended, "utf-8")
            self.sh(self.commands("git commit --amend"))
            self.sh(self.commands("git update-ref"))
            self.run_and_log(idea)
        self.at(f"{idea}: no verdict")
        self.verdict()

    def verdict(self) -> None:
        """Do step 6 for the commit at HEAD, by the table."""
        new, rows = self.head(), self.rows()
        *_, last = (row[4] for row in rows if row[0] == new)
        idea = last.rpartition(", seed")[0]
        if last.endswith(", void"):
            self.run_and_log(idea)
        best = [row[0] for row in rows if row[3] == "keep"][-1]
        (means, noise), keep = self.statistics(), False
        if new in means:
            gain = means[best][0] - means[new][0]
            keep = gain > 3 * noise
            if noise <= gain <= 3 * noise:
                if means[best][1] == 1:
                    self.sh(self.commands("git switch --detach"))
                    best_idea = next(row[4] for row in rows if row[0] == best)
                    self.run_and_log(best_idea.rpartition(", seed")[0], 43, "keep")
                    self.at(f"{idea}: detached")
                    self.sh(self.commands("git switch -"))
                if means[new][1] == 1:
                    self.run_and_log(idea, 43)
                means, noise = self.statistics()
                keep = means[best][0] - means[new][0] > 1.5 * noise
        self.sh(self.commands("sed -i" if keep else "git reset --hard"))

    def resume(self) -> None:
        """Do what program.md says when the context is lost."""
        if not self.sh(self.commands("git branch --show-current")):
            (branch,) = re.findall(r"autoresearch/\S+", self.sh("git branch"))
            self.sh(f"git switch {branch}")
        if self.sh(self.commands("git status --short")):
            self.sh(self.commands("git checkout train.py"))
        statuses = {row[3] for row in self.rows() if row[0] == self.head()}
        if not statuses:
            self.run_and_log(self.sh("git log -1 --format=%s").strip())
        if "keep" not in statuses:
            self.verdict()


# Idea, train.py, and what it is after a slip in it is mended.
PLAN = [
    ("wider MLP", train_py(0.4360)),
    ("no value embeddings", train_py(0.4400)),
    ("rates x 1.5", train_py(0.4353)),  # 1.6 x noise: a repeat, kept
    ("softcap 20", train_py(0.4350)),  # 1.4 x noise: a repeat, discarded
    ("fp8 head", train_py(0.40, full="crash")),
    ("a slip", train_py(0.40, full="crash"), train_py(0.4399)),
    ("no compile", train_py(0.40, full="hangs")),
    ("bidirectional", train_py(0.10, full="refused")),
    ("a typo", train_py(0.40, smoke="crash")),
    ("depth 10", train_py(0.4300, full="hot")),
]
# Where an agent loses its context; what the night leaves must not depend on it.
LOSSES = [
    "",
    "rates x 1.5: not committed",
    "rates x 1.5: not run",
    "rates x 1.5: no row",
    "rates x 1.5: no verdict",
    "rates x 1.5: detached",
    "no compile: no verdict",
    "depth 10: no verdict",
]


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("origin")
    for name in ("constants.py", "program.md", "analysis.ipynb", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    (folder / "train.py").write_text(train_py(0.44))
    (folder / "prepare.py").write_text('print("prepared")\n')
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@localhost"]
    git += ["-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "start"]):
        subprocess.run([*git, *command], check=True)
    return folder


@pytest.fixture
def agent(repository, tmp_path):
    """Return a maker of agents, all of one clone."""
    subprocess.run(["git", "clone", "-q", repository, tmp_path / "clone"], check=True)
    uv = tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text(f'#!/bin/sh\nshift\nexec "{sys.executable}" "$@"\n')
    uv.chmod(uv.stat().st_mode | stat.S_IEXEC)
    env = {
        k: v for k, v in os.environ.items() if not k.startswith(("GIT_", "AUTORESEARCH_"))
    }
    env |= {
        "PATH": f"{uv.parent}:{env['PATH']}",
        "HOME": str(tmp_path),
        "GIT_PAGER": "cat",
    }
    for role in ("GIT_AUTHOR", "GIT_COMMITTER"):
        env |= {f"{role}_NAME": "night", f"{role}_EMAIL": "night@localhost"}
    return lambda die_at="": Agent(tmp_path / "clone", env, die_at)


def play(agent, die_at: str) -> Agent:
    """Play the plan; after a loss, a new agent takes over and goes on with the rest of it."""
    worker = agent(die_at)
    worker.set_up("nov24")
    for idea, *texts in PLAN:
        try:
            worker.experiment(idea, *texts)
        except Lost:
            worker = agent()
            worker.resume()
            if die_at.endswith("not committed"):
                worker.experiment(idea, *texts)
    return worker


@pytest.mark.parametrize("die_at", LOSSES)
def test_after_the_night_branch_refs_and_log_are_what_they_should_be(agent, die_at):
    worker = play(agent, die_at)
    git = worker.sh
    kept = ["start", "wider MLP", "rates x 1.5", "depth 10"]
    assert git("git log --reverse --format=%s").splitlines() == kept
    assert git("git branch --show-current") == "autoresearch/nov24\n"
    assert git("git status --short") == ""

    # Every commit that was ever run is there, with its train.py: two of the idea with a slip.
    ran = [(idea, text) for idea, *texts in PLAN if idea != "a typo" for text in texts]
    attempts = [
        line.split(" ", 1)
        for line in git(worker.commands("git log --no-walk")).splitlines()
    ]
    commits = {
        (idea, git(f"git show {commit}:train.py")): commit for commit, idea in attempts
    }
    assert set(commits) == set(ran) and len(attempts) == len(ran)

    start = git("git rev-parse --short autoresearch/nov24~3").strip()
    hashes = {"baseline": start} | {
        idea: commits[idea, text] for idea, text in reversed(ran)
    }
    mended = commits[ran[6]]
    assert ran[6][0] == "a slip" and mended != hashes["a slip"]
    log = """
0.440000 58.7 keep    baseline, seed 42, rules full-0a1b2c3d
0.440500 58.7 keep    baseline, seed 43, rules full-0a1b2c3d
0.439600 58.7 keep    baseline, seed 44, rules full-0a1b2c3d
0.436000 58.7 keep    wider MLP, seed 42
0.440000 58.7 discard no value embeddings, seed 42
0.435300 58.7 discard rates x 1.5, seed 42
0.436500 58.7 keep    wider MLP, seed 43
0.435800 58.7 keep    rates x 1.5, seed 43
0.435000 58.7 discard softcap 20, seed 42
0.435500 58.7 discard softcap 20, seed 43
0.000000 0.0  crash   fp8 head, seed 42
0.000000 0.0  crash   a slip, seed 42
0.439900 58.7 discard a slip, seed 42
0.000000 0.0  crash   no compile, seed 42
0.000000 0.0  crash   bidirectional, seed 42
0.000000 0.0  crash   depth 10, seed 42, void
0.430000 58.7 keep    depth 10, seed 42
"""
    expected = [line.split(maxsplit=3) for line in log.strip().splitlines()]
    expected = [[hashes[row[3].partition(", seed")[0]], *row] for row in expected]
    expected[12][0] = mended
    text = HEADER + "".join("\t".join(row) + "\n" for row in expected)
    assert (worker.folder / "results.tsv").read_text("utf-8") == text


def test_the_notebook_reads_the_log_of_such_a_night(agent, monkeypatch):
    pytest.importorskip("pandas")
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    worker = play(agent, "")
    monkeypatch.chdir(worker.folder)
    names = {"__name__": "__main__"}
    for source in sources():
        exec(compile(source, "analysis.ipynb", "exec"), names)
    matplotlib.pyplot.close("all")
    # A slip and its mended commit are two experiments.
    assert (len(names["log"]), len(names["tries"]), names["n_kept"]) == (17, 10, 3)
    assert list(names["chain"].description.iloc[1:]) == [
        "wider MLP",
        "rates x 1.5",
        "depth 10",
    ]
    assert list(names["chain"].runs) == [3, 2, 2, 1]
    assert names["noise"] == pytest.approx(worker.statistics()[1], abs=1e-6)
    assert names["best"] == pytest.approx(0.43) and len(names["hours"]) == 10
    assert worker.sh("git status --short") == ""  # progress.png is ignored
