"""Checked records out of files and datasets, what became of every row, and the order in which records are used.

Every row is read, checked and counted: none disappears without a reason in Counts.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from fastrlhf.config.base import StageConfig
from fastrlhf.config.errors import UserError
from fastrlhf.data.checks import BadRow, DroppedRow
from fastrlhf.data.columns import Columns
from fastrlhf.data.feedback import (
    Conversation,
    Feedback,
    Prompt,
    judgement_id,
    parse_conversation,
    parse_feedback,
    parse_prompt,
)
from fastrlhf.data.rows import read_rows
from fastrlhf.data.unsafe import settle

if TYPE_CHECKING:
    from typing_extensions import Unpack

T = TypeVar("T")
MALFORMED = "malformed"
MALFORMED_KEPT = 5
REPEATED = "repeat an earlier prompt"
SCORES_TO_JUDGE = 20  # fewer may leave out the ends of their scale by chance
REPLACED = "replaced by a later row of their judgement_id"


@dataclass
class Counts:
    """What became of the rows of one source. dropped: reason -> rows; noted: changes that kept the row."""

    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)
    malformed: list[str] = field(default_factory=list)  # the first MALFORMED_KEPT messages of skipped rows
    limit: int | None = None  # max_samples: no row behind the first so many was read

    @property
    def used(self) -> int:
        """Rows read and not dropped."""
        return self.read - sum(self.dropped.values())

    def add(self, reason: str, n: int = 1) -> None:
        """Count n rows as left out for reason, e.g. "longer than 1024 tokens"."""
        if n:
            self.dropped[reason] += n

    def add_bad(self, error: BadRow, *, skip: bool) -> None:
        """Count a bad row as malformed where such rows are skipped; raise UserError where they are not."""
        if not skip:
            raise UserError(f"{error} (skip_bad_rows=true leaves such rows out)") from error
        self.add(MALFORMED)
        if len(self.malformed) < MALFORMED_KEPT:
            self.malformed.append(str(error))

    def line(self) -> str:
        """For people: "2400 rows read, 2391 used, dropped: 6 longer than 1024 tokens, 3 malformed"."""
        limited = " (max_samples)" if self.read == self.limit else ""
        text = f"{self.read} rows read{limited}, {self.used} used"
        if self.dropped:
            text += ", dropped: " + ", ".join(f"{n} {reason}" for reason, n in self.dropped.most_common())
        if self.noted:
            text += "; " + ", ".join(f"{n} {note}" for note, n in self.noted.most_common())
        if self.malformed:
            text += f"; first malformed: {self.malformed[0]}"
        return text


Loaded = tuple[list[T], Counts]  # the records of a source, and what became of its rows


class Reading(TypedDict, total=False):
    """How the rows of a source are read: the fields of every stage's config of these names.

    skip_bad_rows: bad rows are counted as malformed instead of ending the run. columns, ignore_columns: see Columns.
    every_column: a mapping whose column no row has is an error. max_samples: rows behind the first so many are not
    looked at. seen: is told of each record when it is read; that it stays one of the source is not said.
    """

    skip_bad_rows: bool
    columns: Mapping[str, str] | None
    ignore_columns: Iterable[str] | None
    every_column: bool
    max_samples: int | None
    seen: Callable[[Any], None] | None


def reading(config: StageConfig, role: str) -> Reading:
    """What a config says of how the rows of an input are read; the mapping is of the main one: others may have less."""
    return Reading(
        skip_bad_rows=config.skip_bad_rows,
        columns=config.columns,
        ignore_columns=config.ignore_columns,
        every_column=role in ("data", "prompts"),
        max_samples=config.max_samples,
    )


def _load(
    source: Any,
    parse: Callable[[Any, str], T],
    needs: str,
    *,
    skip_bad_rows: bool = False,
    columns: Mapping[str, str] | None = None,
    ignore_columns: Iterable[str] | None = None,
    every_column: bool = True,
    max_samples: int | None = None,
    seen: Callable[[Any], None] | None = None,
    judged: bool = True,
) -> Loaded[T]:
    """judged: rows with the same judgement_id are one, the last."""
    counts, names = Counts(limit=max_samples), Columns(columns, ignore_columns)
    kept: dict[str | int, T] = {}  # by judgement, else by row
    for where, row in islice(read_rows(source), max_samples):
        counts.read += 1
        try:
            if isinstance(row, BadRow):
                raise row
            key = judgement_id(row) if judged else None
            if key is not None and kept.pop(key, None) is not None:
                counts.add(REPLACED)
            named = names.of(row)
            item = parse(named, where)
            if named is not row and isinstance(item, Prompt):
                item = _with_columns(item, row)
            kept[counts.read if key is None else key] = item
            if seen is not None:
                seen(item)
        except DroppedRow as dropped:
            counts.add(dropped.reason)
        except BadRow as error:
            counts.add_bad(error, skip=skip_bad_rows)
    if every_column:
        names.check()
    counts.noted += names.noted
    items = list(kept.values())
    if not items:
        name = source if isinstance(source, (str, Path)) else f"the {type(source).__name__} given"
        raise UserError(f"{name}: no usable row of {needs} ({counts.line()})")
    return items, counts


def _with_columns(prompt: Prompt, row: Any) -> Prompt:
    """The prompt with the columns of its row that were renamed or left out: reward functions get them as they are."""
    if not isinstance(row, Mapping):
        return prompt
    return replace(prompt, columns={**{k: v for k, v in row.items() if k not in prompt.used}, **prompt.columns})


def load_feedback(
    source: Any, *, score_range: tuple[float, float] = (1.0, 5.0), **how: Unpack[Reading]
) -> Loaded[Feedback]:
    """All feedback of a source (see read_rows) in its order, and what became of its rows. Replies that any row marks as
    unsafe are below the safe ones of their prompt everywhere (`settle` of unsafe.py).

    Raises UserError at the first bad row, naming file, line and field; with skip_bad_rows bad rows are counted
    as malformed instead. Raises it too when no usable row is left, and for a mapping of columns that no row has. Scores
    that do not reach the ends of score_range, perhaps because it is another scale than theirs, are noted in Counts.
    """
    items, counts = _load(source, lambda row, where: parse_feedback(row, where, score_range), "feedback", **how)
    given = [(item.ratings or (item.scores,)) if item.scores is not None else () for item in items]
    scores = [score for lists in given for some in lists for score in some]
    is_scale = len(scores) >= SCORES_TO_JUDGE and any(-1 < score < 1 for score in scores)  # others are labels
    if is_scale and not {-1, 1} <= set(scores):
        low, high = score_range
        least, most = (low + (end + 1) / 2 * (high - low) for end in (min(scores), max(scores)))
        note = f"scored from {least:.4g} to {most:.4g} on a scale of {low:g} to {high:g} (score_range)"
        counts.noted[note] = sum(item.scores is not None for item in items)
    people = sorted(len(some) for item in items for some in item.ratings or ())
    if people:
        note = f"rated by {people[0]} to {people[-1]} people a reply, of whom the mean is learnt"
        counts.noted[note] = sum(item.ratings is not None for item in items)
    return settle(items, counts.noted), counts


def load_conversations(source: Any, *, format: str = "auto", **how: Unpack[Reading]) -> Loaded[Conversation]:
    """All SFT examples of a source; format as in parse_conversation; errors as in load_feedback."""
    return _load(source, lambda row, where: parse_conversation(row, where, format), "SFT data", **how)


def load_prompts(source: Any, **how: Unpack[Reading]) -> Loaded[Prompt]:
    """All prompts of a source, each with the columns of all rows, None where its row has none; errors as in
    load_feedback.

    Prompts that were cut and prompts that stand in the source more than once are kept and noted in Counts.
    """
    prompts, counts = _load(source, parse_prompt, "prompts", judged=False, **how)
    order = list(dict.fromkeys(name for prompt in prompts for name in prompt.columns))
    prompts = [
        prompt
        if list(prompt.columns) == order
        else replace(prompt, columns={name: prompt.columns.get(name) for name in order})
        for prompt in prompts
    ]
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.note:
            counts.noted[prompt.note] += 1
        text = repr(prompt.prompt)
        if text in seen:
            counts.noted[REPEATED] += 1
        seen.add(text)
    return prompts, counts


def split_heldout(
    items: Sequence[T], fraction: float, seed: int, key: Callable[[T], Hashable] | None = None
) -> tuple[list[T], list[T]]:
    """(train, held out), both in the order of items; the same for the same items, fraction and seed.

    Items with the same key stay together: with several judgements of a prompt, key=its prompt, accuracy is measured on
    prompts that were not trained on. Held out are at most round(fraction * len(items)), but one group at least: with
    fraction > 0 and two groups or more neither part is empty. Items of one single group are split singly.
    """
    keys = list(range(len(items))) if key is None else [key(item) for item in items]
    if len(set(keys)) < 2:
        keys = list(range(len(items)))
    sizes = Counter(keys)
    order = list(sizes)
    random.Random(f"held out {seed}").shuffle(order)
    held_out: set[Hashable] = set()
    room = min(round(fraction * len(items)), len(items) - 1)
    for group in order:
        if sizes[group] <= room:
            held_out.add(group)
            room -= sizes[group]
    # Every group may be larger than the room; the smallest is then held out all the same.
    if fraction > 0 and not held_out and len(order) > 1:
        held_out.add(min(order, key=sizes.__getitem__))
    train = [item for item, group in zip(items, keys) if group not in held_out]
    return train, [item for item, group in zip(items, keys) if group in held_out]
