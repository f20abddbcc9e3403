"""Honest edits that a run passed over in silence, or refused by a sentence that is not true."""

import random
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.fx
import torch.nn as nn

import train
from harness import run as harness_run
from harness import warmup
from harness.warmup import check_groups
from laws import fresh
from test_dry_run import finish, run_dry
from test_warmup import Model, sgd, train_step, warm


# ---- What no optimizer has ----------------------------------------------------------------------
@pytest.mark.parametrize(
    "hide, name",
    [
        (
            lambda m: setattr(m, "extra", [nn.Linear(8, 8)]),
            r"extra\[0\]\.weight, extra\[0\]\.bias",
        ),
        (
            lambda m: setattr(m, "extra", {"a": nn.Parameter(torch.ones(3))}),
            r"extra\['a'\]",
        ),
        (
            lambda m: setattr(m.middle, "gain", torch.ones(8, requires_grad=True)),
            r"middle\.gain",
        ),
    ],
)
def test_what_learns_but_is_hidden_from_torch_is_named(hide, name):
    model = Model()
    hide(model)
    with pytest.raises(ValueError, match=rf"^{name}: learns, but is no parameter of"):
        warm(model)


def test_what_is_held_twice_or_does_not_learn_is_not_hidden():
    model = Model()
    model.shared, model.teacher = [model.middle], [nn.Linear(8, 8).requires_grad_(False)]
    check_groups(model, [sgd(*model.parameters())])


def test_a_parameter_made_in_the_first_forward_pass_is_named():
    model = Model()
    optimizers, forward = [sgd(*model.parameters())], model.middle.forward

    def lazily(x):
        if not hasattr(model.middle, "gain"):
            model.middle.gain = nn.Parameter(torch.ones(8))
        return model.middle.gain * forward(x)

    model.middle.forward = lazily
    with pytest.raises(
        RuntimeError, match=r"^middle\.gain: made in the first steps, so no opt"
    ):
        warm(model, optimizers)


def test_a_parameter_replaced_while_the_clock_runs_is_a_warning(capsys):
    model = Model()
    optimizers = [sgd(*model.parameters())]
    warmup.warn_of_untrained(model, optimizers)
    assert capsys.readouterr().out == ""
    model.lm_head.weight = nn.Parameter(model.lm_head.weight / 2)
    warmup.warn_of_untrained(model, optimizers)
    assert capsys.readouterr().out.startswith(
        "warning: edit: lm_head.weight: made after run.warm_up and in none of its optimizers"
    )
    optimizers[0].add_param_group({"params": [model.lm_head.weight]})
    model.eval()
    warmup.warn_of_untrained(model, optimizers)
    assert "is in evaluation mode at the end of training" in capsys.readouterr().out


# ---- What the warm-up puts back -----------------------------------------------------------------
class Scaled(nn.Linear):
    """A buffer, a number and a tensor that each step of training replaces."""

    def __init__(self):
        super().__init__(8, 8)
        self.register_buffer("scale", torch.ones(()))
        self.calls, self.memory = 0, None

    def forward(self, x):
        if self.training:
            self.scale = 0.9 * self.scale + 0.1 * x.detach().std()
            self.calls, self.memory = self.calls + 1, x.detach()
        return super().forward(x) / self.scale


def test_a_buffer_that_each_step_replaces_is_as_before():
    model = Model(Scaled())
    buffer = model.middle.scale
    warm(model)
    assert model.middle.scale is buffer and float(buffer) == 1
    assert (model.middle.calls, model.middle.memory) == (0, None)


class Lookahead(torch.optim.Optimizer):
    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner, self.param_groups, self.count = inner, inner.param_groups, 0

    def step(self):
        self.inner.step()
        self.count += 1


def test_an_optimizer_within_another_is_as_before():
    model = Model()
    inner = torch.optim.AdamW(model.parameters(), 0.01)
    outer = Lookahead(inner)
    warm(model, [outer])
    assert (len(inner.state), outer.count) == (0, 0)
    assert all(
        a is b for a, b in zip(outer.param_groups, inner.param_groups, strict=True)
    )
    train_step(model, [outer], [(torch.zeros(1, 4).long(),) * 2], 1)
    assert {int(state["step"]) for state in inner.state.values()} == {1}


class Master(torch.optim.Optimizer):
    """Keeps float32 weights and integers from the start, and its momentum in a dictionary."""

    def __init__(self, params):
        super().__init__(params, {})
        self.momentum = {}
        for p in self.param_groups[0]["params"]:
            self.state[p]["master"] = p.detach().float()
            self.state[p]["steps"] = torch.zeros((), dtype=torch.int8)
        self.masters = [state["master"] for state in self.state.values()]

    @torch.no_grad()
    def step(self):
        for p, state in self.state.items():
            momentum = self.momentum.setdefault(p, torch.zeros_like(p))
            momentum.lerp_(p.grad, 0.1)
            state["steps"] += 1
            p.copy_(state["master"].sub_(0.1 * momentum.float()))


