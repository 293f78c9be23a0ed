"""The figures as rows of a table, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from rich.cells import cell_len

from fastrlhf.eval.figures import PERCENTILES
from fastrlhf.eval.phrases import OPENING_CHARS
from fastrlhf.report.page import figure_of
from fastrlhf.runtime.console import clean

Estimate = dict[str, float | None]
KEYWORDS_SHOWN = 20
COUNTING = {
    "refusals": f"replies whose first {OPENING_CHARS} characters hold a phrase of the list: a wording, not a meaning",
    "keywords": "replies that hold one, whatever the case; as a whole word where the script has words apart",
    "script": "by letters: two thirds of a reply's words; it is no language (English and French are both Latin)",
    "repeated 4-grams": "mean share of a reply's 4-grams that stood in it before; units are words and CJK characters",
    "distinct-n": "distinct n-grams / all, over all replies; more text repeats more, so compare on the same prompts",
    "tokens": "of the model's own tokenizer, the stop token included; cut off: no stop token within max-new-tokens",
    "±": "standard error over prompts; what none of N prompts shows may still be up to 3/N of all (the rule of three)",
}


class Row(NamedTuple):
    """A measure and its value for each model. note: a key of COUNTING; sub: a part of the row above it."""

    name: str
    cells: list[str]
    note: str = ""
    sub: bool = False


def rows_of(report: dict[str, Any]) -> list[Row]:
    """Every figure of a report, a row each; of many keywords the commonest, the JSON has them all."""
    figures = list(report["figures"].values())

    def row(name: str, show: Callable[[dict[str, Any]], str], note: str = "", *, sub: bool = False) -> Row:
        return Row(name, [show(one) for one in figures], note, sub)

    rows = [row("refusals", lambda f: percent(f["refusals"]), "refusals")]
    if "keywords" in figures[0]:
        rows.append(row("keywords, any", lambda f: percent(f["keywords"]["any"]), "keywords"))
        words = figures[0]["keywords"]["each"]
        shares = {word: max(f["keywords"]["each"][word]["mean"] for f in figures) for word in words}
        often = sorted(shares, key=lambda word: -shares[word])[:KEYWORDS_SHOWN]  # of the same share as in the list
        rows += [row(word, lambda f, word=word: percent(f["keywords"]["each"][word]), sub=True) for word in often]
        if len(often) < len(shares):
            rest = f"{len(shares) - len(often)} more, each at most {percent({'mean': shares[often[-1]]})}"
            rows.append(row(rest, lambda f: "", sub=True))
    scripts = dict.fromkeys(name for one in figures for name in one["scripts"])
    rows += [
        row(f"script: {name}", lambda f, name=name: percent({"mean": f["scripts"].get(name, 0.0)}), "script")
        for name in scripts
    ]
    rows += [
        row("the prompt's script", lambda f: percent(f["same_script_as_prompt"]), "script"),
        row("empty", lambda f: percent(f["empty"])),
        row("cut off", lambda f: percent(f["cut_off"]), "tokens"),
        row("repeated 4-grams", lambda f: percent(f["repeated_4grams"]), "repeated 4-grams"),
        row("distinct-1", lambda f: figure_of(f["distinct_1"]), "distinct-n"),
        row("distinct-2", lambda f: figure_of(f["distinct_2"]), "distinct-n"),
        row("tokens, mean", lambda f: figure_of(f["length"]["mean"]), "tokens"),
        row(_percentiles("tokens"), lambda f: _spread(f["length"]), "tokens"),
    ]
    if "reward" in figures[0]:
        rows.append(row("reward, mean", lambda f: plus_minus(f["reward"])))
        rows.append(row(_percentiles("reward"), lambda f: _spread(f["reward"])))
        if any(one["reward"]["unscored"] for one in figures):
            rows.append(row("replies without a reward", lambda f: str(f["reward"]["unscored"])))
    return rows


def win_rate(report: dict[str, Any]) -> tuple[str, str] | None:
    """The win rate in words, and what it was made of; None without another model."""
    found = report.get("win_rate")
    if found is None:
        return None
    ours, theirs = report["models"]
    counts = f"{found['wins']} won, {found['ties']} tied, {found['losses']} lost"
    if found["unscored"]:
        counts += f", {found['unscored']} without a score"
    if found["rate"] is None:
        return f"{ours} against {theirs}: no pair of replies has two scores", counts
    interval = found["interval"]
    within = "" if interval is None else f" (95% interval {interval[0]:.1%} to {interval[1]:.1%})"
    difference = f"reward {plus_minus(found['difference'], sign=True)}"
    return f"{ours} wins {found['rate']:.1%}{within} against {theirs}", f"{counts}; a tie is half; {difference}"


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The report for a terminal; what a user's file or a folder's name says is made safe."""
    header = Row("", report["models"])
    rows = [header, *rows_of(report)]
    names = [clean(f"  {row.name}" if row.sub else row.name).replace("\n", " ") for row in rows]
    cells = [[clean(cell).replace("\n", " ") for cell in row.cells] for row in rows]
    left = max(map(cell_len, names))
    widths = [max(map(cell_len, column)) for column in zip(*cells)]
    for name, row in zip(names, cells, strict=True):
        shown = (" " * (width - cell_len(cell)) + cell for cell, width in zip(row, widths, strict=True))
        yield name + " " * (left - cell_len(name)) + "  " + "  ".join(shown)
    won = win_rate(report)
    if won is not None:
        yield clean(": ".join(won))
    used = {row.note for row in rows} | {"±"}
    yield from (f"{name}: {text}" for name, text in COUNTING.items() if name in used)


def percent(value: Estimate) -> str:
    """A share of 0 to 1 with its standard error, in percent."""
    if value["mean"] is None:
        return "n/a"
    error = value.get("standard_error")
    return f"{value['mean']:.1%}" + ("" if error is None else f" ± {100 * error:.1f}")


def plus_minus(value: Estimate, *, sign: bool = False) -> str:
    """A number with its standard error."""
    if value["mean"] is None:
        return "n/a"
    error = value.get("standard_error")
    plus = "+" if sign and value["mean"] > 0 else ""
    return plus + figure_of(value["mean"]) + ("" if error is None else f" ± {figure_of(error)}")


def _percentiles(what: str) -> str:
    return f"{what}, {' / '.join(f'p{p}' for p in PERCENTILES)}"


def _spread(values: dict[str, Any]) -> str:
    """Percentiles side by side; n/a where nothing has a value."""
    known = [values.get(f"p{p}") for p in PERCENTILES]
    return "n/a" if None in known else " / ".join(map(figure_of, known))
