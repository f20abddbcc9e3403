"""The log of a night, results.tsv, and what the log of one run says. Not edited."""

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from loop.git import fcntl

HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"
STATUSES = ("keep", "discard", "crash")
ASIDE = "Set TORCHDYNAMO_VERBOSE=1"  # what torch.compile adds to every error
# How a description ends. What stands before is the idea, in whatever words.
TAIL = re.compile(
    r"(?P<idea>.*?), seed (?P<seed>\d+)(, gpu (?P<gpu>\w+))?"
    r"(, (?P<steps>\d+) steps"
    r"(, (?P<speed>[\d.]+) M tok/s|(?P<smoke> under the smoke rules)))?"
    r"(, void: (?P<void>.*))?"
)


# ---- The log -----------------------------------------------------------------------------
@dataclass
class Line:
    """A line of the log; without status and commit if it is no run."""

    commit: str
    val_bpb: float
    memory_gb: float
    status: str
    description: str
    idea: str = ""
    seed: int = 0
    gpu: str = ""  # "" on a night with one
    steps: int = 0  # 0: the log does not say
    speed: float = 0.0  # millions of tokens per second; 0: it means nothing
    smoke: bool = False  # under the smoke rules
    void: str = ""  # why

    @property
    def measured(self) -> bool:
        """Whether it has a number, though `experiment.py void` may have withdrawn it."""
        return self.status in ("keep", "discard") and 0 < self.val_bpb < math.inf

    @property
    def valid(self) -> bool:
        """Whether it is a result to count with."""
        return self.measured and not self.void

    def text(self) -> str:
        """Return it as it stands in the log."""
        start = f"{self.commit}\t{self.val_bpb:.6f}\t{self.memory_gb:.1f}"
        return f"{start}\t{self.status}\t{self.description}"


def number(text: str) -> float:
    """Return the number that `text` is, nan if it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def amount(text: str) -> float:
    """Return the number that `text` is, 0 if it is none or not finite."""
    return number(text) if math.isfinite(number(text)) else 0.0


def read_line(text: str) -> Line:
    """Return one line of a log. Hashes stay text, quotes mean nothing.

    But for what a spreadsheet adds: tabs behind, and quotes around a text with commas.
    """
    text = text.rstrip("\r")
    fields = text.split("\t", 4)
    if len(fields) < 5 or fields[3] not in STATUSES:
        return Line("", math.nan, math.nan, "", text)
    fields[4] = fields[4].rstrip("\t")
    inner = fields[4][1:-1].replace('""', '"')
    if fields[4] == '"{}"'.format(inner.replace('"', '""')) and TAIL.fullmatch(inner):
        fields[4] = inner
    line = Line(fields[0], number(fields[1]), number(fields[2]), *fields[3:])
    if tail := TAIL.fullmatch(line.description):
        line.idea, line.gpu, line.void = (tail[k] or "" for k in ("idea", "gpu", "void"))
        line.seed, line.speed = int(tail["seed"]), number(tail["speed"] or "0")
        line.steps, line.smoke = int(tail["steps"] or 0), bool(tail["smoke"])
    return line


def read_log(text: str) -> list[Line]:
    """Return the lines of a log without its header, those that are no run among them."""
    lines = [raw for raw in text.removeprefix("\ufeff").split("\n") if raw.strip()]
    return [read_line(raw) for raw in lines if raw.rstrip("\r\t") + "\n" != HEADER]


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def rewrite(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    """Replace the lines of a log, all of them or none; one process at a time does so."""
    (path.parent / "runs").mkdir(exist_ok=True)  # somebody may have tidied up
    with open(path.parent / "runs" / "log.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        old = path.read_bytes() if path.exists() else b""
        text = old.decode("utf-8", "surrogateescape") or HEADER
        lines = change(text.removesuffix("\n").split("\n"))  # a torn last one is ended
        write_whole(path, ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape"))


def mark(
    lines: list[str], commits: list[str], gpu: str, status: str, end: str = ""
) -> list[str]:
    """Give the runs of `commits` on a GPU another status, and their descriptions an end.

    Two agents with one idea in one second make one commit.
    """
    marked = []
    for raw in lines:
        line = read_line(raw)
        if line.commit in commits and line.gpu == gpu and line.valid:
            start = raw.split("\t")[:3]
            raw = "\t".join([*start, status, line.description + end])
        marked.append(raw)
    return marked


def plain(text: str) -> str:
    """Return a text on one line: tabs, line breaks and control characters are blanks."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def idea_in(text: str) -> str:
    """Return an idea as the log can hold it: of a void run's description, what stands first.

    As a whole it would read as void for ever.
    """
    tail = TAIL.fullmatch(plain(text))
    return tail["idea"] if tail and tail["void"] is not None else plain(text)


# ---- A run's own log ---------------------------------------------------------------------
def read_ends(path: Path, most: int = 2**22) -> str:
    """Return the text of a file, without its middle if it is longer than twice `most`."""
    with open(path, "rb") as file:
        content = file.read(most)
        file.seek(max(most, os.fstat(file.fileno()).st_size - most))
        return (content + file.read()).decode("utf-8", "replace")


@dataclass
class Result:
    """What a finished run's log says."""

    values: dict[str, str] = field(default_factory=dict)  # of the summary
    ok: bool = False  # exactly one result, exit status 0
    void: str = ""  # the kind of warning, or the line of the summary, that voids it
    notes: list[str] = field(default_factory=list)  # warnings that do not
    last: str = ""  # its last words
    status: int = 0  # of its exit
    results: int = 0  # lines that begin with val_bpb:


def read_run(text: str, kinds: dict[str, bool], basis: dict[str, str]) -> Result | None:
    """Read the log of a run; None if that has not ended.

    kinds: of warnings, and whether one voids the run. basis: lines of the summary that
    must be as in the baseline.
    """
    text = text.replace("\r\n", "\n").replace("\0", "")
    ends = re.findall(r"^exit status (\d+)$", text, re.MULTILINE)
    if not ends:
        return None
    starts = [match.start() for match in re.finditer(r"^val_bpb:", text, re.MULTILINE)]
    summary = text[starts[0] :] if starts else ""
    pairs = re.findall(r"^(\w+): (.*)$", summary, re.MULTILINE)
    values = dict(reversed(pairs))  # what train.py prints behind the summary is not of it
    plain = re.search("^kernels: .*plain torch serves$", text, re.MULTILINE)
    values["kernels"] = "plain torch" if plain else "fused"  # see harness/kernel_check.py
    one = len(starts) == 1
    ok = ends[-1] == "0" and one and 0 < number(values.get("val_bpb", "")) < math.inf
    warnings = re.findall(r"^(warning: (\w+): .*)$", text, re.MULTILINE)
    voids = [kind for _, kind in warnings if kinds.get(kind)]
    voids += [key for key, value in basis.items() if values.get(key) != value]
    notes = [line for line, kind in warnings if kinds.get(kind) is False]
    words = [line for line in text.splitlines() if line.strip()]
    last = [line for line in words if not line.startswith(ASIDE)][-4:-1]
    void, said = voids[0] if voids else "", "\n".join(last)
    return Result(values, ok, void, notes, said, int(ends[-1]), len(starts))
