"""The morning after: what a night of experiments found, and how much of it to believe.

Reads `results.tsv`. A *run* is a line of it, a *change* a commit with all its runs on one GPU.
The commit of a GPU's first line is its *baseline*; every other is an *experiment*, numbered in
the order of the log. The *noise* of a GPU is the standard deviation between its runs of one
commit. All numbers are val_bpb, bits per byte, lower is better. A gain is counted against the
best mean before it on the same GPU, in the picture and in the tables alike.

`write_report` writes one page; `analysis.ipynb` shows the same pieces. Both only read the log.
"""

import datetime
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, fmean

import numpy as np
from matplotlib.figure import Figure

import loop.night
from loop.git import Refused
from loop.ledger import Line, read_log, write_whole
from loop.verdict import FLOOR, noise_of, number_stretches, without_accidents
from morning.page import headline, student, write_page
from morning.parts import Descent
from morning.picture import draw_night, png

EXAMPLE = "an hour of two to four agents on H200s (docs/example.tsv)"
# What `experiment.py void` writes: the "idea" of a revert, which is no experiment, and why
# a change is void that was kept on top of the one withdrawn.
REVERT = re.compile(r"without ([0-9a-f]{8})")
STOOD = re.compile(r"stood on ([0-9a-f]{8})")


# ---- The night -------------------------------------------------------------------------
@dataclass
class Change:
    """A commit with all its runs on one GPU."""

    number: int  # of the experiment; 0 is the baseline
    runs: list[Line]
    # Stretch of the night, in which the GPU kept its speed -> val_bpb of the runs in it; below
    # 0: a run at a speed that did not come again, which does not count.
    groups: dict[int, list[float]]
    mean: float = math.nan
    gain: float = math.nan  # against the best mean before, in the same stretch
    error: float = math.nan  # standard error of the gain
    noise: float = FLOOR  # of its GPU
    stands: float = 2.0  # standard errors, above which a kept gain is believed
    going: bool = False  # its runs are not over, so that there is no verdict
    gone: str = ""  # the withdrawn commit that it is, or was made on: it does not count
    parent: str = ""  # the commit that it was made on; "" where git does not know

    def __post_init__(self):
        first = self.runs[0]
        self.commit, self.gpu = first.commit, first.gpu
        words = first.idea or re.sub(r"(, seed \d+)?(, void.*)?$", "", first.description)
        self.idea = "".join(c if c.isprintable() else " " for c in words)

    @property
    def odd(self) -> list[float]:
        """The val_bpb of its runs that do not count."""
        return [x for stretch, odd in self.groups.items() if stretch < 0 for x in odd]

    @property
    def values(self) -> list[float]:
        values = [run.val_bpb for run in self.runs if run.measured]
        for value in self.odd:
            values.remove(value)
        return values

    @property
    def status(self) -> str:
        if self.gone:
            return "withdrawn" if self.gone == self.commit else "on withdrawn"
        if not self.values:
            return "crash"
        kept = not self.number or any(run.status == "keep" for run in self.runs)
        return "keep" if kept else "going on" if self.going else "discard"

    @property
    def outcome(self) -> str:
        """Its status in words."""
        on = f"made on top of {self.gone}, withdrawn"
        return on if self.status == "on withdrawn" else self.status

    @property
    def revert(self) -> bool:
        """Whether it only takes another change back."""
        return bool(REVERT.fullmatch(self.idea))

    @property
    def times(self) -> float:
        """The gain in noises."""
        if not self.noise:
            return math.copysign(math.inf, self.gain)
        return self.gain / self.noise

    @property
    def believe(self) -> str:
        """What to believe of its gain."""
        if self.gain > self.stands * self.error:
            return "stands"
        return "may be luck" if self.gain > self.error else "no gain"

    def over(self, old: "Change") -> float:
        """Return the gain over `old` in the last stretch in which both ran, nan without one."""
        both = [(x, self.groups[n]) for n, x in old.groups.items() if n in self.groups]
        return fmean(both[-1][0]) - fmean(both[-1][1]) if both else math.nan


