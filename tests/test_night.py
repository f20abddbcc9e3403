"""A scripted agent follows program.md to the letter, with its own commands, for one short night.

The commands are taken from program.md; only what stands for something else is filled in. `uv run`
is the Python of the tests, and train.py a stand-in that prints at once what a real one would. The
agent remembers nothing: all that it knows it reads from exit statuses, `status` and git.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from night import Clone, make_origin, train_py

ROOT = Path(__file__).resolve().parent.parent


class Commands:
    """The commands of program.md, blocks and inline, found by how they begin."""

    def __init__(self, text: str):
        blocks = re.findall(r"^ *```sh\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
        self.all = [*blocks, *re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)]

    def __call__(self, start: str, old: str = "", new: str = "") -> str:
        found = [command for command in self.all if command.strip().startswith(start)]
        assert found and old in found[0], (
            f"program.md has no command {start!r} with {old!r}"
        )
        return found[0].replace(old, new) if old else found[0]


class Lost(Exception):
    """The agent's context is gone."""


class Agent:
    def __init__(self, clone: Clone, die_at: str = ""):
        self.clone, self.die_at = clone, die_at
        self.commands = Commands((ROOT / "program.md").read_text("utf-8"))

    def sh(self, command: str, dies: bool = False) -> tuple[int, str]:
        """Run a command in a shell of its own; `dies`: it is killed when it trains."""
        how = {"cwd": self.clone.folder, "env": self.clone.env, "start_new_session": True}
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "text": True}
        pipes["stderr"] = subprocess.STDOUT
        shell = subprocess.Popen(["bash", "-c", command], **how, **pipes)
        if dies:
            time.sleep(0.3)
            os.killpg(shell.pid, signal.SIGKILL)
        said = shell.communicate(timeout=60)[0]
        return shell.returncode, said

    def at(self, place: str) -> None:
        if place == self.die_at:
            raise Lost(place)

    def set_up(self) -> None:
        assert self.sh(self.commands("uv run prepare.py"))[0] == 0
        self.until_done(self.commands("uv run experiment.py start"))

    def until_done(self, command: str, dies: bool = False) -> str:
        status, said = self.sh(command, dies)
        if dies:
            raise Lost(command)
        while status == 3:
            status, said = self.sh(self.commands("uv run experiment.py wait"))
        assert status == 0, said
        assert len(said.splitlines()) <= 10, said
        return said

    def experiment(self, idea: str, text: str, fixed: str = "") -> None:
        (self.clone.folder / "train.py").write_text(text, "utf-8")
        self.at(f"{idea}: edited")
        if self.sh(self.commands("AUTORESEARCH_SMOKE=1"))[1] != "exit status 0\n":
            self.sh(self.commands("git checkout train.py"))
            return
        self.at(f"{idea}: checked")
        self.run(idea, fixed)

    def run(self, idea: str, fixed: str = "") -> None:
        command = self.commands("uv run experiment.py run", "wider MLP", idea)
        said = self.until_done(command, dies=self.die_at == f"{idea}: running")
        if "a slip?" in said and fixed:
            (command,) = re.findall(r"a slip\? (git [^;]*);", said)
            assert self.sh(command)[0] == 0
            (self.clone.folder / "train.py").write_text(fixed, "utf-8")
            self.run(idea)

    def resume(self, idea: str) -> None:
        """Do what program.md says when the context is lost."""
        status, said = self.sh(self.commands("uv run experiment.py status"))
        assert status == 0
        if "\nopen: " in said:
            self.until_done(self.commands("uv run experiment.py wait"))
        if self.sh(self.commands("git diff"))[1]:
            self.run(idea)


# Idea, train.py, and what it is after a slip in it is fixed.
PLAN = [
    ("wider MLP", train_py(0.4360)),
    ("no value embeddings", train_py(0.4400) + "# none\n"),
    ("rates x 1.5", train_py(0.4353)),  # 1.7 x noise: both again, kept
    ("softcap 20", train_py(0.4350)),  # 1.4 x noise: again, discarded
    ("fp8 head", train_py(0.40, FAULT="crash")),
    ("a slip", train_py(0.40, FAULT="crash"), train_py(0.4399)),
    ("no compile", train_py(0.40, FAULT="twice")),
    ("bidirectional", train_py(0.10, FAULT="refused")),
    ("a typo", train_py(0.40, SMOKE="crash")),
    ("depth 10", train_py(0.4300, ONCE="gpu")),
]
# Where an agent loses its context; what the night leaves must not depend on it.
LOSSES = ["", "rates x 1.5: edited", "rates x 1.5: running", "depth 10: checked"]


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    return make_origin(tmp_path_factory.mktemp("night") / "origin")


@pytest.fixture
def clone(origin, tmp_path) -> Clone:
    clone = Clone(origin, tmp_path)
    uv = tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text(f'#!/bin/sh\nshift\nexec "{sys.executable}" -S -E "$@"\n')
    uv.chmod(0o755)
    clone.env["PATH"] = f"{uv.parent}:{clone.env['PATH']}"
    return clone


@pytest.mark.parametrize("die_at", LOSSES)
def test_after_the_night_branch_refs_and_log_are_what_they_should_be(clone, die_at):
    agent = Agent(clone, die_at)
    agent.set_up()
    for idea, *texts in PLAN:
        try:
            agent.experiment(idea, *texts)
        except Lost:
            agent = Agent(clone)  # another one
            agent.resume(idea)
    kept = ["start", "wider MLP", "rates x 1.5", "depth 10"]
    assert clone.git("log", "--reverse", "--format=%s").split("\n") == kept
    assert clone.git("branch", "--show-current") == "autoresearch/nov24"
    assert clone.git("status", "--short") == ""

    # Every commit that was ever run is there, with its train.py: two of the idea with a slip.
    ran = {(idea, text) for idea, *texts in PLAN if idea != "a typo" for text in texts}
    pinned = agent.sh(agent.commands("git log --no-walk"))[1].splitlines()
    commits = {
        (idea, clone.git("show", f"{commit}:train.py") + "\n"): commit
        for commit, idea in (line.split(" ", 1) for line in pinned)
    }
    assert set(commits) == ran and len(pinned) == len(ran)
    assert [
        " ".join([row[0], row[2], *row[3].split(", ")[:2]]) for row in clone.rows()
    ] == [
        "0.440000 keep baseline seed 42",
        "0.440500 keep baseline seed 43",
        "0.439600 keep baseline seed 44",
        "0.436000 keep wider MLP seed 42",
        "0.440000 discard no value embeddings seed 42",
        "0.435300 keep rates x 1.5 seed 42",
        "0.436500 keep wider MLP seed 43",
        "0.435800 keep rates x 1.5 seed 43",
        "0.435000 discard softcap 20 seed 42",
        "0.435500 discard softcap 20 seed 43",
        "0.000000 crash fp8 head seed 42",
        "0.000000 crash a slip seed 42",
        "0.439900 discard a slip seed 42",
        "0.000000 crash no compile seed 42",
        "0.000000 crash bidirectional seed 42",
        "0.000000 crash depth 10 seed 42",
        "0.430000 keep depth 10 seed 42",
    ]
    assert "9 experiments, 3 kept" in clone.do("status")
