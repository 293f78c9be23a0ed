"""The report as lines: first whether the model is worth more than the words of a reply, then the figures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastrlhf.agreement.figures import WORDS

HEADINGS = {"kind": "kind of row", "source": "source", "annotator": "annotator", "length": "length", "margin": "margin"}
LEAST_PAIRS = 20  # fewer in a group say nothing, and are told by their number alone


def first_sentence(report: dict[str, Any]) -> str:
    """What a reader must know: agreement with its interval, and whether it is more than a bag of words'."""
    own = _agreement(report)
    base = report["baselines"][WORDS]
    if "missing" in base:
        length = _figure(report["baselines"]["length"])
        return f"The reward model {own}, length alone {length}; no bag of words to compare with: {base['missing']}."
    if base["interval"] and base["interval"][0] > 0:
        return f"The reward model {own}, a bag of words {_figure(base)}."
    verdict = "does not beat" if base["above"] <= 0 else "is not shown to beat"
    return f"The reward model {verdict} a bag of words ({_figure(base)}): it {own}."


def lines(report: dict[str, Any]) -> Iterator[str]:
    """For a terminal."""
    yield first_sentence(report)
    yield ""
    counts = f"{report['records']} rows, {report['prompts']} prompts, {report['replies']} replies"
    yield f"{counts}; [..]: 95 % interval over prompts"
    rows = [("all pairs", report["pairs"])] if report["pairs"] else []
    for way, groups in report.get("by", {}).items():
        rows += [(f"{HEADINGS[way]}: {name}", group) for name, group in groups.items()]
    rows += [(f"baseline: {name}", base.get("pairs")) for name, base in report["baselines"].items()]
    rows = [(name, group) for name, group in rows if group is not None]
    width = max((len(name) for name, _ in rows), default=0)
    for name, group in rows:
        few = "" if group["pairs"] >= LEAST_PAIRS else "   few"
        yield f"  {name:{width}}  {group['pairs']:7} pairs  {_share(group)}{few}"
    yield from _correlations(report)
    yield from _baselines(report)
    yield from _calibration(report.get("calibration"))


def _agreement(figures: dict[str, Any]) -> str:
    """Behind the name of a model."""
    if figures["pairs"] is not None:
        return f"ranks {_figure(figures)} of {figures['pairs']['pairs']} pairs as people did"
    scores = figures["with_scores"]
    return (
        None if scores is None else f"correlates {_figure(figures)} with people's scores of {scores['replies']} replies"
    )


def _figure(figures: dict[str, Any]) -> str:
    """Accuracy, or where no pair is ordered the correlation, with its interval."""
    return _r(figures["with_scores"]) if figures["pairs"] is None else _share(figures["pairs"])


def _share(group: dict[str, Any]) -> str:
    return f"{group['accuracy']:.1%}" + _within(group["interval"], "{:.1%}")


def _r(found: dict[str, Any]) -> str:
    return "n/a" if found["r"] is None else f"{found['r']:+.2f}" + _within(found["interval"], "{:+.2f}")


def _within(interval: list[float] | None, form: str) -> str:
    return "" if interval is None else f" [{form.format(interval[0])} .. {form.format(interval[1])}]"


def _correlations(report: dict[str, Any]) -> Iterator[str]:
    for what, found in (("people's scores", report["with_scores"]), ("length", report["with_length"])):
        if found is not None:
            yield f"correlation with {what} ({found['replies']} replies): {_r(found)}"
    people = report["people"]
    if people is not None:
        halves = f"half of the people of a reply against the other half: r = {people['halves']:.3f}"
        yield f"{halves} ({people['replies']} replies); no model can pass {people['ceiling']:.3f} with the mean of all"


def _baselines(report: dict[str, Any]) -> Iterator[str]:
    unit = "points of accuracy" if report["pairs"] else "of correlation"
    scale, form = (100, "{:+.1f}") if report["pairs"] else (1, "{:+.2f}")
    for name, base in report["baselines"].items():
        if "missing" in base:
            yield f"above {name}: not computed, {base['missing']}"
            continue
        within = None if base["interval"] is None else [scale * end for end in base["interval"]]
        how = f"  ({base['how']})" if "how" in base else ""
        yield f"above {name}: {form.format(scale * base['above'])}{_within(within, form)} {unit}{how}"


def _calibration(found: dict[str, Any] | None) -> Iterator[str]:
    if found is None:
        return
    yield "by the probability that the model gives its own choice (scores as Bradley-Terry's):"
    for b in found["bins"]:
        span = f"{b['from']:.0%} to {b['to']:.0%}"
        yield f"  {span:12}  {b['pairs']:7} pairs  says {b['probability']:.1%}, people agree {b['right']:.1%}"
    yield f"calibration error {found['error']:.3f}; {found['nats']:.3f} nats a pair (a coin: 0.693)"
