"""Files that appear whole or not at all, their hashes, and the folder that holds them."""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import constants as C

try:
    import fcntl
except ImportError:  # Windows: no lock there
    fcntl = None

WINDOWS = os.name == "nt"


def command_with(setting: str, command: str, windows: bool = WINDOWS) -> str:
    """Return a command with a variable set for it; windows: in PowerShell's form.

    setting: such as "AUTORESEARCH_SMOKE=1".
    """
    return f"$env:{setting}; {command}" if windows else f"{setting} {command}"


def smoke_command(command: str, windows: bool = WINDOWS) -> str:
    """Return a command under the smoke rules; windows: in PowerShell's form."""
    return command_with("AUTORESEARCH_SMOKE=1", command, windows)


# The commands under the rules in force, for the advice in errors; prepare.py puts its own
# arguments to its own.
PREPARE = "uv run prepare.py"
TRAIN = "uv run train.py"
if C.SMOKE:
    PREPARE = smoke_command(PREPARE)
    TRAIN = smoke_command(TRAIN)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add `path` to an OSError of the block that names no file, such as a full disk's."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise


def describe(path: Path) -> dict:
    """Return {"size": bytes, "sha256": hex} of a file; a missing one counts as empty."""
    digest = hashlib.sha256()
    size = 0
    if path.is_file():
        with naming(path), open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
                size += len(chunk)
    return {"size": size, "sha256": digest.hexdigest()}


def data_dir() -> Path:
    """Return the folder that holds everything prepared under the rules in force.

    Ends the process with a sentence if it is in a home directory that nobody knows.
    """
    root = os.environ.get("AUTORESEARCH_CACHE") or "~/.cache/autoresearch"
    try:
        root = Path(root).expanduser()
    except RuntimeError:  # a container's user without a name, and no HOME
        problem = "this user has no home directory, where data would lie"
        sys.exit(f"{problem}; set HOME to a folder that can be written, and start again")
    return root.absolute() / ("smoke" if C.SMOKE else "climbmix")


@contextmanager
def atomic_write(path: Path) -> Iterator:
    """Open a temporary binary file that becomes `path` only if the block succeeds.

    An OSError names the file it is about.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path), open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path, pid: int | str = "*") -> None:
    """Delete what `atomic_write` of process `pid` left below `folder` when it was killed.

    pid: "*" stands for every process. Looks into `folder` and the folders in it.
    """
    for pattern in (f".*.{pid}.tmp", f"*/.*.{pid}.tmp"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def content_key(*parts: object) -> str:
    """Return 12 hex digits that change with any of `parts`, which JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep `folder` to one preparation at a time, waiting for another and saying so.

    The system drops the lock with the process, however that ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(folder / ".lock", "ab"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                busy = f"another prepare.py is at work in {folder}"
                print(f"{busy}; waiting for its end", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        # A folder that cannot be written, or a system without locks.
        except (OSError, AttributeError) as error:
            advice = "do not prepare twice at once"
            print(f"no lock on {folder} ({error}); {advice}", flush=True)
        yield
