"""Models that see what they must not, wherever they do it, are refused; honest ones are not.

Models are functions of the ids with random tables. The chance of a miss is counted on the cuts
alone, at the size of a full run.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import constants as C
from harness.evaluation import (
    CHECKS,
    Probe,
    check_model,
    evaluate_bpb,
    largest_moves,
    moved,
)

V, BOS, RESERVED = 13, 11, 10  # ids, two of them; the reserved one is in no row
B, T = 8, 128
BATCHES = (
    2 * CHECKS
)  # so many that rows of two batches stand beside each other in a check
SIZES = torch.tensor([1, 2, 3, 1, 4, 2, 1, 5, 1, 2, 1, 0, 0])
WIDTH = 16


def random_rows(rows: int, length: int, documents: int, seed: int = 1) -> torch.Tensor:
    """Return ids below RESERVED, with BOS first and once in `documents` ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(RESERVED, (rows, length), generator=generator)
    starts = torch.randint(documents, ids.shape, generator=generator) == 0
    starts[:, 0] = True
    return ids.masked_fill(starts, BOS)


@pytest.fixture(autouse=True)
def small_vocabulary(monkeypatch):
    monkeypatch.setattr(C, "VOCAB_SIZE", V)
    monkeypatch.setattr(C, "BOS_ID", BOS)


ROWS = random_rows(B * BATCHES, T + 1, documents=60)


def table(seed: int, *shape: int) -> torch.Tensor:
    shape = shape or (V, V)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


TABLE, LEAK = table(0), 0.1 * table(2)


def causal(idx: torch.Tensor) -> torch.Tensor:
    return TABLE[idx] + 0.1 * TABLE[idx].cumsum(1) / T


def refused(model, what: str, rows: torch.Tensor = ROWS) -> str:
    """Return the sentence that refuses `model`, which says `what`."""
    with pytest.raises(RuntimeError, match=f"evaluation refused: .*{what}") as caught:
        evaluate_bpb(model, rows, SIZES, B)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 320
    return str(caught.value)


def leak(where: torch.Tensor, shown: torch.Tensor):
    """Return logits of a causal model that know ids `shown` (B, T) at positions `where`."""
    return lambda idx: causal(idx) + LEAK[shown(idx)] * where[..., None]


def after(idx: torch.Tensor) -> torch.Tensor:
    return F.pad(idx[:, 1:], (0, 1))


# ---- At one position in m -----------------------------------------------------------------------
SOME = [(m, r) for m in (2, 3, 7, 12) for r in range(m)]


@pytest.mark.parametrize("m, r", SOME)
def test_a_look_ahead_at_one_position_in_m(m, r):
    refused(leak(torch.arange(T) % m == r, after), "sees the future from")


@pytest.mark.parametrize("shift", [-1, 1], ids=["the row below", "the row above"])
@pytest.mark.parametrize("m, r", SOME)
def test_a_look_at_another_row_at_one_position_in_m(m, r, shift):
    where = torch.arange(T) % m == r
    refused(leak(where, lambda idx: idx.roll(shift, 0)), "mixes rows")


@pytest.mark.parametrize("parity", [0, 1])
@pytest.mark.parametrize("rows", [2, 4, B])
def test_rows_of_one_parity_that_read_their_neighbours(rows, parity):
    where = (torch.arange(rows) % 2 == parity)[:, None]
    model = leak(where, lambda idx: idx.roll(1, 0))
    text = random_rows(rows * BATCHES, T + 1, documents=60)
    with pytest.raises(RuntimeError, match="evaluation refused: the model mixes rows"):
        check_model(model, text[:rows, :-1])
    with pytest.raises(RuntimeError, match="evaluation refused: the model mixes rows"):
        evaluate_bpb(model, text, SIZES, rows)


@pytest.mark.parametrize("row", [2, 3])
def test_one_row_that_reads_its_neighbour_and_is_in_no_check_replayed(row):
    where = (torch.arange(B) == row)[:, None, None]

    def model(idx):
        return causal(idx) + LEAK[idx.roll(1, 0)].mean(1, keepdim=True) * where

    with pytest.raises(RuntimeError, match="evaluation refused: the model mixes rows"):
        check_model(model, ROWS[:B, :-1])  # two checks, which replay rows 7 and 6


