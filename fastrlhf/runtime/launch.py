"""What torchrun told this process: its number and how many there are. Imports no torch."""

from __future__ import annotations

import os


class RankLost(RuntimeError):  # noqa: N818
    """Another process of the run is gone: this one cannot go on."""


def world_size() -> int:
    """Processes of the run; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process in the run, from 0."""
    return int(os.environ.get("RANK", "0"))


def restarts() -> int:
    """How often torchrun has started this process anew, for a failure on this machine."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def most_restarts() -> int:
    """How often it may (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))


def local_rank() -> int:
    """Number of this process on its machine: the GPU it takes."""
    return int(os.environ.get("LOCAL_RANK", "0"))
