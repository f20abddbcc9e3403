"""Whether a run can be repeated from its commit: modules git does not track, the environment."""

import subprocess
import sys
from pathlib import Path

import pytest

import constants as C
from harness import repeat
from harness.output import warning
from harness.repeat import environment_read, explain, git_commit, untracked_modules

ROOT = Path(C.__file__).parent
READS = {
    'import os\nLR = float(os.environ["LR"])': ["LR"],
    'import os\nLR = os.environ.get("LR", "1")': ["LR"],
    'import os\nLR = os.getenv("LR")': ["LR"],
    'import os\nLR = 1 if "LR" in os.environ else 2': ["LR"],
    'import os as o\ndef f():\n    return o.getenv("B") or o.environ["A"]': ["A", "B"],
    'from os import environ\nLR = environ["LR"]': ["LR"],
    'from os import environ as e, getenv as g\nA, B = e.get("A"), g("B")': ["A", "B"],
    'import os\nos.environ.setdefault("LR", "1")': ["LR"],
    'import os\nLR = os.environ[f"LR{1}"]': ["..."],
    "import os\nenv = dict(os.environ)": ["..."],
    'import os\nos.environ["LR"] = "1"': [],
    'import os\nos.environ |= {"LR": "1"}': [],
    'import os\nos.environ.update({"LR": "1"}, B="2")': [],
    'import os\ndel os.environ["LR"]': [],
    'import os\nSEED = os.environ["AUTORESEARCH_SEED"]': [],
    'environ = {}\nLR = environ["LR"]': [],
    "LR = 1": [],
    "LR = ": [],
}


@pytest.mark.parametrize("source", READS)
def test_the_variables_that_a_script_reads(tmp_path, source):
    (tmp_path / "train.py").write_text(source)
    assert environment_read(tmp_path / "train.py") == READS[source]


def test_train_py_reads_none():
    assert environment_read(ROOT / "train.py") == []


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A commit with one module in it, which is imported, beside one that is not tracked."""
    for name in ("known_to_git", "new_to_git"):
        (tmp_path / f"{name}.py").write_text("")
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@localhost"]
    for command in (["init", "-q"], ["add", "known_to_git.py"]):
        subprocess.run([*git, *command], check=True)
    commit = ["-c", "commit.gpgsign=false", "commit", "-qm", "start"]
    subprocess.run([*git, *commit], check=True)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("known_to_git", "new_to_git"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import known_to_git  # noqa: F401

    return tmp_path


def test_modules_that_git_does_not_track_are_named_once_they_are_imported(checkout):
    assert explain(checkout, []) == []
    import new_to_git  # noqa: F401

    assert untracked_modules(checkout) == ["new_to_git.py"]
    (line,) = explain(checkout, [])
    assert "new_to_git.py" in line and "known_to_git" not in line


def test_the_environment_and_what_lies_in_it_is_not_ours(checkout, monkeypatch):
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "installed_there.py").write_text("")
    monkeypatch.syspath_prepend(checkout / ".venv")
    monkeypatch.delitem(sys.modules, "installed_there", raising=False)
    import installed_there  # noqa: F401

    assert untracked_modules(checkout) == [".venv/installed_there.py"]
    monkeypatch.setattr(sys, "prefix", str(checkout / ".venv"))
    assert untracked_modules(checkout) == []


def test_modules_of_a_checkout_below_the_cache_are_named(checkout, monkeypatch):
    import new_to_git  # noqa: F401

    monkeypatch.setattr(sys, "prefix", str(checkout.parent))
    monkeypatch.setattr("harness.repeat.data_dir", lambda: checkout.parent / "climbmix")
    assert untracked_modules(checkout) == ["new_to_git.py"]


def test_a_folder_that_is_no_checkout_has_no_commit_and_no_lines(tmp_path):
    assert git_commit(tmp_path) == "none" and untracked_modules(tmp_path) == []


def test_a_machine_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit(ROOT) == "none" and repeat.git(ROOT, "status") is None


def test_a_line_of_the_loader_on_stderr_is_not_taken_for_the_commit(monkeypatch):
    commit = git_commit(ROOT)
    monkeypatch.setenv("LD_PRELOAD", "/nowhere/lib.so")  # "ERROR: ld.so: object ..."
    assert git_commit(ROOT) == commit and "\n" not in commit


def test_the_warning_voids_nothing():
    assert warning("repeat", "x") == "warning: repeat: x" and not C.WARNINGS["repeat"]
