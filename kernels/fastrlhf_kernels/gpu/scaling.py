"""Gradients that exist, times the gradient of the loss that they belong to.

torch multiplies by a number that lies on the device element by element, several times slower than memory; and a loss
that is differentiated itself, as most are, has the gradient 1. Only the device knows: it then leaves all as it is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

TILE = 4096


@triton.jit  # n specialised: a multiple of 16 makes accesses of 16 bytes
def _scale(x, gain, out, n, TILE: tl.constexpr):
    """out = gain * x; where out is x and the gain 1, nothing."""
    factor = tl.load(gain).to(tl.float32)
    if out is None:
        if factor != 1.0:  # NaN is written
            place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
            values = tl.load(x + place, mask=place < n, other=0.0)
            tl.store(x + place, (values.to(tl.float32) * factor).to(values.dtype), mask=place < n)
    else:
        place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
        values = tl.load(x + place, mask=place < n, other=0.0).to(tl.float32) * factor
        tl.store(out + place, values.to(out.dtype.element_ty), mask=place < n)


def scaled(x: Tensor, gain: Tensor, dtype: torch.dtype) -> Tensor:
    """gain * x for dense x and a 0-d gain: x itself, changed, where it has that dtype already."""
    out = None if x.dtype == dtype else torch.empty_like(x, dtype=dtype)
    launch(_scale, -(-x.numel() // TILE), x.device, x, gain, out, x.numel(), TILE=TILE, warps=8)
    return x if out is None else out
