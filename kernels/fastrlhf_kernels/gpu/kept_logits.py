"""Log-probs from logits that stay for the backward.

`linear_loss` needs the logits twice, with the user's loss between: of as many rows as its workspace holds they are kept
in fp32 (before the temperature, after scale and softcap), and a sweep over them replaces the product of the backward.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operands import Rows
from ..workspace import chunk_rows
from . import tuning
from .head import DenseHead, HeadArgs, block_gradient, padded
from .labels import several_log_probs
from .launch import launch
from .log_probs import rows_forward
from .terms import NONE_IGNORED, Incoming, Results


@triton.jit(do_not_specialize=["n", "blocks", "last"])
def _from_logits(
    logits,
    stride,
    head,
    out,
    out_stride,
    gain,
    incoming,
    n,
    blocks,
    first,
    last,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    first_row, shift = (program % blocks) * ROWS, (program // blocks).to(tl.int32) * COLUMNS
    rows, column = first_row + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    live, low = rows < n, first + shift
    there = live[:, None] & (shift + column < out_stride)[None, :]  # as in `_linear_backward`: stores stay wide
    z = tl.load((logits + rows * stride + low)[:, None] + column[None, :], mask=there, other=0.0)
    slope = z
    if head.softcap is not None:  # z = softcap * tanh(u / softcap): dz / du = 1 - tanh ** 2
        slope = head.logit_scale * (1.0 - (z / head.softcap) * (z / head.softcap))
    dz = block_gradient(z, slope, head, incoming, gain, rows, live, low, ROWS, COLUMNS)
    tl.store((out + rows * out_stride + shift)[:, None] + column[None, :], dz.to(out.dtype.element_ty), mask=there)


def from_logits(logits: Tensor, head: HeadArgs, out: Tensor, gain: Tensor, incoming: Incoming, first: int, last: int):
    """The gradient of the accumulators behind columns first..last of kept logits, into `out` [k, last - first]."""
    n, device = len(out), out.device
    tile = tuning.row_tile(tuning.chip_of(device), last - first)
    blocks = -(-n // tile.rows)
    arguments = (logits, logits.stride(0), head, out, out.stride(0), gain, incoming, n, blocks, first, last)
    programs = blocks * -(-(last - first) // tile.columns)
    launch(_from_logits, programs, device, *arguments, ROWS=tile.rows, COLUMNS=tile.columns, warps=tile.warps)


def logits_forward(head: DenseHead, entropy: bool, kept: Tensor | None, workspace: int) -> Results:
    """As `linear_log_probs.linear_forward`, with labels [n] or [n, K], by products whose result is stored.

    kept [k, V]: the logits of the first k rows, written here. The others are computed in chunks and dropped.
    """
    n, vocabulary, device = len(head), len(head.weight), head.x.device
    make = partial(torch.empty, dtype=torch.float32, device=device)
    several, border = head.labels.ndim == 2, 0 if kept is None else len(kept)
    results = Results(make(head.labels.shape), make(n) if entropy else None, make(n), make(n))
    each, number = head.temperature
    rows = chunk_rows(n - border, vocabulary, workspace)
    scratch = padded(rows if border < n else 0, vocabulary, torch.float32, device)
    blocks = [slice(0, border)] if border else []
    blocks += [slice(first, min(n, first + rows)) for first in range(border, n, rows)]
    for cut in blocks:
        z = head.logits(cut, kept if cut.start < border else scratch[: cut.stop - cut.start])
        labels, temperatures = head.labels[cut], None if each is None else each[cut]
        one = torch.zeros_like(results.top[cut], dtype=torch.int64) if several else labels
        found = rows_forward(Rows(z, one, temperatures, number), NONE_IGNORED, entropy)
        found = (found[0], found[1] if entropy else None, *found[2:])
        if several:
            temperature = number if temperatures is None else temperatures[:, None].float()
            found = (several_log_probs(z, labels, temperature, *found[2:]), *found[1:])
        for result, part in zip(results, found):
            if result is not None:
                result[cut] = part
    return results
