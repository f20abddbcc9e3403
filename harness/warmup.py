"""Warm-up: compile everything, find the batch that fits, and name an edit that does nothing.

A few steps on random ids before the clock starts; weights, buffers, optimizer state and the random
generators are put back after it, bit for bit.
"""

import copy
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from numbers import Integral

import numpy as np
import torch
import torch.nn as nn
from torch.nn.modules.module import register_module_forward_pre_hook

import constants as C
from harness.evaluation import call_model, check_model, nats_of
from harness.gpu import find_batch_size, free_memory, has_room
from harness.guard import no_passes
from harness.loader import Once
from harness.output import plural, warning

# (model, optimizers, batches, micro_steps) -> mean loss in nats per token, as train.py has it
TrainStep = Callable[..., torch.Tensor]
Optimizers = Sequence[torch.optim.Optimizer]

# Steps of a warm-up. What begins as zero has its gradient in the second step, and what is behind
# that in the third.
STEPS = 3
MICRO_STEPS = 2  # of a step, at least, so that gradients are both made and added to
# The weights are copied on the device if they take less than this part of what is free.
COPY_SHARE = 12
# Fractions of ln V, the loss of a guess, between which the first loss is expected.
LOW_LOSS, HIGH_LOSS = 0.95, 1.05
# Nats between the losses of training and evaluation after a step on random ids: dropout and label
# smoothing of 0.1 make 0.0004, logits times 1.2 make 0.01.
SAME_LOSS = 0.005


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# ---- Parameters and optimizers ------------------------------------------------------------------
def check_groups(model: nn.Module, optimizers: Optimizers) -> None:
    """Raise ValueError unless each trainable parameter is in exactly one group, none empty."""
    params, counts = trainable(model), {}
    if hidden := find_hidden(model):
        raise ValueError(
            f"{join(hidden)}: learns, but is no parameter of the model, so no optimizer has it; "
            "make it an nn.Parameter, a list of modules an nn.ModuleList (requires_grad_(False) "
            "if it is not to learn)"
        )
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Optimizer):  # its state must be put back
            raise ValueError(
                f"{type(optimizer).__name__} is no torch.optim.Optimizer; derive it from that, and "
                "keep in self.state what it remembers"
            )
        for number, group in enumerate(optimizer.param_groups):
            where = f"group {number} of {type(optimizer).__name__}"
            where += f" ({group['names']})" if "names" in group else ""
            if not group["params"]:
                raise ValueError(f"{where} is empty; correct its pattern or take it out")
            for p in group["params"]:
                counts[id(p)] = counts.get(id(p), 0) + 1
    problems = {
        "in no optimizer": [name for name, p in params.items() if id(p) not in counts],
        "in two groups": [name for name, p in params.items() if counts.get(id(p), 0) > 1],
    }
    for problem, names in problems.items():
        if names:
            raise ValueError(
                f"{join(names)}: {problem}; each parameter belongs to one group of the table in "
                "build_optimizers (requires_grad_(False) if it is not to learn)"
            )
    strangers = counts.keys() - {id(p) for p in params.values()}
    if frozen := [name for name, p in model.named_parameters() if id(p) in strangers]:
        raise ValueError(
            f"{join(frozen)}: does not learn (requires_grad is False), and stands in a group of "
            "the table in build_optimizers; take it out there"
        )
    if strangers:
        are, them = ("is", "it") if len(strangers) == 1 else ("are", "them")
        raise ValueError(
            f"{plural(len(strangers), 'parameter')} of the optimizers {are} not of the model; "
            f"take {them} out of the table in build_optimizers"
        )


def warn_of_untrained(model: nn.Module, optimizers: Optimizers) -> None:
    """Print a warning after training if the model has become another than was trained."""
    groups = [group for o in with_inner(optimizers) for group in o.param_groups]
    known = {id(p) for group in groups for p in group["params"]}
    if new := [name for name, p in trainable(model).items() if id(p) not in known]:
        text = (
            f"{join(new)}: made after run.warm_up and in none of its optimizers, so not trained "
            "unless another has it: p.copy_(new) in torch.no_grad() keeps a parameter, "
            "optimizer.add_param_group takes one in"
        )
        print(warning("edit", text), flush=True)
    if not model.training:
        text = "the model is in evaluation mode at the end of training; model.train() is missing"
        print(warning("edit", text), flush=True)


