"""A night of experiments, one command per experiment. Not edited, and no part of the rules.

    uv run experiment.py start TAG            branch autoresearch/TAG, then the baseline
        [--gpus 0,1] [--budget 8h | 100]      a worktree per GPU; an end, by hours or number
    uv run experiment.py run "IDEA"           commit train.py, run it, judge it
    uv run experiment.py wait [--minutes 8]   for the end of what is going on
    uv run experiment.py status               where the night stands
    uv run experiment.py void COMMIT "WHY"    take back a commit that turned out broken
    uv run --group analysis experiment.py report [LOG]   the morning's page

The branch is always at the best commit. An attempt is committed, pinned under refs/attempts
and run in a worktree of its own, runs/TAG/tree, so train.py here is free for the next edit.
A process of its own does the work; whatever is killed, `wait` and `run` go on from there.
AUTORESEARCH_RUN replaces the command that trains, for a GPU that is not here.

Exit status: 0 done (kept, discarded or a crash); 1 refused or stopped, with a sentence that
says what to do; 2 a wrong command line; 3 not finished: `wait`; 4 the night is over.
"""

import argparse
import math
import os
import re
import subprocess
import sys
import time
import traceback
from pathlib import Path

from harness.streams import keep_output
from loop import ledger
from loop.git import (
    ROOT,
    Refused,
    changed_files,
    check_index,
    fcntl,
    git,
    has_marks,
    is_on,
    make_commit,
    make_tree,
    succeeds,
    train_py_is_of,
)
from loop.ledger import idea_in
from loop.machine import check_machine
from loop.night import BASELINE_RUNS, NIGHT, Night, check_place

ME = "uv run experiment.py"
REPORT = "uv run --group analysis experiment.py report"
POLL = 1.0  # seconds between two looks at what is going on
IDLE = 5  # looks that find nothing open, and the locks held nevertheless


# ---- The process that works --------------------------------------------------------------
def work(night: Night) -> None:
    """Hand the locks over to a process of its own, which does what is open."""
    night.warn_of_cut()
    if os.fork():
        return night.leave()
    try:
        os.setsid()
        with open(os.devnull) as null, open(ROOT / "runs" / "work.log", "w") as log:
            for number, file in enumerate([null, log, log]):
                os.dup2(file.fileno(), number)
        night.save(stopped="")
        night.settle()
    except Exception as error:
        traceback.print_exc()
        night.save(stopped=f"stopped: {error}")
    finally:
        os._exit(0)


def wait(minutes: float, ours: bool = False) -> int:
    """Wait for the end of what is open, start it again if it was killed, say the result.

    ours: the process at work is of this command; it is not started a second time.
    """
    end, idle, seen = time.monotonic() + 60 * minutes, 0, ours
    while not (night := Night.locked()):
        there = Night.load()
        seen, idle = seen or bool(there.open), 0 if there.open else idle + 1
        if idle > IDLE:
            break
        if time.monotonic() > end:
            print(there.busy())
            return 3
        time.sleep(POLL)
    if night and night.open and not ours:
        print(f"going on with {night.open['commit'][:8]}, {night.task()}")
        work(night)
        return wait((end - time.monotonic()) / 60, ours=True)
    there = night or there
    if not seen:
        print("nothing is open; what was done last:")
    print("\n".join(there.said))
    if there.open:
        if night and not there.stopped:
            night.save()  # a full disk says so itself
        what = there.stopped or "what was at work was killed"
        raise Refused(f"{what}; `{ME} wait` goes on from there")
    if night:
        night.follow()
        night.leave()
        if has_marks():
            print("your draft does not fit the new best: look for <<<<<<< in train.py")
    print(there.summary() if night or there.over else there.busy())
    return 4 if there.over else 0


