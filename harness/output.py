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


def host_line(starved: int, steps: int, paces: list[float]) -> str:
    """Return a warning of a GPU that waited for the host, or of an uneven pace; "" of neither.

    starved: steps that the GPU was idle before; paces: tokens per second of each.
    """
    if starved <= steps / 2:
        return uneven_line(paces)
    share = 100 * starved / steps
    what = f"before {share:.0f} % of the steps the GPU had nothing to do"
    why = "Python sets the pace, and less work per step makes no more steps, or train.py waits"
    return warning("host", f"{what}: {why} for the GPU in each step (.item())")


EVEN = 0.9  # of the pace that a tenth of the steps have, what nine tenths have at least


def uneven_line(paces: list[float]) -> str:
    """Return a warning that the pace varied, "" if it did not.

    On an H200 they had 0.92 to 0.97 of it, and 0.81 to 0.89 in four runs that lost 2 to 7 %
    of their steps to a busy host (docs/LOG.md). A GPU that gets warm loses less.
    """
    paces, tenth = sorted(paces), len(paces) // 10
    if tenth < 2 or paces[tenth] >= EVEN * paces[-1 - tenth]:
        return ""
    slower = 100 - 100 * paces[tenth] / paces[-1 - tenth]
    what = (
        f"a tenth of the steps were {slower:.0f} % slower than the fastest tenth, or more"
    )
    why = "something else uses the machine, or train.py has steps of several lengths"
    return warning("host", f"{what}: {why}")


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