@pytest.fixture(scope="module")
def exposed() -> dict[str, torch.Tensor]:
    """Positions of a full run's rows, (2048,), at which an evaluation notices a leak.

    The model is uniform and remembers what it was asked. A position counts if the id that leaks
    there was another one in some check, and the position is one that is compared.
    """
    b, t, calls = 64, 2048, []
    rows = random_rows(b * 2 * CHECKS, t + 1, documents=700)
    zeros = torch.zeros(b, t, V)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(C, "VOCAB_SIZE", V)
        patch.setattr(C, "BOS_ID", BOS)
        evaluate_bpb(
            lambda idx: calls.append(idx.to(torch.int8)) or zeros, rows, SIZES, b
        )
    batches = rows[:, :-1].to(torch.int8).unflatten(0, (-1, b))
    checks = [idx for idx in calls if not (idx == batches).all(2).all(1).any()]
    assert len(checks) == CHECKS and len(calls) == len(batches) + CHECKS
    found = {name: torch.zeros(t, dtype=torch.bool) for name in ("ahead", "up", "down")}
    for idx in checks:
        same = (
            (idx == batches).char().cumprod(2).sum(2)
        )  # ids that open a row, of each batch
        cuts, origin = same.max(0)  # (b,)
        for row in (cuts >= 16).nonzero().flatten().tolist():  # whose origin is certain
            cut, batch = cuts[row], batches[origin[row]]
            if cut < t:
                found["ahead"][cut - 1] = True
            for name, shift in (("up", 1), ("down", -1)):
                other = (row + shift) % b
                found[name][:cut] |= (idx[other] != batch[other])[:cut]
    return found


@pytest.mark.parametrize("kind", ["ahead", "up", "down"])
def test_every_residue_of_every_modulus_up_to_64_at_the_size_of_a_full_run(exposed, kind):
    missed = [
        (m, r) for m in range(2, 65) for r in range(m) if not exposed[kind][r::m].any()
    ]
    assert not missed


