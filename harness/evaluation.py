"""Bits per byte of a model that gives logits, and the checks that it is one."""

import math
from collections.abc import Callable, Iterable

import torch

import constants as C
from harness.ops import compiled

Model = Callable[[torch.Tensor], torch.Tensor]  # idx (B, T) -> logits (B, T, V)

# Checks in one evaluation; each is one call of the model. A check cuts all rows but one
# in REPLAYED, so 64 rows have 14 * 60 = 840 cuts, and each cut tries one position. A leak
# at one position in 600 is missed with a chance of (599 / 600)^840 = 0.25.
CHECKS, REPLAYED = 14, 16
# What a model does wrong, and what to do if its logits moved far.
STATE = "keeps state between calls or is random in evaluation mode"
MIXES, FUTURE = "mixes rows", "sees the future"
ADVICE = {
    STATE: "take out dropout, running statistics, caches and sums in random order",
    MIXES: "look for means, scales, sorts and limits over the batch",
    FUTURE: "look at masks, at shifts (roll, pad) and for means over positions",
}
ROUNDING = (  # if they moved a little
    "so small a move is rounding that depends on other rows or positions: scale per "
    "token, not per tensor, keep maxima and sums over positions in float32, use no batch "
    "statistics"
)


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


def largest_moves(a: torch.Tensor, b: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Return how far logits `b` (R, T, V) are from `a` in each row at most, (R,).

    seen: the positions that count, bool (R, T). NaN at one of them gives NaN.
    """
    n = max(1, 2**24 // a[0].numel())  # rows at once: one of the full rules, for memory
    parts = zip(a.split(n), b.split(n), seen.split(n), strict=True)
    wide = torch.promote_types(a.dtype, torch.float32)
    gaps = [((q - p.to(wide)).abs_().amax(2), mask) for p, q, mask in parts]
    return torch.cat([gap.masked_fill(~mask, 0).amax(1) for gap, mask in gaps])


def moved(gaps: torch.Tensor) -> bool:
    """Return whether one of `gaps` is more than rounding; NaN is."""
    return not bool((gaps <= C.LOGIT_TOLERANCE).all())


class Probe:
    """Rows with known logits, for checks in which the model is called on them again.

    A check gives each row a cut of its own and replaces the ids from there on: the logits
    before it must stay, and the last position before it shows a shift. Every 16th row is
    only replayed, in each check another, and must stay as a whole. In an evaluation the
    rows come from many batches, so each has other neighbours than before.

    The generator is the harness's own and has the run's seed: a run can be repeated, and
    runs with other seeds try other positions. Nothing is read before `judge`, so that the
    device need not wait.
    """

    def __init__(
        self,
        idx: torch.Tensor,
        logits: torch.Tensor,
        checks: int,
        kept: int | None = None,
    ):
        """idx: ids (B, T), T at least 3; kept: rows that are compared, all by default."""
        B, T = idx.shape
        place = {"device": idx.device}
        self.first, self.idx = idx, idx.clone()
        self.base = logits[:kept].clone()  # a captured graph would write over it
        # Of all logits, by whoever has them: not finite if one of them is not.
        self.total = torch.zeros((), dtype=torch.float64, device=idx.device)
        self.checks, self.done, self.used = checks, 0, 0
        self.period = min(REPLAYED, max(2, len(self.base)))
        self.cuts = torch.full((checks, B), T, **place)
        self.gaps = torch.zeros(checks, len(self.base), **place)
        self.random = {"generator": torch.Generator(idx.device), **place}
        self.random["generator"].manual_seed(C.SEED)
        # All cuts there are, each once before one comes again; both ends come first.
        middle = 2 + torch.randperm(T - 3, **self.random)
        self.order = torch.cat([torch.arange(1, T, T - 2, **place), middle])

    def replays(self, row: int | torch.Tensor, check: int) -> bool | torch.Tensor:
        """Return whether a check replays a row of the batch without replacing ids."""
        return (row + check + 1) % self.period == 0

    def keep(self, idx: torch.Tensor, logits: torch.Tensor, rows: Iterable[int]) -> None:
        """Take `rows` of another batch in the place of those that were known.

        The first batch's rows that the last check replays stay: they show a slow drift.
        """
        for row in rows:
            if not self.replays(row, self.checks - 1):
                self.idx[row] = idx[row]
                self.base[row] = logits[row]

    def draw_cuts(self) -> torch.Tensor:
        """Return the next check's cut of each row, (B,), T for a row that is replayed."""
        B, T = self.idx.shape
        rows = torch.arange(B, device=self.idx.device)
        replayed = self.replays(rows, self.done)
        number = self.used + (~replayed).cumsum(0) - 1  # of each cut so far
        self.used += sum(not self.replays(row, self.done) for row in range(B))
        cuts = self.order[number % len(self.order)]
        # Half of them at the start of a document, if one starts inside the row: half of
        # those replace BOS itself, half only what follows it.
        starts = self.idx == C.BOS_ID
        starts[:, 0] = False
        start = (starts * (1 - torch.rand(B, T, **self.random))).argmax(1)
        coins = torch.rand(2, B, **self.random) < 0.5
        start = (start + coins[1]).clamp(max=T - 1)
        cuts = torch.where(coins[0] & starts.any(1) & (number > 1), start, cuts)
        return cuts.masked_fill(replayed, T)

    def replace(self, mask: torch.Tensor) -> torch.Tensor:
        """Return the rows' ids, where `mask` is set never the same."""
        shift = torch.randint(1, C.VOCAB_SIZE, self.idx.shape, **self.random)
        return torch.where(mask, (self.idx + shift) % C.VOCAB_SIZE, self.idx)

    def check(self, model: Model) -> None:
        """Call the model once, and note how far the logits moved that should not."""
        n, T = len(self.base), self.idx.shape[1]
        cuts = self.draw_cuts()
        after = torch.arange(T, device=cuts.device) >= cuts[:, None]  # (B, T)
        logits = call_model(model, self.replace(after))
        self.total += logits.sum(dtype=torch.float32)
        self.gaps[self.done] = largest_moves(self.base, logits[:n], ~after[:n])
        self.cuts[self.done] = cuts
        self.done += 1

    def judge(self, model: Model) -> None:
        """Refuse the model, by RuntimeError, if a check has shown that it is none.

        Only then it is called again, to tell what it does.
        """
        gaps = self.gaps.cpu()
        if not math.isfinite(float(self.total) + float(gaps.sum())):
            advice = (
                "a nan comes of an overflow or 0 / 0; mask an id by -1e4, "
                "not by -inf or finfo.min"
            )
            problem = f"the model gave logits that are not finite; {advice}"
            raise RuntimeError(f"evaluation refused: {problem}")
        if moved(gaps):
            what = self.explain(model, gaps)
            check, row = divmod(int(gaps.argmax()), gaps.shape[1])
            where = f" from {self.cuts[check, row]} on" if what == FUTURE else ""
            size = float(gaps.max())
            advice = ADVICE[what] if size > 100 * C.LOGIT_TOLERANCE else ROUNDING
            problem = f"the model {what}{where}; moved {size:.3g}: {advice}"
            raise RuntimeError(f"evaluation refused: {problem}")

    def explain(self, model: Model, gaps: torch.Tensor) -> str:
        """Return what a model does whose logits moved by `gaps`, (checks, rows)."""
        n, rows = len(self.base), torch.arange(len(self.idx), device=self.idx.device)
        every = torch.ones_like(self.idx, dtype=torch.bool)[:n]
        again = largest_moves(self.base, call_model(model, self.first)[:n], every)
        if moved(again[self.replays(rows[:n], self.checks - 1)]):
            return STATE
        check, row = torch.meshgrid(*map(torch.arange, gaps.shape), indexing="ij")
        mixes = moved(gaps[self.replays(row, check)])
        for parity in (0, 1):  # other ids in every second row: the others must stay
            other = self.replace((rows % 2 == parity)[:, None])
            gap = largest_moves(self.base, call_model(model, other)[:n], every)
            mixes |= moved(gap[1 - parity :: 2])
        return MIXES if mixes else FUTURE


@torch.no_grad()
def check_model(
    model: Model, idx: torch.Tensor, checks: int = 2, kept: int | None = None
) -> None:
    """Refuse, by RuntimeError, a model that keeps state, sees the future or mixes rows.

    By one call on idx (B, T) and one for each check. kept: rows that are compared, all by
    default; fewer take less memory.
    """
    logits = call_model(model, idx)
    probe = Probe(idx, logits, checks, kept)
    probe.total += logits.sum(dtype=torch.float32)
    del logits  # gigabytes, which the next call can use
    for _ in range(checks):
        probe.check(model)
    probe.judge(model)


@compiled
def nats_of(logits: torch.Tensor, y: torch.Tensor, counted: torch.Tensor):
    """Return the sum of the cross-entropies of y (B, T) where `counted`, and that of the logits.

    In nats, float64; the second is not finite if a logit is not. Cross-entropies are in float32,
    whatever the logits are; compiled, so that these are read once or twice.
    """
    wide = logits.float()
    own = wide.gather(-1, y[..., None]).squeeze(-1)
    nats = (wide.logsumexp(-1) - own) * counted
    totals = wide.sum(-1)  # by position, so that one kernel reads for both
    return nats.sum(dtype=torch.float64), totals.sum(dtype=torch.float64)


@torch.no_grad()
def evaluate_bpb(
    model: Model,
    rows: torch.Tensor,
    sizes: torch.Tensor,
    batch_size: int,
    checks: int = CHECKS,
) -> float:
    """Return the bits per byte of `model` over all of `rows`, whatever the batch size.

    rows: ids (R, T + 1); sizes: bytes of each token, (V,), 0 for special ones, which do
    not count; checks: calls beside those for the rows, spread evenly between them.
    Cross-entropy is computed here, in float32. RuntimeError refuses a model.
    """
    # Nats and bytes: read once at the end, so that the device need not wait.
    sums = torch.zeros(2, dtype=torch.float64, device=rows.device)
    probe, batches = None, math.ceil(len(rows) / batch_size)
    padding = torch.arange(batch_size, device=rows.device)
    for number in range(batches):
        batch = rows[number * batch_size :][:batch_size].long()
        n = len(batch)
        # Every call has one shape; the rows that fill the last one up are not counted.
        padded = torch.cat([batch, batch[:1].expand(batch_size - n, -1)])
        idx = padded[:, :-1].contiguous()
        logits = call_model(model, idx)
        if probe is None:
            probe = Probe(idx, logits, checks)
        else:  # between checks, every row is taken from another batch if there is one
            stride = max(1, batches // checks)
            probe.keep(idx, logits, range(number % stride, batch_size, stride))
        y = padded[:, 1:]
        nbytes = sizes[y].masked_fill(padding[:, None] >= n, 0)  # (B, T)
        nats, total = nats_of(logits, y, nbytes > 0)
        probe.total += total
        sums += torch.stack([nats, nbytes.sum()])
        del logits  # gigabytes, which the next call can use
        while probe.done < checks * (number + 1) // batches:
            probe.check(model)
    probe.judge(model)
    return bits_per_byte(float(sums[0]), int(sums[1]))
