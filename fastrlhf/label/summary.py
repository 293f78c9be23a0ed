"""What the judgements in a file say together: counts, time, agreement, and what biases people have."""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import krippendorff

from fastrlhf.config.errors import UserError
from fastrlhf.config.language import Words
from fastrlhf.data.checks import BadRow
from fastrlhf.data.rows import read_rows
from fastrlhf.runtime.console import one_line

Row = dict[str, Any]
SHOWN_DISAGREEMENTS = 20
PROMPT_CHARS = 120


def standing(rows: Iterable[Row]) -> list[Row]:
    """The judgements that hold, in the order given: the last row of each judgement_id, unless it takes it back."""
    last: dict[str, Row] = {}
    for row in rows:
        name = row.get("judgement_id")
        if isinstance(name, str):
            last.pop(name, None)
            last[name] = row
    return [row for row in last.values() if not row.get("undone")]


def read_judgements(path: str) -> list[Row]:
    """The rows of a file that `fastrlhf label` wrote. UserError for a bad line, and where there is no judgement."""
    rows = []
    for _, row in read_rows(Path(path)):
        if isinstance(row, BadRow):
            raise row
        if isinstance(row, dict) and isinstance(row.get("judgement_id"), str):
            rows.append(row)
    if not standing(rows):
        raise UserError(f"--summary: {path} holds no judgement of fastrlhf label (rows with a judgement_id)")
    return rows


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Figures of all standing judgements; what cannot be computed is None.

    kinds, annotators: judgements by kind and person, with the median of their seconds. alpha_scores: Krippendorff's
    alpha (ordinal) of the scores that people gave the same reply; alpha_preferences: of which of two replies to a
    prompt they preferred (-1, 0, 1), from scores and rankings, each pair both ways round. places: how often the best
    reply (ties share) stood at each place of the screen, and how often it would by chance. longer: how often the
    longer of two replies was preferred, of how many pairs. disagreements: prompts on which people prefer opposite
    replies, the most first.
    """
    judgements = standing(rows)
    kept = [row for row in judgements if not row.get("skipped")]
    people = defaultdict(list)
    for row in judgements:
        people[row.get("annotator")].append(row)
    preferred = _preferences(kept)
    return {
        "judgements": len(kept),
        "skipped": len(judgements) - len(kept),
        "taken_back": sum(bool(row.get("undone")) for row in rows),
        "unsafe": sum(sum(_marks(row)) for row in kept),
        "prompts": len({_key(row) for row in kept}),
        "kinds": dict(Counter(map(_kind, kept))),
        "seconds": _median(kept),
        "annotators": [
            {"name": name, "judgements": len([r for r in of if not r.get("skipped")]), "seconds": _median(of)}
            for name, of in people.items()
        ],
        "alpha_scores": _alpha(_scores(kept)),
        "alpha_preferences": _alpha(preferred | {key[::-1]: _turned(said) for key, said in preferred.items()}),
        "places": _places(kept),
        "longer": _longer(kept),
        "disagreements": _disagreements(kept, preferred),
    }


def _key(row: Row) -> str:
    return json.dumps(row["prompt"], sort_keys=True)


def _kind(row: Row) -> str:
    return "edit" if "edited" in row else "rank" if "ranking" in row else "score"


def _marks(row: Row) -> list[bool]:
    marks = row.get("unsafe", [])
    return marks if isinstance(marks, list) else [marks]


def _median(rows: Sequence[Row]) -> float | None:
    seconds = [row["seconds"] for row in rows if isinstance(row.get("seconds"), (int, float))]
    return round(statistics.median(seconds), 1) if seconds else None


def _ranks(row: Row) -> dict[str, float] | None:
    """Response -> a number, lower is better; None: the judgement compares nothing."""
    if "scores" in row:
        marks = row.get("unsafe") or [False] * len(row["scores"])
        values = (-score + 10 * mark for score, mark in zip(row["scores"], marks))
        return dict(zip(row["responses"], values))
    if "ranking" in row:
        groups = [group if isinstance(group, list) else [group] for group in row["ranking"]]
        return {row["responses"][i]: place for place, group in enumerate(groups) for i in group}
    return None


def _sign(difference: float) -> int:
    return (difference > 0) - (difference < 0)


Said = dict[Any, int]  # annotator -> value


def _preferences(rows: Sequence[Row]) -> dict[tuple[str, str], Said]:
    """(prompt and one reply, another reply) -> 1 where a person prefers the first, -1 the second, 0 neither."""
    said: dict[tuple[str, str], Said] = defaultdict(dict)
    for row in rows:
        for a, b in combinations(sorted(_ranks(row) or {}), 2):
            ranks = _ranks(row)
            said[f"{_key(row)}\n{a}", f"{_key(row)}\n{b}"][row.get("annotator")] = _sign(ranks[b] - ranks[a])
    return dict(said)


def _turned(said: Said) -> Said:
    return {name: -value for name, value in said.items()}


def _scores(rows: Sequence[Row]) -> dict[tuple[str, str], Said]:
    said: dict[tuple[str, str], Said] = defaultdict(dict)
    for row in rows:
        for response, score in zip(row.get("responses", []), row.get("scores", [])):
            said[_key(row), response][row.get("annotator")] = score
    return said


def _alpha(units: dict[Any, Said]) -> float | None:
    """Krippendorff's alpha over units that at least two people valued; None where there are none, or but one value."""
    shared = [said for said in units.values() if len(said) > 1]
    domain = sorted({value for said in shared for value in said.values()})
    if len(domain) < 2:
        return None
    counts = [[list(said.values()).count(value) for value in domain] for said in shared]
    alpha = krippendorff.alpha(value_counts=counts, value_domain=domain, level_of_measurement="ordinal")
    return round(float(alpha), 4)


