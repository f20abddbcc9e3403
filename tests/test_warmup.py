"""The warm-up: an edit that does nothing is named, and all is as before when it is over."""

import math

import pytest
import torch
import torch.nn as nn

import constants as C
from harness.warmup import (
    check_first_loss,
    check_groups,
    fixed_bytes,
    plan_batch,
    trainable,
    warm_up,
)

CPU, V, T = torch.device("cpu"), C.VOCAB_SIZE, C.MAX_SEQ_LEN
ROW = C.FULL_SEQ_LEN  # tokens of the full rules


class Model(nn.Module):
    """As small as a model can be: an embedding, something optional in the middle, a head."""

    def __init__(self, middle: nn.Module | None = None, dropout: float = 0.0):
        super().__init__()
        torch.manual_seed(0)
        self.wte = nn.Embedding(V, 8)
        self.middle = middle or nn.Linear(8, 8)
        self.dropout = nn.Dropout(dropout)
        self.lm_head = nn.Linear(8, V, bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.01)

    def forward(self, idx):
        x = self.wte(idx)
        return self.lm_head(self.dropout(x + self.middle(x)))


def train_step(model, optimizers, batches, micro_steps):
    total = torch.zeros(())
    for x, y in batches:
        loss = (
            nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()) / micro_steps
        )
        loss.backward()
        total += loss.detach()
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return total


def sgd(*params, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


def random_batch(rows: int):
    ids = torch.randint(V, (rows, T + 1))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def warm(model, optimizers=None, step=train_step, batch=(2, 3), **others):
    optimizers = [sgd(*model.parameters())] if optimizers is None else optimizers
    return warm_up(random_batch, model, optimizers, step, batch, 1.0, CPU, **others)


# ---- Groups -------------------------------------------------------------------------------------
def test_every_parameter_in_one_group_is_fine():
    model = Model()
    check_groups(
        model,
        [sgd(model.wte.weight), sgd(*model.middle.parameters(), model.lm_head.weight)],
    )


def test_an_optimizer_that_is_not_torchs_is_named():
    class Sign:
        def __init__(self, params):
            self.param_groups = [{"params": list(params), "lr": 0.1}]

    model = Model()
    with pytest.raises(ValueError, match="Sign is no torch.optim.Optimizer"):
        warm(model, [Sign(model.parameters())])


def test_a_parameter_in_no_optimizer_is_named():
    model = Model()
    rest = [p for name, p in model.named_parameters() if name != "middle.bias"]
    with pytest.raises(ValueError, match=r"^middle\.bias: in no optimizer"):
        check_groups(model, [sgd(*rest)])
    model.middle.bias.requires_grad_(False)  # what is not to learn need not be
    check_groups(model, [sgd(*rest)])


def test_a_parameter_in_two_groups_is_named():
    model = Model()
    with pytest.raises(ValueError, match=r"^wte\.weight: in two groups"):
        check_groups(model, [sgd(*model.parameters()), sgd(model.wte.weight)])


def test_an_empty_group_is_named_by_its_pattern():
    model = Model()
    optimizer = sgd(*model.parameters())
    optimizer.param_groups.append({"params": [], "names": "h.*.gone"})
    with pytest.raises(ValueError, match=r"group 1 of SGD \(h\.\*\.gone\) is empty"):
        check_groups(model, [optimizer])


def test_a_parameter_that_is_not_of_the_model_is_counted():
    model = Model()
    stranger = nn.Parameter(torch.ones(3))
    with pytest.raises(
        ValueError, match="1 parameter of the optimizers is not of the model"
    ):
        check_groups(model, [sgd(*model.parameters(), stranger)])


def test_a_frozen_parameter_in_a_group_is_named():
    model = Model()
    optimizer = sgd(*model.parameters())
    model.wte.weight.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"^wte\.weight: does not learn .* in a group of"
    ):
        check_groups(model, [optimizer])


def test_the_groups_are_checked_before_a_step_is_made():
    model = Model()
    with pytest.raises(ValueError, match=r"^wte\.weight: in two groups"):
        warm(model, [sgd(*model.parameters()), sgd(model.wte.weight)], step=None)


def test_tied_weights_are_one_parameter():
    model = Model()
    model.lm_head.weight = model.wte.weight
    check_groups(model, [sgd(*model.parameters())])


# ---- Gradients ----------------------------------------------------------------------------------
class Gated(nn.Module):
    """x * gate(x) through a projection: dead if both begin at zero, alive if one does."""

    def __init__(self, gate: float, proj: float):
        super().__init__()
        self.gate, self.proj = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        nn.init.normal_(self.gate.weight, std=gate)
        nn.init.normal_(self.proj.weight, std=proj)

    def forward(self, x):
        return self.proj(x * self.gate(x))


