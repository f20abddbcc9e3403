"""What the page of a night says, piece by piece; a notebook shows the same pieces."""

from __future__ import annotations

import base64
import html
import math
from collections import Counter
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from loop.night import BASELINE_RUNS, CONTROL_EVERY
from loop.verdict import DRIFT, FLOOR
from morning.parts import touched, twins
from morning.picture import draw_drift, draw_night, png

if TYPE_CHECKING:  # it imports this file
    from analysis import Change, Night

NEAR = 0.5  # times the noise: the least gain of a near miss
MOST = 8  # lines of a list
FEW = 2  # experiments, after which no part of train.py is missed yet


def student(freedom: int) -> float:
    """Return Student's two-sided 95 % point, for 2 degrees of freedom or more.

    Source: Abramowitz and Stegun 26.7.5; within 1 %.
    """
    z, n = NormalDist().inv_cdf(0.975), max(2, freedom)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / n**i for i, term in enumerate(terms))


class Html(str):
    """Text that a notebook shows as HTML."""

    def _repr_html_(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return "HTML"


@dataclass
class Picture:
    """The picture of a night, which a notebook shows."""

    night: Night

    def _repr_png_(self) -> bytes:
        return png(draw_night(self.night, headline(self.night)))

    def __repr__(self) -> str:
        return headline(self.night)


def many(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def on_gpu(gpu: str) -> str:
    return f" on GPU {gpu}" if gpu else ""


def headline(night: Night) -> str:
    """Return the night in one line."""
    tried = night.experiments
    experiments = many(tried, "experiment")
    if not night.best:
        return (
            f"No result yet: {experiments} without a number" if tried else "No result yet"
        )
    noise = f"noise {night.noise:.4f}" + ("" if night.spare else " (assumed)")
    if not tried:
        start = f"{night.start.mean:.4f}{on_gpu(night.start.gpu)}"
        return f"{start}, the baseline alone, {noise}"
    kept = f"{night.outcomes['keep']} kept"
    if out := night.outcomes["withdrawn"] + night.outcomes["on withdrawn"]:
        kept += f", {out} left out"
    ends = f"{night.start.mean:.4f} \u2192 {night.best.mean:.4f}{on_gpu(night.best.gpu)}"
    ends += "" if night.one_speed else " at another speed"
    if night.best.gpu:
        return f"{night.title}{ends}, {noise}; all GPUs: {experiments}, {kept}"
    return f"{night.title}{ends}, {experiments}, {kept}, {noise}"


def gain_words(change: Change) -> tuple[str, str]:
    """Return a gain, also in noises; nothing where there is none."""
    if math.isnan(change.gain):
        return "", ""
    return f"{change.gain:+.4f}", f"{change.times:+.1f}"


def table(changes: list[Change], last: str) -> str:
    """Return changes as an HTML table; its last column is their attribute `last`."""
    lines = [["#", "idea", "val_bpb", "runs", "gain", "in noises", "commit", last]]
    for c in changes:
        number = "" if c.revert else c.number
        line = [f"{number}{on_gpu(c.gpu)}", c.idea, f"{c.mean:.6f}" if c.values else ""]
        line += [len(c.values), *gain_words(c), c.commit, getattr(c, last)]
        lines.append(line)
    cells = [[f"<td>{html.escape(str(cell))}" for cell in line] for line in lines]
    return f"<table>{''.join('<tr>' + ''.join(line) for line in cells)}</table>"


def believe(night: Night) -> Html:
    """What to believe: each kept gain against its error, luck, and the machine's drift."""
    text = ["<h2>What to believe</h2>"]
    for gpu, (noise, spare) in night.noises.items() or [("", (FLOOR, 0))]:
        if not spare:
            here = f"No commit gave two numbers{on_gpu(gpu)}"
            text.append(f"{here}, so a noise of {FLOOR} is assumed.")
        elif gpu:
            text.append(f"The noise{on_gpu(gpu)} is {noise:.4f}.")
    kept = [c for c in night.tried("keep") if not math.isnan(c.gain)]
    if kept:
        believed = Counter(c.believe for c in kept)
        stand = f"{believed['stands']} of {many(len(kept), 'kept change')}"
        stand = stand if believed["stands"] else "No kept change"
        bars = sorted({f"{c.stands:.1f}" for c in kept})
        bar = f"{' or '.join(bars)} times the standard error"
        bar += ", the less the more its GPU repeated" if len(bars) > 1 else ""
        said = [f"<b>{stand}</b> gained more than {bar}."]
        if n := believed["may be luck"]:
            said.append(f"{n} may be luck: another run may undo the gain.")
        if n := believed["no gain"]:
            said.append(f"{n} gained nothing that shows, as simpler code may.")
        text.append(" ".join(said))
        text.append(table(kept, "believe"))
        text.append("In noises of the whole night; a verdict went by those known then.")
    if night.luck and night.best:
        here, n = on_gpu(night.best.gpu), len(night.rivals)
        text.append(
            f"<b>Luck.</b> The whole gain{here} is {night.gain:.4f}. If no change did anything, "
            f"the lowest of {n} single runs would still lie {night.luck:.4f} below the start."
        )
    if night.best:
        text.append(f"<b>Drift.</b> {drift_words(night)}")
    else:
        text.append("Nothing has been measured yet.")
    return Html("\n<p>".join(text))


def drift_words(night: Night) -> str:
    """Say whether the machine stayed the same."""
    controls = [c for c in night.controls if not math.isnan(c[2])]
    text = [many(len(controls), "control") + ": an earlier commit ran again."]
    if not controls:
        text = ["No commit ran again later with its speed in the log."]
    elif far := [c for c in controls if abs(c[2]) > DRIFT]:
        where = [
            f"{moved:+.1%} at experiment {at}{on_gpu(run.gpu)}" for run, at, moved in far
        ]
        where = ", ".join(where[:MOST]) + (", ..." if where[MOST:] else "")
        text.append(f"<b>{len(far)} changed speed by over {DRIFT:.0%}</b> ({where}).")
        text.append("A gain is therefore between runs of one speed.")
    else:
        most = max(abs(c[2]) for c in controls)
        text.append(f"Speed was within {most:.1%} of the commit's first run.")
    if night.odd:
        odd = many(night.odd, "run")
        text.append(f"{odd} had a speed that did not come again: left out.")
    steps, bpb, spare = night.drift()
    if spare > 0 and steps.std() > 1e-3 and bpb.std() > 0:
        slope, r = (steps @ bpb) / (steps @ steps), np.corrcoef(steps, bpb)[0, 1]
        if abs(r) * math.sqrt(spare) > student(spare) * math.sqrt(max(0, 1 - r * r)):
            text.append(
                f"For one commit, 1 % more steps went with {slope / 100:+.4f} (r = {r:.2f}): "
                "where speed changed, compare the steps of two runs too."
            )
    elif not controls:
        text.append("So drift would not show.")
    return " ".join(text)


def again(night: Night, change: Change) -> str:
    """Return the command that brings a discarded attempt back; "" where git does not know."""
    if change.status != "discard" or not change.parent:
        return ""
    if night.at_best(change):
        return f"git restore --source {change.commit} train.py"
    return f"git show {change.commit} | git apply"


def how_again(night: Night, lists: list[str]) -> list[str]:
    """Say what comes after the commands in these lists, and what it does."""
    shown = "".join(lists)
    if "<code>" not in shown:
        return []
    tree = " in the tree of its GPU" if any(c.gpu for c in night.changes) else ""
    run = 'then <code>uv run experiment.py run "IDEA"</code>'
    text = [f"To run one again{tree}: its command, {run}."]
    if "<code>git restore" in shown:
        text.append(
            "After git restore, which writes over a draft in train.py, the commit runs with "
            "its next seed, and the mean of all its runs decides."
        )
    if "<code>git show" in shown:
        text.append("After git apply, the edit is a new experiment on today's best.")
    return [" ".join(text)]


def listed(night: Night, title: str, changes: list[Change]) -> list[str]:
    """Return changes as an HTML list, the largest gains first; [] where there are none."""
    lines = []
    for c in sorted(changes, key=lambda c: -c.gain):
        gain, times = gain_words(c)
        gain = f" (gain {gain}, {times} noises)" if gain else ""
        command = again(night, c)
        command = f": <code>{command}</code>" if command else ""
        where = html.escape(c.idea) + on_gpu(c.gpu)
        lines.append(f"<li><b>{c.number}</b> {where}{gain}{command}")
    lines[MOST:] = [f"<li>and {len(lines) - MOST} more"] if lines[MOST:] else []
    return [f"{title}.<ul>{''.join(lines)}</ul>"] if lines else []


def try_next(night: Night) -> Html:
    """What to try next: near misses, what may be luck, parts of train.py without a keep."""
    dropped = night.tried("discard")
    measured = {c.number for c in night.every if c.values}
    bests = [(c, best) for c in dropped for best in night.chain(c.gpu)[-1:]]
    below = [c for c, best in bests if c.over(best) >= NEAR * c.noise]
    near = [c for c in dropped if c.times >= NEAR and c not in below]
    lucky = [c for c in night.tried("keep") if c.believe == "may be luck"]
    crashed = [c for c in night.tried("crash") if c.number not in measured]
    lists = listed(night, "Discarded, though below today's best: run them again", below)
    title = f"Near misses, from {NEAR} noise on: run them again, or two together"
    lists += listed(night, title, near)
    text = ["<h2>What to try next</h2>", *lists, *how_again(night, lists)]
    control = f"The best runs again after every {CONTROL_EVERY} experiments, as a control"
    new = f"a new night from it begins with {BASELINE_RUNS} runs of it"
    text += listed(night, f"Kept, but may be luck. {control}, and {new}", lucky)
    title = "Never measured, because every run crashed or was void"
    text += listed(night, title, crashed)
    where = touched(night) if night.experiments > FEW else {}
    never = [name for name, changes in where.items() if not changes]
    kept = {
        name
        for name, changes in where.items()
        if any(c.status == "keep" for c in changes)
    }
    ideas = {name: len({c.number for c in changes}) for name, changes in where.items()}
    lost = [f"{name} ({n})" for name, n in ideas.items() if n and name not in kept]
    for words, names in (
        ("none of whose experiments was kept", lost),
        ("that no experiment touched", never),
    ):
        text += (
            [f"Parts of train.py {words}: {html.escape(', '.join(names))}."]
            if names
            else []
        )
    return Html("\n<p>".join(text if text[1:] else [*text, "Nothing stands out yet."]))


def best_commit(night: Night) -> Html:
    """The best commit, the command that shows its diff, and the counts."""
    text, best = ["<h2>The best commit</h2>"], night.best
    if best:
        runs = many(len(best.values), "run") + on_gpu(best.gpu)
        text.append(html.escape(f"{best.commit}, {best.idea}: {best.mean:.6f}, {runs}."))
        last = [c for c in night.changes if c.gpu == best.gpu and c.status == "keep"][-1]
        if last is not best:
            at = f"The branch is at {last.commit}, {last.idea}, which was kept after it"
            at += f": {last.mean:.6f}. That is what a merge takes over."
            text.append(html.escape(at))
        if found := twins(night):
            means = ", ".join(f"{c.mean:.6f}{on_gpu(c.gpu)}" for c in found)
            text.append(f"The same train.py gave {means}.")
        command = f"git diff {night.start.commit} {best.commit} -- train.py"
        if best.parent and best is not night.start:  # git knows it
            text.append(f"<pre>{html.escape(command)}</pre>")
    text += [said] if (said := counts(night)) else []
    if night.strays:
        lines = "\n".join(line[:90] for line in night.strays[:MOST])
        text.append(f"Lines of the log that are no runs: {len(night.strays)}.")
        text.append(f"<pre>{html.escape(lines)}</pre>")
    return Html("\n<p>".join(text))


def counts(night: Night) -> str:
    """Say how the experiments and the runs ended; what there was none of is left out."""
    ends = {
        "kept": night.outcomes["keep"],
        "discarded": night.outcomes["discard"],
        "going on": night.outcomes["going on"],
        "without a number": night.outcomes["crash"],
        "withdrawn as broken": night.outcomes["withdrawn"],
        "made on top of what was withdrawn": night.outcomes["on withdrawn"],
    }
    every = [(run, bool(c.gone)) for c in night.every for run in c.runs]
    crashed = [run for run, gone in every if not run.valid and not gone]
    void = sum(bool(run.void) or run.description.endswith(", void") for run in crashed)
    out = sum(gone for _, gone in every)
    runs = {
        "counted": len(every) - out - night.odd - len(crashed),
        "crashed": len(crashed) - void,
        "void": void,
        "at a speed that did not come again": night.odd,
        "left out with what was withdrawn": out,
    }
    said = []
    for word, found in (("experiment", ends), ("run", runs)):
        pieces = ", ".join(f"{n} {how}" for how, n in found.items() if n)
        said += [f"{many(sum(found.values()), word)}: {pieces}."] if pieces else []
    return " ".join(said)


def everything(night: Night) -> Html:
    """Every experiment of the night, and below them why some were withdrawn."""
    text = "<h2>Every experiment</h2>" + table(night.every, "outcome")
    lines = []
    for c in night.every:
        if c.status == "withdrawn":
            why = next(run.void for run in c.runs if run.measured)
            lines.append(f"<li>{html.escape(f'{c.commit}, {c.idea}: {why}')}")
    if lines:
        text += f"<p>Withdrawn as broken, and why:<ul>{''.join(lines)}</ul>"
        text += "No gain, noise or picture counts these, or what was made on top of them."
    return Html(text)


STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --paper: #fff; --line: #d8dee4 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --paper: #0d1117; --line: #30363d } }
body { margin: 0 auto; padding: 1.5rem; max-width: 1080px; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
p { margin: .5rem 0 } ul { margin: .25rem 0; padding-left: 1.4rem }
img { display: block; width: 100%; margin: 1rem 0 } summary { cursor: pointer; margin-top: 2rem }
table { border-collapse: collapse; font-size: .85rem; width: 100%; margin: .5rem 0 }
td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap }
td:nth-child(2) { white-space: normal; overflow-wrap: anywhere; width: 99% }
tr:first-child { font-weight: bold }
pre { border: 1px solid var(--line); padding: .6rem; border-radius: 6px; overflow-x: auto }
"""


def write_page(night: Night) -> str:
    """Return the page: one file, its pictures inside, for light and dark screens."""

    def image(draw, words: str) -> str:
        drawn = [png(draw(night, dark=dark)) for dark in (False, True)]
        light, dark = (base64.b64encode(data).decode() for data in drawn)
        start, media = "data:image/png;base64,", "(prefers-color-scheme: dark)"
        source = f'<source srcset="{start}{dark}" media="{media}">'
        return f'<picture>{source}<img src="{start}{light}" alt="{words}"></picture>'

    moved = any(not math.isnan(change) for _, _, change in night.controls)
    title = html.escape(headline(night))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>
<h1>{title}</h1><p>{html.escape(night.note)}</p>
{image(draw_night, "val_bpb of every experiment")}
{believe(night)}
{image(draw_drift, "speed and val_bpb of repeated commits") if moved else ""}
{try_next(night)}
{best_commit(night)}
<details><summary>Every experiment</summary>{everything(night)}</details>
</body></html>
"""
