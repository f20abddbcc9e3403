"""Killed, interrupted, disturbed by another, out of disk: nothing half-written, nothing lost."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import child
import constants as C
import prepare
from harness import download

NAMES = [C.SHARD_NAME.format(number) for number in (0, 1, C.VAL_SHARD)]


def listing(folder: Path) -> dict[str, bytes]:
    """Return name -> bytes of every file below `folder`, hidden ones included, but for the lock."""
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != ".lock"}


def until(condition: Callable, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


class Bench:
    """A cache to prepare in child processes, what a good preparation of it holds, and a hub."""

    def __init__(self, folder: Path, good: Path, hub):
        self.cache, self.good, self.hub, self.log = (
            folder / "cache",
            good,
            hub,
            folder / "log",
        )
        self.folder = self.cache / "climbmix"

    def start(self, *argv: str, log: str = "log", **how):
        return child.start(
            self.cache, self.hub.url, self.log.with_name(log), *argv, **how
        )

    def run(self, *argv: str, **how) -> tuple[int, str]:
        """Prepare; return exit status and output."""
        process = self.start(*argv, **how)
        process.join(60)
        return process.exitcode, self.log.read_text()

    def keep(self, *parts: str) -> None:
        """Bring the folder to the state in which just these parts have been prepared."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        for part in parts:
            shutil.copytree(self.good / part, self.folder / part)

    def check_whole(self) -> None:
        """Whatever has its name has its bytes."""
        good = listing(self.good)
        there = {
            n: b
            for n, b in listing(self.folder).items()
            if not n.endswith((".tmp", ".part", download.ANSWERS))
        }
        assert there.items() <= good.items()


@pytest.fixture(scope="module")
def good(shard_folder, tmp_path_factory) -> Path:
    """What an undisturbed preparation of two training shards leaves."""
    from hub import Hub

    place = tmp_path_factory.mktemp("good")
    with Hub(shard_folder) as hub:
        process = child.start(place, hub.url, place / "log")
        process.join(60)
    assert process.exitcode == 0, (place / "log").read_text()
    return place / "climbmix"


@pytest.fixture
def bench(tmp_path, good, hub) -> Bench:
    return Bench(tmp_path, good, hub)


# Of each phase: what is there before it, how one sees that it has begun, how long it is made last.
PHASES = {
    "download": ((), lambda folder: any(folder.glob("shards/.*.part")), 0.5),
    "tokenizer": (("shards",), lambda folder: (folder / ".lock").exists(), 0.35),
    "rows": (("shards", "tokenizer"), lambda folder: (folder / "rows").exists(), 0.3),
}


# ---- Killed -------------------------------------------------------------------------------------
@pytest.mark.parametrize("phase", PHASES)
def test_killed_at_any_moment_and_run_again_it_ends_with_the_same_bytes(bench, phase):
    before, has_begun, seconds = PHASES[phase]
    rng, killed, parts = random.Random(phase), 0, 0
    for _ in range(10):
        bench.keep(*before)
        bench.hub.rate = 40_000
        process = bench.start(slow=0.02)
        until(lambda: has_begun(bench.folder))
        time.sleep(rng.uniform(0, seconds))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        bench.check_whole()
        if (bench.folder / "manifest.json").exists():
            assert process.exitcode == 0 or listing(bench.folder) == listing(bench.good)
        parts += any(name.endswith((".part", ".tmp")) for name in listing(bench.folder))
        bench.hub.rate = float("inf")
        assert bench.run()[0] == 0
        assert listing(bench.folder) == listing(bench.good)
    assert killed >= 7 and (
        parts or phase == "tokenizer"
    )  # in the midst of it, not after


# ---- Interrupted --------------------------------------------------------------------------------
@pytest.mark.parametrize("phase", [*PHASES, "stalled server"])
def test_ctrl_c_ends_it_within_two_seconds_in_one_sentence(bench, phase):
    before, has_begun, _ = PHASES.get(phase, PHASES["download"])
    bench.keep(*before)
    bench.hub.rate = 20_000
    if phase == "stalled server":
        bench.hub.fail("stall", times=100)
    process = bench.start(slow=0.1)
    until(lambda: has_begun(bench.folder))
    time.sleep(0.15)
    start = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    process.join(20)
    assert time.monotonic() - start < 2
    said = bench.log.read_text()
    assert process.exitcode == 130, said
    assert said.splitlines()[-1].startswith("prepare.py: interrupted; run ")
    assert "Traceback" not in said and "Exception" not in said
    assert not [name for name in listing(bench.folder) if name.endswith(".tmp")]
    bench.check_whole()
    bench.hub.faults.clear()
    bench.hub.rate = float("inf")
    assert bench.run()[0] == 0
    assert listing(bench.folder) == listing(bench.good)


