"""Judgements and a model's scores as ordered pairs: what people liked better, and by how much the model does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from fastrlhf.data.feedback import Feedback
from fastrlhf.runtime.metrics import ngrams

Scores = Sequence[Sequence[float]]  # of each record a score a response


class Pair(NamedTuple):
    """Two responses of the record with this number, the one that people liked better first."""

    record: int
    better: int
    worse: int


def units(text: str) -> list[str]:
    """Words of Latin script and single characters otherwise, in lower case."""
    return [unit for (unit,) in ngrams(text, 1)]


def length_of(text: str) -> int:
    """In `units`, which depend on no tokenizer."""
    return len(units(text))


def ordered(records: Sequence[Feedback]) -> list[Pair]:
    """Every pair of responses that a record puts in an order."""
    return [Pair(n, i, j) for n, record in enumerate(records) for i, j in record.ordered_pairs()]


def margins(pairs: Sequence[Pair], scores: Scores) -> list[float]:
    """Score of the better response less that of the worse, a pair each."""
    return [scores[n][i] - scores[n][j] for n, i, j in pairs]


def prompt_key(record: Feedback) -> str:
    """The same for records of one prompt, which are not independent of each other."""
    return json.dumps(record.prompt, ensure_ascii=False)


def source_of(record: Feedback) -> str:
    """The row's column `source`, else the file that it stands in."""
    return record.source if record.source is not None else record.where.rpartition(":")[0] or "rows"


def can_tell(records: Sequence[Feedback]) -> bool:
    """Whether any agreement can be measured: two replies in an order, or two different scores."""
    scores = {score for record in records for score in record.scores or ()}
    return len(scores) > 1 or bool(ordered(records))
