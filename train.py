"""One experiment: train a GPT for the time budget on one GPU and print its val_bpb. Edit freely.

Usage: uv run train.py > run.log 2>&1        (AUTORESEARCH_SMOKE=1: a tiny model, on the CPU)

The model: rotary embeddings, QK-norm, ReLU^2 MLP, RMSNorm without weights, short and full causal
windows, value embeddings with input-dependent gates, per-layer scalars on the residual stream and
on the input embedding, soft-capped logits, untied head, no biases. Muon for the block matrices,
AdamW for the rest. prepare.py owns data, clock, seed, evaluation and summary; see class `Run`.
"""

import gc
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from constants import MAX_SEQ_LEN, SMOKE, TIME_BUDGET, VOCAB_SIZE  # first: it starts a clock

# Read by torch when CUDA starts: one growing segment, so that a big batch is not lost to gaps.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import prepare

# ---- Knobs --------------------------------------------------------------------------------------
# Model
DEPTH = 9  # layers
N_EMBD = 640  # width
HEAD_DIM = 128  # heads are N_EMBD / HEAD_DIM
KV_GROUP = 1  # query heads that share a key and value head (1: plain multi-head attention)
WINDOW_PATTERN = "SSSSL"  # S short, L full; repeated over the layers, the last is always full
SHORT_WINDOW = MAX_SEQ_LEN // 8  # tokens that a short window sees, itself included
ROPE_BASE = 200_000
SOFTCAP = 15.0  # logits are SOFTCAP * tanh(logits / SOFTCAP)
INIT_SCALE = 0.68  # of the block matrices, times 1 / sqrt(fan in)
X0_LAMBDA_INIT = 0.05  # weight of the input embedding in every layer's input
ATTENTION = "auto"  # auto (fa3 where it runs, else flex), fa3, flex, masked (slow, any device)

# Batch
TOTAL_BATCH_SIZE = 2**18  # tokens a step
DEVICE_BATCH_SIZE = 128  # rows a micro-step, halved until it fits; divides the total batch
EVAL_BATCH_SIZE = 32  # rows; changes speed and memory, never the result

# Optimizer. AdamW rates are for width 768 and scale by (N_EMBD / 768) ** -0.5.
EMBEDDING_LR = 0.9  # token and value embeddings
UNEMBEDDING_LR = 0.005  # lm_head
SCALAR_LR = 0.5  # x0_lambdas; a hundredth of it for resid_lambdas
ADAM_BETAS = (0.8, 0.95)
X0_BETAS = (0.96, 0.95)
WTE_WEIGHT_DECAY, VALUE_EMBED_WEIGHT_DECAY, LM_HEAD_WEIGHT_DECAY = 0.001, 0.003, 0.01
MATRIX_LR = 0.04  # Muon: spectral norm of an update of a square matrix
MATRIX_WEIGHT_DECAY = 0.2  # cautious, times the rate; falls to 0 over the run
MUON_MOMENTUM = (0.85, 0.95)  # from, to
MUON_BETA2 = 0.95  # of the second moment in the variance reduction

# Schedule, in shares of the time budget
WARMUP_RATIO = 0.0  # rates rise from 0
WARMDOWN_RATIO = 0.75  # rates fall to FINAL_LR_FRAC
FINAL_LR_FRAC = 0.05
MOMENTUM_WARMUP_RATIO = 0.15

LOG_EVERY = 10  # steps between two lines in the log

if SMOKE:  # the same code with a tiny model, so that an edit can be tried on a CPU in a minute
    DEPTH, N_EMBD, HEAD_DIM = 4, 128, 32
    TOTAL_BATCH_SIZE, DEVICE_BATCH_SIZE, EVAL_BATCH_SIZE = 8 * MAX_SEQ_LEN, 4, 4


# ---- Attention ----------------------------------------------------------------------------------
# q (B, T, H, D), k and v (B, T, Hkv, D), window in tokens, itself included -> (B, T, H, D)
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


def masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int
) -> torch.Tensor:
    """Attend by the definition: softmax over a (T, T) mask. For CPUs, and the oracle in tests."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
    k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))
    at = torch.arange(q.size(2), device=q.device)
    distance = at[:, None] - at[None, :]  # of a key behind its query
    scores = q @ k.transpose(2, 3) * q.size(3) ** -0.5  # (B, H, T, T)
    scores = scores.masked_fill((distance < 0) | (distance >= window), -torch.inf)
    return (scores.softmax(dim=3) @ v).transpose(1, 2)


def build_flex_attention(windows: Iterable[int], T: int, device: torch.device) -> Attention:
    """Return FlexAttention with one block mask for each window; to be called compiled."""

    def block_mask(window: int):
        def visible(b, h, query, key):
            return (query >= key) & (query - key < window)

        return create_block_mask(visible, None, None, T, T, device=device)

    masks = {window: block_mask(window) for window in set(windows)}

    def attend(q, k, v, window):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
        y = flex_attention(q, k, v, block_mask=masks[window], enable_gqa=q.size(1) != k.size(1))
        return y.transpose(1, 2)

    return attend


def build_flash_attention() -> Attention:
    """Return FlashAttention-3; RuntimeError if it cannot be had here."""
    flash_attn_func = prepare.load_flash_attention()

    def attend(q, k, v, window):
        y = flash_attn_func(q, k, v, causal=True, window_size=(window - 1, 0))
        return y[0] if isinstance(y, tuple) else y  # some builds return the log-sum-exp as well

    return attend


def choose_attention(
    name: str, windows: Iterable[int], T: int, device: torch.device
) -> tuple[str, Attention]:
    """Return name and function of the attention in use, and print them, with why if a fallback."""
    if name not in ("auto", "fa3", "flex", "masked"):
        raise ValueError(f"ATTENTION is {name!r}; it must be auto, fa3, flex or masked")
    why = "as set by ATTENTION"
    if device.type != "cuda" and name == "auto":
        name, why = "masked", "no GPU"
    if name in ("auto", "fa3"):
        try:
            attend = build_flash_attention()
            print("attention: fa3")
            return "fa3", attend
        except RuntimeError as error:
            if name == "fa3":
                raise
            name, why = "flex", f"fallback: {error}"
    print(f"attention: {name} ({why})")
    return name, masked_attention if name == "masked" else build_flex_attention(windows, T, device)


# ---- Model --------------------------------------------------------------------------------------
VALUE_GATE_CHANNELS = 32  # of the layer's input, that a value embedding's gate looks at


@dataclass(frozen=True)
class GPTConfig:
    """What the model is built from. ValueError names the knob that cannot work."""

    sequence_len: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    window_pattern: str
    short_window: int
    rope_base: float
    softcap: float

    def __post_init__(self):
        if min(self.n_layer, self.n_head, self.n_kv_head) < 1 or self.n_embd % self.n_head:
            heads = f"{self.n_head} heads of {self.n_layer} layers"
            raise ValueError(f"N_EMBD ({self.n_embd}) cannot be cut into {heads}; see HEAD_DIM")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"KV_GROUP does not divide the {self.n_head} heads")
        if self.head_dim % 2 or self.n_embd < VALUE_GATE_CHANNELS:
            raise ValueError(f"HEAD_DIM ({self.head_dim}) is odd, or N_EMBD ({self.n_embd}) small")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise ValueError(f"WINDOW_PATTERN ({self.window_pattern!r}) is not made of S and L")
        if not 1 <= self.short_window <= self.sequence_len:
            raise ValueError(f"SHORT_WINDOW ({self.short_window}) is not 1 to {self.sequence_len}")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def windows(self) -> list[int]:
        """Tokens that each layer's attention sees."""
        sizes = {"S": self.short_window, "L": self.sequence_len}
        pattern = self.window_pattern
        windows = [sizes[pattern[i % len(pattern)]] for i in range(self.n_layer)]
        return [*windows[:-1], self.sequence_len]

    def has_value_embedding(self, layer: int) -> bool:
        """Return whether a layer adds a value embedding: every second one, with the last."""
        return layer % 2 == (self.n_layer - 1) % 2


def norm(x: torch.Tensor) -> torch.Tensor:
    """RMSNorm without weights over the last dimension. Source: arXiv:1910.07467."""
    return F.rms_norm(x, (x.size(-1),))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x (B, T, H, D); cos and sin (T, 1, D / 2). Source: arXiv:2104.09864."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1).to(x.dtype)


