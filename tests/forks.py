"""Python processes forked from a server that has imported torch and its compiler.

A fresh interpreter takes 2 s for torch and 5 s if it compiles; a fork takes hundredths. It is as a
fresh one in arguments, environment, folder, files and the way it ends, exit hooks included; but
what torch reads when it is loaded, such as OMP_NUM_THREADS, is the server's, and there is no GPU,
which a fork could not use. Each process of the tests has a server of its own, once it needs one.
"""

import atexit
import functools
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import types
import warnings
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

LONGEST = 300  # seconds that a process may take


class Job(NamedTuple):
    """A process: python *argv, with files for what it prints; one that is there may be a pipe."""

    argv: list[str]  # a script and its arguments, or "-c" and code
    env: dict[str, str]
    folder: str
    out: str
    err: str  # may be `out`
    seconds: int = LONGEST


# ---- For tests ----------------------------------------------------------------------------------
@functools.cache
def server() -> subprocess.Popen:
    """Return the process that forks, which is up, or soon will be."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env.pop("PYTHONPATH", None)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, __file__], env=env, **pipes)
    atexit.register(process.wait)
    atexit.register(process.stdin.close)  # before it: the server ends then
    return process


def start(jobs: list[Job], at_once: int = 1) -> None:
    """Have the jobs done, in their order, so many at a time; `finish` is to be called."""
    print(json.dumps([at_once, jobs]), file=server().stdin, flush=True)


def finish() -> list[int]:
    """Wait for the jobs of `start`; return their exit statuses, -9 for one that was killed."""
    return json.loads(server().stdout.readline())


def run(
    *argv, env: dict | None = None, folder: Path | None = None, seconds: int = 120
) -> subprocess.CompletedProcess:
    """Return what `python *argv` printed and ended with, as subprocess.run does."""
    with tempfile.TemporaryDirectory() as place:
        out, err = f"{place}/out", f"{place}/err"
        where = [{**(os.environ if env is None else env)}, str(folder or Path.cwd())]
        start([Job([*map(str, argv)], *where, out, err, seconds)])
        (status,) = finish()
        printed = [Path(path).read_text("utf-8", "replace") for path in (out, err)]
    return subprocess.CompletedProcess(argv, status, *printed)


# ---- The server ---------------------------------------------------------------------------------
def serve() -> None:
    """Do the jobs of each line of stdin; answer each with a line."""
    import numpy  # noqa: F401  (what most of the processes would import)
    import pyarrow.parquet  # noqa: F401
    import requests  # noqa: F401
    import rustbpe  # noqa: F401
    import tiktoken  # noqa: F401
    import torch._inductor.async_compile
    import torch._subclasses.fake_tensor
    import torch.nn.attention.flex_attention

    torch.compile(len)  # imports the rest
    gc.freeze()  # no collection in a fork looks at all this
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    while line := sys.stdin.readline():
        at_once, jobs = json.loads(line)
        running: dict[int, int] = {}  # process: number of its job
        statuses = [0] * len(jobs)

        def wait(running=running, statuses=statuses) -> None:
            pid, status = os.wait()
            statuses[running.pop(pid)] = os.waitstatus_to_exitcode(status)

        for number, job in enumerate(jobs):
            if len(running) == at_once:
                wait()
            with warnings.catch_warnings():  # of a thread, which is pyarrow's and idle
                warnings.simplefilter("ignore", DeprecationWarning)
                pid = os.fork()
            if not pid:
                answers.close()
                become(Job(*job))
            running[pid] = number
        while running:
            wait()
        print(json.dumps(statuses), file=answers, flush=True)


def become(job: Job) -> NoReturn:
    """Be the process of `job` from here on."""
    signal.alarm(job.seconds)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    os.chdir(job.folder)
    os.environ.clear()
    os.environ.update(job.env)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    files = [os.open(os.devnull, os.O_RDONLY), os.open(job.out, flags)]
    files.append(files[1] if job.err == job.out else os.open(job.err, flags))
    for number, file in enumerate(files):
        os.dup2(file, number)
    script = job.argv[0] if job.argv[0] != "-c" else ""
    sys.argv[:] = job.argv if script else ["-c", *job.argv[2:]]
    given = job.env.get("PYTHONPATH", "")
    sys.path[:1] = [os.path.dirname(os.path.abspath(script)) if script else ""]
    sys.path[1:1] = given.split(os.pathsep) if given else []
    try:
        if script:
            runpy.run_path(script, run_name="__main__")
        else:
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(job.argv[1], "<string>", "exec"), vars(main))
        end()
    except BaseException as error:
        end(error)


def end(error: BaseException | None = None) -> NoReturn:
    """End the process as Python does, but at once: to take torch's modules down takes 1.5 s."""
    status = 0 if error is None else 1
    if not isinstance(error, SystemExit | None):
        sys.excepthook(type(error), error, error.__traceback__)
    elif error is not None and not isinstance(error.code, int | None):
        print(error.code, file=sys.stderr)
    elif error is not None:
        status = error.code or 0
    threading._shutdown()
    atexit._run_exitfuncs()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    if isinstance(error, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status)


if __name__ == "__main__":
    serve()
