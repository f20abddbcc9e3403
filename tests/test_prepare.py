"""Bad input: one clear sentence, last of all, and an exit status that is not 0."""

import contextlib
import errno
import os
import re
import shlex
from pathlib import Path

import pytest

import constants as C
import prepare
from conftest import sentence
from harness.files import PREPARE


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
        (errno.EMFILE, "raise the limit of open files (`ulimit -n 4096`), and run"),
        (errno.ENOMEM, "free some memory, or write the file with smaller row groups"),
        (errno.EIO, "check the disk or the network mount that it is on, and run"),
        (errno.EEXIST, "a link to nowhere is in its place: repair or move that, and"),
        (errno.ENOENT, None),
    ],
)
@pytest.mark.parametrize("place", ["the cache", "above the cache", "an own shard"])
def test_an_error_of_the_system_comes_with_advice(
    cache, monkeypatch, tmp_path, number, advice, place
):
    places = {"the cache": cache / "rows", "above the cache": cache.parent}
    path = places.get(place, tmp_path / "own" / "a.parquet")

    def fail(*_):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(prepare, "prepare", fail)
    said = sentence(prepare.main, [])
    assert said.startswith("prepare.py: [Errno ") and str(path) in said
    if place == "an own shard" and number in (errno.EROFS, errno.EACCES):
        advice = "make it readable, or take it out of its folder, and run"
    assert (advice in said) if advice else said.endswith(f"{path.name}'")


# ---- Advice is a command that works -------------------------------------------------------------
ARGUMENTS = [
    ([], ""),
    (["--num-shards", "3"], " --num-shards 3"),
    (["--num-shards=-1", "--download-workers", "2"], None),
    (["--source", "/my texts/it's"], None),
    (["--source", "hub"], " --source hub"),
]


@pytest.mark.parametrize("argv, line", ARGUMENTS)
@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        OSError(errno.ENOSPC, "No space left on device", "x"),
        ConnectionError(f"shard_00000.parquet: HOST answered 500; run `{PREPARE}` again"),
        ValueError(f"x holds no document; replace it, and run `{PREPARE}`"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_the_command_in_an_advice_repeats_the_run_that_failed(
    cache, monkeypatch, capsys, argv, line, error
):
    def fail(*asked):
        calls.append(asked)
        raise error

    calls, ends = [], []
    monkeypatch.setattr(prepare, "prepare", fail)
    monkeypatch.setattr(prepare.os, "_exit", ends.append)
    monkeypatch.setattr(prepare.signal, "signal", lambda *_: None)
    try:
        prepare.main(argv)
        said = capsys.readouterr().err.strip()
    except SystemExit as end:
        said = end.code
    command = re.search(r"run `(?:A\S+ )?uv run prepare\.py(.*?)`( again|, it|$)", said)[
        1
    ]
    assert line is None or command == line
    with contextlib.suppress(SystemExit):
        prepare.main(shlex.split(command))
    assert len(calls) == 2 and calls[0] == calls[1]


def test_a_command_in_a_message_stands_in_backticks():
    root = Path(C.__file__).parent
    for path in [root / "prepare.py", *root.glob("harness/*.py")]:
        bare = r"[^`]\{(with_socks\()?(PREPARE|TRAIN|command)\b|run (uvx?|nvidia-smi) "
        assert path.name == "files.py" or not re.search(bare, path.read_text()), path


def test_advice_on_windows_is_for_powershell(monkeypatch):
    args = prepare.parse_arguments(["--num-shards", "3", "--source", "/my/it's"])
    said = "uv run prepare.py --num-shards 3 --source '/my/it''s'"
    monkeypatch.setattr(C, "SMOKE", False)
    assert prepare.command_of(args, windows=True) == said
    monkeypatch.setattr(C, "SMOKE", True)
    assert prepare.command_of(args, windows=True) == f"$env:AUTORESEARCH_SMOKE=1; {said}"
    assert prepare.command_of(args, windows=False).startswith("AUTORESEARCH_SMOKE=1 uv")


def test_a_check_that_is_interrupted_does_not_advise_to_prepare(
    cache, monkeypatch, capsys
):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "check", fail)
    monkeypatch.setattr(prepare.os, "_exit", lambda status: None)
    monkeypatch.setattr(prepare.signal, "signal", lambda *_: None)
    prepare.main(["--check"])
    said = capsys.readouterr().err
    assert said.endswith("interrupted; nothing was changed\n")


def test_a_cache_that_is_a_link_to_nowhere_comes_with_advice(
    tmp_path, monkeypatch, cache
):
    (tmp_path / "link").symlink_to(tmp_path / "unmounted")
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "link"))
    assert "is in its place: repair or move that" in sentence(prepare.main, [])
