"""Where everything in a plot stands; templates/figure.svg writes it, the same bytes for the same numbers.

Left out on purpose: interactivity. The numbers stand in metrics.jsonl beside the report.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

from fastrlhf.runtime.console import number

WIDTH, HEIGHT = 400, 225  # SVG units; text of 12 units stays readable on a phone
LEFT, RIGHT, TOP, BOTTOM, FOOT = 54, 386, 23, 184, 217  # the plot within them, and the line of the x axis's name
MAX_POINTS, MAX_PATH = 400, 150
SMOOTH_FROM = 40  # shorter runs are shown as they are
LABEL_CHARS = 6  # of a tick, left of the plot
MARKS_BELOW = 12  # a curve of fewer points shows each
STEPS = (1, 2, 2.5, 5, 10)
FIRST, SECOND = "var(--series-1)", "var(--series-2)"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
Points = Sequence[tuple[float, float]]


class Series(NamedTuple):
    """One curve: (step, value) points in order; held-out ones have a colour of their own and a mark at each point."""

    label: str
    points: Points
    held_out: bool = False
    colour: str = ""


class Panel(NamedTuple):
    """One pair of axes: what its y axis is (with the unit) and the curves in it.

    span: values that must fit on the y axis besides the curves' own, so that panels can share a scale.
    """

    unit: str
    series: Sequence[Series]
    span: Sequence[float] = ()


class Scale(NamedTuple):
    """A linear axis: `low` stands at `start` and `high` at `end`, in SVG units."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float, margin: float = 0.05) -> Scale:
        """Room for all values and `margin` of it on both sides."""
        low, high = max(min(values), -1e300), min(max(values), 1e300)  # the difference must be finite too
        middle = abs(low / 2 + high / 2)
        if high - low < 1e-9 * max(1.0, middle):  # a constant curve: a line in the middle, not noise blown up
            spread = 0.1 * middle if 1e-9 * middle > max(high - low, 1e-300) else 0.01
            low, high = low - spread, high + spread
        pad = margin * (high - low)
        return cls(low - pad, high + pad, start, end)

    def at(self, value: float) -> float:
        """The place of a value, to a tenth of a unit; at the nearer end for one beyond the scale."""
        inside = min(max(value, self.low), self.high)
        return round(self.start + (inside - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    def ticks(self, most: int, *, whole: bool = False) -> list[float]:
        """Round values on the axis, at most `most` steps apart; `whole`: whole numbers only."""
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        steps = [power * m for m in STEPS if power * m >= rough * 0.999 and not (whole and power * m % 1)]
        step = steps[0] if steps else 1.0
        return [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def curves(figure_id: str, title: str, panels: Sequence[Panel], x_label: str) -> dict[str, Any]:
    """Panels above each other over one x axis, as figure.svg draws them."""
    x = Scale.around([a for panel in panels for series in panel.series for a, _ in series.points], LEFT, RIGHT)
    gap = 32
    height = (BOTTOM - TOP - gap * (len(panels) - 1)) / len(panels)
    drawn = []
    for i, panel in enumerate(panels):
        top = TOP + i * (height + gap)
        name = x_label if i == len(panels) - 1 else ""
        drawn.append(curve_panel(panel, i, x, top, top + height, name))
    return _figure(figure_id, title, drawn)


def curve_panel(panel: Panel, key: int, x: Scale, top: float, bottom: float, x_label: str) -> dict[str, Any]:
    """One panel of curves between two heights; x_label "": another panel below names the x axis."""
    values = [b for series in panel.series for _, b in series.points]
    y = Scale.around([*values, *panel.span], bottom, top)
    axes = _axes(key, panel.unit, x, y, x_label, x.ticks(6, whole=True))
    return axes | {"lines": [_curve(series, x, y) for series in panel.series]}


def path_plot(
    figure_id: str,
    title: str,
    points: Points,
    x_label: str,
    unit: str,
    beside: Points = (),
    names: tuple[str, str] = ("start", "end"),
) -> dict[str, Any]:
    """y against x in the order of the steps: pale at the start, full at the end, both ends named; `beside`: a dashed
    curve to compare with."""
    shown = _thin(points, MAX_PATH)
    xs, ys = zip(*shown, *beside, strict=True)
    x, y = Scale.around(xs, LEFT, RIGHT, 0.1), Scale.around(ys, BOTTOM, TOP, 0.14)
    places = [(x.at(a), y.at(b)) for a, b in shown]
    growing = [round(0.15 + 0.85 * i / max(1, len(places) - 1), 2) for i in range(len(places))]
    marks = [(a, b, 2, opacity) for (a, b), opacity in zip(places, growing, strict=True)]
    marks[-1] = (*places[-1], 4.5, 1)
    lines = [_line("path", FIRST, places, style="faint", marks=marks)]
    if beside:
        others = [(x.at(a), y.at(b)) for a, b in beside]
        lines.append(_line("beside", SECOND, others, style="dashed", marks=_marks(others, 1.8)))
    ends = [*zip(names, (places[0], places[-1]))][-2 if len(places) > 1 else -1 :]
    texts = [(a, round(b - 9, 1), name, "halo") for name, (a, b) in ends]
    panel = _axes(0, unit, x, y, x_label, x.ticks(6)) | {"lines": lines, "texts": texts}
    return _figure(figure_id, title, [panel])


def bars(
    figure_id: str, title: str, counts: Sequence[tuple[str, bool, int]], x_label: str, unit: str
) -> dict[str, Any]:
    """Counts: (name of a bin, whether it is drawn in the second colour, how many)."""
    bottom = BOTTOM - 26  # the slanted names of the bins need room
    x, y = Scale(-0.6, len(counts) - 0.4, LEFT, RIGHT), Scale(0, 1.12 * max(1, *(n for *_, n in counts)), bottom, TOP)
    lines, texts, width = [], [], round(x.at(0.9) - x.at(0), 1)
    for i, (name, is_second, count) in enumerate(counts):
        box = (x.at(i - 0.45), y.at(count), width, round(bottom - y.at(count), 1))
        if count:
            lines.append(_line(name, SECOND if is_second else FIRST, [], bars=[box]))
            texts.append((x.at(i), round(y.at(count) - 3, 1), count, "small ink"))
    names = [(x.at(i), name) for i, (name, *_) in enumerate(counts)]
    below = {"x_ticks": names, "slanted": True, "foot": FOOT}
    return _figure(figure_id, title, [_axes(0, unit, x, y, x_label, []) | below | {"lines": lines, "texts": texts}])


def _figure(figure_id: str, title: str, panels: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": figure_id, "title": title, "width": WIDTH, "height": HEIGHT, "panels": panels}


def _axes(key: int, unit: str, x: Scale, y: Scale, x_label: str, x_ticks: Sequence[float]) -> dict[str, Any]:
    tiny = math.floor(math.log10(max(abs(y.low), abs(y.high))))
    heights = y.ticks(6 if y.start - y.end > 100 else 4)
    y_labels, power = _tick_labels(heights), 0
    if tiny < -3 or (tiny < 0 and max(map(len, y_labels)) > LABEL_CHARS):
        power = tiny  # 0.00024 is hard to read and too wide: 2.4, and the power beside the unit
        y_labels = _tick_labels([height / 10.0**power for height in heights])
    box = {"left": x.start, "right": x.end, "top": round(y.end, 1), "bottom": round(y.start, 1)}
    return box | {
        "key": key,
        "unit": f"{unit} × 10{str(power).translate(_SUPERSCRIPT)}" if power else unit,
        "y_ticks": [(y.at(height), label) for height, label in zip(heights, y_labels, strict=True)],
        "zero": y.at(0.0) if y.low < 0 < y.high else None,
        "x_label": x_label,
        "foot": round(y.start + FOOT - BOTTOM, 1),
        "x_ticks": [(x.at(tick), label) for tick, label in zip(x_ticks, _tick_labels(x_ticks), strict=True)],
        **{"slanted": False, "legend": False, "texts": []},
    }


def _curve(series: Series, x: Scale, y: Scale) -> dict[str, Any]:
    shown = _thin(series.points, MAX_POINTS)
    places = [(x.at(a), y.at(b)) for a, b in shown]
    colour = series.colour or (SECOND if series.held_out else FIRST)
    marks = _marks(places, 2.2) if series.held_out or len(places) < MARKS_BELOW else []
    if series.held_out or len(places) < SMOOTH_FROM:
        return _line(series.label, colour, places, marks=marks)
    means = _smooth([b for _, b in shown], max(2, len(shown) // 25))
    smooth = [(a, y.at(mean)) for (a, _), mean in zip(places, means, strict=True)]
    return _line(series.label, colour, smooth, raw=_joined(places), marks=marks)


def _line(label: str, colour: str, places: Points, *, style: str = "", raw: str = "", **parts: Any) -> dict[str, Any]:
    points = _joined(places) if len(places) > 1 else ""
    return {
        "label": label,
        "colour": colour,
        "points": points,
        "style": style,
        "raw": raw,
        "marks": [],
        "bars": [],
    } | parts


def _marks(places: Points, radius: float) -> list[tuple[float, float, float, float]]:
    return [(a, b, radius, 1) for a, b in places]


def _joined(places: Points) -> str:
    return " ".join(f"{a:g},{b:g}" for a, b in places)


def _tick_labels(values: Sequence[float]) -> list[str]:
    """Labels of one axis, all with the same number of decimals: as few as tell the ticks exactly."""
    if any(abs(value) >= 1e4 for value in values):
        return [number(value) for value in values]
    places = next((d for d in range(6) if all(abs(round(v, d) - v) < 1e-9 for v in values)), None)
    texts = [f"{value:.2g}" if places is None else f"{value:.{places}f}" for value in values]
    return [text.replace("-", "\u2212", 1) if places is not None else text for text in texts]


def _thin(points: Points, limit: int) -> Points:
    """At most `limit` points: means of equal groups of neighbours; the first and the last stay as they are."""
    if len(points) <= limit:
        return list(points)
    inner, groups = points[1:-1], limit - 2
    cuts = [len(inner) * i // groups for i in range(groups + 1)]
    means = [(fmean(x for x, _ in inner[a:b]), fmean(y for _, y in inner[a:b])) for a, b in zip(cuts, cuts[1:])]
    return [points[0], *means, points[-1]]


def _smooth(values: Sequence[float], radius: int) -> list[float]:
    """Centred moving average; at both ends over the half of the window that exists."""
    windows = (values[max(0, i - radius) : i + radius + 1] for i in range(len(values)))
    return [fmean(window) for window in windows]
