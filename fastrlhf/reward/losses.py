"""The losses of one record, from the raw outputs of its responses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastrlhf.data.feedback import Feedback, Ranking

SCORE_WEIGHT = 0.5  # of the squared error of a score beside a preference's loss: see docs/options.md


def preference_loss(
    scores: Tensor, ranking: Sequence[Sequence[int]], margin: float | None = None, smoothing: float = 0.0
) -> Tensor:
    """Negative log-likelihood of a ranking under Plackett-Luce, averaged over its stages; scores [K] fp32 -> 0-d, or of
    M heads [K, M] -> [M].

    Stage g: each response of group g is preferred to all of later groups: -log(e^s_i / (e^s_i + sum_later e^s_j)).
    Ties are not compared with each other. K = 2 is Bradley-Terry, -logsigmoid(s_chosen - s_rejected - margin).
    smoothing: see `smoothed`, for each stage.
    """
    if len(scores) == 2 and len(ranking) == 2:
        best, worst = ranking[0][0], ranking[1][0]
        return smoothed(scores[best] - scores[worst] - (margin or 0.0), smoothing)
    terms = []
    for stage, group in enumerate(ranking[:-1]):
        later = torch.logsumexp(scores[[i for rest in ranking[stage + 1 :] for i in rest]], 0)
        terms += [smoothed(scores[i] - later, smoothing) for i in group]
    return torch.stack(terms).mean(0)


def smoothed(log_odds: Tensor, smoothing: float) -> Tensor:
    """-(1 - a) log p - a log(1 - p), p = sigmoid(log_odds), a = smoothing, which is how often the label is wrong (Wang
    et al. 2024, Secrets of RLHF in Large Language Models Part II, label smoothing)."""
    loss = -F.logsigmoid(log_odds)
    return loss + smoothing * log_odds if smoothing else loss  # log(1 - p) = log p - log_odds


def implied_ranking(scores: Sequence[float]) -> Ranking:
    """The ranking that scores of one prompt's replies imply: best first, equal ones tied."""
    return tuple(tuple(i for i, s in enumerate(scores) if s == level) for level in sorted(set(scores), reverse=True))


def score_loss(read: Tensor, given: Sequence[float]) -> Tensor:
    """Half the mean squared error of scores [K] fp32 to those given, both in deviations -> 0-d; of M heads [K, M] ->
    [M]."""
    targets = read.new_tensor(given)
    return 0.5 * (read - (targets[:, None] if read.dim() > 1 else targets)).square().mean(0)


def record_loss(
    scores: Tensor,
    feedback: Feedback,
    read: Tensor | None = None,
    given: Sequence[float] = (),
    smoothing: float = 0.0,
    weight: float = SCORE_WEIGHT,
) -> Tensor:
    """Loss of one record from the raw outputs [K], or [K, M], of its responses. Of a record with scores: weight times
    the `score_loss` of read and given, and the `preference_loss` of the order that they imply, where two of them
    differ."""
    if feedback.scores is None:
        return preference_loss(scores, feedback.ranking, feedback.margin, smoothing)
    loss, ranking = weight * score_loss(read, given), implied_ranking(feedback.scores)
    return loss + preference_loss(scores, ranking, smoothing=smoothing) if len(ranking) > 1 else loss
