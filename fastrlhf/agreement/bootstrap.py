"""Intervals by resampling prompts with replacement (Efron 1979): judgements of one prompt are not independent.

Draws of one seed over the same prompts are of the same resamples, so draws of two models may be subtracted.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

RESAMPLES = 2000
CHUNK, CHUNK_ROWS = 100, 2_000_000  # resamples at once, and prompts in all of them: the memory of a draw
INTERVAL = (0.025, 0.975)  # the middle 95 %


def sums_by(clusters: Sequence[Hashable], values: Sequence[Sequence[float]]) -> Tensor:
    """values: k numbers each -> their sums [C, k] fp64 of each cluster, in the order in which clusters appear."""
    numbers = {cluster: n for n, cluster in enumerate(dict.fromkeys(clusters))}
    rows = torch.tensor(values, dtype=torch.float64)
    index = torch.tensor([numbers[cluster] for cluster in clusters])
    return torch.zeros(len(numbers), rows.shape[1], dtype=torch.float64).index_add_(0, index, rows)


def draws(sums: Tensor, statistic: Callable[[Tensor], Tensor], seed: int) -> Tensor | None:
    """sums: [C, k] of each cluster; statistic: of the sums over clusters [..., k] -> [...]. Its value [RESAMPLES] in
    resamples of the clusters; None for a single cluster, which varies in no way that can be seen."""
    count = len(sums)
    if count < 2:
        return None
    generator, found = torch.Generator().manual_seed(seed), []
    chunk = max(1, min(CHUNK, CHUNK_ROWS // count))
    for start in range(0, RESAMPLES, chunk):
        index = torch.randint(count, (min(chunk, RESAMPLES - start), count), generator=generator)
        found.append(statistic(sums[index].sum(1)))
    return torch.cat(found)


def interval(drawn: Tensor | None) -> list[float] | None:
    """The middle 95 % of draws, those that are not finite left out (of one value alone no correlation is known)."""
    known = None if drawn is None else drawn[drawn.isfinite()]
    if known is None or not len(known):
        return None
    return known.quantile(torch.tensor(INTERVAL, dtype=torch.float64)).tolist()


def ratio(sums: Tensor) -> Tensor:
    """[..., 2] -> first by second."""
    return sums[..., 0] / sums[..., 1]


def moments(xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, ...]]:
    """What `pearson` needs the sums of."""
    return [(1.0, x, y, x * x, y * y, x * y) for x, y in zip(xs, ys, strict=True)]


def pearson(sums: Tensor) -> Tensor:
    """Sums [..., 6] of `moments` -> the correlation, NaN where one of the two does not vary."""
    n, x, y, xx, yy, xy = sums.unbind(-1)
    spread_x, spread_y = n * xx - x * x, n * yy - y * y
    # Of equal numbers rounding leaves a little, of either sign.
    varies = (spread_x > 1e-12 * n * xx) & (spread_y > 1e-12 * n * yy)
    found = (n * xy - x * y) / (spread_x * spread_y).clamp_min(1e-300).sqrt()
    return torch.where(varies, found, torch.nan)
