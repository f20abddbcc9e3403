"""experiment.py in throw-away clones with real git: what it decides, and what it survives."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from loop.git import Refused, fcntl, lock, merge_lines
from loop.ledger import plain
from night import Clone, make_origin, runs_begun, train_py, wait_until

ROOT = Path(__file__).resolve().parent.parent
BASELINE = ["keep baseline, seed 42", "keep baseline, seed 43", "keep baseline, seed 44"]


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    return make_origin(tmp_path_factory.mktemp("night") / "origin")


@pytest.fixture
def fresh(origin, tmp_path) -> Clone:
    """A clone in which no night has begun."""
    return Clone(origin, tmp_path)


@pytest.fixture(scope="module")
def begun(origin, tmp_path_factory) -> Clone:
    clone = Clone(origin, tmp_path_factory.mktemp("begun"))
    assert "noise 0.000500" in clone.do("start", "nov24")
    return clone


@pytest.fixture
def clone(begun, tmp_path) -> Clone:
    """A clone with a baseline."""
    return begun.copy(tmp_path)


# ---- A night -----------------------------------------------------------------------------
def test_a_change_is_kept_repeated_or_discarded_by_the_table(clone):
    assert "keep: " in clone.experiment("wider MLP", 0.436)
    assert clone.value() == 0.436
    said = clone.experiment("rates x 1.5", 0.4353)  # 1.4 noises: both repeat
    assert (
        "gain +0.000700, +1.73 x noise 0.000405" in said and len(said.splitlines()) <= 10
    )
    assert "discard: " in clone.experiment("softcap 20", 0.4352)
    assert clone.value() == 0.4353 and clone.git("status", "--short") == ""
    assert "discard: " in clone.experiment("worse", 0.5)
    assert clone.said() == [
        *BASELINE,
        "keep wider MLP, seed 42",
        "keep rates x 1.5, seed 42",
        "keep wider MLP, seed 43",
        "keep rates x 1.5, seed 43",
        "discard softcap 20, seed 42",
        "discard worse, seed 42",
    ]
    kept = ["start", "wider MLP", "rates x 1.5"]
    assert clone.git("log", "--reverse", "--format=%s").split("\n") == kept
    pinned = clone.git("log", "--no-walk", "--format=%h %s", "--glob=refs/attempts")
    assert len(pinned.splitlines()) == 4 and "softcap 20" in pinned
    assert "2747 steps, 1.200 M tok/s" in clone.rows()[3][3]


def test_the_way_back_to_the_baselines_memory_and_length_has_no_higher_bars(clone):
    assert "keep: " in clone.experiment("smaller", 0.43, lines=-20, MEMORY=30)
    said = clone.experiment("shorter, but larger", 0.4302, lines=-21, MEMORY=58)
    assert "discard: " in said and "simpler" not in said
    said = clone.experiment("as before", 0.427, lines=0, MEMORY=58)
    assert "keep: " in said and "bars doubled" not in said
    assert "bars doubled" in clone.experiment("too large", 0.424, MEMORY=70)
    assert "bars doubled" in clone.experiment("too long", 0.424, lines=25)


def test_a_train_py_with_a_byte_that_is_not_utf_8_gets_a_verdict(clone):
    text = b"# -*- coding: latin-1 -*-\n# caf\xe9\n" + train_py(0.43).encode()
    (clone.folder / "train.py").write_bytes(text)
    assert "keep: " in clone.do("run", "a remark") and goes_on(clone)


def test_a_train_py_that_is_shorter_by_comments_alone_is_not_simpler(clone):
    text = train_py(0.4401, lines=-1)
    said = ['"""One\nand\ntwo."""\n', "# a comment\n\n", "LINE = 0  # ends a line\n"]
    (clone.folder / "train.py").write_text("".join([text, *said]))
    assert "discard: " in (told := clone.do("run", "remarks"))
    assert "+0 lines of code)" in told
    (clone.folder / "train.py").write_text(text)
    assert "keep: " in (told := clone.do("run", "without a line"))
    assert "-1 lines of code: simpler)" in told


def test_what_is_shorter_and_equal_is_kept_and_what_is_longer_needs_more(clone):
    assert "discard: " in clone.experiment("equal", 0.4401)
    assert "keep: " in clone.experiment("shorter", 0.4401, lines=-5)
    assert "discard: " in clone.experiment("shorter again", 0.4406, lines=-9)
    assert "discard: " in clone.experiment("long", 0.4392, lines=30)
    assert "bars doubled" in clone.experiment("large", 0.4385, MEMORY=70.0)
    assert "keep: " in clone.experiment("long and good", 0.43, lines=30)


def test_a_crash_says_why_and_an_idea_that_is_fixed_counts_once(clone):
    said = clone.experiment("fp8 head", 0.4, FAULT="crash")
    assert "crash: " in said and "training loss is nan" in said
    assert clone.value() == 0.44 and clone.git("status", "--short") == ""
    restore = next(line for line in said.splitlines() if "a slip?" in line)
    clone.call(restore.partition("a slip? ")[2].partition(";")[0].split())
    assert clone.value() == 0.4
    assert "keep: " in clone.experiment("fp8 head", 0.4)
    assert "1 experiment, 1 kept" in clone.do("status")
    assert clone.rows()[3][:3] == ["0.000000", "0.0", "crash"]


@pytest.mark.parametrize("fault", ["refused", "hangs", "twice"])
def test_no_result_is_a_crash(clone, fault):
    said = clone.experiment(fault, 0.4, FAULT=fault)
    assert "crash: " in said and len(said.splitlines()) <= 10
    assert ("2 lines begin with val_bpb:" in said) == (fault == "twice")
    assert clone.said()[3:] == [f"crash {fault}, seed 42"] and goes_on(clone)


def goes_on(clone: Clone) -> bool:
    """Return whether the night is as it should be after a fault, and goes on."""
    said = clone.do("status")
    assert "open: " not in said
    assert clone.git("branch", "--show-current") == "autoresearch/nov24"
    rows = clone.rows()
    assert "keep: " in clone.experiment("after the fault", 0.30)
    assert clone.rows()[: len(rows)] == rows and len(clone.rows()) == len(rows) + 1
    return clone.value() == 0.30


@pytest.mark.parametrize("once", [{"ONCE": "gpu"}, {"ONCE": "attention"}])
def test_a_void_run_is_run_again(clone, once):
    said, kind = clone.experiment("depth 10", 0.43, **once), once["ONCE"]
    assert "keep: " in said and f"void once ({kind}), and run again" in said
    assert clone.rows()[3][:3] == ["0.000000", "0.0", "crash"]
    assert clone.rows()[3][3].endswith(f"M tok/s, void: {kind}")
    assert clone.said()[4:] == ["keep depth 10, seed 42"]


def test_an_idea_copied_from_a_void_line_is_not_void_for_ever(clone):
    clone.experiment("depth 10", 0.43, ATTENTION="flex")
    clone.experiment(clone.rows()[-1][3], 0.43)
    assert clone.said()[-1] == "keep depth 10, seed 42"


def test_a_run_that_is_always_void_ends_after_three(clone):
    said = clone.experiment("flex", 0.40, ATTENTION="flex")
    assert "void: " in said and "3 times (attention)" in said
    assert clone.said()[3:] == ["crash flex, seed 42, void: attention"] * 3
    assert goes_on(clone)


def test_a_run_on_other_data_is_void_at_once_and_says_what_differs(clone):
    """Three runs, and then a log without a word of it, were the night's quarter of an hour."""
    mark = clone.folder.parent / "other rules"
    mark.touch()
    said = clone.experiment("wider MLP", 0.43)
    assert "rules: full-22222222, and full-0a1b2c3d in the baseline" in said
    assert "put them back" in said and "; `run`" in said
    assert clone.said()[3:] == ["crash wider MLP, seed 42, void: rules"]
    mark.unlink()
    assert goes_on(clone)


def test_repeats_that_other_data_stops_are_not_counted_to_a_verdict(clone):
    assert "keep: " in clone.experiment("first", 0.43)
    change = (
        "open(os.path.join(here, 'other rules'), 'w')\n"  # before the best runs again
    )
    (clone.folder / "train.py").write_text(train_py(0.4291) + change)
    assert "put them back" in clone.do("run", "second", status=1)
    for _ in range(8):
        assert "put them back" in clone.do("wait", status=1)
    (clone.folder.parent / "other rules").unlink()
    assert "val_bpb 0.429100 0.429600; the best 0.430250" in clone.do("wait")


def test_a_control_on_other_data_stops_the_night_aloud_until_it_is_put_back(clone):
    for number in range(9):
        clone.experiment(f"bad {number}", 0.5, lines=number)
    clone.run_slowly(0.5)
    mark = clone.folder.parent / "other rules"
    clone.go()
    mark.touch()
    said = clone.do("wait", status=1)
    assert "in the baseline: the data or fixed files have changed; put them back" in said
    mark.unlink()
    clone.do("wait")
    assert clone.said()[-1] == "keep baseline, seed 45" and goes_on(clone)


def test_a_warning_about_the_edit_is_shown_and_voids_nothing(clone):
    said = clone.experiment("half done", 0.43, FAULT="edit")
    assert "keep: " in said and "warning: edit: " in said and len(said.splitlines()) <= 10


@pytest.mark.parametrize(
    "key, value", [("num_steps", "nan"), ("tok_per_sec", "many"), ("peak_vram_mb", "nan")]
)
def test_a_summary_whose_numbers_are_none_does_not_stop_the_night(clone, key, value):
    clone.edit(0.43)
    text = (clone.folder / "train.py").read_text()
    assert f"{key}: " in text
    text = text.replace(f"{key}: ", f"{key}: {value} ")
    (clone.folder / "train.py").write_text(text)
    assert "keep: " in clone.do("run", "odd numbers") and goes_on(clone)
    assert "odd numbers" in clone.do("status")


def test_any_words_will_do_for_an_idea(clone):
    idea = "a\tb\nc \"d\" 'e' `f` $HOME $(g) %s \\t #h, seed 7"
    clone.experiment(idea, 0.43)
    assert clone.said()[3:] == [f"keep {plain(idea)}, seed 42"]
    assert clone.git("log", "-1", "--format=%s") == plain(idea)
    assert "experiment.py: say" in clone.do("run", " \n ", status=1)


@pytest.mark.parametrize(
    "idea", ["#3 of the list", "-5 layers", "-x", "--x", "x" * 10_000]
)
def test_an_idea_is_the_commits_subject_whatever_git_cleans_up(clone, idea):
    clone.git("config", "commit.cleanup", "strip")
    clone.experiment(idea, 0.43)
    assert clone.git("log", "-1", "--format=%s") == idea
    assert clone.said()[-1] == f"keep {idea}, seed 42"


def test_an_idea_behind_two_dashes_is_one(clone):
    clone.edit(0.43)
    clone.do("run", "--", "-x")
    assert clone.said()[-1] == "keep -x, seed 42"


def test_a_run_sees_its_gpu_and_no_virtual_env(fresh):
    fresh.env["VIRTUAL_ENV"] = "/elsewhere"
    fresh.do("start", "nov24", "--gpus", "3")
    assert set((fresh.folder.parent / "environment").read_text().split("\n")) == {
        "[None, '3']",
        "",
    }


