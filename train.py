"""One experiment: train a GPT for the time budget on one GPU and print its val_bpb. Edit freely.

Usage: uv run train.py > run.log 2>&1        (AUTORESEARCH_SMOKE=1: a tiny model, on the CPU)
       uv run train.py --sample "text"       continues the text with the model of the last run

The model: rotary embeddings, QK-norm, ReLU^2 MLP, RMSNorm without weights, short and full causal
windows, keys offset by a token, hashed n-gram embeddings, gates on these, on attention and on value
embeddings, per-layer scalars on the residual stream and both embeddings, soft-capped logits, untied
head, no biases. Muon for the block matrices, row-wise RMSprop for the n-grams, AdamW for the rest.
prepare.py owns data, clock, seed, evaluation and summary; see class `Run`.
"""

import copy
import functools
import gc
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from constants import (
    MAX_SEQ_LEN,
    SMOKE,
    TIME_BUDGET,
    VOCAB_SIZE,
)  # first: it starts a clock

# Read by torch when CUDA starts: one growing segment, so that a big batch is not lost to gaps.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
# The cache of compiled code keeps functions with a gradient of their own too: 3 s of a warm start.
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD", "1")

import torch
import torch.nn as nn
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # a platform without CUDA
    triton = None

import sample
from harness import gpu
from harness.attention import Attention, choose_attention, masked_attention
from harness.files import data_dir
from harness.run import Run, Step, open_run

# What is compiled in one run is there in the next.
cache = data_dir().parent
if not cache.exists() or os.access(cache, os.W_OK):
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "compiled"))
# A function is compiled for each batch size that is tried, and for layers that differ; by default
# the ninth time is an error.
torch._dynamo.config.recompile_limit = 64

# ---- Knobs --------------------------------------------------------------------------------------
# Model
DEPTH = 9  # layers
N_EMBD = 640  # width
HEAD_DIM = 128  # heads are N_EMBD / HEAD_DIM
WINDOW_PATTERN = (
    "SSSSL"  # S short, L full; repeated over the layers, the last is always full
)
SHORT_WINDOW = MAX_SEQ_LEN // 8  # tokens that a short window sees, itself included
ROPE_BASE = 200_000
SOFTCAP = 15.0  # logits are SOFTCAP * tanh(logits / SOFTCAP)
ATTENTION_GAIN = 1.3  # the softmax is over ATTENTION_GAIN / sqrt(HEAD_DIM) * q k
NGRAM_ROWS = 2**20  # of the hashed table, each N_EMBD / 2 wide
INIT_SCALE = 0.68  # of the block matrices, times 1 / sqrt(fan in)
# What a layer reads, from the first to the last: stream, input embedding, n-gram embedding.
LAMBDA_INIT = {
    "resid_lambda": (1.15, 1.05),
    "x0_lambda": (0.2, 0.05),
    "ngram_lambda": (0.1, 0.1),
}
ATTENTION = (
    "auto"  # auto (fa3 where it runs, else flex), fa3, flex, masked (slow, any device)
)

# Batch
TOTAL_BATCH_SIZE = 2**17  # tokens a step
DEVICE_BATCH_SIZE = (
    64  # rows a micro-step, at most; the largest power of two that fits is taken
)

# Optimizer. Rates of tables and head are for width 768 and scale by (N_EMBD / 768) ** -0.5.
EMBEDDING_LR = 0.9  # token and value embeddings
NGRAM_LR, NGRAM_BETA2, NGRAM_WEIGHT_DECAY = 0.5, 0.95, 0.003
# From the second epoch on: the table forgets a row before it comes again, or it learns it by heart.
NGRAM_REPEAT_WEIGHT_DECAY = 0.03
UNEMBEDDING_LR = 0.008  # lm_head
RESID_LAMBDA_LR, X0_LAMBDA_LR, NGRAM_LAMBDA_LR = 0.005, 0.02, 0.02
ADAM_BETAS = (0.8, 0.95)
LAMBDA_BETAS = (0.96, 0.95)
WTE_WEIGHT_DECAY, VALUE_EMBED_WEIGHT_DECAY, LM_HEAD_WEIGHT_DECAY = 0.001, 0.003, 0.01
MATRIX_LR = 0.04  # Muon: spectral norm of an update of a square matrix
MATRIX_WEIGHT_DECAY = 0.1  # cautious, times the rate; falls to 0 over the run
MUON_MOMENTUM = (0.85, 0.92)  # from, to
MUON_BETA2 = 0.95  # of the second moment in the variance reduction

