"""Several heads on one trunk, which disagree where the data did not settle a score.

Coste et al. 2023 (Reward Model Ensembles Help Mitigate Overoptimization) train whole models apart; heads on one trunk
cost no second forward and differ less. What makes them differ: each starts with a draw of its own, and sees each record
with a weight of its own, Poisson(1), which is the bootstrap one record at a time (Oza and Russell 2001).
"""

from __future__ import annotations

import math
from random import Random

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastrlhf.config.errors import UserError
from fastrlhf.data.encode import Record
from fastrlhf.models.reward_folder import Heads
from fastrlhf.runtime.batching import derive_seed


def widen(model: PreTrainedModel, heads: int, seed: int, *, new: bool, known: Heads | None) -> Tensor | None:
    """Put `heads` heads in the place of the one that the model has: `score` becomes nn.Linear [M, H].

    known: the heads that it was saved with, which it goes on with; UserError where they are another number. Else each
    is drawn from the seed, for `settle_head`. Returned is the weight [1, H] that is to be added to them then, of the
    head that the model had; None where it is new: not trained.
    """
    old = model.score
    if known is not None and known.count != heads:
        raise UserError(f"ensemble = {heads}: the model has {known.count} heads; go on with ensemble={known.count}")
    how = {"device": old.weight.device, "dtype": old.weight.dtype}
    width = old.weight.shape[1]
    model.score = nn.Linear(width, heads, bias=old.bias is not None, **how)
    with torch.no_grad():
        if old.bias is not None:
            model.score.bias.copy_(old.bias.expand(heads) if known is None else known.bias)
            model.score.bias.requires_grad_(old.bias.requires_grad)
        if known is not None:
            model.score.weight.copy_(known.weight)
            return None
        draw = torch.Generator().manual_seed(derive_seed(seed, "ensemble"))
        model.score.weight.copy_(torch.randn(heads, width, generator=draw) * (width + 1) ** -0.5)
    return None if new else old.weight.detach()


def bootstrap(record: Record, heads: int, seed: int) -> list[int]:
    """How often each head sees the record, Poisson(1). It depends on what the record is and the seed, on no order."""
    draw, limit = Random(f"bootstrap {seed} {record.rows}"), math.exp(-1)
    counts = []
    for _ in range(heads):
        count, product = 0, draw.random()
        while product > limit:  # Knuth's
            count, product = count + 1, product * draw.random()
        counts.append(count)
    return counts


def over_heads(scores: Tensor) -> Tensor:
    """The score [B] that an ensemble stands for: the mean of its heads [B, M]; that of one head [B] as it is."""
    return scores.mean(-1) if scores.dim() > 1 else scores
