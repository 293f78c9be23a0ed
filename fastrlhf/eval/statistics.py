"""Means of replies with their standard errors, and win rates with their intervals. A prompt's replies are not
independent of each other, so what varies is taken to be the prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from fastrlhf.agreement.bootstrap import draws, interval, ratio

Values = Sequence[float | None]  # a reply each, prompt-major; None: not known


def estimate(values: Values, samples: int) -> dict[str, float | None]:
    """{"mean", "standard_error"} of what is known of the replies, `samples` to each prompt.

    The error is that of a ratio whose clusters are the prompts (Cochran 1977, section 6.8; one sample a prompt: the
    usual s / sqrt(N)); None for a single prompt. Both are None where nothing is known.
    """
    known = [value for value in values if value is not None]
    if not known:
        return {"mean": None, "standard_error": None}
    mean = math.fsum(known) / len(known)
    clusters = [[v - mean for v in values[i : i + samples] if v is not None] for i in range(0, len(values), samples)]
    sums = [math.fsum(cluster) for cluster in clusters if cluster]
    error = None
    if len(sums) > 1:
        error = math.sqrt(len(sums) / (len(sums) - 1) * math.fsum(s * s for s in sums)) / len(known)
    return {"mean": mean, "standard_error": error}


def compare(ours: Values, theirs: Values, samples: int, seed: int) -> dict[str, Any]:
    """Each reply against the other model's to the same prompt by the same random numbers; the higher score wins.

    rate: wins and half the ties among the pairs in which both have a score; interval: 95 %, of resampled prompts
    (agreement/bootstrap.py); difference: `estimate` of score minus score. UserError nowhere: rate and interval are None
    where no pair is scored.
    """
    differences = [None if a is None or b is None else a - b for a, b in zip(ours, theirs, strict=True)]
    known = [d for d in differences if d is not None]
    wins, ties = sum(d > 0 for d in known), sum(d == 0 for d in known)
    counts = {"wins": wins, "ties": ties, "losses": len(known) - wins - ties, "unscored": len(ours) - len(known)}
    rate = (wins + 0.5 * ties) / len(known) if known else None
    interval = _bootstrap(differences, samples, seed) if known else None
    return {"rate": rate, "interval": interval, **counts, "difference": estimate(differences, samples)}


def _bootstrap(differences: Values, samples: int, seed: int) -> list[float] | None:
    """The interval of the win rate over resampled prompts; None for a single prompt."""
    rows = [[d for d in differences[i : i + samples] if d is not None] for i in range(0, len(differences), samples)]
    sums = [(sum((d > 0) + 0.5 * (d == 0) for d in row), len(row)) for row in rows if row]
    return interval(draws(torch.tensor(sums, dtype=torch.float64), ratio, seed))
