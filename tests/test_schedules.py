"""Laws of the schedules: where they start and end, and that nothing jumps or divides by zero."""

import pytest
import torch
from tiny import tiny_model

import train

SHARES = [k / 1000 for k in range(1001)]
SHAPES = [(0.0, 0.0), (0.0, 0.75), (0.1, 0.0), (0.1, 0.5), (0.0, 1.0), (0.5, 0.5)]


@pytest.fixture(params=SHAPES, ids=lambda s: f"up {s[0]}, down {s[1]}")
def shape(request, monkeypatch) -> tuple[float, float]:
    monkeypatch.setattr(train, "WARMUP_RATIO", request.param[0])
    monkeypatch.setattr(train, "WARMDOWN_RATIO", request.param[1])
    monkeypatch.setattr(train, "FINAL_LR_FRAC", 0.1)
    return request.param


def test_rates_start_and_end_where_they_should(shape):
    warmup, warmdown = shape
    assert train.lr_multiplier(0.0) == (0.0 if warmup else 1.0)
    assert train.lr_multiplier(1.0) == pytest.approx(0.1 if warmdown else 1.0)
    assert train.lr_multiplier(max(warmup, 1 - warmdown)) == pytest.approx(1.0)


def test_rates_never_jump(shape):
    values = [train.lr_multiplier(p) for p in SHARES]
    steepest = max(1 / ratio if ratio else 0.0 for ratio in shape)
    jumps = [abs(b - a) for a, b in zip(values, values[1:], strict=False)]
    assert max(jumps) <= steepest / 1000 + 1e-9
    assert min(values) >= 0.0 and max(values) <= 1.0


def test_rates_only_rise_then_only_fall(shape):
    warmup, warmdown = shape
    rising = [train.lr_multiplier(p) for p in SHARES if p <= warmup]
    falling = [train.lr_multiplier(p) for p in SHARES if p >= warmup]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    flat = [train.lr_multiplier(p) for p in SHARES if warmup < p < 1 - warmdown]
    assert flat == pytest.approx([1.0] * len(flat))


@pytest.mark.parametrize("ratio", [0.0, 0.2, 1.0])
def test_momentum_rises_from_its_low_to_its_high_value_and_stays(monkeypatch, ratio):
    monkeypatch.setattr(train, "MUON_MOMENTUM", (0.5, 0.9))
    monkeypatch.setattr(train, "MOMENTUM_WARMUP_RATIO", ratio)
    values = [train.muon_momentum(p) for p in SHARES]
    assert values == sorted(values)
    assert values[0] == pytest.approx(0.5 if ratio else 0.9) and values[
        -1
    ] == pytest.approx(0.9)
    assert all(
        v == pytest.approx(0.9) for p, v in zip(SHARES, values, strict=True) if p >= ratio
    )


def test_the_schedules_reach_every_group(monkeypatch):
    monkeypatch.setattr(train, "WARMUP_RATIO", 0.0)
    monkeypatch.setattr(train, "WARMDOWN_RATIO", 0.5)
    monkeypatch.setattr(train, "FINAL_LR_FRAC", 0.0)
    monkeypatch.setattr(train, "MATRIX_WEIGHT_DECAY", 0.4)
    matrix, vector = torch.zeros(4, 4), torch.zeros(4)
    muon = {
        "params": [matrix],
        "lr": 2.0,
        "momentum": 0.0,
        "beta2": 0.9,
        "weight_decay": 0.0,
    }
    optimizers = torch.optim.AdamW([vector], lr=3.0, weight_decay=0.7), train.Muon([muon])
    (first,), (second,) = (optimizer.param_groups for optimizer in optimizers)
    first["initial_lr"], second["initial_lr"] = 3.0, 2.0
    # Twice: a schedule is a function of the progress, not of the step before.
    for progress, lrm in ((0.25, 1.0), (0.75, 0.5), (1.0, 0.0), (0.75, 0.5)):
        assert train.set_schedules(optimizers, progress) == pytest.approx(lrm)
        assert (first["lr"], second["lr"]) == pytest.approx((3.0 * lrm, 2.0 * lrm))
        assert first["weight_decay"] == 0.7  # only the matrices' decay falls
        assert second["weight_decay"] == pytest.approx(0.4 * (1 - progress))
        assert second["momentum"] == train.muon_momentum(progress)


def test_only_the_ngram_table_forgets_faster_when_rows_come_again(monkeypatch):
    monkeypatch.setattr(train, "NGRAM_REPEAT_WEIGHT_DECAY", 0.5)
    optimizers = train.build_optimizers(tiny_model())
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    decays = []
    for epoch in (1, 2, 3):
        train.set_schedules(optimizers, 0.4, epoch)
        decays.append([group["weight_decay"] for group in groups])
    assert decays[1] == decays[2]
    train.set_schedules(optimizers, 0.4, 1)  # not a function of the step before
    assert [group["weight_decay"] for group in groups] == decays[0]
    train.set_schedules(optimizers, 0.4, 2)
    differ = [group for group, a, b in zip(groups, *decays[:2], strict=True) if a != b]
    assert [p.shape for p in differ[0]["params"]] == [tiny_model().ngram.weight.shape]
    assert len(differ) == 1 and differ[0]["weight_decay"] == 0.5


def test_rates_do_not_jump_where_warm_up_and_warm_down_overlap(monkeypatch):
    monkeypatch.setattr(train, "WARMUP_RATIO", 0.5)
    monkeypatch.setattr(train, "WARMDOWN_RATIO", 0.75)
    rates = [train.lr_multiplier(k / 1000) for k in range(1001)]
    assert max(abs(a - b) for a, b in zip(rates, rates[1:], strict=False)) < 0.01
