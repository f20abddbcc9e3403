#!/usr/bin/env bash
# torch 2.14.1 (and 2.11.0, 2.15.0): on a CPU two seeds that differ only above their lower 32 bits
# give the same random numbers. manual_seed takes 64 bits and initial_seed() gives all of them back,
# so the two generators look different; even their states do not compare as equal. One would expect
# another seed to mean other numbers. With `epoch << 32 | worker` every epoch is shuffled alike, and
# of 77,000 hashes of 64 bits, one per document or run, two are as likely as not the same seed.
# numpy's default_rng uses all of a seed.
#
# Output seen (2026-12-01, Python 3.12, Linux x86-64):
#   seed 0 << 32 | 7: initial_seed 7, permutation starts [9817, 1028, 8886, 3827]
#   seed 1 << 32 | 7: initial_seed 4294967303, permutation starts [9817, 1028, 8886, 3827]
#   seed 2 << 32 | 7: initial_seed 8589934599, permutation starts [9817, 1028, 8886, 3827]
#   seed 0 << 32 | 8: initial_seed 8, permutation starts [2519, 5040, 4106, 9440]
#   7 in the lower half: the same numbers, those of numpy's Mersenne twister for the seed 7
#   numpy's default_rng: 3 different permutations for the first three seeds
# Fails if that changes. Way out: mix the parts of a seed into 32 bits first, as
# numpy.random.SeedSequence([epoch, worker]).generate_state(1) does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.5.5 2>"$folder/pip.log" || {
    cat "$folder/pip.log"
    exit 1
}
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import torch


def stream(seed):
    generator = torch.Generator().manual_seed(seed)
    state = generator.get_state()
    bits = torch.randint(2**16, (1000,), generator=generator)
    shuffled = torch.randperm(10_000, generator=generator)
    uniform = torch.rand(1000, generator=generator)
    normal = torch.randn(1000, generator=generator)
    print(f"seed {seed >> 32} << 32 | {seed & 0xFFFFFFFF}: initial_seed "
          f"{generator.initial_seed()}, permutation starts {shuffled[:4].tolist()}")
    assert generator.initial_seed() == seed
    return state, (bits, shuffled, uniform, normal)


print("torch", torch.__version__)
twister = np.random.RandomState(7)  # the same algorithm; takes no seed above 32 bits
bits = twister.randint(2**32, size=1000, dtype=np.uint32) % 2**16
streams = [stream(epoch << 32 | 7) for epoch in range(3)]
for state, numbers in streams[1:]:
    assert not torch.equal(state, streams[0][0]), "it has changed"
    assert all(map(torch.equal, numbers, streams[0][1])), "it has changed"
    assert numbers[0].tolist() == bits.tolist(), "it has changed"
_, other = stream(8)
assert not any(map(torch.equal, other, streams[0][1]))
print("7 in the lower half: the same numbers, those of numpy's Mersenne twister for the seed 7")
whole = {tuple(np.random.default_rng(epoch << 32 | 7).permutation(10_000)) for epoch in range(3)}
print(f"numpy's default_rng: {len(whole)} different permutations for the first three seeds")
assert len(whole) == 3
PYTHON