def test_the_state_of_an_optimizer_keeps_its_dtype_and_its_place():
    """torch's own load_state_dict would give it the dtype of the weights."""
    model = Model().bfloat16()
    optimizer = Master(model.parameters())
    before = [master.clone() for master in optimizer.masters]
    warm(model, [optimizer])
    states = [*optimizer.state.values()]
    masters = [state["master"] for state in states]
    assert {(s["master"].dtype, s["steps"].dtype) for s in states} == {
        (torch.float32, torch.int8)
    }
    assert all(a is b for a, b in zip(masters, optimizer.masters, strict=True))
    assert all(map(torch.equal, masters, before)) and not optimizer.momentum
    assert {int(state["steps"]) for state in states} == {0}


class Counting(torch.optim.SGD):
    """Keeps in its groups and its state what is neither a number of Python's nor a tensor."""

    def step(self):
        super().step()
        (group,) = self.param_groups
        group["norms"].append(1.0)
        group["k"] = group["k"] + 1
        group.setdefault("seen", np.zeros(1))[0] += 1
        self.state["all"] = SimpleNamespace(norms=group["norms"])


def test_what_an_optimizer_keeps_is_as_before_whatever_it_is():
    """A count of numpy's, say, by which a schedule would begin at its twelfth step."""
    model = Model()
    optimizer = Counting(model.parameters(), lr=0.1)
    (group,) = optimizer.param_groups
    group |= {"norms": deque(maxlen=9), "k": np.int64(0)}
    warm(model, [optimizer])
    assert group is optimizer.param_groups[0] and not optimizer.state
    assert not group["norms"] and group["k"] == 0 and "seen" not in group


def test_what_the_state_of_one_parameter_holds_is_as_before_whatever_it_is():
    model = Model()
    first = next(model.parameters())
    optimizer = sgd(*model.parameters())
    optimizer.state[first]["history"] = deque()

    def step(*args):
        optimizer.state[first]["history"].append(1.0)
        return train_step(*args)

    warm(model, [optimizer], step=step)
    assert not optimizer.state[first]["history"]


def test_tables_that_grow_and_shapes_without_numbers_refuse_nothing():
    model = Model()
    model.table, model.shape = torch.empty(0), torch.empty(3, device="meta")
    model.names = torch.fx.immutable_collections.immutable_list("ab")

    def step(*args):
        if not len(model.table):
            model.table.resize_(4).fill_(1)
        return train_step(*args)

    warm(model, step=step)
    assert model.table.shape == (0,)


def test_an_average_that_the_model_holds_does_not_know_the_warm_ups_weights():
    model = Model()
    model.counts, model.mask = [0], torch.ones(1).expand(3)
    model.early = [p.detach().clone() for p in model.parameters()]
    weights = [p.detach().clone() for p in model.parameters()]

    def step(*args):
        loss = train_step(*args)
        if not hasattr(model, "late"):
            model.late = [p.detach().clone() for p in model.parameters()]
        for average, p in zip(model.early, model.parameters(), strict=True):
            average.lerp_(p.detach(), 0.5)
        model.counts.append(model.counts.pop() + 1)
        return loss

    warm(model, step=step)
    assert all(map(torch.equal, model.early, weights)) and model.counts == [0]
    assert not hasattr(model, "late")


def test_the_random_numbers_of_python_and_numpy_are_the_seeds(prepared):
    def draw() -> list[float]:
        run = harness_run.Run(prepared, torch.device("cpu"))
        drawn = [random.random(), np.random.random()]
        assert run.seed is not None
        return drawn

    assert draw() == draw()
    before = random.getstate(), np.random.get_state()[1].tolist()

    def step(*args):
        random.random(), np.random.random()
        return train_step(*args)

    warm(Model(), step=step)
    assert before == (random.getstate(), np.random.get_state()[1].tolist())


# ---- Sentences ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "other, what",
    [
        (lambda t: (t, t), "tuple"),
        (lambda t: None, "NoneType"),
        (lambda t: t.expand(2), r"Tensor \(2,\)"),
    ],
)
def test_a_step_that_gives_no_loss_is_told_what_to_give(other, what):
    with pytest.raises(
        ValueError, match=rf"^train_step gave {what}, not the mean loss; if"
    ):
        warm(Model(), step=lambda *args: other(train_step(*args)))


