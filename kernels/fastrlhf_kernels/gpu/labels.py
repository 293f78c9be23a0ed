"""Several labels a row: their log-probs from the sums of the row, and the gradient's entries in their columns."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .terms import LN2, Incoming, Temperature, inverse_temperature, load_incoming


class LabelArgs(NamedTuple):
    """Labels [n, K], and what stands between logits and the gradient's accumulators."""

    labels: Tensor
    logit_scale: float
    softcap: float | None
    temperature: Temperature


def several_log_probs(z: Tensor, labels: Tensor, temperature: Tensor | float, top: Tensor, total: Tensor) -> Tensor:
    """log-probs of labels [..., K] from logits z [..., V] and their rows' sums; NaN for a label outside [0, V)."""
    known = (labels >= 0) & (labels < z.shape[-1])
    target = z.gather(-1, torch.where(known, labels, 0).long()).float()
    base = torch.where(top == -torch.inf, 0, top)[..., None]
    return torch.where(known, (target - base) / temperature - total.log()[..., None], torch.nan)


@triton.jit(do_not_specialize=["count", "first", "last"])
def _add_labels(
    source, log_probs, gradients, out, out_stride, gain, incoming, count, first, last, LABELS: tl.constexpr
):
    """A program a row: what stands at its labels, where the columns before knew of none."""
    row = tl.program_id(0).to(tl.int64)
    rows = row + tl.zeros((1,), tl.int64)
    live = rows >= 0
    g, ge, entropy, base, total = load_incoming(incoming, rows, live, 1)
    inverse = inverse_temperature(source.temperature, rows, live)
    factor = inverse * tl.load(gain) * source.logit_scale
    for low in range(0, count, LABELS):
        place = low + tl.arange(0, LABELS)
        inside = place < count
        label = tl.load(source.labels + row * count + place, mask=inside, other=-1).to(tl.int64)
        log_p = tl.load(log_probs + row * count + place, mask=inside, other=0.0)
        own = tl.zeros((LABELS,), tl.float32)  # of all labels that are this one
        for other_low in range(0, count, LABELS):
            other_place = other_low + tl.arange(0, LABELS)
            there = other_place < count
            other = tl.load(source.labels + row * count + other_place, mask=there, other=-2).to(tl.int64)
            value = tl.load(gradients + row * count + other_place, mask=there, other=0.0)
            own += tl.sum(tl.where(other[None, :] == label[:, None], value[None, :], 0.0), 1)
        p = tl.exp(log_p)
        dz = own - p * g
        if incoming.entropy is not None:
            dz -= tl.where(p > 0, p * ge * (log_p + entropy), 0.0)
        if source.softcap is not None:
            z = base + (log_p + LN2 * tl.log2(total)) / inverse
            dz = dz * (1.0 - (z / source.softcap) * (z / source.softcap))
        mine = inside & (label >= first) & (label < last)
        tl.store(out + row * out_stride + (label - first), (dz * factor).to(out.dtype.element_ty), mask=mine)


def add_labels(
    source: LabelArgs,
    log_probs: Tensor,
    gradients: Tensor,
    out: Tensor,
    gain: Tensor,
    incoming: Incoming,
    first: int,
    last: int,
) -> None:
    """The entries of `out` [n, last - first] in the columns of the labels [n, K], for gradients [n, K] of log_probs.

    `incoming.log_prob` is the sum of a row's gradients. A label outside first..last is left alone.
    """
    count = gradients.shape[1]
    width = min(32, triton.next_power_of_2(count))
    arguments = (source, log_probs, gradients, out, out.stride(0), gain, incoming, count, first, last)
    launch(_add_labels, len(out) if count else 0, out.device, *arguments, LABELS=width, warps=1 if width < 32 else 4)
