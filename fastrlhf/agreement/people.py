"""How far people agree with each other where several rated the same reply: what a reward model can reach at most.

Spearman 1910, Brown 1910: where halves of the people correlate r, the mean of all has the reliability 2 r / (1 + r),
and what it is measured against, what everybody would say on average, correlates with it by the square root of that.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from statistics import fmean

import torch

from fastrlhf.agreement.bootstrap import moments, pearson

SPLITS = 20  # random halves, of which the mean is taken


def reliability(ratings: Sequence[Sequence[float]], seed: int) -> dict[str, float | int] | None:
    """ratings: of each reply, what each of its people gave it, in any order and number -> {"replies": with two or more,
    "people": the mean number of theirs, "halves": Pearson's r of means of random halves, "mean_of_all": the reliability
    of the mean of all, "ceiling": its square root}.

    None where fewer than three replies have two ratings, or halves do not correlate above 0: nothing can be told then.
    """
    several = [list(some) for some in ratings if len(some) > 1]
    if len(several) < 3:
        return None
    r = fmean(_halves(several, random.Random(f"halves {seed} {split}")) for split in range(SPLITS))
    if not r > 0:  # NaN too: everybody gave everything the same
        return None
    whole = 2 * r / (1 + r)
    return {
        "replies": len(several),
        "people": fmean(map(len, several)),
        "halves": r,
        "mean_of_all": whole,
        "ceiling": math.sqrt(whole),
    }


def _halves(ratings: Sequence[Sequence[float]], draw: random.Random) -> float:
    """r of the means of two random halves of each reply's ratings; of an odd number one half has one more."""
    first, second = [], []
    for some in ratings:
        mixed = draw.sample(some, len(some))
        middle = len(mixed) // 2
        first.append(fmean(mixed[:middle]))
        second.append(fmean(mixed[middle:]))
    return float(pearson(torch.tensor(moments(first, second), dtype=torch.float64).sum(0)))