def hurt(seed: int, how: str) -> str:
    """Return a train.py two noises below the best, whose run of `seed` fails until `go`."""
    what = f'seed == {seed} and not os.path.exists(os.path.join(here, "go"))'
    return train_py(0.4388).replace(
        'if FAULT == "crash"', f'if {what}:\n    FAULT = "{how}"\nif FAULT == "crash"'
    )


@pytest.mark.parametrize("how", ["crash", "gpu"])
def test_an_attempt_whose_repeat_failed_gets_its_verdict_when_it_runs_again(clone, how):
    path = clone.folder / "train.py"
    path.write_text(hurt(43, how))
    assert ("void: " if how == "gpu" else "crash: ") in clone.do("run", "good")
    clone.go()
    path.write_text(hurt(43, how))
    assert "keep: " in clone.do("run", "good")
    path.write_text(path.read_text().replace("0.4388", "0.43"))
    assert "keep: " in clone.do("run", "better")


def test_runs_long_before_an_attempt_runs_again_are_no_reason_to_give_it_up(clone):
    clone.experiment("clear", 0.43)
    text = train_py(0.4302, ONCE="gpu").replace("42: 0.0", "42: 0.0005")
    text = text.replace("43: 0.0005", "43: -0.0032")
    (clone.folder / "train.py").write_text(text)
    assert "discard: " in clone.do("run", "A")
    for _ in range(6):
        clone.experiment("worse", 0.5)
    (clone.folder / "train.py").write_text(text)
    said = clone.do("run", "A")
    assert "no verdict in" not in said and "clear, seed 43" in clone.said()[-1]


def test_further_runs_count_for_the_budget_and_for_the_next_control(fresh):
    fresh.do("start", "nov24", "--budget", "11")
    for number in range(9):
        said = fresh.experiment("no good", 0.5, status=0)
        assert "control" not in said, number
    assert "control, the best: " in fresh.experiment("no good", 0.5)
    assert "1 experiment, 0 kept" in fresh.do("status")
    assert "the night is over" in fresh.experiment("no good", 0.5, status=4)


def test_what_was_taken_back_is_not_run_again(clone):
    clone.experiment("a leak", 0.2)
    leak = clone.git("rev-parse", "--short=8", "HEAD")
    clone.do("void", leak, "sees the future")
    said = clone.experiment("once more", 0.2, status=1)
    assert f"the train.py of {leak}, which was taken back" in said
    assert clone.value() == 0.2
    assert "discard: " in clone.experiment("mended", 0.45)


def test_text_that_ran_out_is_told_of_from_the_baseline_on(fresh):
    before = 'print("warning: `VIRTUAL'
    said = "warning: edit: a\\nwarning: edit: b\\nwarning: data: 1.02 epochs"
    text = train_py().replace(before, f'print("{said}")\n{before}')
    (fresh.folder / "train.py").write_text(text)
    fresh.git("commit", "-qam", "short of text")
    assert "warning: data: 1.02 epochs" in fresh.do("start", "nov24")
    (fresh.folder / "train.py").write_text(text.replace("0.44", "0.5"))
    assert "warning: data: 1.02 epochs" in fresh.do("run", "worse")


# ---- The tree is the agent's -------------------------------------------------------------
def test_the_next_edit_can_be_drafted_while_the_gpu_works(clone):
    clone.run_slowly(0.43)
    assert clone.value() == 0.44  # the best's
    draft = train_py(0.44) + "# the next edit\n"
    (clone.folder / "train.py").write_text(draft)
    clone.go()
    assert "keep: " in clone.do("wait")
    text = train_py(0.43, FAULT="slow") + "# the next edit\n"
    assert (clone.folder / "train.py").read_text() == text
    assert "keep: " in clone.experiment("next", 0.42)


def test_a_draft_that_is_staged_does_not_stop_what_is_kept(clone):
    clone.run_slowly(0.43)
    (clone.folder / "train.py").write_text(train_py(0.44) + "# the next edit\n")
    clone.git("add", "train.py")
    clone.go()
    assert "keep: " in clone.do("wait")
    text = train_py(0.43, FAULT="slow") + "# the next edit\n"
    assert (clone.folder / "train.py").read_text() == text
    assert "keep: " in clone.experiment("next", 0.42)


def test_a_train_py_that_has_a_result_gets_its_next_seed_and_no_luckier_first(clone):
    assert "discard: " in clone.experiment("wider MLP", 0.45)
    said = clone.experiment("for luck", 0.45)
    assert "the train.py of wider MLP: its next seed" in said and "discard: " in said
    assert "val_bpb 0.450000 0.450500" in said and clone.value() == 0.44
    tail = [f"discard wider MLP, seed {seed}" for seed in (42, 43)]
    assert clone.said() == [*BASELINE, *tail]
    assert len(clone.attempts()) == 1
    assert "1 experiment, 0 kept" in clone.do("status")


def test_an_attempt_that_runs_again_is_judged_by_the_mean_of_all_its_runs(clone):
    assert "discard: " in clone.experiment("unlucky", 0.4392)
    attempt = clone.rows()[-1]
    said = clone.experiment("again", 0.4392)
    assert "val_bpb 0.439200 0.439700 0.438800" in said and "keep: " in said
    assert clone.git("log", "-1", "--format=%s") == "unlucky" and clone.value() == 0.4392
    assert [row[2] for row in clone.rows() if "unlucky" in row[3]] == ["keep"] * 3
    assert attempt[2] == "discard"

    assert "keep: " in clone.experiment("deeper", 0.43)  # on it
    said = clone.experiment("without it", 0.4392)  # an attempt at another best
    assert "its next seed" not in said and "discard: " in said


def test_a_train_py_that_crashed_runs_again_and_says_so(clone):
    assert "crash: " in clone.experiment("deeper", 0.43, FAULT="crash")
    (commit,) = clone.attempts()
    said = clone.experiment("deeper", 0.43, FAULT="crash")
    assert f"the train.py of deeper, which crashed as {commit}\n" in said
    assert "which crashed" not in clone.experiment("deeper", 0.43)


def test_no_attempt_begins_at_the_first_seed_again_after_the_gpus_speed_changed(clone):
    clone.experiment("unlucky", 0.45)
    (clone.folder.parent / "speed").write_text("0.95")
    for n in range(9):
        clone.experiment(f"worse {n}", 0.5, lines=n)
    slower = ["keep baseline, seed 45", "keep baseline, seed 46"]
    assert clone.said()[-2:] == slower  # a control, and once more
    said = clone.experiment("unlucky", 0.45)
    assert "discard: " in said and "val_bpb 0.450500; the best" in said
    assert clone.said()[-1] == "discard unlucky, seed 43"
    assert "10 experiments, 0 kept" in clone.do("status")


@pytest.mark.parametrize("ref", ["deleted", "a tag of its name"])
def test_a_branch_that_is_not_what_it_was_does_not_stop_the_night(clone, ref):
    clone.experiment("wider MLP", 0.43)
    best = clone.git("rev-parse", "HEAD")
    if ref == "deleted":
        clone.git("switch", "-q", "main")
        assert "git switch -m autoresearch/nov24" in clone.do("status")
        clone.git("branch", "-qD", "autoresearch/nov24")
        assert "best: " in clone.do("wait")
        clone.git("switch", "-q", "autoresearch/nov24")
    else:
        clone.git("tag", "autoresearch/nov24", "main")
    assert clone.git("rev-parse", "HEAD") == best
    assert "keep: " in clone.experiment("deeper", 0.42)
    assert "keep: " in clone.experiment("deeper yet", 0.41) and clone.value() == 0.41


def test_a_draft_that_does_not_fit_what_was_kept_shows_both(clone):
    clone.run_slowly(0.43)
    clone.edit(0.42)
    clone.go()
    clone.do("wait")
    text = (clone.folder / "train.py").read_text()
    assert "<<<<<<<" in text and "VAL_BPB = 0.43" in text and "VAL_BPB = 0.42" in text
    assert "keep: " in clone.experiment("next", 0.41) and clone.value() == 0.41


def test_a_draft_on_the_line_beside_what_was_kept_fits(clone):
    clone.run_slowly(0.43)
    clone.edit(0.44, SPEED=1.3)  # the next line
    clone.go()
    assert "does not fit" not in clone.do("wait")
    assert (clone.folder / "train.py").read_text() == train_py(
        0.43, FAULT="slow", SPEED=1.3
    )


@pytest.mark.parametrize(
    "best, draft, merged",
    [
        ("Abcd", "aBcd", "ABcd"),
        ("Abcd", "abcD", "AbcD"),
        ("bcd", "aBcd", "Bcd"),
        ("abcdE", "Xabcd", "XabcdE"),
        ("AbcD", "AbCd", "AbCD"),
        ("Abcd", "Xbcd", None),
        ("abXcd", "abYcd", None),
        ("Xabcd", "Yabcd", None),
        ("acd", "aBcd", None),
        ("aXbcd", "aXBcd", None),  # X is of both
        ("aXbcd", "aBcd", None),
        ("aBcd", "abXcd", None),
    ],
)
def test_changes_of_neighbouring_lines_are_merged_and_of_one_line_are_not(
    best, draft, merged
):
    assert merge_lines([*"abcd"], [*best], [*draft]) == (merged and [*merged])


def test_a_conflict_that_was_left_in_the_index_is_taken_out_and_what_stands_stays(clone):
    clone.run_slowly(0.43)
    clone.edit(0.44, SPEED=1.3)
    attempt = clone.git("rev-parse", "refs/attempts/" + clone.attempts()[0])
    branch = "autoresearch/nov24"
    clone.git("checkout", "-q", "-m", "-B", branch, attempt)  # and then we were killed
    with open(clone.folder / "train.py", "a") as file:
        file.write("# typed since\n")
    text = (clone.folder / "train.py").read_text()
    clone.go()
    assert "<<<<<<<" in text and "does not fit" in clone.do("wait")
    assert (clone.folder / "train.py").read_text() == text
    assert clone.git("status", "--short") == "M train.py"


def test_the_owners_files_survive_a_night(clone):
    (clone.folder / "mine.txt").write_text("mine")
    (clone.folder / "harness.py").write_text("raise SystemExit")
    for idea, value in (("good", 0.43), ("bad", 0.5)):
        clone.experiment(idea, value)
    assert (clone.folder / "mine.txt").read_text() == "mine"
    assert clone.git("status", "--short") == "?? harness.py\n?? mine.txt"


