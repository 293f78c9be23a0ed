"""`columns` and `ignore_columns`: rows whose columns have other names than the formats know, or one too many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from fastrlhf.config.errors import UserError

_NOTHING = object()


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
        if not isinstance(row, Mapping) or not (self.mapping or self.ignored):
            return row
        values = {ours: _at(row, theirs) for ours, theirs in self.mapping.items()}
        values = {ours: value for ours, value in values.items() if value is not _NOTHING}
        taken = {root for ours in values for root in (self.mapping[ours], self.mapping[ours].partition(".")[0])}
        self._unseen -= values.keys()
        self._names |= dict.fromkeys(map(str, row))
        for name in self.ignored:
            if row.get(name) is not None:
                self.noted[f'without their column "{name}" (ignore_columns)'] += 1
        kept = {name: value for name, value in row.items() if name not in taken and name not in self.ignored}
        return kept | values

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


def _at(row: Any, path: str) -> Any:
    """The value at a dotted path; a column whose own name has dots wins."""
    if isinstance(row, Mapping) and path in row:
        return row[path]
    head, dot, rest = path.partition(".")
    if isinstance(row, Mapping):
        value = row.get(head, _NOTHING)
    elif isinstance(row, list) and head.lstrip("-").isdigit() and -len(row) <= int(head) < len(row):
        value = row[int(head)]
    else:
        value = _NOTHING
    return _at(value, rest) if dot and value is not _NOTHING else value
