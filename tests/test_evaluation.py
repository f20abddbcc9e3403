"""Bits per byte: counted by hand, for every batch size, and refused for models that cheat."""

import math
import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import constants as C
from harness.evaluation import CHECKS, Probe, bits_per_byte, check_model, evaluate_bpb
from harness.run import Run

CPU = torch.device("cpu")
V, R, T = 13, 7, 12  # ids, rows, targets a row
SPECIAL = (11, 12)  # no bytes; id 10 is never in a row
SIZES = torch.tensor([1, 2, 3, 1, 4, 2, 1, 5, 1, 2, 1, 0, 0])


@pytest.fixture
def rows(monkeypatch) -> torch.Tensor:
    """Rows of a vocabulary of V ids, which is the rules' in the test."""
    monkeypatch.setattr(C, "VOCAB_SIZE", V)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, (R, T + 1), generator=generator)
    ids[:, 0] = SPECIAL[0]
    ids[1, 5], ids[3, T] = SPECIAL
    return ids


def table(seed: int) -> torch.Tensor:
    return torch.randn(V, V, generator=torch.Generator().manual_seed(seed))


def causal(idx: torch.Tensor) -> torch.Tensor:
    """A model that looks at an id and, less, at all those before it."""
    return table(0)[idx] + 0.1 * table(1)[idx].cumsum(1)


def uniform(idx: torch.Tensor) -> torch.Tensor:
    return torch.zeros(*idx.shape, V)


def slow_sums(model, rows: torch.Tensor) -> tuple[float, int]:
    """Return nats and bytes of `rows`, one target after the other, in Python's floats."""
    nats, nbytes = 0.0, 0
    for row in rows:
        logits = model(row[None, :-1])[0].double().tolist()
        for scores, target in zip(logits, row[1:].tolist(), strict=True):
            if target not in SPECIAL:
                nats += math.log(sum(math.exp(s - max(scores)) for s in scores))
                nats += max(scores) - scores[target]
                nbytes += int(SIZES[target])
    return nats, nbytes


# ---- The number ---------------------------------------------------------------------------------
def test_bits_per_byte_by_hand():
    # Three tokens at 1/2, 1/4 and 1/8 cost 1 + 2 + 3 bits; they spell four bytes.
    assert bits_per_byte(-math.log(1 / 2 * 1 / 4 * 1 / 8), 4) == pytest.approx(1.5)
    assert bits_per_byte(0.0, 9) == 0.0


def test_a_uniform_model_costs_log2_of_the_vocabulary_a_token(rows):
    targets = [
        target for row in rows.tolist() for target in row[1:] if target not in SPECIAL
    ]
    nbytes = sum(SIZES[target].item() for target in targets)
    expected = math.log2(V) * len(targets) / nbytes
    assert evaluate_bpb(uniform, rows, SIZES, 2) == pytest.approx(expected, rel=1e-6)


def test_a_known_model_agrees_with_a_slow_loop(rows):
    nats, nbytes = slow_sums(causal, rows)
    expected = nats / nbytes / math.log(2)
    assert evaluate_bpb(causal, rows, SIZES, 3) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_rows_may_have_any_integer_type(rows, dtype):
    expected = evaluate_bpb(causal, rows, SIZES, 3)
    assert evaluate_bpb(causal, rows.to(dtype), SIZES, 3) == expected


def test_special_tokens_count_in_neither_sum(rows):
    before = evaluate_bpb(uniform, rows, SIZES, 2)
    more = torch.cat([rows, torch.full((4, T + 1), SPECIAL[1])])
    assert evaluate_bpb(uniform, more, SIZES, 2) == pytest.approx(before, rel=1e-9)


def test_the_first_id_of_a_row_is_no_target(rows):
    changed = rows.clone()
    changed[:, 0] = 7
    before = evaluate_bpb(uniform, rows, SIZES, 2)
    assert evaluate_bpb(uniform, changed, SIZES, 2) == before


def test_every_batch_size_gives_the_same_value(rows):
    values = [evaluate_bpb(causal, rows, SIZES, size) for size in (1, 3, R, R + 4)]
    assert values == pytest.approx([values[0]] * 4, rel=1e-7)
    # The last batch of 3 holds one row; its fillers would be seen if they counted.
    assert values[0] != pytest.approx(evaluate_bpb(causal, rows[:6], SIZES, 3), rel=1e-4)