@dataclass
class Night:
    """A log with its arithmetic."""

    every: list[Change]
    strays: list[str]  # lines of the log that are no runs
    # A later run of a commit, how many experiments were before it, and by which fraction
    # the commit's speed had changed (nan in logs without speed).
    controls: list[tuple[Line, int, float]]
    # GPU -> its noise, and that noise's degrees of freedom; without any it is assumed.
    noises: dict[str, tuple[float, int]]
    folder: Path  # of train.py and its git
    note: str  # under the title
    title: str = ""  # how the headline begins
    tonight: bool = True  # or an earlier one, whose attempts have no next seed

    @property
    def changes(self) -> list[Change]:
        """Those that count: without what was withdrawn, and what was made on top of that."""
        return [c for c in self.every if not c.gone]

    @property
    def odd(self) -> int:
        """Return how many runs had a speed that did not come again."""
        return sum(len(c.odd) for c in self.changes)

    @property
    def outcomes(self) -> Counter[str]:
        """Return status -> experiments that ended so, each counted once.

        An idea that was mended is one experiment, and so is a commit on several GPUs.
        """
        ends: dict[int, str] = {}
        statuses = "crash", "on withdrawn", "withdrawn", "discard", "going on", "keep"
        for status in statuses:
            tried = [c for c in self.every if c.number and not c.revert]
            ends |= {c.number: status for c in tried if c.status == status}
        return Counter(ends.values())

    @property
    def experiments(self) -> int:
        return self.outcomes.total()

    @property
    def best(self) -> Change | None:
        bests = [c for gpu in {c.gpu for c in self.changes} for c in self.chain(gpu)[-1:]]
        return min(bests, key=lambda c: c.mean, default=None)

    @property
    def start(self) -> Change | None:
        """The first of the chain that ends in the best."""
        return self.chain(self.best.gpu)[0] if self.best else None

    @property
    def noise(self) -> float:
        """That of the GPU with the best."""
        return self.best.noise if self.best else FLOOR

    @property
    def spare(self) -> int:
        """Degrees of freedom of that noise."""
        return self.noises[self.best.gpu][1] if self.best else 0

    @property
    def gain(self) -> float:
        """From start to best, in the last stretch in which both ran, or step by step."""
        if not math.isnan(gain := self.best.over(self.start)):
            return gain
        gains = [c.gain for c in self.chain(self.best.gpu)]
        return sum(gain for gain in gains if not math.isnan(gain))

    @property
    def one_speed(self) -> bool:
        """Whether start and best ran while the GPU had one speed."""
        return not math.isnan(self.best.over(self.start))

    @property
    def rivals(self) -> list[Change]:
        """The changes that were measured on the GPU with the best."""
        found = self.tried("keep", "discard")
        return [c for c in found if self.best and c.gpu == self.best.gpu]

    @property
    def luck(self) -> float:
        """How far below the start the best would lie if no change did anything."""
        return self.noise * expected_best(len(self.rivals))

    def chain(self, gpu: str) -> list[Change]:
        """Return the changes that were in turn the best of a GPU, from the baseline on."""
        kept = [c for c in self.changes if c.gpu == gpu and c.status == "keep"]
        return [c for c in kept if not c.gain <= 0]

    def at_best(self, change: Change) -> bool:
        """Whether it was made on the commit at which the branch of its GPU is now."""
        kept = [c for c in self.changes if c.gpu == change.gpu and c.status == "keep"]
        return self.tonight and change.parent in [c.commit for c in kept[-1:]]

    def tried(self, *statuses: str) -> list[Change]:
        """Return the changes of these statuses, without the baseline and reverts."""
        found = [c for c in self.changes if c.number and not c.revert]
        return [c for c in found if c.status in statuses]

    def drift(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Return ln(num_steps) and val_bpb of repeated commits, less each commit's mean, and
        the degrees of freedom of a slope through them.
        """
        found = [np.empty((0, 2))]
        for change in self.changes:
            runs = [run for run in change.runs if run.valid and run.steps]
            pairs = np.array([(math.log(run.steps), run.val_bpb) for run in runs])
            found += [pairs - pairs.mean(0)] if len(pairs) > 1 else []
        points = np.concatenate(found)
        return *points.T, len(points) - len(found)  # one less per commit, and the slope


def expected_best(n: int) -> float:
    """Return the expected largest of n standard normal draws.

    Source: Blom 1958; within 1 % for n > 4.
    """
    return NormalDist().inv_cdf((n - 0.375) / (n + 0.25)) if n > 1 else 0.0


def left_out(lines: list[Line], descent: Descent) -> dict[tuple[str, str], str]:
    """Return GPU and commit -> the withdrawn commit that it is, or was made on.

    A void run is a crash. What has a number and is void was withdrawn as a whole. What was
    kept on top of it is void too; what was tried on top and discarded is found by git.
    """
    gone, reverts, starts = {}, {}, {}
    for x in lines:
        starts.setdefault(x.gpu, x.commit)
        if x.measured and x.void:
            stood = STOOD.fullmatch(x.void)
            gone[x.gpu, x.commit] = stood[1] if stood else x.commit
        if revert := REVERT.fullmatch(x.idea):
            reverts[x.gpu, x.commit] = revert[1]
    broken = {(gpu, commit) for (gpu, _), commit in gone.items()}
    for gpu, commit in {(x.gpu, x.commit) for x in lines if broken} - gone.keys():
        taken = set()  # back out
        for below in itertools.takewhile(starts[gpu].__ne__, descent.below(commit)):
            taken.add(reverts.get((gpu, below)))
            if (gpu, below) in broken and below not in taken:
                gone[gpu, commit] = below
                break
    return gone


def analyse(
    text: str, folder: Path | str = ".", note: str = "", going: Iterable = ()
) -> Night:
    """Return the night that the text of a log tells.

    going: GPU and commit of attempts that wait for further runs.
    """
    lines = read_log(text)
    logged = [line for line in lines if line.status]
    descent = Descent(Path(folder), [line.commit for line in logged])
    gone = left_out(logged, descent)
    baselines = {line.gpu: line.commit for line in reversed(logged)}
    if any(line.smoke for line in logged):
        note += " Smoke rules: a tiny model, whose numbers say nothing of the real one."
    numbers: dict[str, int] = {}
    changes: dict[tuple[str, str], Change] = {}
    last, newest, controls = {}, 0, []
    begun: dict[str, int] = {}  # by GPU, commits so far
    crashed: dict[tuple[str, str], int] = {}  # numbers of ideas that gave no number yet
    for run in logged:
        # A crash that was mended is a new commit, but the same experiment.
        idea = run.gpu, run.idea or run.description
        new = newest + (not REVERT.fullmatch(run.idea))
        number = 0
        if run.commit != baselines[run.gpu]:
            number = numbers.setdefault(run.commit, crashed.pop(idea, new))
        newest = max(newest, number)
        if run.status == "crash":
            crashed[idea] = number
        key = run.gpu, run.commit
        if key not in changes:
            change = Change(number, [run], {}, gone=gone.get(key, ""))
            change.going = key in going
            change.parent = (*descent.below(run.commit), "", "")[1]
            changes[key] = change
            begun[run.gpu] = begun.get(run.gpu, 0) + (key not in gone)
        # A later run shows drift when another idea was begun in between.
        elif (
            run.valid
            and changes[key].values
            and not changes[key].gone
            and last[key] < begun[run.gpu]
        ):
            speeds = [r.speed for r in changes[key].runs if r.valid and r.speed > 0]
            moved = run.speed / speeds[0] - 1 if speeds and run.speed > 0 else math.nan
            controls.append((run, newest, moved))
        last[key] = begun[run.gpu]
        if run is not changes[key].runs[0]:
            changes[key].runs.append(run)
    noises: dict[str, tuple[float, int]] = {}
    for gpu in sorted({run.gpu for run in logged}):
        here = [c for c in changes.values() if c.gpu == gpu and not c.gone]
        runs = [run for run in logged if run.gpu == gpu and run.valid]
        valid = [run for run in runs if (gpu, run.commit) not in gone]
        for run, stretch in zip(valid, number_stretches(valid), strict=True):
            changes[gpu, run.commit].groups.setdefault(stretch, []).append(run.val_bpb)
        groups = [values for change in here for values in change.groups.values()]
        counted = without_accidents(groups)
        noises[gpu] = noise_of(groups), sum(len(values) - 1 for values in counted)
    kept: dict[str, list[Change]] = {}  # by GPU, so far
    for change in (c for c in changes.values() if c.values):
        change.mean, before = fmean(change.values), kept.setdefault(change.gpu, [])
        if change.gone:
            continue
        change.noise, freedom = noises[change.gpu]
        change.stands = student(freedom)
        pairs = [
            (new, [c.groups[stretch] for c in before if stretch in c.groups])
            for stretch, new in change.groups.items()
        ]
        sides = [(new, min(old, key=fmean)) for new, old in pairs if old]
        if before and not sides:
            sides = [(change.values, min((c.values for c in before), key=fmean))]
        if sides:
            weights = [1 / len(new) + 1 / len(old) for new, old in sides]
            new, old = sides[weights.index(min(weights))]
            change.gain = fmean(old) - fmean(new)
            change.error = change.noise * math.sqrt(min(weights))
        before += [change] if change.status == "keep" else []
    strays = [line.description for line in lines if not line.status]
    return Night([*changes.values()], strays, controls, noises, Path(folder), note)


# ---- The report ------------------------------------------------------------------------
def read_night(
    folder: Path | str = ".", ledger: Path | str | None = None, going: Iterable = ()
) -> Night:
    """Return the night whose log is `ledger`, by default results.tsv in `folder`."""
    path = Path(ledger or Path(folder, "results.tsv"))
    text = path.read_text("utf-8", errors="replace") if path.exists() else ""
    now = f"As of {datetime.datetime.now():%Y-%m-%d %H:%M}."
    return analyse(text, folder, now, going)


def picture(night: Night) -> Figure:
    """Return the picture of the night, with the headline as its title."""
    return draw_night(night, headline(night))


def read_example() -> Night:
    """Return the night of results.tsv here; without one, the example of docs/."""
    if Path("results.tsv").exists():
        try:
            going = loop.night.Night.load().going()
        except Refused:
            going = ()
        return read_night(going=going)
    night = read_night(ledger=Path(__file__).with_name("docs") / "example.tsv")
    night.note = f"There is no results.tsv here. This is an example: {EXAMPLE}."
    night.title = "60 s per run: "
    return night


def write_report(
    folder: Path | str = ".",
    ledger: Path | str | None = None,
    tonight: bool = True,
    going: Iterable[tuple[str, str]] = (),
) -> Path:
    """Write report.html and progress.png into `folder`, and return the page's path.

    ledger: the log, by default results.tsv in `folder`; tonight: it is that of the night that
    `experiment.py run` would go on with; going: GPU and commit of attempts that have no verdict
    yet, in it. Nothing that git tracks is touched, and each file is
    written whole or not at all, so the night may go on meanwhile.
    """
    folder = Path(folder)
    night = read_night(folder, ledger, going)
    night.tonight = tonight
    write_whole(folder / "progress.png", png(picture(night)))
    write_whole(folder / "report.html", write_page(night).encode())
    return folder / "report.html"
