"""One experiment: train a GPT for the time budget on one GPU, print its val_bpb. Edit it.

Usage: uv run train.py  (AUTORESEARCH_SMOKE=1: a tiny model, on a CPU)

The model: rotary embeddings, QK-norm, ReLU^2 MLP, short and full causal windows, hashed
n-gram embeddings, value embeddings, gates on both and on attention, soft-capped logits,
untied head. Muon for the block matrices, RMSprop for the n-grams, AdamW for the rest.

harness/ owns data, clock, seed, warm-up, evaluation and summary.
"""

from constants import MAX_SEQ_LEN, SMOKE, VOCAB_SIZE  # first: it starts a clock

# isort: split
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
import torch.nn as nn
import torch.nn.functional as F

from harness import checkpoint
from harness.attention import Attention, choose_attention
from harness.ops import (
    any_length,
    compiled,
    embedding,
    fan_out,
    linear_cross_entropy,
    norm_qkv,
    norm_relu2_mlp,
    row_rmsprop_,
)
from harness.run import open_run

# ---- Knobs -----------------------------------
# Model
DEPTH = 10  # layers
N_EMBD = 640  # width
HEAD_DIM = 128  # there are N_EMBD / HEAD_DIM heads
WINDOW_PATTERN = "SSSSL"  # S short, L full; repeated over the layers, the last is full
SHORT_WINDOW = MAX_SEQ_LEN // 8  # tokens that a short window sees, itself included
ROPE_BASE = 200_000
SOFTCAP = 15.0  # logits are SOFTCAP * tanh(logits / SOFTCAP)
ATTENTION_GAIN = 1.3  # the softmax is over ATTENTION_GAIN / sqrt(HEAD_DIM) * q k
NGRAM_ENTRIES = 2**22  # of the hashed table, each N_EMBD / 2 wide
ATTENTION = "auto"  # auto (fa3 where it runs, else flex), fa3, flex, masked (any device)

# Initialisation. Pairs are for the first and the last layer, linear between.
INIT_SCALE = 0.68  # of the block matrices: standard deviation, times sqrt(N_EMBD)
RESID_LAMBDA_INIT = (1.15, 1.05)  # what a layer reads of the residual stream
X0_LAMBDA_INIT = (0.2, 0.05)  # of the token embeddings
NGRAM_LAMBDA_INIT = (0.1, 0.1)  # of the n-gram embeddings

# Batch
TOTAL_BATCH_SIZE = 2**17  # tokens per step
DEVICE_BATCH_SIZE = 64  # rows per micro-step; halved until they fit

# Learning rates. Those of tables and head are for width 768: times (768 / N_EMBD)^0.5.
EMBEDDING_LR = 0.9  # token and value embeddings
NGRAM_LR = 0.5
UNEMBEDDING_LR = 0.008  # lm_head
RESID_LAMBDA_LR = 0.005
X0_LAMBDA_LR = 0.02
NGRAM_LAMBDA_LR = 0.02
MATRIX_LR = 0.04  # Muon: spectral norm of the update of a square matrix
ADAM_BETAS = (0.8, 0.95)
LAMBDA_BETAS = (0.96, 0.95)
NGRAM_BETA2 = 0.95
MUON_BETA2 = 0.95  # of the second moment in the variance reduction
MUON_MOMENTUM = (0.85, 0.92)  # from, to

# Weight decay, times the learning rate
WTE_WEIGHT_DECAY = 0.001
VALUE_EMBED_WEIGHT_DECAY = 0.003
LM_HEAD_WEIGHT_DECAY = 0.01
NGRAM_WEIGHT_DECAY = 0.003
MATRIX_WEIGHT_DECAY = 0.1  # cautious; falls to 0 over the run

# Schedules, in fractions of the time budget
WARMUP_RATIO = 0.0  # learning rates rise from 0
WARMDOWN_RATIO = 0.75  # learning rates fall to FINAL_LR_FRAC
FINAL_LR_FRAC = 0.05
MOMENTUM_WARMUP_RATIO = 0.15
NGRAM_REFILL = 0.3  # epochs left, or a new one does not empty the table