def find_hidden(model: nn.Module) -> list[str]:
    """Return names of leaves with a gradient that modules hold where torch does not look.

    In plain attributes and buffers, also within lists, tuples, dictionaries, and in modules there.
    """
    seen, found = {id(p) for p in model.parameters()}, []

    def look(value: object, name: str) -> None:
        if id(value) in seen:
            return
        if isinstance(value, torch.Tensor | list | tuple | dict):
            seen.add(id(value))  # a list may hold itself
        if isinstance(value, torch.Tensor):
            if value.requires_grad and value.is_leaf:
                found.append(name)
        elif isinstance(value, nn.Module):
            if value not in modules:
                for inner, p in value.named_parameters():
                    look(p, f"{name}.{inner}")
        elif isinstance(value, list | tuple):
            for i, part in enumerate(value):
                look(part, f"{name}[{i}]")
        elif isinstance(value, dict):
            for key, part in value.items():
                look(part, f"{name}[{key!r}]")

    modules = set(model.modules())
    for prefix, module in model.named_modules():
        own = vars(module) | module._buffers
        for name, value in own.items():
            if name not in ("_parameters", "_buffers", "_modules"):
                look(value, f"{prefix}.{name}".lstrip("."))
    return found


def join(names: Iterable[str], most: int = 4) -> str:
    """Return names with commas between them, no more than `most` and how many there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


ADVICE = (
    "the model does not use it (at random? multiply by a mask instead), or it stands behind two "
    "layers that begin at zero or one that stays there; if that is meant, name it in "
    "may_stand_still= of run.warm_up"
)


class Gradients:
    """Watches which parameters get a gradient that is not zero, before every optimizer step."""

    def __init__(
        self, model: nn.Module, optimizers: Optimizers, may_stand_still: Iterable[str]
    ):
        params, allowed = trainable(model), set(may_stand_still)
        if unknown := sorted(allowed - params.keys()):
            raise ValueError(f"may_stand_still names no parameter: {join(unknown)}")
        self.watched = {name: p for name, p in params.items() if name not in allowed}
        self.alive: dict[str, torch.Tensor] = {}
        self.steps = dict.fromkeys(optimizers, 0)
        self.hooks = [o.register_step_pre_hook(self.look) for o in optimizers]

    def look(self, optimizer, args, kwargs) -> None:
        self.steps[optimizer] += 1
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        watched = {name: p for name, p in self.watched.items() if id(p) in mine}
        if any(p.grad is None for p in watched.values()):
            missing = [name for name, p in self.watched.items() if p.grad is None]
            raise RuntimeError(f"{join(missing)}: no gradient; {ADVICE}")
        for name, p in watched.items():
            grad = p.grad._values() if p.grad.is_sparse else p.grad
            self.alive[name] = self.alive.get(name, False) | (grad != 0).any()

    def dead(self) -> list[str]:
        """Return the watched parameters whose gradient was zero in every step."""
        return [name for name in self.watched if not self.alive.get(name, False)]

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


@contextmanager
def collect_calls(model: nn.Module, device: torch.device) -> Iterator[set[nn.Module]]:
    """Collect the modules that are called; all, unseen, on a GPU: it would compile the hook in."""
    if device.type != "cpu":
        yield set(model.modules())
        return
    called: set[nn.Module] = set()
    hook = register_module_forward_pre_hook(lambda module, args: called.add(module))
    try:
        yield called
    finally:
        hook.remove()


@torch.no_grad()
def find_bypassed(model: nn.Module, called: set[nn.Module]) -> list[str]:
    """Return the linear layers that training did not call and that do more than multiply.

    A fused operation reads the weight alone.
    """

    def multiplies(layer: nn.Linear) -> bool:
        if layer._forward_hooks or layer._forward_pre_hooks:
            return False
        x = torch.linspace(-1, 1, layer.in_features).to(layer.weight)[None]
        with suppress(Exception):  # of one that takes more than x
            product = x @ layer.weight.T
            error = (layer.forward(x) - product).abs().max()
            return bool(error <= 0.01 * product.abs().max())
        return True

    passed = [(name, m) for name, m in model.named_modules() if m not in called]
    return [n for n, m in passed if isinstance(m, nn.Linear) and not multiplies(m)]


def checksum(p: torch.Tensor) -> torch.Tensor:
    """Return a sum of the bits of `p`, 0-dim on its device: equal for equal values."""
    whole = p.detach().contiguous()
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(
        p.element_size(), torch.uint8
    )
    return whole.view(kind).sum(dtype=torch.int64)


# ---- The first loss -----------------------------------------------------------------------------
def check_loss(loss: object) -> None:
    """Refuse, by ValueError, what is not one number."""
    if isinstance(loss, int | float) or getattr(loss, "numel", lambda: 0)() == 1:
        return
    what = type(loss).__name__
    what += f" {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else ""
    raise ValueError(
        f"train_step gave {what}, not the mean loss; if it finds more, give run.warm_up a function "
        "that returns the loss alone"
    )


def check_first_loss(loss: float, where: str) -> None:
    """Refuse, by RuntimeError, a loss that an untrained model cannot have; warn of a high one."""
    guess = math.log(C.VOCAB_SIZE)
    text = (
        f"the loss {where} is {loss:.4f}, and a guess has ln {C.VOCAB_SIZE} = {guess:.4f}"
    )
    if not loss >= LOW_LOSS * guess:  # also nan
        raise RuntimeError(
            f"{text}: train_step does not return nats per token, or the model knows what it is to "
            "predict; the run is void"
        )
    if loss > HIGH_LOSS * guess:
        print(warning("edit", f"{text}: is the initialisation meant?"), flush=True)


@torch.no_grad()
def evaluated_loss(model: nn.Module, batches: Sequence) -> torch.Tensor:
    """Return the mean cross-entropy of the model's logits on `batches`, as an evaluation has it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    nats = []
    for x, y in batches:
        y = torch.cat([x, y[:, -1:]], 1)[:, 1:]  # with the strides that an evaluation has
        nats.append(nats_of(call_model(model, x), y, y >= 0)[0] / y.numel())
    for module, training in modes.items():
        module.training = training
    return torch.stack(nats).mean()


