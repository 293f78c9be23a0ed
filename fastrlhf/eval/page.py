"""The page of an evaluation: one file that opens offline, drawn with the run report's templates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastrlhf.config.language import Words
from fastrlhf.eval.figures import Judged, last_turn
from fastrlhf.eval.run import Evaluation
from fastrlhf.eval.table import COUNTING, percent, plus_minus, rows_of, win_rate
from fastrlhf.report.figures import bars
from fastrlhf.report.page import figure_of, render
from fastrlhf.report.verdict import Tile

TEXT_LIMIT = 700  # characters shown of a text
SHOWN = 8  # replies of a kind
BINS = 10


def page_of(evaluation: Evaluation) -> str:
    """The HTML of an evaluation. Everything that a model, a file or a folder's name says is inert in it."""
    report = evaluation.report
    names = list(evaluation.replies)
    sampling = report["sampling"]
    facts = [f"{report['prompt_count']} prompts of {report['prompts']}", f"{sampling['n']} replies to each"]
    facts += [f"{name} {value}" for name, value in sampling.items() if name != "n"]
    rows, won = rows_of(report), win_rate(report)
    refusals = percent(report["figures"][names[0]]["refusals"])
    refuses = f"{refusals} of the replies of {names[0]} are worded as refusals."
    return render(
        "eval.html",
        t=Words("en", {}),
        language="en",
        title=names[0],
        text_limit=TEXT_LIMIT,
        facts="  ·  ".join(map(str, facts)),
        sentence=won[0] if won else refuses,
        details=f"{won[1]}. {refuses}" if won else "",
        tiles=_tiles(report),
        names=names,
        rows=rows,
        counting={name: text for name, text in COUNTING.items() if name == "±" or name in {row.note for row in rows}},
        figures=_figures(evaluation),
        samples=[(title, chosen, count) for title, chosen, count in _samples(evaluation) if chosen],
        reward=report["reward"],
        version=report["fastrlhf"],
    )


def _tiles(report: dict[str, Any]) -> list[Tile]:
    """What a reader looks for first, of each model."""
    figures = list(report["figures"].values())
    tiles = [Tile("Refusals", tuple(percent(f["refusals"]) for f in figures), "by their wording")]
    if "keywords" in figures[0]:
        tiles.append(Tile("Keywords", tuple(percent(f["keywords"]["any"]) for f in figures), "replies with any"))
    tiles.append(Tile("Cut off", tuple(percent(f["cut_off"]) for f in figures), "no end within max-new-tokens"))
    tiles.append(Tile("Distinct-2", tuple(figure_of(f["distinct_2"]) for f in figures), "share of bigrams"))
    tiles.append(Tile("Length", tuple(figure_of(f["length"]["mean"]) for f in figures), "tokens, mean"))
    if "reward" in figures[0]:
        tiles.append(Tile("Reward", tuple(plus_minus(f["reward"]) for f in figures), "mean"))
    return tiles


def _figures(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Histograms of the first model's rewards and lengths."""
    replies = next(iter(evaluation.replies.values()))
    drawn = [("fig-eval-length", "Reply length", [float(reply.tokens) for reply in replies], "tokens")]
    scores = [reply.score for reply in replies if reply.score is not None]
    if scores:
        drawn.insert(0, ("fig-eval-reward", "Reward", scores, "score"))
    return [
        {
            "id": figure_id,
            "title": title,
            "hint": f"Replies of {evaluation.report['models'][0]}.",
            "missing": "",
            "legend": {},
            "plot": bars(figure_id, title, _histogram(values), unit, "replies"),
        }
        for figure_id, title, values, unit in drawn
    ]


def _histogram(values: Sequence[float]) -> list[tuple[str, bool, int]]:
    """Counts in about BINS bins of the same width, "low to high" each; those below 0 in the second colour."""
    low, high = min(values), max(values)
    width = _round_step((high - low) / BINS) if high > low else 1.0
    first = math.floor(low / width)
    count = math.floor(high / width) - first + 1
    counts = [0] * count
    for value in values:
        counts[math.floor(value / width) - first] += 1
    edges = [f"{(first + i) * width:.6g}".replace("-", "\u2212") for i in range(count + 1)]
    return [(f"{a} to {b}", first + i < 0, n) for i, (a, b, n) in enumerate(zip(edges, edges[1:], counts))]


def _round_step(rough: float) -> float:
    """The next of 1, 2, 5, 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * step for step in (1, 2, 5, 10) if power * step >= rough * 0.999)


def _samples(evaluation: Evaluation) -> list[tuple[str, list[dict[str, Any]], int]]:
    """(title, rows, how many there are) of replies worth a look, those of the first model."""
    ours = next(iter(evaluation.replies.values()))
    every = range(len(ours))
    scored = sorted((i for i in every if ours[i].score is not None), key=lambda i: ours[i].score)
    kinds = [
        ("Counted as refusals", [i for i in every if ours[i].refusal is not None]),
        ("With a keyword", [i for i in every if ours[i].keywords]),
        ("Highest reward", scored[::-1]),
        ("Lowest reward", scored),
        ("Most repetitive", _repetitive(ours)),
        ("At even distances", [*every][:: max(1, len(ours) // SHOWN)]),
    ]
    ranked = ("Highest reward", "Lowest reward", "Most repetitive")
    return [
        (title, [_sample(evaluation, i) for i in chosen[: SHOWN // 2 if title in ranked else SHOWN]], len(chosen))
        for title, chosen in kinds
    ]


def _repetitive(replies: Sequence[Judged]) -> list[int]:
    return sorted((i for i, reply in enumerate(replies) if reply.repeated), key=lambda i: (-replies[i].repeated, i))


def _sample(evaluation: Evaluation, index: int) -> dict[str, Any]:
    """A reply in the page: what was asked last, and each model's reply with its badges."""
    prompt = evaluation.prompts[index // evaluation.samples].prompt
    turns = 1 if isinstance(prompt, str) else len(prompt)
    replies = [replies[index] for replies in evaluation.replies.values()]
    return {
        "prompt": last_turn(prompt),
        "turns": turns,
        "replies": [{"text": reply.text, "badges": _badges(reply)} for reply in replies],
    }


def _badges(reply: Judged) -> list[tuple[str, str]]:
    """(words, kind) of what was found in a reply."""
    badges = [] if reply.score is None else [(f"score {figure_of(reply.score)}", "")]
    badges += [] if reply.refusal is None else [(f"refusal: {reply.refusal[:40]}", "warn")]
    badges += [(f"keyword: {word[:40]}", "bad") for word in reply.keywords[:3]]
    badges += [] if reply.finished else [("cut off", "warn")]
    return badges
