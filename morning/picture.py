"""The pictures of a night, for analysis.py: no state, no window, light or dark."""

import contextlib
import io
import itertools
import math
import textwrap
import warnings

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.patheffects import withStroke

LIGHT = {"ink": "#1f2328", "paper": "#ffffff", "faint": "#8c959f", "grid": "#d8dee4"}
DARK = {"ink": "#e6edf3", "paper": "#0d1117", "faint": "#7d8590", "grid": "#30363d"}
GPUS = [
    "#1a9850",
    "#2f81f7",
    "#d9830f",
    "#a371f7",
    "#d6409f",
    "#2bb3b3",
    "#8d6e4a",
    "#777",
]
CRASH = "#d1242f"


def blank(height: float, panels: int, colors: dict) -> tuple[Figure, list]:
    """Return a figure 9.6 inches wide and its axes, side by side."""
    ink = ["text.color", "axes.labelcolor", "xtick.color", "ytick.color"]
    style = dict.fromkeys(ink, colors["ink"]) | {"axes.edgecolor": colors["faint"]}
    style |= {"axes.facecolor": colors["paper"], "grid.color": colors["grid"]}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    style |= {"axes.grid": True, "axes.axisbelow": True}
    with matplotlib.rc_context(style):
        figure = Figure((9.6, height), facecolor=colors["paper"], layout="constrained")
        FigureCanvasAgg(figure)
        return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def draw_night(night, title: str = "", dark: bool = False) -> Figure:
    """Draw experiments from left to right, and the line of descent of each GPU.

    night: of analysis.py.
    """
    colors = DARK if dark else LIGHT
    figure, (ax,) = blank(5.6, 1, colors)
    ax.set(xlabel="experiment", ylabel="val_bpb (lower is better)")
    ax.set_title(title, fontsize=12)
    if not night.best:
        ax.text(0.5, 0.5, "no result yet", ha="center", transform=ax.transAxes)
        return figure
    last = max(c.number for c in night.every)
    shown, dropped = [c for c in night.changes if c.values], night.tried("discard")
    # Bad experiments must not flatten the picture: what lies above `top` is at the edge. But
    # where it can, the better half of what was discarded is seen.
    means = [c.mean for c in shown if c.status == "keep"]
    span = max(max(means) - min(means), 4 * night.noise, 1e-4)
    half = np.median([c.mean for c in dropped] or means)
    top = max(means) + np.clip(half - max(means) + 0.1 * span, 0.2 * span, span)
    base = [c for c in shown if not c.number]
    top = max([top, *(value + 0.05 * span for c in base for value in c.values)])
    luck = night.start.mean - night.luck if night.luck else math.inf
    bottom = min(luck, *(c.mean for c in shown)) - 0.2 * span
    ax.set(ylim=(bottom, top), xlim=(-0.03 * last - 0.5, 1.02 * last + 0.7))
    ax.xaxis.get_major_locator().set_params(integer=True)

    def mark(changes, label, y=None, **style):
        """Draw changes at their means, or on the lower (y = 0) or upper edge."""
        if y is not None:
            style |= {"transform": ax.get_xaxis_transform(), "clip_on": False}
        if changes:
            heights = [c.mean if y is None else y for c in changes]
            ax.scatter([c.number for c in changes], heights, label=label, **style)

    avoid = [([c.number] * 9, [c.mean] * 9) for c in shown]  # a point is worth a line
    gpus, bands = sorted({c.gpu for c in shown}), {}  # of the legend
    for color, gpu in zip(itertools.cycle(GPUS), gpus):
        alone, chain = not gpu, night.chain(gpu)
        if chain:
            x = np.array([c.number for c in chain] + [last + 0.5])
            y = np.array([c.mean for c in chain + chain[-1:]])
            noise, style = chain[0].noise, dict(step="post", alpha=0.15, lw=0)
            band = ax.fill_between(x, y - noise, y + noise, color=color, **style)
            line = ax.step(x, y, where="post", color=color, lw=1.6)
            name = "best so far" if alone else f"GPU {gpu}, best so far"
            bands[f"{name}, and one noise ({noise:.4f}) around it"] = (band, *line)
            avoid.append((np.repeat(x, 2)[1:], np.repeat(y, 2)[:-1]))
        kept = [c for c in night.tried("keep") if c.gpu == gpu]
        mark(kept, "kept" if alone else "", color=color, s=34, zorder=5)
        low = [c for c in dropped if c.gpu == gpu and c.mean <= top]
        style = dict(color=colors["faint"]) if alone else dict(color=color, alpha=0.5)
        mark(low, "discarded" if alone else "", s=14, zorder=3, **style)
    if any(gpus):  # their marks differ by color alone
        for words, size in (("kept", 34), ("discarded", 14)):
            ax.scatter([], [], color=colors["faint"], s=size, label=words)
    going = [c for c in shown if c.status == "going on"]
    style = dict(facecolor="none", edgecolor=colors["ink"], s=24, zorder=4)
    mark(going, "going on", **style)
    high = [c for c in dropped if c.mean > top]
    mark(high, "discarded, above the picture", 1, marker="^", s=22, color=colors["faint"])
    crashed = night.tried("crash")
    mark(crashed, "no number", 0, marker="x", s=22, color=CRASH, zorder=4)
    mark(base, "baseline", marker="s", s=30, color=colors["ink"], zorder=5)
    if several := [c for c in shown if len(c.values) > 1 and c.mean <= top]:
        ends = [[end(c.values) for c in several] for end in (min, max)]
        style = dict(color=colors["faint"], lw=1, zorder=2, label="all runs of a commit")
        ax.vlines([c.number for c in several], *ends, **style)
    if night.controls:
        x = [at + 0.5 for _, at, _ in night.controls]
        style = dict(
            facecolor="none", edgecolor=colors["ink"], marker="D", s=20, zorder=4
        )
        style["label"] = "control: an earlier commit again"
        ax.scatter(x, [run.val_bpb for run, *_ in night.controls], **style)
    if night.luck:
        style = dict(color=colors["ink"], lw=0.9, ls=(0, (4, 3)), zorder=1)
        of = f" of GPU {night.start.gpu}" if night.start.gpu else ""
        words = f"start{of} less the expected luck of the best"
        ax.axhline(luck, label=words, **style)
        avoid.append(([0, last], [luck, luck]))
    handles, words = ax.get_legend_handles_labels()
    figure.legend(
        [*bands.values(), *handles],
        [*bands, *words],
        loc="outside lower center",
        ncols=3 if len(bands) < 5 else 2,
        fontsize=8,
        frameon=False,
        labelcolor=colors["ink"],
    )
    kept = sorted(night.tried("keep"), key=lambda c: -c.gain)
    place_labels(figure, ax, [(c.number, c.mean, label(c)) for c in kept], avoid, colors)
    return figure


