"""Scores that need no reward model: the length of a reply, one number for all, the words it is made of."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from fastrlhf.agreement.pairs import length_of, prompt_key, units
from fastrlhf.data.feedback import Feedback
from fastrlhf.runtime.hardware import installed

FOLDS = 5
LEAST_ROWS = 2  # of prompts, and of what is learnt from
MOST_ROWS = 20_000  # that the words are learnt from: seconds; more change little
HOW = "pip install scikit-learn (extra 'eval')"


def by_length(records: Sequence[Feedback]) -> list[list[float]]:
    """Longer is better, in words of Latin script and single characters otherwise."""
    return [[float(length_of(text)) for text in record.responses] for record in records]


def constant(records: Sequence[Feedback]) -> list[list[float]]:
    """All alike: every pair is a tie."""
    return [[0.0] * len(record.responses) for record in records]


def by_words(
    records: Sequence[Feedback], training: Sequence[Feedback] | None, seed: int
) -> tuple[list[list[float]] | None, str]:
    """A bag of words -> (its scores, what it learnt from) or (None, why there is none).

    training: rows to learn from; None: the records themselves, in FOLDS parts of prompts each scored by what the other
    parts teach. tf-idf of `units`; a linear model of the pairs' differences (logistic, no intercept, so that turning a
    pair round turns its margin), or, where no row orders two replies, ridge regression on the scores.
    """
    if not installed("sklearn"):
        return None, HOW
    if training is not None:
        learnt = list(training)
        if len(learnt) > MOST_ROWS:
            learnt = random.Random(f"bag of words {seed}").sample(learnt, MOST_ROWS)
        fitted = _fit(learnt)
        if fitted is None:
            return None, "its training rows teach it nothing"
        return _apply(fitted, records), f"learnt from {len(learnt)} training rows"
    prompts = list(dict.fromkeys(map(prompt_key, records)))
    if len(prompts) < LEAST_ROWS:
        return None, "one prompt alone cannot be split; give --train"
    random.Random(f"bag of words {seed}").shuffle(prompts)
    fold_of = {prompt: n % FOLDS for n, prompt in enumerate(prompts)}
    folds = [fold_of[prompt_key(record)] for record in records]
    scores: list[list[float]] = [[] for _ in records]
    for fold in sorted(set(folds)):
        rest = [record for record, own in zip(records, folds) if own != fold]
        mine = [n for n, own in enumerate(folds) if own == fold]
        fitted = _fit(rest[:MOST_ROWS])
        if fitted is None:
            return None, "too few rows to learn it from; give --train"
        for n, row in zip(mine, _apply(fitted, [records[n] for n in mine]), strict=True):
            scores[n] = row
    return scores, f"cross-validated on these rows, {min(FOLDS, len(prompts))} parts of the prompts"


def _fit(records: Sequence[Feedback]) -> tuple[Any, Any] | None:
    """-> (what makes vectors of texts, the weight of each of their entries); None where there is nothing to learn."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge

    texts = [text for record in records for text in record.responses]
    if not any(map(units, texts)):
        return None
    vectors = TfidfVectorizer(analyzer=units, sublinear_tf=True)
    rows, first, better, worse, scored, targets = vectors.fit_transform(texts), 0, [], [], [], []
    for record in records:
        for i, j in record.ordered_pairs():
            better.append(first + i)
            worse.append(first + j)
        if record.scores is not None:
            scored += range(first, first + len(record.responses))
            targets += record.scores
        first += len(record.responses)
    if len(better) >= LEAST_ROWS:
        # Every second pair turned round: without an intercept that changes no loss, and there are two classes.
        first_better = [n % 2 == 0 for n in range(len(better))]
        ordered = [(b, w) if kept else (w, b) for b, w, kept in zip(better, worse, first_better)]
        differences = rows[[one for one, _ in ordered]] - rows[[other for _, other in ordered]]
        model = LogisticRegression(fit_intercept=False, max_iter=1000)
        weights = model.fit(differences, first_better).coef_[0]
    elif len(set(targets)) > 1:
        weights = Ridge().fit(rows[scored], targets).coef_
    else:
        return None
    return vectors, weights


def _apply(fitted: tuple[Any, Any], records: Sequence[Feedback]) -> list[list[float]]:
    vectors, weights = fitted
    found = iter((vectors.transform([t for r in records for t in r.responses]) @ weights).tolist())
    return [[next(found) for _ in record.responses] for record in records]
