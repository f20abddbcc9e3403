"""Which parts of train.py the experiments of a night changed, by its git."""

import ast
import functools
import re
import subprocess


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


def touched(night) -> dict[str, list]:
    """Return part of the first train.py -> the changes that touched it; {} without git.

    night: of analysis.py.
    """

    def split(revision: str) -> dict[str, str]:
        command = ["git", "-C", str(night.folder), "show", f"{revision}:train.py"]
        try:
            text = subprocess.run(command, capture_output=True, check=True).stdout
            return parts(text.decode())
        except (OSError, subprocess.CalledProcessError, SyntaxError, ValueError):
            return {}  # an attempt may be anything

    tries = [c for c in night.changes if re.fullmatch("[0-9a-f]{4,40}", c.commit)]
    bases = [split(c.commit) for c in tries if not c.number]
    found = {name: [] for name in bases[0]} if bases else {}
    for change in (c for c in tries if c.number and found):
        new, old = split(change.commit), split(f"{change.commit}~1")
        for name in found if new and old else ():
            if new.get(name) != old.get(name):
                found[name].append(change)
    return found
