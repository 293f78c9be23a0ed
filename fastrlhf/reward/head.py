"""Where a new head begins: at the same score for everything, nearly, so that the first loss is that of a constant."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrlhf.models.heads import readout_of, row_states
from fastrlhf.parallel import sharding
from fastrlhf.runtime import distributed

SPREAD = 0.3  # deviation of the first raw outputs
SAMPLED = 64  # token rows that tell where the states are


@torch.no_grad()
def settle_head(model: PreTrainedModel, rows: Sequence[Sequence[int]], beside: Tensor | None = None) -> None:
    """Turn the drawn head `score`, each of several, so that its outputs on these token rows have mean 0, deviation
    SPREAD at most.

    The hidden states of a language model have a large common part, their mean, and few directions in which they
    differ much; a head drawn at random gives both scores far from 0. What it sees of the mean is taken from it, and of
    those directions, the largest first, until the deviation is small. It is not made shorter where that will do: a
    short head learns slowly. One row at a time, whatever the memory; rows whose states are not finite tell nothing. All
    ranks get the head of the first one. beside: a weight [1, H] that is added in the end. Of a sharded model all ranks
    run the rows together.
    """
    model.eval()
    states = torch.cat([row_states(model, [row], readout_of(model)).cpu().double() for row in rows])
    sharding.settle(model)
    states = states[states.isfinite().all(-1)]
    weight = model.score.weight
    heads = sharding.whole_everywhere(weight).cpu().double()
    if len(states):
        heads = torch.stack([_settled(head, states) for head in heads])
    heads = distributed.gather_each(heads)[0].to(getattr(weight, "computed_in", weight.dtype))
    heads = heads if beside is None else heads + beside.to(heads)
    sharding.local(weight).copy_(sharding.cut(weight, heads))


def _settled(head: Tensor, states: Tensor) -> Tensor:
    """The head [H] as these states [N, H] ask for it."""
    drawn, mean = head.norm(), states.mean(0)
    if mean.norm() > 0:
        head = head - (head @ mean) / (mean @ mean) * mean
    # In the complement of the mean: a direction that is taken away must not bring the mean back.
    spread = states - states.mean(0)
    if mean.norm() > 0:
        spread = spread - (spread @ mean)[:, None] / (mean @ mean) * mean
    for direction in torch.linalg.svd(spread, full_matrices=False).Vh:
        shorter = head - (head @ direction) * direction
        if (states @ head).std(unbiased=False) <= SPREAD or shorter.norm() < drawn / 2:
            break
        head = shorter
    deviation = float((states @ head).std(unbiased=False))
    return head * min(1.0, SPREAD / max(deviation, 1e-12))