# ---- Anywhere -----------------------------------------------------------------------------------
def drawn(texts: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return row and cut, (cuts,) each, of all checks in batches of `rows` out of `texts`."""
    probe = Probe(texts[:rows], torch.zeros(rows, 1, 1), CHECKS)
    for check in range(CHECKS):
        probe.idx = texts[torch.randperm(len(texts))[:rows]]
        probe.cuts[check] = probe.draw_cuts()
        probe.done += 1
    where = probe.cuts < texts.shape[1]
    return where.nonzero()[:, 1], probe.cuts[where]


@pytest.mark.parametrize("rows, chance", [(64, 0.25), (128, 0.06)])
def test_a_leak_at_one_position_in_600_is_missed_as_rarely_as_stated(
    monkeypatch, rows, chance
):
    seeds, leaks, rate = 16, 500, 600
    texts = random_rows(512, 2048, documents=700)
    torch.manual_seed(2)
    misses = torch.zeros(3)
    for seed in range(seeds):
        monkeypatch.setattr(C, "SEED", seed)
        row, cut = drawn(texts, rows)
        assert len(cut) == CHECKS * rows * 15 // 16
        tenth = torch.rand(leaks, rows).argsort(1) < rows // 10
        hits = [
            # In each row at places of its own.
            torch.rand(leaks, len(cut)) < 1 / rate,
            # In each row at the same places.
            (cut - 1) % rate == torch.randint(rate, (leaks, 1)),
            # In a random tenth of the rows, at ten times as many places.
            tenth[:, row] & (torch.rand(leaks, len(cut)) < rows / (rows // 10) / rate),
        ]
        misses += torch.tensor([int((~hit.any(1)).sum()) for hit in hits])
    assert chance == pytest.approx((1 - 1 / rate) ** len(cut), abs=5e-3)
    print(f"{rows} rows: missed {(misses / seeds / leaks).tolist()}, stated {chance}")
    assert (misses / seeds / leaks < chance + 0.025).all()


def test_models_with_rare_leaks_are_missed_as_rarely_as_stated(monkeypatch):
    """At positions that depend on the ids before them, one in 60; over seeds."""
    rate, seeds, misses = 60, 48, 0
    cuts = CHECKS * (B - 1)

    def model(idx):
        hashed = (
            idx * 7919 + idx.roll(1, 1) * 104729 + torch.arange(T) * 31 + seed
        ) * 40503
        return causal(idx) + LEAK[after(idx)] * (hashed // 64 % rate == 0)[..., None]

    for seed in range(seeds):
        monkeypatch.setattr(C, "SEED", seed)
        try:
            evaluate_bpb(model, ROWS, SIZES, B)
            misses += 1
        except RuntimeError as error:
            assert "sees the future" in str(error)
    chance = (1 - 1 / rate) ** cuts
    print(f"missed {misses / seeds:.3f}, stated {chance:.3f}")
    # Else the count says nothing, or the stated chance is wrong.
    assert 0 < misses / seeds < chance + 3 * math.sqrt(chance * (1 - chance) / seeds)


@pytest.mark.parametrize("place", [0, T - 2])
def test_the_ends_of_the_row_are_always_tried(monkeypatch, place):
    model = leak(torch.arange(T) == place, after)
    for seed in range(10):
        monkeypatch.setattr(C, "SEED", seed)
        refused(model, "sees the future")


# ---- Only there ---------------------------------------------------------------------------------
@pytest.fixture(params=range(8))
def one_document(request, monkeypatch) -> torch.Tensor:
    """Rows that are one document each, where all cuts are random; of a seed."""
    monkeypatch.setattr(C, "SEED", request.param)
    return random_rows(B * BATCHES, T + 1, documents=10**9)


@pytest.fixture
def two_documents(one_document) -> torch.Tensor:
    """Rows in which a document starts at one place, which few random cuts would meet."""
    starts = torch.arange(len(one_document)) * 5 % (T - 8) + 4
    return one_document.scatter(1, starts[:, None], BOS)


@pytest.mark.parametrize("first, last", [(2, T // 2 - 2), (T // 2 + 2, T - 4)])
def test_a_leak_in_one_half_of_the_row_but_for_its_ends(one_document, first, last):
    where = (first <= torch.arange(T)) & (torch.arange(T) <= last)
    refused(leak(where, after), "sees the future", one_document)


def test_a_row_that_looks_at_the_first_words_of_its_neighbour(one_document):
    where = (torch.arange(B) == 5)[:, None, None]

    def model(idx):  # few cuts of that row replace them; but rows have new neighbours
        return causal(idx) + LEAK[idx.roll(1, 0)[:, 3:4]] * where

    refused(model, "mixes rows", one_document)


def test_a_leak_at_the_start_of_a_document(two_documents):
    def model(idx):  # BOS knows the word that follows it, but for the row's first
        starts = (idx == BOS) & (torch.arange(T) > 0)
        return causal(idx) + LEAK[after(idx)] * starts[..., None]

    refused(model, "sees the future", two_documents)


def test_a_leak_of_the_end_of_a_document(two_documents):
    def model(idx):
        return causal(idx) + (after(idx) == BOS)[..., None] * LEAK[3]

    refused(model, "the future", two_documents)


def test_a_leak_over_the_border_of_documents():
    def model(idx):  # sees all of the next document but nothing more of its own
        document = (idx == BOS).cumsum(1)
        later = document[:, None] == document[:, :, None] + 1
        return causal(idx) + later.float() @ LEAK[idx] / T

    refused(model, "sees the future")


def test_attention_within_documents_in_both_directions():
    def model(idx):
        document = (idx == BOS).cumsum(1)
        return attention(idx, document[:, None] == document[:, :, None])

    refused(model, "sees the future")


# ---- State --------------------------------------------------------------------------------------
def remembers(what):
    """Return a model to whose logits what(ids, ids of the call before) is added."""
    calls = [torch.zeros(B, T, dtype=torch.long)]

    def model(idx):
        calls.append(idx)
        return causal(idx) + what(*calls[-1:-3:-1])

    return model


@pytest.mark.parametrize(
    "what",
    [
        lambda idx, before: LEAK[before],
        lambda idx, before: LEAK[before.roll(1, 0)] * (torch.arange(T) % 9 == 4)[:, None],
        lambda idx, before: LEAK[before[:, -1:]] * (torch.arange(T) > T // 2)[:, None],
        lambda idx, before: LEAK[before].mean((0, 1)),
    ],
    ids=["same row", "row above, one position in nine", "last id", "mean"],
)
def test_a_state_between_batches(what):
    refused(remembers(what), "keeps state")


def test_a_running_mean_over_batches():
    mean = torch.zeros(V)

    def model(idx):
        mean.lerp_(TABLE[idx].mean((0, 1)), 0.01)
        return causal(idx) + mean

    refused(model, "keeps state")


# ---- NaN ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_leak_behind_a_row_that_is_not_finite(value):
    def model(idx):  # in text, no logit of an id that is in no row
        known = (idx[:1] == RESERVED)[..., None]
        logits = leak(torch.arange(T) % 3 != 1, after)(idx)
        logits[:1] = logits[:1].masked_fill(known, value)
        return logits

    assert "-1e4" in refused(model, "not finite")


def test_a_nan_is_a_move_whatever_else_moves():
    a, seen = torch.zeros(3, T, V), torch.ones(3, T, dtype=torch.bool)
    b = a.clone()
    assert not moved(largest_moves(a, b, seen))
    b[0, 5, 1] = math.nan
    assert moved(largest_moves(a, b, seen))
    b[1, 7, 2] = 9
    gaps = largest_moves(a, b, seen)
    assert moved(gaps) and gaps[0].isnan() and gaps[1:].tolist() == [9, 0]
    b[0, 3, 2], seen[0, 5] = (
        1,
        False,
    )  # a NaN where nothing is compared hides nothing either
    assert largest_moves(a, b, seen).tolist() == [1, 9, 0]
    seen[0] = False
    assert largest_moves(a, b, seen).tolist() == [0, 9, 0]


# ---- Honest models ------------------------------------------------------------------------------
EMBEDDING, HEAD = table(3, V, WIDTH), table(4, WIDTH, V)
CAUSAL_MASK = torch.ones(T, T, dtype=torch.bool).tril()
KEYS, VALUES = table(5, WIDTH, WIDTH), table(6, WIDTH, WIDTH)


def attention(idx, mask=CAUSAL_MASK, dtype=torch.float32):
    x = EMBEDDING[idx].to(dtype)
    k, v = x @ KEYS.to(dtype), x @ VALUES.to(dtype)
    y = F.scaled_dot_product_attention(x, k, v, attn_mask=mask)
    return F.rms_norm(x + y, (WIDTH,)) @ HEAD.to(dtype)


def document_mask(idx):
    document = (idx == BOS).cumsum(1)
    return attention(idx, (document[:, None] == document[:, :, None]) & CAUSAL_MASK)


def convolution(idx):
    x = F.pad(EMBEDDING[idx].mT, (3, 0))  # (B, WIDTH, 3 + T)
    return F.conv1d(x, table(7, WIDTH, WIDTH, 4) / 8).mT @ HEAD


def mixture(idx):
    """Each token goes to the expert of its highest score, all of an expert's together."""
    x = EMBEDDING[idx].flatten(0, 1).cumsum(1)
    expert, y = (x @ table(8, WIDTH, 4)).argmax(1), torch.empty_like(x)
    for number, weight in enumerate(table(9, 4, WIDTH, WIDTH)):
        y[expert == number] = x[expert == number] @ weight
    return (y / 9 @ HEAD).view(*idx.shape, V)


def linear_attention(idx, dtype=torch.float32):
    """exp(k) over the largest k of the row, which falls out but for rounding."""
    x = EMBEDDING[idx].to(dtype)
    k = x @ KEYS.to(dtype)
    k = (k - k.amax(1, keepdim=True)).exp()
    y = (k * x).cumsum(1) / k.cumsum(1).clamp(min=1e-30)
    return (y @ HEAD.to(dtype)).float()


def int8(idx, dim=-1):
    """An int8 product, scaled by the largest activation of each token, or of all (dim None)."""
    x = EMBEDDING[idx] + EMBEDDING[idx].cumsum(1) / 9
    scale = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    return (x / scale * 127).round() * (scale / 127) @ HEAD


def batch_norm(idx, training=False):
    mean, var = torch.zeros(WIDTH), torch.ones(WIDTH)
    x = F.batch_norm(EMBEDDING[idx].flatten(0, 1), mean, var, training=training)
    return x.view(*idx.shape, WIDTH) @ HEAD


def masked(idx, value):
    return causal(idx).index_fill(2, torch.tensor([RESERVED, 12]), value)


HONEST = {
    "batch norm in evaluation mode": batch_norm,
    "int8 with a scale per token": int8,
    "linear attention in float32": linear_attention,
    "a mixture of experts": mixture,
    "a causal convolution": convolution,
    "a mask of documents": document_mask,
    "attention": attention,
    "attention in bf16": lambda idx: attention(idx, dtype=torch.bfloat16),
    "-1e4 on reserved ids": lambda idx: masked(idx, -1e4),
    "logits in bf16": lambda idx: causal(idx).bfloat16(),
    "logits in half precision": lambda idx: (99 * causal(idx)).half(),
}


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_model_passes(name):
    value = evaluate_bpb(HONEST[name], ROWS, SIZES, B)
    assert 0 < value < 1000 and evaluate_bpb(
        HONEST[name], ROWS, SIZES, 32
    ) == pytest.approx(value, rel=1e-3 if "bf16" in name else 1e-5)


# ---- What a refusal advises ---------------------------------------------------------------------
@pytest.mark.parametrize("value", [-math.inf, torch.finfo(torch.float32).min])
def test_minus_infinity_on_reserved_ids_is_told_what_to_take(value):
    assert "by -1e4" in refused(lambda idx: masked(idx, value), "not finite")


def test_one_scale_for_all_tokens_is_told_to_scale_per_token():
    def model(idx):
        return int8(idx, dim=None) / 30

    assert "scale per token" in refused(model, "(mixes rows|sees the future)")


def test_a_stabiliser_in_bf16_is_told_to_take_float32():
    def model(idx):
        return linear_attention(idx, torch.bfloat16) / 9

    assert "float32" in refused(model, "sees the future")


def test_statistics_of_the_batch_are_named():
    said = refused(lambda idx: batch_norm(idx, training=True), "mixes rows")
    assert "over the batch" in said or "batch statistics" in said


def test_a_look_ahead_is_told_where_to_look():
    said = refused(
        lambda idx: 9 * causal(idx.roll(-1, 1)), r"the future from \d+ on; moved"
    )
    assert "mask" in said and "roll" in said