def label(change) -> str:
    """Return number, idea and gain in short lines."""
    idea = textwrap.shorten(change.idea, 34, placeholder="...")
    gain = "" if math.isnan(change.gain) else f"(gain\u00a0{change.gain:.4f})"
    return "\n".join(textwrap.wrap(f"{change.number} {idea} {gain}", 24))


def within(points: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Return which of the points (..., 2) lie in the box (x0, y0, x1, y1)."""
    return ((points > box[:2]) & (points < box[2:])).all(-1)


def find_fonts(text: str) -> list[str]:
    """Return matplotlib's own font, and installed ones for the letters that it does not have."""
    own = FontProperties()
    fonts, known = [own.get_name()], get_font(findfont(own)).get_charmap()
    missing = {ord(letter) for letter in text if letter.isprintable()} - known.keys()
    for font in fontManager.ttflist:
        if not missing:
            break
        with contextlib.suppress(OSError, RuntimeError):  # it was removed, or is damaged
            has = missing & get_font(font.fname).get_charmap().keys()
            if has and "Last Resort" not in font.name:  # which has a box for every letter
                fonts.append(font.name)
                missing -= has
    return fonts


@contextlib.contextmanager
def quiet():
    """Say nothing of letters that the font does not have."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield


@quiet()
def place_labels(figure: Figure, ax, labels: list, avoid: list, colors: dict) -> None:
    """Write texts near their points, where they cover no other text and little else.

    labels: (x, y, text), the most important first. avoid: lines, each two rows x and y, that
    texts should keep off. A text without a place near by is cut to its first word, the number.
    """
    figure.draw_without_rendering()  # lays the axes out
    figure.set_layout_engine("none")
    frame = ax.get_window_extent().padded(-3)
    dot = figure.dpi / 72  # pixels of a point
    places = []  # along the lines, every five pixels
    for line in avoid:
        for a, b in itertools.pairwise(ax.transData.transform(np.transpose(line))):
            steps = np.linspace(0, 1, 2 + int(np.hypot(*(b - a)) / 5))[:, None]
            places.append(a + steps * (b - a))
    places = np.concatenate(places)
    taken = np.empty((0, 4))  # boxes of the texts so far
    walk = np.linspace(0, 1, 16)[:, None, None]  # from a point to its text
    style = dict(fontsize=8, color=colors["ink"], parse_math=False, zorder=6)
    style["family"] = find_fonts("".join(text for *_, text in labels))
    style["path_effects"] = [withStroke(linewidth=2.5, foreground=colors["paper"])]
    points = ax.transData.transform([(x, y) for x, y, _ in labels] or np.empty((0, 2)))
    for i, (x, y, text) in enumerate(labels):
        point, others = points[i], np.delete(points, i, 0)[:, None]
        for words, limit in ((text, 100), (text.split()[0], 999)):
            drawn = ax.annotate(words, (x, y), **style)
            extent = drawn.get_window_extent()
            size = np.array([extent.width, extent.height]) + 4 * dot
            side, up = np.arange(8, 93, 12) * dot, np.arange(-90, 91, 9) * dot
            side = [*side, *(-size[0] - side), *(-size[0] * np.array([0.25, 0.5, 0.75]))]
            corner = point + np.array([(s, u - size[1] / 2) for s in side for u in up])
            box = np.hstack([corner, corner + size])
            end = np.clip(point, corner, corner + size)  # where the line meets the text
            line = point + walk * (end - point)  # (16, boxes, 2)
            far = np.hypot(*(end - point).T) / dot
            cost = far + 6 * np.array([within(places, b).sum() for b in box])
            cost[far < 6] += 50  # on its own point
            gaps = np.clip(others, corner, corner + size) - others
            nearest = np.hypot(*gaps.T).min(1, initial=math.inf) / dot
            cost[nearest < far] += 60  # it would seem to be the other's
            cost[(far > 70) | (cost > limit)] = math.inf
            outside = (corner < frame.min).any(1) | (corner + size > frame.max).any(1)
            cost[outside] = math.inf
            for other in taken:
                apart = (box[:, :2] > other[2:]) | (box[:, 2:] < other[:2])
                cost[~apart.any(1) | within(line, other).any(0)] = math.inf
            at = int(np.argmin(cost))
            if cost[at] < math.inf:
                break
            drawn.remove()
        else:
            continue
        offset = (corner[at] + 2 * dot - point) / dot
        drawn.set(position=offset, anncoords="offset points")
        taken, places = np.vstack([taken, box[at]]), np.vstack([places, line[:, at]])
        if far[at] > 12:
            ends = ax.transData.inverted().transform([point, end[at]])
            ax.plot(*ends.T, color=colors["faint"], lw=0.7, zorder=2)


def draw_drift(night, dark: bool = False) -> Figure:
    """Draw what repeated commits say of the machine: speed in time, val_bpb by steps."""
    figure, (left, right) = blank(2.9, 2, DARK if dark else LIGHT)
    _, at, moved = zip(*night.controls, strict=True)
    left.scatter(at, 100 * np.array(moved), color=GPUS[1], s=24)
    left.axhspan(-2, 2, color="#888", alpha=0.2, lw=0)
    left.set_xlim(0, max(c.number for c in night.every) + 1)
    left.set(xlabel="experiment", ylabel="tokens per second, %")
    left.set_title("Controls: speed against the commit's first run", fontsize=9)
    steps, bpb, _ = night.drift()
    x = 100 * np.expm1(steps)
    right.scatter(x, 1000 * bpb, color=GPUS[1], s=24)
    right.set_xlim(np.array([-1.1, 1.1]) * max([1, *abs(x)]))
    right.set(
        xlabel="steps, % off the commit's mean", ylabel="val_bpb, thousandths off it"
    )
    right.set_title("Runs of one commit: val_bpb by steps", fontsize=9)
    return figure


@quiet()
def png(figure: Figure) -> bytes:
    """Return a figure as the bytes of a PNG."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150)
    return data.getvalue()
