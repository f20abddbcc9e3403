"""Whether a run can be repeated from its commit, and what hinders it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

from harness.files import data_dir

OURS = "AUTORESEARCH_"  # variables of the rules, which the summary or `rules:` show


def git(root: Path, *command: str) -> str | None:
    """Return what `git *command` prints in `root`, None if it fails or there is no git."""
    try:
        done = subprocess.run(["git", "-C", root, *command], capture_output=True)
    except OSError:
        return None
    return None if done.returncode else os.fsdecode(done.stdout).rstrip("\n")


def git_commit(root: Path) -> str:
    """Return the short hash of the checkout, `+dirty` when tracked files differ from it."""
    return git(root, "describe", "--always", "--exclude=*", "--dirty=+dirty") or "none"


def environment_read(script: Path) -> list[str]:
    """Return the environment variables that a Python file reads, "..." for unknown ones.

    By os.environ or os.getenv, also under another name; setting one is not reading it.
    """
    try:
        tree = ast.parse(script.read_bytes())
    except (OSError, SyntaxError, ValueError):  # then it is not what runs
        return []
    modules, mappings, getters = {"os"}, set(), set()  # names that stand for each
    for node in ast.walk(tree):
        for name in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
            known = name.asname or name.name
            if isinstance(node, ast.Import) and name.name == "os":
                modules.add(known)
            elif isinstance(node, ast.ImportFrom) and node.module == "os":
                mappings |= {known} if name.name == "environ" else set()
                getters |= {known} if name.name == "getenv" else set()

    def of_os(node: ast.expr, name: str, own: set[str]) -> bool:
        if isinstance(node, ast.Attribute) and node.attr == name:
            return isinstance(node.value, ast.Name) and node.value.id in modules
        return isinstance(node, ast.Name) and node.id in own

    def text(node: ast.expr) -> str:
        known = isinstance(node, ast.Constant) and isinstance(node.value, str)
        return node.value if known else "..."

    read, named = set(), set()  # nodes of os.environ whose variable is known
    for node in ast.walk(tree):
        inner, key = None, None
        if isinstance(node, ast.Subscript):
            inner, key = node.value, node.slice
        elif isinstance(node, ast.Call) and node.args:
            key = node.args[0]
            if of_os(node.func, "getenv", getters):
                read.add(text(key))
            elif isinstance(node.func, ast.Attribute) and node.func.attr != "update":
                inner = node.func.value
        elif isinstance(node, ast.Compare) and len(node.ops) == 1:
            inner, key = node.comparators[0], node.left
        if inner is not None and of_os(inner, "environ", mappings):
            named.add(inner)
            if not isinstance(getattr(node, "ctx", None), ast.Store | ast.Del):
                read.add(text(key))
    for node in ast.walk(tree):
        if isinstance(node, ast.AugAssign):  # os.environ |= {...}
            named.add(node.target)
        if isinstance(node, ast.Attribute) and node.attr == "update":
            named.add(node.value)
    if any(of_os(n, "environ", mappings) and n not in named for n in ast.walk(tree)):
        read.add("...")
    return sorted(name for name in read if not name.startswith(OURS))


def untracked_modules(root: Path) -> list[str]:
    """Return the Python files below `root` that this process imported and git does not track."""
    tracked = git(root, "ls-files", "-z")
    if tracked is None:  # the summary's `commit:` says so
        return []
    known = {root / name for name in tracked.split("\0")}
    apart = {data_dir().parent, Path(sys.prefix), Path(sys.base_prefix)}
    apart.add(root / "tests")  # pytest's
    apart -= {root, *root.parents}  # the checkout may lie in one
    found = set()
    for module in [*sys.modules.values()]:
        path = Path(getattr(module, "__file__", None) or "/").absolute()
        if root not in path.parents or path.suffix != ".py" or path in known:
            continue
        if not apart & {*path.parents} and path.is_file():
            found.add(path.relative_to(root).as_posix())
    return sorted(found)


def explain(root: Path, variables: list[str]) -> list[str]:
    """Return a line on each kind of thing without which the commit does not repeat the run."""
    lines = []
    if modules := untracked_modules(root):
        advice = "put what was imported into train.py"  # a night commits that alone
        lines.append(f"git does not track {', '.join(modules)}; {advice}")
    if variables:
        advice = "make it a knob"
        lines.append(f"train.py reads the environment ({', '.join(variables)}); {advice}")
    return lines