# ---- Commands ----------------------------------------------------------------------------
def start(tag: str, gpus: str, budget: str, minutes: float) -> int:
    """Begin a night; what could stop it later is tried now."""
    for pattern, text, help in (
        (r"\w[\w-]*", tag, "a tag is of letters and digits, such as nov24"),
        (r"(\d*\.?\d+h|\d+)?", budget, "--budget takes hours (8h) or experiments (100)"),
        (r"(\w+(,\w+)*)?", gpus, "--gpus takes numbers such as 0,1"),
    ):
        if not re.fullmatch(pattern, text):
            raise Refused(f"{text!r}: {help}")
    if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
        raise Refused(f"{ROOT} is not the top of a git checkout; start in its own clone")
    check_place()
    nights = plan(tag, gpus, budget)
    if NIGHT.exists() and Night.load().tag == tag:
        raise Refused(f"night {tag} has begun here; `{ME} wait` goes on with it")
    first = nights[ROOT]
    NIGHT.parent.mkdir(exist_ok=True)
    if not first.take():
        raise Refused(f"an experiment is going on in {ROOT}; `{ME} wait`")
    check_index()
    first.check_log()
    if dirty := changed_files():
        advice = "commit it on a branch of your own, or git stash"
        raise Refused(f"uncommitted work in {', '.join(dirty)}; {advice}; then start")
    for tree, night in nights.items():
        name = f"refs/heads/{night.branch}"
        fresh = not any(tree.glob(f"runs/{tag}/*"))  # at most of a start that was killed
        if succeeds("rev-parse", "-q", "--verify", name):
            if not fresh or git("rev-parse", name) != night.best:
                raise Refused(f"branch {night.branch} is there; take another tag")
        if tree != ROOT and tree.exists() and not (fresh and is_on(tree, name)):
            raise Refused(f"{tree} is there; git worktree remove {tree}, or rename it")
    trial = ROOT / "runs" / ".trial"  # no tag
    try:
        make_tree(trial, first.best)
        make_commit(trial, "trial", "--allow-empty")
    finally:
        succeeds("worktree", "remove", "--force", str(trial))
    if trains_here(first.env):
        check_machine([night.env for night in nights.values()])
    for night in nights.values():
        git("update-ref", f"refs/heads/{night.branch}", night.best)
    for path in (ROOT / "results.tsv", first.folder):
        if path.exists():
            when = time.strftime("%Y%m%d-%H%M%S")
            new = path.rename(path.with_name(f"{path.stem}-{when}{path.suffix}"))
            page = f"; `{REPORT} {new.name}` writes its page" if new.suffix else ""
            print(f"{path.name} of an earlier night is now {new.name}{page}")
    ledger.rewrite(ROOT / "results.tsv", lambda lines: lines)
    for tree, night in reversed(nights.items()):  # ours last: then the night has begun
        if tree == ROOT:
            git("switch", "-q", "-C", night.branch)
        elif not tree.exists():  # -f: also where one was deleted by hand
            git("worktree", "add", "-qfB", night.branch, str(tree), night.best)
        (tree / "runs" / tag).mkdir(parents=True, exist_ok=True)
        night.save(tree / "runs" / NIGHT.name)
    work(first)
    base = git("log", "-1", "--format=%h %s", first.best)
    print(f"night {tag} begins at {base}; the baseline: {BASELINE_RUNS} runs of it")
    for tree, night in nights.items():
        if tree != ROOT:
            print(f"GPU {night.gpu}: for an agent of its own, in {tree}")
            script = tree / "experiment.py"
            subprocess.run([sys.executable, script, "wait", "--minutes=0"])
    return wait(minutes, ours=True)


