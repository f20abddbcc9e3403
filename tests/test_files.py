"""Files appear whole or not at all, and lie where the environment says."""

import ast
import errno
import hashlib
import os
import re
from pathlib import Path

import pytest

import constants as C
from harness.files import (
    atomic_write,
    command_with,
    content_key,
    data_dir,
    describe,
    naming,
    remove_temporaries,
)


def test_failed_block_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        with atomic_write(path) as file:
            file.write(b"half of the new")
            file.flush()
            assert path.read_bytes() == b"old"
            raise KeyboardInterrupt
    assert ([*tmp_path.iterdir()], path.read_bytes()) == ([path], b"old")


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    kept = [
        ".lock",
        ".shard.parquet.0a1b.part",
        "file",
        "place/file",
        "place/in/.f.7.tmp",
    ]
    for name in [*kept, ".file.7.tmp", "place/.file.8.tmp"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    remove_temporaries(tmp_path, 8)
    assert (tmp_path / ".file.7.tmp").exists()  # that process may be at work
    assert not (tmp_path / "place" / ".file.8.tmp").exists()
    remove_temporaries(tmp_path)
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {*kept}


def test_a_missing_file_is_described_as_an_empty_one(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    nothing = {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    assert describe(tmp_path / "file") == describe(tmp_path / "none") == nothing
    (tmp_path / "file").write_bytes(b"ab")
    assert describe(tmp_path / "file") == {
        "size": 2,
        "sha256": hashlib.sha256(b"ab").hexdigest(),
    }


def test_a_key_changes_with_any_part():
    parts = [[1, "a"], {"b": 2}]
    others = [
        [[1, "b"], {"b": 2}],
        [[1, "a"], {"b": 3}],
        [[1, "a"]],
        [[1], "a", {"b": 2}],
    ]
    keys = [content_key(*parts), *(content_key(*other) for other in others)]
    assert len({*keys}) == 5 and content_key(*parts) == keys[0]
    assert all(re.fullmatch("[0-9a-f]{12}", key) for key in keys)


def test_an_error_without_a_name_is_given_that_of_its_file(tmp_path):
    with pytest.raises(OSError, match="No space left on device.*some/file"):
        with naming(Path("some/file")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(ConnectionError, match="^the hub$"):  # not of the system
        with naming(Path("some/file")):
            raise ConnectionError("the hub")


def test_cache_folder_can_be_moved_and_smoke_has_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "elsewhere"))
    smoke = data_dir()
    monkeypatch.setattr(C, "SMOKE", False)
    full = data_dir()
    assert smoke.parent == full.parent == tmp_path / "elsewhere"
    assert smoke != full
    monkeypatch.setenv("AUTORESEARCH_CACHE", "~/moved")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_dir().parent == tmp_path / "moved"
    monkeypatch.delenv("AUTORESEARCH_CACHE")
    assert data_dir().parent == tmp_path / ".cache" / "autoresearch"


# ---- Commands in advice -------------------------------------------------------------------------
def test_a_variable_is_set_in_the_form_of_the_shell():
    said = command_with("CUDA_VISIBLE_DEVICES=-1", "uv run sample.py", windows=True)
    assert said == "$env:CUDA_VISIBLE_DEVICES=-1; uv run sample.py"
    said = command_with("CUDA_VISIBLE_DEVICES=-1", "uv run sample.py", windows=False)
    assert said == "CUDA_VISIBLE_DEVICES=-1 uv run sample.py"


def texts(path: Path) -> list[str]:
    """Return the strings in a file of Python, docstrings left out."""
    tree = ast.parse(path.read_text("utf-8"))
    bare = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    constants = [n for n in ast.walk(tree) if isinstance(n, ast.Constant)]
    return [str(n.value) for n in constants if id(n) not in bare]


def test_no_advice_sets_a_variable_in_the_posix_form_alone():
    root = Path(C.__file__).parent
    paths = [*root.glob("*.py"), *root.glob("harness/*.py")]
    found = [text for path in paths for text in texts(path)]
    assert [t for t in found if re.search(r"\b[A-Z_]{4,}=\S* (uv|in front)", t)] == []
