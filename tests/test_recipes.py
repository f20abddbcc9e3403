"""Nights by the commands of docs/recipes.md.

`ssh` and `srun` run what they are told on this machine, as the real ones do: in a session of
its own, which outlives them.
"""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from night import Clone, make_origin, train_py

pytestmark = pytest.mark.skipif(not shutil.which("timeout"), reason="not on macOS")
ROOT = Path(__file__).resolve().parent.parent
APART = f"""#!{sys.executable} -SE
import os, subprocess, sys
def apart(command, **how):
    # A lock of ours that it held would stay with it.
    child = subprocess.Popen(command, start_new_session=True, close_fds=True, **how)
    with open(os.environ["NIGHT_HOME"] + "/last", "w") as file:
        file.write(str(child.pid))
    sys.exit(child.wait())
"""
SSH = """
clean = {k: v for k, v in os.environ.items() if not k.startswith("AUTORESEARCH_")}
there = os.environ["NIGHT_HOME"] + "/there"
apart(["sh", "-c", " ".join(sys.argv[2:])], cwd=there, env=clean)
"""
SRUN = """
job, command = "", sys.argv[1:]
while command[0].startswith("--"):
    name, _, value = command.pop(0).partition("=")
    job = value if name == "--jobid" else job
if "7" not in (job, os.environ.get("SLURM_JOB_ID")):
    sys.exit("srun: job 8 queued and waiting for resources")
apart(command)
"""
SALLOC = "export SLURM_JOB_ID=7\n"  # and it starts a shell
LATER = 6  # seconds for the recipes' 900, one more than a run has here


def block(title: str) -> str:
    """Return the commands below a heading."""
    text = (ROOT / "docs" / "recipes.md").read_text("utf-8").partition(f"## {title}")[2]
    return re.search(r"```sh\n(.*?)```", text, re.DOTALL)[1]


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    folder = make_origin(tmp_path_factory.mktemp("night") / "origin")
    (folder / ".gitignore").open("a").write("\n.venv/\n")
    call = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*call, "commit", "-qam", "an environment"], check=True)
    return folder


@pytest.fixture
def clone(origin, tmp_path) -> Clone:
    """A clone in which no night has begun, and another one behind ssh."""
    clone = Clone(origin, tmp_path)
    there = tmp_path / "there" / "autoresearch"
    subprocess.run(["git", "clone", "-q", origin, there], check=True)
    clone.git("switch", "-q", "--detach", cwd=there)
    python = f'#!/bin/sh\nexec "{sys.executable}" -SE "$@"\n'
    scripts = {"ssh": APART + SSH, "srun": APART + SRUN}
    scripts["uv"] = python.replace("exec", "shift\nexec")
    (tmp_path / "bin").mkdir()
    for name, text in scripts.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    venv = clone.folder / ".venv" / "bin" / "python"
    venv.parent.mkdir(parents=True)
    venv.write_text(python)
    venv.chmod(0o755)
    clone.env["PATH"] = f"{tmp_path / 'bin'}:{clone.env['PATH']}"
    del clone.env["AUTORESEARCH_RUN"]
    return clone


def start(clone: Clone, title: str) -> None:
    """Do what the recipe says, with other limits."""
    commands = re.sub("^salloc .*\n", SALLOC, block(title), flags=re.MULTILINE)
    said = clone.call(["bash", "-ec", commands.replace(" 900 ", f" {LATER} ")])
    assert "noise 0.000500" in said, said


PLACES = ["A GPU behind ssh", "SLURM"]


@pytest.mark.parametrize("title", PLACES)
def test_later_shells_need_nothing_of_the_shell_that_began_the_night(clone, title):
    start(clone, title)
    assert "keep: " in clone.experiment("wider MLP", 0.43)
    said = clone.experiment("fp8 head", 0.42, FAULT="crash")
    assert "crash: " in said and "training loss is nan" in said
    seeds = [re.search(r"seed (\d+)", row[3])[1] for row in clone.rows()]
    assert seeds == ["42", "43", "44", "42", "42"]
    assert [row[0] for row in clone.rows()[:3]] == ["0.440000", "0.440500", "0.439600"]


def test_a_run_under_slurm_is_not_left_with_one_cpu_of_its_job():
    """From 22.05 on, srun does not take over what salloc was told."""
    allocated, used = re.findall(r"--cpus-per-task=(\d+)", block("SLURM"))
    assert allocated == used


def test_a_lost_connection_is_no_slip_of_the_edit(clone):
    start(clone, "A GPU behind ssh")
    ssh = clone.folder.parent / "bin" / "ssh"
    script = ssh.read_text()
    for broken, fault in (
        (script, "print('Connection closed.'); raise SystemExit(255)"),
        ("#!/bin/sh\nexit 255\n", train_py(0.43)),  # before git push
    ):
        ssh.write_text(broken)
        (clone.folder / "train.py").write_text(fault)
        said = clone.do("run", "wider MLP")
        assert "crash: " in said and "connection failed, fix nothing" in said


@pytest.mark.parametrize("title", PLACES)
def test_a_run_that_hangs_does_not_hold_the_gpu_elsewhere_for_ever(clone, title):
    start(clone, title)
    assert "crash: " in clone.experiment("hangs", 0.43, FAULT="hangs")
    session = (clone.folder.parent / "last").read_text()
    assert at_work(session)
    end = time.monotonic() + LATER
    while at_work(session):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert "keep: " in clone.experiment("next", 0.42)


def at_work(session: str) -> bool:
    """Return whether a process of a session is at work."""
    call = ["ps", "-o", "stat=", "-s", session]
    said = subprocess.run(call, capture_output=True, text=True).stdout
    return any(line[:1] != "Z" for line in said.splitlines())
