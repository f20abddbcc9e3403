"""Rows that come again: the n-gram table remembers them, and the model must not trust that."""

import sys
import types

import pytest
import torch

import train
from laws import CPU, SHORT, V, part

STEPS, ROWS = 120, 8  # rows per step
BOUND = 0.17  # nats


def draw_rows(count: int, seed: int) -> torch.Tensor:
    """Return rows (count, SHORT + 1) in which an id follows from the one before or is drawn."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(V // 4, (count, SHORT + 1), generator=generator)
    follows = torch.rand(count, SHORT + 1, generator=generator) < 0.5
    for t in range(1, SHORT + 1):
        ids[:, t] = torch.where(
            follows[:, t], (ids[:, t - 1] * 5 + 1) % (V // 4), ids[:, t]
        )
    return ids


def train_on(rows: torch.Tensor, monkeypatch) -> tuple[torch.nn.Module, dict]:
    """Run train.main over `rows`, again and again; return the model, and what it was when the
    last epoch began.
    """
    models, began = [], {}

    def steps():
        last = 1
        for number in range(STEPS):
            batch = rows[torch.arange(number * ROWS, (number + 1) * ROWS) % len(rows)]
            epoch = number * ROWS // len(rows) + 1
            if epoch > last:
                last = epoch
                began.update({k: p.clone() for k, p in models[0].state_dict().items()})
            yield types.SimpleNamespace(
                progress=number / STEPS,
                epoch=epoch,
                batches=iter([(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())]),
                micro_steps=1,
            )

    run = types.SimpleNamespace(
        device=CPU,
        warm_up=lambda model, *others, **more: models.append(model),
        steps=steps,
        evaluate=lambda model: None,
        print_summary=lambda *others: None,
    )
    torch.manual_seed(0)
    monkeypatch.setattr(train, "DEPTH", 2)
    monkeypatch.setattr(train, "NGRAM_ENTRIES", 2**15)  # room for every row
    monkeypatch.setattr(train, "open_run", lambda: run)
    monkeypatch.setattr(train.checkpoint, "save", lambda *others: None)
    train.main()
    return models[0], began


def loss_on_other_rows(model: torch.nn.Module) -> float:
    ids = draw_rows(64, seed=2)
    with torch.no_grad():
        return float(model.loss(ids[:, :-1], ids[:, 1:]))


def test_rows_that_come_twice_are_nearly_as_good_as_new_ones(monkeypatch):
    """They cost 0.24 nats where the table kept what it had of them, and faded; now 0.10."""
    part("NgramEmbedding")
    new, half = (
        loss_on_other_rows(train_on(draw_rows(count, seed=1), monkeypatch)[0])
        for count in (STEPS * ROWS, STEPS * ROWS // 2)
    )
    assert half < new + BOUND


@pytest.mark.parametrize("epochs", [1.05, 2.05])
def test_a_short_last_epoch_moves_the_table_alone(monkeypatch, epochs):
    part("NGRAM_REFILL")
    monkeypatch.setattr(sys.modules[__name__], "STEPS", 42)
    rows = draw_rows(int(42 * ROWS / epochs), seed=1)
    model, began = train_on(rows, monkeypatch)
    moved = {k for k, p in model.state_dict().items() if not torch.equal(p, began[k])}
    assert moved == {"ngram.weight"}
    assert began["ngram.weight"].any()


def test_a_second_table_is_emptied_too_when_an_epoch_begins(monkeypatch):
    part("NGRAM_REFILL")
    monkeypatch.setattr(sys.modules[__name__], "STEPS", 8)
    build_model = train.build_model

    def with_two(*args):
        model = build_model(*args)
        model.second = part("NgramEmbedding")(model.config)
        torch.nn.init.ones_(model.second.weight)  # nothing else moves it
        return model

    monkeypatch.setattr(train, "build_model", with_two)
    model, _ = train_on(draw_rows(4 * ROWS, seed=1), monkeypatch)
    assert not model.second.weight.any() and model.ngram.weight.any()


def test_training_goes_on_to_its_end_where_another_optimizer_has_the_table(monkeypatch):
    part("NGRAM_REFILL")
    monkeypatch.setattr(sys.modules[__name__], "STEPS", 42)

    def plain(model):
        group = {"params": [*model.parameters()], "kind": "all"}
        return [torch.optim.SGD([group], lr=0.1)]

    monkeypatch.setattr(train, "build_optimizers", plain)
    model, began = train_on(draw_rows(int(42 * ROWS / 1.05), seed=1), monkeypatch)
    assert not torch.equal(model.lm_head.weight, began["lm_head.weight"])
