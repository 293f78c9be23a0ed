"""Second stage of every sweep over a split vocabulary: the sums of the parts become log-probs, in a fixed order."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import launch
from .triton_terms import LOG2E, entropy_of, inverse_temperature, log_prob_of, merge


@triton.jit(do_not_specialize=["n"])
def _combine(
    part_tops, part_totals, part_weighteds, labels, temperatures, log_probs, entropies, tops, totals,
    n, splits, temperature, ignore_index,
    PER_TOKEN: tl.constexpr, ENTROPY: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    live = inside & (tl.load(labels + rows, mask=inside, other=0).to(tl.int64) != ignore_index)
    scale = inverse_temperature(temperatures, temperature, rows, live, PER_TOKEN) * LOG2E
    part = tl.arange(0, SPLITS)
    place = rows[:, None] * splits + part[None, :]
    valid = live[:, None] & (part < splits)[None, :]
    top = tl.load(part_tops + place, mask=valid, other=float("-inf"))
    total = tl.load(part_totals + place, mask=valid, other=0.0)
    weighted = tl.load(part_weighteds + place, mask=valid, other=0.0)
    top, total, weighted = merge(top, total, weighted, scale[:, None], ENTROPY)
    log_prob = log_prob_of(tl.load(log_probs + rows, mask=live, other=0.0), top, total, scale)
    tl.store(log_probs + rows, tl.where(live, log_prob, 0.0), mask=inside)
    tl.store(tops + rows, tl.where(live, top, 0.0), mask=inside)
    tl.store(totals + rows, tl.where(live, total, 0.0), mask=inside)
    if ENTROPY:
        tl.store(entropies + rows, tl.where(live, entropy_of(total, weighted), 0.0), mask=inside)


def split_degrees(temperature: Tensor | float, like: Tensor) -> tuple[Tensor, float, bool]:
    """(tensor, number, whether the tensor counts): a kernel takes both."""
    if isinstance(temperature, Tensor):
        return temperature.reshape(-1).contiguous(), 1.0, True
    return like, float(temperature), False


def combine(
    parts: Sequence[Tensor], labels: Tensor, degrees: Tensor, temperature: float, per_token: bool, ignore_index: int,
    log_probs: Tensor, entropies: Tensor, top: Tensor, total: Tensor,
) -> None:  # fmt: skip
    """parts: maxima, sums and weighted sums [n, splits]. log_probs holds the labels' logits and becomes log-probs."""
    n, splits = parts[0].shape
    width = triton.next_power_of_2(splits)
    rows = max(1, min(16, 4096 // width))
    launch(
        _combine, -(-n // rows), labels.device, *parts, labels, degrees, log_probs, entropies, top, total, n, splits,
        temperature, ignore_index, PER_TOKEN=per_token, ENTROPY=entropies.numel() > 0, ROWS=rows,
        SPLITS=width, warps=4,
    )  # fmt: skip
