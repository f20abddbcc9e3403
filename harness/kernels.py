"""Triton kernels behind ops.py. Those in fp8 need tensor memory access (Hopper). Not edited.

Every number is an argument: Triton's cache does not see what a kernel reads elsewhere. The custom
operators are what torch.compile sees of them. A part of the rules.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.library import register_fake

EPS = 1e-7  # added to a mean square, so that a vector of zeros has a norm

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
CAST_ROWS, CAST_COLUMNS = 64, 128
HEAD_ROWS = 32  # of a head, in a program
SUM_ROWS, SUM_COLUMNS = 64, 128  # of an embedding's gradient
SUM_BLOCK = 1024
ENTRY_ROWS = 4  # of a table entry's gradient that are read at once


LIBRARY = torch.library.Library("autoresearch", "DEF")


def operator(writes: str = "") -> Callable:
    """Decorate a function as an operator, for torch.compile. It has no gradient.

    That of torch.library.custom_op has to look for one, which takes as long as the launch.
    """

    def register(function: Callable) -> Callable:
        name = function.__name__
        schema = torch.library.infer_schema(function, mutates_args=writes.split())
        LIBRARY.define(name + schema)
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        return getattr(torch.ops.autoresearch, name).default

    return register


def jit(kernel, **options):
    return triton.jit(kernel, **options) if triton else kernel


def programs(a: torch.Tensor) -> int:
    return torch.cuda.get_device_properties(a.device).multi_processor_count


def tiles_of(a: torch.Tensor, rows: int, columns: int) -> "TensorDescriptor":
    return TensorDescriptor.from_tensor(a, [rows, columns])


# ---- Casts --------------------------------------------------------------------------------------
@operator()
def cast_both(
    x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x (M, N) * scale in fp8, and its transpose (N, M).

    scale: float32, (M,) or (1,). M and N are multiples of 16.
    """
    M, N = x.shape
    out, transposed = x.new_empty(M, N, dtype=dtype), x.new_empty(N, M, dtype=dtype)
    cast_into(x, scale, out, transposed, 0)
    return out, transposed


@register_fake("autoresearch::cast_both")
def _(x, scale, dtype):
    M, N = x.shape
    return x.new_empty(M, N, dtype=dtype), x.new_empty(N, M, dtype=dtype)


def cast_into(x, scale, out, transposed, column) -> None:
    """Write x (M, N) into out from that column on, and into transposed from that row on."""
    M, N = x.shape
    cast_both_kernel[(triton.cdiv(M, CAST_ROWS), triton.cdiv(N, CAST_COLUMNS))](
        tiles_of(x.contiguous(), CAST_ROWS, CAST_COLUMNS),
        scale,
        tiles_of(out, CAST_ROWS, CAST_COLUMNS),
        tiles_of(transposed, CAST_COLUMNS, CAST_ROWS),
        *(M, column, len(scale) > 1, CAST_ROWS, CAST_COLUMNS),
    )


@jit
def cast_both_kernel(
    x, scale, out, transposed, M, column,
    PER_ROW: "tl.constexpr", BM: "tl.constexpr", BN: "tl.constexpr",
):  # fmt: skip
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    tile = x.load([m, n]).to(tl.float32)
    if PER_ROW:
        rows = m + tl.arange(0, BM)
        tile *= tl.load(scale + rows, mask=rows < M, other=0.0)[:, None]
    else:
        tile *= tl.load(scale)
    store_both(out, transposed, m, column + n, tile)


@jit
def store_both(out, transposed, m, n, tile):
    """Store a float32 tile as it is, and transposed."""
    out.store([m, n], tile.to(out.dtype))
    # Cast a second time, of sums that no compiler takes for the tile: of one cast, ptxas 12.8
    # (Triton 3.6.0) reads every fourth byte before it is written.
    transposed.store([n, m], (tile + 0.0).T.to(out.dtype))


