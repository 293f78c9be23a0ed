"""Curves as inline SVG: drawn by matplotlib, coloured by the page's CSS, the same bytes for the same numbers.

Left out on purpose: interactivity. The numbers stand in metrics.jsonl beside the report.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from fastrlhf.runtime.console import number

WIDTH, HEIGHT = 400, 225  # SVG units; text of 12 units stays readable on a phone
MAX_POINTS = 400
SMOOTH_FROM = 40  # shorter runs are shown as they are
# Stand-ins that no other drawing uses: replaced by CSS variables, so that one figure serves light and dark pages.
_COLOURS = {
    "#010203": "var(--ink)",
    "#010204": "var(--muted)",
    "#010205": "var(--line)",
    "#010206": "var(--series-1)",
    "#010207": "var(--series-2)",
    "#010208": "var(--card)",
}
INK, MUTED, LINE, FIRST, SECOND, CARD = _COLOURS
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fastrlhf",
    "text.parse_math": False,
    "font.size": 12,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.grid.axis": "y",
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": INK,
    "figure.facecolor": "none",
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Series:
    """One curve: (step, value) points in order; held-out ones have a colour of their own and a mark at each point."""

    label: str
    points: Sequence[tuple[float, float]]
    held_out: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes: what its y axis is (with the unit) and the curves in it."""

    unit: str
    series: Sequence[Series]


def curves(figure_id: str, title: str, panels: Sequence[Panel], x_label: str) -> str:
    """Panels above each other over one x axis, as an <svg> element."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure, axes = _canvas(len(panels))
        for i, (axis, panel) in enumerate(zip(axes, panels, strict=True)):
            for j, series in enumerate(panel.series):
                _curve(axis, series, SECOND if series.held_out else FIRST, f"series-{i}-{j}")
            _dress(axis, panel.unit, whole_x=True, ticks=5 if len(panels) == 1 else 3)
            axis.tick_params(labelbottom=i == len(panels) - 1)
        axes[-1].set_xlabel(x_label, loc="right")
        return _svg(figure, figure_id, title)


def path_plot(
    figure_id: str, title: str, points: Sequence[tuple[float, float]], x_label: str, unit: str,
    beside: Sequence[tuple[float, float]] = (),
) -> str:  # fmt: skip
    """y against x in the order of the steps: pale at the start, full at the end, both ends named; `beside`: a dashed
    curve to compare with."""
    import matplotlib

    shown = _thin(points, 150)
    xs, ys = [x for x, _ in shown], [y for _, y in shown]
    with matplotlib.rc_context(_STYLE):
        figure, (axis,) = _canvas(1)
        axis.plot(xs, ys, color=FIRST, linewidth=1, alpha=0.3, gid="series-0-0")
        alphas = [0.15 + 0.85 * i / max(1, len(xs) - 1) for i in range(len(xs))]
        axis.scatter(xs, ys, s=16, color=FIRST, alpha=alphas, linewidths=0, gid="series-0-1")
        axis.scatter([xs[-1]], [ys[-1]], s=60, color=FIRST, edgecolors=CARD, linewidths=1.5, zorder=4)
        if beside:
            xs_beside, ys_beside = zip(*beside, strict=True)
            axis.plot(xs_beside, ys_beside, color=SECOND, linewidth=1.4, linestyle=(0, (4, 3)), marker="o",
                      markersize=3.5, markeredgewidth=0, gid="series-1-0")  # fmt: skip
        axis.margins(x=0.1, y=0.14)
        ends = [("start", 0), ("end", -1)] if len(xs) > 1 else [("end", -1)]
        for name, i in ends:
            text = axis.annotate(name, (xs[i], ys[i]), xytext=(0, 10), textcoords="offset points", ha="center")
            text.set_gid(f"halo-{name}")
        _dress(axis, unit, whole_x=False)
        axis.set_xlabel(x_label, loc="right")
        return _svg(figure, figure_id, title)


def bars(figure_id: str, title: str, counts: Sequence[tuple[str, int]], x_label: str, unit: str) -> str:
    """Counts by bin; bins whose name begins with a minus are drawn in the second colour."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure, (axis,) = _canvas(1, bottom=0.3)
        places, heights = range(len(counts)), [count for _, count in counts]
        colours = [SECOND if name.startswith("-") else FIRST for name, _ in counts]
        drawn = axis.bar(places, heights, width=0.9, color=colours, linewidth=0)
        for i, patch in enumerate(drawn):
            patch.set_gid(f"series-0-{i}")
        axis.bar_label(drawn, [str(count) if count else "" for count in heights], color=INK, padding=1, fontsize=10)
        axis.set_title(unit, loc="left", fontsize=12, pad=6)
        axis.set_xticks(places, [_bin(name) for name, _ in counts], rotation=40, ha="right", fontsize=10)
        axis.set_xlabel(x_label, loc="right")
        axis.margins(y=0.12)
        return _svg(figure, figure_id, title)