def test_ctrl_c_ends_the_command_itself(bench):
    bench.hub.rate = 20_000
    env = os.environ | {"AUTORESEARCH_SMOKE": "0", "AUTORESEARCH_CACHE": str(bench.cache)}
    env["HF_HUB_OFFLINE"] = "0"
    command = [sys.executable, prepare.__file__, "--num-shards", "2"]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: PHASES["download"][1](bench.folder))
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert time.monotonic() - start < 2 and process.returncode == 130
    assert said.splitlines()[-1].startswith(
        "prepare.py: interrupted; run `uv run prepare.py --num-shards 2` again"
    )
    assert "Traceback" not in said


# ---- Another one --------------------------------------------------------------------------------
def test_two_at_once_do_the_work_once(bench):
    bench.hub.rate = 40_000
    first = bench.start()
    until(lambda: PHASES["download"][1](bench.folder))
    second = bench.start(log="second")
    first.join(60)
    second.join(60)
    assert (first.exitcode, second.exitcode) == (0, 0)
    said = bench.log.with_name("second").read_text()
    assert f"another prepare.py is at work in {bench.folder}; waiting" in said
    assert "fetching" not in said and "trained" not in said and ", 0 packed in" in said
    assert [bench.hub.count("cdn", "GET", name) for name in NAMES] == [1, 1, 1]
    assert listing(bench.folder) == listing(bench.good)


def test_one_that_waits_goes_on_when_the_other_is_killed(bench):
    bench.hub.rate = 40_000
    first = bench.start()
    until(lambda: PHASES["download"][1](bench.folder))
    second = bench.start(log="second")
    until(lambda: "waiting" in listing(bench.log.parent).get("second", b"").decode())
    first.kill()
    second.join(60)
    assert second.exitcode == 0
    assert listing(bench.folder) == listing(bench.good)


# ---- No space, no permission --------------------------------------------------------------------
@contextlib.contextmanager
def tmpfs(folder: Path, options: str) -> Iterator[None]:
    """Mount a file system in memory; skip the test where that is not allowed."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if (
        shutil.which("mount") is None
        or subprocess.run(mount, capture_output=True).returncode
    ):
        pytest.skip("mounting is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("phase, limit", [("download", 10_000), ("rows", 60_000)])
def test_file_that_cannot_grow_is_named_with_what_to_do(bench, phase, limit):
    status, said = bench.run(file_limit=limit)
    assert status == 1 and "Traceback" not in said
    last = said.splitlines()[-1]
    assert last.startswith("prepare.py: ") and "File too large" in last
    assert str(bench.folder / {"download": "shards", "rows": "rows"}[phase]) in last
    command = "uv run prepare.py --num-shards 2"
    assert (
        f"free some space or move AUTORESEARCH_CACHE, and run `{command}` again" in last
    )
    bench.check_whole()
    assert not [name for name in listing(bench.folder) if name.endswith(".tmp")]
    assert bench.run()[0] == 0
    assert listing(bench.folder) == listing(bench.good)


def test_disk_that_is_full_in_the_middle_is_named_with_what_to_do(bench):
    with tmpfs(bench.cache, "size=240k"):
        status, said = bench.run()
        assert status == 1 and "Traceback" not in said
        last = said.splitlines()[-1]
        assert "No space left on device" in last and str(bench.folder / "rows") in last
        bench.check_whole()
        subprocess.run(["mount", "-o", "remount,size=10m", str(bench.cache)], check=True)
        assert bench.run()[0] == 0
        assert [bench.hub.count("cdn", "GET", name) for name in NAMES] == [1, 1, 1]
        assert listing(bench.folder) == listing(bench.good)


def test_disk_that_is_too_small_is_said_before_the_first_byte(bench):
    with tmpfs(bench.cache, "size=60k"):
        status, said = bench.run()
    assert status == 1
    assert "kB free, and shards and rows need" in said.splitlines()[-1]
    assert bench.hub.count("cdn", "GET") == 0


def test_cache_that_is_read_only_will_do_when_all_is_there(bench):
    with tmpfs(bench.cache, "size=10m"):
        bench.keep("shards", "tokenizer")
        subprocess.run(["mount", "-o", "remount,ro", str(bench.cache)], check=True)
        status, said = bench.run()
        assert status == 1 and "Traceback" not in said
        last = said.splitlines()[-1]
        assert "Read-only file system" in last and str(bench.folder) in last
        assert "make it writable or set AUTORESEARCH_CACHE" in last
        subprocess.run(["mount", "-o", "remount,rw", str(bench.cache)], check=True)
        assert bench.run()[0] == 0
        subprocess.run(["mount", "-o", "remount,ro", str(bench.cache)], check=True)
        status, said = bench.run()
        assert status == 0 and said.endswith("prepared\n"), said
        assert bench.run("--check")[0] == 0
        assert listing(bench.folder) == listing(bench.good)


@pytest.mark.skipif(os.getuid() == 0, reason="nothing is forbidden to root")
def test_cache_without_permission_is_named_with_what_to_do(bench):
    bench.cache.mkdir(mode=0o555)
    status, said = bench.run()
    assert status == 1
    assert "make it writable or set AUTORESEARCH_CACHE" in said.splitlines()[-1]
