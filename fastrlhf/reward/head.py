"""Where a new head begins: at the same score for everything, nearly, so that the first loss is that of a constant."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from fastrlhf.models.heads import last_hidden
from fastrlhf.runtime import distributed

SPREAD = 0.3  # deviation of the first raw outputs
SAMPLED = 32  # token rows that tell where the states are


@torch.no_grad()
def settle_head(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> None:
    """Turn and shrink the drawn head `score` so that its outputs on these token rows have mean 0 and deviation SPREAD.

    The last hidden states h of a language model have a large common part m, their mean; a head drawn at random gives it
    a score far from 0. w - (w.m / m.m) m does not see it. One row at a time, whatever the memory; rows whose states are not
    finite tell nothing. All ranks get the head of the first one.
    """
    model.eval()
    states = torch.cat([last_hidden(model, [row]).cpu().double() for row in rows])
    states = states[states.isfinite().all(-1)]
    if not len(states):
        return
    weight, mean = model.score.weight, states.mean(0)
    head = weight[0].cpu().double()
    length = mean @ mean
    if length > 0:
        head = head - (head @ mean) / length * mean
    deviation = (states @ head).std(unbiased=False)
    if deviation > 1e-6 * head.norm() * length.sqrt():  # else the rows are all the same to the model
        head = head * (SPREAD / deviation)
    weight.copy_(distributed.gather_each(head)[0][None])