@pytest.mark.parametrize("gate, proj", [(0.0, 0.1), (0.1, 0.0), (0.1, 0.1)])
def test_one_zero_in_a_row_is_a_beginning_not_a_fault(gate, proj):
    assert warm(Model(Gated(gate, proj))) == (2, 3)


def test_two_zeros_in_a_row_never_get_a_gradient_and_are_named():
    with pytest.raises(
        RuntimeError, match=r"^middle\.gate\.weight, middle\.proj\.weight: the "
    ):
        warm(Model(Gated(0.0, 0.0)))


def test_what_stands_behind_a_frozen_zero_is_told_of_it():
    """Such as the gates on a table that begins at zero and does not learn."""
    model = Model(Gated(0.0, 0.1))
    model.middle.gate.weight.requires_grad_(False)
    why = (
        r"^middle\.proj\.weight: the gradient is zero .*, or it stands .* one that stays"
    )
    with pytest.raises(RuntimeError, match=why):
        warm(model, [sgd(*trainable(model).values())])


def test_what_is_not_used_is_named():
    model = Model()
    model.unused = nn.Linear(8, 8)
    with pytest.raises(RuntimeError, match=r"^unused\.weight, unused\.bias: no gradient"):
        warm(model)


def test_a_name_in_may_stand_still_is_the_way_out():
    dead = ["middle.gate.weight", "middle.proj.weight"]
    assert warm(Model(Gated(0.0, 0.0)), may_stand_still=dead) == (2, 3)
    model = Model()
    model.unused = nn.Linear(8, 8, bias=False)
    assert warm(model, may_stand_still=["unused.weight"]) == (2, 3)
    with pytest.raises(ValueError, match="may_stand_still names no parameter: gone"):
        warm(Model(), may_stand_still=["gone"])


def test_weight_decay_is_no_sign_of_life():
    model = Model(Gated(0.0, 0.0))
    nn.init.ones_(model.middle.gate.weight)
    model.middle.forward = lambda x: model.middle.proj(0 * model.middle.gate(x))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.5)
    dead = r"^middle\.gate\.weight, middle\.proj\.weight: the gradient is zero in 3 steps"
    with pytest.raises(RuntimeError, match=dead):
        warm(model, [optimizer])


@pytest.mark.parametrize("alive_in", [0, 1, 2])
def test_a_gradient_in_one_of_the_steps_is_enough(alive_in):
    model, steps = Model(), []
    optimizer = sgd(*model.parameters())

    def leave_one(*_):
        for p in model.middle.parameters():
            p.grad *= len(steps) == alive_in
        steps.append(1)

    optimizer.register_step_pre_hook(leave_one)
    assert warm(model, [optimizer]) == (2, 3) and len(steps) == 3


def test_a_learning_rate_of_zero_is_a_choice_that_is_named(capsys):
    model = Model()
    first, rest = model.wte.weight, [*model.middle.parameters(), model.lm_head.weight]
    warm(model, [sgd(first, lr=0.0), sgd(*rest)])
    (line,) = [s for s in capsys.readouterr().out.splitlines() if s.startswith("warning")]
    assert line.startswith("warning: edit: wte.weight: not moved by 3 steps")


def test_a_model_in_order_has_no_warning(capsys):
    warm(Model())
    assert "warning" not in capsys.readouterr().out


# ---- The first loss -----------------------------------------------------------------------------
def test_a_loss_that_no_untrained_model_has_stops_the_run():
    guess = math.log(V)
    check_first_loss(0.96 * guess, "here")
    for loss in (0.94 * guess, 0.0, -1.0, math.nan):
        with pytest.raises(RuntimeError, match="the loss here is .* the run is void"):
            check_first_loss(loss, "here")


def test_a_high_first_loss_is_a_warning(capsys):
    check_first_loss(1.04 * math.log(V), "here")
    assert capsys.readouterr().out == ""
    check_first_loss(1.06 * math.log(V), "here")
    assert capsys.readouterr().out.startswith("warning: edit: the loss here is ")


def test_a_step_that_returns_its_loss_divided_twice_is_found():
    with pytest.raises(RuntimeError, match="does not return nats per token"):
        warm(Model(), step=lambda *args: train_step(*args) / 2)


# ---- Modes --------------------------------------------------------------------------------------
def test_dropout_is_honoured_in_training_and_off_in_evaluation():
    model, modes = Model(dropout=0.5), []

    def step(*args):
        modes.append(model.training)
        return train_step(*args)

    warm(model, step=step)
    assert modes == [True, True, True] and model.training and model.dropout.training


def test_a_model_in_evaluation_mode_is_a_warning(capsys):
    model = Model(dropout=0.5).eval()
    warm(model)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("warning: edit: the model is in eval") for line in lines)
    assert not model.training


