"""Simulate the loop's verdict, and others, on nights whose true effects are known.

Usage: python benchmarks/verdict.py [--noise 0.0007] [--nights 1000] [--ideas 80]
           [--seed 1]

An idea lowers val_bpb by its effect: 20 % of the ideas gain (exponential, mean 0.0015),
30 % do nothing, 50 % harm (exponential, mean 0.004). A run adds normal noise to the true
value of its commit. All rules judge the same ideas. A false keep has an effect of zero or
less, a missed gain an effect above zero. Simpler code, crashes and drift are left out.
"""

import argparse
import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).parent.parent))
from loop.verdict import BARS, CLEAR, FLOOR, REPEAT, noise_of, verdict  # noqa: E402

# Ideas: fractions that gain and that do nothing, and mean sizes of what the others do.
GAIN_FRACTION = 0.2
NONE_FRACTION = 0.3
MEAN_GAIN = 0.0015
MEAN_HARM = 0.004
MINUTES = 6.2  # of the GPU for one run, all told


def draw_effect(rng: random.Random) -> float:
    """Return by how much an idea lowers the true val_bpb."""
    kind = rng.random()
    if kind < GAIN_FRACTION:
        return rng.expovariate(1 / MEAN_GAIN)
    if kind < GAIN_FRACTION + NONE_FRACTION:
        return 0.0
    return -rng.expovariate(1 / MEAN_HARM)


@dataclass
class Night:
    """The state of a night: the best commit's true value, and the runs of all commits."""

    rng: random.Random
    sd: float  # of the noise
    best_true: float = 0.0
    runs: int = 0
    commits: list[list[float]] = field(default_factory=list)  # values of each one's runs
    kept: list[list[float]] = field(default_factory=list)  # those that were ever the best

    def run(self, true: float) -> float:
        """Return the val_bpb of one more run of a commit whose true value is `true`."""
        self.runs += 1
        return true + self.rng.gauss(0.0, self.sd)


# night, runs of the best commit and of the new one, true value of the new one -> keep it?
Rule = Callable[[Night, list[float], list[float], float], bool]


def keep_if_lower(night: Night, best: list[float], new: list[float], true: float) -> bool:
    """Keep whatever has the lower mean. A Rule."""
    return fmean(best) > fmean(new)


def by_verdict(bars: tuple[float, float, float] = BARS, floor: float = FLOOR) -> Rule:
    """Return the rule of the loop, with other bars or another floor of the noise."""

    def rule(night: Night, best: list[float], new: list[float], true: float) -> bool:
        while True:
            reference = min(map(fmean, night.kept))
            noise = noise_of(night.commits, floor)
            what = verdict(best, new, noise, reference, bars=bars)
            if what == "repeat best":
                best.append(night.run(night.best_true))
            elif what == "repeat new":
                new.append(night.run(true))
            else:
                return what == "keep"

    return rule


# name -> rule, runs of the baseline
RULES: dict[str, tuple[Rule, int]] = {
    "keep if lower": (keep_if_lower, 1),
    "the loop": (by_verdict(), 3),
    "the same, noise without a floor": (by_verdict(floor=0.0), 3),
    "the same, bar after the repeat 1": (by_verdict((CLEAR, REPEAT, 1.0)), 3),
    "the same, bar after the repeat 2": (by_verdict((CLEAR, REPEAT, 2.0)), 3),
    "nothing kept without a repeat": (by_verdict((math.inf, *BARS[1:])), 3),
}


def play(
    rule: Rule, baseline_runs: int, effects: list[float], night: Night
) -> dict[str, float]:
    """Judge one idea after the other; return what was kept and missed, and its cost."""
    best = [night.run(0.0) for _ in range(baseline_runs)]
    night.commits.append(best)
    night.kept.append(best)
    kept = []
    missed = []
    for effect in effects:
        true = night.best_true - effect
        new = [night.run(true)]
        night.commits.append(new)
        if rule(night, best, new, true):
            best = new
            night.kept.append(new)
            night.best_true = true
            kept.append(effect)
        elif effect > 0:
            missed.append(effect)
    return {
        "kept": len(kept),
        "false": sum(effect <= 0 for effect in kept),
        "missed": len(missed),
        "lost": sum(missed),
        "gain": -night.best_true,
        "runs": night.runs,
    }


def simulate(
    name: str, sd: float, nights: int, ideas: int, seed: int
) -> dict[str, float]:
    """Return the means over all nights of what `play` counts under rule `name`."""
    rule, baseline_runs = RULES[name]
    results = []
    for number in range(nights):
        rng = random.Random(f"effects {seed} {number}")
        effects = [draw_effect(rng) for _ in range(ideas)]
        night = Night(random.Random(f"noise {seed} {number}"), sd)
        results.append(play(rule, baseline_runs, effects, night))
    return {key: fmean(result[key] for result in results) for key in results[0]}


def main() -> None:
    """Print a table with one line per rule."""
    description = "Simulate verdict rules on synthetic nights."
    parser = argparse.ArgumentParser(description=description)
    text = "sd of a run (%(default)s)"
    parser.add_argument("--noise", type=float, default=0.0007, help=text)
    parser.add_argument("--nights", type=int, default=1000, help="(%(default)s)")
    parser.add_argument("--ideas", type=int, default=80, help="in a night (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    args = parser.parse_args()
    night = f"{args.nights} nights of {args.ideas} ideas, seed {args.seed}"
    print(f"simulated: noise {args.noise}, {night}, means of a night\n")
    heads = ["rule", "kept", "false keeps", "missed gains", "lost by them", "true gain"]
    heads += ["runs", "GPU h"]
    print(f"| {' | '.join(heads)} |")
    print("|" + "---|" * len(heads))
    plain = None  # the first rule, with which the others are compared
    for name in RULES:
        r = simulate(name, args.noise, args.nights, args.ideas, args.seed)
        plain = plain or r
        fold = plain["false"] / max(r["false"], 1e-9)
        more = 100 * (r["runs"] / plain["runs"] - 1)
        cells = [
            name,
            f"{r['kept']:.1f}",
            f"{r['false']:.2f} (1/{fold:.1f})",
            f"{r['missed']:.1f}",
            f"{r['lost']:.4f}",
            f"{r['gain']:.4f}",
            f"{r['runs']:.1f} ({more:+.0f} %)",
            f"{r['runs'] * MINUTES / 60:.1f}",
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
