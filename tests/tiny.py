"""Small models and batches, for tests of what trains, saves or uses one."""

import dataclasses

import torch

import constants as C
import train
from train import GPT, GPTConfig

V, T = 50, 16  # ids, tokens of a row
# Of a model for the ids and rows of the smoke rules.
CONFIG = GPTConfig(
    C.MAX_SEQ_LEN, C.VOCAB_SIZE, 2, 32, 16, "SL", 32, 10_000.0, 15.0, 1.3, 64
)


def tiny_model() -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(T, V, 2, 32, 16, "SL", 4, 10_000, 15.0, 1.3, 64)
    model = GPT(config, train.masked_attention, torch.float32)
    model.init_weights(0.7, train.LAMBDA_INIT)
    return model


def tiny_batch(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(V, (rows, T + 1), generator=torch.Generator().manual_seed(3))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def drawn_model() -> GPT:
    """Return a model of CONFIG whose every weight was drawn, so that none is 0 or 1 by chance."""
    model = train.build_saved(dataclasses.asdict(CONFIG), torch.device("cpu"))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model
