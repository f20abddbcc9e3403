"""The verdict by its table, and benchmarks/verdict.py, which simulates nights with it."""

import importlib.util
import random
import re
import sys
from pathlib import Path

import pytest

from loop import verdict as rule
from loop.ledger import Line
from loop.verdict import FLOOR, noise_of, number_stretches, pooled, verdict

ROOT = Path(__file__).resolve().parent.parent
path = ROOT / "benchmarks" / "verdict.py"
spec = importlib.util.spec_from_file_location("simulation", path)
simulation = sys.modules["simulation"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(simulation)


@pytest.mark.parametrize(
    "gain, runs, flags, expected",
    [
        # gain in noises; runs of the best and the new one
        (3.1, (3, 1), "", "keep"),
        (3.0, (3, 1), "", "repeat new"),
        (3.0, (1, 1), "", "repeat best"),
        (1.1, (3, 1), "", "repeat new"),
        (1.0, (3, 1), "", "discard"),
        (1.0, (3, 1), "simpler", "repeat new"),
        (0.0, (3, 1), "", "discard"),
        (-1.0, (3, 1), "simpler", "repeat new"),
        (-1.0, (1, 1), "simpler", "repeat best"),
        (-1.1, (3, 1), "simpler", "discard"),
        (1.6, (2, 2), "", "keep"),
        (1.5, (2, 2), "", "discard"),
        (0.9, (2, 2), "simpler", "keep"),
        (-1.0, (2, 2), "simpler", "keep"),
        (-1.1, (2, 2), "simpler", "discard"),
        # many lines or much memory more: twice the bars
        (6.1, (3, 1), "heavier", "keep"),
        (6.0, (3, 1), "heavier", "repeat new"),
        (2.0, (3, 1), "heavier", "discard"),
        (3.1, (2, 2), "heavier", "keep"),
        (3.0, (2, 2), "heavier", "discard"),
        (0.0, (3, 1), "heavier simpler", "discard"),
        # no run that counts, since the GPU's speed changed
        (9.0, (0, 1), "", "repeat best"),
        (9.0, (1, 0), "", "repeat new"),
        (9.0, (0, 0), "", "repeat new"),
    ],
)
def test_the_table(gain, runs, flags, expected):
    noise = 0.25  # so that all numbers are exact
    best, new = [1.0] * runs[0], [1.0 - gain * noise] * runs[1]
    how = {flag: True for flag in flags.split()}
    assert verdict(best, new, noise, **how) == expected


@pytest.mark.parametrize(
    "gain, flags, expected",
    [
        (0.1, {}, "keep"),
        (0.0, {}, "discard"),
        (0.0, {"simpler": True}, "keep"),
        (-0.1, {"simpler": True}, "discard"),
    ],
)
def test_without_noise_any_gain_is_one(gain, flags, expected):
    assert verdict([1.0] * 2, [1.0 - gain] * 2, 0.0, **flags) == expected


def test_the_gain_is_over_the_best_mean_ever_kept():
    # The best was kept for being shorter, one noise above what had been kept before.
    assert verdict([1.1, 1.1], [0.89], 0.1, reference=1.0) == "repeat new"
    assert verdict([1.1, 1.1], [1.05, 1.05], 0.1, reference=1.0) == "discard"
    shorter = {"reference": 1.0, "simpler": True}
    assert verdict([1.1, 1.1], [1.09, 1.09], 0.1, **shorter) == "keep"
    assert verdict([1.1, 1.1], [1.15, 1.15], 0.1, **shorter) == "discard"


@pytest.mark.parametrize(
    "groups, expected",
    [
        ([], FLOOR),
        ([[0.44]], FLOOR),
        ([[0.44, 0.4401, 0.4399]], FLOOR),
        ([[0.44, 0.442, 0.438]], 0.002),
        ([[0.44, 0.44, 0.44], [0.43, 0.43]], 0.0),  # five runs are enough
        ([[0.44, 0.442, 0.438], [0.43, 0.434]], 0.0023094),
    ],
)
def test_the_noise_has_a_floor_while_it_rests_on_three_runs(groups, expected):
    assert noise_of(groups) == pytest.approx(expected, rel=1e-4)


def runs_of(*pairs: tuple[str, float], status: str = "keep") -> list[Line]:
    return [Line(c, 0.44, 1.0, status, "", speed=speed) for c, speed in pairs]


def test_a_run_that_diverged_does_not_set_the_noise_of_a_night():
    clean = [[0.9980, 0.9986, 0.9975], [0.9931, 0.9937], [0.9902, 0.9906]]
    for second in (1.02, 3.2):
        assert noise_of([*clean, [0.9965, second]]) == noise_of(clean)
    two = [[0.9965, 3.2], [0.9965, 3.1]]  # neither hides the other
    assert noise_of([*clean, *two]) == noise_of(clean)
    assert noise_of([*clean, [0.9965, 0.9980]]) > noise_of(clean)
    assert noise_of([[0.99, 3.2]]) > 1  # there is nothing else to go by


@pytest.mark.parametrize("deviation, most", [(7e-4, 10), (0.17, 15)])
def test_without_an_accident_the_noise_is_that_of_all_runs(deviation, most):
    generator, left_out = random.Random(0), 0
    for _ in range(1000):
        sizes = [3, *[2] * generator.randrange(12)]
        groups = [[generator.gauss(0.99, deviation) for _ in range(n)] for n in sizes]
        left_out += noise_of(groups, 0.0005) < pooled(*groups) - 1e-9
    assert left_out < most


def test_two_runs_that_are_alike_by_luck_do_not_set_the_noise_of_a_night():
    baseline, lucky = [2.281962, 2.511703, 2.183994], [2.153456, 2.148747]
    assert noise_of([baseline, lucky]) == pooled(baseline, lucky) > 0.1


def test_a_changed_speed_of_a_kept_commit_begins_a_stretch():
    same = runs_of(("a", 1.2), ("a", 1.21), ("b", 1.5), ("a", 1.19))
    assert number_stretches(same) == [0, 0, 0, 0]
    slower = [
        *same,
        *runs_of(("a", 1.1), ("a", 1.1), *[("b", 1.4)] * 2, *[("b", 1.5)] * 2),
    ]
    assert number_stretches(slower) == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    unknown = runs_of(("a", 0.0), ("a", 1.2), ("a", 0.0), ("a", 1.2))
    assert number_stretches(unknown) == [0, 0, 0, 0]


def test_one_run_on_a_busy_host_is_no_change_of_speed():
    """Measured: 3.72, 3.76, 3.46, 3.72 M tok/s, and val_bpb 0.005 higher in the third."""
    once = runs_of(("a", 3.721), ("a", 3.759), ("a", 3.459), ("a", 3.717), ("b", 3.9))
    assert number_stretches(once) == [0, 0, -3, 0, 0]
    assert number_stretches(once[:3]) == [0, 0, -3]  # not yet known
    with_others = [*once[:3], *runs_of(("c", 3.4), status="discard"), *once[3:]]
    assert number_stretches(with_others) == [0, 0, -3, 0, 0, 0]
    twice = [*once[:3], *runs_of(("c", 3.4), status="discard"), *runs_of(("a", 3.47))]
    assert number_stretches(twice) == [0, 0, 1, 1, 1]
    wild = runs_of(*[("a", speed) for speed in (3.7, 3.4, 4.1, 3.2, 3.7)])
    numbers = number_stretches(wild)
    assert len({*numbers}) == 5  # none is compared with another
    quicker = runs_of(*[("a", speed) for speed in (1.0, 1.01, 1.05, 1.09, 1.13)])
    assert number_stretches(quicker) == [0, 0, -3, -4, 1]  # by more each time


def test_of_two_runs_the_slower_one_was_on_a_busy_host():
    """The good run of a newly kept commit was left out, and a worse train.py then kept."""
    for status in ("keep", "discard"):
        first = runs_of(("a", 3.5), ("a", 3.7), ("a", 3.71), status=status)
        assert number_stretches(first) == [-1, 0, 0]
        assert number_stretches(first[1:] + first[:1]) == [0, 0, -3]
        assert number_stretches(first[1:2] + first[:1]) == [0, -2]
    # An attempt's speed says nothing of the machine, nor does it end a row.
    attempts = runs_of(("b", 3.1), ("b", 3.1), status="discard")
    best = runs_of(("a", 3.7), ("a", 3.7), ("a", 3.5), ("a", 3.51))
    assert number_stretches([*best[:3], *attempts, best[3]]) == [0, 0, 1, 1, 1, 1]


def test_a_slow_run_hours_ago_and_a_slow_one_now_are_not_twice_in_a_row():
    runs = runs_of(("a", 3.7), ("a", 3.7), ("a", 3.4), ("b", 3.9), ("b", 3.9), ("b", 3.6))
    assert number_stretches(runs) == [0, 0, -3, 0, 0, -6]


# ---- What is said of it ------------------------------------------------------------------
def test_program_md_states_the_bars():
    program = (ROOT / "program.md").read_text("utf-8")
    table = program.partition("\n## Verdict\n")[2].partition("\n## ")[0]
    stated = {float(n) for n in re.findall(r"(-?[\d.]+) x noise", table)}
    assert {abs(n) for n in stated} == {*rule.BARS}


def test_false_keeps_are_cut_five_fold_for_at_most_30_percent_more_runs():
    args = {"sd": 0.0007, "nights": 60, "ideas": 80, "seed": 2}
    plain, ours = (
        simulation.simulate(name, **args) for name in ("keep if lower", "the loop")
    )
    assert plain["false"] > 5 * ours["false"]
    assert ours["runs"] < 1.3 * plain["runs"]
    assert ours["gain"] > 0.7 * plain["gain"]
