"""The threads of preparation: jobs side by side, and what is shown of their progress."""

import os
import queue
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

from harness.files import describe

LOG_SECONDS = 10  # between two lines of progress where they are not on a terminal


class Stopped(Exception):
    """Ends a job because another one failed, or because the user wants it to end."""


class Progress:
    """What has been done of a total: one line that changes, or in a log line by line.

    what, unit: words of that line. total, done: amounts in that unit; done: at first.
    Jobs on any thread call `add` and `pause`, which raise Stopped once `stop` is set.
    """

    def __init__(self, what: str, unit: str, total: float, done: float = 0):
        self.what = what
        self.unit = unit
        self.total = total
        self.done = done
        self.before = done  # what was there already says nothing about the speed
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.terminal = sys.stdout is not None and sys.stdout.isatty()
        self.started_at = time.monotonic()
        self.shown_at = self.started_at

    def add(self, n: float) -> None:
        """Count `n` more as done."""
        if self.stop.is_set():
            raise Stopped
        with self.lock:
            self.done += n

    def expect(self, n: float) -> None:
        """Count `n` more as still to do."""
        with self.lock:
            self.total += n

    def pause(self, seconds: float) -> None:
        """Sleep, until `stop` is set at most."""
        if self.stop.wait(seconds):
            raise Stopped

    def line(self) -> str:
        """Return "fetching: 510 M of 1.80 GB | 45.10 MB/s | 29 s left"."""
        seconds = time.monotonic() - self.started_at
        speed = max(self.done - self.before, 0) / max(seconds, 1e-3)
        done = metric(self.done, "").strip()
        unit = self.unit.removesuffix("s") if self.total == 1 else self.unit
        parts = [f"{self.what}: {done} of {metric(self.total, unit)}"]
        if speed:
            left = max(self.total - self.done, 0) / speed
            clock = f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min"
            parts += [f"{metric(speed, self.unit)}/s", f"{clock} left"]
        return " | ".join(parts)

    def show(self) -> None:
        """Print the line if it is time."""
        now = time.monotonic()
        if now - self.shown_at < (0.2 if self.terminal else LOG_SECONDS):
            return
        self.shown_at = now
        if self.terminal:
            # A line that is wrapped could not be overwritten.
            columns = shutil.get_terminal_size().columns
            print(f"\r{self.line()[: columns - 1]}\x1b[K", end="", flush=True)
        else:
            print(self.line(), flush=True)

    def note(self, text: str) -> None:
        """Print a line of its own, above the one that changes."""
        clear = "\r\x1b[K" if self.terminal else ""
        # Text and end of line in one write: other threads print as well.
        print(f"{clear}{text}\n", end="", flush=True)


def metric(n: float, unit: str) -> str:
    """Return a number of about three digits with its unit, such as "1.80 GB"."""
    prefixes = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
    scale, prefix = next((pair for pair in prefixes if n >= pair[0]), (1, ""))
    digits = 0 if scale == 1 or n >= 100 * scale else 2
    return f"{n / scale:.{digits}f} {prefix}{unit}".replace("  ", " ")


def run_jobs(jobs: dict[str, Callable], workers: int | None, progress: Progress) -> dict:
    """Run the named jobs on threads, showing `progress`; return name -> job's result.

    A ConnectionError leaves the others at work, until as many jobs have failed as there
    are workers; then one is raised for all. Anything else, Ctrl-C too, stops them and is
    raised.
    """
    finished = queue.SimpleQueue()
    results = {}
    problems = []
    pool = ThreadPoolExecutor(workers)
    futures = {pool.submit(job): name for name, job in jobs.items()}
    for future in futures:
        future.add_done_callback(finished.put)
    try:
        while len(results) + len(problems) < len(jobs):
            try:
                future = finished.get(timeout=0.2)  # the main thread stays open to Ctrl-C
                results[futures[future]] = future.result()
            except queue.Empty:
                pass
            except ConnectionError as error:
                problems.append(str(error))
                if len(problems) == (workers or len(jobs)):
                    break
            progress.show()
        if problems:
            done = f"{len(results)} {'is' if len(results) == 1 else 'are'} done"
            count = f"{len(problems)} of {len(jobs)} failed, {done}"
            more = ["and more"] if len(problems) > 4 else []
            raise ConnectionError("; ".join([count, *sorted(problems)[:4], *more]))
        return {name: results[name] for name in jobs}  # not in the order of their ends
    finally:
        progress.stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
        # So that they leave nothing behind; one that hangs is not waited for.
        wait(futures, timeout=1)
        if progress.terminal:
            print("\r\x1b[K", end="", flush=True)


def describe_all(folder: Path, names: list[str]) -> dict[str, dict]:
    """Return name -> what `describe` returns for that file of `folder`."""
    progress = Progress("checking", " files", len(names))

    def job(name: str) -> dict:
        progress.add(1)
        return describe(folder / name)

    jobs = {name: partial(job, name) for name in names}
    return run_jobs(jobs, os.cpu_count(), progress)
