"""Triton kernels behind ops.py, for GPUs with tensor memory access (Hopper). Not edited.

Every number is an argument: Triton's cache does not see what a kernel reads elsewhere. The custom
operators are what torch.compile sees of them. A part of the rules.
"""

import torch

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # a platform without CUDA
    triton = None

# fp8: e4m3 has three bits behind the point and ends at 448, e5m2 has two and ends at 57344.
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BLOCK = 128  # rows and columns of a tile of a product
OPTIONS = {  # whether it is the gradient: columns of the operands that are read at once, ...
    False: {"BK": 128, "num_warps": 8, "num_stages": 3},
    True: {"BK": 64, "num_warps": 4, "num_stages": 4},
}
CAST_ROWS, CAST_COLUMNS = 128, 64


def jit(kernel):
    return triton.jit(kernel) if triton else kernel


def programs(a: torch.Tensor) -> int:
    return torch.cuda.get_device_properties(a.device).multi_processor_count


def tiles_of(a: torch.Tensor, rows: int, columns: int) -> "TensorDescriptor":
    return TensorDescriptor.from_tensor(a, [rows, columns])


# ---- Casts --------------------------------------------------------------------------------------
@torch.library.custom_op("autoresearch::cast_both", mutates_args=())
def cast_both(
    x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x (M, N) * scale in fp8, and its transpose (N, M).

    scale: float32, (M,) or (1,). M and N are multiples of 16.
    """
    M, N = x.shape
    out, transposed = x.new_empty(M, N, dtype=dtype), x.new_empty(N, M, dtype=dtype)
    cast_both_kernel[(triton.cdiv(M, CAST_ROWS), triton.cdiv(N, CAST_COLUMNS))](
        tiles_of(x.contiguous(), CAST_ROWS, CAST_COLUMNS),
        scale,
        tiles_of(out, CAST_ROWS, CAST_COLUMNS),
        tiles_of(transposed, CAST_COLUMNS, CAST_ROWS),
        *(M, len(scale) > 1, CAST_ROWS, CAST_COLUMNS),
    )
    return out, transposed


@cast_both.register_fake
def _(x, scale, dtype):
    M, N = x.shape
    return x.new_empty(M, N, dtype=dtype), x.new_empty(N, M, dtype=dtype)


@jit
def cast_both_kernel(
    x, scale, out, transposed, M,
    PER_ROW: "tl.constexpr", BM: "tl.constexpr", BN: "tl.constexpr",
):  # fmt: skip
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    tile = x.load([m, n]).to(tl.float32)
    if PER_ROW:
        rows = m + tl.arange(0, BM)
        tile *= tl.load(scale + rows, mask=rows < M, other=0.0)[:, None]
    else:
        tile *= tl.load(scale)
    tile = tile.to(out.dtype)
    out.store([m, n], tile)
    transposed.store([n, m], tile.T)


# ---- ReLU^2 -------------------------------------------------------------------------------------
@torch.library.custom_op("autoresearch::relu_square", mutates_args=())
def relu_square(
    a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return relu(scale * a @ b.T)^2 in e4m3, and its transpose, of a (M, K), b (N, K) in e4m3.

    scale: float32, (1,). Squares above 448 become 448.
    """
    return matmul(a, b, None, scale)


@relu_square.register_fake
def _(a, b, scale):
    return a.new_empty(len(a), len(b)), a.new_empty(len(b), len(a))


@torch.library.custom_op("autoresearch::relu_square_gradient", mutates_args=())
def relu_square_gradient(
    a: torch.Tensor, b: torch.Tensor, squares: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale * (a @ b.T) * 2 sqrt(squares.T), the gradient of what was squared; both ways.

    a (M, K) in e5m2, b (N, K) and squares (N, M) in e4m3 -> (M, N) and (N, M) in e5m2.
    """
    return matmul(a, b, squares, scale)


@relu_square_gradient.register_fake
def _(a, b, squares, scale):
    return a.new_empty(len(a), len(b)), a.new_empty(len(b), len(a))


def matmul(a, b, squares, scale) -> tuple[torch.Tensor, torch.Tensor]:
    (M, K), N = a.shape, len(b)
    out, transposed = a.new_empty(M, N), a.new_empty(N, M)
    gradient = squares is not None
    block = OPTIONS[gradient]["BK"]
    whole = (squares if gradient else transposed, out, transposed)
    matmul_kernel[(2 * programs(a),)](
        *(tiles_of(t, BLOCK, block) for t in (a, b)),
        *(tiles_of(t, BLOCK, BLOCK) for t in whole),
        *(scale, M, N, K, gradient, BLOCK, BLOCK),
        **OPTIONS[gradient],
    )
    return out, transposed


@jit
def matmul_kernel(
    a, b, squares, out, transposed, scale, M, N, K,
    GRADIENT: "tl.constexpr", BM: "tl.constexpr", BN: "tl.constexpr", BK: "tl.constexpr",
):  # fmt: skip
    """Write relu(scale * a @ b.T)^2, or its gradient, in tiles of (BM, BN)."""
    columns = tl.cdiv(N, BN)
    tiles = tl.cdiv(M, BM) * columns
    factor = tl.load(scale)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        m, n = tile // columns * BM, tile % columns * BN
        total = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            total = tl.dot(a.load([m, k]), b.load([n, k]).T, total)
        total *= factor
        if GRADIENT:
            total *= 2 * tl.sqrt(squares.load([n, m]).T.to(tl.float32))
        else:  # the default maximum drops a NaN, which torch.relu keeps
            total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
            total *= total
        result = total.to(out.dtype)
        out.store([m, n], result)
        transposed.store([n, m], result.T)


# ---- Cross-entropy ------------------------------------------------------------------------------
@torch.library.custom_op("autoresearch::cross_entropy", mutates_args=("raw",))
def cross_entropy(raw: torch.Tensor, y: torch.Tensor, softcap: float) -> torch.Tensor:
    """Return the loss of each row of raw (N, V) for its target y (N,), float32; raw becomes
    the gradient of each row's loss.
    """
    N, V = raw.shape
    loss = raw.new_empty(N, dtype=torch.float32)
    cross_entropy_kernel[(N,)](
        *(raw, y.contiguous(), loss, softcap, V, triton.next_power_of_2(V)), num_warps=8
    )
    return loss


@cross_entropy.register_fake
def _(raw, y, softcap):
    return raw.new_empty(len(raw), dtype=torch.float32)


@jit
def cross_entropy_kernel(
    raw, y, loss, softcap,
    V: "tl.constexpr", BLOCK: "tl.constexpr",
):  # fmt: skip
    """One row, which is read once."""
    LOG2E: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0).to(tl.int64)
    ids = tl.arange(0, BLOCK)
    inside = ids < V
    wide = tl.load(raw + row * V + ids, mask=inside, other=0.0).to(tl.float32)
    # tanh, by exp2, which is one instruction; its ends are exact.
    tanh = 1 - 2 / (tl.exp2(wide * (2 * LOG2E / softcap)) + 1)
    logits = softcap * tanh
    # The cap keeps the exponentials finite: no maximum has to be found first.
    p = tl.where(inside, tl.exp2(logits * LOG2E), 0.0)
    total = tl.sum(p, 0)
    is_target = ids == tl.load(y + row)
    tl.store(loss + row, tl.log(total) - tl.sum(tl.where(is_target, logits, 0.0), 0))
    slope = (p / total - tl.where(is_target, 1.0, 0.0)) * (1 - tanh * tanh)
    tl.store(raw + row * V + ids, slope.to(raw.dtype.element_ty), mask=inside)
