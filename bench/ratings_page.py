"""What `python -m bench.ratings` prints and draws of its report: three tables, and reward against KL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastrlhf.agreement.figures import WORDS
from fastrlhf.report.figures import Panel, Scale, Series, curve_panel
from fastrlhf.report.page import render

FIGURE = Path("docs/ratings.svg")
NAMES = {"best_of": "best of n", "ppo": "PPO", "grpo": "GRPO"}
COLOURS = {"best_of": "#17764a", "ppo": "#2a6fd0", "grpo": "#d9601f"}
WIDTH, HEIGHT, LEFT, TOP = 640, 340, 54, 24
FADED = "dashed"  # what the proxy says; the gold model's lines are drawn through


def curves(report: dict[str, Any]) -> dict[str, list[dict[str, float]]]:
    """Points {kl, proxy, gold} of each way, in the order of its steps or of n."""
    parts = report["parts"]
    best = [{name: _mean(row[name]) for name in ("kl", "proxy", "gold")} for row in parts["best_of"]["curve"]]
    found = {"best_of": best} | {name: parts[name]["steps"] for name in ("ppo", "grpo")}
    return {way: [row for row in rows if row["proxy"] is not None] for way, rows in found.items()}


def _mean(value: float | dict[str, float]) -> float:
    return value["mean"] if isinstance(value, dict) else value


def draw(report: dict[str, Any], path: Path) -> None:
    """Mean rating by the proxy (dashed) and by the gold model against the KL to the start, every way in one plot."""
    ways = curves(report)
    series = []
    for way, rows in ways.items():
        for judge, label in (("gold", f"{NAMES[way]}: gold"), ("proxy", "proxy")):
            points = sorted((row["kl"], row[judge]) for row in rows)
            series.append(Series(label, points, True, COLOURS[way]))
    x = Scale.around([row["kl"] for rows in ways.values() for row in rows], LEFT, WIDTH - 14)
    unit = "rating"
    panel = curve_panel(Panel(unit, series), 0, x, TOP, HEIGHT - 41, "KL to the start, nats a reply; dashed: proxy")
    panel["legend"] = True
    for line in panel["lines"]:
        if line["label"] == "proxy":
            line["style"] = FADED
    figure = {"id": "fig", "title": "Proxy and gold against KL", "width": WIDTH, "height": HEIGHT, "panels": [panel]}
    path.write_text(render("standalone.svg", figure=figure), encoding="utf-8")


def tables(report: dict[str, Any]) -> str:
    """Markdown: reward models beside people and words, ways to a better reply, samples."""
    return "\n\n".join("\n".join(rows) for rows in (_reward(report), _ways(report), _samples(report)))


def _r(found: dict[str, Any]) -> str:
    within = found["interval"]
    return f"{found['r']:.3f}" + ("" if within is None else f" ({within[0]:.3f} to {within[1]:.3f})")


def _reward(report: dict[str, Any]) -> Iterator[str]:
    proxy, gold = (report["parts"][name]["agreement"] for name in ("proxy", "gold"))
    sizes = report["sizes"]
    yield f"| Pearson's r with the mean rating of {proxy['records']} held-out sentences | r (95 % interval) |"
    yield "|---|---|"
    people = proxy["people"]
    rows = [
        (f"half of the people against the other half ({people['people']:.1f} a sentence)", f"{people['halves']:.3f}"),
        (
            "most that any model can have (square root of the mean's reliability, Spearman-Brown)",
            f"{people['ceiling']:.3f}",
        ),
        (f"reward model of {sizes['proxy']} sentences (proxy)", _r(proxy["with_scores"])),
        (f"reward model of {sizes['gold']} others (gold)", _r(gold["with_scores"])),
    ]
    for name, found in (("the proxy's", proxy), ("the gold model's", gold)):
        words = found["baselines"][WORDS]
        said = words["missing"] if "missing" in words else _r(words["with_scores"])
        rows.append((f"bag of words, ridge, {name} sentences", said))
    rows.append(("length alone", _r(proxy["baselines"]["length"]["with_scores"])))
    yield from (f"| {what} | {value} |" for what, value in rows)


def _ways(report: dict[str, Any]) -> Iterator[str]:
    parts = report["parts"]
    best, most = parts["best_of"], [row for row in parts["best_of"]["curve"] if row["prompts"]][-1]
    rows = {"SFT, the start": best["start"], f"best of {most['n']}": best | most}
    rows |= {f"{NAMES[name]}, {len(parts[name]['steps'])} steps": parts[name]["end"] for name in ("ppo", "grpo")}
    yield f"| {report['prompts']} held-out prompts | proxy | gold | KL, nats a reply | ended | tokens | distinct-2 |"
    yield "|---|---|---|---|---|---|---|"
    for name, found in rows.items():
        ended, tokens, variety = found.get("finished", 1.0), found["length"], found["distinct2"]
        cells = [
            *(_number(found[one]) for one in ("proxy", "gold", "kl")),
            _number(ended),
            _number(tokens, 1),
            _number(variety),
        ]
        yield f"| {name} | " + " | ".join(cells) + " |"


def _number(found: float | dict[str, float | None] | None, places: int = 2) -> str:
    if not isinstance(found, dict):
        return "none ended" if found is None else f"{found:.{places}f}"
    error = found["standard_error"]
    return _number(found["mean"], places) + (f" ± {error:.{places}f}" if error else "")


def _samples(report: dict[str, Any]) -> Iterator[str]:
    parts = report["parts"]
    said = {"SFT": parts["best_of"]["start"]["samples"], "best of n": parts["best_of"]["samples"]}
    said |= {NAMES[name]: parts[name]["end"]["samples"] for name in ("ppo", "grpo")}
    yield "| prompt | by | reply | proxy | gold |"
    yield "|---|---|---|---|---|"
    for n, first in enumerate(said["SFT"]):
        for who, samples in said.items():
            one = samples[n]
            reply = " ".join(one["reply"].split()).replace("|", "\\|") or "(nothing)"
            proxy, gold = ("cut" if one[judge] is None else _number(one[judge], 1) for judge in ("proxy", "gold"))
            yield f"| {first['prompt']} | {who} | {reply} | {proxy} | {gold} |"