# The same code, tiny, 4 x 128; a smoke run checks the knobs above.
if SMOKE:
    DEPTH -= 2 * (3 * DEPTH // 10)
    N_EMBD = 32 * min(8, max(2, round(N_EMBD / 160)))
    HEAD_DIM = N_EMBD // 4
    NGRAM_ENTRIES = -(-NGRAM_ENTRIES // 2**11)
    SHORT_WINDOW = min(SHORT_WINDOW, MAX_SEQ_LEN)


# ---- Model -----------------------------------
GATE_CHANNELS = 32  # of its input, that a gate looks at


@dataclass(frozen=True)
class GPTConfig:
    """What the model is built from. ValueError names the knob that cannot work."""

    sequence_len: int
    vocab_size: int
    n_layer: int
    n_embd: int
    head_dim: int
    window_pattern: str
    short_window: int
    rope_base: float
    softcap: float
    attention_gain: float
    ngram_entries: int
    init_scale: float
    resid_lambda_init: tuple[float, float]
    x0_lambda_init: tuple[float, float]
    ngram_lambda_init: tuple[float, float]

    def __post_init__(self):
        if self.n_layer < 1:
            raise ValueError(f"DEPTH ({self.n_layer}) must be at least 1")
        if self.ngram_entries < 1:
            raise ValueError(f"NGRAM_ENTRIES ({self.ngram_entries}) is below 1")
        if self.head_dim < 2 or self.head_dim % 2 or self.n_embd % self.head_dim:
            what = f"HEAD_DIM ({self.head_dim}) is odd or does not divide N_EMBD"
            raise ValueError(f"{what} ({self.n_embd})")
        if self.n_embd < GATE_CHANNELS:
            raise ValueError(f"N_EMBD ({self.n_embd}) is below {GATE_CHANNELS}")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            what = f"WINDOW_PATTERN ({self.window_pattern!r})"
            raise ValueError(f"{what} is not made of S and L")
        if not 1 <= self.short_window <= self.sequence_len:
            what = f"SHORT_WINDOW ({self.short_window})"
            raise ValueError(f"{what} is not 1 to {self.sequence_len}")
        if not 0 < self.softcap <= 1000:  # logits are in float32
            raise ValueError(f"SOFTCAP ({self.softcap}) is not 0 to 1000")

    @property
    def n_head(self) -> int:
        return self.n_embd // self.head_dim

    @property
    def init_std(self) -> float:
        return self.init_scale * self.n_embd**-0.5

    @property
    def windows(self) -> list[int]:
        """Tokens that each layer's attention sees; the last layer's sees all."""
        sizes = {"S": self.short_window, "L": self.sequence_len}
        pattern = self.window_pattern * self.n_layer
        short_or_full = [sizes[letter] for letter in pattern[: self.n_layer - 1]]
        return [*short_or_full, self.sequence_len]


def norm(x: torch.Tensor) -> torch.Tensor:
    """RMSNorm without weights (arXiv:1910.07467). norm_* repeat it."""
    return F.rms_norm(x, (x.size(-1),))


def init_uniform(weight: torch.Tensor, std: float) -> None:
    """Draw `weight` uniformly around 0, with this standard deviation."""
    nn.init.uniform_(weight, -(3**0.5) * std, 3**0.5 * std)


class Linear(nn.Linear):
    """A linear layer without bias whose float32 weight is used in the input's dtype.

    Fused operations read .weight, and call neither forward nor hooks.
    """

    def __init__(self, n_in: int, n_out: int, std: float):
        super().__init__(n_in, n_out, bias=False)
        init_uniform(self.weight, std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Embedding(nn.Embedding):
    """A table in float32 whose rows are used in another dtype."""

    def forward(self, idx: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return embedding(idx, self.weight, dtype)


class NgramEmbedding(nn.Embedding):
    """Embeddings of the last two and the last three ids, by a hash, in one table.

    Each n-gram has a sign of its own, so that collisions cancel on average. The table starts
    at zero. Source: modded-nanogpt records 62 and 83.
    """

    # Odd, one per place of an id in its n-gram; products stay below 2^63.
    PLACES = (36313, 27191, 19937)
    TRIGRAM_OFFSET = 11  # so that a trigram does not share its bigram's entry
    MIXER = 1640531513  # spreads codes over the high bits; about 2^32 / 2.618
    SIGN_BIT = 16
    ENTRY_BIT = 20  # the bits from here on choose the entry

    def __init__(self, config: GPTConfig):
        # RowRMSprop moves what a batch has read. Clipping, other optimizers: sparse=False.
        super().__init__(config.ngram_entries, config.n_embd // 2, sparse=True)
        nn.init.zeros_(self.weight)

    def find(self, idx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return entry and sign, (B, T, 2), of bigram and trigram that end at each idx (B, T)."""
        before = F.pad(idx[:, :-1], (1, 0))
        before_that = F.pad(before[:, :-1], (1, 0))
        bigram = idx * self.PLACES[0] + before * self.PLACES[1]
        trigram = bigram + before_that * self.PLACES[2] + self.TRIGRAM_OFFSET
        code = torch.stack([bigram, trigram], -1) * self.MIXER  # (B, T, 2)
        sign = (code >> self.SIGN_BIT & 1) * 2 - 1
        return (code >> self.ENTRY_BIT) % self.num_embeddings, sign


class CausalSelfAttention(nn.Module):
    """What stands around the attention itself, which Block calls.

    Every second layer adds embeddings to its values (arXiv:2410.17897); the output has a gate
    per head (arXiv:2505.06708). Half of each key, that of the slow rotary angles, is taken
    from the token before: one layer can then find what followed an earlier copy of a token.
    Source: modded-nanogpt record 49.
    """

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.head_dim = config.head_dim
        C, H, std = config.n_embd, config.n_head, config.init_std
        self.c_q = Linear(C, C, std)
        self.c_k = Linear(C, C, std)
        self.c_v = Linear(C, C, std)
        self.c_proj = Linear(C, C, std=0.0)  # adds nothing at first
        self.gate = Linear(GATE_CHANNELS, H, std=0.0)  # 1 at first
        self.value_embed = None
        if layer % 2 == (config.n_layer - 1) % 2:  # with the last
            self.value_embed = Embedding(config.vocab_size, C)
            init_uniform(self.value_embed.weight, std)
            self.value_gate = Linear(GATE_CHANNELS, H, std=0.0)  # 1 at first

    def project(self, x, cos, sin):
        """Return q, k, v (B, T, H, D) and what gates look at, of x (B, T, C)."""
        # Fused; in plain torch, with rotary_norm of harness.ops:
        #   q, k, v = (
        #       f(norm(x)).unflatten(-1, (-1, self.head_dim))  # (B, T, H, D)
        #       for f in (self.c_q, self.c_k, self.c_v)
        #   )
        #   slow = torch.arange(self.head_dim, device=x.device) % (self.head_dim // 2)
        #   k_before = F.pad(k[:, :-1], (0, 0, 0, 0, 1, 0))
        #   k = torch.where(slow >= self.head_dim // 4, k_before, k)
        #   q, k = rotary_norm(q, cos, sin), rotary_norm(k, cos, sin)
        weights = self.c_q.weight, self.c_k.weight, self.c_v.weight
        q, k, v = norm_qkv(x, *weights, cos, sin, offset=True)

        return q, k, v, norm(x)[..., :GATE_CHANNELS].contiguous()  # or all is kept

    @compiled
    def add_values(self, v, gate_input, idx):
        """Return v (B, T, H, D) and the gated value embeddings of idx (B, T)."""
        gate = 2 * torch.sigmoid(self.value_gate(gate_input))  # (B, T, H)
        value = self.value_embed(idx, v.dtype).view_as(v)
        return v + gate[..., None] * value


class MLP(nn.Module):
    """Norm and two matrices, four times the width between them. Linears named c_* go to Muon."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        C = config.n_embd
        self.c_fc = Linear(C, 4 * C, config.init_std)
        self.c_proj = Linear(4 * C, C, std=0.0)  # adds nothing at first

    def forward(self, x):
        # Fused; in plain torch: self.c_proj(F.relu(self.c_fc(norm(x))).square())
        return norm_relu2_mlp(x, self.c_fc.weight, self.c_proj.weight)


class Block(nn.Module):
    """Attention and MLP on the residual stream; attention stands between two graphs."""

    def __init__(self, config: GPTConfig, layer: int, attend: Attention):
        super().__init__()
        self.attend = attend
        self.window = config.windows[layer]
        self.scale = config.attention_gain * config.head_dim**-0.5
        self.attn = CausalSelfAttention(config, layer)
        self.mlp = MLP(config)

        def scalar(first: float, last: float) -> nn.Parameter:
            height = layer / max(1, config.n_layer - 1)  # 0 first layer, 1 last
            return nn.Parameter(torch.tensor(first + (last - first) * height))

        self.resid_lambda = scalar(*config.resid_lambda_init)
        self.x0_lambda = scalar(*config.x0_lambda_init)
        self.ngram_lambda = scalar(*config.ngram_lambda_init)
        # On bigrams, on trigrams; 1 at first.
        self.ngram_gate = Linear(GATE_CHANNELS, 2, std=0.0)

    @compiled
    def before(self, x, change, x0, ngram, cos, sin):
        """Mix x + change, x0 (B, T, C) and ngram (B, T, 2, C / 2); return sum and projections.

        change is the last layer's MLP, added here: the sum is read where it is made.
        """
        x = x + change
        gate = torch.sigmoid(self.ngram_gate(norm(x[..., :GATE_CHANNELS])))  # (B, T, 2)
        gate = 2 * self.ngram_lambda * gate
        ngram = (gate[..., None] * ngram).flatten(-2)  # (B, T, C)
        # Per token, so that gradients are summed by rows first.
        r, a = (s.expand(*x.shape[:2], 1) for s in (self.resid_lambda, self.x0_lambda))
        x = (r * x + a * x0 + ngram).to(x.dtype)
        return x, *self.attn.project(x, cos, sin)

    @compiled
    def after(self, x, y, gate_input):
        """Add y (B, T, H, D), gated per head; return the sum and the MLP of it."""
        gate = 2 * torch.sigmoid(self.attn.gate(gate_input))  # (B, T, H)
        y = (y * gate[..., None]).flatten(2)  # (B, T, C)
        x = x + self.attn.c_proj(y)
        return x, self.mlp(x)

    def forward(self, x, change, x0, ngram, idx, cos, sin):
        x, q, k, v, gate_input = self.before(x, change, x0, ngram, cos, sin)
        if self.attn.value_embed is not None:
            v = self.attn.add_values(v, gate_input, idx)
        y = self.attend(q, k, v, self.window, self.scale)
        return self.after(x, y, gate_input)


class GPT(nn.Module):
    """The model: idx (B, T) -> logits (B, T, V), float32. Its trunk computes in `dtype`."""

    def __init__(self, config: GPTConfig, attend: Attention, dtype: torch.dtype):
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.wte = Embedding(config.vocab_size, config.n_embd)
        nn.init.normal_(self.wte.weight, std=1.0)
        self.ngram = NgramEmbedding(config)
        self.h = nn.ModuleList(Block(config, i, attend) for i in range(config.n_layer))
        self.lm_head = Linear(config.n_embd, config.vocab_size, std=0.001)
        cos, sin = self.rotary_tables()
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def rotary_tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin (T, 1, D) of the rotation that `norm_qkv` does."""
        D, T = self.config.head_dim, self.config.sequence_len
        frequency = self.config.rope_base ** -(torch.arange(0, D, 2) / D)
        angle = torch.outer(torch.arange(T).float(), frequency)  # (T, D / 2)
        cos = torch.cat([angle, angle], 1).cos()
        sin = torch.cat([angle, -angle], 1).sin()
        return cos[:, None], sin[:, None]

    @compiled
    def embed(self, idx):
        """Return token (B, T, C) and n-gram embeddings (B, T, 2, C / 2), in `dtype`."""
        entry, sign = self.ngram.find(idx)
        ngram = self.ngram(entry) * sign[..., None]
        return norm(self.wte(idx, self.dtype)), ngram.to(self.dtype)

    def trunk(self, idx: torch.Tensor) -> torch.Tensor:
        """Return what the head reads, (B, T, C)."""
        cos, sin = self.cos[: idx.size(1)], self.sin[: idx.size(1)]
        x0, ngram = self.embed(idx)
        x, *x0s = fan_out(x0, 1 + len(self.h))
        ngrams = fan_out(ngram, len(self.h))
        # With a gradient, or the first layer is compiled apart.
        change = torch.zeros_like(x).requires_grad_()
        for block, x0, ngram in zip(self.h, x0s, ngrams, strict=True):
            x, change = block(x, change, x0, ngram, idx, cos, sin)
        return x + change

    def logits(self, x):
        """Return softcap * tanh(raw / softcap), arXiv:2408.00118. cross_entropy repeats it."""
        softcap = self.config.softcap
        raw = self.lm_head(norm(x)).float()  # (B, T, V)
        tanh = 2 * torch.sigmoid(raw * (2 / softcap)) - 1
        return softcap * tanh

    head = compiled(logits)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        training = torch.is_grad_enabled()
        with torch.enable_grad():  # also in evaluation: training's graphs serve it
            x = self.trunk(idx)
        if not training:
            x = x.detach()  # the activations go before the logits are there
        return self.head(x)

    @compiled
    def cross_entropy(self, x, y):
        # Fused. After an edit of logits: F.cross_entropy(self.logits(x).flatten(0, 1), y.flatten())
        weight, softcap = self.lm_head.weight, self.config.softcap
        return linear_cross_entropy(norm(x), weight, y, softcap)

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy, nats per token, of targets y after ids x, (B, T)."""
        return self.cross_entropy(self.trunk(x), y)

    def row_bytes(self) -> float:
        """Return roughly a row's memory; the warm-up tries no batch that cannot fit by it."""
        trunk = 28 * self.config.n_layer * self.config.n_embd
        return self.config.sequence_len * (trunk + 3 * self.config.vocab_size)

    def flops_per_token(self) -> float:
        """Return the FLOPs of forward and backward for one token, as MFU counts them.

        6 for each weight of a matmul; 12 * C for each key of a layer's window, as if all
        were seen. Source: arXiv:2204.02311, appendix B.
        """
        matrices = sum(m.weight.numel() for m in self.modules() if isinstance(m, Linear))
        return 6 * matrices + 12 * self.config.n_embd * sum(self.config.windows)


def build_config() -> GPTConfig:
    """Return the configuration of the knobs; ValueError if they do not fit together."""
    return GPTConfig(
        sequence_len=MAX_SEQ_LEN,
        vocab_size=VOCAB_SIZE,
        n_layer=DEPTH,
        n_embd=N_EMBD,
        head_dim=HEAD_DIM,
        window_pattern=WINDOW_PATTERN,
        short_window=SHORT_WINDOW,
        rope_base=ROPE_BASE,
        softcap=SOFTCAP,
        attention_gain=ATTENTION_GAIN,
        ngram_entries=NGRAM_ENTRIES,
        init_scale=INIT_SCALE,
        resid_lambda_init=RESID_LAMBDA_INIT,
        x0_lambda_init=X0_LAMBDA_INIT,
        ngram_lambda_init=NGRAM_LAMBDA_INIT,
    )


def build_model(config: GPTConfig, attend: Attention, device: torch.device) -> GPT:
    """Return a new model as a run uses it, in bf16 on a GPU. sample.py calls it too."""
    torch.set_float32_matmul_precision("high")
    with device:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return GPT(config, attend, dtype)


# ---- Optimizer -------------------------------
# Polar Express, arXiv:2505.16932: five odd quintics a x + b x^3 + c x^5 whose composition
# brings singular values from [1e-3, 1] closest to 1; algorithm 2, cushion 2e-2, safety
# factor 1.02.
POLAR_EXPRESS = (
    (8.1565545, -22.483293, 15.87877),
    (4.0429299, -2.8089175, 0.50001785),
    (3.8916678, -2.7724842, 0.50606482),
    (3.2857537, -2.3681295, 0.46449024),
    (2.3465413, -1.7097828, 0.42323551),
)


def polar_express(G: torch.Tensor) -> torch.Tensor:
    """Return about the nearest semi-orthogonal of G (N, rows, columns), rows >= columns.

    In bf16 on a GPU; a CPU without bf16 needs five times as long.
    """
    X = G.bfloat16() if G.is_cuda else G.float()
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        A = X.mT.bmm(X)  # few operations: each takes long to trace
        X = X.baddbmm(X, A.baddbmm(A, A, beta=b, alpha=c), beta=a)
    return X


@compiled
def muon_update(
    grad, param, momentum_buffer, second_momentum_buffer, momentum, beta2, lr, decay
):
    """Return the new value of param (N, rows, columns), rows >= columns; move both buffers.

    Nesterov momentum, orthogonalised (Muon, kellerjordan.github.io/posts/muon), each row
    scaled by its own second moment at equal total norm (NorMuon, arXiv:2510.05491), decay
    only where it agrees with the update (cautious, arXiv:2510.12402).
    """
    momentum_buffer.lerp_(grad, 1 - momentum)
    update = polar_express(grad.lerp(momentum_buffer, momentum)).float()
    square = update.square().mean(dim=-1, keepdim=True)
    second_momentum_buffer.lerp_(square, 1 - beta2)
    scale = second_momentum_buffer.clamp_min(1e-10).rsqrt()
    norm_before = square.sum(dim=-2, keepdim=True).sqrt()
    norm_after = (square * scale.square()).sum(dim=-2, keepdim=True).sqrt()
    update = update * scale * (norm_before / norm_after.clamp_min(1e-10))
    agrees = (update * param) >= 0
    return param - lr * update - lr * decay * param * agrees


class Muon(torch.optim.Optimizer):
    """Muon on groups of matrices; those of one shape are updated as one stack.

    Wide ones are transposed, so that each pair of lengths is compiled once, for
    any number of layers; hence numbers are 0-dim tensors.
    """

    STATE_PER_PARAM = 1  # numbers that the warm-up leaves room for; 2 unless said

    def __init__(self, groups: list[dict]):
        super().__init__(groups, {})
        for group in self.param_groups:
            if shapes := [tuple(p.shape) for p in group["params"] if p.ndim != 2]:
                names = group.get("names", "a group")
                raise ValueError(f"Muon moves matrices; {names} has shape {shapes[0]}")

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for shape in dict.fromkeys(p.shape for p in group["params"]):
                self.step_stack([p for p in group["params"] if p.shape == shape], group)

    def step_stack(self, params: list[nn.Parameter], group: dict) -> None:
        """Update matrices of one shape (rows, columns) by the numbers of their group."""
        rows, columns = params[0].shape
        used = [i for i, p in enumerate(params) if p.grad is not None]
        if not used:
            return
        few, wide = len(used) < len(params), rows < columns
        tall = [p.mT if wide else p for p in params]
        state = self.state[params[0]]
        if not state:
            stack = torch.stack(tall)
            state["momentum_buffer"] = torch.zeros_like(stack)
            state["second_momentum_buffer"] = torch.zeros_like(stack[..., :1])
        whole = state["momentum_buffer"], state["second_momentum_buffer"]
        buffers = [b[used] for b in whole] if few else whole
        grads = [params[i].grad.mT if wide else params[i].grad for i in used]
        tall = [tall[i] for i in used]
        lr = group["lr"] * max(1, rows / columns) ** 0.5
        numbers = (group["momentum"], group["beta2"], lr, group["weight_decay"])
        stacks = (torch.stack(grads), torch.stack(tall), *buffers)
        if rows * columns < 2**14:  # not compiled: a start is sooner
            new = muon_update.__wrapped__(*stacks, *numbers)
        else:
            any_length(*stacks)
            new = muon_update(*stacks, *map(torch.tensor, numbers))
        torch._foreach_copy_(tall, list(new.unbind()))
        for old, part in zip(whole, buffers, strict=True) if few else ():
            old[used] = part


class RowRMSprop(torch.optim.Optimizer):
    """RMSprop with decoupled weight decay and one second moment per table entry.

    As in row-wise Adagrad, arXiv:1903.12287. Only the entries of a sparse gradient move; all
    second moments fall. No momentum: that moves entries whose n-gram is long past.
    """

    STATE_PER_PARAM = -1  # nor a gradient for each
    DECAY_STEPS = 64  # steps per decay, which takes the whole table

    def __init__(self, groups: list[dict]):
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            beta2, lr, decay = (group[key] for key in ("beta2", "lr", "weight_decay"))
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=0, kept=1.0)
                    for key in ("moment", "last"):
                        state[key] = torch.zeros(len(p), 1, device=p.device)
                state["step"] += 1
                moment, last, step = state["moment"], state["last"], state["step"]
                row_rmsprop_(p, p.grad, moment, last, step, beta2, lr)
                state["kept"] *= 1 - lr * decay
                if step % self.DECAY_STEPS == 0:
                    p.mul_(state["kept"])
                    state["kept"] = 1.0


def build_optimizers(model: GPT) -> list[torch.optim.Optimizer]:
    """Return the optimizers, from one table: what moves by which, how fast, what decay.

    The schedules go by `kind`: matrix (momentum, decay), others (learning rate alone).
    """
    grouped: dict[str, str] = {}  # name of a parameter -> patterns of its group
    width_scale = (model.config.n_embd / 768) ** -0.5
    embedding_lr = EMBEDDING_LR * width_scale
    head_lr = UNEMBEDDING_LR * width_scale
    ngram_lr = NGRAM_LR * width_scale

    def group(
        kind: str, names: str, lr: float, weight_decay: float = 0.0, **others
    ) -> dict:
        """Return the group of the parameters whose names match one of the patterns."""
        params = []
        for name, p in model.named_parameters():
            if any(fnmatch(name, pattern) for pattern in names.split()):
                if name in grouped:
                    both = f"{grouped[name]} and {names}"
                    raise ValueError(f"{name}: in two groups, {both}")
                grouped[name] = names
                params.append(p)
        settings = {"kind": kind, "names": names, "lr": lr, "weight_decay": weight_decay}
        return {"params": params, **settings, **others}

    adamw = [
        group("embedding", "wte.weight", embedding_lr, WTE_WEIGHT_DECAY),
        group(
            "embedding", "h.*.value_embed.weight", embedding_lr, VALUE_EMBED_WEIGHT_DECAY
        ),
        group("head", "lm_head.weight", head_lr, LM_HEAD_WEIGHT_DECAY),
        group("scalar", "h.*.resid_lambda", RESID_LAMBDA_LR),
        group("scalar", "h.*.x0_lambda", X0_LAMBDA_LR, betas=LAMBDA_BETAS),
        group("scalar", "h.*.ngram_lambda", NGRAM_LAMBDA_LR, betas=LAMBDA_BETAS),
    ]
    row_rmsprop = [
        group("ngram", "ngram.weight", ngram_lr, NGRAM_WEIGHT_DECAY, beta2=NGRAM_BETA2),
    ]
    muon = [
        group(
            "matrix",
            "h.*.c_*.weight h.*gate.weight",
            MATRIX_LR,
            MATRIX_WEIGHT_DECAY,
            momentum=MUON_MOMENTUM[0],
            beta2=MUON_BETA2,
        ),
    ]
    return [
        torch.optim.AdamW(adamw, betas=ADAM_BETAS, eps=1e-10, fused=True),
        RowRMSprop(row_rmsprop),
        Muon(muon),
    ]


# ---- Schedules -------------------------------
def lr_multiplier(progress: float) -> float:
    """Return the factor on all learning rates at `progress`: up, flat, down, linearly."""
    up = min(1.0, progress / WARMUP_RATIO) if WARMUP_RATIO else 1.0
    left = min(1.0, (1 - progress) / WARMDOWN_RATIO) if WARMDOWN_RATIO else 1.0
    return min(up, left + (1 - left) * FINAL_LR_FRAC)


def muon_momentum(progress: float) -> float:
    """Return Muon's momentum: it rises over MOMENTUM_WARMUP_RATIO of the budget."""
    low, high = MUON_MOMENTUM
    risen = progress / MOMENTUM_WARMUP_RATIO if MOMENTUM_WARMUP_RATIO else 1.0
    return low + (high - low) * min(1.0, risen)


def set_schedules(optimizers: Iterable[torch.optim.Optimizer], progress: float) -> float:
    """Set every group for `progress`, 0 to 1; return the factor on all learning rates."""
    lrm = lr_multiplier(progress)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * lrm
            if group["kind"] == "matrix":
                group["momentum"] = muon_momentum(progress)
                decay = group.setdefault("initial_decay", group["weight_decay"])
                group["weight_decay"] = decay * (1 - progress)
    return lrm


# ---- Training --------------------------------
def train_step(
    model: GPT, optimizers, batches: Iterable, micro_steps: int
) -> torch.Tensor:
    """Do one optimizer step over `batches`; return the mean loss, 0-dim, nats per token.

    batches: `micro_steps` pairs of ids x and targets y, both (B, T).
    """
    total = torch.zeros((), device=model.wte.weight.device)
    for x, y in batches:
        loss = model.loss(x, y) / micro_steps
        loss.backward()
        total += loss.detach()
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return total


def main() -> None:
    run = open_run()
    config = build_config()
    attention, attend = choose_attention(ATTENTION, run.device)
    model = build_model(config, attend, run.device)
    optimizers = build_optimizers(model)
    run.warm_up(
        model,
        optimizers,
        train_step,
        total_batch_size=TOTAL_BATCH_SIZE,
        device_batch_size=DEVICE_BATCH_SIZE,
        row_bytes=model.row_bytes(),
    )
    epoch, tables = 1, [m for m in model.modules() if isinstance(m, NgramEmbedding)]
    of_table = [o for o in optimizers if isinstance(o, RowRMSprop)]
    for step in run.steps():
        if step.epoch > epoch:  # the n-grams know its rows
            epoch, gone = step.epoch, step.progress
            if (epoch - 1) * (1 - gone) > NGRAM_REFILL * gone:
                for table in tables:
                    nn.init.zeros_(table.weight)
            elif of_table:
                optimizers = of_table
        step.lrm = set_schedules(optimizers, step.progress)
        step.loss = train_step(model, optimizers, step.batches, step.micro_steps)
    run.evaluate(model)
    run.print_summary(config.n_layer, model.flops_per_token(), attention)
    checkpoint.save(run, model, config)


if __name__ == "__main__":
    main()
