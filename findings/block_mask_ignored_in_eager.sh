#!/usr/bin/env bash
# torch 2.14.1 (and 2.11.0), on a CPU: flex_attention ignores the blocks of a BlockMask unless it is
# compiled. Eager, it reads the mask's function alone. So a mask that is made of blocks, by
# BlockMask.from_kv_blocks, which is how sparse attention chooses them, masks nothing: each query
# attends to all keys. Compiled, it is what the blocks say. The one warning is about speed and
# memory. One would expect eager and compiled to agree, as eager is what one compares with.
# (The cause: _math_attention_inner in torch/_higher_order_ops/flex_attention.py takes block_mask[-1].)
#
# Output seen (2026-12-01, Python 3.12, Linux x86-64), largest difference:
#   blocks on the diagonal: sparsity() 50.0 %, to_dense() 2 of 4 blocks
#     eager      from these blocks 0.5, from no mask 0.0
#     compiled   from these blocks 0.0, from no mask 0.5
#   blocks on the diagonal, and a function that reads them
#     eager      from these blocks 0.0, from no mask 0.5
#     compiled   from these blocks 0.0, from no mask 0.5
# Fails if that changes. Way out: give from_kv_blocks a mask_mod that reads the table of blocks, as the
# last lines do.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.3.5 2>"$folder/pip.log" || {
    cat "$folder/pip.log"
    exit 1
}
TORCHINDUCTOR_CACHE_DIR=$folder/cache "$folder/venv/bin/python" - 2>"$folder/log" <<'PYTHON' || {
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK, LENGTH = 128, 256
torch.manual_seed(0)
q, k, v = (torch.randn(1, 1, LENGTH, 16) for _ in range(3))
diagonal = torch.block_diag(*[torch.ones(BLOCK, BLOCK)] * 2).bool()
of_blocks = F.scaled_dot_product_attention(q, k, v, attn_mask=diagonal)
of_all = F.scaled_dot_product_attention(q, k, v)


def compare(mask, eager_is_right):
    for name, attend in (("eager", flex_attention), ("compiled", torch.compile(flex_attention))):
        y = attend(q, k, v, block_mask=mask)
        off = [(y - other).abs().max().item() for other in (of_blocks, of_all)]
        print(f"  {name:10} from these blocks {off[0]:.1f}, from no mask {off[1]:.1f}")
        right = name == "compiled" or eager_is_right
        assert (off[0] < 1e-5) == right and (off[1] < 1e-5) == (not right), "it has changed"


print("torch", torch.__version__)
number = torch.ones(1, 1, 2, dtype=torch.int32)  # one block of keys for each block of queries
which = torch.tensor([[[[0, 1], [1, 0]]]], dtype=torch.int32)  # its own
mask = BlockMask.from_kv_blocks(number, which, BLOCK_SIZE=BLOCK)
print(f"blocks on the diagonal: sparsity() {mask.sparsity()} %, to_dense() "
      f"{mask.to_dense().sum()} of 4 blocks")
compare(mask, eager_is_right=False)

print("blocks on the diagonal, and a function that reads them")
table = torch.eye(2, dtype=torch.bool)
mask = BlockMask.from_kv_blocks(
    number, which, BLOCK_SIZE=BLOCK, mask_mod=lambda b, h, i, j: table[i // BLOCK, j // BLOCK]
)
compare(mask, eager_is_right=True)
PYTHON
    cat "$folder/log"
    exit 1
}
