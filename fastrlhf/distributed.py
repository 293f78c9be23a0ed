"""Which device this process computes on. One process is the only path of this version."""

from __future__ import annotations

import os

import torch

from fastrlhf.config import UserError


def device() -> torch.device:
    """The device of this process: the CUDA device torchrun assigned (or the first), else the CPU.

    Raises UserError when launched as one of several ranks: running them unsynchronised would train N different models.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise UserError(
            f"WORLD_SIZE={world_size}: training with several processes is not available in this version; "
            "start one process (without torchrun)"
        )
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