def test_a_part_that_was_in_evaluation_mode_stays_in_it():
    model = Model(dropout=0.5)
    model.dropout.eval()
    warm(model)
    assert model.training and not model.dropout.training


def test_what_is_random_in_evaluation_mode_is_refused_before_the_clock():
    model = Model()
    model.middle.forward = lambda x: (
        nn.functional.dropout(x, 0.5) * model.middle.weight.sum()
    )
    rest = [p for n, p in model.named_parameters() if n != "middle.bias"]
    model.middle.bias.requires_grad_(False)
    with pytest.raises(
        RuntimeError, match="evaluation refused: .* random in evaluation mode"
    ):
        warm(model, [sgd(*rest)])


def test_a_gradient_within_the_model_is_refused_before_the_clock():
    class Downhill(nn.Linear):
        def forward(self, x):
            with torch.enable_grad():
                z = x.detach().requires_grad_()
                (down,) = torch.autograd.grad(super().forward(z).square().sum(), z)
            return super().forward(x - 0.1 * down)

    with pytest.raises(RuntimeError, match="takes a gradient in its forward pass"):
        warm(Model(Downhill(8, 8)))
    torch.ones(1, requires_grad=True).sum().backward()


def test_what_sees_the_future_is_refused_before_the_clock():
    model = Model()
    model.middle.forward = lambda x: x.roll(-1, 1) * model.middle.weight.sum()
    model.middle.bias.requires_grad_(False)
    rest = [p for n, p in model.named_parameters() if n != "middle.bias"]
    with pytest.raises(
        RuntimeError, match="evaluation refused: the model sees the future"
    ):
        warm(model, [sgd(*rest, lr=1.0)])


# ---- As before ----------------------------------------------------------------------------------
def everything(model, optimizers) -> list:
    """Return all that a warm-up may touch: tensors, the generator, the groups' numbers."""
    tensors = [*model.parameters(), *model.buffers()]
    numbers = []
    for optimizer in optimizers:
        tensors += [t for state in optimizer.state.values() for t in state.values()]
        for group in optimizer.param_groups:
            numbers.append({k: v for k, v in group.items() if k != "params"})
    return [*(t.detach().clone() for t in tensors), torch.get_rng_state(), numbers]


def same(a: list, b: list) -> bool:
    pairs = list(zip(a, b, strict=True))
    tensors = [(x, y) for x, y in pairs if isinstance(x, torch.Tensor)]
    return all(torch.equal(x, y) for x, y in tensors) and a[-1] == b[-1]


@pytest.mark.parametrize("micro_steps, last", [(1, 2), (2, 2), (5, 5)])
def test_the_last_step_has_all_micro_steps_as_a_sparse_gradient_grows_with_each(
    micro_steps, last
):
    counts = []

    def step(model, optimizers, batches, count):
        batches = list(batches)
        assert count == len(batches)
        counts.append(count)
        return train_step(model, optimizers, batches, count)

    warm(Model(), step=step, batch=(2, micro_steps))
    assert counts == [2, 2, last]


@pytest.mark.parametrize("steps_before", [0, 2])
def test_weights_buffers_state_and_generator_are_as_before_bit_for_bit(steps_before):
    model = Model(nn.BatchNorm1d(T), dropout=0.1)  # running statistics are buffers
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1)]
    for _ in range(steps_before):
        train_step(model, optimizers, [random_batch(2)], 1)
    torch.manual_seed(5)
    seen = []

    def step(*args):
        seen.append(everything(model, optimizers))
        loss = train_step(*args)
        model.wte.weight.grad = torch.ones_like(model.wte.weight)  # forgotten
        return loss

    def batch(rows):  # leaves torch's own generator alone, as the run's does
        ids = torch.randint(
            V, (rows, T + 1), generator=torch.Generator().manual_seed(rows)
        )
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    before = everything(model, optimizers)
    warm_up(batch, model, optimizers, step, (2, 1), 1.0, CPU)
    assert same(before, everything(model, optimizers))
    assert same(before, seen[0])
    assert not torch.equal(seen[0][0], seen[1][0])  # it did move in between
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_batch_that_does_not_fit_is_halved_and_leaves_nothing_behind(fails_at, capsys):
    model, rows, unmoved = Model(), [], []
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1)]
    before = [p.detach().clone() for p in model.parameters()]

    def step(model, optimizers, batches, micro_steps):
        unmoved.append(all(map(torch.equal, before, model.parameters())))
        batches = list(batches)
        rows.append(len(batches[0][0]))
        if rows.count(8) == fails_at and rows[-1] == 8:
            raise torch.OutOfMemoryError("does not fit")
        return train_step(model, optimizers, batches, micro_steps)

    assert warm(model, optimizers, step, batch=(8, 3)) == (4, 6)  # the same rows per step
    assert rows == [8] * fails_at + [4] * 3
    # Each attempt begins where the first did, with no state.
    assert unmoved == [True] + [False] * (fails_at - 1) + [True, False, False]
    assert all(map(torch.equal, before, model.parameters())) and not optimizers[0].state
    assert "8 rows do not fit in memory, trying 4" in capsys.readouterr().out


