"""Whether PPO trains on the sequences of a micro-batch joined in one row, and how they are joined.

Positions restart with each sequence. Flash attention finds the sequences by that and computes each alone (its varlen
form); transformers makes a block mask of it for SDPA and eager attention, whose cost grows with the square of the row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrlhf.config import UserError
from fastrlhf.models import check_packing


def resolve_packing(wanted: bool | None, models: Sequence[PreTrainedModel]) -> bool:
    """`packing` of the configuration for the models that would read packed rows.

    auto (None): all of them run a flash attention and keep sequences apart. UserError where it is wanted of a model
    that would let them see each other.
    """
    if wanted is None:
        flash = all("flash" in str(model.config._attn_implementation) for model in models)
        return flash and all(map(_keeps_apart, models))
    if wanted:
        for model in models:
            check_packing(model)
    return wanted


def _keeps_apart(model: PreTrainedModel) -> bool:
    try:
        check_packing(model)
    except UserError:
        return False
    return True


def joined(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """-> input_ids [1, sum of lengths] int64, position_ids of the same shape, which restart with every row."""
    ids = torch.tensor([[token for row in rows for token in row]], dtype=torch.int64)
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    return ids.to(device), positions.to(device)