@pytest.mark.parametrize(
    "change, why",
    [
        ("notes.md", "git stash push notes.md"),
        ("constants.py", "git stash push constants.py"),
        ("nothing", "edit it, then run"),
        ("gone", "git checkout train.py"),
        ("added", "git stash push new.py"),
        ("detached", "git switch -m autoresearch/nov24"),
        ("elsewhere", "git switch -m autoresearch/nov24"),
        ("committed", "git reset"),
        ("index", "rm "),
    ],
)
def test_run_refuses_what_is_not_one_edit_of_train_py(clone, change, why):
    rows = clone.rows()
    if change != "nothing":
        clone.edit(0.43)
    if change in ("notes.md", "constants.py"):
        (clone.folder / change).write_text("changed")
    elif change == "gone":
        (clone.folder / "train.py").unlink()
    elif change == "added":
        (clone.folder / "new.py").touch()
        clone.git("add", "new.py")
    elif change == "detached":
        clone.git("switch", "-q", "--detach")
    elif change == "elsewhere":
        clone.git("switch", "-qc", "other")
    elif change == "committed":
        clone.git("commit", "-qam", "by hand")
    elif change == "index":
        (clone.folder / ".git" / "index.lock").touch()
    said = clone.do("run", "x", status=1)
    assert why in said and len(said.splitlines()) == 1 and clone.rows() == rows
    if change not in ("nothing", "gone"):
        assert clone.value() == 0.43
    # What the sentence says is what helps.
    cures = ["git checkout -q train.py"] if change == "gone" else []
    for start in ("git stash push", "git switch -m", "git reset", "rm"):
        if f"{start} " in said:
            words = said.partition(f"{start} ")[2].replace(",", " ").split()
            cures.append(f"{start} {words[0]}")
    for command in cures:
        clone.call(command.split())
    assert change == "nothing" or cures
    assert change != "committed" or clone.git("rev-list", "--count", "HEAD") == "1"
    assert goes_on(clone)


@pytest.mark.parametrize("how", ["committed", "detached"])
def test_what_helps_after_git_by_hand_does_not_undo_what_was_kept_meanwhile(clone, how):
    clone.run_slowly(0.43)
    text = (clone.folder / "train.py").read_text()
    draft = text.replace("LINE = 0\n", "", 1)
    (clone.folder / "train.py").write_text(draft)
    clone.git("switch", "-q", "--detach")
    if how == "committed":
        clone.git("switch", "-q", "-")
        clone.git("commit", "-qam", "by hand")
    clone.go()
    clone.do("wait")
    said = clone.do("run", "shorter", status=1)
    cure = re.search("git (reset [0-9a-f]{8}|switch -m [a-z/0-9]+)", said)[0]
    clone.call(cure.split())
    assert "+0 -1 lines" in clone.do("run", "shorter")
    kept = clone.git("show", "HEAD:train.py") + "\n"
    assert kept == draft.replace("0.44", "0.43", 1).replace("''", "'slow'", 1)


@pytest.mark.parametrize("how", ["chmod", "hook"])
def test_a_draft_that_git_stores_otherwise_is_not_in_the_next_experiment(clone, how):
    clone.edit(0.5)
    if how == "chmod":
        (clone.folder / "train.py").chmod(0o755)
    else:
        hook = clone.folder / ".git" / "hooks" / "pre-commit"
        hook.parent.mkdir(exist_ok=True)
        hook.write_text("#!/bin/sh\necho '# formatted' >> train.py; git add train.py\n")
        hook.chmod(0o755)
    assert "discard: " in clone.do("run", "worse")
    assert clone.value() == 0.44 and "edit it, then run" in clone.do("run", "x", status=1)


@pytest.mark.parametrize("when", ["start", "run"])
@pytest.mark.parametrize("fault", ["identity", "hook", "signing"])
def test_what_git_cannot_commit_is_not_run(fresh, fault, when):
    if when == "run":
        fresh.do("start", "nov24")
        fresh.edit(0.43)
    saved = {
        k: fresh.env.pop(k)
        for k in [*fresh.env]
        if k.startswith("GIT_") and fault[0] == "i"
    }
    fresh.git("config", "user.useConfigOnly", "true")
    if fault == "hook":
        hook = fresh.folder / ".git" / "hooks" / "pre-commit"
        hook.write_text("#!/bin/sh\necho no tabs, please >&2\nexit 1\n")
        hook.chmod(0o755)
    elif fault == "signing":
        fresh.git("config", "commit.gpgsign", "true")
        fresh.git("config", "gpg.program", "false")
    words = {
        "identity": "git config user.name",
        "hook": "hooksPath",
        "signing": "gpgsign",
    }
    command = ["start", "nov24"] if when == "start" else ["run", "x"]
    said = fresh.do(*command, status=1)
    assert words[fault] in said and "nothing was run" in said
    assert fault != "hook" or "no tabs, please" in said
    assert "--global" not in said  # git's own advice beside ours
    if when == "start":
        assert not (fresh.folder / "results.tsv").exists()
        assert fresh.git("branch", "--format=%(refname:short)") == "main"
        assert fresh.git("worktree", "list").count("\n") == 0
    else:
        assert fresh.said() == BASELINE and fresh.value() == 0.43
    fresh.env |= saved
    fresh.git("config", "commit.gpgsign", "false")
    fresh.git("config", "core.hooksPath", "/dev/null")
    assert fresh.do(*command)


def test_signatures_that_git_shows_are_not_taken_for_its_numbers(clone):
    gpg = clone.folder.parent / "gpg"
    gpg.write_text(
        "#!/bin/sh\ncat >/dev/null; echo s; echo '[GNUPG:] SIG_CREATED ' >&2\n"
    )
    gpg.chmod(0o755)
    for key, value in (("commit.gpgsign", "true"), ("log.showSignature", "true")):
        clone.git("config", key, value)
    clone.git("config", "gpg.program", str(gpg))
    clone.git("config", "user.signingkey", "night")
    said = clone.experiment("wider MLP", 0.43)
    assert re.match(r"running \w{8}, \+1 -1 lines of train.py\n", said)


def test_start_refuses_a_dirty_tree_and_touches_nothing(fresh):
    (fresh.folder / "notes.md").write_text("a day's work")
    assert "uncommitted work in notes.md" in fresh.do("start", "nov24", status=1)
    assert (fresh.folder / "notes.md").read_text() == "a day's work"
    assert fresh.git("branch", "--show-current") == "main"
    for words in (["a b"], ["x", "--budget", "soon"], ["x", "--gpus", "0;1"]):
        assert fresh.do("start", *words, status=1).startswith("experiment.py: ")


def test_a_start_without_a_gpu_says_so_before_it_asks_for_data(fresh):
    del fresh.env["AUTORESEARCH_RUN"]
    (fresh.folder / "prepare.py").write_text('raise SystemExit("no data")')
    fresh.git("commit", "-qam", "unprepared")
    gpu, health = (fresh.folder / "harness" / f"{x}.py" for x in ("gpu", "health"))
    gpu.write_text(
        'def choose_device(): raise ValueError("no GPU; smoke tries the same")'
    )
    health.write_text(
        "class measure_health:\n def __init__(self, _): self.company = 'alone'"
    )
    said = fresh.do("start", "nov24", status=1)
    assert (
        said == "experiment.py: the machine is not ready: no GPU; smoke tries the same\n"
    )
    gpu.write_text("def choose_device(): pass")
    assert "not ready: no data" in fresh.do("start", "nov24", status=1)


def test_start_refuses_a_folder_that_is_no_checkout_of_its_own(fresh):
    shutil.rmtree(fresh.folder / ".git")
    assert "not a git repository" in fresh.do("start", "nov24", status=1)
    fresh.git("init", "-q", cwd=fresh.folder.parent)
    assert "not the top of a git checkout" in fresh.do("start", "nov24", status=1)


def test_start_says_when_the_baseline_fails_and_wait_tries_again(fresh):
    (fresh.folder / "train.py").write_text(train_py(ONCE="crash"))
    fresh.git("commit", "-qam", "crashes once")
    said = fresh.do("start", "nov24", status=1)
    assert "baseline: a run of" in said and "tail -n 40" in said
    assert "open: " in fresh.do("status")
    fresh.do("wait")
    assert fresh.said()[0] == "crash baseline, seed 42" and len(fresh.said()) == 4
    assert goes_on(fresh)


def test_a_night_called_trial_keeps_an_earlier_ones_logs(fresh):
    (fresh.folder / "runs" / "trial").mkdir(parents=True)
    (fresh.folder / "runs" / "trial" / "x.log").touch()
    assert "trial of an earlier night is now trial-" in fresh.do("start", "trial")
    assert len([*fresh.folder.glob("runs/trial-*/x.log")]) == 1


def test_a_cache_named_by_a_relative_path_is_the_same_for_every_run(fresh):
    fresh.env["AUTORESEARCH_CACHE"] = "cache"
    (fresh.folder / "train.py").write_text(WHERE + train_py())
    fresh.git("commit", "-qam", "says where")
    fresh.do("start", "nov24", "--gpus", "0,0")
    logs = [path.read_text() for path in fresh.folder.glob("runs/nov24/*.log")]
    assert len(logs) == 3 and all(f"cache: {fresh.folder}/cache\n" in x for x in logs)


def test_a_run_may_push_by_the_owners_ssh_command_and_has_no_git_dir(fresh):
    fresh.env |= {"GIT_SSH_COMMAND": "ssh -p 7", "GIT_DIR": str(fresh.folder / ".git")}
    run = fresh.env["AUTORESEARCH_RUN"]
    fresh.env["AUTORESEARCH_RUN"] = f'{run} && echo "ssh: $GIT_SSH_COMMAND, $GIT_DIR."'
    fresh.do("start", "nov24")
    logs = [path.read_text() for path in fresh.folder.glob("runs/nov24/*.log")]
    assert len(logs) == 3 and all("ssh: ssh -p 7, .\n" in x for x in logs)


WHERE = 'import os\nprint("cache:", os.path.abspath(os.environ["AUTORESEARCH_CACHE"]))\n'


def test_a_night_file_that_cannot_be_read_is_named(clone):
    night = clone.folder / "runs" / "night.json"
    for text in ("{", "[]", '{"tag": "nov24"}'):
        night.write_text(text)
        said = clone.do("status", status=1)
        assert f"{night} is no good" in said and len(said.splitlines()) == 1


def test_a_night_after_a_night(clone):
    clone.experiment("wider MLP", 0.43)
    first = (clone.folder / "results.tsv").read_text()
    assert "has begun" in clone.do("start", "nov24", status=1)
    said = clone.do("start", "nov25")
    (old,) = clone.folder.glob("results-*.tsv")
    assert old.name in said and old.read_text() == first
    assert clone.git("branch", "--show-current") == "autoresearch/nov25"
    assert "another tag" in clone.do("start", "nov24", status=1)
    assert clone.rows()[0][0] == "0.430000" and clone.said() == BASELINE
    clone.experiment("deeper", 0.42)
    assert clone.git("log", "--format=%s").split("\n")[:2] == ["deeper", "wider MLP"]


# ---- The log in a night ------------------------------------------------------------------
@pytest.mark.parametrize("damage", ["no newline", "CRLF", "torn", "latin-1"])
def test_a_damaged_log_is_not_damaged_further(clone, damage):
    log = clone.folder / "results.tsv"
    text = log.read_bytes()
    text = {
        "no newline": text.rstrip(b"\n"),
        "CRLF": text.replace(b"\n", b"\r\n"),
        "torn": text + b"abc1234\t0.4",
        "latin-1": text.replace(b"baseline", b"b\xe9"),
    }[damage]
    log.write_bytes(text)
    assert "keep: " in clone.experiment("wider MLP", 0.43)
    kept = log.read_bytes()
    assert kept.startswith(text.rstrip(b"\n")) and kept.count(b"wider MLP") == 1
    assert b"\n" in kept[len(text.rstrip(b"\n")) :].split(b"wider")[0]
    said = clone.do("status")
    assert ("not a run, not counted: 'abc1234" in said) == (damage == "torn")
    assert clone.git("log", "-1", "--format=%s") == "wider MLP"


