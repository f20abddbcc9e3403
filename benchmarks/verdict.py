"""Simulate verdict rules on synthetic nights whose true effects are known: what is kept wrongly?

Usage: python benchmarks/verdict.py [--noise 0.0007] [--nights 1000] [--ideas 80] [--seed 1]

An idea lowers val_bpb by its effect: 20 % of the ideas gain (exponential, mean 0.0015), 30 % do
nothing, 50 % harm (exponential, mean 0.004). A run adds normal noise to the true value of its
commit. All rules judge the same ideas. A false keep has an effect of zero or less, a missed gain
an effect above zero; what program.md says of simpler code and of crashes is left out.
"""

import argparse
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean

# program.md: gain in noises above which a change is kept at once, is repeated, is kept then.
CLEAR, REPEAT, CONFIRM = 3.0, 1.0, 1.5
GAIN_SHARE, NONE_SHARE, MEAN_GAIN, MEAN_HARM = 0.2, 0.3, 0.0015, 0.004
MINUTES = 6.2  # of the GPU for one run, all told


def draw_effect(rng: random.Random) -> float:
    """Return by how much an idea lowers the true val_bpb."""
    kind = rng.random()
    if kind < GAIN_SHARE:
        return rng.expovariate(1 / MEAN_GAIN)
    return 0.0 if kind < GAIN_SHARE + NONE_SHARE else -rng.expovariate(1 / MEAN_HARM)


def noise(commits: list[list[float]]) -> float:
    """Return the standard deviation between runs of one commit, pooled, as program.md's awk."""
    squares = sum((value - fmean(runs)) ** 2 for runs in commits for value in runs)
    return math.sqrt(squares / sum(len(runs) - 1 for runs in commits))


@dataclass
class Night:
    """The state of a night: true value and runs of the best commit, and of all commits."""

    rng: random.Random
    sd: float  # of the noise
    best_true: float = 0.0
    runs: int = 0
    commits: list[list[float]] = field(
        default_factory=list
    )  # the values of each one's runs

    def run(self, true: float) -> float:
        self.runs += 1
        return true + self.rng.gauss(0.0, self.sd)


# The night, runs of the best commit and of the new one, the new one's true value -> is it kept?
Rule = Callable[[Night, list[float], list[float], float], bool]


def keep_if_lower(night: Night, best: list[float], new: list[float], true: float) -> bool:
    return fmean(best) > fmean(new)


def with_repeats(clear: float, repeat: float, confirm: float, runs: int = 2) -> Rule:
    """Return a rule of program.md's kind; runs: that a commit within the noise has at the end."""

    def rule(night: Night, best: list[float], new: list[float], true: float) -> bool:
        gain, sd = fmean(best) - fmean(new), noise(night.commits)
        if gain > clear * sd or gain < repeat * sd:
            return gain > clear * sd
        for values, value in ((best, night.best_true), (new, true)):
            while len(values) < runs:
                values.append(night.run(value))
        return fmean(best) - fmean(new) > confirm * noise(night.commits)

    return rule


# name -> rule, runs of the baseline
RULES: dict[str, tuple[Rule, int]] = {
    "keep if lower": (keep_if_lower, 1),
    "program.md": (with_repeats(CLEAR, REPEAT, CONFIRM), 3),
    "the same, bar after the repeat 1": (with_repeats(CLEAR, REPEAT, 1.0), 3),
    "the same, bar after the repeat 2": (with_repeats(CLEAR, REPEAT, 2.0), 3),
    "nothing kept without a repeat": (with_repeats(math.inf, REPEAT, CONFIRM), 3),
    "the same, three runs, bar 1": (with_repeats(math.inf, REPEAT, 1.0, 3), 3),
}


def play(
    rule: Rule, baseline_runs: int, effects: list[float], night: Night
) -> dict[str, float]:
    """Judge one idea after the other; return what was kept and missed, and what it cost."""
    best = [night.run(0.0) for _ in range(baseline_runs)]
    night.commits.append(best)
    kept, missed = [], []
    for effect in effects:
        true = night.best_true - effect
        new = [night.run(true)]
        night.commits.append(new)
        if rule(night, best, new, true):
            best, night.best_true = new, true
            kept.append(effect)
        elif effect > 0:
            missed.append(effect)
    false = sum(effect <= 0 for effect in kept)
    counts = {
        "kept": len(kept),
        "false": false,
        "missed": len(missed),
        "lost": sum(missed),
    }
    return counts | {"gain": -night.best_true, "runs": night.runs}


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
    parser = argparse.ArgumentParser(
        description="Simulate verdict rules on synthetic nights."
    )
    parser.add_argument(
        "--noise", type=float, default=0.0007, help="sd of a run (%(default)s)"
    )
    parser.add_argument("--nights", type=int, default=1000, help="(%(default)s)")
    parser.add_argument("--ideas", type=int, default=80, help="in a night (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    args = parser.parse_args()
    night = f"{args.nights} nights of {args.ideas} ideas, seed {args.seed}"
    print(f"simulated: noise {args.noise}, {night}, means of a night\n")
    print(
        "| rule | kept | false keeps | missed gains | lost by them | true gain | runs | GPU h |"
    )
    print("|---|---|---|---|---|---|---|---|")
    plain = None
    for name in RULES:
        r = simulate(name, args.noise, args.nights, args.ideas, args.seed)
        plain = plain or r
        fold, more = (
            plain["false"] / max(r["false"], 1e-9),
            100 * (r["runs"] / plain["runs"] - 1),
        )
        print(
            f"| {name} | {r['kept']:.1f} | {r['false']:.2f} (1/{fold:.1f}) | {r['missed']:.1f} | "
            f"{r['lost']:.4f} | {r['gain']:.4f} | {r['runs']:.1f} ({more:+.0f} %) | "
            f"{r['runs'] * MINUTES / 60:.1f} |"
        )


if __name__ == "__main__":
    main()