# Schedule, in shares of the time budget
WARMUP_RATIO = 0.0  # rates rise from 0
WARMDOWN_RATIO = 0.75  # rates fall to FINAL_LR_FRAC
FINAL_LR_FRAC = 0.05
MOMENTUM_WARMUP_RATIO = 0.15

LOG_EVERY = 10  # steps between two lines in the log

if (
    SMOKE
):  # the same code with a tiny model, so that an edit can be tried on a CPU in a minute
    DEPTH, N_EMBD, HEAD_DIM, NGRAM_ROWS = 4, 128, 32, 2**11
    TOTAL_BATCH_SIZE, DEVICE_BATCH_SIZE = 8 * MAX_SEQ_LEN, 4


# ---- Compiled and hand-written kernels ----------------------------------------------------------
def compiled(function: Callable) -> Callable:
    """Decorate a function (args[1] is a tensor): compiled on a GPU, once for all layers."""
    fused = torch.compile(function, dynamic=False, fullgraph=True)

    @functools.wraps(function)
    def call(*args):
        return (fused if args[1].is_cuda else function)(*args)

    return call


@triton.jit if triton else lambda kernel: kernel
def relu_square_kernel(
    a, b, post, out, M, N, K,
    BACKWARD: "tl.constexpr", BM: "tl.constexpr", BN: "tl.constexpr", BK: "tl.constexpr",
):  # fmt: skip
    """Write relu(a @ b.T)^2, or (a @ b) * 2 sqrt(post), in tiles of (BM, BN); see relu_square."""
    columns = tl.cdiv(N, BN)
    tiles = tl.cdiv(M, BM) * columns
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        m, n = tile // columns * BM, tile % columns * BN
        total = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            b_tile = b.load([k, n]) if BACKWARD else b.load([n, k]).T
            total = tl.dot(a.load([m, k]), b_tile, total, input_precision="ieee")
        halves = (
            total.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
        )  # for want of shared memory
        for i in tl.static_range(2):
            at, half = [m, n + i * (BN // 2)], halves[i]
            if BACKWARD:
                half *= 2 * tl.sqrt(post.load(at).to(tl.float32))
            else:
                half = tl.maximum(half, 0.0)
                half *= half
            out.store(at, half.to(out.dtype))


@torch.library.custom_op("autoresearch::relu_square", mutates_args=())
def relu_square(
    a: torch.Tensor, b: torch.Tensor, post: torch.Tensor | None
) -> torch.Tensor:
    """Return relu(a @ b.T)^2 of a (M, K), b (N, K), or with that as `post` the gradient before it.

    The gradient is (a @ b) * 2 sqrt(post) of a (M, K), the gradient behind a second product with
    b (K, N). Needs rows of whole 16 bytes and compute capability 9.0 or 10.
    """
    (M, K), N = a.shape, b.size(0) if post is None else b.size(1)
    out, BM, BN, BK = a.new_empty(M, N), 128, 256, 128 // a.element_size()
    operands = [
        TensorDescriptor.from_tensor(a.contiguous(), [BM, BK]),
        TensorDescriptor.from_tensor(
            b.contiguous(), [BN, BK] if post is None else [BK, BN]
        ),
        TensorDescriptor.from_tensor(out if post is None else post, [BM, BN // 2]),
        TensorDescriptor.from_tensor(out, [BM, BN // 2]),
    ]
    programs = torch.cuda.get_device_properties(a.device).multi_processor_count
    numbers, launch = (
        (M, N, K, post is not None, BM, BN, BK),
        {"num_warps": 8, "num_stages": 3},
    )
    relu_square_kernel[(programs,)](*operands, *numbers, **launch)
    return out


@relu_square.register_fake
def _(a, b, post):
    return a.new_empty(len(a), b.size(0) if post is None else b.size(1))


class ReluSquareMLP(torch.autograd.Function):
    """relu(x @ fc.T)^2 @ proj.T without the passes over memory for ReLU^2 and its gradient."""

    @staticmethod
    def forward(ctx, x, fc, proj):
        post = relu_square(x, fc, None)
        ctx.save_for_backward(x, fc, proj, post)
        return post @ proj.T

    @staticmethod
    def backward(ctx, grad):
        x, fc, proj, post = ctx.saved_tensors
        pre = relu_square(grad, proj, post)
        return pre @ fc, pre.T @ x, grad.T @ post


# ---- Model --------------------------------------------------------------------------------------
GATE_CHANNELS = 32  # of the layer's input, that a gate looks at


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
    ngram_rows: int

    def __post_init__(self):
        if self.n_layer < 1:
            raise ValueError(f"DEPTH ({self.n_layer}) must be at least 1")
        if self.head_dim < 2 or self.head_dim % 2 or self.n_embd % self.head_dim:
            raise ValueError(
                f"HEAD_DIM ({self.head_dim}) is odd or does not divide {self.n_embd}"
            )
        if self.n_embd < GATE_CHANNELS:
            raise ValueError(f"N_EMBD ({self.n_embd}) is below {GATE_CHANNELS}")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise ValueError(
                f"WINDOW_PATTERN ({self.window_pattern!r}) is not made of S and L"
            )
        if not 1 <= self.short_window <= self.sequence_len:
            raise ValueError(
                f"SHORT_WINDOW ({self.short_window}) is not 1 to {self.sequence_len}"
            )

    @property
    def windows(self) -> list[int]:
        """Tokens that each layer's attention sees; the last layer's sees all."""
        sizes = {"S": self.short_window, "L": self.sequence_len}
        pattern = self.window_pattern * self.n_layer
        return [
            *(sizes[letter] for letter in pattern[: self.n_layer - 1]),
            self.sequence_len,
        ]


def norm(x: torch.Tensor) -> torch.Tensor:
    """RMSNorm without weights over the last dimension. Source: arXiv:1910.07467."""
    return F.rms_norm(x, (x.size(-1),))


class RotaryNorm(torch.autograd.Function):
    """QK-norm (arXiv:2010.04245) of a rotary embedding (arXiv:2104.09864) of x (B, T, H, D).

    cos and sin (T, 1, D) hold each angle twice, for both halves of x; the second sin is negative.
    The gradient is computed from the result, which attention keeps anyway.
    """

    @staticmethod
    def forward(ctx, x, cos, sin):
        dtype, x = x.dtype, x.float()
        scale = (x.square().mean(-1, keepdim=True) + 1e-7).rsqrt()
        y = (scale * (x * cos + x.roll(x.size(-1) // 2, -1) * sin)).to(dtype)
        ctx.save_for_backward(y, scale, cos, sin)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y, scale, cos, sin), dtype = ctx.saved_tensors, grad.dtype
        grad, y = grad.float(), y.float()
        dx = scale * (grad - y * (grad * y).mean(-1, keepdim=True))
        return (dx * cos - dx.roll(dx.size(-1) // 2, -1) * sin).to(dtype), None, None


class Linear(nn.Linear):
    """A linear layer without bias whose float32 weight is used in the input's dtype."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class CausalSelfAttention(nn.Module):
    """Gated attention (arXiv:2505.06708), in every second layer with value embeddings (2410.17897).

    Half of each key, that of the slow rotary angles, is taken from the token before: what followed
    a like token earlier on is then found in one look. Source: modded-nanogpt record 49.
    """

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.head_dim, C = config.head_dim, config.n_embd
        self.c_q, self.c_k, self.c_v, self.c_proj = (Linear(C, C) for _ in range(4))
        self.gate = Linear(GATE_CHANNELS, C // self.head_dim)
        self.value_embed = None
        if layer % 2 == (config.n_layer - 1) % 2:  # with the last
            self.value_embed = nn.Embedding(config.vocab_size, C)
            self.value_gate = Linear(GATE_CHANNELS, C // self.head_dim)

    def project(self, x, idx, cos, sin):
        """Return q, k and v (B, T, H, D) and the output's gate (B, T, H) of x (B, T, C)."""
        # One product, of three matrices that Muon sees apart.
        weight = torch.cat([self.c_q.weight, self.c_k.weight, self.c_v.weight])
        heads = F.linear(x, weight.to(x.dtype)).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.chunk(3, dim=2)
        slow = torch.arange(self.head_dim, device=x.device) % (self.head_dim // 2)
        slow = slow >= self.head_dim // 4
        k = torch.where(slow, F.pad(k[:, :-1], (0, 0, 0, 0, 1, 0)), k)
        if self.value_embed is not None:
            gate = 2 * torch.sigmoid(self.value_gate(x[..., :GATE_CHANNELS]))  # (B, T, H)
            v = v + gate[..., None] * self.value_embed(idx).to(x.dtype).view_as(v)
        q, k = RotaryNorm.apply(q, cos, sin), RotaryNorm.apply(k, cos, sin)
        return q, k, v, 2 * torch.sigmoid(self.gate(x[..., :GATE_CHANNELS]))


class MLP(nn.Module):
    """Two matrices with ReLU^2 between them. Source: arXiv:2109.08668."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)
        runs = self.c_fc.weight.is_cuda and gpu.compute_capability()[0] in (9, 10)
        self.fused = runs and config.n_embd % 8 == 0

    def forward(self, x):
        if not self.fused:
            return self.c_proj(F.relu(self.c_fc(x)).square())
        weights = self.c_fc.weight.to(x.dtype), self.c_proj.weight.to(x.dtype)
        return ReluSquareMLP.apply(x.flatten(0, -2), *weights).view_as(x)


class Block(nn.Module):
    """Attention and MLP on the residual stream; the attention itself is between two graphs."""

    def __init__(self, config: GPTConfig, layer: int, attend: Attention):
        super().__init__()
        self.attend, self.window = attend, config.windows[layer]
        self.scale = config.attention_gain * config.head_dim**-0.5
        self.attn, self.mlp = CausalSelfAttention(config, layer), MLP(config)
        self.ngram_gate = Linear(
            GATE_CHANNELS, 2
        )  # by the stream: on bigrams, on trigrams
        parts = (nn.Parameter(torch.empty(())) for _ in range(3))
        self.resid_lambda, self.x0_lambda, self.ngram_lambda = parts

    @compiled
    def before(self, x, x0, ngram, idx, cos, sin):
        gate = (
            2
            * self.ngram_lambda
            * torch.sigmoid(self.ngram_gate(norm(x[..., :GATE_CHANNELS])))
        )
        x = (
            self.resid_lambda * x
            + self.x0_lambda * x0
            + (gate[..., None] * ngram).flatten(-2)
        )
        return x, *self.attn.project(norm(x), idx, cos, sin)

    @compiled
    def after(self, x, y, gate):
        x = x + self.attn.c_proj((y * gate[..., None]).flatten(2))
        return x + self.mlp(norm(x))

    def forward(self, x, *inputs):
        x, q, k, v, gate = self.before(x, *inputs)
        return self.after(x, self.attend(q, k, v, self.window, self.scale), gate)


class GPT(nn.Module):
    """The model: idx (B, T) -> logits (B, T, V) in float32; float32 weights, trunk in `dtype`."""

    def __init__(self, config: GPTConfig, attend: Attention, dtype: torch.dtype):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.ngram = nn.Embedding(config.ngram_rows, config.n_embd // 2)
        self.h = nn.ModuleList(Block(config, i, attend) for i in range(config.n_layer))
        self.lm_head = Linear(config.n_embd, config.vocab_size)
        frequency = config.rope_base ** -(
            torch.arange(0, config.head_dim, 2) / config.head_dim
        )
        angle = torch.outer(
            torch.arange(config.sequence_len).float(), frequency
        )  # (T, D / 2)
        cos, sin = torch.cat([angle, angle], 1).cos(), torch.cat([angle, -angle], 1).sin()
        self.register_buffer("cos", cos[:, None], persistent=False)
        self.register_buffer("sin", sin[:, None], persistent=False)

    @torch.no_grad()
    def init_weights(self, scale: float, lambdas: dict[str, tuple[float, float]]) -> None:
        """Draw the weights from torch's generator; blocks and n-grams add nothing, gates are 1."""
        bound = (
            scale * (3 / self.config.n_embd) ** 0.5
        )  # a uniform on +-b has std b / sqrt(3)
        for name, p in self.named_parameters():
            if name == "wte.weight":
                nn.init.normal_(p, std=1.0)
            elif name == "lm_head.weight":
                nn.init.normal_(p, std=0.001)
            elif name.endswith(("c_proj.weight", "gate.weight", "ngram.weight")):
                nn.init.zeros_(p)
            elif name.endswith("lambda"):
                _, layer, part = name.split(".")
                first, last = lambdas[part]
                share = int(layer) / max(1, self.config.n_layer - 1)
                nn.init.constant_(p, first + (last - first) * share)
            else:  # c_q, c_k, c_v, c_fc, value_embed
                nn.init.uniform_(p, -bound, bound)

    @compiled
    def embed(self, idx):
        """Return token (B, T, C) and n-gram embeddings (B, T, 2, C / 2), of two and three tokens.

        Each n-gram has a row, by a hash; a sign of its own makes what others do to that row noise
        that cancels. Source: modded-nanogpt records 62 and 83.
        """
        before = F.pad(idx[:, :-1], (1, 0))
        two = idx * 36313 + before * 27191
        three = two + F.pad(before[:, :-1], (1, 0)) * 19937 + 11
        code = torch.stack([two, three], -1) * 1640531513  # (B, T, 2), below 2^63
        sign = (code >> 16 & 1) * 2 - 1
        ngram = self.ngram((code >> 20) % self.config.ngram_rows) * sign[..., None]
        return norm(self.wte(idx).to(self.dtype)), ngram.to(self.dtype)

    def trunk(self, idx: torch.Tensor) -> torch.Tensor:
        """Return what the head reads, (B, T, C)."""
        cos, sin = self.cos[: idx.size(1)], self.sin[: idx.size(1)]
        x0, ngram = self.embed(idx)
        x = x0.view_as(
            x0
        )  # another object, or the first layer would be compiled on its own
        for block in self.h:
            x = block(x, x0, ngram, idx, cos, sin)
        return x

    def logits(self, x):
        """Return softcap * tanh(l / softcap) of the head's l, float32. Source: arXiv:2408.00118."""
        cap = self.config.softcap
        return cap * (
            2 * torch.sigmoid(self.lm_head(norm(x)).float() * (2 / cap)) - 1
        )  # tanh

    head = compiled(logits)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        training = torch.is_grad_enabled()
        with (
            torch.enable_grad()
        ):  # also in evaluation, so that training's graphs serve it
            x = self.trunk(idx)
        x = (
            x if training else x.detach()
        )  # lets the activations go before the logits are there
        return self.head(x)

    @compiled
    def cross_entropy(self, x, y):
        logits = self.logits(x)
        is_target = y[..., None] == torch.arange(logits.size(-1), device=y.device)
        # The cap keeps the exponentials finite: no maximum has to be found first.
        total = torch.exp2(logits * math.log2(math.e)).sum(-1)  # exp2 is one instruction
        return (total.log() - torch.where(is_target, logits, 0.0).sum(-1)).mean()

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy in nats of targets y (B, T) after ids x (B, T)."""
        return self.cross_entropy(self.trunk(x), y)

    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> float:
        """Return the FLOPs of forward and backward for one token: 6 a weight of a product, 12 * C
        a key of a layer's window, as if all were seen. Source: arXiv:2204.02311, appendix B."""
        matrices = sum(m.weight.numel() for m in self.modules() if isinstance(m, Linear))
        return 6 * matrices + 12 * self.config.n_embd * sum(self.config.windows)


# ---- Optimizer ----------------------------------------------------------------------------------
# Polar Express, arXiv:2505.16932: five odd quintics a x + b x^3 + c x^5 whose composition brings
# singular values from [1e-3, 1] closest to 1; algorithm 2, cushion 2e-2, safety factor 1.02.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(G: torch.Tensor) -> torch.Tensor:
    """Return, in bf16, about the nearest semi-orthogonal of G (N, rows, columns), not wide."""
    X = G.bfloat16()
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        A = X.mT @ X
        X = a * X + X @ (b * A + c * (A @ A))
    return X


@compiled
def muon_update(
    grad, param, momentum_buffer, second_momentum_buffer, momentum, beta2, lr, decay
):
    """Return the new value of param (N, rows, columns), rows >= columns, moving both buffers.

    Nesterov momentum, orthogonalised (Muon, kellerjordan.github.io/posts/muon), each row scaled
    by its own second moment at equal total norm (NorMuon, arXiv:2510.05491), decay only where it
    agrees with the update (cautious, arXiv:2510.12402). The last four are 0-dim.
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
    """Muon on groups of matrices; those of a group have one shape and are updated as one stack.

    Wide matrices are updated transposed, so that each pair of lengths is compiled once; numbers
    that change go in as 0-dim tensors for the same reason.
    """

    def __init__(self, groups: list[dict]):
        super().__init__(groups, {})
        if any(len({p.shape for p in group["params"]}) > 1 for group in groups):
            raise ValueError("the matrices of a muon group must have one shape")

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params, (rows, columns) = group["params"], group["params"][0].shape
            tall = [p if rows >= columns else p.mT for p in params]  # views
            stack = torch.stack(tall)
            grads = torch.stack(
                [p.grad if rows >= columns else p.grad.mT for p in params]
            )
            state = self.state[params[0]]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(stack)
                state["second_momentum_buffer"] = torch.zeros_like(stack[..., :1])
            lr = group["lr"] * max(1, rows / columns) ** 0.5
            numbers = (group["momentum"], group["beta2"], lr, group["weight_decay"])
            new = muon_update(grads, stack, *state.values(), *map(torch.tensor, numbers))
            torch._foreach_copy_(tall, list(new.unbind()))


@compiled
def row_update(grad, param, second_momentum_buffer, beta2, lr, decay):
    """Move param (rows, columns) and its second moment (rows, 1). The last three are 0-dim."""
    second_momentum_buffer.lerp_(grad.square().mean(dim=-1, keepdim=True), 1 - beta2)
    update = grad * second_momentum_buffer.clamp_min(1e-30).rsqrt()
    param.copy_(param * (1 - lr * decay) - lr * update)


class RowRMSprop(torch.optim.Optimizer):
    """RMSprop, weight decay apart, with one second moment a row (as Adagrad's: arXiv:1903.12287).

    No momentum, which would move a row long after its n-gram was seen; half the memory of AdamW.
    A row that was not read for long moves by lr / sqrt(1 - beta2) in root mean square.
    """

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            numbers = [
                torch.tensor(group[key]) for key in ("beta2", "lr", "weight_decay")
            ]
            for p in group["params"]:
                if p not in self.state:
                    self.state[p]["second_momentum_buffer"] = torch.zeros_like(p[:, :1])
                row_update(p.grad, p, self.state[p]["second_momentum_buffer"], *numbers)


def build_optimizers(model: GPT) -> tuple[torch.optim.AdamW, RowRMSprop, Muon]:
    """Return the optimizers of a model with the rates and decays of the knobs."""
    rate = (model.config.n_embd / 768) ** -0.5

    def group(part: str, lr: float, decay: float = 0.0, **others) -> dict:
        params = [p for name, p in model.named_parameters() if part in name]
        return {"params": params, "lr": lr, "weight_decay": decay} | others

    groups = [
        group("wte", EMBEDDING_LR * rate, WTE_WEIGHT_DECAY),
        group("value_embed", EMBEDDING_LR * rate, VALUE_EMBED_WEIGHT_DECAY),
        group("lm_head", UNEMBEDDING_LR * rate, LM_HEAD_WEIGHT_DECAY),
        group("resid_lambda", RESID_LAMBDA_LR),
        group("x0_lambda", X0_LAMBDA_LR, betas=LAMBDA_BETAS),
        group("ngram_lambda", NGRAM_LAMBDA_LR, betas=LAMBDA_BETAS),
    ]
    adamw = torch.optim.AdamW(groups, betas=ADAM_BETAS, eps=1e-10, fused=True)
    decays = (NGRAM_WEIGHT_DECAY, NGRAM_REPEAT_WEIGHT_DECAY)
    table = group(
        "ngram.", NGRAM_LR * rate, decays[0], weight_decays=decays, beta2=NGRAM_BETA2
    )
    rows = RowRMSprop([table], {})
    matrices: dict[torch.Size, list[nn.Parameter]] = {}
    for module in model.h.modules():
        if isinstance(module, Linear):
            matrices.setdefault(module.weight.shape, []).append(module.weight)
    rest = {"lr": MATRIX_LR, "momentum": 0.0, "beta2": MUON_BETA2, "weight_decay": 0.0}
    muon = Muon([{"params": params} | rest for params in matrices.values()])
    for group in adamw.param_groups + rows.param_groups + muon.param_groups:
        group["initial_lr"] = group["lr"]
    return adamw, rows, muon


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


def set_schedules(
    optimizers: Iterable[torch.optim.Optimizer], progress: float, epoch: int = 1
) -> float:
    """Set every group for the step that begins at `progress`; return the rates' factor."""
    lrm = lr_multiplier(progress)
    for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
        group["lr"] = group["initial_lr"] * lrm
        if "momentum" in group:  # Muon's
            group["momentum"] = muon_momentum(progress)
            group["weight_decay"] = MATRIX_WEIGHT_DECAY * (1 - progress)
        if "weight_decays" in group:  # of the first epoch, of those after it
            group["weight_decay"] = group["weight_decays"][epoch > 1]
    return lrm


# ---- Training -----------------------------------------------------------------------------------
def build_training(config: GPTConfig, attend: Attention, device: torch.device):
    """Return model and optimizers as a run uses them: bf16 on a GPU."""
    torch.set_float32_matmul_precision("high")
    with device:
        model = GPT(
            config, attend, torch.bfloat16 if device.type == "cuda" else torch.float32
        )
    model.init_weights(INIT_SCALE, LAMBDA_INIT)
    return model, build_optimizers(model)


def train_step(model: GPT, optimizers, batches, grad_accum_steps: int) -> torch.Tensor:
    """Do one optimizer step over `batches`; return the mean loss of its micro-steps, 0-dim."""
    total = torch.zeros((), device=model.wte.weight.device)
    for x, y in batches:
        loss = model.loss(x, y) / grad_accum_steps
        loss.backward()
        total += loss.detach()
    if unused := [name for name, p in model.named_parameters() if p.grad is None]:
        raise RuntimeError(f"no gradient for {unused}: not in use?")
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return total


def warm_up(run: Run, model: GPT, optimizers, batch_size: int) -> None:
    """Compile and run everything once on random ids, then put weights and state back, bit for bit.

    Two micro-steps a step, so that gradients are both made and added to; two steps, as the second
    has the optimizers' state beside it; and one evaluation. The weights wait on the roomier host.
    """
    parts = [model, *optimizers]
    weights = {name: p.to("cpu", copy=True) for name, p in model.state_dict().items()}
    saved = [
        weights,
        *copy.deepcopy([optimizer.state_dict() for optimizer in optimizers]),
    ]
    try:
        for _ in range(2):
            train_step(
                model, optimizers, [run.random_batch(batch_size) for _ in range(2)], 2
            )
        with torch.no_grad():
            model(run.random_batch(batch_size)[0])
    finally:
        model.zero_grad(set_to_none=True)
        for part, state in zip(parts, saved, strict=True):
            part.load_state_dict(state)


def step_line(step: Step, seconds: float) -> str:
    """Return the log line of a finished step; seconds: of the budget that are gone."""
    return (
        f"step {step.number:05d} ({100 * step.progress:.1f}%) | loss: {step.loss:.4f} | "
        f"lrm: {step.lrm:.2f} | dt: {1000 * step.seconds:.0f}ms | "
        f"tok/sec: {step.tokens / step.seconds:,.0f} | epoch: {step.epoch} | "
        f"remaining: {max(0.0, TIME_BUDGET - seconds):.0f}s"
    )


def build_config() -> GPTConfig:
    """Return the model's configuration from the knobs; ValueError if they do not fit together."""
    shape = (MAX_SEQ_LEN, VOCAB_SIZE, DEPTH, N_EMBD, HEAD_DIM)
    attention = (WINDOW_PATTERN, SHORT_WINDOW, ROPE_BASE, SOFTCAP, ATTENTION_GAIN)
    return GPTConfig(*shape, *attention, NGRAM_ROWS)


def build_saved(config: dict, device: torch.device) -> GPT:
    """Return a model of a saved configuration, for --sample."""
    return build_training(GPTConfig(**config), masked_attention, device)[0]


def main(argv: Sequence[str] = ()) -> None:
    sys.stdout.reconfigure(line_buffering=True)  # a killed run leaves its log whole
    if argv:
        return sample.main(argv, build_saved)
    try:
        device, config = gpu.choose_device(), build_config()
        rows = gpu.batch_limit(DEVICE_BATCH_SIZE, TOTAL_BATCH_SIZE)
        run = open_run(device)
        attention, attend = choose_attention(
            ATTENTION, config.windows, MAX_SEQ_LEN, device
        )
    except (OSError, ValueError) as error:
        sys.exit(f"train.py: {error}")

    model, optimizers = build_training(config, attend, device)
    print(f"model: {config}, {model.num_params() / 1e6:.1f} M parameters")

    # Roughly: a row's activations and logits; gradients, and moments but the table's.
    row_bytes = MAX_SEQ_LEN * (
        28 * config.n_layer * config.n_embd + 6 * config.vocab_size
    )
    fixed_bytes = 12 * model.num_params() - 8 * model.ngram.weight.numel()
    attempt = functools.partial(warm_up, run, model, optimizers)
    batch_size = gpu.find_batch_size(attempt, rows, row_bytes, device, fixed_bytes)
    grad_accum_steps = gpu.grad_accumulation(TOTAL_BATCH_SIZE, rows, batch_size)
    print(
        f"batch: {grad_accum_steps} micro-steps of {batch_size} rows of {MAX_SEQ_LEN} tokens"
    )
    gc.collect()
    gc.freeze()  # a collection in the middle of training stalls it for half a second
    gc.disable()

    for step in run.steps(batch_size, grad_accum_steps):
        step.lrm = set_schedules(optimizers, step.progress, step.epoch)
        step.loss = train_step(model, optimizers, step.batches, grad_accum_steps)
        report(run)
    report(run)
    run.evaluate(model)
    sample.save(run, model, config)
    run.print_summary(
        model.num_params(), config.n_layer, model.flops_per_token(), attention
    )


def report(run: Run) -> None:
    """Print a line for every LOG_EVERY-th of the steps that the device has finished."""
    while run.finished:
        step = run.finished.popleft()
        if step.number % LOG_EVERY == 0:
            print(step_line(step, run.clock.seconds), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