def check_same_loss(trained: float, evaluated: float) -> None:
    """Warn if training has another loss than the evaluation will have."""
    if not abs(trained - evaluated) <= SAME_LOSS:
        text = (
            f"the loss of a step is {trained:.4f}, and the model's logits have {evaluated:.4f} on "
            "the same ids: does train_step add something, or has logits an edit that cross_entropy "
            "lacks?"
        )
        print(warning("edit", text), flush=True)


# ---- The batch ----------------------------------------------------------------------------------
def plan_batch(total_batch_size: int, device_batch_size: int) -> tuple[int, int]:
    """Return rows per micro-step, at most, and the micro-steps of so many rows that a step has.

    For the full rules' rows, so that a smoke run refuses what a full one would; the smoke rules
    then take a smaller row and as much fewer of them. ValueError for what cannot be had exactly.
    """
    T = C.FULL_SEQ_LEN
    sizes = total_batch_size, device_batch_size
    if not all(isinstance(size, Integral) for size in sizes):
        what = "TOTAL_BATCH_SIZE and DEVICE_BATCH_SIZE are {!r} and {!r}".format(*sizes)
        raise ValueError(f"{what}, and must be whole numbers (// for /, 2**19 for 5e5)")
    rows, rest = divmod(total_batch_size, T)
    limit = min(device_batch_size, rows)
    if limit < 1 or rest or rows % limit:
        raise ValueError(
            f"TOTAL_BATCH_SIZE ({total_batch_size} tokens) is {total_batch_size / T:g} rows of "
            f"{T} tokens, which DEVICE_BATCH_SIZE ({device_batch_size}) does not divide; "
            "change one of them"
        )
    return max(1, limit * C.MAX_SEQ_LEN // T), rows // limit


def fixed_bytes(optimizers: Optimizers) -> int:
    """Return the memory of gradients and optimizer state, about, for any number of rows.

    An optimizer's STATE_PER_PARAM says how many numbers it keeps per parameter, 2 unless said; -1
    that gradients are sparse as well.
    """
    total = 0
    for optimizer in optimizers:
        copies = 1 + getattr(optimizer, "STATE_PER_PARAM", 2)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        total += copies * sum(p.numel() * p.element_size() for p in params)
    return total


# ---- All of it ----------------------------------------------------------------------------------
def warm_up(
    random_batch: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    model: nn.Module,
    optimizers: Optimizers,
    train_step: TrainStep,
    batch: tuple[int, int],
    row_bytes: float,
    device: torch.device,
    may_stand_still: Iterable[str] = (),
) -> tuple[int, int]:
    """Warm up; return rows per micro-step and micro-steps per step. See `run.Run.warm_up`.

    random_batch(rows): ids and targets; batch: of `plan_batch`. ValueError and RuntimeError say
    what is wrong with the edit.
    """
    check_groups(model, optimizers)
    if not model.training:
        text = "the model is in evaluation mode, so it trains without dropout"
        print(warning("edit", text), flush=True)
    limit, micro_steps = batch
    result: dict[str, list] = {}

    def attempt(rows: int) -> None:
        small = size_of(model) < free_memory(device) / COPY_SHARE
        on_device = device.type == "cuda" and small
        if not (on_device and has_room(train_and_put_back, rows, device)):
            train_and_put_back(rows, torch.device("cpu"))

    def train_and_put_back(rows: int, place: torch.device) -> None:
        with kept(model, optimizers, device, place):
            result.update(train_a_little(rows))

    def train_a_little(rows: int) -> dict[str, list]:
        before = {name: checksum(p) for name, p in trainable(model).items()}
        gradients, losses = Gradients(model, optimizers, may_stand_still), []
        try:
            # The last with all micro-steps: a sparse gradient grows with each.
            whole = max(MICRO_STEPS, micro_steps * (limit // rows))
            for number, count in enumerate([MICRO_STEPS] * (STEPS - 1) + [whole]):
                batches = [random_batch(rows) for _ in range(count)]
                if number == 1:  # logits are near zero before
                    evaluated = evaluated_loss(model, batches)
                with collect_calls(model, device) as called:
                    losses.append(train_step(model, optimizers, Once(batches), count))
                check_loss(losses[-1])
        finally:
            gradients.close()
        if late := [name for name in trainable(model) if name not in before]:
            what = "made in the first steps, so no optimizer has it; make it in __init__"
            raise RuntimeError(f"{join(late)}: {what}")
        bypassed = find_bypassed(model, called)
        model.eval()
        takes = "the model takes a gradient in its forward pass"
        with no_passes(f"{takes}, which the evaluation refuses; compute it by hand"):
            check_model(model, random_batch(rows)[0], kept=8)
        moved = {
            name: checksum(p) != before[name] for name, p in trainable(model).items()
        }
        dead, steps = gradients.dead(), gradients.steps
        still = [
            name for name in gradients.watched if not moved[name] and name not in dead
        ]
        found = {"dead": dead, "still": still, "losses": losses, "steps": steps}
        return found | {"evaluated": evaluated, "bypassed": bypassed}

    rows = find_batch_size(attempt, limit, row_bytes, device, fixed_bytes(optimizers))
    check_first_loss(float(result["losses"][0]), "of the first step on random ids")
    check_same_loss(float(result["losses"][1]), float(result["evaluated"]))
    if dead := result["dead"]:
        idle = [type(o).__name__ for o, count in result["steps"].items() if not count]
        if idle:
            raise RuntimeError(
                f"{join(idle)}: no step in {STEPS} train_steps; call step() in each train_step "
                "(a larger TOTAL_BATCH_SIZE accumulates gradients)"
            )
        steps = min(result["steps"].values())
        when = plural(steps, "step") + (
            f" of {STEPS} train_steps" if steps < STEPS else ""
        )
        raise RuntimeError(f"{join(dead)}: the gradient is zero in {when}; {ADVICE}")
    if still := result["still"]:
        text = f"{join(still)}: not moved by {STEPS} steps; is its learning rate 0?"
        print(warning("edit", text), flush=True)
    if bypassed := result["bypassed"]:
        text = (
            f"{join(bypassed)}: training reads the weight and does not call the layer, so a hook, "
            "or what its forward does beside the product, is left out; where train.py calls a "
            "fused operation, a comment has the form that calls the layer"
        )
        print(warning("edit", text), flush=True)
    return rows, micro_steps * (limit // rows)


def size_of(model: nn.Module) -> int:
    """Return the bytes of parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)


def with_inner(optimizers: Optimizers) -> list[torch.optim.Optimizer]:
    """Return `optimizers` and those that one of them holds, as a wrapper does."""
    found = list(dict.fromkeys(optimizers))
    for optimizer in found:  # which grows
        for value in vars(optimizer).values():
            for part in value if isinstance(value, list | tuple) else [value]:
                if isinstance(part, torch.optim.Optimizer) and part not in found:
                    found.append(part)
    return found


# What is put back. Other objects, such as functions that were compiled meanwhile, are left alone.
HOLDS = (bool, int, float, str, type(None), torch.Tensor, list, tuple, dict)


class Before:
    """Numbers and tensors that objects hold, also in lists and dictionaries, to be put back.

    In place, so that what else refers to a tensor or a list still does. Of an optimizer's state
    and groups, all is put back, whatever it is.
    """

    def __init__(self, owners: Iterable[object], place: torch.device):
        """place: where copies of tensors wait."""
        self.place, self.seen = place, set()
        self.tensors, self.lists, self.dicts = [], [], []
        owners = [*owners]
        for owner in owners:
            if isinstance(owner, torch.optim.Optimizer):
                self.look(owner.state, whole=True)
                self.look(owner.param_groups, whole=True)
        for owner in owners:
            self.look(vars(owner))

    def look(self, value: object, whole: bool = False) -> None:
        """Take a copy of `value` and of what it holds, once; whole: of other objects too."""
        if not isinstance(value, torch.Tensor | list | tuple | dict):
            return
        if id(value) in self.seen:
            return
        self.seen.add(id(value))
        if isinstance(value, torch.Tensor):
            # What is expanded or of inference mode cannot be written to in place.
            other = value.is_nested or value.is_meta or value.is_inference()
            if value.layout == torch.strided and not other and 0 not in value.stride():
                copied = value.detach().to(self.place, copy=True)
                self.tensors.append((value, copied))
            return

        def keep(part: object) -> object:
            return copy.deepcopy(part) if whole and not isinstance(part, HOLDS) else part

        if isinstance(value, dict):
            before = {key: keep(part) for key, part in value.items()}
            self.dicts.append((value, before, object if whole else HOLDS))
        elif isinstance(value, list):
            self.lists.append((value, [keep(part) for part in value]))
        for part in value.values() if isinstance(value, dict) else value:
            self.look(part, whole)

    @torch.no_grad()
    def put_back(self) -> None:
        """Have everything as it was."""
        for now, before, kinds in self.dicts:
            for key in [*now]:
                if key not in before and isinstance(now[key], kinds):
                    del now[key]
            for key, value in before.items():
                both = isinstance(value, kinds) and isinstance(now.get(key), kinds)
                if both and now.get(key) is not value:
                    now[key] = value
        for now, before in self.lists:
            if [*map(id, now)] != [*map(id, before)]:  # one may refuse to be written to
                now[:] = before
        for t, value in self.tensors:
            if t.shape != value.shape:  # a table that grew
                t.data = value.to(t.device)
            else:
                t.copy_(value)


@contextmanager
def kept(
    model: nn.Module, optimizers: Optimizers, device: torch.device, place: torch.device
) -> Iterator[None]:
    """Leave weights, buffers, optimizer state, modes and generators as they were before.

    So too all numbers and tensors that modules and optimizers hold as plain attributes, in lists
    and in dictionaries; not those of other objects.

    place: where the copy of the weights waits. The host has more room, the device is a second
    sooner.
    """
    before = Before([*model.modules(), *with_inner(optimizers)], place)
    others = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(others[0])
            np.random.set_state(others[1])
            model.zero_grad(set_to_none=True)
            before.put_back()