# ---- Who else is there -------------------------------------------------------------------
@pytest.mark.parametrize(
    "damage", ["removed", "commas", "decimal commas", "a line cut out"]
)
def test_a_log_that_has_lost_runs_stops_the_night_aloud_until_it_is_back(clone, damage):
    """Else the best would pass for the baseline, and the budget would begin again."""
    assert "keep: " in clone.experiment("wider MLP", 0.43)
    log = clone.folder / "results.tsv"
    text = log.read_text()
    changed = {
        "removed": "",
        "commas": text.replace("\t", ","),
        "decimal commas": re.sub(r"\t0\.", "\t0,", text),
        "a line cut out": text[: text.rindex("\n", 0, -1) + 1],
    }[damage]
    log.write_text(changed) if changed else log.unlink()
    clone.edit(0.42)
    for command in (["run", "deeper"], ["status"]):
        said = clone.do(*command, status=1 if command[0] == "run" else 0)
        assert "results.tsv has lost the runs of" in said and "put it back" in said
    assert changed == (log.read_text() if log.exists() else "") and clone.value() == 0.42
    log.write_text(text)
    assert "keep: " in clone.do("run", "deeper")


def test_a_log_that_is_removed_while_a_run_goes_on_has_the_bests_runs_again(clone):
    """Their logs are still there, and the verdict needs them."""
    before = clone.rows()
    clone.run_slowly(0.43)
    (clone.folder / "results.tsv").unlink()
    clone.go()
    assert "keep: " in clone.do("wait")
    assert before[0] in clone.rows() and "keep: " in clone.experiment("next", 0.42)


def test_what_a_spreadsheet_puts_behind_a_line_is_not_of_its_description(clone):
    log = clone.folder / "results.tsv"
    log.write_text("".join(f"{line}\t\t\r\n" for line in log.read_text().splitlines()))
    assert "keep: " in clone.experiment("wider MLP", 0.43)
    said = clone.do("status")
    assert "not a run" not in said and "1 experiment, 1 kept" in said
    assert "keep: " in clone.experiment("deeper", 0.42)
    log.write_text("".join(f"{line}\t\n" for line in log.read_text().splitlines()))
    best = clone.git("rev-parse", "--short=8", "HEAD")
    assert f"void: {best} deeper" in clone.do("void", best, "a bug")
    assert "1 kept" in clone.do("status") and clone.rows()[-1][3].endswith("void: a bug")


def test_a_log_that_a_spreadsheet_has_quoted_is_the_same_log(clone):
    """It quotes what has a comma, so every description."""
    assert "keep: " in clone.experiment('a "wide" MLP', 0.43)
    log = clone.folder / "results.tsv"
    first, *lines = (line.split("\t") for line in log.read_text().splitlines())
    for line in lines:
        line[4] = '"{}"'.format(line[4].replace('"', '""'))
    log.write_text("".join("\t".join(line) + "\r\n" for line in [first, *lines]))
    assert 'a "wide" MLP, mean' in clone.do("status")
    best = clone.git("rev-parse", "--short=8", "HEAD")
    clone.do("void", best, "a bug")
    clone.edit(0.43)
    assert "which was taken back" in clone.do("run", "the same", status=1)


def test_a_second_agent_in_the_same_tree_is_refused(clone):
    clone.run_slowly(0.43)
    assert "slow is going on (step 00000" in clone.do("wait", "--minutes=0", status=3)
    clone.edit(0.42)
    assert "slow is going on (step" in clone.do("run", "other", status=1)
    assert "at work" in clone.do("status")
    assert "going on" in clone.do("start", "nov25", status=1)
    clone.go()
    assert "keep: " in clone.do("wait")
    assert clone.said() == [*BASELINE, "keep slow, seed 42"]


def edit_night(clone, **changes) -> None:
    path = clone.folder / "runs" / "night.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def while_it_starts(clone, log: str | None = None, **job) -> str:
    """Return what `wait` says of a run that is open, and held by somebody, with this log."""
    job = {"commit": "1" * 40, "idea": "wider MLP", "runs": 0} | job
    edit_night(clone, open=job)
    if log is not None:
        (clone.folder / "runs" / "nov24" / "new-42.log").write_text(log)
    with lock(clone.folder / "runs" / "tree.lock"):
        return clone.do("wait", "--minutes=0", status=3)


def test_a_run_that_has_no_step_yet_does_not_show_the_last_ones(clone):
    assert "wider MLP is going on (starting)" in while_it_starts(clone)
    said = while_it_starts(clone, control=True)
    assert "wider MLP, again as a control is going on" in said
    said = while_it_starts(clone, commit=clone.git("rev-parse", "HEAD"))
    runs = "so far 0.440000 0.440500 0.439600"
    assert f"wider MLP, {runs} is going on (starting)" in said


def test_a_run_that_waits_in_a_queue_says_so(clone):
    assert "wider MLP is going on (starting)" in while_it_starts(clone, "")
    said = while_it_starts(clone, "job 7 is queued\n\n")
    assert "wider MLP is going on (starting: job 7 is queued)" in said


def test_an_attempt_without_a_verdict_is_no_discard_in_status(clone):
    """Agents of other GPUs took the first of its runs for a verdict."""
    clone.experiment("a near miss", 0.441)
    assert "\tdiscard\ta near miss" in clone.do("status")
    commit = clone.git("for-each-ref", "--format=%(objectname)", "refs/attempts")
    edit_night(clone, open={"commit": commit, "idea": "a near miss", "runs": 0})
    said = clone.do("status")
    assert "\topen\ta near miss" in said and "a near miss, so far 0.441000" in said
    assert f"{clone.folder}/results.tsv, all runs:\n" in said
    assert "discard a near miss, seed 42" in clone.said()  # of the log, which stays


