"""Reward shaping, generalised advantage estimation and the whitening statistics in one pass over the tokens.

A program takes a row and walks it from its end, a tile at a time: the recurrence A_t = delta_t + c_t A_{t+1} is an
associative scan (loads are reversed, the scan runs forward), and so is the value of the next response token. A second
kernel whitens, if wanted: its programs combine the statistics of their rows in the same order, without atomics.
Reward shaping and whitening alone follow below, for callers that do not need `shape_and_gae`.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operands import Shaping
from .launch import launch
from .terms import kl_index, kl_of

TILE = 1024


@triton.jit
def _compose(a, b, later_a, later_b):
    """x -> a x + b, then x -> later_a x + later_b."""
    return a * later_a, later_b + later_a * b


@triton.jit
def _latest(seen, value, later_seen, later_value):
    """The later of two values that is there."""
    return tl.maximum(seen, later_seen), tl.where(later_seen > 0, later_value, value)


@triton.jit
def _shaped(log_probs, refs, score, place, token, last, kl_coef, KL: tl.constexpr, TILE: tl.constexpr):
    """-kl_coef * KL of tokens, and the score at the last one of the row."""
    reward = tl.zeros((TILE,), tl.float32)
    if KL >= 0:
        d = tl.load(log_probs + place, mask=token, other=0.0).to(tl.float32)
        kl, _ = kl_of(d - tl.load(refs + place, mask=token, other=0.0).to(tl.float32), KL)
        reward = -kl_coef * kl
    return tl.where(token, reward + tl.where(last, score, 0.0), 0.0)


@triton.jit(do_not_specialize=["length"])
def _gae(
    rewards,
    scores,
    log_probs,
    refs,
    values,
    mask,
    bootstraps,
    shaped,
    advantages,
    returns,
    statistics,
    length,
    kl_coef,
    gamma,
    decay,
    KL: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = row * length
    score = 0.0
    if scores is not None:
        score = tl.load(scores + row).to(tl.float32)
    next_value = 0.0
    if bootstraps is not None:
        next_value = tl.load(bootstraps + row).to(tl.float32)
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
        reward = tl.zeros((TILE,), tl.float32)
        if scores is not None:
            reward = _shaped(log_probs, refs, score, start + place, token, last, kl_coef, KL, TILE)
        if rewards is not None:
            reward += tl.load(rewards + start + place, mask=token, other=0.0).to(tl.float32)
        if shaped is not None:
            tl.store(shaped + start + place, reward, mask=inside)
        delta = tl.where(token, reward + gamma * following - value, 0.0)
        a, b = tl.associative_scan((tl.where(token, decay, 1.0), delta), 0, _compose)
        here = b + a * advantage
        tl.store(advantages + start + place, tl.where(token, here, 0.0), mask=inside)
        tl.store(returns + start + place, tl.where(token, here + value, 0.0), mask=inside)
        end = lane == TILE - 1
        advantage = tl.sum(tl.where(end, here, 0.0), 0)
        next_value = tl.sum(tl.where(end, following, 0.0), 0)
        any_token = tl.maximum(tl.sum(tl.where(end, seen, 0.0), 0), tl.max(token.to(tl.float32), 0))
        if statistics is not None:  # around the row's last advantage, so that equal numbers differ by exactly 0
            pivot += tl.sum(tl.where(last, here, 0.0), 0)
            off = tl.where(token, here - pivot, 0.0)
            count += tl.sum(token.to(tl.float32), 0)
            total += tl.sum(off, 0)
            squares += tl.sum(off * off, 0)
    if statistics is not None:
        shift = total / tl.maximum(count, 1.0)
        tl.store(statistics + row * 3, count)
        tl.store(statistics + row * 3 + 1, pivot + shift)
        tl.store(statistics + row * 3 + 2, tl.maximum(squares - total * shift, 0.0))


@triton.jit
def _part(statistics, part, rows):
    """(count, mean, sum of squared deviations) of parts; zeros behind the last."""
    valid = part < rows
    count = tl.load(statistics + part * 3, mask=valid, other=0.0)
    mean = tl.load(statistics + part * 3 + 1, mask=valid, other=0.0)
    return count, mean, tl.load(statistics + part * 3 + 2, mask=valid, other=0.0)


@triton.jit(do_not_specialize=["rows", "n", "blocks"])
def _whiten(x, mask, statistics, rows, n, blocks, eps, SHIFT: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """A block of a group of n tokens, whose statistics are in `rows` parts."""
    group = tl.program_id(0).to(tl.int64) // blocks
    statistics += group * rows * 3
    lane = tl.arange(0, ROWS)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    for first in range(0, rows, ROWS):
        count, mean, _ = _part(statistics, first + lane, rows)
        highest = tl.maximum(highest, tl.where(count > 0, mean, float("-inf")))
    pivot = tl.max(highest, 0)
    pivot = tl.where(pivot == float("-inf"), 0.0, pivot)
    counts, sums = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for first in range(0, rows, ROWS):
        count, mean, _ = _part(statistics, first + lane, rows)
        counts += count
        sums += tl.where(count > 0, count * (mean - pivot), 0.0)
    number = tl.maximum(tl.sum(counts, 0), 1.0)
    shift = tl.sum(sums, 0) / number
    squares = tl.zeros((ROWS,), tl.float32)
    for first in range(0, rows, ROWS):
        count, mean, deviations = _part(statistics, first + lane, rows)
        off = mean - pivot - shift
        squares += deviations + tl.where(count > 0, count * off * off, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(squares, 0) / number + eps)
    place = (tl.program_id(0).to(tl.int64) % blocks) * TILE + tl.arange(0, TILE)
    inside = place < n
    place += group * n
    token = inside & (tl.load(mask + place, mask=inside, other=0) != 0)
    value = tl.load(x + place, mask=token, other=0.0)
    white = (value - pivot - shift) * scale
    if not SHIFT:
        white += pivot + shift
    tl.store(x + place, white, mask=token)


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
        last = token & (lane == tl.min(tl.where(token, lane, TILE), 0)) & (seen == 0)
        reward = _shaped(log_probs, refs, score, place, token, last, kl_coef, KL, TILE)
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


def gae_rows(
    rewards: Tensor | None,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    gae_lambda: float,
    bootstrap_values: Tensor | None,
    shaping: Shaping,
    whiten_eps: float | None,
    group_size: int,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(rewards, advantages, returns) [B, T] fp32, the rewards only where there is shaping; `rewards` are added to it.

    whiten_eps: whiten the advantages (not the returns), `group_size` consecutive rows together.
    """
    batch, length = mask.shape
    make = partial(torch.empty, dtype=torch.float32, device=values.device)
    advantages, returns = make(batch, length), make(batch, length)
    shaped = None if shaping.scores is None else make(batch, length)
    statistics = None if whiten_eps is None else make(batch, 3)
    sources = (rewards, shaping.scores, shaping.log_probs, shaping.ref_log_probs, values, mask, bootstrap_values)
    sources = tuple(None if t is None else t.contiguous() for t in sources)
    tile = max(16, min(TILE, triton.next_power_of_2(length)))
    numbers = (length, float(shaping.kl_coef), float(gamma), float(gamma * gae_lambda))
    arguments = (*sources, shaped, advantages, returns, statistics, *numbers)
    constants = {"KL": kl_index(shaping.kl_coef, shaping.estimator), "TILE": tile}
    launch(_gae, batch if length else 0, values.device, *arguments, **constants, warps=max(1, tile // 128))
    if statistics is not None and batch and length:
        whiten_rows(advantages, mask.contiguous(), statistics, whiten_eps, groups=batch // group_size)
    return shaped, advantages, returns


def whiten_rows(x: Tensor, mask: Tensor, statistics: Tensor, eps: float, *, groups=1, shift_mean=True) -> None:
    """Whiten x in place where the mask is, with (count, mean, sum of squared deviations) [R, 3] of parts of it.

    x and its parts are cut into `groups` of one size, each of which is whitened alone.
    """
    parts, n = len(statistics) // groups, x.numel() // groups
    blocks = -(-n // TILE)
    constants = {"SHIFT": shift_mean, "ROWS": min(1024, triton.next_power_of_2(max(1, parts))), "TILE": TILE}
    launch(_whiten, groups * blocks, x.device, x, mask, statistics, parts, n, blocks, float(eps), **constants, warps=4)


def shape_rewards(shaping: Shaping, mask: Tensor) -> Tensor:
    """[B, T] fp32, as `losses.shape_rewards`."""
    batch, length = mask.shape
    out = torch.empty(batch, length, dtype=torch.float32, device=mask.device)
    tile = max(16, min(TILE, triton.next_power_of_2(max(1, length))))
    sources = (shaping.scores, shaping.log_probs, shaping.ref_log_probs, mask)
    arguments = (*(t.contiguous() for t in sources), out, length, float(shaping.kl_coef))
    constants = {"KL": kl_index(shaping.kl_coef, shaping.estimator), "TILE": tile}
    launch(_shape_rewards, batch if length else 0, mask.device, *arguments, **constants, warps=max(1, tile // 256))
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
