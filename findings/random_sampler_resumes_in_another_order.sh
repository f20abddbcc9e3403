#!/usr/bin/env bash
# torchdata 0.11.0 (and 0.10.1, 0.8.0) with torch 2.14.1: StatefulDataLoader takes torch's own
# RandomSampler, and a state that it saves after the first epoch resumes in another order: it keeps
# how many rows were read, not which shuffle they came from. The new run, built and seeded as the old
# one was, shuffles as in the first epoch and skips that many rows of it. So a part of the rows comes
# twice in the epoch and as many do not come at all. Nothing is raised or said. In the first epoch it
# is right, so that a short test passes. One would expect the rest of the epoch, as with shuffle=True;
# the tutorial and the README of 0.11.0 say that torch's RandomSampler is patched when torchdata is
# imported, so that one needs no sampler of one's own. It is not.
#
# Output seen (2026-12-01, Python 3.12, Linux x86-64): 1000 rows, stopped in the middle of an epoch;
# rows of that epoch that came twice, or never
#   sampler                  epoch 1   epoch 2   epoch 3
#   torch's RandomSampler       0, 0  248, 248  249, 249
#   the same, a generator       0, 0  251, 251  271, 271
#   torchdata's                 0, 0      0, 0      0, 0
#   shuffle=True                0, 0      0, 0      0, 0
# Fails if that changes. Way out: shuffle=True, or RandomSampler of
# torchdata.stateful_dataloader.sampler.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.14.1 torchdata==0.11.0 2>"$folder/pip.log" || {
    cat "$folder/pip.log"
    exit 1
}
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import itertools
from collections import Counter
from importlib.metadata import version

import torch
from torch.utils.data import RandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import RandomSampler as StatefulSampler

ROWS, BATCH = 1000, 10
rows = range(ROWS)


def seeded():
    return torch.Generator().manual_seed(7)


def build(kind):
    torch.manual_seed(0)
    if kind == "shuffle=True":
        return StatefulDataLoader(rows, BATCH, shuffle=True)
    if kind == "torch's RandomSampler":
        return StatefulDataLoader(rows, BATCH, sampler=RandomSampler(rows))
    if kind == "the same, a generator":
        return StatefulDataLoader(rows, BATCH, sampler=RandomSampler(rows, generator=seeded()))
    return StatefulDataLoader(rows, BATCH, sampler=StatefulSampler(rows, generator=seeded()))


def read(loader, batches=None):
    return torch.cat([*itertools.islice(loader, batches)]).tolist()


def twice_and_never(kind, epoch):
    """Stop in the middle of an epoch, go on in a new run: rows of it read twice, and never."""
    loader = build(kind)
    for _ in range(epoch - 1):
        assert sorted(read(loader)) == [*rows]
    before, state = [], None
    for batch in itertools.islice(loader, ROWS // BATCH // 2):
        before += batch.tolist()
        state = loader.state_dict()
    loader = build(kind)
    loader.load_state_dict(state)
    times = Counter(before + read(loader))
    assert times.total() == ROWS and max(times.values()) <= 2
    return sum(n == 2 for n in times.values()), ROWS - len(times)


print("torchdata", version("torchdata"), "torch", torch.__version__)
print("sampler                  epoch 1   epoch 2   epoch 3")
KINDS = ("torch's RandomSampler", "the same, a generator", "torchdata's", "shuffle=True")
for kind in KINDS:
    found = [twice_and_never(kind, epoch) for epoch in (1, 2, 3)]
    print(f"{kind:22}", *(f"{f'{twice}, {never}':>9}" for twice, never in found))
    assert found[0] == (0, 0)
    for twice, never in found[1:]:
        if kind in KINDS[:2]:
            assert twice == never > ROWS // 10, "it has changed"
        else:
            assert twice == never == 0
PYTHON
