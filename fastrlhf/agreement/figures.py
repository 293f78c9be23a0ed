"""The figures: agreement with people by kind, source, annotator, margin and length, calibration, and the baselines."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any

from torch import Tensor

from fastrlhf.agreement import baselines
from fastrlhf.agreement.bootstrap import draws, interval, moments, pearson, ratio, sums_by
from fastrlhf.agreement.pairs import Pair, Scores, length_of, margins, ordered, prompt_key, source_of
from fastrlhf.agreement.people import reliability
from fastrlhf.data.feedback import Feedback

EDGES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)  # of the probability that the model gives its own choice
WORDS = "bag of words"


def figures(
    records: Sequence[Feedback], scores: Scores, *, training: Sequence[Feedback] | None = None, seed: int = 0
) -> dict[str, Any]:
    """records: what people said, which must tell something (`pairs.can_tell`); scores: a model's, of each record one a
    response -> the report of `words.lines`.

    training: see `baselines.by_words`. Intervals: the middle 95 % of 2000 bootstrap samples of the prompts. A tie of
    two scores counts half. None stands for what the rows do not tell: `pairs` where nothing is ordered,
    `with_scores` where nobody gave different scores, `people` where no reply has several people's ratings.
    """
    agreement = _Agreement(records, seed)
    own = list(scores)
    report: dict[str, Any] = {"prompts": len(set(agreement.prompts)), "records": len(records)}
    report["replies"] = sum(len(record.responses) for record in records)
    report["pairs"] = agreement.accuracy(own)
    report["with_scores"] = agreement.with_scores(own)
    report["people"] = reliability([some for record in records for some in record.ratings or ()], seed)
    if agreement.pairs:
        report["by"] = agreement.by_group(own)
        report["calibration"] = calibration(margins(agreement.pairs, own))
    report["with_length"] = agreement.with_length(own)
    words, how = baselines.by_words(records, training, seed)
    others = {"length": baselines.by_length(records), "a constant": baselines.constant(records), WORDS: words}
    report["baselines"] = {
        name: {"missing": how} if other is None else agreement.beside(own, other) for name, other in others.items()
    }
    if words is not None:
        report["baselines"][WORDS]["how"] = how
    return report


class _Agreement:
    """Figures of scores over the same records, with intervals of the same resamples."""

    def __init__(self, records: Sequence[Feedback], seed: int) -> None:
        self.records, self.seed = records, seed
        self.pairs = ordered(records)
        self.prompts = [prompt_key(record) for record in records]
        self.rated = [n for n, record in enumerate(records) if record.scores is not None]
        given = {score for n in self.rated for score in records[n].scores or ()}
        if len(given) < 2:
            self.rated = []

    def _of_pairs(self, scores: Scores, pairs: Sequence[Pair]) -> Tensor:
        """[C, 2] of each prompt: pairs in the order that people put them in, a tie half; pairs."""
        won = [(m > 0) + 0.5 * (m == 0) for m in margins(pairs, scores)]
        return sums_by([self.prompts[pair.record] for pair in pairs], [(w, 1.0) for w in won])

    def accuracy(self, scores: Scores, pairs: Sequence[Pair] | None = None) -> dict[str, Any] | None:
        """{"pairs", "accuracy", "interval"}; None where there are none."""
        pairs = self.pairs if pairs is None else pairs
        if not pairs:
            return None
        sums = self._of_pairs(scores, pairs)
        found = {"pairs": len(pairs), "accuracy": float(ratio(sums.sum(0)))}
        return found | {"interval": interval(draws(sums, ratio, self.seed))}

    def _of_scores(self, scores: Scores, other: Callable[[int], Sequence[float]], among: Sequence[int]) -> Tensor:
        """[C, 6] of each prompt: `moments` of a model's scores beside another number of each reply."""
        both = [(n, x, y) for n in among for x, y in zip(scores[n], other(n), strict=True)]
        prompts, xs, ys = ([self.prompts[n] for n, *_ in both], [x for _, x, _ in both], [y for *_, y in both])
        return sums_by(prompts, moments(xs, ys))

    def _correlation(self, sums: Tensor, replies: int) -> dict[str, Any]:
        found = float(pearson(sums.sum(0)))
        within = interval(draws(sums, pearson, self.seed))
        return {"replies": replies, "r": None if math.isnan(found) else found, "interval": within}

    def with_scores(self, scores: Scores) -> dict[str, Any] | None:
        """Pearson's correlation with the scores that people gave."""
        if not self.rated:
            return None
        sums = self._of_scores(scores, lambda n: self.records[n].scores or (), self.rated)
        return self._correlation(sums, sum(len(self.records[n].responses) for n in self.rated))

    def with_length(self, scores: Scores) -> dict[str, Any]:
        """Pearson's correlation with the length of the replies."""
        lengths = [[float(length_of(text)) for text in record.responses] for record in self.records]
        sums = self._of_scores(scores, lengths.__getitem__, range(len(self.records)))
        return self._correlation(sums, sum(map(len, lengths)))

    def by_group(self, scores: Scores) -> dict[str, dict[str, Any]]:
        """Accuracy in the groups that the rows make; what makes one group only is left out."""
        length = [[length_of(text) for text in record.responses] for record in self.records]
        given = sorted(m for pair in self.pairs if (m := self.records[pair.record].margin) is not None)

        def longer(pair: Pair) -> str:
            n, i, j = pair
            difference = length[n][i] - length[n][j]
            return "better is longer" if difference > 0 else "better is shorter" if difference < 0 else "as long"

        def strength(pair: Pair) -> str | None:
            margin = self.records[pair.record].margin
            if margin is None or given[0] == given[-1]:
                return None
            middle = given[len(given) // 2]
            above = margin >= middle if middle > given[0] else margin > middle
            return "stated margin, upper half" if above else "stated margin, lower half"

        ways: dict[str, Callable[[Pair], str | None]] = {
            "kind": lambda pair: self.records[pair.record].kind,
            "source": lambda pair: source_of(self.records[pair.record]),
            "annotator": lambda pair: self.records[pair.record].annotator,
            "length": longer,
            "margin": strength,
        }
        found = {}
        for way, group_of in ways.items():
            groups = [group_of(pair) for pair in self.pairs]
            names = sorted({group for group in groups if group is not None})
            if len(names) > 1 or (way == "annotator" and names):
                found[way] = {
                    name: self.accuracy(scores, list(compress(self.pairs, (group == name for group in groups))))
                    for name in names
                }
        return found

    def beside(self, scores: Scores, other: Scores) -> dict[str, Any]:
        """A baseline, and how far the model is above it: in accuracy, or where no pair is ordered in correlation."""
        found: dict[str, Any] = {"pairs": self.accuracy(other), "with_scores": self.with_scores(other)}
        if self.pairs:
            statistic, sums = ratio, [self._of_pairs(s, self.pairs) for s in (scores, other)]
        else:
            given = [self.records[n].scores or () for n in range(len(self.records))]
            statistic, sums = pearson, [self._of_scores(s, given.__getitem__, self.rated) for s in (scores, other)]
        values = [float(statistic(part.sum(0)).nan_to_num(0.0)) for part in sums]  # one score for all: no correlation
        drawn = [draws(part, statistic, self.seed) for part in sums]
        between = None if drawn[0] is None else interval(drawn[0].nan_to_num(0.0) - drawn[1].nan_to_num(0.0))
        return found | {"above": values[0] - values[1], "interval": between}


def calibration(found: Sequence[float]) -> dict[str, Any]:
    """margins, better less worse: scores taken for those of Bradley-Terry, as training on pairs does.

    bins: by the probability sigmoid(|margin|) that the model gives its own choice: pairs, mean probability, and the
    share in which people chose the same. error: their mean difference, weighed by pairs (expected calibration error).
    nats: mean -log of the probability that the model gives to what people chose; log 2 = 0.693 is a coin's.
    """
    sure = [1 / (1 + math.exp(-min(abs(m), 700.0))) for m in found]
    right = [(m > 0) + 0.5 * (m == 0) for m in found]
    bins = []
    for low, high in zip(EDGES, EDGES[1:]):
        inside = [n for n, p in enumerate(sure) if low <= p < high or p == high == 1.0]
        if inside:
            mean, share = (math.fsum(values[n] for n in inside) / len(inside) for values in (sure, right))
            bins.append({"from": low, "to": high, "pairs": len(inside), "probability": mean, "right": share})
    error = math.fsum(b["pairs"] * abs(b["probability"] - b["right"]) for b in bins) / len(found)
    nats = math.fsum(max(-m, 0.0) + math.log1p(math.exp(-abs(m))) for m in found) / len(found)
    return {"bins": bins, "error": error, "nats": nats}
