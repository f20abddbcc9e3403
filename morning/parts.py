"""What git knows of the experiments: what each was made on, and the parts that it changed."""

import ast
import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from loop.git import Refused, git

NAME = "[0-9a-f]{4,40}"  # of a commit; the log may hold any word


class Descent:
    """What each commit of a log was made on; nothing where git does not know."""

    def __init__(self, folder: Path, commits: Iterable[str]):
        names = sorted({name for name in commits if re.fullmatch(NAME, name)})
        walk = "rev-list", "--first-parent", "--parents", "--ignore-missing"
        try:
            lines = git(*walk, *names, tree=folder).splitlines()
        except Refused:
            lines = []  # no git here, or none of them is in it
        self.parents = dict([*line.split(), ""][:2] for line in lines)
        self.full = {commit[:8]: commit for commit in self.parents}

    def below(self, commit: str) -> Iterator[str]:
        """Yield a commit and what it was made on, down to the first; as the log names them."""
        at = self.full.get(commit)
        while at:
            yield at[:8]
            at = self.parents.get(at)


@functools.cache
def parts(source: str) -> dict[str, str]:
    """Return name -> text of a train.py's functions, classes and blocks of constants.

    A block of constants has the name of the comment that heads it.
    """
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        first, name = node.lineno - 1, getattr(node, "name", "")
        if isinstance(node, ast.Assign | ast.AnnAssign):
            top = next((i for i in range(first, 0, -1) if not lines[i - 1].strip()), 0)
            heads = [line for line in lines[top:first] if line.startswith("# ")]
            heads = [line for line in heads if not line.startswith("# ---")] or heads
            title = re.split("[.,:]", (heads or [""])[0].strip("#- "))[0]
            name = f"knobs: {title}" if title else "knobs"
        if name:
            text = "\n".join(lines[first : node.end_lineno])
            found[name] = found.get(name, "") + text
    return found


def twins(night) -> list:
    """Return the changes, of other GPUs, with the train.py of the best; [] without git.

    night: of analysis.py.
    """

    def blob(change) -> str:
        try:
            return git("rev-parse", f"{change.commit}:train.py", tree=night.folder)
        except Refused:
            return ""

    measured = [c for c in night.changes if c.values and re.fullmatch(NAME, c.commit)]
    blobs = {id(c): blob(c) for c in measured}
    best = blobs.get(id(night.best))
    others = [c for c in measured if c.gpu != night.best.gpu]
    return [c for c in others if best and blobs[id(c)] == best]


def touched(night) -> dict[str, list]:
    """Return part of the first train.py -> the changes that touched it; {} without git.

    night: of analysis.py.
    """

    def split(revision: str) -> dict[str, str]:
        try:
            return parts(git("show", f"{revision}:train.py", tree=night.folder))
        except (Refused, SyntaxError, ValueError):
            return {}  # an attempt may be anything

    tries = [c for c in night.changes if re.fullmatch(NAME, c.commit)]
    bases = [split(c.commit) for c in tries if not c.number]
    found = {name: [] for name in bases[0]} if bases else {}
    for change in (c for c in tries if c.number and found):
        new, old = split(change.commit), split(f"{change.commit}~1")
        for name in found if new and old else ():
            if new.get(name) != old.get(name):
                found[name].append(change)
    return found
