"""One tree's night: its runs, repeats and verdicts, and where its branch belongs. Not edited."""

import ast
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from statistics import fmean

from loop import ledger
from loop.git import (
    ROOT,
    WHERE,
    Edit,
    Refused,
    changed_files,
    check_index,
    count_code,
    git,
    has_marks,
    lines_of,
    lock,
    make_commit,
    make_tree,
    settle_conflict,
    succeeds,
    train_py_is_of,
)
from loop.ledger import Line
from loop.verdict import noise_of, number_stretches, verdict

NIGHT = ROOT / "runs" / "night.json"
LIMIT = 900  # seconds of one run, start-up and evaluation included
LATE = 30  # more, after which a run ends by itself: who was to end it was killed
SEED = 42  # of a commit's first run; the next run has the next
BASELINE_RUNS = 3
VOID_RUNS = 3  # of a run that is void each time
FIXED = "rules", "data"  # what a further run finds as it is
CONTROL_EVERY = 10  # experiments, after which the best runs again
MOST_RUNS = 8  # on a GPU from an idea's first run to its verdict
HEAVY, LONGER = 1.1, 20  # times the memory, and lines, beyond which the bars are doubled
LIGHT = 0.95  # times the memory, below which a change is simpler
SAME = "attention", "kernels", "rules", "data"  # what voids a run if it differs


def check_place() -> None:
    """Refuse to work in the checkout of a run, runs/TAG/tree."""
    top = ROOT.parent.parent.parent
    if (top / NIGHT.relative_to(ROOT)).exists():
        raise Refused(f"{ROOT} is the checkout of a run; cd {top}")


