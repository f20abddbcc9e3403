"""The log of a night as people and programs leave it, and what a run's own log says."""

import os
from pathlib import Path

import pytest

from loop import ledger
from loop.ledger import HEADER, Line, plain, read_log, read_run


def test_a_line_comes_back_as_it_was_written():
    words = "wider MLP, seed 42, gpu 1, 2747 steps, 1.200 M tok/s, void: gpu"
    line = Line("12e45678", 0.441812, 58.7, "crash", words)
    (read,) = read_log(HEADER + line.text() + "\n")
    assert (read.idea, read.seed, read.gpu, read.speed) == ("wider MLP", 42, "1", 1.2)
    assert (read.void, read.valid, read.text()) == ("gpu", False, line.text())


@pytest.mark.parametrize(
    "description, idea, seed",
    [
        ("lr 0.1, seed 42", "lr 0.1", 42),
        (
            "a, seed 7 for all, seed 43, 2747 steps, 1.200 M tok/s",
            "a, seed 7 for all",
            43,
        ),
        ("baseline lr doubled, seed 42", "baseline lr doubled", 42),
        ('"quoted, seed 42', '"quoted', 42),
        ("d, seed 42, 35 steps under the smoke rules", "d", 42),
        ("by hand", "", 0),
    ],
)
def test_an_idea_may_have_any_words(description, idea, seed):
    (line,) = read_log(f"abc1234\t0.44\t58.7\tkeep\t{description}")
    assert (line.idea, line.seed, line.valid) == (idea, seed, True)


def test_a_log_as_people_and_programs_leave_it():
    text = "\ufeff" + HEADER.replace("\n", "\r\n")
    text += '12e4567\t0.44\t58.7\tkeep\t"a "quoted" idea, seed 42\r\n'
    text += "1234567\tnan\t58.7\tkeep\tb, seed 42\n\n"
    text += "0000000\tn/a\tn/a\tdiscard\tc, seed 42\n"
    text += "1e5\t0.000000\t0.0\tcrash\td, seed 42\n"
    text += "abcdef0\t0.4"  # torn
    lines = read_log(text)
    assert [x.commit for x in lines] == ["12e4567", "1234567", "0000000", "1e5", ""]
    assert [x.valid for x in lines] == [True, False, False, False, False]
    assert [x.status for x in lines] == ["keep", "keep", "discard", "crash", ""]
    assert lines[0].idea == '"a "quoted" idea' and lines[-1].description == "abcdef0\t0.4"
    assert read_log("") == read_log(HEADER) == read_log(HEADER.rstrip("\n")) == []


def test_what_is_said_of_an_idea_fits_on_a_line():
    assert plain("a\tb\nc\x00 `d` $e \"f\" 'g'\r\n é\u2028") == "a b c `d` $e \"f\" 'g' é"


@pytest.fixture
def log(tmp_path) -> Path:
    (tmp_path / "runs").mkdir()
    (tmp_path / "results.tsv").write_text(HEADER + "torn\t0.4")
    return tmp_path / "results.tsv"


def test_a_torn_line_is_ended_before_the_next(log):
    ledger.rewrite(log, lambda lines: [*lines, "a\t1\t1\tkeep\tx"])
    assert log.read_text() == HEADER + "torn\t0.4\na\t1\t1\tkeep\tx\n"


def test_a_line_is_written_also_where_the_folder_of_runs_is_gone(tmp_path):
    ledger.rewrite(tmp_path / "results.tsv", lambda lines: [*lines, "a line"])
    assert (tmp_path / "results.tsv").read_text().endswith("\na line\n")


@pytest.mark.parametrize("broken", ["write", "fsync", "replace"])
def test_a_line_on_a_full_disk_is_not_written_in_part(log, monkeypatch, broken):
    def full(*args):
        raise OSError(28, "No space left on device")

    if broken == "write":
        monkeypatch.setattr(ledger, "open", lambda *a: Full(a[0]), raising=False)
    else:
        monkeypatch.setattr(os, broken, full)
    before = log.read_bytes()
    with pytest.raises(OSError, match="No space"):
        ledger.write_whole(log, b"x" * 100)
    assert log.read_bytes() == before
    assert sorted(p.name for p in log.parent.iterdir()) == ["results.tsv", "runs"]


class Full:
    """A file on a disk that fills up in the middle of a line."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def write(self, content: bytes):
        self.path.write_bytes(content[:10])
        raise OSError(28, "No space left on device")


KINDS = {"gpu": True, "edit": False}
SUMMARY = "warning: uv: x\n---\nval_bpb: 0.44\nattention: fa3\n\nexit status 0\n"


@pytest.mark.parametrize(
    "text, ok, void",
    [
        (SUMMARY, True, ""),
        (SUMMARY.replace("\n", "\r\n"), True, ""),
        ("\0" * 99 + SUMMARY, True, ""),
        ("warning: edit: x\n" + SUMMARY, True, ""),
        ("warning: gpu: x\n" + SUMMARY, True, "gpu"),
        (SUMMARY.replace("fa3", "flex"), True, "attention"),
        (SUMMARY.replace("attention: fa3\n", ""), True, "attention"),
        (SUMMARY.replace("status 0", "status 1"), False, ""),
        ("val_bpb: 0.1\n" + SUMMARY, False, ""),
        (SUMMARY.replace("val_bpb: 0.44\n", ""), False, "attention"),
        (SUMMARY.replace("0.44", "nan"), False, ""),
        (SUMMARY.replace("\nexit", "---\nattention: mine\n\nexit"), True, ""),
        ("exit status 137\n", False, "attention"),
    ],
)
def test_what_counts_as_a_result(text, ok, void):
    result = read_run(text, KINDS, {"attention": "fa3"})
    assert result.ok is ok and (result.void == void or not ok)
    assert result.notes == (["warning: edit: x"] if "edit" in text else [])


def test_a_run_whose_fused_kernels_were_wrong_does_not_compare_with_one_where_not():
    fell_back = f"kernels: in fp8 on this GPU a is wrong; plain torch serves\n{SUMMARY}"
    for baseline, other in ((SUMMARY, fell_back), (fell_back, SUMMARY)):
        basis = {"kernels": read_run(baseline, KINDS, {}).values["kernels"]}
        assert read_run(other, KINDS, basis).void == "kernels"
        assert read_run(baseline, KINDS, basis).void == ""


def test_the_last_words_of_a_run_are_not_torchs_advice():
    said = "InductorError: no C compiler\n\nSet TORCHDYNAMO_VERBOSE=1 for more\n"
    result = read_run(f"a\nb\n{said}no result\n\nexit status 1\n", KINDS, {})
    assert result.last == "b\nInductorError: no C compiler\nno result"


def test_a_run_that_has_not_ended_is_none():
    assert read_run(SUMMARY.partition("exit")[0], KINDS, {}) is None


def test_a_log_of_gigabytes_is_read_by_its_ends(tmp_path):
    log = tmp_path / "x.log"
    with open(log, "wb") as file:
        file.write(b"warning: edit: x\n")
        file.seek(2**33)  # a hole
        file.write(f"\n{SUMMARY}".encode())
    text = ledger.read_ends(log)
    assert len(text) <= 2**23
    result = read_run(text, KINDS, {"attention": "fa3"})
    assert result.ok and result.notes == ["warning: edit: x"]
    log.write_text(SUMMARY)
    assert ledger.read_ends(log, most=9) == SUMMARY[:9] + SUMMARY[-9:]
    assert ledger.read_ends(log, most=len(SUMMARY) // 2 + 1) == SUMMARY
