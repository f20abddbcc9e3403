#!/usr/bin/env bash
# torch 2.14.1 (and 2.11.0): where a module keeps a compiled method of its own, as
# self.body = torch.compile(self.run_body) in __init__, a deep copy of it still computes with the
# weights of the original. deepcopy binds a plain method anew, to the copy, but torch.compile gives
# a function with the original inside, and functions are not copied. So AveragedModel, which makes
# a deep copy, gives the loss of the weights that are trained, not of their average; its parameters
# are right, and so is a check of them. A copy that is trained gets no gradient: the original gets
# it. Nothing is raised or said. One would expect compiling to change nothing. Where the method is
# compiled in the class, or the model by torch.compile(model) or model.compile(), a copy is right.
#
# Output seen (2026-12-01, Python 3.12, Linux x86-64), where two weights went from 0 to 1 and their
# average to 0.5; the output is their sum
#   plain method             model 2.0, average 1.0 (its weights 0.5); gradient of a copy: its own
#   torch.compile(method)    model 2.0, average 2.0 (its weights 0.5); gradient of a copy: the original's
#   the same, inductor       model 2.0, average 2.0 (its weights 0.5); gradient of a copy: the original's
#   compiled in the class    model 2.0, average 1.0 (its weights 0.5); gradient of a copy: its own
#   torch.compile(model)     model 2.0, average 1.0 (its weights 0.5); gradient of a copy: its own
#   model.compile()          model 2.0, average 1.0 (its weights 0.5); gradient of a copy: its own
# Fails if that changes. Way out: @torch.compile on the method in the class, or model.compile().
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.3.5 2>"$folder/pip.log" || {
    cat "$folder/pip.log"
    exit 1
}
TORCHINDUCTOR_CACHE_DIR=$folder/cache "$folder/venv/bin/python" - 2>"$folder/log" <<'PYTHON' || {
import copy

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

INPUT = torch.ones(1, 2)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1, bias=False)
        self.body = self.run_body

    def run_body(self, x):
        return self.layer(x)

    def forward(self, x):
        return self.body(x)


class OwnCompiled(Model):
    def __init__(self, backend="eager"):
        super().__init__()
        self.body = torch.compile(self.run_body, backend=backend)


class ClassCompiled(Model):
    @torch.compile(backend="eager")
    def run_body(self, x):
        return self.layer(x)


def compiled_in_place():
    model = Model()
    model.compile(backend="eager")
    return model


def fill(model, value):
    for p in model.parameters():
        nn.init.constant_(p, value)


def attempt(name, make):
    model = make()
    fill(model, 0.0)
    assert model(INPUT).item() == 0.0
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)  # the first one copies
    fill(model, 1.0)
    average.update_parameters(model)
    (weight,) = average.module.parameters()
    by_hand = (INPUT @ weight.detach().T).item()
    output = average(INPUT).item()
    twin = copy.deepcopy(model)
    twin(INPUT).sum().backward()
    has = [any(p.grad is not None for p in m.parameters()) for m in (twin, model)]
    whose = {(True, False): "its own", (False, True): "the original's"}[tuple(has)]
    print(
        f"{name:24} model {model(INPUT).item()}, average {output} (its weights {weight.mean().item()}); "
        f"gradient of a copy: {whose}",
        flush=True,
    )
    assert weight.mean().item() == 0.5 and by_hand == 1.0 and model(INPUT).item() == 2.0
    return output == by_hand and has == [True, False], output == 2.0 and has == [False, True]


RIGHT, WRONG = (True, False), (False, True)
print("torch", torch.__version__)
assert attempt("plain method", Model) == RIGHT, "it has changed"
assert attempt("torch.compile(method)", OwnCompiled) == WRONG, "it has changed"
assert attempt("the same, inductor", lambda: OwnCompiled("inductor")) == WRONG, "it has changed"
assert attempt("compiled in the class", ClassCompiled) == RIGHT, "it has changed"
whole = attempt("torch.compile(model)", lambda: torch.compile(Model(), backend="eager"))
assert whole == RIGHT, "it has changed"
assert attempt("model.compile()", compiled_in_place) == RIGHT, "it has changed"
PYTHON
    cat "$folder/log"
    exit 1
}
