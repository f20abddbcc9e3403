"""Files that appear whole or not at all, their hashes, and the folder where everything lies."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import constants as C

try:
    import fcntl
except ImportError:  # Windows: no lock there
    fcntl = None

PREPARE = (
    "AUTORESEARCH_SMOKE=1 " if C.SMOKE else ""
) + "uv run prepare.py"  # advice in errors


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the operating system say which file it is about; a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise


def describe(path: Path) -> dict:
    """Return {"size": bytes, "sha256": hex} of a file; a missing one is like an empty one."""
    digest, size = hashlib.sha256(), 0
    if path.is_file():
        with naming(path), open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
                size += len(chunk)
    return {"size": size, "sha256": digest.hexdigest()}


def data_dir() -> Path:
    """Return the folder that holds everything prepared under the rules in force."""
    root = os.environ.get("AUTORESEARCH_CACHE") or Path.home() / ".cache" / "autoresearch"
    return Path(root).expanduser().absolute() / ("smoke" if C.SMOKE else "climbmix")


@contextmanager
def atomic_write(path: Path) -> Iterator:
    """Open a temporary binary file that becomes `path` only if the block succeeds."""
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
    """Delete what `atomic_write` of process `pid` left below `folder` when it was killed."""
    for path in [*folder.glob(f".*.{pid}.tmp"), *folder.glob(f"*/.*.{pid}.tmp")]:
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
                print(
                    f"another prepare.py is at work in {folder}; waiting for its end",
                    flush=True,
                )
                fcntl.flock(file, fcntl.LOCK_EX)
        except (OSError, AttributeError) as error:  # a folder to read only; no locks here
            print(
                f"no lock on {folder} ({error}); do not prepare twice at once", flush=True
            )
        yield
