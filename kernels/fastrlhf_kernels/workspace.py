"""What the fused head takes inside and gives back, in bytes: an estimate for planners, which no allocation shows."""

from __future__ import annotations

from .backend import TRITON
from .eager.chunked import chunk_tiles, sweep_tiles


def head_workspace(n: int, vocabulary: int, width: int, *, cuda: bool, ppo: bool, size: int) -> int:
    """Bytes that `linear_ppo_loss` (ppo) or `linear_log_probs` takes beside its results, for hidden [n, width] and
    weight [vocabulary, width] of `size` bytes an element. cuda: as the kernels of a GPU do it."""
    if n == 0:
        return 0
    states = 4 * n * width  # the fp32 sum of the gradient of hidden, or its fp32 copy
    if cuda and TRITON:
        from .gpu.linear_log_probs import columns_at_once
        from .gpu.linear_ppo_loss import chunk_rows

        columns = -(-vocabulary // 64) * 64
        return states + (4 * chunk_rows(n, vocabulary) * columns if ppo else size * n * columns_at_once(n, vocabulary))
    if ppo:
        tiles = chunk_tiles(vocabulary, cuda=cuda)
        rows = min(n, tiles.rows)
        return states + 4 * rows * (vocabulary + tiles.columns)
    tiles = sweep_tiles(n, vocabulary, width, cuda=cuda)
    return states + 4 * tiles.columns * (tiles.rows + (0 if size == 4 else width))