def _places(rows: Sequence[Row]) -> list[dict[str, float]]:
    best, chance = Counter(), Counter()
    for row in rows:
        ranks, positions = _ranks(row), row.get("positions")
        if ranks is None or len(set(ranks.values())) < 2 or not isinstance(positions, list):
            continue
        top = min(ranks.values())
        first = [place for place, response in zip(positions, row["responses"]) if ranks[response] == top]
        for place in first:
            best[place] += 1 / len(first)
        for place in positions:
            chance[place] += 1 / len(positions)
    return [{"place": p + 1, "best": round(best[p], 2), "by_chance": round(chance[p], 2)} for p in sorted(chance)]


def _longer(rows: Sequence[Row]) -> dict[str, Any]:
    preferred = compared = 0
    for row in rows:
        ranks = _ranks(row) or {}
        for a, b in combinations(ranks, 2):
            if len(a) != len(b) and ranks[a] != ranks[b]:
                compared += 1
                preferred += (len(a) > len(b)) == (ranks[a] < ranks[b])
    return {"preferred": preferred, "pairs": compared}


def _disagreements(rows: Sequence[Row], preferred: dict[tuple[str, str], Said]) -> list[dict[str, Any]]:
    against: Counter[str] = Counter()
    shared: Counter[str] = Counter()
    for (first, _), said in preferred.items():
        prompt = first.partition("\n")[0]
        for a, b in combinations(said.values(), 2):
            shared[prompt] += 1
            against[prompt] += a * b < 0
    texts = {_key(row): row["prompt"] for row in rows}
    return [
        {"prompt": _short(texts[key]), "opposite": count, "pairs": shared[key]}
        for key, count in against.most_common(SHOWN_DISAGREEMENTS)
        if count
    ]


def _short(prompt: Any) -> str:
    return one_line(prompt if isinstance(prompt, str) else prompt[-1]["content"], PROMPT_CHARS)


COUNTS = (
    "{judgements} judgements ({kinds}) of {prompts} prompts; {skipped} skipped, {taken_back} taken back, {unsafe} "
    "replies marked unsafe"
)
# What `lines` says, in Chinese by the English of it.
CHINESE = {
    COUNTS: (
        "{judgements} 次标注（{kinds}），共 {prompts} 个提示；跳过 {skipped}，撤销 {taken_back}，"
        "标为不安全的回复 {unsafe} 条"
    ),
    "score": "打分",
    "rank": "排序",
    "edit": "修改",
    "none": "无",
    "seconds a judgement, median: {seconds}": "每次标注用时中位数（秒）：{seconds}",
    "  {name}: {judgements} judgements, {seconds} s": "  {name}：{judgements} 次标注，{seconds} 秒",
    "Krippendorff's alpha of scores: {alpha}": "打分的 Krippendorff α：{alpha}",
    "Krippendorff's alpha of preferences between two replies: {alpha}": "两两偏好的 Krippendorff α：{alpha}",
    "  place {place}: best {best} times, {chance} by chance": "  位置 {place}：最好 {best} 次，随机期望 {chance} 次",
    "the longer of two replies was preferred in {preferred} of {pairs} pairs": (
        "两条回复中较长者更受偏好：{pairs} 对中的 {preferred} 对"
    ),
    "prompts on which people prefer opposite replies: {n}": "偏好相反的提示：{n} 个",
    "  {opposite} of {pairs}: {prompt}": "  {opposite} / {pairs}：{prompt}",
    "n/a (needs two people and two values)": "无（需要两人标注，且有两种取值）",
}


def lines(summary: dict[str, Any], words: Words) -> list[str]:
    """The summary for a terminal."""
    separator = "、" if words.language == "zh" else ", "
    kinds = separator.join(f"{count} {words(kind)}" for kind, count in summary["kinds"].items()) or words("none")
    counts = {name: summary[name] for name in ("judgements", "prompts", "skipped", "taken_back", "unsafe")}

    def number(value: float | None) -> str:
        return words("n/a (needs two people and two values)") if value is None else f"{value:g}"

    people = [
        one | {"name": one_line(str(one["name"])), "seconds": number(one["seconds"])} for one in summary["annotators"]
    ]
    places = [(p["place"], f"{p['best']:g}", f"{p['by_chance']:g}") for p in summary["places"]]
    return [
        words(COUNTS, kinds=kinds, **counts),
        words("seconds a judgement, median: {seconds}", seconds=number(summary["seconds"])),
        *(words("  {name}: {judgements} judgements, {seconds} s", **one) for one in people),
        words("Krippendorff's alpha of scores: {alpha}", alpha=number(summary["alpha_scores"])),
        words(
            "Krippendorff's alpha of preferences between two replies: {alpha}",
            alpha=number(summary["alpha_preferences"]),
        ),
        *(
            words("  place {place}: best {best} times, {chance} by chance", place=place, best=best, chance=chance)
            for place, best, chance in places
        ),
        words("the longer of two replies was preferred in {preferred} of {pairs} pairs", **summary["longer"]),
        words("prompts on which people prefer opposite replies: {n}", n=len(summary["disagreements"])),
        *(words("  {opposite} of {pairs}: {prompt}", **one) for one in summary["disagreements"]),
    ]
