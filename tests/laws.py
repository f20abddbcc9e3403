"""train.py as it is now, for tests that any honest edit of it passes."""

import pytest
import torch

import constants as C
import train
from harness.attention import masked_attention

CPU, V, T = torch.device("cpu"), C.VOCAB_SIZE, C.MAX_SEQ_LEN
SHORT = 64  # of the T tokens of a row: enough to tell, and quick


def part(name: str):
    """Return what train.py calls so; skip the test if it was edited away."""
    if not hasattr(train, name):
        pytest.skip(f"train.py has no {name}, which it need not have")
    return getattr(train, name)


def fresh(attend=masked_attention) -> torch.nn.Module:
    """Return the model of the smoke rules as training begins it."""
    torch.manual_seed(0)
    return train.build_model(train.build_config(), attend, CPU)


def lively(**others) -> torch.nn.Module:
    """Return a model in which every weight matters, as if it had been trained."""
    model = fresh(**others)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def some_ids(rows: int = 2, length: int = SHORT, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(V, (rows, length), generator=generator)


def some_batch(rows: int = 2, length: int = SHORT, seed: int = 1):
    ids = some_ids(rows, length + 1, seed)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


class Recorder(torch.optim.Optimizer):
    """An optimizer that moves nothing and keeps the gradients of its step."""

    def __init__(self, model: torch.nn.Module):
        self.names = dict(model.named_parameters())
        super().__init__(self.names.values(), {"lr": 1.0})
        self.gradients: dict[str, torch.Tensor] = {}

    def step(self):
        self.gradients = {
            name: p.grad.detach().to_dense().double().clone()
            for name, p in self.names.items()
            if p.grad is not None
        }


def loss_and_gradients(model, batches: list) -> tuple[float, dict[str, torch.Tensor]]:
    """Return what train_step makes of the batches, in evaluation mode: nothing is random."""
    recorder = Recorder(model.eval())
    loss = train.train_step(model, [recorder], iter(batches), len(batches))
    return float(loss), recorder.gradients


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Return the largest relative difference of two dicts of gradients, parameter by parameter."""
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).norm() / b[k].norm().clamp_min(1e-9)) for k in b)