def test_a_night_that_is_over_says_so_while_something_holds_its_lock(clone):
    edit_night(clone, over=True)
    code = "import experiment; experiment.IDLE = 0; raise SystemExit(experiment.wait(8))"
    with lock(clone.folder / "runs" / "tree.lock"):
        said = clone.call([sys.executable, "-c", code], status=4)
    assert "the night is over" in said and "another command" not in said


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_disk_without_locks_is_named_with_what_to_do(tmp_path, monkeypatch, number):
    def flock(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(
        Refused, match="gpu.lock cannot be locked .*AUTORESEARCH_CACHE, to"
    ):
        lock(tmp_path / "gpu.lock")


def test_a_lock_that_another_user_made_is_taken(tmp_path, monkeypatch):
    def reads(path, mode="r"):
        if mode != "r":
            raise PermissionError(13, "Permission denied", str(path))
        return open(path, mode)

    path = tmp_path / "gpu.lock"
    path.touch()
    monkeypatch.setattr("loop.git.open", reads, raising=False)
    with lock(path):
        assert lock(path) is None
    with lock(path) as again:
        assert again


def test_a_git_that_is_at_work_for_a_moment_is_waited_for(clone):
    lock = clone.folder / ".git" / "index.lock"
    clone.edit(0.43)
    for command in (["experiment.py", "run", "x"], ["-c", RESET]):
        lock.touch()
        threading.Timer(1.0, lock.unlink).start()
        clone.call([sys.executable, *command])
    assert "keep x, seed 42" in clone.said()


RESET = "from loop.git import git; git('reset', '-q')"


def test_a_second_experiment_on_a_gpu_is_refused_in_another_tree(origin, tmp_path):
    clones = [Clone(origin, tmp_path / name) for name in "ab"]
    clones[1].env["AUTORESEARCH_CACHE"] = clones[0].env["AUTORESEARCH_CACHE"]
    for clone in clones:
        clone.do("start", "nov24", "--gpus", "0")
        clone.edit(0.43)
    clones[0].run_slowly(0.43)
    assert "GPU 0 has an experiment of another tree" in clones[1].do("run", "x", status=1)
    assert "GPU 0" in clones[1].do("status") and clones[1].said() == BASELINE
    clones[0].go()
    assert "keep: " in clones[0].do("wait")
    assert "keep: " in clones[1].do("run", "x")


def test_what_a_run_leaves_behind_is_ended(clone):
    clone.experiment("leaves", 0.43, FAULT="leaves")
    pid = int((clone.folder.parent / "left").read_text())
    stat = Path(f"/proc/{pid}/stat")
    with pytest.raises(ProcessLookupError):
        if stat.exists() and stat.read_text().split()[2] == "Z":
            raise ProcessLookupError
        os.kill(pid, 0)
    assert goes_on(clone)


def test_what_a_run_leaves_behind_in_a_session_of_its_own_is_named(clone):
    said = clone.experiment("escapes", 0.43, FAULT="escapes")
    assert "keep: " in said and "tree.lock, or what a run left behind (fuser" in said
    clone.edit(0.42)
    assert "tree.lock, or what a run left behind (fuser" in clone.do(
        "run", "next", status=1
    )
    assert "keep: " in clone.do("wait")
    os.kill(int((clone.folder.parent / "left").read_text()), signal.SIGKILL)
    assert goes_on(clone)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the process in /proc")
def test_a_run_that_outlives_the_process_that_waits_is_not_lost(clone):
    clone.run_slowly(0.43)
    worker = processes_in(clone.folder, "experiment.py")
    assert len(worker) == 1
    os.kill(worker[0], signal.SIGKILL)
    clone.edit(0.42)
    said = clone.do("run", "other", status=1)
    assert "slow is going on (step" in said  # its training is
    clone.go()
    assert "keep: " in clone.do("wait")
    assert clone.said() == [*BASELINE, "keep slow, seed 42"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the process in /proc")
def test_a_second_run_that_ends_with_all_others_is_had_again(clone):
    clone.experiment("wider MLP", 0.436)
    slow = 'import os\nif os.environ["AUTORESEARCH_SEED"] == "43":\n    FAULT = "slow"\n'
    text = train_py(0.4353).replace("LUCK", f"{slow}LUCK", 1)  # both are repeated
    (clone.folder / "train.py").write_text(text)
    clone.do("run", "rates x 1.5", "--minutes=0", status=3)
    night = json.loads((clone.folder / "runs" / "night.json").read_text())
    log = clone.folder / f"runs/nov24/{night['open']['commit'][:8]}-43.log"
    wait_until(lambda: log.exists() and "step 0" in log.read_text())
    for script, folder in (("experiment.py", ""), ("train.py", "runs/nov24/tree")):
        (pid,) = processes_in(clone.folder / folder, script)
        os.killpg(os.getpgid(pid), signal.SIGKILL)  # as where the machine goes off
    clone.go()
    assert "keep: " in clone.do("wait") and goes_on(clone)


def test_a_command_that_ends_before_its_run_is_shown_with_its_words(clone):
    """One that only queues the run, say, where AUTORESEARCH_RUN is of a batch system."""
    night = clone.folder / "runs" / "night.json"
    kept = json.loads(night.read_text())
    kept["env"]["AUTORESEARCH_RUN"] = "echo Submitted batch job 12"
    night.write_text(json.dumps(kept))
    said = clone.experiment("queued", 0.43)
    assert (
        "Submitted batch job 12\nexit status 0, and no line begins with val_bpb:" in said
    )
    assert "more: tail -n 40" in said and len(said.splitlines()) <= 10


# Ends all that a command leaves behind, as agents' sandboxes do.
SANDBOX = "unshare --user --map-root-user --pid --fork --kill-child --mount-proc".split()
HAS_SANDBOX = shutil.which("unshare") and not subprocess.call(
    [*SANDBOX, "true"], stderr=subprocess.DEVNULL
)


@pytest.mark.skipif(not HAS_SANDBOX, reason="needs unshare")
def test_a_sandbox_that_ends_what_a_command_leaves_behind_is_named(clone):
    clone.edit(0.43, FAULT="slow")
    command = [*SANDBOX, sys.executable, "experiment.py"]
    clone.call([*command, "run", "slow", "--minutes=0.05"], status=3)
    assert runs_begun(clone.folder) == 4
    for _ in range(2):
        said = clone.call([*command, "wait", "--minutes=0.05"], status=3)
        assert "the run before was killed, so it begins again; if a sandbox" in said
    clone.go()
    assert "was killed" in clone.do("wait") and goes_on(clone)
    assert clone.said()[3] == "keep slow, seed 42" and "killed" not in clone.do("wait")


def test_a_killed_run_that_void_has_taken_back_does_not_begin_again(clone):
    assert "keep: " in clone.experiment("wider MLP", 0.43)
    best = clone.git("rev-parse", "--short=8", "HEAD")
    (clone.folder / "runs" / "nov24" / f"{best}-43.log").write_text("step 00000\n")
    said = clone.do("void", best, "a bug") + clone.experiment("deeper", 0.42)
    assert "keep: " in said and "was killed" not in said


@pytest.mark.skipif(not shutil.which("timeout"), reason="needs timeout")
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the process in /proc")
def test_a_hung_run_that_nobody_is_there_to_end_ends_by_itself(clone):
    clone.run_slowly(0.43)
    (worker,) = processes_in(clone.folder, "experiment.py")
    os.kill(worker, signal.SIGKILL)
    said = clone.do("wait")  # the run is ended, run again, and ended as too slow
    assert "crash: " in said and clone.said()[-1] == "crash slow, seed 42"
    assert goes_on(clone)


def test_a_command_whose_output_nobody_reads_does_its_work(clone):
    clone.edit(0.43)
    reading, writing = os.pipe()
    os.close(reading)
    call = [sys.executable, "experiment.py", "run", "unseen"]
    how = {"cwd": clone.folder, "env": clone.env, "stderr": subprocess.PIPE}
    done = subprocess.run(call, stdout=writing, **how)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")
    assert clone.said()[-1] == "keep unseen, seed 42"


def test_ctrl_c_ends_the_command_and_not_the_experiment(clone):
    clone.edit(0.43, FAULT="slow")
    call = [sys.executable, "experiment.py", "run", "slow"]
    how = {"cwd": clone.folder, "env": clone.env, "stderr": subprocess.PIPE, "text": True}
    how["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(call, stdout=subprocess.DEVNULL, **how) as process:
        clone.until_it_trains()
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 1 and len(said.splitlines()) == 1
    assert "interrupted; `uv run experiment.py wait` goes on" in said
    clone.go()
    assert "keep: " in clone.do("wait")


def processes_in(folder: Path, name: str) -> list[int]:
    """Return the processes of a script in `folder`."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            if name.encode() in words and os.readlink(path / "cwd") == str(folder):
                found.append(int(path.name))
        except OSError:
            pass
    return found


# ---- kill -9 at every step ---------------------------------------------------------------
# Ends the process, with kill -9, behind the KILL_AT-th thing that it does to the disk.
DRIVER = """
import os, signal, subprocess, sys
sys.path.insert(0, os.getcwd())
import experiment
count, verbs = 0, {"worktree", "commit", "update-ref", "checkout", "reset", "switch"}

def behind(function, counts=lambda *args: True):
    def call(*args, **how):
        global count
        result = function(*args, **how)
        count += counts(*args)
        if counts(*args) and count == int(os.environ["KILL_AT"]):
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

os.replace = behind(os.replace)
subprocess.run = behind(subprocess.run, lambda call: bool(verbs & {*call}))
night = sys.modules["loop.night"]
Popen = subprocess.Popen
def popen(*args, **how):
    child = Popen(*args, **how)
    return behind(lambda: child)() if "sh" in args[0] else child
night.subprocess = type(sys)("subprocess")
vars(night.subprocess).update(vars(subprocess), Popen=popen)
sys.argv[0] = "experiment.py"
sys.exit(experiment.main())
"""


def driven(clone: Clone, kill_at: int, *command: str) -> bool:
    """Run a command and kill it; return whether it got so far."""
    driver = clone.folder.parent / "driver.py"
    driver.write_text(DRIVER)
    env = clone.env | {"KILL_AT": str(kill_at)}
    how = {"cwd": clone.folder, "env": env, "stdin": subprocess.DEVNULL}
    done = subprocess.run([sys.executable, driver, *command], **how, capture_output=True)
    killed = done.returncode == -signal.SIGKILL or b"was killed" in done.stderr
    assert killed or done.returncode == 0, (kill_at, done.stdout, done.stderr)
    return killed


def test_killed_at_any_step_an_experiment_is_finished_once(clone, tmp_path_factory):
    clone.experiment("wider MLP", 0.436)
    clone.edit(0.4353)  # the best and it are repeated, and it is kept
    for kill_at in range(1, 99):
        other = clone.copy(tmp_path_factory.mktemp("killed"))
        killed = driven(other, kill_at, "run", "rates x 1.5")
        said = other.do("status")
        assert ("open: " in said) == ("interrupted" in said)
        other.do("wait")
        if "rates x 1.5" not in "".join(other.said()):
            assert other.value() == 0.4353, kill_at  # the edit is still there
            other.do("run", "rates x 1.5")
        assert other.said()[3:] == [
            "keep wider MLP, seed 42",
            "keep rates x 1.5, seed 42",
            "keep wider MLP, seed 43",
            "keep rates x 1.5, seed 43",
        ], kill_at
        assert other.git("log", "--format=%s", "-2").split("\n") == [
            "rates x 1.5",
            "wider MLP",
        ]
        assert other.value() == 0.4353 and other.git("status", "--short") == "", kill_at
        assert other.git("rev-parse", "HEAD") in other.git("show-ref"), kill_at
        if not killed:
            break
    assert 15 < kill_at < 40


def test_killed_at_any_step_a_further_run_is_had_once(clone, tmp_path_factory):
    clone.experiment("unlucky", 0.4392)
    before = clone.said()
    clone.edit(0.4392)
    for kill_at in range(1, 99):
        other = clone.copy(tmp_path_factory.mktemp("killed"))
        killed = driven(other, kill_at, "run", "again")
        other.do("wait")
        if other.said() == before:
            assert other.value() == 0.4392, kill_at
            other.do("run", "again")
        assert len(other.said()) == len(before) + 1, kill_at
        assert other.said()[-1] == "keep unlucky, seed 44", kill_at
        assert (
            other.git("log", "-1", "--format=%s") == "unlucky" and other.value() == 0.4392
        )
        if not killed:
            break
    assert 5 < kill_at < 40


def test_killed_at_any_step_a_start_can_be_repeated(fresh, tmp_path_factory):
    begun = 0  # nights written down; from there on it is as in the test above
    for kill_at in range(1, 99):
        other = Clone(fresh.folder, tmp_path_factory.mktemp("killed"))
        assert driven(other, kill_at, "start", "nov24")
        if (other.folder / "runs" / "night.json").exists():
            other.do("wait")
            begun += 1
        else:
            other.do("start", "nov24")
        assert other.said() == BASELINE and "noise 0.000500" in other.do("wait"), kill_at
        if begun == 3:
            break
    assert kill_at > 6


def test_killed_at_any_step_a_start_on_two_gpus_can_be_repeated(fresh, tmp_path_factory):
    start, begun = ["start", "nov24", "--gpus", "0,1"], 0
    for kill_at in range(1, 99):
        clone = Clone(fresh.folder, tmp_path_factory.mktemp("killed"))
        second = clone.folder.with_name("clone-gpu1")
        assert driven(clone, kill_at, *start)
        if (clone.folder / "runs" / "night.json").exists():
            begun += 1
        else:
            clone.do(*start)
        for tree in (clone.folder, second):
            clone.do("wait", cwd=tree)
        assert sorted(clone.said()) == sorted(
            f"{x}, gpu {gpu}" for x in BASELINE for gpu in "01"
        ), kill_at
        branch = clone.git("branch", "--show-current", cwd=second)
        assert branch == "autoresearch/nov24-gpu1", kill_at
        if begun == 2:
            break
    assert kill_at > 7


def test_a_line_that_finds_the_disk_full_is_written_later(clone):
    clone.edit(0.43)
    (clone.folder.parent / "driver.py").write_text(FULL_DISK)
    driver = [sys.executable, clone.folder.parent / "driver.py", "run", "wider MLP"]
    said = clone.call(driver, status=1)
    assert "No space left on device" in said and "wait` goes on" in said
    assert clone.said() == BASELINE
    said = clone.do("status")
    assert "open: " in said and "stopped: [Errno 28]" in said
    assert "keep: " in clone.do("wait")
    assert clone.said() == [*BASELINE, "keep wider MLP, seed 42"] and goes_on(clone)


FULL_DISK = """
import os, sys
sys.path.insert(0, os.getcwd())
import experiment
from loop import ledger
write_whole = ledger.write_whole
def full(path, content):
    if path.name == "results.tsv" and ALL:
        open(home + "/full", "w").close()
    if path.name == "results.tsv" or os.path.exists(home + "/full"):
        raise OSError(28, "No space left on device", str(path))
    write_whole(path, content)
ALL, home, ledger.write_whole = False, os.environ["NIGHT_HOME"], full
sys.exit(experiment.main())
"""


def test_a_disk_so_full_that_nothing_is_written_down_is_named(clone):
    clone.edit(0.43)
    driver = clone.folder.parent / "driver.py"
    driver.write_text(FULL_DISK.replace("False", "True"))
    said = clone.call([sys.executable, driver, "run", "wider MLP"], status=1)
    for _ in range(2):
        assert "No space left on device" in said and "killed" not in said
        said = clone.call([sys.executable, driver, "wait"], status=1)
    (clone.folder.parent / "full").unlink()
    assert "keep: " in clone.do("wait")
    assert clone.said() == [*BASELINE, "keep wider MLP, seed 42"] and goes_on(clone)


def test_a_checkout_of_a_run_that_cannot_be_removed_is_put_aside(clone):
    """As where a container has left files of another user in it."""
    code = "import shutil, sys, experiment\nshutil.rmtree = lambda *_, **__: None\n"
    code += "sys.argv[0] = 'experiment.py'\nsys.exit(experiment.main())"
    for n in range(2):
        clone.edit(0.43 - 0.01 * n)
        said = clone.call([sys.executable, "-c", code, "run", f"idea {n}"])
        assert "keep: " in said
    assert goes_on(clone)


# ---- Drift, budget, void -----------------------------------------------------------------
def test_every_ten_experiments_the_best_runs_again_and_a_changed_speed_counts(clone):
    for number in range(9):
        said = clone.experiment(f"bad {number}", 0.5, lines=number)
        assert "control" not in said
    (clone.folder.parent / "speed").write_text("0.9")
    said = clone.experiment("bad 9", 0.5, lines=9)
    assert "control, the best: 0.440000 0.440000" in said
    assert "changed by over 2 %" in said and "does not count:" not in said
    # Twice, since once may be a busy host.
    assert clone.said()[-2:] == ["keep baseline, seed 45", "keep baseline, seed 46"]
    assert all("1.080 M tok/s" in row[3] for row in clone.rows()[-2:])
    said = clone.experiment("good", 0.4394)  # only these two are what it is compared with
    assert "the best 0.440000 of 2 runs" in said and "discard: " in said
    assert clone.said()[-2:] == ["discard good, seed 42", "discard good, seed 43"]
    assert "11 experiments, 0 kept" in said


def test_a_control_on_a_busy_host_is_repeated_and_does_not_count(clone):
    """The best's mean was 0.005 too high for it, and worse train.py nearly kept."""
    speed = clone.folder.parent / "speed"
    speed.write_text("45 0.92")  # of the first control
    edit_night(clone, again=9)  # the next is the tenth
    said = clone.experiment("bad", 0.5)
    assert "its run at 1.104 M tok/s does not count: over 2 % off" in said
    assert "so runs before do not count" not in said
    assert clone.said()[-2:] == ["keep baseline, seed 45", "keep baseline, seed 46"]
    said = clone.experiment("good", 0.4394)
    assert "of 4 runs" in said  # the three of the baseline, and the second control


def test_the_good_run_of_a_newly_kept_commit_counts_and_not_its_slow_one(clone):
    """The slow run, the first, was what the next were compared with."""
    speed = clone.folder.parent / "speed"
    speed.write_text("42 0.93")
    said = clone.experiment("good", 0.4388)
    assert "0.438800 at 1.116 M tok/s does not count: another run" in said
    assert "keep: " in said and "val_bpb 0.439300 0.438400;" in said
    assert "mean 0.438850 of 2;" in said and "mean 0.438850 of 2;" in clone.do("status")
    speed.unlink()
    assert "the best 0.438850 of 2" in clone.experiment("between", 0.4386)
    assert clone.said()[-1] == "discard between, seed 42"


def test_a_slow_run_of_the_baseline_is_repeated_at_once(fresh):
    (fresh.folder.parent / "speed").write_text("44 0.93")
    said = fresh.do("start", "nov24")
    assert fresh.said() == [*BASELINE, "keep baseline, seed 45"]
    assert "its run at 1.116 M tok/s does not count" in said
    assert "mean 0.440167 of 3" in said


def test_a_speed_that_changes_by_more_each_time_is_a_change(clone):
    (clone.folder.parent / "speed").write_text("rises")
    edit_night(clone, again=9)  # the next is the tenth
    said = clone.experiment("bad", 0.5)
    assert "so runs before do not count" in said
    assert clone.said()[-3:] == [f"keep baseline, seed {n}" for n in (45, 46, 47)]


def test_a_warning_of_the_first_run_is_not_lost_after_the_second(clone):
    said = clone.experiment("a near miss", 0.4392, ONCE="host")
    assert "discard: " in said and "warning: host: " in said
    assert clone.said()[-1] == "discard a near miss, seed 43"
    commit = clone.attempts()[0]
    assert f"to run it again: git restore --source {commit} train.py; `run`" in said
    clone.git("restore", "--source", commit, "train.py")
    assert "its next seed" in clone.do("run", "again")
    assert "to run it again" not in clone.experiment("worse", 0.5)


def test_the_last_control_of_a_night_is_not_repeated(fresh):
    (fresh.folder.parent / "speed").write_text("45 0.92")
    fresh.do("start", "nov24", "--budget", "1")
    said = fresh.experiment("bad", 0.5, status=4)
    assert fresh.said()[-1] == "keep baseline, seed 45" and "does not count" in said


def test_a_control_that_crashes_says_that_the_machine_is_not_ready(clone):
    for number in range(9):
        clone.experiment(f"bad {number}", 0.5, lines=number)
    speed = clone.folder.parent / "speed"
    speed.write_text("none")  # every run crashes
    said = clone.experiment("bad 9", 0.5, status=1, lines=9)
    assert "the machine is not ready" in said
    assert "the machine is not ready" in clone.do("wait", status=1)
    speed.write_text("1")
    assert "control, the best: " in clone.do("wait") and goes_on(clone)


def test_a_night_that_is_over_ends_though_its_last_control_crashes(fresh):
    fresh.do("start", "nov24", "--budget", "0")
    (fresh.folder.parent / "speed").write_text("none")
    fresh.edit(0.43)
    assert "the night is over" in fresh.do("run", "one more", status=4)


def test_a_speed_that_changes_all_the_time_gives_no_verdict_and_no_endless_runs(clone):
    # Each run is faster than the last.
    (clone.folder.parent / "speed").write_text("climbs")
    said = clone.experiment("a little", 0.4390)
    assert "discard: " in said and "the GPU's speed varies" in said
    assert len(clone.rows()) == 3 + 8
    (clone.folder.parent / "speed").write_text("wanders")
    clone.experiment("wider MLP", 0.43)
    clone.experiment("a little", 0.4292)
    assert len(clone.rows()) <= 3 + 8 + 1 + 8


def test_under_the_smoke_rules_speed_means_nothing_and_night_and_report_say_so(fresh):
    fresh.env["AUTORESEARCH_SMOKE"] = "1"
    (fresh.folder.parent / "speed").write_text("wanders")
    busy = "for something else uses the cores"
    said = fresh.do("start", "nov24")
    assert f"noise 0.000500; 2747 3022 3296 steps, {busy}\n" in said
    said = fresh.experiment("wider MLP", 0.436)
    assert "keep: " in said and "tok/s" not in said and "1 experiment, 1 kept" in said
    assert f"3571 steps (the best: 2747 3022 3296 steps, {busy}), " in said
    assert fresh.do("status").startswith("night nov24, smoke rules: ")
    tail = "seed 42, 3571 steps under the smoke rules"
    assert fresh.rows()[3][3] == f"wider MLP, {tail}"
    pytest.importorskip("matplotlib")
    import analysis

    night = analysis.read_night(fresh.folder)
    assert night.noises[""] == (0.0005, 2) and "Smoke rules" in night.note
    assert [change.mean for change in night.changes[1:]] == [0.436]


@pytest.mark.parametrize("here, there", [("1", ""), ("", "1")])
def test_what_a_run_elsewhere_says_of_its_rules_counts_not_what_is_set_here(
    fresh, here, there
):
    fresh.env["AUTORESEARCH_SMOKE"] = here
    run = fresh.env["AUTORESEARCH_RUN"]
    fresh.env["AUTORESEARCH_RUN"] = f"AUTORESEARCH_SMOKE={there} {run}"
    fresh.do("start", "nov24")
    assert all(("tok/s" in row[3]) == (not there) for row in fresh.rows())
    assert (", smoke rules: " in fresh.do("status")) == bool(there)


@pytest.mark.parametrize("budget", ["2", "0.0008h"])
def test_when_the_budget_is_used_up_the_night_is_over(fresh, budget):
    fresh.do("start", "nov24", "--budget", budget)
    if budget == "2":
        assert "over" not in fresh.experiment("wider MLP", 0.43)
        fresh.edit(0.44, lines=1)
        said = fresh.do("run", "deeper", status=4)  # it was run, and is the last
        assert (
            "control, the best: 0.430000 0.430500" in said and "the night is over" in said
        )
    else:
        time.sleep(3)
    rows = [*fresh.rows()]
    fresh.edit(0.40)
    said = fresh.do("run", "one more", status=4)
    assert "the night is over and nothing was run" in said and fresh.value() == 0.40
    assert len(fresh.rows()) - len(rows) == (0 if budget == "2" else 1)
    assert fresh.do("run", "one more", status=4) and "keep" in fresh.rows()[-1]
    assert "nothing is open" in fresh.do("wait", status=4)
    said = fresh.do("status")
    assert "nothing is open; the night is over" in said and "begins the next" not in said


def test_status_says_how_much_of_the_budget_is_left(fresh):
    fresh.do("start", "nov24", "--budget", "3")
    assert "0 experiments, 0 kept; 3 left" in fresh.do("status")
    assert "1 experiment, 1 kept; 2 left" in fresh.experiment("wider MLP", 0.43)
    fresh.do("start", "nov25", "--budget", "0.5h")
    assert "; 30 min left" in fresh.do("status")
    fresh.do("start", "nov26", "--budget", "0h")
    said = fresh.do("status")
    assert "; 0 min left" in said and "nothing is open; the budget is used up" in said


def test_a_baseline_that_goes_on_says_which_of_its_runs_it_is_at(fresh):
    fresh.edit(FAULT="slow")
    fresh.git("commit", "-qam", "slow")
    assert "baseline, run 1 of 3 is going on" in fresh.do(
        "start", "nov24", "--minutes=0", status=3
    )
    fresh.go()
    fresh.do("wait")


def test_a_commit_that_turns_out_broken_is_taken_back(clone):
    clone.experiment("a leak", 0.2)
    leak = clone.git("rev-parse", "HEAD")
    text = (clone.folder / "train.py").read_text()
    for _ in range(5):  # of the end, so that the leak can be reverted alone
        text = text.replace("LINE = 0\n", "", 1)
    (clone.folder / "train.py").write_text(text)
    assert "keep: " in clone.do("run", "shorter")
    said = clone.do("void", leak[:7], "sees\tthe future")
    assert "without" in said and "best: " in said
    assert clone.said()[3:] == [
        "discard a leak, seed 42, void: sees the future",
        f"discard shorter, seed 42, void: stood on {leak[:8]}",
        "discard a leak, seed 43, void: sees the future",
        f"discard shorter, seed 43, void: stood on {leak[:8]}",
        f"keep without {leak[:8]}, seed 42",
        f"keep without {leak[:8]}, seed 43",
    ]
    assert clone.value() == 0.44 and clone.git("status", "--short") == ""
    assert (clone.folder / "train.py").read_text() == text.replace("0.2", "0.44", 1)
    assert goes_on(clone)


def test_a_crash_is_nothing_to_take_back(clone):
    clone.experiment("an accident", 0.4, FAULT="crash")
    commit = (clone.folder / "results.tsv").read_text().splitlines()[-1].split("\t")[0]
    log = clone.said()
    assert f"{commit} crashed or was void" in clone.do("void", commit, "why", status=1)
    assert clone.said() == log


def test_a_discarded_commit_can_be_void_too_and_others_cannot(clone):
    clone.experiment("bad", 0.5)
    bad = clone.rows()[-1]
    commit = (clone.folder / "results.tsv").read_text().splitlines()[-1].split("\t")[0]
    clone.do("void", commit, "never ran")
    assert clone.rows()[-1][3] == bad[3] + ", void: never ran"
    for other in ("HEAD", "main", "nonsense"):
        assert clone.do("void", other, "why", status=1).startswith("experiment.py: ")


def test_what_is_void_cannot_come_back_by_void(clone):
    leak = keep_two(clone, "X = 1", "Y = 1")
    said = clone.do("void", leak, "sees the future")
    assert "what stood on it is measured again as" in said and clone.value() == 0.44
    assert "void already" in clone.do("void", leak, "why", status=1)
    said = clone.do("void", "HEAD", "why", status=1)
    assert f"takes {leak[:8]} back" in said
    assert clone.value() == 0.44 and "2 experiments, " in clone.do("status")
    assert goes_on(clone)


def test_void_of_the_best_goes_back_to_the_one_before_and_runs_nothing(clone):
    clone.experiment("good", 0.43)
    good = clone.git("rev-parse", "HEAD")
    clone.experiment("a leak", 0.2)
    rows = clone.rows()
    assert f"the branch is at {good[:8]} again" in clone.do("void", "HEAD", "why")
    assert len(clone.rows()) == len(rows) and clone.git("rev-parse", "HEAD") == good
    assert clone.value() == 0.43 and goes_on(clone)


def test_what_is_left_of_a_void_commit_and_worse_than_before_is_not_the_best(clone):
    clone.experiment("good", 0.43)
    good = clone.git("rev-parse", "HEAD")
    clone.experiment("a leak", 0.2)
    leak = clone.git("rev-parse", "HEAD")
    text = (clone.folder / "train.py").read_text()
    for _ in range(5):
        text = text.replace("LINE = 0\n", "", 1)
    worse = text.replace("LUCK", "if VAL_BPB > 0.4:\n    VAL_BPB = 0.5\nLUCK", 1)
    (clone.folder / "train.py").write_text(worse)
    assert "keep: " in clone.do("run", "shorter, and worse alone")
    said = clone.do("void", leak, "sees the future")
    assert f"{good[:8]} before it is better" in said
    assert clone.git("rev-parse", "HEAD") == good and clone.value() == 0.43
    assert [x.split()[0] for x in clone.said()[-2:]] == ["discard"] * 2
    assert goes_on(clone)


def test_two_experiments_in_the_same_words_are_two(clone):
    clone.experiment("again", 0.5, FAULT="crash")
    clone.experiment("again", 0.5)
    clone.experiment("again", 0.5, lines=1)
    assert "2 experiments, 0 kept" in clone.do("status")


def keep_two(clone: Clone, first: str, second: str) -> str:
    """Keep two commits that put a line in front and one at the end; return the first."""
    good = train_py(0.43).replace("LUCK", f"{first}\nLUCK", 1)
    (clone.folder / "train.py").write_text(good)
    assert "keep: " in clone.do("run", "first")
    commit = clone.git("rev-parse", "HEAD")
    shorter = good.replace("LINE = 0\n", "") + f"{second}\n"
    (clone.folder / "train.py").write_text(shorter)
    assert "keep: " in clone.do("run", "second")
    return commit


@pytest.mark.parametrize("fault", ["signing", "taken out already"])
def test_what_void_cannot_revert_changes_nothing(clone, fault):
    if fault == "signing":
        broken = keep_two(clone, "X = 1", "Y = 1")
        clone.git("config", "commit.gpgsign", "true")
        clone.git("config", "gpg.program", "false")
    else:
        clone.experiment("one line less", lines=-1)
        broken = clone.git("rev-parse", "HEAD")
        assert "keep: " in clone.experiment("better, and that line again", 0.43)
    before = clone.said(), clone.git("rev-parse", "HEAD")
    said = clone.do("void", broken, "why", status=1)
    why = "commit.gpgsign" if fault == "signing" else f"of {broken[:8]} nothing is left"
    assert why in said
    assert (clone.said(), clone.git("rev-parse", "HEAD")) == before
    clone.git("config", "commit.gpgsign", "false")
    assert goes_on(clone)


def test_killed_at_any_step_a_void_can_be_given_again(clone, tmp_path_factory):
    first = keep_two(clone, "X = 1", "Y = 1")
    for kill_at in range(1, 99):
        other = clone.copy(tmp_path_factory.mktemp("killed"))
        killed = driven(other, kill_at, "void", first, "why")
        if "open: " in other.do("status"):
            other.do("wait")
        elif f"without {first[:8]}" not in "".join(other.said()):
            other.edit(0.2)
            said = other.do("run", "x", status=None)
            if "keep: " in said:  # nothing was done
                assert ", void: " not in "".join(other.said()), kill_at
                continue
            assert "a `void` was interrupted" in said and other.value() == 0.2
            other.do("void", first, "why")
        ends = [f"keep without {first[:8]}, seed {seed}" for seed in (42, 43)]
        assert other.said()[-2:] == ends, kill_at
        void = [", void: " in x for x in other.said()]
        assert not any(void[:3] + void[-2:]) and all(void[3:-2]), kill_at
        assert "X = 1" not in other.git("show", "HEAD:train.py"), kill_at
        if not killed:
            break
    assert kill_at > 4


def test_a_best_that_crashes_in_its_control_can_be_taken_back(clone):
    crashes = (
        'import os\nif os.environ["AUTORESEARCH_SEED"] != "42":\n    FAULT = "crash"\n'
    )
    text = train_py(0.43).replace("LUCK", f"{crashes}LUCK", 1)
    (clone.folder / "train.py").write_text(text)
    assert "keep: " in clone.do("run", "lucky")
    lucky = clone.git("rev-parse", "--short=8", "HEAD")
    for n in range(9):
        (clone.folder / "train.py").write_text(text.replace("0.43", f"0.5{n}", 1))
        said = clone.do("run", f"worse {n}", status=int(n == 8))
    assert f'void {lucky} "why"' in said and "machine is not ready" in said
    assert f"void {lucky}" in clone.do("wait", status=1)
    clone.do("void", lucky, "nan with every other seed")
    assert clone.value() == 0.44 and goes_on(clone)


def test_what_is_left_of_a_void_commit_crashes_so_the_branch_goes_further_back(clone):
    first = keep_two(clone, "X = 1", "print(X)")
    assert "crashes; the branch is at" in clone.do("void", first, "why")
    assert clone.git("log", "-1", "--format=%s") == "start" and goes_on(clone)


def test_what_is_left_of_a_void_commit_is_kept_though_the_gpu_is_throttled(clone):
    first = keep_two(clone, "X = 1", "Y = 1")
    basis = clone.folder / "runs" / "night.json"
    right = basis.read_text()
    basis.write_text(right.replace("8fe0ad1f", "0000000"))  # now every run is void
    said = clone.do("void", first, "why", status=1)
    assert "the data or fixed files have changed; put them back" in said
    basis.write_text(basis.read_text().replace("0000000", "8fe0ad1f"))
    assert "without" in clone.do("wait") and clone.value() == 0.44
    assert "Y = 1" in (clone.folder / "train.py").read_text()


def test_the_branch_does_not_go_back_to_a_commit_that_was_withdrawn_before(clone):
    first = clone.git("rev-parse", "HEAD")
    clone.experiment("leak", 0.43)
    leak = clone.git("rev-parse", "HEAD")
    path = clone.folder / "train.py"
    path.write_text(path.read_text().replace('print(f"---', 'luck -= 0.01\nprint(f"---'))
    clone.do("run", "second")
    second = clone.git("rev-parse", "HEAD")
    path.write_text(path.read_text().replace("luck -= 0.01", "luck -= 0.02"))
    clone.do("run", "third")
    clone.do("void", leak, "sees the future")
    assert "does not fit" in clone.do("void", second, "broken too")
    assert clone.git("rev-parse", "HEAD") == first and "mean" in clone.do("status")


def test_what_does_not_fit_without_a_void_commit_is_named_to_be_tried_again(clone):
    first = keep_two(clone, "X = 1", "print(X)")
    clone.edit(0.42)
    clone.do("run", "third")
    third, second = clone.git("log", "-2", "--format=%h", "--abbrev=8").split()
    said = clone.do("void", first, "why")
    assert f"try it again: {third} third, {second} second" in said
    assert clone.value() == 0.44 and goes_on(clone)


# ---- Several GPUs ------------------------------------------------------------------------
def test_several_gpus_share_a_log_and_each_is_judged_by_its_own(origin, tmp_path):
    clone = Clone(origin, tmp_path)
    said = clone.do("start", "nov24", "--gpus", "0,1")
    other = tmp_path / "clone-gpu1"
    assert f"GPU 1: for an agent of its own, in {other}" in said
    clone.do("wait", cwd=other)
    assert sorted(clone.said()) == sorted(
        f"{x}, gpu {gpu}" for x in BASELINE for gpu in "01"
    )
    assert clone.git("branch", "--show-current", cwd=other) == "autoresearch/nov24-gpu1"

    clone.experiment("wider MLP", 0.43)
    (other / "train.py").write_text(train_py(0.435))
    said = clone.do("run", "deeper", cwd=other)
    assert "keep: " in said and "the best 0.440033 of 3 runs" in said  # of GPU 1
    said = clone.do("status", cwd=other)
    commit = clone.git("rev-parse", "--short=8", "HEAD")
    assert f"kept on gpu 0: wider MLP; git show {commit}" in said
    assert "deeper" not in said.partition("kept on")[2].partition("\n")[0]
    (other / "train.py").write_text(train_py(0.43))
    clone.do("run", "wider MLP", cwd=other)
    assert "kept on" not in clone.do("status", cwd=other)
    assert clone.said()[-3:] == [
        "keep wider MLP, seed 42, gpu 0",
        "keep deeper, seed 42, gpu 1",
        "keep wider MLP, seed 42, gpu 1",
    ]
    environment = (tmp_path / "environment").read_text()
    assert environment.count("'0'") == 4 and environment.count("'1'") == 5


def test_status_leaves_out_what_was_kept_elsewhere_and_tried_here_in_other_words(
    origin, tmp_path
):
    clone, other = Clone(origin, tmp_path), tmp_path / "clone-gpu1"
    clone.do("start", "nov24", "--gpus", "0,1")
    clone.do("wait", cwd=other)
    clone.experiment("wider MLP", 0.43)
    clone.experiment("shorter", 0.43, lines=-3)
    said = clone.do("status", cwd=other)
    assert "kept on gpu 0: wider MLP" in said and "kept on gpu 0: shorter" in said
    (other / "train.py").write_text(train_py(0.43))
    assert "keep: " in clone.do("run", "wider, as kept on gpu 0", cwd=other)
    said = clone.do("status", cwd=other)
    assert "kept on gpu 0: wider MLP" not in said and "kept on gpu 0: shorter" in said
    assert "kept on gpu 1" not in clone.do("status")


def test_status_names_of_several_keeps_in_a_row_the_last_alone(origin, tmp_path):
    clone, other = Clone(origin, tmp_path), tmp_path / "clone-gpu1"
    clone.do("start", "nov24", "--gpus", "0,1")
    clone.do("wait", cwd=other)
    for value in (0.43, 0.42, 0.41):
        clone.experiment(f"down to {value}", value)
    with open(clone.folder / "results.tsv", "a") as log:  # of another machine
        log.write("deadbee1\t0.4\t9.0\tkeep\tfar off, seed 42, gpu 7\n")
    said = clone.do("status", cwd=other)
    assert re.findall("kept on .*(?=;)", said) == ["kept on gpu 0: down to 0.41"]
    (other / "train.py").write_text(train_py(0.41))
    clone.do("run", "as over there", cwd=other)
    assert "kept on" not in clone.do("status", cwd=other) + clone.do("status")


def test_lines_that_were_only_moved_on_another_gpu_are_to_be_tried(origin, tmp_path):
    clone, other = Clone(origin, tmp_path), tmp_path / "clone-gpu1"
    first, second = "VAL_BPB = VAL_BPB + 0.1\n", "VAL_BPB = VAL_BPB * 2\n"
    text = train_py()
    (clone.folder / "train.py").write_text(
        text.replace("\nLUCK", f"\n{first}{second}LUCK")
    )
    clone.git("commit", "-qam", "two lines")
    clone.git("config", "color.ui", "always")
    clone.do("start", "nov24", "--gpus", "0,1")
    clone.do("wait", cwd=other)
    (clone.folder / "train.py").write_text(
        text.replace("\nLUCK", f"\n{second}{first}LUCK")
    )
    assert "keep: " in clone.do("run", "the other way round")
    assert "kept on gpu 0: the other way round" in clone.do("status", cwd=other)


def test_the_baseline_of_another_gpu_is_nothing_to_try(origin, tmp_path):
    clone, other = Clone(origin, tmp_path), tmp_path / "clone-gpu1"
    clone.edit(FAULT="slow")
    clone.git("commit", "-qam", "slow")
    clone.do("start", "nov24", "--gpus", "0,1", "--minutes=0", status=3)
    log = clone.folder / "results.tsv"
    commit = clone.git("rev-parse", "--short=8", "HEAD")
    with open(log, "a") as file:
        file.write(f"{commit}\t0.44\t9.0\tkeep\tbaseline, seed 42, gpu 0\n")
    assert "kept on" not in clone.do("status", cwd=other)
    clone.go()
    for tree in (clone.folder, other):
        clone.do("wait", cwd=tree)


def test_status_says_what_the_other_gpu_is_at_work_on(origin, tmp_path):
    clone, other = Clone(origin, tmp_path), tmp_path / "clone-gpu1"
    clone.do("start", "nov24", "--gpus", "0,1")
    clone.do("wait", cwd=other)
    clone.run_slowly(0.43)
    assert "at work on gpu 0: slow\n" in clone.do("status", cwd=other)
    assert "at work on" not in clone.do("status")
    clone.go()
    assert "keep: " in clone.do("wait")
    assert "at work on" not in clone.do("status", cwd=other)
    clone.experiment("a near miss", 0.431)
    (commit,) = (x for x in clone.attempts() if x != clone.git("rev-parse", "HEAD")[:8])
    job = {"commit": clone.git("rev-parse", commit), "idea": "a near miss", "runs": 0}
    edit_night(clone, open=job)
    said = clone.do("status", cwd=other)
    assert "at work on gpu 0: a near miss, so far 0.431000\n" in said


def test_a_commit_is_void_in_the_tree_of_its_own_gpu(origin, tmp_path):
    clone, other = Clone(origin, tmp_path), tmp_path / "clone-gpu1"
    clone.do("start", "nov24", "--gpus", "0,1")
    clone.do("wait", cwd=other)
    clone.experiment("a leak", 0.2)
    leak = clone.git("rev-parse", "HEAD")
    said = clone.do("void", leak, "sees the future", status=1, cwd=other)
    assert "no line of this GPU" in said and "void" not in "".join(clone.said())
    assert "again" in clone.do("void", leak, "sees the future") and clone.value() == 0.44


def test_one_gpus_verdict_leaves_the_same_commit_of_another_alone(origin, tmp_path):
    when = dict.fromkeys(("GIT_AUTHOR_DATE", "GIT_COMMITTER_DATE"), "2024-11-24T01:00:00")
    clone, other = Clone(origin, tmp_path, **when), tmp_path / "clone-gpu1"
    clone.do("start", "nov24", "--gpus", "0,1")
    clone.do("wait", cwd=other)
    clone.experiment("a leak", 0.2)
    (other / "train.py").write_text(train_py(0.2))
    clone.do("run", "a leak", cwd=other)  # within the same second
    leak = clone.git("rev-parse", "HEAD")
    assert clone.git("rev-parse", "HEAD", cwd=other) == leak
    clone.do("void", leak, "sees the future")
    assert clone.said()[-2:] == [
        "discard a leak, seed 42, gpu 0, void: sees the future",
        "keep a leak, seed 42, gpu 1",
    ]
    assert "a leak, mean 0.200000" in clone.do("status", cwd=other)


def test_a_new_night_does_not_take_the_log_of_a_tree_that_goes_on(origin, tmp_path):
    clone, other = Clone(origin, tmp_path), tmp_path / "clone-gpu1"
    clone.do("start", "nov24", "--gpus", "0,1")
    clone.do("wait", cwd=other)
    log = clone.said()
    said = clone.do("start", "nov25", status=1)
    assert f"nov24 may go on in {other}; if its agent has stopped, git worktree" in said
    assert clone.said() == log and "night nov24: " in clone.do("status")
    clone.git("worktree", "remove", str(other))
    clone.do("start", "nov25")
    assert clone.said() == BASELINE


def test_a_branch_that_git_cannot_make_leaves_the_log_of_the_night_before(clone):
    clone.git("switch", "-q", "main")
    clone.git("branch", "-qD", "autoresearch/nov24")
    clone.git("branch", "autoresearch")
    assert "autoresearch/nov25" in clone.do("start", "nov25", status=1)
    assert clone.said() == BASELINE and not [*clone.folder.glob("results-*")]


def test_a_night_whose_folder_is_renamed_goes_on_with_its_own_log(clone):
    log = clone.said()
    moved = clone.folder.with_name("moved")
    clone.folder.rename(moved)
    clone.folder.mkdir()  # another clone's, under the old name
    (clone.folder / "results.tsv").write_text("another night's\n")
    (moved / "train.py").write_text(train_py(0.43))
    assert "keep: " in clone.do("run", "wider MLP", cwd=moved)
    assert (clone.folder / "results.tsv").read_text() == "another night's\n"
    clone.folder = moved
    assert clone.said() == [*log, "keep wider MLP, seed 42"]


def test_a_night_begins_in_all_its_trees_or_in_none(origin, tmp_path):
    clone, other = Clone(origin, tmp_path), tmp_path / "clone-gpu1"
    clone.do("start", "nov24", "--gpus", "0,1")
    clone.do("wait", cwd=other)
    shutil.rmtree(other)  # and git still lists it
    held = clone.folder / ".git" / "refs" / "heads" / "autoresearch" / "nov25-gpu1.lock"
    held.touch()
    assert "git update-ref" in clone.do("start", "nov25", "--gpus", "0,1", status=1)
    assert "night nov24: " in clone.do("status")
    held.unlink()
    assert "GPU 1: for an agent" in clone.do("start", "nov25", "--gpus", "0,1")
    clone.do("wait", cwd=other)
    assert len(clone.said()) == 6


def test_a_tree_removed_at_night_ends_the_night_of_its_gpu_alone(origin, tmp_path):
    clone, other = Clone(origin, tmp_path), tmp_path / "clone-gpu1"
    clone.do("start", "nov24", "--gpus", "0,1")
    clone.do("wait", cwd=other)
    (other / "train.py").write_text(train_py(0.43))
    clone.do("run", "wider MLP", cwd=other)
    (other / "train.py").write_text(train_py(0.42, FAULT="slow"))
    clone.do("run", "slow", "--minutes=0", status=3, cwd=other)
    call = [sys.executable, "experiment.py", "wait"]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    waits = subprocess.Popen(call, cwd=other, env=clone.env, **how)
    wait_until(lambda: runs_begun(other) > 4)
    for _ in range(3):  # until it waits: it began before these
        clone.do("status", cwd=other)
    before = clone.said()
    other.rename(tmp_path / "gone")  # at once; it looks for it all the time
    said = waits.communicate(timeout=30)[0]
    shutil.rmtree(tmp_path / "gone")
    clone.git("worktree", "prune")
    assert waits.returncode == 1 and "was removed" in said, said
    assert "keep: " in clone.experiment("deeper", 0.435)
    clone.go()
    assert clone.said() == [*before, "keep deeper, seed 42, gpu 0"]
    said = clone.do("status")
    assert "1 experiment, 1 kept" in said and "kept on gpu 1: wider MLP" in said
    assert not other.exists()
    assert "GPU 1: for an agent" in clone.do("start", "nov25", "--gpus", "0,1")
    clone.do("wait", cwd=other)
    assert sorted(clone.said()) == sorted(f"{x}, gpu {g}" for x in BASELINE for g in "01")


@pytest.mark.parametrize("command", ["wait", "status", "run deeper"])
def test_a_tree_removed_before_its_locks_are_taken_is_called_removed_and_stays_so(
    clone, tmp_path, command
):
    code = f"""
import os, sys, experiment
take = experiment.Night.take
def removed(night):
    os.rename({str(clone.folder)!r}, {str(tmp_path / "gone")!r})
    return take(night)
experiment.Night.take = removed
sys.argv = ["experiment.py", *{command.split()!r}]
sys.exit(experiment.main())
"""
    said = clone.call([sys.executable, "-c", code], status=1)
    assert "was removed" in said.splitlines()[-1] and "Traceback" not in said
    assert not clone.folder.exists()  # else `start` finds it there


# ---- Words -------------------------------------------------------------------------------
def test_without_a_night_each_command_says_how_one_begins(fresh):
    for command in (
        ["run", "x"],
        ["wait"],
        ["status"],
        ["void", "HEAD", "x"],
        ["report"],
    ):
        said = fresh.do(*command, status=1)
        assert "no night has begun" in said and "experiment.py start TAG" in said


def test_the_checkout_of_a_run_is_no_place_for_a_night(clone):
    clone.experiment("wider MLP", 0.43)
    tree = clone.folder / "runs" / "nov24" / "tree"
    for command in (["status"], ["wait"], ["start", "nov25"]):
        said = clone.do(*command, status=1, cwd=tree)
        assert f"{tree} is the checkout of a run; cd {clone.folder}\n" in said


def test_the_report_names_the_group_that_it_needs(clone):
    (clone.folder / "analysis.py").write_text("import no_such_module")
    said = clone.do("report", status=1)
    assert "uv run --group analysis experiment.py report" in said
    writes = (
        "def write_report(folder, ledger, tonight, going): return folder / ledger.name"
    )
    (clone.folder / "analysis.py").write_text(writes)
    assert clone.do("report") == f"{clone.folder / 'results.tsv'}\n"


def test_the_page_is_told_which_attempts_have_no_verdict_yet(clone):
    writes = "def write_report(_, log, tonight, going): print(sorted(going))"
    (clone.folder / "analysis.py").write_text(writes)
    assert clone.do("report") == "[]\nNone\n"
    clone.run_slowly(0.43)
    (commit,) = clone.attempts()
    assert clone.do("report") == f"[('', '{commit.removeprefix('attempts/')}')]\nNone\n"
    clone.go()
    clone.do("wait")
    assert clone.do("report") == "[]\nNone\n"


def test_the_page_of_an_earlier_night_can_be_written(clone):
    writes = "def write_report(_, log, tonight, going):\n"
    writes += "    print(log.read_text().count('base'), tonight)"
    (clone.folder / "analysis.py").write_text(writes)
    said = clone.do("start", "nov25")
    (name,) = re.findall(r"report (results-\S+\.tsv)` writes its page", said)
    clone.experiment("wider MLP", 0.43)
    assert clone.do("report", name) == "3 False\nNone\n"
    assert "is no file" in clone.do("report", "results-gone.tsv", status=1)


def test_the_loop_needs_the_standard_library_alone():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'numpy', 'constants')))"
    )
    call = [sys.executable, "-S", "-c", f"{code}; import experiment"]
    subprocess.run(call, cwd=ROOT, check=True)
    assert len((ROOT / "experiment.py").read_text("utf-8").splitlines()) < 350