class Linear(nn.Linear):
    """A linear layer without bias whose float32 weight is used in the input's dtype."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class CausalSelfAttention(nn.Module):
    """QK-norm: arXiv:2010.04245; grouped queries: 2305.13245; value residual: 2410.17897."""

    def __init__(self, config: GPTConfig, layer: int, attend: Attention):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_dim, self.window = config.head_dim, config.windows[layer]
        self.attend = attend
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, self.n_kv_head * self.head_dim)
        self.c_v = Linear(config.n_embd, self.n_kv_head * self.head_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        if config.has_value_embedding(layer):
            self.value_gate = Linear(VALUE_GATE_CHANNELS, self.n_kv_head)

    def forward(self, x, value_embedding, cos, sin):
        B, T, C = x.shape
        q = self.c_q(x).view(B, T, self.n_head, self.head_dim)
        k = self.c_k(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.c_v(x).view(B, T, self.n_kv_head, self.head_dim)
        if value_embedding is not None:
            gate = 2 * torch.sigmoid(self.value_gate(x[..., :VALUE_GATE_CHANNELS]))  # (B, T, Hkv)
            v = v + gate[..., None] * value_embedding.view_as(v)
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        return self.c_proj(self.attend(q, k, v, self.window).reshape(B, T, C))


class MLP(nn.Module):
    """Two matrices with ReLU^2 between them. Source: arXiv:2109.08668."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int, attend: Attention):
        super().__init__()
        self.attn = CausalSelfAttention(config, layer, attend)
        self.mlp = MLP(config)

    def forward(self, x, value_embedding, cos, sin):
        x = x + self.attn(norm(x), value_embedding, cos, sin)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """The model: idx (B, T) -> logits (B, T, V) in float32; float32 weights, trunk in `dtype`."""

    def __init__(self, config: GPTConfig, attend: Attention, dtype: torch.dtype):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.value_embeds = nn.ModuleDict(
            {
                str(i): nn.Embedding(config.vocab_size, config.n_kv_head * config.head_dim)
                for i in range(config.n_layer)
                if config.has_value_embedding(i)
            }
        )
        self.h = nn.ModuleList(Block(config, i, attend) for i in range(config.n_layer))
        self.lm_head = Linear(config.n_embd, config.vocab_size)
        self.resid_lambdas = nn.Parameter(torch.empty(config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.empty(config.n_layer))
        frequency = config.rope_base ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
        angle = torch.outer(torch.arange(config.sequence_len).float(), frequency)  # (T, D / 2)
        self.register_buffer("cos", angle.cos()[:, None], persistent=False)
        self.register_buffer("sin", angle.sin()[:, None], persistent=False)

    @torch.no_grad()
    def init_weights(self, scale: float, x0_lambda: float) -> None:
        """Draw the weights from torch's generator.

        wte                         normal, std 1
        value_embeds                uniform, std scale / sqrt(n_embd)
        c_q, c_k, c_v, c_fc         uniform, std scale / sqrt(n_embd)
        c_proj, value_gate          zero: a block starts as the identity, a gate as 1
        lm_head                     normal, std 0.001
        resid_lambdas, x0_lambdas   1, x0_lambda
        """
        bound = scale * (3 / self.config.n_embd) ** 0.5  # a uniform on +-b has std b / sqrt(3)
        for name, p in self.named_parameters():
            if name == "wte.weight":
                nn.init.normal_(p, std=1.0)
            elif name == "lm_head.weight":
                nn.init.normal_(p, std=0.001)
            elif name.endswith(("c_proj.weight", "value_gate.weight")):
                nn.init.zeros_(p)
            elif name.endswith("lambdas"):
                nn.init.constant_(p, 1.0 if name == "resid_lambdas" else x0_lambda)
            else:
                nn.init.uniform_(p, -bound, bound)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        cos, sin = self.cos[: idx.size(1)], self.sin[: idx.size(1)]
        x = x0 = norm(self.wte(idx).to(self.dtype))  # (B, T, C)
        for i, block in enumerate(self.h):
            x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            table = self.value_embeds[str(i)] if str(i) in self.value_embeds else None
            x = block(x, table(idx).to(self.dtype) if table else None, cos, sin)
        logits = self.lm_head(norm(x)).float()  # (B, T, V)
        return self.config.softcap * torch.tanh(logits / self.config.softcap)  # arXiv:2408.00118

    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> float:
        """Return the FLOPs of forward and backward for one token.

        6 for every weight that multiplies, 12 * C for every key in a layer's window, counted as
        if all of them were seen. Source: arXiv:2204.02311, appendix B.
        """
        matrices = sum(m.weight.numel() for m in self.modules() if isinstance(m, Linear))
        return 6 * matrices + 12 * self.config.n_embd * sum(self.config.windows)


def compute_loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of a batch, in nats a token."""
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


# ---- Optimizer ----------------------------------------------------------------------------------
# Polar Express, arXiv:2505.16932: the composition of five odd quintics a x + b x^3 + c x^5 that
# brings singular values from [1e-3, 1] closest to 1, found by the paper's algorithm 2 with its
# cushion 2e-2 and safety factor 1.02.
# fmt: off
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
# fmt: on


def polar_express(G: torch.Tensor) -> torch.Tensor:
    """Return the nearest (semi-)orthogonal matrices to G (N, rows, columns), about, in bf16."""
    X = G.bfloat16()
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    tall = X.size(-2) > X.size(-1)
    X = X.mT if tall else X  # the product below is of the short side
    for a, b, c in POLAR_EXPRESS:
        A = X @ X.mT
        X = a * X + (b * A + c * (A @ A)) @ X
    return X.mT if tall else X


def muon_update(grad, param, momentum_buffer, second_momentum_buffer, momentum, beta2, lr, decay):
    """Return the new value of param (N, rows, columns), moving both buffers.

    Nesterov momentum, orthogonalised (Muon, kellerjordan.github.io/posts/muon), each row or
    column scaled by its own second moment at equal total norm (NorMuon, arXiv:2510.05491), decay
    only where it agrees with the update (cautious, arXiv:2510.12402). The last four are 0-dim.
    """
    momentum_buffer.lerp_(grad, 1 - momentum)
    update = polar_express(grad.lerp(momentum_buffer, momentum)).float()
    dim = -1 if grad.size(-2) >= grad.size(-1) else -2  # a moment for each unit on the long side
    square = update.square().mean(dim=dim, keepdim=True)
    second_momentum_buffer.lerp_(square, 1 - beta2)
    scale = second_momentum_buffer.clamp_min(1e-10).rsqrt()
    norm_before = square.sum(dim=(-2, -1), keepdim=True).sqrt()
    norm_after = (square * scale.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    update = update * scale * (norm_before / norm_after.clamp_min(1e-10))
    lr = lr * max(1, grad.size(-2) / grad.size(-1)) ** 0.5
    agrees = (update * param) >= 0
    return param - lr * update - lr * decay * param * agrees


def adamw_update(grad, param, exp_avg, exp_avg_sq, beta1, beta2, bias1, bias2, lr, decay, eps):
    """Move param and both moments by one AdamW step (arXiv:1711.05101), in place.

    bias1, bias2: 1 - beta^t at step t. Everything after exp_avg_sq is 0-dim.
    """
    param.mul_(1 - lr * decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.lerp_(grad.square(), 1 - beta2)
    param.sub_(lr * (exp_avg / bias1) / ((exp_avg_sq / bias2).sqrt() + eps))


class MuonAdamW(torch.optim.Optimizer):
    """Muon for groups of kind "muon", whose matrices have one shape, AdamW for kind "adamw".

    All state exists from the start. compile: fuse the updates, once for each shape; numbers that
    change go in as 0-dim tensors, so that nothing is compiled again.
    """

    def __init__(self, groups: list[dict], compile: bool = False):
        super().__init__(groups, {})
        fuse = torch.compile(dynamic=False, fullgraph=True) if compile else lambda f: f
        self.muon_update, self.adamw_update = fuse(muon_update), fuse(adamw_update)
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]
            params = group["params"]
            if group["kind"] == "muon":
                N, (rows, columns) = len(params), params[0].shape
                if any(p.shape != params[0].shape for p in params):
                    raise ValueError("the matrices of a muon group must have one shape")
                moment = (N, rows, 1) if rows >= columns else (N, 1, columns)
                self.state[params[0]] = {
                    "momentum_buffer": params[0].new_zeros(N, rows, columns),
                    "second_momentum_buffer": params[0].new_zeros(moment),
                }
            elif group["kind"] == "adamw":
                for p in params:
                    zeros = {k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")}
                    self.state[p] = {"step": torch.zeros(()), **zeros}
            else:
                raise ValueError(f"optimizer group of unknown kind {group['kind']!r}")

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            if missing := [tuple(p.shape) for p in group["params"] if p.grad is None]:
                raise RuntimeError(f"no gradient for parameters of shape {missing}: not in use?")
            if group["kind"] == "muon":
                self._step_muon(group)
            else:
                self._step_adamw(group)

    def _step_muon(self, group: dict) -> None:
        params = group["params"]
        state = self.state[params[0]]
        numbers = (group["momentum"], group["beta2"], group["lr"], group["weight_decay"])
        new = self.muon_update(
            torch.stack([p.grad for p in params]),
            torch.stack(params),
            state["momentum_buffer"],
            state["second_momentum_buffer"],
            *map(torch.tensor, numbers),
        )
        torch._foreach_copy_(params, list(new.unbind()))

    def _step_adamw(self, group: dict) -> None:
        beta1, beta2 = group["betas"]
        for p in group["params"]:
            state = self.state[p]
            state["step"] += 1
            bias1, bias2 = 1 - beta1 ** int(state["step"]), 1 - beta2 ** int(state["step"])
            numbers = (beta1, beta2, bias1, bias2, group["lr"], group["weight_decay"], group["eps"])
            moments = state["exp_avg"], state["exp_avg_sq"]
            self.adamw_update(p.grad, p, *moments, *map(torch.tensor, numbers))


def build_optimizer(model: GPT, compile: bool) -> MuonAdamW:
    """Return the optimizer of a model with the rates and decays of the knobs."""
    rate = (model.config.n_embd / 768) ** -0.5
    adamw = {"kind": "adamw", "betas": ADAM_BETAS, "eps": 1e-10, "weight_decay": 0.0}
    tables = [
        ([model.wte.weight], EMBEDDING_LR, WTE_WEIGHT_DECAY),
        ([*model.value_embeds.parameters()], EMBEDDING_LR, VALUE_EMBED_WEIGHT_DECAY),
        ([model.lm_head.weight], UNEMBEDDING_LR, LM_HEAD_WEIGHT_DECAY),
    ]
    groups = [
        adamw | {"params": params, "lr": lr * rate, "weight_decay": decay}
        for params, lr, decay in tables
    ]
    groups += [
        adamw | {"params": [model.resid_lambdas], "lr": SCALAR_LR * 0.01},
        adamw | {"params": [model.x0_lambdas], "lr": SCALAR_LR, "betas": X0_BETAS},
    ]
    matrices: dict[torch.Size, list[nn.Parameter]] = {}
    for p in model.h.parameters():
        matrices.setdefault(p.shape, []).append(p)
    muon = {"kind": "muon", "lr": MATRIX_LR, "momentum": 0.0, "beta2": MUON_BETA2}
    groups += [muon | {"params": ps, "weight_decay": 0.0} for ps in matrices.values()]
    return MuonAdamW(groups, compile)


# ---- Schedules ----------------------------------------------------------------------------------
def lr_multiplier(progress: float) -> float:
    """Return the factor on all rates at a share of the time budget: up, flat, down, linearly."""
    up = min(1.0, progress / WARMUP_RATIO) if WARMUP_RATIO else 1.0
    left = min(1.0, (1 - progress) / WARMDOWN_RATIO) if WARMDOWN_RATIO else 1.0
    return min(up, left + (1 - left) * FINAL_LR_FRAC)


def muon_momentum(progress: float) -> float:
    """Return Muon's momentum, which rises over the first MOMENTUM_WARMUP_RATIO of the budget."""
    low, high = MUON_MOMENTUM
    risen = progress / MOMENTUM_WARMUP_RATIO if MOMENTUM_WARMUP_RATIO else 1.0
    return low + (high - low) * min(1.0, risen)


def set_schedules(optimizer: MuonAdamW, progress: float) -> float:
    """Set every group for the step that begins at `progress`; return the rates' factor."""
    lrm = lr_multiplier(progress)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * lrm
        if group["kind"] == "muon":
            group["momentum"] = muon_momentum(progress)
            group["weight_decay"] = MATRIX_WEIGHT_DECAY * (1 - progress)
    return lrm


# ---- Training -----------------------------------------------------------------------------------
def build_training(config: GPTConfig, attend: Attention, device: torch.device):
    """Return model, optimizer and loss function as a run uses them: compiled and bf16 on a GPU."""
    cuda = device.type == "cuda"
    torch.set_float32_matmul_precision("high")
    with device:
        model = GPT(config, attend, torch.bfloat16 if cuda else torch.float32)
    model.init_weights(INIT_SCALE, X0_LAMBDA_INIT)
    loss_of = torch.compile(compute_loss, dynamic=False) if cuda else compute_loss
    return model, build_optimizer(model, compile=cuda), loss_of


def eval_batch_size(batch_size: int) -> int:
    """Return the rows of an evaluation batch: where fewer fit in training, no more are tried."""
    return min(EVAL_BATCH_SIZE, batch_size)


def train_step(model, optimizer, loss_of, batches, grad_accum_steps: int) -> torch.Tensor:
    """Do one optimizer step over `batches`; return the mean loss of its micro-steps, 0-dim."""
    total = torch.zeros((), device=next(model.parameters()).device)
    for x, y in batches:
        loss = loss_of(model, x, y) / grad_accum_steps
        loss.backward()
        total += loss.detach()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def warm_up(run: prepare.Run, model, optimizer, loss_of, logits_of, batch_size: int) -> None:
    """Compile and run everything once on random ids, then put weights and state back, bit for bit.

    Two steps of two micro-steps, so that first and later calls are both seen; one evaluation.
    """
    tensors = [*model.parameters()]
    tensors += [t for state in optimizer.state.values() for t in state.values()]
    saved = [t.detach().clone() for t in tensors]
    try:
        for _ in range(2):
            batches = [run.random_batch(batch_size) for _ in range(2)]
            train_step(model, optimizer, loss_of, batches, 2)
        with torch.no_grad():
            logits_of(run.random_batch(eval_batch_size(batch_size))[0])
    finally:
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for tensor, value in zip(tensors, saved, strict=True):
                tensor.copy_(value)


def expected_batch(batch_size: int, config: GPTConfig, free_bytes: int) -> int:
    """Return `batch_size`, halved while it would take over 90 % of the free GPU memory.

    An estimate, so that a small card does not compile for sizes that cannot fit: 17 activations
    of n_embd a token and layer in bf16, logits in bf16 and float32. At 9 x 640 that is 245 kB a
    token; measured 242.
    """
    token = 34 * config.n_layer * config.n_embd + 6 * config.vocab_size  # bytes
    while batch_size % 2 == 0 and batch_size * config.sequence_len * token > 0.9 * free_bytes:
        batch_size //= 2
    return batch_size


def fits(run: prepare.Run, model, optimizer, loss_of, logits_of, batch_size: int) -> bool:
    """Warm up with micro-batches of `batch_size` rows; return False if memory is too small."""
    try:
        warm_up(run, model, optimizer, loss_of, logits_of, batch_size)
        return True
    except torch.OutOfMemoryError:
        if batch_size % 2:
            raise
    torch.cuda.empty_cache()  # here, where the failed step's tensors are let go
    return False


def step_line(step: prepare.Step, seconds: float) -> str:
    """Return the log line of a finished step; seconds: of the budget that are gone."""
    return (
        f"step {step.number:05d} ({100 * step.progress:.1f}%) | loss: {step.loss:.4f} | "
        f"lrm: {step.lrm:.2f} | dt: {1000 * step.seconds:.0f}ms | "
        f"tok/sec: {step.tokens / step.seconds:,.0f} | epoch: {step.epoch} | "
        f"remaining: {max(0.0, TIME_BUDGET - seconds):.0f}s"
    )


def grad_accumulation(batch_size: int) -> int:
    """Return the micro-steps of `batch_size` rows in a step; ValueError if they are not whole."""
    tokens = batch_size * MAX_SEQ_LEN
    if tokens < 1 or TOTAL_BATCH_SIZE < tokens or TOTAL_BATCH_SIZE % tokens:
        raise ValueError(
            f"TOTAL_BATCH_SIZE ({TOTAL_BATCH_SIZE} tokens) is not a multiple of DEVICE_BATCH_SIZE "
            f"* MAX_SEQ_LEN ({batch_size} * {MAX_SEQ_LEN}); change one of them in train.py"
        )
    return TOTAL_BATCH_SIZE // tokens


def build_config() -> GPTConfig:
    """Return the model's configuration from the knobs; ValueError if they do not fit together."""
    if N_EMBD % HEAD_DIM or (N_EMBD // HEAD_DIM) % KV_GROUP:
        raise ValueError(f"HEAD_DIM ({HEAD_DIM}) * KV_GROUP ({KV_GROUP}) must divide {N_EMBD}")
    if EVAL_BATCH_SIZE < 1:
        raise ValueError(f"EVAL_BATCH_SIZE ({EVAL_BATCH_SIZE}) must be at least 1")
    return GPTConfig(
        sequence_len=MAX_SEQ_LEN,
        vocab_size=VOCAB_SIZE,
        n_layer=DEPTH,
        n_head=N_EMBD // HEAD_DIM,
        n_kv_head=N_EMBD // HEAD_DIM // KV_GROUP,
        n_embd=N_EMBD,
        window_pattern=WINDOW_PATTERN,
        short_window=SHORT_WINDOW,
        rope_base=ROPE_BASE,
        softcap=SOFTCAP,
    )


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)  # a killed run leaves its log whole
    cuda = torch.cuda.is_available() and not SMOKE  # smoke leaves a GPU to whoever is using it
    device = torch.device("cuda" if cuda else "cpu")
    if not (cuda or SMOKE):
        sys.exit(
            "train.py: no CUDA GPU is available, and a full run needs one; "
            "AUTORESEARCH_SMOKE=1 uv run train.py tries the same code on a CPU in about a minute"
        )
    try:
        config, batch_size = build_config(), DEVICE_BATCH_SIZE
        grad_accumulation(batch_size)  # here already, for its errors
        run = prepare.open_run(device)
        attention, attend = choose_attention(ATTENTION, config.windows, MAX_SEQ_LEN, device)
    except (OSError, ValueError) as error:
        sys.exit(f"train.py: {error}")

    model, optimizer, loss_of = build_training(config, attend, device)
    logits_of = torch.compile(model, dynamic=False) if cuda else model
    print(f"model: {config}, {model.num_params() / 1e6:.1f} M parameters")

    start = time.perf_counter()
    if cuda:
        batch_size = expected_batch(batch_size, config, torch.cuda.mem_get_info()[0])
    while not fits(run, model, optimizer, loss_of, logits_of, batch_size):
        print(f"batch: {batch_size} rows do not fit in memory, trying {batch_size // 2}")
        batch_size //= 2
    grad_accum_steps = grad_accumulation(batch_size)
    text = f"batch: {grad_accum_steps} micro-steps of {batch_size} rows of {MAX_SEQ_LEN} tokens"
    print(f"{text}; compiled and warmed up in {time.perf_counter() - start:.1f} s", flush=True)
    gc.collect()
    gc.freeze()  # a collection in the middle of training stalls it for half a second
    gc.disable()

    for step in run.steps(batch_size, grad_accum_steps):
        step.lrm = set_schedules(optimizer, step.progress)
        step.loss = train_step(model, optimizer, loss_of, step.batches, grad_accum_steps)
        report(run)
    report(run)
    run.evaluate(logits_of, eval_batch_size(batch_size))
    run.print_summary(model.num_params(), config.n_layer, model.flops_per_token(), attention)


def report(run: prepare.Run) -> None:
    """Print a line for every LOG_EVERY-th of the steps that the device has finished."""
    while run.finished:
        step = run.finished.popleft()
        if step.number % LOG_EVERY == 0:
            print(step_line(step, run.clock.seconds), flush=True)


if __name__ == "__main__":
    main()
