"""Rows whose columns have other names than the formats know (`columns`), or one too many (`ignore_columns`), or that
compare two replies and say in a column of its own which is better."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from fastrlhf.config.errors import UserError
from fastrlhf.data.checks import DroppedRow, number_of, wrong
from fastrlhf.data.foreign import CONTEXT
from fastrlhf.data.rows import CsvRow, csv_cell

_NOTHING = object()
_PROMPTS = ("prompt", "messages", "conversations", "instruction", "user_prompt")


class Columns:
    """The names that the columns of a source are read by.

    mapping: our name -> theirs, dotted into nested columns ("answers.0.text"). ignored: names that are left out of
    what a row asks. noted: rows from which a column was left out, by sentence.
    """

    def __init__(self, mapping: Mapping[str, str] | None = None, ignored: Iterable[str] | None = None) -> None:
        if isinstance(mapping, (str, bytes)) or not isinstance(mapping, Mapping | None):
            raise UserError(f"columns must be a mapping such as {{prompt: question}}, found {mapping!r}")
        self.mapping = dict(mapping or {})
        self.ignored = (ignored,) if isinstance(ignored, str) else tuple(ignored or ())
        self.noted: Counter[str] = Counter()
        self._unseen = set(self.mapping)
        self._names: dict[str, None] = {}

    def of(self, row: Any) -> Any:
        """The row under our names. A column that another name was mapped to is taken from where the mapping says."""
        if not (self.mapping or self.ignored) or not isinstance(row, Mapping):
            return row
        values = {ours: value_at(row, theirs, _NOTHING) for ours, theirs in self.mapping.items()}
        values = {ours: value for ours, value in values.items() if value is not _NOTHING}
        if isinstance(row, CsvRow):
            values = {ours: csv_cell(ours, value) for ours, value in values.items()}
        check_mapping(self.mapping, row)
        taken = {root for ours in values for root in (self.mapping[ours], self.mapping[ours].partition(".")[0])}
        self._unseen -= values.keys()
        others = self._beside(row, values) | {name: value for name, value in row.items() if name not in taken}
        self._names |= dict.fromkeys(map(str, [*row, *others]))
        for name in self.ignored:
            if others.pop(name, None) is not None:
                self.noted[f'without their column "{name}" (ignore_columns)'] += 1
        return others | values

    def _beside(self, row: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """What stands beside a nested prompt and is part of it, such as the tools of {"messages", "tools"}."""
        parents = [value_at(row, self.mapping[name].rpartition(".")[0]) for name in _PROMPTS if name in values]
        nested = [parent for parent in parents if isinstance(parent, Mapping)]
        return {name: parent[name] for parent in nested for name in CONTEXT if parent.get(name) is not None}

    def check(self) -> None:
        """Raise UserError where a mapping found its column in no row of the source, or none has an ignored one."""
        unseen = [f"{ours}: {self.mapping[ours]}" for ours in self.mapping if ours in self._unseen]
        strange = [name for name in self.ignored if name not in self._names]
        if strange and self._names:
            there = f"no row has such a column; there are: {', '.join(self._names)}"
            raise UserError(f"ignore_columns = {', '.join(strange)}: {there}")
        if unseen and self._names:
            there = f"no row has such a column; there are: {', '.join(self._names)}"
            raise UserError(f"columns = {', '.join(unseen)}: {there}")


def value_at(row: Any, path: str, default: Any = None) -> Any:
    """The value at a dotted path into mappings and lists ("answers.0.text"); a column whose own name has dots wins."""
    if isinstance(row, Mapping) and path in row:
        return row[path]
    head, dot, rest = path.partition(".")
    if isinstance(row, Mapping):
        value = row.get(head, _NOTHING)
    elif isinstance(row, list) and head.lstrip("-").isdigit() and -len(row) <= int(head) < len(row):
        value = row[int(head)]
    else:
        value = _NOTHING
    if value is _NOTHING:
        return default
    return value_at(value, rest, default) if dot else value


class Comparison(NamedTuple):
    """Where both replies stand, the column of the verdict, and what it says: "first", "second" or "tie"."""

    first: str
    second: str
    verdict: str
    read: Callable[[Any, str, str], str]


def _one_of(**meanings: tuple[Any, ...]) -> Callable[[Any, str, str], str]:
    """A verdict that is spelled in one of these ways."""

    def read(value: Any, where: str, field: str) -> str:
        for meaning, values in meanings.items():
            if value in values and not isinstance(value, bool):
                return meaning
        expected = ", ".join(repr(value) for values in meanings.values() for value in values)
        raise wrong(where, field, f"one of {expected}", value)

    return read


def _signed(value: Any, where: str, field: str) -> str:
    """Nvidia's scale of -3 (the first is much better) to 3 (the second is)."""
    strength = number_of(value, where, field)
    return "first" if strength < 0 else "second" if strength > 0 else "tie"


_WINNER = _one_of(first=("model_a",), second=("model_b",), tie=("tie", "tie (bothbad)", "both_bad"))
# PKU-SafeRLHF (what helps; {better_response_id: safer_response_id} takes what harms least), HelpSteer2 and 3, SHP, the
# arena of LMSYS, OpenAI's summarize_from_feedback.
COMPARISONS = (
    Comparison("response_0", "response_1", "better_response_id", _one_of(first=(0,), second=(1,))),
    Comparison("response_1", "response_2", "preference_strength", _signed),
    Comparison("response1", "response2", "overall_preference", _signed),
    Comparison("human_ref_A", "human_ref_B", "labels", _one_of(first=(1,), second=(0,))),
    Comparison("conversation_a", "conversation_b", "winner", _WINNER),
    Comparison("summaries.0.text", "summaries.1.text", "choice", _one_of(first=(0,), second=(1,))),
)
_VERDICTS = {comparison.verdict for comparison in COMPARISONS}


def as_pair(row: dict, where: str, *, ties: bool = False) -> dict:
    """A row of a comparison with chosen and rejected added to it; every other row as it is.

    Raises BadRow for a verdict that is none, and DroppedRow where neither reply is better (ties: not for their sake,
    the prompt alone is wanted).
    """
    if "chosen" in row or "rejected" in row or row.keys().isdisjoint(_VERDICTS):
        return row
    known = next((c for c in COMPARISONS if c.verdict in row and value_at(row, c.second) is not None), None)
    if known is None:
        return row
    value = row[known.verdict]
    if isinstance(value, str) and value.strip().lstrip("-").isdecimal():  # a cell of a CSV file
        value = int(value)
    verdict = known.read(value, where, known.verdict)
    if verdict == "tie" and not ties:
        raise DroppedRow("comparisons that are a tie")
    better, worse = (known.second, known.first) if verdict == "second" else (known.first, known.second)
    return {**row, "chosen": value_at(row, better), "rejected": value_at(row, worse)}


def check_mapping(mapping: Mapping[str, str], row: Mapping[str, Any]) -> None:
    """Raise UserError where chosen and rejected are mapped to two columns and a third says which of them is better."""
    replies = {mapping.get("chosen"), mapping.get("rejected")}
    known = next((c for c in COMPARISONS if c.verdict in row and replies == {c.first, c.second}), None)
    if known is not None:
        pair = f"columns = chosen: {mapping['chosen']}, rejected: {mapping['rejected']}"
        says = f'the column "{known.verdict}" says for each row which of them is better'
        raise UserError(f"{pair}: {says}, and is read; leave chosen and rejected out of columns")
