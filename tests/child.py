"""A preparation in a process of its own, which a test may kill: full rules in the sizes of smoke.

The processes are forked from a server that has imported what they need, so that one takes
hundredths of a second and not the seconds that torch takes.
"""

import multiprocessing
import os
import resource
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest

import constants as C
import prepare
from harness import documents, download, jobs, packing
from harness.documents import read_documents


def context() -> multiprocessing.context.BaseContext:
    """Return what such processes are made with; the server is up then."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["child"])
    with (
        pytest.MonkeyPatch.context() as patch
    ):  # how the server finds what it is to import
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    return made


def _run(
    cache: Path, url: str, argv: list[str], log: Path, slow: float, file_limit: int
) -> None:
    os.environ |= {"AUTORESEARCH_CACHE": str(cache), "HF_ENDPOINT": url}
    with open(log, "wb", 0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    C.SMOKE = False
    download.hub_constants.HF_HUB_OFFLINE = False
    download.RETRY_SECONDS = (0, 0.1, 0.1)
    jobs.LOG_SECONDS = 0.1
    prepare.load_flash_attention = lambda: None

    def read_slowly(path):
        for batch in read_documents(path):
            time.sleep(slow)
            yield batch

    packing.read_documents = documents.read_documents = read_slowly
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    prepare.main(argv)


def read_and_weigh(path: Path, out) -> None:
    """Read a shard; report the error, the memory it took in MiB, and if conftest is imported.

    Here, for a test's own module imports conftest, whose folder no such process removes.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        said = f"read {sum(map(len, read_documents(path)))} documents"
    except (ValueError, OSError) as error:
        said = str(error)
    took = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    out.put((said, took, "conftest" in sys.modules))


def start(
    cache: Path, url: str, log: Path, *argv: str, slow: float = 0.0, file_limit: int = 0
) -> multiprocessing.Process:
    """Start `prepare.py *argv`, its output in `log`.

    slow: seconds that reading a batch of documents takes; file_limit: bytes that a file may have,
    0: any number. `exitcode` is that of the command, or -9 after a SIGKILL.
    """
    arguments = (cache, url, ["--num-shards", "2", *argv], log, slow, file_limit)
    process = context().Process(target=_run, args=arguments, daemon=True)
    process.start()
    return process