@dataclass
class Night:
    """What runs/night.json keeps; the rest is in the log and in git."""

    tag: str
    branch: str
    log: str  # results.tsv as seen from this tree; the trees of a night share it
    gpu: str  # "" if it is not here
    several: bool  # GPUs, which the lines then name
    env: dict[str, str]  # what a run sees of CUDA_VISIBLE_DEVICES and AUTORESEARCH_...
    budget: str  # "8h", "100" experiments, or ""
    best: str  # the commit at which the branch belongs
    before: str  # the best before it
    open: dict | None  # commit, idea; runs: of the best, to be had, 0 for an attempt
    began: float = field(default_factory=time.time)  # seconds since 1970
    basis: dict[str, str] = field(default_factory=dict)  # SAME, of the baseline
    said: list[str] = field(default_factory=list)  # on what was done last
    stopped: str = ""  # why the work was
    controls: int = 0
    again: int = 0  # further runs of attempts that had a verdict
    over: bool = False
    held = ()  # files that are locked; not kept
    known = False  # whether this process has read one

    @staticmethod
    def removed() -> str:
        """Say so if this tree is gone with the night that was read here, else ""."""
        if not Night.known or NIGHT.exists():
            return ""
        kept = "the log and the commits are in the first tree"  # git worktree remove
        return f"{ROOT} was removed, so the night of its GPU is over; {kept}"

    @staticmethod
    def load() -> "Night":
        """Return the night of this tree; Refused if none has begun."""
        if gone := Night.removed():
            raise Refused(gone)
        if not NIGHT.exists():
            check_place()
            start = "`uv run experiment.py start TAG`"
            raise Refused(f"no night has begun in {ROOT}; {start}")
        try:
            night = Night(**json.loads(NIGHT.read_text("utf-8")))
            Night.known = True
            return night
        except (TypeError, ValueError) as error:
            help = "move it away, and start with another tag"
            raise Refused(f"{NIGHT} is no good ({error}); {help}") from error

    @staticmethod
    def locked() -> "Night | None":
        """Return the night with its locks, None if an experiment is going on here."""
        night = Night.load()
        if night.take():
            vars(night).update(vars(Night.load()))  # as who had them left it
            return night
        return None

    @staticmethod
    def ours() -> "Night":
        """Return the night with its locks; Refused if an experiment is going on here."""
        if not (night := Night.locked()):
            raise Refused(Night.load().busy())
        return night

    @staticmethod
    def look() -> tuple["Night", str, str]:
        """Return the night, whether somebody is at work on it, and who else has the GPU."""
        held = ""
        try:
            if night := Night.locked():
                night.leave()
                return night, "interrupted", ""
        except Refused as error:
            held = str(error)
        return Night.load(), "at work", held

    def save(self, path: Path = NIGHT, **changes) -> None:
        """Change some values and write all of them, whole or not at all."""
        vars(self).update(changes)
        path.parent.mkdir(exist_ok=True)
        ledger.write_whole(path, json.dumps(asdict(self), indent=1).encode())

    @property
    def folder(self) -> Path:
        """Where the logs of runs are, and the tree in which they run."""
        return ROOT / "runs" / self.tag

    @property
    def results(self) -> Path:
        """The log."""
        return (ROOT / self.log).resolve()

    @property
    def named(self) -> str:
        """The GPU as lines of the log name it."""
        return self.gpu if self.several else ""

    def take(self) -> bool:
        """Take the locks on this tree and its GPU; False if an experiment is going on here.

        They are free again when all who hold them have ended, a run that outlives us too.
        """
        self.held = [lock(ROOT / "runs" / "tree.lock")]
        if not self.held[0] or not self.gpu:
            return bool(self.held[0])
        cache = self.env.get("AUTORESEARCH_CACHE") or "~/.cache/autoresearch"
        path = Path(cache).expanduser() / f"gpu-{platform.node()}-{self.gpu}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.held.append(lock(path))
        if not self.held[1]:
            self.leave()
            held = f"GPU {self.gpu} has an experiment of another tree, or what it left behind"
            raise Refused(f"{held} (fuser {path} shows it); wait for its end")
        return True

    def leave(self) -> None:
        """Let go of the locks, in this process."""
        for file in self.held:
            if file:
                file.close()
        self.held = []

    # ---- What the log says ---------------------------------------------------------------
    def all_lines(self) -> list[Line]:
        """Return the lines of the log, of all GPUs."""
        path = self.results
        return ledger.read_log(os.fsdecode(path.read_bytes()) if path.exists() else "")

    def lines(self, commit: str = "") -> list[Line]:
        """Return the lines of this GPU, of one commit or of all."""
        lines = [x for x in self.all_lines() if x.status and x.gpu == self.named]
        return [x for x in lines if x.commit == commit[:8] or not commit]

    def withdrawn(self) -> set[str]:
        """Return the commits that had a result, until `void` took them back."""
        return {x.commit for x in self.lines() if x.measured and x.void}

    def lost(self) -> str:
        """Say so if the log has no result of the best, else "": the best needs one to be it."""
        if self.open or any(x.measured for x in self.lines(self.best)):
            return ""
        return (
            f"{self.results} has lost the runs of {self.best[:8]}, the best; was it removed, or "
            "saved otherwise by a spreadsheet? put it back as it was; if it is gone for good, "
            "start a night with another tag"
        )

    def last_log(self, commit: str) -> Path | None:
        """Return the log of a commit's last run that ended."""
        logs = filter(self.read, self.folder.glob(f"{commit[:8]}-*.log"))
        return max(logs, key=lambda path: path.stat().st_mtime, default=None)

    def idea_of(self, commit: str) -> str:
        """Return what a commit's first line says that it tries."""
        return next((x.idea for x in self.lines(commit)), "baseline")

    def count(self) -> int:
        """Return how many experiments there were; an idea that was fixed counts once.

        What `void` leaves of the best is none.
        """
        lines = self.lines()
        known = {x.commit for x in lines}
        tried = [x for x in lines if x.commit != lines[0].commit]
        tried = [x for x in tried if x.idea.removeprefix("without ") not in known]
        done = {x.commit: x.idea for x in tried if x.status != "crash"}
        return len(done) + len({x.idea for x in tried} - {*done.values()})

    @property
    def smoke(self) -> bool:
        """Whether its runs say that they are under the smoke rules."""
        return self.basis.get("rules", "").startswith("smoke-")

    def summary(self) -> str:
        """Return one line: the best so far."""
        now, _, noise, _ = self.stand()
        values = now.get(self.best[:8], [])
        mean = f", mean {fmean(values):.6f} of {len(values)}" if values else ""
        kept = {x.commit for x in self.lines() if x.status == "keep" and x.valid}
        count = self.count()
        counts = f"{count} experiment{'s' * (count != 1)}, {max(0, len(kept) - 1)} kept"
        end = "; the night is over" if self.over else self.left()
        return f"best: {self.best[:8]} {self.idea_of(self.best)}{mean}; {counts}{end}"

    def remaining(self) -> float:
        """Return what is left of the budget: seconds, or experiments, or infinity."""
        if self.budget.endswith("h"):
            return self.began + 3600 * float(self.budget[:-1]) - time.time()
        budget = int(self.budget) if self.budget else math.inf
        return budget - self.count() - self.again

    def used_up(self) -> bool:
        """Return whether the budget of the night is."""
        return self.remaining() <= 0

    def left(self) -> str:
        """Return in words how much of the budget is left, "" if there is none."""
        left, job = self.remaining(), self.open
        if self.budget.endswith("h"):
            return f"; {max(0.0, left) / 60:.0f} min left"
        if job and not job["runs"] and "since" not in job:
            left -= not self.lines(job["commit"])  # it has begun
        return self.budget and f"; {max(0, left)} left"

    def task(self) -> str:
        """Return the idea that is open, and which of its runs or whether it is a control."""
        job = self.open
        if "control" in job:
            return f"{job['idea']}, again as a control"
        if not job["runs"]:
            had = [f"{x.val_bpb:.6f}" for x in self.lines(job["commit"]) if x.valid]
            return job["idea"] + (f", so far {' '.join(had)}" if had else "")
        run = 1 + sum(x.valid for x in self.lines(job["commit"]))
        return f"{job['idea']}, run {min(run, job['runs'])} of {job['runs']}"

    def busy(self) -> str:
        """Return one line on who has the locks."""
        if not self.open:
            path = ROOT / "runs" / "tree.lock"
            held = f"another command holds {path}, or what a run left behind"
            return f"{held} (fuser shows it); try again; if it stays so, end it"
        log = self.unfinished()  # none if it is of the run before
        lines = ledger.read_ends(log).splitlines() if log else []
        steps = [x for x in lines if x.startswith("step ")]
        if not steps:  # "queued", say, where the GPU is elsewhere
            words = [x.strip() for x in lines if x.strip()]
            steps = [": ".join(["starting", *words[-1:]])]
        return f"{self.task()} is going on ({steps[-1]}); `uv run experiment.py wait`"

    def unfinished(self) -> Path | None:
        """Return the log of the run that began last if it has no end: it goes on, or was cut."""
        logs = sorted(self.folder.glob("*.log"), key=lambda path: path.stat().st_mtime)
        return logs[-1] if logs and not self.read(logs[-1]) else None

    def warn_of_cut(self) -> None:
        """Say so if the last run was killed; asked with the locks held, so none goes on.

        Not if it was of a best that `void` has taken back since: that does not begin again.
        """
        log, job = self.unfinished(), self.open
        if log and job and log.name[:8] in (job["commit"][:8], self.best[:8]):
            print("the run before was killed, so it begins again; if a sandbox ended it")
            print("with its command, start the agent without one (docs/install.md)")

    def numbered(self, attempt: str = "") -> list[tuple[Line, int]]:
        """Return the valid runs, each with its number by `number_stretches`.

        attempt: a commit that counts as not kept, also if a verdict was interrupted.
        """
        runs = [x for x in self.lines() if x.valid]
        for run in runs:
            run.status = "discard" if run.commit == attempt[:8] else run.status
        return list(zip(runs, number_stretches(runs), strict=True))

    def stand(
        self, attempt: str = ""
    ) -> tuple[dict[str, list[float]], float, float, int]:
        """Return val_bpb by commits and the best mean kept, both since the GPU's speed
        changed last; the noise; and how often it changed. attempt: as of `numbered`.
        """
        runs = self.numbered(attempt)
        groups: dict[tuple, list[float]] = defaultdict(list)
        for run, number in runs:
            groups[number, run.commit].append(run.val_bpb)
        last = max([number for _, number in runs], default=0)
        now = {commit: v for (number, commit), v in groups.items() if number == last}
        kept = {x.commit for x, _ in runs if x.status == "keep"}
        means = [fmean(values) for commit, values in now.items() if commit in kept]
        return now, min(means, default=math.inf), noise_of(groups.values()), last

    def judge(self, commit: str) -> tuple[str, list[str]]:
        """Return the verdict on an attempt as things are, and the lines that say why."""
        now, reference, noise, _ = self.stand(commit)
        runs = [x for x in self.lines() if x.valid]
        first = runs[0].commit if runs else self.best[:8]  # the baseline
        commits = [self.best[:8], commit[:8], first]
        best, new, _ = (now.get(c, []) for c in commits)
        memory = [[x.memory_gb for x in runs if x.commit == c] for c in commits]
        old_gb, new_gb, first_gb = (fmean(values or [0.0]) for values in memory)
        sizes = [count_code(c) for c in commits]
        longer = sizes[1] - sizes[0]
        # The way back from something small is as free as the way there.
        heavier = new_gb > HEAVY * max(old_gb, first_gb)
        heavier = heavier or sizes[1] > LONGER + max(sizes[0], sizes[2])
        simpler = new_gb < LIGHT * old_gb or longer < 0
        simpler = simpler and new_gb <= HEAVY * old_gb and longer <= LONGER
        what = verdict(best, new, noise, reference, simpler, heavier)
        if not new or not best:
            return what, []
        gain = min(reference, fmean(best)) - fmean(new)
        speed = [x.speed for x in runs if x.commit == commit[:8]][-1]
        speed = f"{speed:.3f} M tok/s, " if speed else ""
        if steps := self.smoke_steps(commit):
            speed = f"{steps} (the best: {self.smoke_steps(self.best)}), "
        values = " ".join(f"{v:.6f}" for v in new)
        words = [f"val_bpb {values}; the best {fmean(best):.6f} of {len(best)} runs"]
        if reference < fmean(best):
            words[0] += f", the best ever {reference:.6f}"
        times = f"{gain / noise:+.2f} x noise {noise:.6f}" if noise else "noise 0"
        words.append(f"gain {gain:+.6f}, {times}{', bars doubled' if heavier else ''}")
        more = f"{new_gb - old_gb:+.1f} GB, {longer:+d} lines of code"
        more += ": simpler" if simpler else ""
        words.append(f"{speed}{new_gb:.1f} GB ({more})")
        for x, number in self.numbered(commit):
            if number < 0 and x.commit == commit[:8]:
                slow = f"{x.val_bpb:.6f} at {x.speed:.3f} M tok/s"
                words.append(f"{slow} does not count: another run of it is faster")
        return what, words

    def smoke_steps(self, commit: str) -> str:
        """Return the steps of a commit's smoke runs, which have no speed; "" if there are none.

        They do the same work: where their number varies, other processes had the cores.
        """
        steps = [x.steps for x in self.lines(commit) if x.valid and x.smoke]
        words = f"{' '.join(map(str, steps))} steps" if steps else ""
        if steps and min(steps) < 0.9 * max(steps):
            words += ", for something else uses the cores"
        return words

    # ---- One run -------------------------------------------------------------------------
    def read(self, log: Path) -> ledger.Result | None:
        """Return what the log of a run says, None if there is none, or no end of it."""
        if not log.exists():
            return None
        source = (ROOT / "constants.py").read_text("utf-8")
        kinds = re.search(r"^WARNINGS = (\{.*?^\})", source, re.MULTILINE | re.DOTALL)
        return ledger.read_run(
            ledger.read_ends(log), ast.literal_eval(kinds[1]), self.basis
        )

    def train(self, commit: str, seed: int, log: Path) -> None:
        """Run a commit under the time limit; its log ends with the exit status."""
        make_tree(self.folder / "tree", commit)
        run = (
            self.env.get("AUTORESEARCH_RUN") or f"{shlex.quote(sys.executable)} train.py"
        )
        run = f'({run}\n)\nprintf "\\nexit status %s\\n" $?'  # also if we are killed
        command = ["sh", "-c", run]
        if timeout := shutil.which("timeout"):  # not on macOS
            command = [timeout, "-s", "KILL", str(LIMIT + LATE), *command]
        apart = ("AUTORESEARCH_", "VIRTUAL_ENV", *WHERE)
        env = {k: v for k, v in os.environ.items() if not k.startswith(apart)}
        env |= {"AUTORESEARCH_SAVE": "0"}  # 3 s, for a file that the next run removes
        env |= self.env | {"AUTORESEARCH_SEED": str(seed)}
        fds = [file.fileno() for file in self.held]  # it keeps the locks if we are killed
        with open(log, "wb") as out:
            io = {
                "stdin": subprocess.DEVNULL,
                "stdout": out,
                "stderr": out,
                "pass_fds": fds,
            }
            where = {"cwd": self.folder / "tree", "env": env, "start_new_session": True}
            child = subprocess.Popen(command, **io, **where)
            try:
                status = child.wait(LIMIT)
            except subprocess.TimeoutExpired:
                status = 124
            finally:  # and what it left behind
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        if self.read(log) is None:
            late = f"ended after {LIMIT} s\n" if status == 124 else ""
            with open(log, "a") as out:
                out.write(
                    f"\n{late}exit status {status if status >= 0 else 128 - status}\n"
                )

    def run_once(self, commit: str, idea: str, status: str) -> Line:
        """Add a run of `commit` to the log, and up to two more while it is void.

        Refused if it is void by what another run would find as it is, and is the best.
        """
        while True:
            mine = self.lines(commit)
            seed = SEED + sum(not x.void for x in mine)
            again = sum(bool(x.void) and x.seed == seed for x in mine)
            name = f"{commit[:8]}-{seed}" + (f"-{again + 1}" if again else "")
            log = self.folder / f"{name}.log"
            if not (result := self.read(log)):  # else it ended, and then we were killed
                self.train(commit, seed, log)
                result = self.read(log)
            line = Line(commit[:8], 0.0, 0.0, "crash", f"{idea}, seed {seed}")
            if self.several:
                line.description += f", gpu {self.gpu}"
            if result.ok:
                get = result.values.get
                keys = ("tok_per_sec", "num_steps", "peak_vram_mb")
                tokens, steps, mb = (ledger.amount(get(key, "")) for key in keys)
                if not self.basis and not result.void:
                    self.save(basis={key: get(key) for key in SAME if get(key)})
                line.description += f", {steps:.0f} steps"
                speed = f", {tokens / 1e6:.3f} M tok/s"  # there it means nothing:
                line.description += " under the smoke rules" if self.smoke else speed
            if result.ok and not result.void:
                line.status, line.val_bpb = status, float(get("val_bpb"))
                line.memory_gb = mb / 1024
            elif result.ok:
                line.void = result.void
                line.description += f", void: {result.void}"
            ledger.rewrite(self.results, lambda lines, new=line: [*lines, new.text()])
            if line.void in FIXED and status == "keep":
                raise Refused(self.differs(line))
            if not line.void or line.void in FIXED or (again + 1) % VOID_RUNS == 0:
                return line

    def differs(self, line: Line) -> str:
        """Say how a run is void because of what another run would find as it is."""
        now = self.read(self.last_log(line.commit)).values.get(line.void)
        what = f"{line.void}: {now}, and {self.basis[line.void]} in the baseline"
        return f"{what}: the data or fixed files have changed; put them back"

    # ---- The draft, and the others ---------------------------------------------------------
    def check_draft(self) -> None:
        """Refuse what is not one edit of train.py on top of the best commit."""
        head = git("rev-parse", "--symbolic-full-name", "HEAD")
        if head != f"refs/heads/{self.branch}":
            help = f"git switch -m {self.branch}"
            raise Refused(f"HEAD is not the branch of the night; {help}")
        if git("rev-parse", "HEAD") != self.best:
            ends = self.best, self.before  # from where it is at, `follow` goes on
            made_on = (x for x in git("rev-list", "HEAD").split() if x in ends)
            help = f"git reset {next(made_on, self.best)[:8]}"
            help += " leaves train.py as it is; then run"
            raise Refused(f"the branch is not at the best, {self.best[:8]}; {help}")
        if self.best[:8] in self.withdrawn():
            why = next(x.void for x in self.lines(self.best) if x.void)
            of = why.removeprefix("stood on ") if "stood on " in why else self.best[:8]
            raise Refused(f'a `void` was interrupted; again: void {of} "why"')
        if lost := self.lost():
            raise Refused(lost)
        check_index()
        if not (ROOT / "train.py").is_file():
            raise Refused("train.py is missing; git checkout train.py")
        if has_marks():
            where = "where a draft did not fit"
            raise Refused(f"train.py has marks (<<<<<<<) {where}; fix it")
        changed = changed_files()
        if others := " ".join(name for name in changed if name != "train.py"):
            help = f"only train.py may; git stash push {others}, then run"
            raise Refused(f"{others} differs from the best commit; {help}")
        if not changed:
            raise Refused("train.py is the best commit's; edit it, then run")
        for short in self.withdrawn():
            if train_py_is_of(short):
                what = f"this is the train.py of {short}, which was taken back"
                raise Refused(f"{what}; fix what was wrong with it, then run")

    def commit_draft(self, idea: str) -> str:
        """Commit and pin train.py as it is, in the tree of the runs; return the commit."""
        draft, tree = ROOT / "train.py", self.folder / "tree"
        source = draft.read_bytes()
        make_tree(tree, self.best)
        (tree / "train.py").write_bytes(source)
        commit = make_commit(tree, idea, "--", "train.py")
        git("checkout", "-q", "HEAD", "--", "train.py", tree=tree)
        if draft.read_bytes() == source:  # a hook may have changed what it committed
            shutil.copyfile(tree / "train.py", draft)  # `follow` knows it by this
        git("update-ref", f"refs/attempts/{commit[:8]}", commit)
        return commit

    def same_attempt(self) -> dict | None:
        """Return the job of a further run of an attempt at the best, if train.py is its.

        A commit of its own would begin at the first seed, for a luckier number.
        """
        for short in dict.fromkeys(x.commit for x in self.lines() if x.valid):
            if train_py_is_of(short):
                commit, *parents = git("rev-parse", short, f"{short}^@").split()
                if parents == [self.best]:
                    job = {"commit": commit, "idea": self.idea_of(short), "runs": 0}
                    return job | {"since": len(self.lines())}
        return None

    def others(self) -> Iterator[tuple[str, "Night"]]:
        """Yield the other trees that have a night with our log, and that night."""
        trees = git("worktree", "list", "--porcelain")
        for tree in re.findall(r"(?m)^worktree (.*)$", trees):
            with suppress(OSError, ValueError, TypeError):
                path = Path(tree, NIGHT.relative_to(ROOT))
                other = Night(**json.loads(path.read_text("utf-8")))
                if Path(tree) != ROOT and Path(tree, other.log).samefile(self.results):
                    other.log = self.log  # as seen from here
                    yield tree, other

    def elsewhere(self) -> list[str]:
        """Return what the other GPUs of this night are at work on, a line each."""
        busy = [other for _, other in self.others() if other.open]
        return [f"at work on gpu {other.gpu}: {other.task()}" for other in busy]

    def going(self) -> set[tuple[str, str]]:
        """Return GPU and commit of the attempts of this night that have no verdict yet."""
        nights = [self, *(other for _, other in self.others())]
        jobs = [(x.named, x.open) for x in nights if x.open and not x.open["runs"]]
        return {(gpu, job["commit"][:8]) for gpu, job in jobs}

    def check_log(self) -> None:
        """Refuse to take a log from a night that goes on in another tree."""
        for tree, other in self.others():
            if other.tag != self.tag and (other.open or not other.over):
                help = f"if its agent has stopped, git worktree remove --force {tree}"
                raise Refused(f"night {other.tag} may go on in {tree}; {help}")

    def to_try(self) -> list[str]:
        """Return what the bests of other GPUs have and nothing here had, a line each."""
        lines, tried = self.all_lines(), {x.idea for x in self.lines()}
        ours, said = {x.commit for x in self.lines()}, {}

        @cache
        def text(commit: str) -> Counter[str]:
            with suppress(Refused):
                return Counter(lines_of(f"{commit}:train.py"))
            return Counter()  # it is not here

        for gpu in sorted({x.gpu for x in lines if x.status} - {self.named}):
            kept = [x for x in lines if x.gpu == gpu and x.status == "keep" and x.valid]
            kept = {x.commit: x for x in kept if text(x.commit)}
            for line in [*kept.values()][1:]:  # the first is the baseline
                edit = Edit.of(line.commit, text(line.commit))
                had = any(edit.is_in(x) for x in map(text, ours) if x)
                # Lines that only moved are in what was there before, too.
                had = had and not edit.is_in(text(f"{line.commit}^"))
                had = had or line.idea in tried
                if edit.is_in(text([*kept][-1])) and not had:
                    what = f"kept on gpu {gpu}: {line.idea}; git show {line.commit}"
                    said.setdefault(edit, what)
        return [*said.values()]

    # ---- What is open --------------------------------------------------------------------
    def follow(self) -> None:
        """Bring the branch to the best commit, and train.py with it; a draft in it stays."""
        name = f"refs/heads/{self.branch}"
        if not succeeds("rev-parse", "-q", "--verify", name):  # somebody deleted it
            git("update-ref", name, self.best)
        job, here = self.open, succeeds("symbolic-ref", "-q", "HEAD")
        here = here and git("symbolic-ref", "HEAD") == name
        if here and job and not job["runs"]:
            if train_py_is_of(job["commit"]):
                git("checkout", "-q", "HEAD", "--", "train.py")
        if moves := git("rev-parse", name) == self.before != self.best:
            if here:
                git("reset", "-q")  # a draft that is staged would be in the way
                git("checkout", "-q", "-m", "-B", self.branch, self.best)
            else:
                git("update-ref", name, self.best, self.before)
        if here:
            settle_conflict(fresh=moves)

    def settle(self) -> None:
        """Do what is open, and what that opens."""
        while self.open:
            self.follow()
            (self.measure if self.open["runs"] else self.attempt)(**self.open)
        self.follow()

    def measure(
        self, commit: str, idea: str, runs: int, control: bool = False, instead: str = ""
    ) -> None:
        """Run the best until it has `runs`: as baseline, as a control, or after a void.

        instead: the best if this one crashes, or is worse.
        """
        *_, stretch = self.stand()
        while self.wants_run(commit, runs, control):
            line = self.run_once(commit, idea, "keep")
            if control and (line.void or self.over):
                break
            if line.status == "crash" and instead and not line.void:
                said = f"{idea} crashes; the branch is at {instead[:8]} again"
                return self.save(open=None, said=[said], best=instead, before=commit)
            if line.status == "crash":
                logs = f"tail -n 40 {shlex.quote(str(self.folder))}/{commit[:8]}-*.log"
                why = f"{idea}: a run of {commit[:8]} failed ({line.void or 'crash'})"
                why += f"; `{logs}` says why; the machine is not ready"
                if control:
                    why += f', or, if its train.py is at fault, void {commit[:8]} "why"'
                raise Refused(why)
        now, _, noise, later = self.stand()
        values = " ".join(f"{v:.6f}" for v in now.get(commit[:8], []))
        said = [
            f"{'control, the best' if control else idea}: {values}; noise {noise:.6f}"
        ]
        if steps := self.smoke_steps(commit):
            said[0] += f"; {steps}"
        if later != stretch:
            said[0] += (
                "; the GPU's speed changed by over 2 %, so runs before do not count"
            )
        every = self.numbered()
        mine = [(x, number) for x, number in every if x.commit == commit[:8]]
        said += [
            f"its run at {x.speed:.3f} M tok/s does not count: over 2 % off, and that did not "
            "come again; a busy host? then the runs just before may be off too"
            for x, number in mine[runs - 1 if control else 0 :]
            if number < 0
        ]
        said += self.notes(commit)
        changes = {}
        new = [x.val_bpb for x, number in mine if number >= 0]
        old = [
            x.val_bpb for x, n in every if n >= 0 and instead and x.commit == instead[:8]
        ]
        if old and new and fmean(new) > fmean(old) + noise:
            said.append(f"{instead[:8]} before it is better; the branch is at that again")
            changes = {"best": instead, "before": commit}
            self.mark([commit[:8]], "discard")
        self.save(open=None, said=[*self.said, *said], **changes)

    def wants_run(self, commit: str, runs: int, control: bool) -> bool:
        """Return whether the best has fewer than `runs`, accidents left out.

        Of a control the last run counts: another tells whether the machine has changed or its
        host was busy.
        """
        mine = [number for x, number in self.numbered() if x.commit == commit[:8]]
        if len(mine) < runs or self.over:
            return len(mine) < runs
        more = mine[-1] < 0 if control else sum(number >= 0 for number in mine) < runs
        return more and len(mine) < runs + 2

    def attempt(self, commit: str, idea: str, runs: int, since: int = 0) -> None:
        """Run and repeat an attempt until there is a verdict on it.

        since: the lines that there were when it had one before; it runs once more.
        """
        mine = [x for x in self.lines()[since:] if x.commit == commit[:8]]
        if since and all(x.void for x in mine) and len(mine) < VOID_RUNS:
            self.run_once(commit, idea, "discard")
        while True:
            what, words = self.state(commit, since)
            if what == "repeat new":
                self.run_once(commit, idea, "discard")
            elif what == "repeat best":
                self.run_once(self.best, self.idea_of(self.best), "keep")
            else:
                break
        changes: dict = {"open": None}
        if what == "keep":
            self.mark([commit[:8]], "keep")
            changes |= {"best": commit, "before": self.best}
        due, over = (self.count() + self.again) // CONTROL_EVERY, self.used_up()
        if due > self.controls or over:
            changes |= {
                "open": self.control(changes.get("best", self.best)),
                "over": over,
            }
        self.save(said=[f"{what}: {commit[:8]} {idea}", *words], controls=due, **changes)

    def state(self, commit: str, since: int = 0) -> tuple[str, list[str]]:
        """Return what is to be done with an attempt, or the verdict, and lines on it."""
        mine, lines = self.lines(commit), self.lines()
        what, words = self.judge(commit)
        if not mine:
            return what, words
        log = self.last_log(commit)
        result = self.read(log) if log else ledger.Result()
        last, voids = mine[-1], [x for x in mine if x.void and x.seed == mine[-1].seed]
        back = f"git restore --source {commit[:8]} train.py"
        if last.status == "crash" and not last.void:
            words = result.last.splitlines()
            if not result.status and result.results > 1:
                how = f"exit status 0, and {result.results} lines begin with val_bpb:"
                words = [f"{how}; that of the summary has to be the only one"]
            elif not result.status and not result.results:
                words.append("exit status 0, and no line begins with val_bpb:")
            words.append(f"more: tail -n 40 {log}")
            if result.status in (137, 143):
                words.append("it was killed from outside, or the host had no memory left")
            if result.status in (128, 255):
                words.append("so git and ssh end: if the connection failed, fix nothing")
            words.append(f"a slip? {back}; fix it; `run` again with the same idea")
            words.append("that writes over a draft: `git diff HEAD >> later.patch` first")
            return "crash", words
        if last.void in FIXED:
            return "void", [self.differs(last), f"to try it again: {back}; `run`"]
        if last.void and len(voids) % VOID_RUNS == 0:
            why = f"{VOID_RUNS} times ({last.void}): tail -n 40 {log} says why"
            return "void", [why, f"to try it again: {back}; `run`"]
        first = next((x for x in lines[since:] if x.commit == commit[:8]), mine[0])
        runs = [x for x in lines[lines.index(first) :] if x.void not in FIXED]
        if what.startswith("repeat") and len(runs) >= MOST_RUNS:
            what, why = (
                "discard",
                f"no verdict in {MOST_RUNS} runs: the GPU's speed varies",
            )
            words = [*words, why]
        if repeated := [x.void for x in runs if x.commit == commit[:8] and x.void]:
            times = f"{len(repeated)} times" if repeated[1:] else "once"
            words = [*words, f"void {times} ({repeated[-1]}), and run again"]
        notes = self.notes(commit)
        if what == "discard" and any(x.startswith("warning: host:") for x in notes):
            notes.append(
                f"to run it again: {back}; `run`; a slow run then counts no more"
            )
        return what, [*words, *notes]

    def notes(self, commit: str) -> list[str]:
        """Return two warnings of a commit's runs: the latest of its kind, the data's first."""
        logs = self.folder.glob(f"{commit[:8]}-*.log")
        logs = sorted(logs, key=lambda path: path.stat().st_mtime, reverse=True)
        every = [x for log in logs if (result := self.read(log)) for x in result.notes]
        every.sort(key=lambda x: not x.startswith("warning: data:"))  # few are shown
        kinds: dict[str, str] = {}
        for line in every:
            kinds.setdefault(re.split(r"\d", line)[0], line)
        return [*kinds.values()][:2]

    def take_back(self, commit: str, why: str) -> None:
        """Leave a commit out of the log, and out of the branch if it is in there.

        The branch goes back to the best before it. What was kept on top is tried without it:
        by a revert, which is then open, to be measured. Refused says why not.
        """
        if not succeeds("rev-parse", "-q", "--verify", f"{commit}^{{commit}}"):
            raise Refused(f"{commit} is no commit here; {self.results} has their names")
        full = git("rev-parse", "--verify", f"{commit}^{{commit}}")
        short, ideas = full[:8], {x.commit: x.idea for x in self.lines()}
        if short not in [*ideas][1:]:
            why = f"has no line of this GPU in {self.results}"
            raise Refused(f"{short} {why}")
        in_best = succeeds("merge-base", "--is-ancestor", full, self.best)
        broken = self.withdrawn()
        if f"without {short}" in ideas.values() or (short in broken and not in_best):
            raise Refused(f"{short} is void already")
        if not (in_best or any(x.valid for x in self.lines(short))):
            raise Refused(f"{short} crashed or was void; it has no result to take back")
        if (other := ideas[short].removeprefix("without ")) in ideas:
            raise Refused(f"{short} takes {other} back; void what brought the fault")
        above, changes, said = [], {}, f"void: {short} {ideas[short]}"
        if in_best:
            above = git("rev-list", f"{full}..{self.best}").split()
            before = git("rev-parse", f"{full}^")
            while before[:8] in broken:
                before = git("rev-parse", f"{before}^")
            changes = {"best": before, "before": self.best, "open": None}
        if above:
            tree = self.folder / "tree"
            make_tree(tree, self.best)
            stood = ", ".join(f"{x[:8]} {ideas.get(x[:8], '')}" for x in above)
            try:
                git("revert", "--no-commit", full, tree=tree)
            except Refused:
                if not git("ls-files", "-u", tree=tree):
                    raise  # no conflict: a full disk, say
                said += (
                    f"; what stood on it does not fit without it, try it again: {stood}"
                )
            else:
                if not git("diff", "--name-only", "HEAD", tree=tree):
                    what = f"of {short} nothing is left in the best"
                    raise Refused(f"{what} ({stood}), so there is nothing to take back")
                best = make_commit(tree, f"without {short} {ideas[short]}")
                git("update-ref", f"refs/attempts/{best[:8]}", best)
                job = {"commit": best, "idea": f"without {short}", "runs": 2}
                changes |= {"best": best, "open": job | {"instead": before}}
                said += f"; what stood on it is measured again as {best[:8]}: {stood}"
        if in_best and not changes["open"]:
            said += f"; the branch is at {before[:8]} again, the best before it"
        # The best first: if we are killed in between, `check_draft` sees it.
        for commits, end in ((above, f"stood on {short}"), ([full], ledger.plain(why))):
            names, end = [x[:8] for x in commits], f", void: {end}"
            self.mark(names, "discard", end)
        self.save(said=[said], **changes)

    def mark(self, commits: list[str], status: str, end: str = "") -> None:
        """Give the runs of `commits` another status in the log, and an end."""
        what = commits, self.named, status, end
        ledger.rewrite(self.results, lambda lines: ledger.mark(lines, *what))

    def control(self, best: str) -> dict:
        """Return what is open when the best has to run once more."""
        runs = sum(x.valid for x in self.lines(best)) + 1
        return {"commit": best, "idea": self.idea_of(best), "runs": runs, "control": True}
