"""Given scores, person by person: one is generous, another uses the middle of the scale alone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from fastrlhf.config.errors import UserError
from fastrlhf.data.encode import Record
from fastrlhf.data.feedback import Feedback

PRIOR = 5  # ratings, those of everyone, that a person's mean and variance begin with
TOGETHER = 4  # replies of one record, at most, where rows are joined


@dataclass(frozen=True)
class Raters:
    """mean, deviation: of all training scores, on [-1, 1]. people: the same of each annotator by name. alike: how many
    of them gave one rating, or one score alone."""

    mean: float = 0.0
    deviation: float = 1.0
    people: dict[str, tuple[float, float]] = field(default_factory=dict)
    alike: int = 0

    def read(self, feedback: Feedback) -> list[float]:
        """The scores of a record in deviations from the mean, of its annotator where that one is known."""
        mean, deviation = self.people.get(feedback.annotator, (self.mean, self.deviation))
        return [(score - mean) / deviation for score in feedback.scores]

    def note(self) -> str | None:
        """How people's scores are read, in a sentence; None: nobody is named."""
        if not self.people:
            return None
        text = f"scores of {len(self.people)} annotators: each is read on their own mean and deviation"
        if self.alike:
            text += f"; {self.alike} gave one rating or always the same, so theirs are read mostly on everyone's"
        return text


def raters_of(records: Iterable[Feedback]) -> Raters:
    """The mean and the deviation of every annotator's scores, and of all.

    A person of n ratings with mean m and variance v has the mean (n m + PRIOR M) / (n + PRIOR) and the variance
    (n v + PRIOR V) / (n + PRIOR), M and V those of everyone: who rated once, or always alike, is read on everyone's
    scale. Without scores, or where all of them are one: mean 0 and deviation 1.
    """
    given = [record for record in records if record.scores is not None]
    scores = [score for record in given for score in record.scores]
    if len(set(scores)) < 2:
        return Raters()
    own: dict[str, list[float]] = defaultdict(list)
    for record in given:
        if record.annotator is not None:
            own[record.annotator] += record.scores
    mean, variance = _moments(scores)
    people = {}
    for name, some in own.items():
        m, v = _moments(some)
        n = len(some)
        spread = math.sqrt((n * v + PRIOR * variance) / (n + PRIOR))
        people[name] = ((n * m + PRIOR * mean) / (n + PRIOR), spread)
    alike = sum(len(set(some)) < 2 for some in own.values())
    return Raters(mean, math.sqrt(variance), people, alike)


def _moments(values: Sequence[float]) -> tuple[float, float]:
    mean = math.fsum(values) / len(values)
    return mean, math.fsum((value - mean) ** 2 for value in values) / len(values)


def check_scores(records: Sequence[Record], score_range: tuple[float, float]) -> None:
    """UserError where several scores are learnt from and are all the same: they tell no reply from another."""
    scores = [score for record in records for score in record.feedback.scores or ()]
    if len(scores) > 1 and len(set(scores)) == 1:
        low, high = score_range
        value, where = low + (scores[0] + 1) / 2 * (high - low), records_with_scores(records)[0].feedback.where
        raise UserError(
            f"data: all scores and labels to learn from are {value:g} ({len(scores)} of them, the first at {where}), "
            "so they tell no reply from another; add rows with other scores, or leave these rows out"
        )


def records_with_scores(records: Iterable[Record]) -> list[Record]:
    """Those that hold scores."""
    return [record for record in records if record.feedback.scores is not None]


def joined(records: Sequence[Record]) -> list[Record]:
    """The records, with those that score replies to one prompt by one annotator (or by nobody named) made one record of
    up to TOGETHER replies, so that their order is learnt as well. It weighs as much as they did, and stands where the
    first of them stood."""
    places: dict[tuple[str, str | None, float], int] = {}
    together: list[list[Record]] = []
    for record in records:
        if record.feedback.scores is not None:
            key = (record.group, record.feedback.annotator, record.smoothing)
            place = places.get(key)
            if place is not None and sum(len(r.rows) for r in together[place]) + len(record.rows) <= TOGETHER:
                together[place].append(record)
                continue
            places[key] = len(together)
        together.append([record])
    return [_one(group) if len(group) > 1 else group[0] for group in together]


def _one(group: Sequence[Record]) -> Record:
    some = [record.feedback for record in group]
    responses = tuple(reply for feedback in some for reply in feedback.responses)
    scores = tuple(score for feedback in some for score in feedback.scores)
    rated = [feedback.ratings for feedback in some if feedback.ratings is not None]
    ratings = tuple(own for given in rated for own in given) if len(rated) == len(some) else None
    rows = [row for record in group for row in record.rows]
    judgements = sum(record.judgements for record in group)
    feedback = replace(some[0], responses=responses, scores=scores, ratings=ratings)
    return replace(group[0], rows=rows, feedback=feedback, judgements=judgements)
