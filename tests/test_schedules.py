"""Laws of the schedules, which hold for any honest edit of train.py: functions of the progress."""

import math
import random

import pytest

import train
from laws import fresh

THOUSANDTHS = [k / 1000 for k in range(1001)]


@pytest.fixture(scope="module")
def optimizers() -> list:
    return train.build_optimizers(fresh())


@pytest.fixture(scope="module")
def initial() -> list[float]:
    """The learning rate of each group as it was built."""
    return [group["lr"] for group in groups(train.build_optimizers(fresh()))]


def groups(optimizers) -> list[dict]:
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def numbers(optimizers) -> list[dict]:
    """Return the numbers of each group, without what it is told by."""
    return [
        {k: v for k, v in group.items() if isinstance(v, int | float | tuple)}
        for group in groups(optimizers)
    ]


def test_the_factor_lies_between_0_and_1_and_never_jumps(optimizers):
    factors = [train.set_schedules(optimizers, p) for p in THOUSANDTHS]
    assert all(math.isfinite(factor) for factor in factors)
    assert min(factors) >= 0.0 and 0.5 < max(factors) <= 1.0
    jumps = [abs(b - a) for a, b in zip(factors, factors[1:], strict=False)]
    assert max(jumps) <= 0.2


def test_every_learning_rate_moves_by_the_factor(optimizers, initial):
    for progress in THOUSANDTHS[::10]:
        lrm = train.set_schedules(optimizers, progress)
        rates = [group["lr"] for group in groups(optimizers)]
        assert rates == pytest.approx([lr * lrm for lr in initial], rel=1e-6, abs=1e-12)


def test_every_number_of_every_group_is_finite(optimizers):
    for progress in THOUSANDTHS:
        train.set_schedules(optimizers, progress)
        for group in numbers(optimizers):
            for value in group.values():
                parts = value if isinstance(value, tuple) else (value,)
                assert all(math.isfinite(part) for part in parts)
            assert group["lr"] >= 0 and group.get("weight_decay", 0.0) >= 0


def test_the_schedules_are_functions_of_progress_alone(optimizers):
    moments = THOUSANDTHS[::50]
    seen = {}
    for moment in moments:
        seen[moment] = train.set_schedules(optimizers, moment), numbers(optimizers)
    random.Random(0).shuffle(moments)  # whatever came before
    for moment in moments:
        again = train.set_schedules(optimizers, moment), numbers(optimizers)
        assert again == seen[moment]