# ---- ReLU^2 -------------------------------------------------------------------------------------
@operator()
def relu_square(
    a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return relu(scale * a @ b.T)^2 in e4m3, and its transpose, of a (M, K), b (N, K) in e4m3.

    scale: float32, (1,). Squares above 448 become 448.
    """
    return matmul(a, b, None, scale)


@register_fake("autoresearch::relu_square")
def _(a, b, scale):
    return a.new_empty(len(a), len(b)), a.new_empty(len(b), len(a))


@operator()
def relu_square_gradient(
    a: torch.Tensor, b: torch.Tensor, squares: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale * (a @ b.T) * 2 sqrt(squares.T), the gradient of what was squared; both ways.

    a (M, K) in e5m2, b (N, K) and squares (N, M) in e4m3 -> (M, N) and (N, M) in e5m2.
    """
    return matmul(a, b, squares, scale)


@register_fake("autoresearch::relu_square_gradient")
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


# ---- Queries, keys, values ----------------------------------------------------------------------
# A head is four quarters of D / 4 channels: fast and slow angles of its first half, then of its
# second. With an offset, the slow quarters of a key are those of the token before.
@operator()
def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, part: int, offset: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the queries or keys of x (B, T, 2, H, D), part 0 or 1, turned and normalised.

    In x's dtype, (B, T, H, D), and 1 / root mean square, float32, (B, T, H). cos and sin are
    (T, 1, D), of each angle twice, the second sine with the other sign; D is a power of 2.
    """
    B, T, _, H, D = x.shape
    y, rstd = x.new_empty(B, T, H, D), x.new_empty(B, T, H, dtype=torch.float32)
    rotate_kernel[(triton.cdiv(B * T, HEAD_ROWS),)](
        *(x.contiguous(), cos.contiguous(), sin.contiguous(), y, rstd),
        *(B * T, T, H, part, EPS, offset, HEAD_ROWS, D // 4),
    )
    return y, rstd


@register_fake("autoresearch::rotate")
def _(x, cos, sin, part, offset):
    B, T, _, H, D = x.shape
    return x.new_empty(B, T, H, D), x.new_empty(B, T, H, dtype=torch.float32)


@operator()
def qkv_gradient(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, q: torch.Tensor, k: torch.Tensor,
    q_rstd: torch.Tensor, k_rstd: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    offset: bool, scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return scale * the gradient of x (B T, 3 H D) in e5m2, both ways, for those of `rotate`.

    dq, dk, dv, q, k: (B, T, H, D); scale: float32, (1,); D is a power of 2 from 64 on.
    """
    B, T, H, D = q.shape
    N, C = B * T, H * D
    out, transposed = q.new_empty(N, 3 * C, dtype=E5M2), q.new_empty(3 * C, N, dtype=E5M2)
    tables = (cos.contiguous(), sin.contiguous())
    tiles = (tiles_of(out, HEAD_ROWS, D // 4), tiles_of(transposed, D // 4, HEAD_ROWS))
    grid = (triton.cdiv(N, HEAD_ROWS),)
    for part, tensors in enumerate(((dq, q, q_rstd), (dk, k, k_rstd))):
        tensors = (t.contiguous() for t in tensors)
        numbers = (N, T, H, part * C, offset and part == 1, HEAD_ROWS, D // 4)
        rotate_gradient_kernel[grid](*tensors, *tables, *tiles, scale, *numbers)
    cast_into(dv.reshape(N, C), scale, out, transposed, 2 * C)
    return out, transposed


@register_fake("autoresearch::qkv_gradient")
def _(dq, dk, dv, q, k, q_rstd, k_rstd, cos, sin, offset, scale):
    B, T, H, D = q.shape
    shape = (B * T, 3 * H * D)
    return q.new_empty(shape, dtype=E5M2), q.new_empty(shape[::-1], dtype=E5M2)


@jit
def load_pair(x, at, inside, Q: "tl.constexpr"):
    """Return a quarter of some rows and the one that its angles turn it with, float32."""
    a = tl.load(x + at, mask=inside, other=0.0)
    b = tl.load(x + at + 2 * Q, mask=inside, other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@jit
def rotate_kernel(
    x, cos, sin, y, rstd, N, T, H, part, eps,
    OFFSET: "tl.constexpr", BM: "tl.constexpr", Q: "tl.constexpr",
):  # fmt: skip
    """BM rows, one head after another."""
    first = tl.program_id(0).to(tl.int64) * BM
    row, d = tl.arange(0, BM), tl.arange(0, Q)
    position = (first + row) % T
    inside = first + row < N
    slow_inside = inside & (position > 0) if OFFSET else inside
    angle = position[:, None] * (4 * Q) + d[None]
    c_fast, s_fast = tl.load(cos + angle), tl.load(sin + angle)
    c_slow, s_slow = tl.load(cos + angle + Q), tl.load(sin + angle + Q)
    width = H * 4 * Q
    x += first * 2 * width + part * width
    y += first * width
    for h in range(0, H):
        at = row[:, None] * (2 * width) + h * 4 * Q + d[None]
        a, b = load_pair(x, at, inside[:, None], Q)
        at += Q - 2 * width if OFFSET else Q
        slow_a, slow_b = load_pair(x, at, slow_inside[:, None], Q)
        square = tl.sum(a * a + b * b, 1) + tl.sum(slow_a * slow_a + slow_b * slow_b, 1)
        r = tl.rsqrt(square / (4 * Q) + eps)
        tl.store(rstd + (first + row) * H + h, r, mask=inside)
        at, r = row[:, None] * width + h * 4 * Q + d[None], r[:, None]
        tl.store(y + at, r * (a * c_fast + b * s_fast), mask=inside[:, None])
        tl.store(
            y + at + Q, r * (slow_a * c_slow + slow_b * s_slow), mask=inside[:, None]
        )
        tl.store(y + at + 2 * Q, r * (b * c_fast - a * s_fast), mask=inside[:, None])
        tl.store(
            y + at + 3 * Q, r * (slow_b * c_slow - slow_a * s_slow), mask=inside[:, None]
        )


@jit
def rotate_gradient_kernel(
    grad, y, rstd, cos, sin, out, transposed, scale, N, T, H, column,
    OFFSET: "tl.constexpr", BM: "tl.constexpr", Q: "tl.constexpr",
):  # fmt: skip
    """BM rows, one head after another. With OFFSET, slow quarters go to the token before."""
    first = tl.program_id(0).to(tl.int64) * BM
    row, d = tl.arange(0, BM), tl.arange(0, Q)
    slow_row = row + 1 if OFFSET else row
    inside, slow_inside = first + row < N, first + slow_row < N
    if OFFSET:
        slow_inside = slow_inside & ((first + slow_row) % T > 0)
    angle = ((first + row) % T)[:, None] * (4 * Q) + d[None]
    c_fast, s_fast = tl.load(cos + angle), tl.load(sin + angle)
    angle = ((first + slow_row) % T)[:, None] * (4 * Q) + d[None] + Q
    c_slow, s_slow = tl.load(cos + angle), tl.load(sin + angle)
    width, factor = H * 4 * Q, tl.load(scale)
    grad += first * width
    y += first * width
    rstd += first * H
    for h in range(0, H):
        at = row[:, None] * width + h * 4 * Q + d[None]
        slow_at = slow_row[:, None] * width + h * 4 * Q + d[None] + Q
        here, there = inside[:, None], slow_inside[:, None]
        fast_a, fast_b = load_pair(grad, at, here, Q)
        slow_a, slow_b = load_pair(grad, slow_at, there, Q)
        y_fast_a, y_fast_b = load_pair(y, at, here, Q)
        y_slow_a, y_slow_b = load_pair(y, slow_at, there, Q)
        # The norm's gradient is at right angles to its result, over all quarters of a row.
        along = tl.sum(fast_a * y_fast_a + fast_b * y_fast_b, 1)
        slow_along = tl.sum(slow_a * y_slow_a + slow_b * y_slow_b, 1)
        if OFFSET:
            a, b = load_pair(grad, at + Q, here, Q)
            y_a, y_b = load_pair(y, at + Q, here, Q)
            along += tl.sum(a * y_a + b * y_b, 1)
            a, b = load_pair(grad, slow_at - Q, there, Q)
            y_a, y_b = load_pair(y, slow_at - Q, there, Q)
            slow_along += tl.sum(a * y_a + b * y_b, 1)
        else:
            along += slow_along
            slow_along = along
        r = factor * tl.load(rstd + row * H + h, mask=inside, other=0.0)
        slow_r = factor * tl.load(rstd + slow_row * H + h, mask=slow_inside, other=0.0)
        n = column + h * 4 * Q
        a, b = turn_back(
            fast_a, fast_b, y_fast_a, y_fast_b, along / (4 * Q), r, c_fast, s_fast
        )
        store_both(out, transposed, first.to(tl.int32), n, a)
        store_both(out, transposed, first.to(tl.int32), n + 2 * Q, b)
        a, b = turn_back(
            slow_a,
            slow_b,
            y_slow_a,
            y_slow_b,
            slow_along / (4 * Q),
            slow_r,
            c_slow,
            s_slow,
        )
        store_both(out, transposed, first.to(tl.int32), n + Q, a)
        store_both(out, transposed, first.to(tl.int32), n + 3 * Q, b)


@jit
def turn_back(a, b, y_a, y_b, mean, rstd, c, s):
    """Return the gradients of two quarters before norm and rotation."""
    mean, rstd = mean[:, None], rstd[:, None]
    a, b = rstd * (a - y_a * mean), rstd * (b - y_b * mean)
    return a * c - b * s, b * c + a * s


# ---- Sum ----------------------------------------------------------------------------------------
def total(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of tensors of one shape and dtype, rounded once."""
    parts = tuple(t.contiguous() for t in parts)
    out = torch.empty_like(parts[0])
    total_kernel[(triton.cdiv(out.numel(), SUM_BLOCK),)](
        out, parts, out.numel(), SUM_BLOCK
    )
    return out


@jit
def total_kernel(out, parts, N, BLOCK: "tl.constexpr"):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    result = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(len(parts)):
        result += tl.load(parts[i] + at, mask=at < N, other=0.0).to(tl.float32)
    tl.store(out + at, result, mask=at < N)


# ---- Embeddings ---------------------------------------------------------------------------------
@operator()
def embedding_gradient(
    grad: torch.Tensor, ids: torch.Tensor, entries: int
) -> torch.Tensor:
    """Return for each entry the sum of the rows of grad (N, C) whose id (N,) it is.

    (entries, C), float32. Sums that cross a program are added in any order.
    """
    N, C = grad.shape
    out = grad.new_zeros(entries, C, dtype=torch.float32)
    grid = (triton.cdiv(N, SUM_ROWS), triton.cdiv(C, SUM_COLUMNS))
    embedding_gradient_kernel[grid](
        *(grad.contiguous(), *ids.int().sort(), out, N, C, SUM_ROWS, SUM_COLUMNS)
    )
    return out


@register_fake("autoresearch::embedding_gradient")
def _(grad, ids, entries):
    return grad.new_empty(entries, grad.size(1), dtype=torch.float32)


@jit
def embedding_gradient_kernel(
    grad, ids, order, out, N, C, BM: "tl.constexpr", BN: "tl.constexpr"
):
    """BM rows in the order of their ids: a product adds up those of one id."""
    at = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = at < N
    id = tl.load(ids + at, mask=inside, other=-1)
    before = tl.load(ids + at - 1, mask=inside & (at > 0), other=-1)
    first = inside & ((at % BM == 0) | (before != id))
    row = tl.load(order + at, mask=inside, other=0)
    mask = inside[:, None] & (c < C)[None]
    tile = tl.load(grad + row[:, None] * C + c[None], mask=mask, other=0.0)
    same = (id[:, None] == id[None]).to(tile.dtype)
    total = tl.dot(same, tile, input_precision="ieee")
    mask = first[:, None] & (c < C)[None]
    tl.atomic_add(out + id[:, None].to(tl.int64) * C + c[None], total, mask=mask)


def row_rmsprop(param, moment, last, ids, grad, step, beta2, lr) -> None:
    """See ops.row_rmsprop_; ids (N,) and rows of the gradient (N, C), in any order."""
    if not param.is_contiguous():
        raise ValueError(f"a table of strides {param.stride()} is not moved by row")
    N, C = grad.shape
    row_rmsprop_kernel[(N,)](
        *(param, moment, last, *ids.int().sort(), grad.contiguous()),
        *map(float, (step, beta2, lr)),
        *(N, C, ENTRY_ROWS, triton.next_power_of_2(C)),
    )


@partial(jit, do_not_specialize=["N"])  # or it compiles again where N changes
def row_rmsprop_kernel(
    param, moment, last, ids, order, grad, step, beta2, lr, N, C,
    BM: "tl.constexpr", BN: "tl.constexpr",
):  # fmt: skip
    """One entry, in the program of its first row; those of its other rows do nothing."""
    at = tl.program_id(0)
    id = tl.load(ids + at).to(tl.int64)
    before = tl.load(ids + at - 1, mask=at > 0, other=-1)
    if before != id:
        c = tl.arange(0, BN)
        total = tl.zeros((BN,), tl.float32)
        more = at < N
        while more:
            rows = at + tl.arange(0, BM)
            same = tl.load(ids + rows, mask=rows < N, other=-1) == id
            rows = tl.load(order + rows, mask=same, other=0)
            mask = same[:, None] & (c < C)[None]
            tile = tl.load(grad + rows[:, None] * C + c[None], mask=mask, other=0.0)
            total += tl.sum(tile.to(tl.float32), 0)
            at += BM
            more = tl.min(same.to(tl.int32), 0) == 1
        gap = step - tl.load(last + id)
        kept = tl.exp2(gap * tl.log2(beta2)) * tl.load(moment + id)
        square = kept + (1 - beta2) * tl.sum(total * total, 0) / C
        update = total * tl.rsqrt(tl.maximum(square, 1e-30))
        place = param + id * C + c
        value = tl.load(place, mask=c < C, other=0.0)
        tl.store(place, value - lr * update, mask=c < C)
        tl.store(moment + id, square)
        tl.store(last + id, step)


# ---- Cross-entropy ------------------------------------------------------------------------------
@operator(writes="raw")
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


@register_fake("autoresearch::cross_entropy")
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
    raw += row * V
    target = tl.load(y + row).to(tl.int32)
    valid = (target >= 0) & (target < V)  # an id that there is not makes the loss NaN
    own = tl.load(
        raw + target, mask=valid, other=float("nan")
    )  # before it is written over
    r = sigmoid_of(tl.load(raw + ids, mask=inside, other=0.0), softcap)
    # The cap keeps the exponentials finite: no maximum has to be found first.
    cap = softcap * LOG2E
    p = tl.where(inside, tl.exp2(cap - 2 * cap * r), 0.0)
    total = tl.sum(p, 0)
    tl.store(loss + row, tl.log(total) - softcap * (1 - 2 * sigmoid_of(own, softcap)))
    slope = p * (1 / total) - tl.where(ids == target, 1.0, 0.0)
    slope *= 4 * (r - r * r)  # 1 - tanh^2
    tl.store(raw + ids, slope.to(raw.dtype.element_ty), mask=inside)


@jit
def sigmoid_of(raw, softcap):
    """Return r, of which tanh(raw / softcap) is 1 - 2 r, by exp2, which is one instruction."""
    LOG2E: tl.constexpr = 1.4426950408889634
    return 1 / (tl.exp2(raw.to(tl.float32) * (2 * LOG2E / softcap)) + 1)