@pytest.mark.parametrize("factor, warnings", [(1, 0), (20, 1)])
def test_logits_that_training_does_not_have_are_a_warning(factor, warnings, capsys):
    """As after an edit of logits alone, where training has a fused loss."""
    model = Model()
    model.forward = lambda idx: (
        Model.forward(model, idx) * (1 if model.training else factor)
    )
    warm(model)
    assert (
        capsys.readouterr().out.count("has logits an edit that cross_entropy lacks")
        == warnings
    )


def test_a_function_is_evaluated_with_the_trained_model_in_evaluation_mode(
    prepared, monkeypatch
):
    run, model = harness_run.Run(prepared, torch.device("cpu")), Model(dropout=0.5)
    run.trained, run.num_steps, run.batch_size, run.clock.started_at = (
        (model, []),
        1,
        2,
        0.0,
    )
    run.clock.now = lambda: 0.0
    monkeypatch.setattr(
        harness_run, "evaluate_bpb", lambda m, *_, **__: float(model.training)
    )
    assert run.evaluate(lambda idx: model(idx) / 2) == 0.0


# ---- The dry run --------------------------------------------------------------------------------
def test_a_step_that_takes_its_batches_by_next(tmp_path):
    line = "assert next(batches, None) is None"  # a list has no next
    assert run_dry(tmp_path, line=line).returncode == 0


def test_a_step_that_halves_its_rows(tmp_path):
    done = run_dry(tmp_path, line="a, b = x.chunk(2); model(a)")
    assert done.returncode == 0, done.stderr


def test_a_value_that_is_read_before_the_warm_up_is_left_to_the_real_run(tmp_path):
    """Rates of stochastic depth are often made so."""
    done = run_dry(tmp_path, total="int(torch.linspace(0, 2**17, 2)[-1].item())")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("full rules: not checked, shapes alone do not tell")


@pytest.mark.parametrize(
    "line, tried",
    [
        ('print(f"loss {loss:.3f}")', True),
        ("loss.detach().cpu().numpy()", False),
        ("__import__('numpy').asarray(loss.detach())", False),
    ],
)
def test_a_number_that_is_printed_or_read_by_numpy_refuses_nothing(tmp_path, line, tried):
    done = run_dry(tmp_path, line=line)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("also checked") and ("was not tried" not in last) == tried


def test_a_dry_run_that_a_signal_ends_refuses_nothing():
    """Such as compiled code, which looks for memory that a shape does not have."""
    code = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    assert finish(code) == "full rules: not checked, signal 11 ended the dry run"


def test_the_last_line_says_that_the_step_was_not_tried(tmp_path):
    """For it is the only one that the smoke run prints."""
    done = run_dry(tmp_path, line="x[x.bool()]")
    assert done.returncode == 0, done.stderr
    assert "step was not tried: aten.nonzero" in done.stdout.splitlines()[-1]


# ---- Layers whose weight a fused operation reads -------------------------------------------------
class Fused(Model):
    """Its middle is not called: its weight is read, as fused operations do."""

    def __init__(self, middle: nn.Module):
        super().__init__(middle)

    def forward(self, idx):
        x = self.wte(idx)
        return self.lm_head(x + x @ self.middle.weight.T)


class Normed(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight / self.weight.norm())


def hooked(layer: nn.Linear) -> nn.Linear:
    layer.register_forward_hook(lambda module, args, y: 2 * y)
    return layer


@pytest.mark.parametrize(
    "middle, named",
    [
        (lambda: Normed(8, 8, bias=False), True),
        (lambda: hooked(nn.Linear(8, 8, bias=False)), True),
        (lambda: nn.Linear(8, 8, bias=False), False),
    ],
)
def test_what_a_bypassed_layer_does_beside_its_product_is_a_warning(
    middle, named, capsys
):
    warm(Fused(middle()))
    said = capsys.readouterr().out
    assert (
        "warning: edit: middle: training reads the weight and does not" in said
    ) == named
    warm(Model(middle()))  # which calls it
    assert "training reads the weight" not in capsys.readouterr().out
    assert not torch.nn.modules.module._global_forward_pre_hooks


# ---- Schedules ----------------------------------------------------------------------------------
def test_a_groups_rate_and_decay_that_main_changes_are_what_the_schedules_scale():
    """Before the first step, as for rates that fall from layer to layer."""

    def settings(factor: float) -> list[tuple]:
        optimizers = train.build_optimizers(fresh())
        groups = [group for o in optimizers for group in o.param_groups]
        for group in groups:
            group["lr"] *= factor
            group["weight_decay"] *= 3 * factor
        seen = []
        for progress in (0.3, 0.6):
            train.set_schedules(optimizers, progress)
            seen += [(group["lr"], group["weight_decay"]) for group in groups]
        return seen

    once, fourfold = np.array(settings(1)), np.array(settings(4))
    assert once[:, 0].all() and fourfold == pytest.approx(4 * once)
