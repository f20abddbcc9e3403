"""Bad input: one clear sentence, last of all, and an exit status that is not 0."""

import errno
import os
import re

import pytest
from conftest import sentence

import constants as C
import prepare


def test_preparation_that_fails_in_torch_or_threads_does_not_say_prepared(
    monkeypatch, capsys
):
    def fail(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(prepare, "prepare", fail)
    with pytest.raises(RuntimeError, match="new thread"):
        prepare.main([])
    assert "prepared" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        ["--num-shards", "0"],
        ["--num-shards", "-2"],
        ["--num-shards", "9999"],
        ["--num-shards", str(C.VAL_SHARD + 1)],
        ["--num-shards", "many"],
        ["--download-workers", "0"],
        ["--download-workers", "1000"],
    ],
)
def test_command_refuses_senseless_numbers(argv, cache, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        prepare.main(argv)
    assert end.value.code == 2
    last, most = capsys.readouterr().err.splitlines()[-1], {"--num-shards": C.VAL_SHARD}
    assert argv[0] in last
    assert argv[1] == "many" or f"1 to {most.get(argv[0], 64)}" in last
    assert list(tmp_path.iterdir()) == []


def test_all_shards_means_all_but_the_validation_shard(cache, monkeypatch):
    asked = []

    def ensure_shards(folder, names, *_):
        asked.extend(names)
        raise ConnectionError("enough is known")

    monkeypatch.setattr("harness.data.ensure_shards", ensure_shards)
    with pytest.raises(SystemExit):
        prepare.main(["--num-shards", "-1"])
    assert len(asked) == 6543 and asked[-2:] == [
        "shard_06541.parquet",
        "shard_06542.parquet",
    ]


def test_the_help_and_the_docstring_of_prepare_agree(capsys):
    with pytest.raises(SystemExit):
        prepare.main(["--help"])
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert set(re.findall(r"--[a-z-]+", prepare.__doc__)) <= options


@pytest.mark.parametrize(
    "number, advice",
    [
        (errno.ENOSPC, "free some space or move AUTORESEARCH_CACHE, and run"),
        (errno.EDQUOT, "free some space or move AUTORESEARCH_CACHE, and run"),
        (errno.EROFS, "make it writable or set AUTORESEARCH_CACHE to a folder that is"),
        (errno.EACCES, "make it writable or set AUTORESEARCH_CACHE to a folder that is"),
        (errno.ENOENT, None),
    ],
)
def test_an_error_of_the_system_comes_with_advice(
    cache, monkeypatch, tmp_path, number, advice
):
    def fail(*_):
        raise OSError(number, os.strerror(number), str(tmp_path / "a file"))

    monkeypatch.setattr(prepare, "prepare", fail)
    said = sentence(prepare.main, [])
    assert said.startswith("prepare.py: [Errno ") and str(tmp_path / "a file") in said
    assert (advice in said) if advice else said.endswith("a file'")
