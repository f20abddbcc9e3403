"""A forked process is as a fresh one: what it is given, what it prints, how it ends."""

import os
import signal
import subprocess
import sys
import time

import pytest

import forks

LOOKS = """import atexit, json, os, sys
given = {k: v for k, v in os.environ.items() if k not in ("LC_CTYPE", "OMP_NUM_THREADS")}
own = [p for p in sys.path if "zip" not in p]
print(json.dumps([__name__, sys.argv, own, given, os.getcwd(), sys.stdin.read()]))
print("to the side", file=sys.stderr)
atexit.register(print, "after all")
"""
ENDS = {
    "by itself": "",
    "by a number": "sys.exit(3)",
    "by a sentence": "sys.exit('why')",
    "at once": "os._exit(4)",
    "by a hook": "sys.excepthook = lambda *_: os._exit(5)\n1 / 0",
    "by Ctrl-C": "import signal; os.kill(os.getpid(), signal.SIGINT)",
    "killed": "sys.stdout.flush(); os.kill(os.getpid(), 9)",
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("kind", ["script", "code"])
def test_a_fork_sees_and_says_what_a_fresh_process_does(tmp_path, kind, end):
    code = LOOKS + ENDS[end]
    (tmp_path / "script.py").write_text(code)
    (tmp_path / "elsewhere").mkdir()
    argv = ["../script.py"] if kind == "script" else ["-c", code]
    env = os.environ | {"PYTHONPATH": "/a:/b", "OWN": "1"}
    where = {"env": env, "cwd": tmp_path / "elsewhere", "stdin": subprocess.DEVNULL}
    command = [sys.executable, *argv, "x", "y"]
    fresh = subprocess.run(command, **where, capture_output=True, text=True)
    forked = forks.run(*argv, "x", "y", env=env, folder=tmp_path / "elsewhere")
    assert forked.returncode == fresh.returncode
    assert forked.stdout == fresh.stdout and '"OWN": "1"' in fresh.stdout
    assert forked.stderr.splitlines()[-1:] == fresh.stderr.splitlines()[-1:]


def test_a_fork_has_torch_at_once_and_can_compile(tmp_path):
    start = time.process_time()
    code = "import time, sys; start = time.process_time()\n"
    code += "import torch, torch._dynamo; assert time.process_time() - start < 0.5\n"
    code += "x = torch.ones(3, requires_grad=True)\n"
    code += "torch.compile(lambda x: x.sin(), backend='aot_eager')(x).sum().backward()\n"
    code += "print(x.grad.cos().sum() > 0, 'constants' in sys.modules)"
    done = forks.run("-c", code)
    assert (done.returncode, done.stdout) == (0, "tensor(True) False\n"), done.stderr
    assert time.process_time() - start < 1


def test_a_fork_that_takes_too_long_is_ended():
    done = forks.run("-c", "import time; time.sleep(60)", seconds=1)
    assert done.returncode == -signal.SIGALRM


def test_jobs_run_in_their_order_so_many_at_a_time(tmp_path):
    code = "import sys, time; print(time.monotonic()); time.sleep(0.6); print(time.monotonic())"
    outs = [str(tmp_path / str(k)) for k in range(4)]
    env, here = {**os.environ}, str(tmp_path)
    jobs = [forks.Job(["-c", code], env, here, out, out) for out in outs]
    forks.start(jobs, at_once=2)
    assert forks.finish() == [0] * 4
    times = [[float(line) for line in open(out)] for out in outs]
    begins, ends = zip(*times, strict=True)
    assert max(begins[:2]) < min(ends[:2]) < min(begins[2:])
    for begin in begins:
        assert sum(b < begin < e for b, e in times) < 2
