"""What a stranger installs: the declared packages, from the public index; and safe loads."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import constants as C

ROOT = Path(C.__file__).parent
SCRIPTS = [
    str(p.relative_to(ROOT)) for g in ("*.py", "harness/*.py") for p in ROOT.glob(g)
]


def toml(name: str) -> dict:
    return pytest.importorskip("tomllib").loads((ROOT / name).read_text("utf-8"))


def test_run_time_dependencies_are_those_that_the_scripts_import():
    declared = {
        re.split(r"[^\w-]", d)[0]
        for d in toml("pyproject.toml")["project"]["dependencies"]
    }
    assert declared == {
        "torch",
        "numpy",
        "pyarrow",
        "requests",
        "rustbpe",
        "tiktoken",
        "kernels",
    }


def test_tests_come_with_a_plain_uv_run_and_the_notebook_does_not():
    groups = toml("pyproject.toml")["dependency-groups"]
    assert any(
        d.startswith("pytest") for d in groups["dev"]
    )  # the group that uv installs unasked
    assert not any(re.match("nbclient|matplotlib", d) for d in groups["dev"])
    assert any(d.startswith("matplotlib") for d in groups["analysis"])


def test_the_lock_file_names_the_public_index_alone():
    packages = toml("uv.lock")["package"]
    sources = [package["source"] for package in packages]
    assert len(packages) > 50
    index = {"registry": "https://pypi.org/simple"}
    assert [s for s in sources if s not in (index, {"virtual": "."})] == []
    text = (ROOT / "uv.lock").read_text("utf-8")
    hosts = set(re.findall(r"https?://([^/\"]+)", text))
    assert hosts == {"pypi.org", "files.pythonhosted.org"}


def test_torch_is_pinned_to_the_version_that_was_measured():
    torch = [p for p in toml("uv.lock")["package"] if p["name"] == "torch"]
    assert {p["version"] for p in torch} == {"2.11.0"}
    # Others that were tried may be installed: docs/install.md says which, and how.
    assert "torch>=2.11,<2.16" in toml("pyproject.toml")["project"]["dependencies"]
    page = (ROOT / "docs/install.md").read_text("utf-8")
    tried = {int(n) for n in re.findall(r"^\| 2\.(\d+)\.\d+ \|", page, re.M)}
    assert tried == {*range(11, 16)}


def test_a_clone_with_lines_as_windows_ends_them_has_the_same_rules(tmp_path):
    names = ["constants.py", "prepare.py", "harness/run.py", "README.md", ".ci/run"]
    if subprocess.run(
        ["git", "-C", ROOT, "ls-files", "--error-unmatch", *names]
    ).returncode:
        pytest.skip("needs a git checkout")
    command = ["git", "-c", "core.autocrlf=true", "checkout-index", "-f"]
    subprocess.run([*command, f"--prefix={tmp_path}/", *names], cwd=ROOT, check=True)
    for name in names:
        assert b"\r" not in (tmp_path / name).read_bytes()


def test_the_linter_finds_nothing_new_where_a_night_has_run(tmp_path):
    """The folder runs/ made tests/runs.py an import of ours: three right files, three errors."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for path in (*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py")):
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    (tmp_path / "runs").mkdir(exist_ok=True)
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "I", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_nothing_is_unpickled_and_no_text_is_executed(name):
    tree = ast.parse((ROOT / name).read_text("utf-8"))
    imported = {
        a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names
    }
    imported |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not {i.partition(".")[0] for i in imported} & {
        "pickle",
        "shelve",
        "dill",
        "joblib",
    }
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    called = [
        ast.unparse(n.func) for n in calls if "allow_pickle=False" not in ast.unparse(n)
    ]
    unsafe = {
        "torch.load",
        "np.load",
        "eval",
        "exec",
        "compile",
        "pickle.load",
        "__import__",
    }
    assert not unsafe & set(called)
