"""The least that harness/ asks of a train.py: a model, its optimizer, a step, a loop.

The tests run it, in a copy of the repository, in the place of train.py.
"""

from constants import MAX_SEQ_LEN, VOCAB_SIZE  # first: it starts a clock

# isort: split
import torch
import torch.nn as nn
import torch.nn.functional as F

from harness.run import open_run

N_EMBD = 32  # width
LR = 0.01
TOTAL_BATCH_SIZE = 2**19  # tokens per step
DEVICE_BATCH_SIZE = 128  # rows per micro-step; halved until they fit the memory


class Model(nn.Module):
    """Embeddings of ids and places, one head of causal attention, logits."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(VOCAB_SIZE, N_EMBD)
        self.wpe = nn.Embedding(MAX_SEQ_LEN, N_EMBD)
        self.query = nn.Linear(N_EMBD, N_EMBD, bias=False)
        self.key = nn.Linear(N_EMBD, N_EMBD, bias=False)
        self.value = nn.Linear(N_EMBD, N_EMBD, bias=False)
        self.lm_head = nn.Linear(N_EMBD, VOCAB_SIZE, bias=False)
        self.causal = True

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        """Return logits (B, T, V) for ids idx (B, T); none may depend on later ids."""
        x = self.wte(idx) + self.wpe.weight[: idx.size(1)]  # (B, T, C)
        q, k, v = self.query(x), self.key(x), self.value(x)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.lm_head(F.rms_norm(x + y, (N_EMBD,)))


def train_step(model, optimizers, batches, micro_steps) -> torch.Tensor:
    """Do one optimizer step; return the mean loss, in nats per token, of its micro-steps.

    batches: `micro_steps` pairs of ids x and targets y, both (B, T).
    """
    total = 0.0
    for x, y in batches:
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten()) / micro_steps
        loss.backward()
        total += loss.detach()
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad()
    return total


def main() -> None:
    run = open_run()
    with run.device:
        model = Model()
    optimizers = [torch.optim.AdamW(model.parameters(), LR)]  # all parameters, once each
    run.warm_up(
        model,
        optimizers,
        train_step,
        total_batch_size=TOTAL_BATCH_SIZE,
        device_batch_size=DEVICE_BATCH_SIZE,
    )
    for step in run.steps():
        step.loss = train_step(model, optimizers, step.batches, step.micro_steps)
    run.evaluate(model)
    run.print_summary(depth=1, flops_per_token=6.0 * run.num_params, attention="sdpa")


if __name__ == "__main__":
    main()
