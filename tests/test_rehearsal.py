"""The start of a first run, when data is prepared: the next process finds what it compiled."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import constants as C
import forks
import prepare
import runs
from conftest import copy_checkout, ends_with_its_parent
from harness import gpu, health, rehearsal
from harness.files import data_dir
from harness.rehearsal import rehearse

ROOT = Path(C.__file__).parent
# Stands for what train.py compiles: an operator, since plain torch would be compiled as C++.
COMPILED = """
import atexit, json
import torch._functorch.config
from torch._dynamo.utils import counters

@torch.library.custom_op("t::scale", mutates_args=())
def scale(x: torch.Tensor, k: float) -> torch.Tensor: return x * k
scale.register_fake(lambda x, k: torch.empty_like(x))
scale.register_autograd(
    lambda ctx, g: (scale(g, 3.0), None), setup_context=lambda ctx, inputs, output: None
)
scaled = torch.compile(lambda x: scale(x, 3.0))
"""
COUNTED = """
def main():
    try:
        start()
    finally:
        said = [k.rpartition("_")[2] for k in counters["aot_autograd"] if "_cache_" in k]
        Path("said.json").write_text(json.dumps(said))
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A copy of the repository whose train.py compiles an operator and notes the cache's hits."""
    folder = copy_checkout(tmp_path / "checkout")
    runs.apply(folder, [*runs.SMALLER, runs.NO_DRY_RUN])
    text = (ROOT / "tests" / "minimal_train.py").read_text("utf-8")
    for old, new in (
        ("\nimport torch\n", "\nfrom pathlib import Path\nimport torch\n"),
        ("\nN_EMBD =", COMPILED + "\nN_EMBD ="),
        ("return self.lm_head(", "return self.lm_head(0 * scaled(x) + "),
        ("def main(", "def start("),
        ("\nif __name__", COUNTED + "\n\nif __name__"),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "train.py").write_text(text, "utf-8")
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    return folder


def test_the_run_after_a_rehearsal_is_warm_and_the_first(checkout):
    assert re.fullmatch(r"compile: done in \d+ s", rehearse(checkout / "train.py"))
    said = json.loads((checkout / "said.json").read_text())
    assert "miss" in said and "hit" not in said
    (data,) = (checkout.parent / "cache").glob("*/manifest.json")
    assert not (data.parent / "last_run.json").exists()
    assert not [*checkout.glob("*.npz")]  # no model: nothing was trained
    run = forks.run("train.py", folder=checkout)
    assert run.returncode == 0 and "\nval_bpb: " in run.stdout, run.stdout + run.stderr
    assert {*json.loads((checkout / "said.json").read_text())} == {"hit"}


@pytest.fixture
def script(tmp_path):
    """The path of a train.py beside harness/, to be written."""
    (tmp_path / "harness").symlink_to(ROOT / "harness")
    (tmp_path / "constants.py").symlink_to(ROOT / "constants.py")
    return tmp_path / "train.py"


def test_a_rehearsal_that_fails_is_a_line(script):
    script.write_text("print('attention: fa3'); raise ValueError('DEPTH is what it is')")
    line = rehearse(script)
    assert line.startswith("compile: left to the first experiment")
    assert line.endswith("ValueError: DEPTH is what it is")


def test_a_rehearsal_names_the_error_and_not_what_torch_and_the_run_add(script):
    script.write_text(
        "from harness import guard; from types import SimpleNamespace as Run\n"
        "guard.demand_result(Run(printed=False))\n"
        "advice = 'Set TORCHDYNAMO_VERBOSE=1 for the internal stack trace'\n"
        "raise ValueError('Failed to find C compiler.\\n\\n' + advice)"
    )
    assert rehearse(script).endswith("; ValueError: Failed to find C compiler.")


def test_a_rehearsal_that_is_killed_is_a_line(script):
    script.write_text(
        "import os; print('attention: fa3', flush=True); os.kill(os.getpid(), 9)"
    )
    assert rehearse(script).endswith("; signal 9 ended it")


def test_a_rehearsal_uses_the_data_of_a_relative_folder(script, tmp_path, monkeypatch):
    script.write_text("from harness.files import data_dir; raise ValueError(data_dir())")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("AUTORESEARCH_CACHE", "cache")
    assert rehearse(script).endswith(f": {data_dir()}")


def test_a_rehearsal_does_not_wait_for_a_process_that_train_py_left_behind(script):
    script.write_text(
        "import subprocess; child = subprocess.Popen(['sleep', '50']); raise ValueError(child.pid)"
    )
    start = time.monotonic()
    line = rehearse(script)
    assert time.monotonic() - start < 40
    os.kill(int(line.split()[-1]), signal.SIGKILL)


def test_a_rehearsal_ends_when_prepare_py_is_killed(script, tmp_path):
    script.write_text(
        "import os, time; from pathlib import Path\n"
        "Path('pid').write_text(str(os.getpid())); time.sleep(50); Path('late').touch()"
    )
    code = f"from harness.rehearsal import *; rehearse(Path({str(script)!r}))"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    ends_with_its_parent(parent, tmp_path / "pid")


def test_a_rehearsal_leaves_a_gpu_alone_that_another_process_uses(monkeypatch, tmp_path):
    found = [4, os.getppid()]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (79 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(gpu, "has_own_memory", lambda device: True)
    monkeypatch.setattr(health, "list_gpu_processes", lambda device: found)
    found += [os.getpid()]
    with pytest.raises(SystemExit, match="another process uses the GPU"):
        rehearsal.Rehearsal(tmp_path, torch.device("cuda"))
    found.remove(4)  # prepare.py itself is left
    with pytest.raises(ValueError, match="nothing is prepared"):
        rehearsal.Rehearsal(tmp_path, torch.device("cuda"))


def test_a_rehearsal_that_takes_too_long_is_a_line(tmp_path, monkeypatch):
    def run(*_, timeout, **__):
        raise subprocess.TimeoutExpired("python", timeout)

    monkeypatch.setattr(subprocess, "run", run)
    assert "timed out after 600 seconds" in rehearse(tmp_path / "train.py")


@pytest.mark.parametrize(
    "smoke, gpu, asked, rehearsed",
    [
        (False, True, True, 1),
        (False, True, False, 0),  # train.py prepares: it compiles by itself
        (False, False, True, 0),
        (True, True, True, 0),
    ],
)
def test_prepare_rehearses_where_there_is_a_gpu(
    smoke, gpu, asked, rehearsed, monkeypatch, capsys
):
    scripts = []
    monkeypatch.setattr(C, "SMOKE", smoke)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(prepare, "prepare", lambda *_: None)
    monkeypatch.setattr(prepare, "load_flash_attention", lambda: None)
    monkeypatch.setattr(
        rehearsal, "rehearse", lambda s: scripts.append(s) or "compile: so"
    )
    prepare.main([], asked)
    assert scripts == [ROOT / "train.py"] * rehearsed
    assert ("compile: so" in capsys.readouterr().out) == rehearsed
