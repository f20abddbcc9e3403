"""Lines of the log that tools read, warnings and steps, and words of messages.

The summary's text is in constants.py.
"""

import re

import constants as C


def warning(kind: str, text: str) -> str:
    """Return a warning's line; kind: one of C.WARNINGS, which says whether it voids the run."""
    if kind not in C.WARNINGS:
        raise ValueError(f"{kind!r} is no kind of warning; constants.py lists them")
    return f"warning: {kind}: {text}"


def starved_line(share: float) -> str:
    """Return a warning that in this share of the steps the GPU was done before the host."""
    what = (
        f"in {100 * share:.0f} % of the steps the GPU was done before the next was queued"
    )
    why = "Python sets the pace, and less work per step makes no more steps, or train.py waits"
    return warning("host", f"{what}: {why} for the GPU in each step (.item())")


def step_line(step, remaining: float) -> str:
    """Return the line of a finished `run.Step`; remaining: seconds of the budget."""
    return (
        f"step {step.number:05d} ({100 * step.progress:.1f}%) | loss: {step.loss:.4f} | "
        f"lrm: {step.lrm:.2f} | dt: {1000 * step.seconds:.0f}ms | "
        f"tok/sec: {step.tokens / step.seconds:,.0f} | epoch: {step.epoch} | "
        f"remaining: {max(0.0, remaining):.0f}s"
    )


def plural(n: int, thing: str) -> str:
    """Return a number with its noun, such as "1 file" or "2,000 files"."""
    return f"{n:,} {thing}" + ("" if n == 1 else "s")


def clean(text: str) -> str:
    """Return one line of `text` without addresses, which may be signed."""
    return re.sub(r"\w+://\S+|url: \S+", "...", " ".join(text.split()))
