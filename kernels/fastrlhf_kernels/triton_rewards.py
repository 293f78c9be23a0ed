"""Reward shaping and whitening alone, for callers that do not need `shape_and_gae`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_gae import TILE, whiten_rows
from .triton_launch import launch
from .triton_terms import KL_ESTIMATORS, kl_of


@triton.jit(do_not_specialize=["length"])
def _shape_rewards(scores, log_probs, refs, mask, out, length, kl_coef, KL: tl.constexpr, TILE: tl.constexpr):
    """One row, from its end: the first response token met there is the last one."""
    row = tl.program_id(0).to(tl.int64)
    score = tl.load(scores + row).to(tl.float32)
    lane = tl.arange(0, TILE)
    seen = 0
    for done in range(0, length, TILE):
        column = length - 1 - done - lane
        inside = column >= 0
        place = row * length + column
        token = inside & (tl.load(mask + place, mask=inside, other=0) != 0)
        reward = tl.zeros((TILE,), tl.float32)
        if KL >= 0:
            d = tl.load(log_probs + place, mask=token, other=0.0).to(tl.float32)
            kl, _ = kl_of(d - tl.load(refs + place, mask=token, other=0.0).to(tl.float32), KL)
            reward = -kl_coef * kl
        last = token & (lane == tl.min(tl.where(token, lane, TILE), 0)) & (seen == 0)
        reward = tl.where(token, reward + tl.where(last, score, 0.0), 0.0)
        tl.store(out + place, reward, mask=inside)
        seen = tl.maximum(seen, tl.max(token.to(tl.int32), 0))


@triton.jit(do_not_specialize=["n"])
def _block_statistics(x, mask, out, statistics, n, TILE: tl.constexpr):
    """Count, mean and sum of squared deviations of a block, around its largest value; and its fp32 copy, 0 outside."""
    program = tl.program_id(0).to(tl.int64)
    place = program * TILE + tl.arange(0, TILE)
    token = (place < n) & (tl.load(mask + place, mask=place < n, other=0) != 0)
    value = tl.load(x + place, mask=token, other=0.0).to(tl.float32)
    tl.store(out + place, tl.where(token, value, 0.0), mask=place < n)
    count = tl.sum(token.to(tl.float32), 0)
    pivot = tl.max(tl.where(token, value, float("-inf")), 0)
    pivot = tl.where(count > 0, pivot, 0.0)
    off = tl.where(token, value - pivot, 0.0)
    total = tl.sum(off, 0)
    shift = total / tl.maximum(count, 1.0)
    tl.store(statistics + program * 3, count)
    tl.store(statistics + program * 3 + 1, pivot + shift)
    tl.store(statistics + program * 3 + 2, tl.maximum(tl.sum(off * off, 0) - total * shift, 0.0))


def shape_rewards(scores: Tensor, log_probs: Tensor, refs: Tensor, mask: Tensor, kl_coef: float, estimator: str):
    """[B, T] fp32, as `losses.shape_rewards`."""
    batch, length = mask.shape
    out = torch.empty(batch, length, dtype=torch.float32, device=mask.device)
    kl = KL_ESTIMATORS.index(estimator) if kl_coef != 0 else -1
    tile = max(16, min(TILE, triton.next_power_of_2(max(1, length))))
    launch(
        _shape_rewards, batch if length else 0, mask.device, scores.contiguous(), log_probs.contiguous(),
        refs.contiguous(), mask.contiguous(), out, length, float(kl_coef), KL=kl, TILE=tile, warps=max(1, tile // 256),
    )  # fmt: skip
    return out


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool, eps: float) -> Tensor:
    """fp32, in the shape of x, as `losses.masked_whiten`."""
    n = x.numel()
    blocks = -(-n // TILE)
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    statistics = torch.empty(blocks, 3, dtype=torch.float32, device=x.device)
    mask = mask.contiguous()
    launch(_block_statistics, blocks, x.device, x.contiguous(), mask, out, statistics, n, TILE=TILE, warps=4)
    whiten_rows(out, mask, statistics, eps, shift_mean=shift_mean)
    return out
