"""What kind of machine this is, and what has to be set before torch is loaded.

Not edited. Imports nothing heavy: constants.py, which comes first, calls it.
"""

import gc
import getpass
import os
import platform
import threading
import time


def is_wsl() -> bool:
    """Return whether this is Linux inside Windows (WSL2), or a container in it."""
    return os.path.exists("/dev/dxg") or "microsoft" in platform.release().lower()


def set_environment(smoke: bool) -> None:
    """Set what torch reads when it is loaded, unless the user has set it; collect less often."""
    # Imports and tracing make a million objects that stay: 0.5 of 5 s went into looking at them.
    gc.set_threshold(50_000)
    if not is_wsl():  # where the first allocation of such a segment may fail
        # In one growing segment no batch is lost to gaps.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # Triton's default up to 3.9, which it says will change: that would change what kernels compute.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    if smoke:  # threads that wait do not spin, and there are few: a GPU's run may go on
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ.setdefault("GOMP_SPINCOUNT", "0")
        os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 2)))
    cache = os.environ.get("AUTORESEARCH_CACHE", "~")
    if os.path.expanduser("~") == "~" and not cache.startswith("~"):
        # A user without a home: libraries would keep files in a folder named ~, right here.
        os.environ["HOME"] = os.path.abspath(cache)
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        # A container whose user has no name: torch asks for one, for the name of a folder.
        os.environ["USER"] = f"uid{os.getuid()}" if hasattr(os, "getuid") else "user"


def available_memory() -> int:
    """Return the bytes of host memory that a process can have, 0 if the system does not say.

    What caches files is among them: the system gives it back.
    """
    try:
        with open("/proc/meminfo") as file:
            sizes = dict(line.split(":") for line in file)
        return int(sizes["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return 0


def advise_late_start(seconds: float) -> str:
    """Return what helps against a start-up that took too long, `seconds` after its process began.

    On two idle cores a smoke run's main thread waits for 0.1 of 12 s, beside two busy loops
    for 36 of 64.
    """
    try:
        with open("/proc/self/schedstat") as file:
            waited = (
                int(file.read().split()[1]) / 1e9
            )  # of the main thread, while it could run
    except (OSError, ValueError, IndexError):
        waited = 0.0
    if waited < seconds / 4:
        return "compile less, or the machine is busy"
    busy = f"the machine is busy: other processes had the cores for {waited:.0f} s"
    return f"{busy}; end them or wait, and run again as it is"


def end_with(parent: int) -> None:
    """End this process soon after `parent`, which started it, has ended; not on Windows."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    if os.name != "nt":  # a process there keeps its parent's id
        threading.Thread(target=watch, daemon=True).start()