# ---- The batch ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "total, device, rows, micro_steps",
    [
        (64 * ROW, 64, 64, 1),
        (64 * ROW, 16, 16, 4),
        (16 * ROW, 64, 16, 1),  # device_batch_size is the most
        (96 * ROW, 48, 48, 2),
        (96 * ROW, 96, 96, 1),
        (ROW, 1, 1, 1),
    ],
)
def test_a_batch_is_exactly_what_the_knobs_say(
    monkeypatch, total, device, rows, micro_steps
):
    monkeypatch.setattr(C, "MAX_SEQ_LEN", ROW)
    assert plan_batch(total, device) == (rows, micro_steps)
    assert rows * micro_steps * ROW == total


@pytest.mark.parametrize(
    "total, device",
    [
        (3 * 2**16, 64),
        (64 * ROW + 1, 64),
        (100 * ROW, 64),
        (64 * ROW, 0),
        (0, 64),
        (ROW // 2, 1),
    ],
)
def test_a_batch_that_cannot_be_had_exactly_is_an_error_with_both_knobs(total, device):
    both = rf"TOTAL_BATCH_SIZE \({total} tokens\) .* DEVICE_BATCH_SIZE \({device}\)"
    with pytest.raises(ValueError, match=both):
        plan_batch(total, device)


@pytest.mark.parametrize("total, device", [(2**17 / 2, 64), (2**17, 64.0), (2e5, 64)])
def test_a_batch_size_that_is_no_whole_number_is_an_error_with_both_knobs(total, device):
    both = (
        rf"TOTAL_BATCH_SIZE and DEVICE_BATCH_SIZE are {total!r} and {device!r}, and must"
    )
    with pytest.raises(ValueError, match=both):
        plan_batch(total, device)


def test_the_smoke_rules_take_smaller_rows_and_fewer_but_as_many_micro_steps():
    assert T < ROW
    assert plan_batch(64 * ROW, 64) == (64 * T // ROW, 1)
    assert plan_batch(64 * ROW, 16) == (16 * T // ROW, 4)
    assert plan_batch(4 * ROW, 1) == (1, 4)


def test_room_is_left_for_gradients_and_the_state_that_an_optimizer_says_it_keeps():
    p, half = nn.Parameter(torch.zeros(10)), nn.Parameter(torch.zeros(4).bfloat16())
    lean = sgd(half)
    lean.STATE_PER_PARAM = 0
    assert fixed_bytes([torch.optim.AdamW([p])]) == 3 * 40
    assert fixed_bytes([torch.optim.AdamW([p]), lean]) == 3 * 40 + 8


def test_groups_that_a_schedule_holds_from_before_the_warm_up_are_still_the_optimizers():
    model = Model()
    optimizer = sgd(*model.parameters())
    (group,) = optimizer.param_groups
    warm(
        model, [optimizer], step=lambda *args: (group.update(new=1), train_step(*args))[1]
    )
    group["lr"] = 0.5
    assert optimizer.param_groups[0]["lr"] == 0.5 and "new" not in group


def test_a_second_pass_over_the_batches_of_a_step_is_no_empty_one():
    def twice(model, optimizers, batches, micro_steps):
        train_step(model, optimizers, batches, micro_steps)
        return train_step(model, optimizers, batches, micro_steps)

    with pytest.raises(RuntimeError, match=r"handed out once.*list\(batches\)"):
        warm(Model(), step=twice)

    def kept(model, optimizers, batches, micro_steps):
        return twice(model, optimizers, list(batches), micro_steps)

    warm(Model(), step=kept)


def test_optimizers_that_step_now_and_then_are_told_how_often_they_did():
    class Late(nn.Linear):
        def forward(self, x):
            return 0 * super().forward(x)

    calls = []

    def seldom(model, optimizers, batches, micro_steps):
        calls.append(1)
        optimizers = optimizers if len(calls) == 2 else []
        return train_step(model, optimizers, batches, micro_steps)

    with pytest.raises(RuntimeError, match="zero in 1 step of 3 train_steps"):
        warm(Model(Late(8, 8)), step=seldom)


def test_an_optimizer_that_never_steps_is_named_and_not_the_model():
    model = Model()
    first, *others = model.parameters()
    optimizers = [sgd(first), torch.optim.AdamW(others)]

    def one_alone(model, optimizers, batches, micro_steps):
        return train_step(model, optimizers[:1], batches, micro_steps)

    with pytest.raises(
        RuntimeError, match=r"^AdamW: no step in 3 train_steps; call step"
    ):
        warm(model, optimizers, one_alone)