def _bin(name: str) -> str:
    """ "-inf..-1" as "< −1", "0..1" as "0 to 1"."""
    low, _, high = name.replace("-inf", "").replace("-", "\u2212").partition("..")
    return f"< {high}" if not low else f"≥ {low}" if high in ("inf", "") else f"{low} to {high}"


def _canvas(rows: int, bottom: float = 0.185):
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
    FigureCanvasSVG(figure)  # no pyplot: nothing global, no window system
    # Fixed margins: measuring every label first doubles the time, and the labels are short by construction.
    figure.subplots_adjust(left=0.135, right=0.965, top=0.9, bottom=bottom, hspace=0.5)
    return figure, figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]


def _curve(axis, series: Series, colour: str, gid: str) -> None:
    shown = _thin(series.points, MAX_POINTS)
    xs, ys = [x for x, _ in shown], [y for _, y in shown]
    marks = {"marker": "o", "markersize": 4.5, "markeredgewidth": 0} if series.held_out or len(xs) < 12 else {}
    if len(xs) >= SMOOTH_FROM and not series.held_out:
        axis.plot(xs, ys, color=colour, linewidth=0.8, alpha=0.35)
        ys = _smooth(ys, max(2, len(ys) // 25))
    axis.plot(xs, ys, color=colour, linewidth=1.8, gid=gid, **marks)


def _dress(axis, unit: str, *, whole_x: bool, ticks: int = 5) -> None:
    from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator

    low, high = axis.get_ylim()
    middle = abs(low + high) / 2
    if high - low < 1e-9 * max(1.0, middle):  # a constant curve: a line in the middle, not noise blown up
        spread = max(1e-3, middle * 0.1)
        axis.set_ylim(low - spread, high + spread)
    if low < 0 < high:
        axis.axhline(0, color=MUTED, linewidth=0.8, zorder=0.5)
    low, high = axis.get_ylim()
    tiny = math.floor(math.log10(max(abs(low), abs(high))))
    power = tiny if tiny < -3 else 0  # 0.00024 is hard to read and too wide: 2.4, and the power beside the unit
    axis.set_title(
        f"{unit} × 10{str(power).translate(_SUPERSCRIPT)}" if power else unit, loc="left", fontsize=12, pad=6
    )
    for line, count, whole in ((axis.xaxis, 6, whole_x), (axis.yaxis, ticks, False)):
        low, high = line.get_view_interval()
        places = [v for v in MaxNLocator(count, integer=whole).tick_values(low, high) if low <= v <= high]
        line.set_major_locator(FixedLocator(places))
        scale = 10.0**power if line is axis.yaxis else 1.0
        line.set_major_formatter(FixedFormatter(_tick_labels([place / scale for place in places])))


def _tick_labels(values: Sequence[float]) -> list[str]:
    """Labels of one axis, all with the same number of decimals: as few as tell the ticks exactly."""
    if any(abs(value) >= 1e4 for value in values):
        return [number(value) for value in values]
    places = next((d for d in range(6) if all(abs(round(v, d) - v) < 1e-9 for v in values)), None)
    texts = [f"{value:.2g}" if places is None else f"{value:.{places}f}" for value in values]
    return [text.replace("-", "\u2212", 1) if places is not None else text for text in texts]


def _thin(points: Sequence[tuple[float, float]], limit: int) -> list[tuple[float, float]]:
    """At most `limit` points: means of equal groups of neighbours; the first and the last stay as they are."""
    if len(points) <= limit:
        return list(points)
    inner, groups = points[1:-1], limit - 2
    cuts = [len(inner) * i // groups for i in range(groups + 1)]
    means = [_mean(inner[a:b]) for a, b in zip(cuts, cuts[1:])]
    return [tuple(points[0]), *means, tuple(points[-1])]


def _mean(group: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)


def _smooth(values: Sequence[float], radius: int) -> list[float]:
    """Centred moving average; at both ends over the half of the window that exists."""
    windows = (values[max(0, i - radius) : i + radius + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _svg(figure, figure_id: str, title: str) -> str:
    """The figure as an element for an HTML page: no prologue, ids of its own, CSS colours and the page's font."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family:[^;\"]*;?|font: (\S+) [^;\"]*", lambda m: f"font-size: {m[1]}" if m[1] else "", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{figure_id}-", text)
    text = re.sub("|".join(_COLOURS), lambda match: _COLOURS[match[0]], text)
    box = re.search(r'viewBox="([^"]+)"', text)[1]
    head = f'<svg viewBox="{box}" role="img" aria-label="{escape(title, quote=True)}">'
    return re.sub(r"<svg[^>]*>", lambda _: head, text, count=1).strip()