def plan(tag: str, gpus: str, budget: str) -> dict[Path, Night]:
    """Return a night for each GPU, by its tree; the first one's is this."""
    own = ("AUTORESEARCH_SEED", "AUTORESEARCH_DRY_RUN")
    keys = [k for k in os.environ if k.startswith("AUTORESEARCH_") and k not in own]
    env = {key: os.environ[key] for key in keys}
    if cache := env.get("AUTORESEARCH_CACHE"):  # a run has another working folder
        env["AUTORESEARCH_CACHE"] = str(Path(cache).expanduser().absolute())
    cards = [*dict.fromkeys(gpus.split(","))]
    if not gpus and trains_here(env):
        cards = [os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"]
    head = git("rev-parse", "HEAD")
    job = {"commit": head, "idea": "baseline", "runs": BASELINE_RUNS}
    nights = {}
    for gpu in cards:
        end = f"-gpu{gpu}" if nights else ""
        seen = env | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
        tree = ROOT.with_name(ROOT.name + end)
        log = os.path.relpath(ROOT / "results.tsv", tree)
        where = (tag, f"autoresearch/{tag}{end}", log, gpu, len(cards) > 1, seen, budget)
        nights[tree] = Night(*where, head, head, job)
    return nights


def trains_here(env: dict[str, str]) -> bool:
    """Return whether a GPU of this machine is used, and the data here."""
    return not env.get("AUTORESEARCH_RUN") and env.get("AUTORESEARCH_SMOKE") != "1"


def run(idea: str, minutes: float) -> int:
    """Commit train.py as it is, put the best's back in its place, and start the run."""
    if not (idea := idea_in(idea)):
        raise Refused('say in a few words what is tried: run "wider MLP"')
    night = Night.ours()
    if night.open:
        print(f"first what is open: {night.task()}")
        work(night)
        if status := wait(minutes, ours=True):
            print(f"{idea!r} has not begun; run it again after that")
            return status
        night, minutes = Night.ours(), 0  # the rest is for another `wait`
    night.follow()
    if night.used_up() and not night.over:
        night.save(open=night.control(night.best), over=True, said=[])
        work(night)
        wait(minutes, ours=True)
    if night.over:
        print(f"the night is over and nothing was run; `{ME} status`", file=sys.stderr)
        return 4
    night.check_draft()
    if job := night.same_attempt():
        print(f"the train.py of {job['idea']}: its next seed, and all its runs count")
    else:
        for line in night.lines():
            if line.status == "crash" and not line.void and train_py_is_of(line.commit):
                print(f"the train.py of {line.idea}, which crashed as {line.commit}")
        job = {"commit": night.commit_draft(idea), "idea": idea, "runs": 0}
    night.save(open=job, said=[], again=night.again + ("since" in job))
    night.follow()
    commit = job["commit"]
    lines = git("show", "--format=", "--numstat", commit).split("\t")
    print(f"running {commit[:8]}, +{lines[0]} -{lines[1]} lines of train.py")
    print("train.py is the best's again: edit it for the next experiment")
    work(night)
    return wait(minutes, ours=True)


def status() -> int:
    """Say where the night stands, for a context that is lost."""
    night, now, held = Night.look()
    smoke = night.env.get("AUTORESEARCH_SMOKE") == "1"
    gpu, end = night.gpu or ("none" if smoke else "not here"), night.budget or "none"
    rules = ", smoke rules" if night.smoke else ""
    print(f"night {night.tag}{rules}: branch {night.branch}, gpu {gpu}, budget {end}")
    _, reference, noise, _ = night.stand()
    print(night.summary())
    if reference < math.inf:
        print(f"best mean ever kept {reference:.6f}, noise {noise:.6f}")
    print(held, end="\n" if held else "")
    if job := night.open:
        print(f"open: {job['commit'][:8]} {night.task()}, {now}; `{ME} wait` goes on")
        print(night.stopped, end="\n" if night.stopped else "")
    else:
        at_best = git("rev-parse", "HEAD") == night.best
        off = "" if at_best else ", but HEAD is not the best"
        if not is_on(ROOT, f"refs/heads/{night.branch}"):
            off = f", but HEAD is not its branch; git switch -m {night.branch}"
        so = "`run` begins the next experiment"
        if night.over or night.used_up():
            so = "the night is over" if night.over else "the budget is used up"
        print(f"nothing is open{off}; {so}")
    for line in filter(None, [night.lost(), *night.elsewhere()]):
        print(line)
    lines, going = night.all_lines(), night.going()
    for line in lines:
        if not line.status:
            print(f"{night.results}: not a run, not counted: {line.description[:60]!r}")
        elif line.status == "discard" and (line.gpu, line.commit) in going:
            line.status = "open"  # it has no verdict yet
    for line in night.to_try():
        print(line)
    runs = [line.text() for line in lines if line.status]
    which = f"the last 20 of {len(runs)}" if runs[20:] else "all"
    print(f"{night.results}, {which} runs:", *runs[-20:], sep="\n")
    return 0


def void(commit: str, why: str, minutes: float) -> int:
    """Take back a commit that turned out broken; what was kept on top is measured again."""
    night = Night.ours()
    if night.open and "control" not in night.open:
        raise Refused(f"{night.open['idea']} is open; `{ME} wait`, then void")
    night.follow()
    night.take_back(commit, why)
    work(night)
    return wait(minutes, ours=True)


def report(log: str) -> int:
    """Write the morning's page, of this night's log or of another."""
    night = None if log else Night.load()
    path = Path(log) if log else night.results
    if not path.is_file():
        raise Refused(f"{path} is no file; without a name, `{REPORT}` is of this night")
    try:
        import analysis
    except ImportError as error:
        raise Refused(f"{error}; it is in the group analysis: {REPORT}") from error
    going = night.going() if night else ()
    print(analysis.write_report(ROOT, path, tonight=not log, going=going))
    return 0


def main() -> int:
    keep_output(errors="backslashreplace")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    words = {start: "tag --gpus --budget", run: "idea", void: "commit why", report: "log"}
    helps = {
        "tag": "of the branch, such as nov24",
        "--gpus": "such as 0,1: a worktree for each",
        "--budget": "hours (8h) or experiments (100)",
        "log": "such as results-20261124-073000.tsv; without it, this night's",
    }
    for function in (start, run, wait, status, void, report):
        doc = function.__doc__.splitlines()[0]
        add = commands.add_parser(function.__name__, help=doc).add_argument
        for name in words.get(function, "").split():
            how = {"nargs": "?"} if name == "log" else {}
            free = {"default": ""} if name[:2] == "--" or how else {}
            add(name, help=helps.get(name), **how, **free)
        if function not in (status, report):
            add("--minutes", type=float, default=8, help="to wait at most (%(default)s)")
    # An idea such as "-x" is no option: a blank hides it from argparse.
    dash = r"^-(?!h$|-$|-(help|minutes|gpus|budget)(=|$))"
    argv = [re.sub(dash, " -", word) for word in sys.argv[1:]]
    args = vars(parser.parse_args(argv))
    try:
        if fcntl is None:
            raise Refused("Windows has no locks of this kind; use WSL")
        return globals()[args.pop("command")](**args)
    except (Refused, OSError, KeyboardInterrupt) as error:
        said = f"interrupted; `{ME} wait` goes on with what is open"
        said = Night.removed() or str(error) or said
        print(f"experiment.py: {said}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
