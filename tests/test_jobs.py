"""Jobs on threads under one line of progress: what is shown, what a failure does to the others."""

import sys
import threading
import time

import pytest

from harness.jobs import Progress, Stopped, metric, run_jobs


def quiet(total: float = 10) -> Progress:
    return Progress("doing", " things", total)


# ---- Progress -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "n, unit, text",
    [
        (0, "B", "0 B"),
        (999, "B", "999 B"),
        (1000, "B", "1.00 kB"),
        (1_804_000_000, "B", "1.80 GB"),
        (310_000_000, " characters", "310 M characters"),
        (17, " shards", "17 shards"),
        (9e12, "B", "9000 GB"),
    ],
)
def test_numbers_are_short(n, unit, text):
    assert metric(n, unit) == text


def test_line_has_bytes_rate_and_time_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress("fetching", "B", 1.8e9, done=2e8)
    assert progress.line() == "fetching: 200 M of 1.80 GB"
    now[0] += 10
    progress.add(4e8)
    assert progress.line() == "fetching: 600 M of 1.80 GB | 40.00 MB/s | 30 s left"
    progress.total = 18e9
    assert progress.line().endswith("| 7 min left")


def test_log_gets_whole_lines_seconds_apart(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = quiet(100)
    for _ in range(100):
        now[0] += 0.25
        progress.add(1)
        progress.show()
    out = capsys.readouterr().out
    assert out.splitlines() == [
        "doing: 40 of 100 things | 4 things/s | 15 s left",
        "doing: 80 of 100 things | 4 things/s | 5 s left",
    ]
    assert "\r" not in out and "\x1b" not in out


def test_terminal_gets_one_line_that_changes(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    progress = quiet(3)

    def job():
        time.sleep(0.3)
        progress.add(1)
        progress.note("a remark")

    run_jobs({k: job for k in "abc"}, 1, progress)
    out = capsys.readouterr().out
    assert out.count("\n") == 3 and out.count("\r") > 3 and "1 of 3 things" in out
    assert out.endswith("\r\x1b[K")  # and it is gone in the end


def test_line_fits_a_narrow_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "20")
    progress = quiet(3)
    progress.shown_at -= 1
    progress.show()
    assert capsys.readouterr().out == "\rdoing: 0 of 3 thing\x1b[K"
    assert len("doing: 0 of 3 thing") == 19


# ---- Jobs ---------------------------------------------------------------------------------------
def test_results_are_returned_by_name():
    assert run_jobs({k: lambda k=k: k * 2 for k in range(50)}, 4, quiet()) == {
        k: k * 2 for k in range(50)
    }
    assert run_jobs({}, 1, quiet()) == {}


def test_results_come_in_the_order_of_the_jobs_not_of_their_ends():
    jobs = {k: lambda k=k: time.sleep((5 - k) / 50) for k in range(5)}
    assert list(run_jobs(jobs, 5, quiet())) == [0, 1, 2, 3, 4]


def test_another_error_stops_the_others_at_once():
    progress, stopped = quiet(), threading.Event()

    def work():
        try:
            while True:
                progress.add(1)
                progress.pause(0.01)
        except Stopped:
            stopped.set()
            raise

    def fail():
        time.sleep(0.05)
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        run_jobs({"a": work, "b": fail, "c": work}, 2, progress)
    assert stopped.is_set()


def test_a_long_wait_ends_when_another_job_fails():
    progress, start = quiet(), time.monotonic()

    def fail():
        time.sleep(0.05)
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        run_jobs({"a": lambda: progress.pause(30), "b": fail}, 2, progress)
    assert (
        time.monotonic() - start < 0.9
    )  # one second is what it would wait for a job that hangs


def test_lost_connection_of_one_leaves_the_others_at_work():
    done = []

    def fail():
        raise ConnectionError("x is gone")

    def work():
        time.sleep(0.2)
        done.append(1)

    with pytest.raises(ConnectionError, match="1 of 3 failed, 2 are done; x is gone"):
        run_jobs({"a": fail, "b": work, "c": work}, 2, quiet())
    assert done == [1, 1]


def test_one_that_is_done_is_not_said_in_the_plural():
    def fail():
        raise ConnectionError("x is gone")

    with pytest.raises(ConnectionError, match="1 of 2 failed, 1 is done; x is gone"):
        run_jobs({"a": fail, "b": int}, 2, quiet())
    assert Progress("checking", " files", 1).line() == "checking: 0 of 1 file"


def test_counts_of_many_threads_add_up():
    progress = quiet()
    run_jobs(
        {k: lambda: [progress.add(1) for _ in range(20_000)] for k in range(8)},
        8,
        progress,
    )
    assert progress.done == 160_000
