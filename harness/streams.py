"""Standard output and error, which may be lost: the work counts, and nobody has to look on.

The standard library alone, for experiment.py.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


def drop(stream) -> None:
    """Let all that is written to a stream go nowhere, what it still holds included."""
    # Below the stream, or the exit status would be that of a failed flush.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class LastingOutput:
    """A stream whose loss ends nothing: a closed pipe, a dead terminal, a full log disk.

    What cannot be written is dropped, as is all that comes after it.
    """

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write `text`; return its length, as streams do."""
        with self.dropping():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        with self.dropping():
            self.stream.flush()

    @contextmanager
    def dropping(self) -> Iterator[None]:
        """Let what is written go nowhere once the stream fails."""
        try:
            yield
        except OSError:
            drop(self.stream)


def keep_output(**settings) -> None:
    """Write standard output and error line by line, and go on without one that is lost.

    A process that is killed leaves its log whole. settings: further ones of `reconfigure`.
    """
    # Else the next file, a lock perhaps, gets the number of one that is closed.
    while (nowhere := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(nowhere)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed when Python started
            stream = open(os.devnull, "w")
            setattr(sys, name, stream)
        with suppress(OSError, ValueError):  # else a slow reader does not get all of it
            os.set_blocking(stream.fileno(), True)
        stream.reconfigure(line_buffering=True, **settings)
        if not isinstance(stream, LastingOutput):
            setattr(sys, name, LastingOutput(stream))