def test_every_call_has_one_shape_so_that_nothing_is_compiled_twice(rows):
    shapes = set()

    def model(idx):
        shapes.add(tuple(idx.shape))
        return causal(idx)

    evaluate_bpb(model, rows, SIZES, 3)
    assert shapes == {(3, T)}


def test_the_model_is_never_given_the_last_target(rows):
    seen = []

    def model(*args, **kwargs):
        assert len(args) == 1 and not kwargs
        seen.append(args[0].clone())
        return causal(args[0])

    evaluate_bpb(model, rows, SIZES, R)
    assert all(idx.shape == (R, T) for idx in seen)
    assert torch.equal(seen[0], rows[:, :-1])


def test_half_precision_logits_are_summed_in_float32(rows):
    def model(idx):
        return (50 * causal(idx)).bfloat16()

    nats, nbytes = slow_sums(model, rows)
    expected = nats / nbytes / math.log(2)
    assert evaluate_bpb(model, rows, SIZES, 3) == pytest.approx(expected, rel=1e-5)


# ---- Refusals -----------------------------------------------------------------------------------
def refused(model, rows, what: str, batch_size: int = 4) -> None:
    with pytest.raises(RuntimeError, match=f"evaluation refused: .*{what}"):
        evaluate_bpb(model, rows, SIZES, batch_size)


def test_refuses_a_model_that_averages_over_the_whole_row(rows):
    def model(idx):
        return causal(idx) + table(2)[idx].mean(1, keepdim=True)

    refused(model, rows, "sees the future")


@pytest.mark.parametrize("batch_size", [1, 4])
def test_refuses_a_shift_by_one(rows, batch_size):
    def model(idx):  # logits at t from id t + 1, the target
        return 9 * torch.eye(V)[idx.roll(-1, dims=1)]

    refused(model, rows, "sees the future", batch_size)


@pytest.mark.parametrize("leak", [0, T - 2])
def test_refuses_a_leak_at_a_single_position_into_the_next(rows, leak):
    def model(idx):
        logits = causal(idx)
        logits[:, leak] += 0.1 * table(2)[idx[:, leak + 1]]
        return logits

    refused(model, rows, "sees the future")


def test_refuses_a_model_that_mixes_rows(rows):
    def model(idx):
        return causal(idx) + table(2)[idx].mean(0, keepdim=True)

    refused(model, rows, "mixes rows")


def test_refuses_a_counter_of_calls(rows):
    calls = []

    def model(idx):
        calls.append(idx)
        return causal(idx) + 0.2 * len(calls) * torch.arange(V)

    refused(model, rows, "keeps state")


def test_refuses_a_cache_of_earlier_calls(rows):
    cache = []

    def model(idx):
        logits = causal(idx) + sum(table(3)[old].mean((0, 1)) for old in cache[-1:])
        cache.append(idx)
        return logits

    refused(model, rows, "keeps state")


def test_refuses_a_model_that_learns_slowly_from_what_it_is_shown(rows):
    counts = torch.zeros(V)

    def model(idx):  # a unigram cache: the text of one batch helps with the next
        counts.add_(0.01 * torch.bincount(idx.flatten(), minlength=V) / idx.numel())
        return causal(idx) + counts

    refused(model, rows, "keeps state")


def test_refuses_a_model_that_drifts_too_slowly_to_be_seen_before_the_end(rows):
    calls = []

    def model(
        idx,
    ):  # moves by less than the tolerance in all calls of the first check together
        calls.append(idx)
        return causal(idx) + 0.15 * C.LOGIT_TOLERANCE * len(calls)

    check_model(model, rows[:1, :-1])
    refused(model, rows, "keeps state", batch_size=1)


def test_refuses_dropout_left_on(rows):
    def model(idx):
        return torch.nn.functional.dropout(causal(idx), 0.1, training=True)

    refused(model, rows, "is random in evaluation mode")


@pytest.mark.parametrize(
    "model, what",
    [
        (
            lambda idx: causal(idx)[..., :-1],
            rf"4, {T}, {V - 1}[])].* not logits \(4, {T}, {V}\)",
        ),
        (lambda idx: causal(idx)[:, -1:], rf"4, 1, {V}[])].* not logits"),
        (lambda idx: causal(idx).mean(), r"\(\[?\]?\).*, not logits"),
        (lambda idx: 1.5, "gave float"),
        (lambda idx: (causal(idx), None), "gave tuple"),
        (lambda idx: (9 * causal(idx)).long(), "(int64|integer|dtype)"),
    ],
    ids=["vocabulary", "last-position-only", "loss", "number", "tuple", "integers"],
)
def test_refuses_what_is_no_logits_and_says_what_it_got(rows, model, what):
    refused(model, rows, what)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["everywhere", "in the last row"])
