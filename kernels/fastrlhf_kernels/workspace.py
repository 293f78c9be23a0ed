"""Bytes that the fused head may take inside, and what it takes of them."""

from __future__ import annotations

import torch

from .backend import TRITON

CPU_WORKSPACE = 128 << 20
SHARE = 32  # of a GPU's memory, all of it and not what is free: chunks decide in which order sums are made
SOME = 1 << 30  # where a launcher is called without a device, for planning


def default_workspace(device: torch.device) -> int:
    """Bytes for logits in the functions of the head: 1/32 of the GPU's total memory, 128 MiB on a CPU."""
    if device.type == "cuda":
        return _memory(device.index) // SHARE
    return CPU_WORKSPACE if device.type == "cpu" else SOME


def _memory(device: int | None) -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device() if device is None else device).total_memory


_memory._dynamo_marked_constant = True  # as in backend.py


def row_bytes(vocabulary: int, item: int) -> int:
    """A row of logits of `item` bytes; rows start at multiples of 64 logits."""
    return -(-vocabulary // 64) * 64 * item


def chunk_rows(n: int, vocabulary: int, workspace: int) -> int:
    """Tokens whose fp32 logits the workspace holds, in whole 128 where it holds so many; at most max(4096, n / 4)."""
    most = min(workspace // row_bytes(vocabulary, 4), max(4096, n // 4))
    return max(1, min(n, most if most < 128 else most // 128 * 128))


def head_workspace(n: int, vocabulary: int, width: int, *, cuda: bool, ppo: bool, size: int, workspace: int) -> int:
    """Bytes that `linear_ppo_loss` (ppo) or `linear_log_probs` takes beside its results, for hidden [n, width] and
    weight [vocabulary, width] of `size` bytes an element: an estimate for planners, which no allocation shows. cuda: as
    the kernels of a GPU do it.
    """
    if n == 0:
        return 0
    states = 4 * n * width  # the fp32 sum of the gradient of hidden, or its fp32 copy
    if cuda and TRITON:
        from .gpu.linear_log_probs import columns_at_once

        if ppo:
            return states + chunk_rows(n, vocabulary, workspace) * row_bytes(vocabulary, 4)
        return states + size * n * columns_at_once(n, vocabulary, workspace)
    from .eager.chunked import chunk_tiles, sweep_tiles

    if ppo:
        tiles = chunk_tiles(vocabulary, cuda=cuda, workspace=workspace)
        rows = min(n, tiles.rows)
        return states + 4 * rows * (vocabulary + tiles.columns)
    tiles = sweep_tiles(n, vocabulary, width, cuda=cuda, workspace=workspace)
    return states + 4 * tiles.columns * (tiles.rows + (0 if size == 4 else width))
