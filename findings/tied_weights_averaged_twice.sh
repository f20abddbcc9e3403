#!/usr/bin/env bash
# timm 1.0.31 (and 1.0.9): its averages of a model, ModelEma, ModelEmaV2 and ModelEmaV3, move a tied
# weight twice per update: its decay is the square of the one asked for. A language model whose head
# is its token embedding has that one table under two names, and the averages go by the state_dict,
# which lists both. So the table is averaged over half as many steps as all other weights, with
# foreach and without. Nothing is raised or said. One would expect one decay for all weights, as
# from torch's AveragedModel, which goes by parameters(), where a tied weight stands once.
#
# Output seen (2026-12-01, Python 3.12, Linux x86-64): weights that were 0 and are 1, after 700 updates
# of an average with decay 0.999
#   by hand: once per update 0.5036, twice per update 0.7536
#   ModelEma       apart: table 0.5036, head 0.5036, between 0.5036  tied: table 0.7536, between 0.5036
#   ModelEmaV2     apart: table 0.5036, head 0.5036, between 0.5036  tied: table 0.7536, between 0.5036
#   ModelEmaV3     apart: table 0.5036, head 0.5036, between 0.5036  tied: table 0.7536, between 0.5036
#   V3, no foreach apart: table 0.5036, head 0.5036, between 0.5036  tied: table 0.7536, between 0.5036
#   AveragedModel  apart: table 0.5036, head 0.5036, between 0.5036  tied: table 0.5036, between 0.5036
#   one name alone: ModelEmaV3 table 0.5036, between 0.5036
# Fails if that changes. Way out: torch.optim.swa_utils.AveragedModel with get_ema_multi_avg_fn, or a
# model that has the table under one name and calls F.linear(x, table.weight), as the last line.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 numpy==2.3.5 \
    timm==1.0.31 2>"$folder/pip.log" || {
    cat "$folder/pip.log"
    exit 1
}
"$folder/venv/bin/python" - <<'PYTHON'
import timm
import torch
import torch.nn.functional as F
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

DECAY, UPDATES = 0.999, 700


class Model(nn.Module):
    def __init__(self, tied=False, head=True):
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.between = nn.Linear(3, 3, bias=False)
        if head:
            self.head = nn.Linear(3, 5, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids):
        x = self.between(self.table(ids))
        return self.head(x) if hasattr(self, "head") else F.linear(x, self.table.weight)


def fill(model, value):
    for p in model.parameters():
        nn.init.constant_(p, value)


def averaged(make, model):
    """Return the average after the weights went from 0 to 1, as {name of a layer: number}."""
    fill(model, 0.0)
    average = make(model)
    update = getattr(average, "update_parameters", None) or average.update
    if isinstance(average, AveragedModel):
        update(model)  # the first one copies
    fill(model, 1.0)
    for _ in range(UPDATES):
        update(model)
    layers = average.ema if isinstance(average, ModelEma) else average.module
    ids = torch.arange(5)
    assert layers(ids).shape == (5, 5)  # it is a whole model
    return {name: layer.weight.mean().item() for name, layer in layers.named_children()}


def tell(numbers, names):
    return ", ".join(f"{name} {numbers[name]:.4f}" for name in names)


WAYS = {
    "ModelEma": lambda model: ModelEma(model, decay=DECAY),
    "ModelEmaV2": lambda model: ModelEmaV2(model, decay=DECAY),
    "ModelEmaV3": lambda model: ModelEmaV3(model, decay=DECAY, foreach=True),
    "V3, no foreach": lambda model: ModelEmaV3(model, decay=DECAY, foreach=False),
    "AveragedModel": lambda model: AveragedModel(
        model, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True
    ),
}
once = twice = 0.0  # the oracle: one number
for _ in range(UPDATES):
    once += (1 - DECAY) * (1 - once)
    for _ in range(2):
        twice += (1 - DECAY) * (1 - twice)
print(f"timm {timm.__version__}, torch {torch.__version__}")
print(f"by hand: once per update {once:.4f}, twice per update {twice:.4f}")


def near(x, y):
    return abs(x - y) < 1e-3


for name, make in WAYS.items():
    apart, tied = averaged(make, Model()), averaged(make, Model(tied=True))
    three, two = ("table", "head", "between"), ("table", "between")
    print(f"{name:14} apart: {tell(apart, three)}  tied: {tell(tied, two)}")
    assert all(near(x, once) for x in apart.values()), "it has changed"
    assert tied["head"] == tied["table"] and near(tied["between"], once), "it has changed"
    assert near(tied["table"], once if name == "AveragedModel" else twice), "it has changed"
alone = averaged(WAYS["ModelEmaV3"], Model(head=False))
print(f"one name alone: ModelEmaV3 {tell(alone, ('table', 'between'))}")
assert all(near(x, once) for x in alone.values()), "it has changed"
PYTHON
