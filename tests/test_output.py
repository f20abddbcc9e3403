"""The lines of the log that tools read."""

import random

import pytest

import constants as C
from conftest import STEP_LINE
from harness.output import plural, step_line, uneven_line, warning
from harness.run import Step


def a_step(number: int = 412) -> Step:
    step = Step(number, 0.4321, 1)
    step.loss, step.lrm, step.tokens, step.seconds = 3.14159, 0.875, 524_288, 0.315
    return step


def test_a_step_line_has_the_fields_of_the_family():
    line = step_line(a_step(), 170.4)
    assert STEP_LINE.fullmatch(line)
    assert line.startswith("step 00412 (43.2%) | loss: 3.1416 | lrm: 0.8")
    assert "| dt: 315ms | tok/sec: 1,664,406 | epoch: 1 | remaining: 170s" in line


def test_the_time_that_remains_is_never_negative():
    assert step_line(a_step(), -1.0).endswith("remaining: 0s")
    assert step_line(a_step(), 2.0).endswith("remaining: 2s")


def test_a_warning_begins_with_its_kind():
    assert warning("gpu", "it is shared") == "warning: gpu: it is shared"
    assert warning("edit", "no change") == "warning: edit: no change"


def test_a_run_beside_a_busy_host_is_told_so_and_a_gpu_that_gets_warm_is_none():
    """A run lost 7 % of its steps so, and its val_bpb was 0.005 higher without a word."""
    generator = random.Random(0)
    even = [generator.gauss(3.7e6, 0.06e6) for _ in range(1700)]
    assert uneven_line(even) == ""
    busy = [x * (0.8 if 400 < k < 700 else 1) for k, x in enumerate(even)]
    assert uneven_line(busy).startswith("warning: host: a tenth of the steps were 2")
    generator.shuffle(busy)  # wherever it was
    assert uneven_line(busy).startswith("warning: host: ")
    warm = [x * (1 - 0.1 * k / len(even)) for k, x in enumerate(even)]
    assert uneven_line(warm) == ""
    long = [x * (0.85 if k < 950 else 1) for k, x in enumerate(even)]
    assert uneven_line(long)  # for more than half of the run
    late = [x * (0.1 if k % 20 == 0 else 1) for k, x in enumerate(even)]
    assert uneven_line(late) == ""  # a twentieth: evaluation, a checkpoint
    assert uneven_line([]) == uneven_line([1.0] * 5 + [9.0] * 5) == ""


def test_a_kind_that_no_tool_knows_is_refused():
    with pytest.raises(ValueError, match="'note' is no kind of warning; constants.py"):
        warning("note", "it rains")


def test_what_an_edit_is_warned_of_voids_nothing_and_a_slow_gpu_does():
    assert C.WARNINGS["gpu"] is True and C.WARNINGS["edit"] is False
    assert all(isinstance(voids, bool) for voids in C.WARNINGS.values())


def test_one_thing_is_not_said_in_the_plural():
    said = [plural(n, "file") for n in (0, 1, 2, 2000)]
    assert said == ["0 files", "1 file", "2 files", "2,000 files"]
