"""A command whose output is lost goes on, or ends in a sentence; its exit status is right."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import constants as C

ROOT = Path(C.__file__).parent
LINES = """
import sys
for line in range(3):
    print("x" * 9000, flush=line < 2)
sys.stderr.write("done")
"""


def run_into(output: int, code: str, **env: str) -> tuple[int, str]:
    """Run `code` with its standard output there; return the exit status and the errors."""
    how = {"cwd": ROOT, "env": os.environ | env, "stderr": subprocess.PIPE, "text": True}
    done = subprocess.run([sys.executable, "-c", code], stdout=output, **how)
    os.close(output)
    return done.returncode, done.stderr


def unread_pipe() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def test_lost_output_ends_nothing_and_the_status_is_right():
    full = os.open("/dev/full", os.O_WRONLY)  # as a log on a full disk
    leader, terminal = os.openpty()
    os.close(leader)  # a terminal that is gone: EIO
    code = "from harness.streams import keep_output; keep_output()" + LINES
    for output in (unread_pipe(), full, terminal):
        assert run_into(output, code) == (0, "done")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_run_without_a_result_fails_also_where_its_output_is_closed(closed):
    code = "import constants, types; from harness import guard, streams\n"
    code += "streams.keep_output(); guard.demand_result(types.SimpleNamespace(printed=0))"
    call = ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, code]
    assert subprocess.run(call, cwd=ROOT).returncode == 1


def test_a_file_never_gets_the_number_of_a_closed_stream():
    """A lock that does is closed by what opens the stream again."""
    code = "from harness.streams import keep_output; keep_output()\n"
    code += "assert open('constants.py').fileno() > 2"
    for closed in ("<&-", ">&- <&-", "2>&-"):
        call = ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, code]
        assert subprocess.run(call, cwd=ROOT).returncode == 0


def test_a_slow_reader_gets_all_that_was_written():
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    code = "from harness.streams import keep_output; keep_output()\n"
    code += "for n in range(3000): print(f'{n:99}')\n"
    how = {"cwd": ROOT, "stdout": writing}
    with subprocess.Popen([sys.executable, "-c", code], **how) as process:
        os.close(writing)
        time.sleep(0.5)  # the pipe is full
        with open(reading) as stream:
            assert len(stream.readlines()) == 3000
    assert process.returncode == 0


def test_a_run_whose_output_nobody_reads_goes_on():
    code = "from harness.run import open_run; open_run()" + LINES
    status = run_into(unread_pipe(), code, AUTORESEARCH_DRY_RUN="1")
    assert status == (0, "done")
