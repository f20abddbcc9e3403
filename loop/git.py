"""Git, worktrees, commits and locks. Not edited."""

import os
import re
import shutil
import subprocess
import time
import tokenize
from collections import Counter
from dataclasses import dataclass
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


def git(*command: str, tree: Path = ROOT, strip: bool = True) -> str:
    """Return what git prints; Refused if it fails. Commits alone run hooks."""
    env = {k: v for k, v in os.environ.items() if k not in WHERE} | {"LC_ALL": "C"}
    hooks = () if command[0] == "commit" else ("-c", "core.hooksPath=/dev/null")
    mode = "-c", "core.fileMode=false"  # chmod +x is no edit
    mode += "-c", "log.showSignature=false"  # what `show` prints is read
    call = ["git", "-C", str(tree), *mode, *hooks, *command]
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
    said = os.fsdecode(done.stdout)
    return said.strip() if strip else said


def succeeds(*command: str) -> bool:
    """Return whether git ends with status 0."""
    try:
        return git(*command) is not None
    except Refused:
        return False


def train_py_is_of(commit: str) -> bool:
    """Return whether train.py here is that of `commit`."""
    return succeeds("diff", "--quiet", commit, "--", "train.py")


def has_marks() -> bool:
    """Return whether train.py here shows a draft that did not fit."""
    path = ROOT / "train.py"
    return path.exists() and MARKS in b"\n" + path.read_bytes()


def lines_of(what: str) -> list[str]:
    """Return the lines of a train.py as git names it; of a commit, COMMIT:train.py."""
    return git("show", what, strip=False).removesuffix("\n").split("\n")


def count_code(commit: str) -> int:
    """Return how many lines of a commit's train.py hold code, no comment or docstring."""
    lines = lines_of(f"{commit}:train.py")
    rows, begins, layout = set(), True, {tokenize.COMMENT, tokenize.NL}
    layout |= {tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    try:
        for token in tokenize.generate_tokens(iter([x + "\n" for x in lines]).__next__):
            if token.type in layout:
                continue
            said = begins and token.type == tokenize.STRING
            if token.type != tokenize.NEWLINE and not said:
                rows |= {*range(token.start[0], token.end[0] + 1)}
            begins = token.type == tokenize.NEWLINE
    except (tokenize.TokenError, SyntaxError, ValueError):
        return len(lines)  # of another Python, or not in UTF-8
    return len(rows)


@dataclass(frozen=True)
class Edit:
    """What a commit changed in train.py: how often each line of the change is there since."""

    took: frozenset[tuple[str, int]]
    brought: frozenset[tuple[str, int]]

    @staticmethod
    def of(commit: str, lines: Counter[str]) -> "Edit":
        """Return the edit of a commit, whose train.py has these lines."""
        how = "--no-color", "--no-ext-diff", "--no-textconv", "--format=", "--unified=0"
        diff = git("show", *how, commit, "--", "train.py", strip=False)
        changes = diff.partition("\n@@")[2].split("\n")
        took, brought = ({x[1:] for x in changes if x[:1] == sign} for sign in "-+")
        sides = ({(x, lines[x]) for x in side} for side in (took - brought, brought))
        return Edit(*map(frozenset, sides))

    def is_in(self, lines: Counter[str]) -> bool:
        """Return whether a train.py of these lines has it too."""
        gone = all(lines[x] <= n for x, n in self.took)
        return gone and all(lines[x] >= n for x, n in self.brought)


def merge_lines(old: list[str], best: list[str], draft: list[str]) -> list[str] | None:
    """Return `old` with the changes of both; None if they change the same lines."""
    changes = set()
    for new in (best, draft):
        for what, i, j, k, m in SequenceMatcher(None, old, new, False).get_opcodes():
            if what != "equal":
                changes.add((i, j, tuple(new[k:m])))
    merged, end, inserted = [], -1, False
    for i, j, lines in sorted(changes):
        # At an insertion nothing says which comes first, or that both are not one.
        if i < end or (i == end and (inserted or i == j)):
            return None
        merged += [*old[max(end, 0) : i], *lines]
        end, inserted = j, i == j
    return [*merged, *old[max(end, 0) :]]


def settle_conflict(fresh: bool) -> None:
    """Take a conflict over train.py out of the index, and if it is fresh, merge by lines.

    For git, changes of neighbouring lines, such as two knobs, are a conflict. It keeps what
    stood there before, what the best has, and the draft. One that is not fresh has been
    worked on.
    """
    stages = git("ls-files", "-u", "--", "train.py").splitlines()
    if fresh and len(stages) == 3:
        if merged := merge_lines(*(lines_of(f":{n}:train.py") for n in (1, 2, 3))):
            (ROOT / "train.py").write_bytes(os.fsencode("\n".join([*merged, ""])))
    if stages:
        git("reset", "-q", "--", "train.py")


def make_tree(tree: Path, commit: str) -> None:
    """Check `commit` out in a worktree of its own, without what an earlier run left there."""
    shutil.rmtree(tree, ignore_errors=True)
    if tree.exists():  # with files of another user, which a container left
        tree.rename(tree.with_name(f"{tree.name}-{time.time_ns()}"))
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
    try:
        file = open(path, "a")
    except OSError:
        if not path.exists():
            raise
        file = open(path)  # another user's, or where nothing can be written
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        file.close()
    except OSError as error:  # of some network file systems
        file.close()
        help = "move the clone, or AUTORESEARCH_CACHE, to a disk that has locks"
        raise Refused(f"{path} cannot be locked ({error}); {help}") from error


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
