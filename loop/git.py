"""Git, worktrees, commits and locks. Not edited."""

import os
import re
import shutil
import subprocess
import time
from difflib import SequenceMatcher
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows; WSL has it
    fcntl = None

ROOT = Path(__file__).resolve().parent.parent
# Set by a git that runs us, in a hook or an alias, for its own repository.
WHERE = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")
MARKS = b"\n<<<<<<< "  # of a draft that did not fit
PATIENCE = 3.0  # seconds for another git, such as an agent's `git diff`, to be done


class Refused(Exception):
    """Why something is not done, and what to do."""


def git(*command: str, tree: Path = ROOT) -> str:
    """Return what git prints; Refused if it fails. Commits alone run hooks."""
    env = {k: v for k, v in os.environ.items() if k not in WHERE} | {"LC_ALL": "C"}
    hooks = () if command[0] == "commit" else ("-c", "core.hooksPath=/dev/null")
    call = ["git", "-C", str(tree), *hooks, *command]
    io = {"stdin": subprocess.DEVNULL, "capture_output": True, "timeout": 120}
    end = time.monotonic() + PATIENCE
    try:
        while (done := subprocess.run(call, env=env, **io)).returncode:
            if b"index.lock" not in done.stderr or time.monotonic() > end:
                break
            time.sleep(0.05)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Refused(f"git {command[0]} in {tree}: {error}") from error
    if done.returncode:
        said = os.fsdecode(done.stderr).strip().splitlines()[-3:]
        raise Refused(f"git {command[0]} in {tree} failed: {' '.join(said)}")
    return os.fsdecode(done.stdout).strip()


def succeeds(*command: str) -> bool:
    """Return whether git ends with status 0."""
    try:
        return git(*command) is not None
    except Refused:
        return False


def train_py_is_of(commit: str) -> bool:
    """Return whether train.py here is that of `commit`."""
    return succeeds("diff", "--quiet", commit, "--", "train.py")


def lines_of(commit: str) -> list[str]:
    """Return the lines of a commit's train.py."""
    return git("show", f"{commit}:train.py").split("\n")


def has_change(lines: set[str], commit: str) -> bool:
    """Return whether a train.py of these lines has what `commit` changed in it."""
    diff = git("show", "--format=", "--unified=0", commit, "--", "train.py")
    changes = diff.partition("\n@@")[2].splitlines()
    took, brought = ({x[1:] for x in changes if x[:1] == sign} for sign in "-+")
    return brought <= lines if brought else not took & lines


def merge_draft(before: str, best: str, draft: bytes) -> bytes | None:
    """Return the draft of a train.py on `before` as it is on `best`, if git found a conflict.

    None if both change the same lines, or git merged them. For git, changes of neighbouring
    lines, such as two knobs, are a conflict too.
    """
    path = ROOT / "train.py"
    if not path.exists() or MARKS not in b"\n" + path.read_bytes():
        return None
    old, changes = lines_of(before), set()
    for new in (lines_of(best), os.fsdecode(draft).removesuffix("\n").split("\n")):
        for what, i, j, k, m in SequenceMatcher(None, old, new, False).get_opcodes():
            if what != "equal":
                changes.add((i, j, tuple(new[k:m])))
    merged, end = [], -1
    for i, j, lines in sorted(changes):
        if i < end or i == j == end:
            return None
        merged += [*old[max(end, 0) : i], *lines]
        end = j
    return os.fsencode("\n".join([*merged, *old[max(end, 0) :], ""]))


def make_tree(tree: Path, commit: str) -> None:
    """Check `commit` out in a worktree of its own, without what an earlier run left there."""
    shutil.rmtree(tree, ignore_errors=True)
    git("worktree", "add", "-q", "-f", "-f", "--detach", str(tree), commit)


def is_on(tree: Path, branch: str) -> bool:
    """Return whether `tree` is a worktree of this repository and on `branch`."""
    trees = git("worktree", "list", "--porcelain").split("\n\n")
    of_it = {f"worktree {tree}", f"branch {branch}"}
    return any(of_it <= {*lines.split("\n")} for lines in trees)


def make_commit(tree: Path, message: str, *what: str) -> str:
    """Commit in `tree` and return the hash; Refused says what hinders it and what helps."""
    try:
        git("commit", "-q", "--cleanup=verbatim", "-m", message, *what, tree=tree)
    except Refused as error:
        help = "if a hook did it, `git config core.hooksPath /dev/null` turns hooks off"
        if re.search("ident|who you are", str(error)):
            error = "git does not know who commits"
            help = "run `git config user.name NAME` and `git config user.email ADDRESS`"
        elif re.search("gpg|sign", str(error)):
            help = "`git config commit.gpgsign false` turns signing off in this clone"
        raise Refused(f"{error}; nothing was run; {help}") from None
    return git("rev-parse", "HEAD", tree=tree)


def lock(path: Path):
    """Return the file `path`, locked, or None if a process holds it, or a child of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        file.close()


def changed_files() -> list[str]:
    """Return the tracked files that differ from HEAD."""
    return git("diff", "--name-only", "-z", "HEAD").split("\0")[:-1]


def check_index() -> None:
    """Refuse to go on beside another git, or what is left of one."""
    index = Path(ROOT, git("rev-parse", "--git-path", "index.lock"))
    end = time.monotonic() + PATIENCE
    while index.exists() and time.monotonic() < end:
        time.sleep(0.05)
    if index.exists():
        raise Refused(f"git is at work here, or was killed; if it was killed, rm {index}")
