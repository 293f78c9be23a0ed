"""Reward shaping, generalised advantage estimation and the whitening statistics in one pass over the tokens.

A program takes a row and walks it from its end, a tile at a time: the recurrence A_t = delta_t + c_t A_{t+1} is an
associative scan (loads are reversed, the scan runs forward), and so is the value of the next response token. A second
kernel whitens, if wanted: its programs combine the statistics of all rows in the same order, without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import launch
from .triton_terms import KL_ESTIMATORS, kl_of

TILE = 1024


@triton.jit
def _compose(a, b, later_a, later_b):
    """x -> a x + b, then x -> later_a x + later_b."""
    return a * later_a, later_b + later_a * b


@triton.jit
def _latest(seen, value, later_seen, later_value):
    """The later of two values that is there."""
    return tl.maximum(seen, later_seen), tl.where(later_seen > 0, later_value, value)


@triton.jit(do_not_specialize=["length"])
def _gae(
    rewards, scores, log_probs, refs, values, mask, bootstraps, shaped, advantages, returns, statistics,
    length, kl_coef, gamma, decay,
    SHAPE: tl.constexpr, KL: tl.constexpr, BOOTSTRAP: tl.constexpr, STATISTICS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = row * length
    score = tl.load(scores + row).to(tl.float32) if SHAPE else 0.0
    next_value = tl.load(bootstraps + row).to(tl.float32) if BOOTSTRAP else 0.0
    advantage, any_token = 0.0, 0.0
    pivot, count, total, squares = 0.0, 0.0, 0.0, 0.0
    lane = tl.arange(0, TILE)
    for done in range(0, length, TILE):
        place = length - 1 - done - lane
        inside = place >= 0
        token = inside & (tl.load(mask + start + place, mask=inside, other=0) != 0)
        behind = inside & (place + 1 < length)
        behind = behind & (tl.load(mask + start + place + 1, mask=behind, other=0) != 0)
        value = tl.load(values + start + place, mask=token, other=0.0).to(tl.float32)
        following = tl.load(values + start + place + 1, mask=behind, other=0.0).to(tl.float32)
        seen, following = tl.associative_scan((behind.to(tl.float32), following), 0, _latest)
        following = tl.where(seen > 0, following, next_value)
        seen = tl.maximum(seen, any_token)
        last = token & (seen == 0)
        if SHAPE:
            reward = tl.zeros((TILE,), tl.float32)
            if KL >= 0:
                d = tl.load(log_probs + start + place, mask=token, other=0.0).to(tl.float32)
                kl, _ = kl_of(d - tl.load(refs + start + place, mask=token, other=0.0).to(tl.float32), KL)
                reward = -kl_coef * kl
            reward = tl.where(token, reward + tl.where(last, score, 0.0), 0.0)
            tl.store(shaped + start + place, reward, mask=inside)
        else:
            reward = tl.load(rewards + start + place, mask=token, other=0.0).to(tl.float32)
        delta = tl.where(token, reward + gamma * following - value, 0.0)
        a, b = tl.associative_scan((tl.where(token, decay, 1.0), delta), 0, _compose)
        here = b + a * advantage
        tl.store(advantages + start + place, tl.where(token, here, 0.0), mask=inside)
        tl.store(returns + start + place, tl.where(token, here + value, 0.0), mask=inside)
        end = lane == TILE - 1
        advantage = tl.sum(tl.where(end, here, 0.0), 0)
        next_value = tl.sum(tl.where(end, following, 0.0), 0)
        any_token = tl.maximum(tl.sum(tl.where(end, seen, 0.0), 0), tl.max(token.to(tl.float32), 0))
        if STATISTICS:  # around the row's last advantage, so that equal numbers differ by exactly 0
            pivot += tl.sum(tl.where(last, here, 0.0), 0)
            off = tl.where(token, here - pivot, 0.0)
            count += tl.sum(token.to(tl.float32), 0)
            total += tl.sum(off, 0)
            squares += tl.sum(off * off, 0)
    if STATISTICS:
        shift = total / tl.maximum(count, 1.0)
        tl.store(statistics + row * 3, count)
        tl.store(statistics + row * 3 + 1, pivot + shift)
        tl.store(statistics + row * 3 + 2, tl.maximum(squares - total * shift, 0.0))


@triton.jit(do_not_specialize=["rows", "n"])
def _whiten(x, mask, statistics, rows, n, eps, SHIFT: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    lane = tl.arange(0, ROWS)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    for first in range(0, rows, ROWS):
        valid = first + lane < rows
        count = tl.load(statistics + (first + lane) * 3, mask=valid, other=0.0)
        mean = tl.load(statistics + (first + lane) * 3 + 1, mask=valid, other=0.0)
        highest = tl.maximum(highest, tl.where(count > 0, mean, float("-inf")))
    pivot = tl.max(highest, 0)
    pivot = tl.where(pivot == float("-inf"), 0.0, pivot)
    counts, sums = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for first in range(0, rows, ROWS):
        valid = first + lane < rows
        count = tl.load(statistics + (first + lane) * 3, mask=valid, other=0.0)
        mean = tl.load(statistics + (first + lane) * 3 + 1, mask=valid, other=0.0)
        counts += count
        sums += tl.where(count > 0, count * (mean - pivot), 0.0)
    number = tl.maximum(tl.sum(counts, 0), 1.0)
    shift = tl.sum(sums, 0) / number
    squares = tl.zeros((ROWS,), tl.float32)
    for first in range(0, rows, ROWS):
        valid = first + lane < rows
        count = tl.load(statistics + (first + lane) * 3, mask=valid, other=0.0)
        off = tl.load(statistics + (first + lane) * 3 + 1, mask=valid, other=0.0) - pivot - shift
        squares += tl.load(statistics + (first + lane) * 3 + 2, mask=valid, other=0.0)
        squares += tl.where(count > 0, count * off * off, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(squares, 0) / number + eps)
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    token = (place < n) & (tl.load(mask + place, mask=place < n, other=0) != 0)
    value = tl.load(x + place, mask=token, other=0.0)
    white = (value - pivot - shift) * scale
    if not SHIFT:
        white += pivot + shift
    tl.store(x + place, white, mask=token)


def gae_rows(
    rewards: Tensor | None, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float, bootstrap: Tensor | None,
    *, shaping: tuple[Tensor, Tensor, Tensor, float, str] | None = None, whiten_eps: float | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """(rewards, advantages, returns) [B, T] fp32. Either rewards, or shaping = (scores [B], log_probs, ref_log_probs,
    kl_coef, estimator), are given; whiten_eps: whiten the advantages (not the returns).
    """
    batch, length = mask.shape
    make = lambda *shape: torch.empty(shape, dtype=torch.float32, device=values.device)  # noqa: E731
    advantages, returns = make(batch, length), make(batch, length)
    values, mask = values.contiguous(), mask.contiguous()
    statistics = make(batch, 3) if whiten_eps is not None else advantages
    if shaping is None:
        shaped, kl_coef, kl = None, 0.0, -1
        sources = (rewards.contiguous(), values, values, values)
    else:
        scores, log_probs, refs, kl_coef, estimator = shaping
        shaped, kl = make(batch, length), KL_ESTIMATORS.index(estimator) if kl_coef != 0 else -1
        sources = (values, scores.contiguous(), log_probs.contiguous(), refs.contiguous())
    tile = max(16, min(TILE, triton.next_power_of_2(length)))
    launch(
        _gae, batch if length else 0, values.device, *sources, values, mask,
        values if bootstrap is None else bootstrap.contiguous(), advantages if shaped is None else shaped, advantages,
        returns, statistics, length, float(kl_coef), float(gamma), float(gamma * gae_lambda), SHAPE=shaped is not None,
        KL=kl, BOOTSTRAP=bootstrap is not None, STATISTICS=whiten_eps is not None, TILE=tile, warps=max(1, tile // 128),
    )  # fmt: skip
    if whiten_eps is not None and length:
        whiten_rows(advantages, mask, statistics, whiten_eps, shift_mean=True)
    return shaped, advantages, returns


def whiten_rows(x: Tensor, mask: Tensor, statistics: Tensor, eps: float, *, shift_mean: bool) -> None:
    """Whiten x in place where the mask is, with (count, mean, sum of squared deviations) [R, 3] of parts of it."""
    rows = min(1024, triton.next_power_of_2(max(1, len(statistics))))
    launch(
        _whiten, -(-x.numel() // TILE), x.device, x, mask, statistics, len(statistics), x.numel(), float(eps),
        SHIFT=shift_mean, ROWS=rows, TILE=TILE, warps=4,
    )  # fmt: skip