def test_refuses_logits_that_are_not_finite_even_for_an_id_that_is_no_target(
    rows, value, where
):
    last = rows[-1, :-1]

    def model(idx):
        logits = causal(idx)
        at = (idx == last).all(1) if where == "in the last row" else slice(None)
        logits[at, :, 10] = value  # id 10 is never a target
        return logits

    refused(model, rows, "finite")


def test_a_causal_model_passes_whatever_its_precision(rows):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        value = evaluate_bpb(
            lambda idx, dtype=dtype: causal(idx).to(dtype), rows, SIZES, 2
        )
        assert math.isfinite(value)


@pytest.mark.parametrize("n", [1, 2, R, 40])
def test_ids_are_replaced_from_a_cut_of_each_row_on_and_in_each_check_some_row_is_not(
    rows, n
):
    base, seen = rows[:, :-1].repeat(6, 1)[:n], []

    def model(idx):
        seen.append(idx.clone())
        return uniform(idx)

    check_model(model, base, checks=16)
    assert torch.equal(seen[0], base) and len(seen) == 17
    cuts, replayed = set(), set()
    for idx in seen[1:]:
        moved = (idx != base).tolist()
        of_each = [row.index(True) if True in row else T for row in moved]
        assert all(
            row == [place >= cut for place in range(T)]
            for row, cut in zip(moved, of_each, strict=True)
        )
        whole = {b for b, cut in enumerate(of_each) if cut == T}
        assert n == 1 or 1 <= len(whole) <= max(1, n // 16 + 1)
        cuts |= set(of_each)
        replayed |= whole
    assert len(cuts - {T}) >= 8 and {1, T - 1} <= cuts and replayed == set(range(n))


def test_half_of_the_cuts_lie_at_the_start_of_a_document(monkeypatch):
    monkeypatch.setattr(C, "VOCAB_SIZE", V)
    monkeypatch.setattr(C, "BOS_ID", SPECIAL[0])
    base = torch.randint(10, (64, 200), generator=torch.Generator().manual_seed(1))
    base[:, [0, 60, 151]] = C.BOS_ID
    base[::2, 60] = base[::2, 151] = 5  # every second row is one document
    probe = Probe(base, torch.zeros(64, 200, 1), checks=14)
    for _ in range(14):
        probe.cuts[probe.done] = probe.draw_cuts()
        probe.done += 1
    cuts = probe.cuts[:, 1::2].flatten()
    cuts, starts = cuts[cuts < 200], torch.tensor([60, 61, 151, 152])
    assert 0.4 < torch.isin(cuts, starts).double().mean() < 0.6
    assert all((cuts == start).double().mean() > 0.08 for start in starts)
    cuts = probe.cuts[:, ::2].flatten()
    assert torch.isin(cuts, starts).double().mean() < 0.1


def test_the_cuts_come_from_the_seed_of_the_run_and_leave_torch_s_generator_alone(
    rows, monkeypatch
):
    def calls() -> torch.Tensor:
        seen = []
        evaluate_bpb(lambda idx: seen.append(idx) or uniform(idx), rows, SIZES, 4)
        return torch.stack(seen)

    state, first = torch.get_rng_state(), calls()
    assert torch.equal(first, calls()) and torch.equal(state, torch.get_rng_state())
    monkeypatch.setattr(C, "SEED", C.SEED + 1)
    assert not torch.equal(first, calls())


class Reads(TorchDispatchMode):
    """Counts the values that the host reads, for each of which a GPU's queue would run dry."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "local_scalar_dense" in str(function) or "nonzero" in str(function)
        return function(*args, **(kwargs or {}))


def test_the_host_waits_for_the_device_as_often_for_many_batches_as_for_one(rows):
    counts = set()
    for batch_size in (1, 2, R):
        with Reads() as reads:
            evaluate_bpb(uniform, rows, SIZES, batch_size)
        counts.add(reads.count)
    assert len(counts) == 1 and counts.pop() < 8


# ---- The evaluation of a run --------------------------------------------------------------------
def a_trained_run(prepared, monkeypatch, rows: int) -> Run:
    monkeypatch.setattr(C, "TIME_BUDGET", 0.1)
    run = Run(prepared, CPU)
    run.batch_size, run.micro_steps = rows, 1  # the warm-up sets them
    for step in run.steps():
        step.loss = len(list(step.batches)) * math.log(C.VOCAB_SIZE)
    run._val_rows._files = [run._val_rows._files[0][:40]]  # enough to tell, and quick
    return run


def some_model(idx: torch.Tensor) -> torch.Tensor:
    weights = torch.randn(C.VOCAB_SIZE, 2, generator=torch.Generator().manual_seed(0))
    return weights[idx] @ weights.T


@pytest.mark.parametrize(
    "fits, rows, calls", [(1000, 4, 4), (5, 16, 4), (1, 4, 1), (1000, 1, 2)]
)
def test_the_evaluation_finds_its_batch_and_its_result_does_not_depend_on_it(
    prepared, monkeypatch, fits, rows, calls
):
    run, sizes = a_trained_run(prepared, monkeypatch, rows), []

    def model(idx):
        if len(idx) > fits:
            raise torch.OutOfMemoryError
        sizes.append(len(idx))
        return some_model(idx)

    value, rows = (
        run.evaluate(model),
        np.concatenate(run._val_rows._files).astype(np.int64),
    )
    token_bytes = torch.from_numpy(run.tokenizer.token_bytes)
    expected = evaluate_bpb(some_model, torch.from_numpy(rows), token_bytes, 32)
    assert value == pytest.approx(expected, rel=1e-7)
    assert set(sizes) == {calls}


def test_the_evaluation_has_no_more_rows_at_once_than_the_rules_say(
    prepared, monkeypatch
):
    monkeypatch.setattr(C, "EVAL_BATCH_ROWS", 8)
    run, sizes = a_trained_run(prepared, monkeypatch, 64), set()
    run.evaluate(lambda idx: sizes.add(len(idx)) or some_model(idx))
    assert sizes == {8}


def test_a_model_that_runs_out_of_memory_has_not_seen_validation_text(
    prepared, monkeypatch
):
    run, seen = a_trained_run(prepared, monkeypatch, 4), []

    def model(idx):
        seen.append(idx.clone())
        if len(idx) > 2:
            raise torch.OutOfMemoryError
        return some_model(idx)

    run.evaluate(model)
    text = {tuple(row[:-1].tolist()) for row in run._val_rows._files[0]}
    failed = [tuple(row.tolist()) for idx in seen for row in idx if len(idx) > 2]
    assert failed and not text & set(failed)
    assert tuple(seen[-1][0].tolist()) in text


def test_a_model_that_mixes_rows_is_refused_also_after_training_of_single_rows(
    prepared, monkeypatch
):
    run = a_trained_run(prepared, monkeypatch, 1)
    with pytest.raises(RuntimeError, match="evaluation refused: the model mixes rows"):
        run.evaluate(lambda idx: some_model(idx) + some_model(idx).mean(0, keepdim=True))


class Dropping(torch.nn.Module):
    """some_model with dropout, and the modes that it was called in."""

    def __init__(self):
        super().__init__()
        self.dropout, self.modes = torch.nn.Dropout(0.5), set()

    def forward(self, idx):
        self.modes.add((self.training, self.dropout.training))
        return self.dropout(some_model(idx))


def test_a_module_is_measured_in_evaluation_mode(prepared, monkeypatch):
    run, model = a_trained_run(prepared, monkeypatch, 4), Dropping()
    value, plain = run.evaluate(model), a_trained_run(prepared, monkeypatch, 4)
    assert model.modes == {(False, False)}
    assert value == pytest.approx(plain.evaluate(some_model), rel=1e-7)


@pytest.mark.parametrize("rows", [1, 9])
def test_logits_of_a_batch_are_let_go_before_those_of_the_next_are_made(prepared, rows):
    run, alive = Run(prepared, CPU), []
    most = []

    def model(idx):
        most.append(len(alive))
        logits = some_model(idx)
        alive.append(number := len(most))
        weakref.finalize(logits, alive.remove, number)
        return logits

    ids = torch.from_numpy(run._val_rows._files[0][: 5 * rows].astype(np.int64))
    evaluate_bpb(model, ids, torch.from_numpy(run.tokenizer.token_bytes), rows)
    assert most == [0] * (5 + CHECKS)
