"""Whether a change is kept: arithmetic on the runs of two commits. Not edited."""

import math
from collections import defaultdict
from collections.abc import Iterable
from statistics import fmean

from loop.ledger import Line

# Gains, as multiples of the noise: keep at once; repeat; keep after the repeat.
BARS = CLEAR, REPEAT, CONFIRM = 3.0, 1.0, 1.5
FLOOR = 0.0005  # of the noise while it rests on three runs
WILD = 6.0  # times the noise of the others: a commit's runs beyond may be an accident
LUCK = 0.001  # the chance that they are none, but the others' are alike by luck
DRIFT = 0.02  # of a commit's speed, beyond which the machine has changed


def noise_of(groups: Iterable[list[float]], floor: float = FLOOR) -> float:
    """Return the standard deviation between runs of one commit, pooled over commits."""
    groups = without_accidents(groups, floor)
    freedom = sum(len(values) - 1 for values in groups)
    return pooled(*groups) if freedom > 2 else max(pooled(*groups), floor)


def without_accidents(
    groups: Iterable[list[float]], floor: float = FLOOR
) -> list[list[float]]:
    """Return the commits with several runs; of the wilder half, none after the first jump.

    Where one run all but diverged, its commit says nothing of the others.
    """
    groups = sorted((values for values in groups if len(values) > 1), key=pooled)
    for i in range(max(1, (len(groups) + 1) // 2), len(groups)):
        half = sum(len(values) - 1 for values in groups[:i]) / 2
        # Of the F distribution for three runs against others: P(F > x) = (1 + x / half)^-half.
        bar = max(WILD, math.sqrt(half * (LUCK ** (-1 / half) - 1)))
        if pooled(groups[i]) > bar * max(floor, pooled(*groups[:i])):
            return groups[:i]
    return groups


def pooled(*groups: list[float]) -> float:
    """Return the standard deviation within groups."""
    squares = sum((v - fmean(values)) ** 2 for values in groups for v in values)
    freedom = sum(len(values) - 1 for values in groups)
    return math.sqrt(squares / freedom) if freedom else 0.0


def verdict(
    best: list[float],
    new: list[float],
    noise: float,
    reference: float = math.inf,
    simpler: bool = False,
    heavier: bool = False,
    bars: tuple[float, float, float] = BARS,
) -> str:
    """Return "keep", "discard", "repeat best" or "repeat new".

    best, new: val_bpb of the runs of both commits. reference: the best mean ever kept; what
    is kept for being simpler loses one noise against it at most, however often. simpler:
    fewer lines or less memory. heavier: many more lines or more memory; doubles the bars.
    """
    if not new or not best:
        return "repeat best" if new else "repeat new"
    gain = min(reference, fmean(best)) - fmean(new)
    clear, repeat, confirm = (bar * noise * (2 if heavier else 1) for bar in bars)
    equal = simpler and not heavier and gain >= -repeat
    if gain > clear:
        return "keep"
    if gain <= repeat and not equal:
        return "discard"
    if len(best) < 2 or len(new) < 2:
        return "repeat best" if len(best) < 2 else "repeat new"
    return "keep" if gain > confirm or equal else "discard"


def number_stretches(runs: list[Line]) -> list[int]:
    """Return a number for each run of a GPU; it grows where the GPU's speed changed.

    That is where a kept commit runs slower or faster than before, by over DRIFT: twice in a
    row by as much, or three times. Otherwise it is an accident, such as a host that was busy:
    a number of its own, below 0. So is an attempt's run that another of its runs is faster
    than, and the first run of a kept commit if the second is faster.
    """
    numbers: list[int] = []
    speeds: dict[str, list[int]] = defaultdict(list)  # by kept commit: places of its runs
    odd: list[tuple[int, float]] = []  # in a row: place and change
    for place, run in enumerate(runs):
        stretch = max(numbers, default=0)
        numbers.append(stretch)
        if not run.speed or run.status != "keep":
            continue
        known = speeds[run.commit]
        change = run.speed / fmean(runs[i].speed for i in known or [place]) - 1
        if abs(change) <= DRIFT:
            known.append(place)
            odd = []
            continue
        if change > 0 and len(known) == 1:
            numbers[known[0]] = -1 - known[0]
            speeds[run.commit], odd = [place], []
            continue
        before, odd = odd, [*odd, (place, change)]
        by_as_much = [i for i, x in before[-1:] if abs(change - x) <= DRIFT]
        same_way = [x for _, x in odd[-3:] if (x > 0) == (change > 0)]
        if not by_as_much and len(same_way) < 3:
            numbers[place] = -1 - place
            continue
        start = [*by_as_much, place][0]
        numbers[start:] = [stretch + 1] * (place + 1 - start)
        speeds, odd = defaultdict(list), []
        for i in {start, place}:
            speeds[runs[i].commit].append(i)
    fastest: dict[tuple[int, str], float] = defaultdict(float)
    attempts = [(i, x) for i, x in enumerate(runs) if x.speed and x.status != "keep"]
    for place, run in attempts:
        key = numbers[place], run.commit
        fastest[key] = max(fastest[key], run.speed)
    for place, run in attempts:
        if run.speed < (1 - DRIFT) * fastest[numbers[place], run.commit]:
            numbers[place] = -1 - place
    return numbers
