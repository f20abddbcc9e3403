"""Bits per byte of a model that gives logits, and the checks that it is one."""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F

import constants as C

Model = Callable[[torch.Tensor], torch.Tensor]  # idx (B, T) -> logits (B, T, V)
RANDOM = "keeps state between calls or is random in evaluation mode"


def bits_per_byte(nats: float, nbytes: int) -> float:
    """Return cross-entropy in bits per byte of text, from the sums of nats and of bytes.

    Source: arXiv:2101.00027, section 3.1.
    """
    return nats / (math.log(2) * nbytes)


def call_model(model: Model, idx: torch.Tensor) -> torch.Tensor:
    """Return model(idx); RuntimeError if it is not logits of shape (B, T, V)."""
    logits = model(idx)
    expected = (*idx.shape, C.VOCAB_SIZE)
    got = type(logits).__name__
    if isinstance(logits, torch.Tensor):
        if logits.shape == expected and logits.is_floating_point():
            return logits
        got = f"{tuple(logits.shape)} {logits.dtype}"
    problem = f"model(idx) gave {got}, not logits {expected}"
    raise RuntimeError(f"evaluation refused: {problem}")


def refuse_unless_finite(total: float | torch.Tensor) -> None:
    """Refuse, by RuntimeError, logits whose sum is not finite."""
    if not math.isfinite(total):
        problem = "the model gave logits that are not finite"
        raise RuntimeError(f"evaluation refused: {problem}")


def refuse_if_moved(a: torch.Tensor, b: torch.Tensor, what: str = RANDOM) -> None:
    """Refuse, by RuntimeError, logits `b` that are not `a` again up to rounding.

    what: what the model does wrong if they moved.
    """
    pairs = zip(a, b, strict=True)  # one row at a time, for less memory
    gaps = (float((p.float() - q.float()).abs().max()) for p, q in pairs)
    moved = max(gaps, default=0.0)
    if moved > C.LOGIT_TOLERANCE:
        raise RuntimeError(f"evaluation refused: the model {what}; moved {moved:.3g}")


@torch.no_grad()
def check_model(
    model: Model,
    idx: torch.Tensor,
    cuts: Iterable[int] | None = None,
    kept: int | None = None,
) -> torch.Tensor:
    """Refuse, by RuntimeError, a model that keeps state, sees the future or mixes rows.

    After each of the cuts (four by default) the ids of every second row of idx (B, T) are
    replaced: logits before the cut and in the other rows must stay; the last position
    before it shows a shift. kept: rows that are compared, all by default; fewer take less
    memory. Returns the logits of the first eight rows, for a later comparison.
    """
    T = idx.shape[1]
    generator = torch.Generator(idx.device).manual_seed(0)
    options = {"generator": generator, "device": idx.device}
    logits = call_model(model, idx)
    refuse_unless_finite(logits.sum(dtype=torch.float32))
    base = logits[:kept].clone()  # a captured graph would write over it
    del logits  # gigabytes, which the next call can use
    refuse_if_moved(base, call_model(model, idx)[:kept])
    for cut in (1, T // 3, T // 2, T - 1) if cuts is None else cuts:
        changed = idx.clone()
        part = changed[::2, cut:]
        shift = torch.randint(1, C.VOCAB_SIZE, part.shape, **options)
        part.copy_((part + shift) % C.VOCAB_SIZE)  # never the same id
        logits = call_model(model, changed)[:kept]
        before = base[::2, :cut], logits[::2, :cut]
        refuse_if_moved(*before, f"sees the future from {cut} on")
        refuse_if_moved(base[1::2], logits[1::2], "mixes rows")
        del logits, before
    return base[:8].clone()  # not a view: the whole is gigabytes


@torch.no_grad()
def evaluate_bpb(
    model: Model, rows: torch.Tensor, sizes: torch.Tensor, batch_size: int
) -> float:
    """Return the bits per byte of `model` over all of `rows`, whatever the batch size.

    rows: ids (R, T + 1); sizes: bytes of each token, (V,), 0 for special ones, which do
    not count. Cross-entropy is computed here, in float32. RuntimeError refuses a model.
    """
    first = rows[:batch_size, :-1].long().contiguous()
    base = check_model(model, first)
    # Nats, bytes, logits: read once at the end, so that the device need not wait.
    sums = torch.zeros(3, dtype=torch.float64, device=rows.device)
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size].long()
        n = len(batch)
        # Every call has one shape; the rows that fill the last one up are not counted.
        padded = torch.cat([batch, batch[:1].expand(batch_size - n, -1)])
        idx = padded[:, :-1].contiguous()
        logits = call_model(model, idx)[:n]
        sums[2] += logits.sum(dtype=torch.float32)
        for part, ids in zip(logits.split(8), batch.split(8), strict=True):
            part = part.float().flatten(0, 1)  # (b * T, V)
            y = ids[:, 1:].flatten()  # (b * T,)
            loss = F.cross_entropy(part, y, reduction="none").double() * (sizes[y] > 0)
            sums[:2] += torch.stack([loss.sum(), sizes[y].sum()])
        del logits, part, loss  # as above
    refuse_unless_finite(sums[2])
    refuse_if_moved(base, call_model(model, first)[: len(base)])  # shows a slow drift
    return bits_per_byte(float(sums[0]), int(sums[1]))
