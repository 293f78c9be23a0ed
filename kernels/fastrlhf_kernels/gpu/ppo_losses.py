"""The policy loss and the value loss of a batch of tokens, their statistics and gradients, in one launch each.

Every block of tokens writes its own sums; they are added in a second stage in a fixed order, without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operands import LossOptions, Tokens
from .launch import launch
from .terms import Clip, clipped_terms, expm1_minus

TILE = 1024


@triton.jit(do_not_specialize=["n"])
def _policy(log_probs, tokens, clip, count, sums, grads, n, TILE: tl.constexpr):
    """Sums of a block: loss, ratio, approx_kl, clip_frac, divided by the count."""
    program = tl.program_id(0).to(tl.int64)
    place = program * TILE + tl.arange(0, TILE)
    inside = place < n
    token = inside & (tl.load(tokens.mask + place, mask=inside, other=0) != 0)
    divisor = tl.load(count)
    log_prob = tl.load(log_probs + place, mask=token, other=0.0).to(tl.float32)
    old = tl.load(tokens.old_log_probs + place, mask=token, other=0.0).to(tl.float32)
    advantage = tl.load(tokens.advantages + place, mask=token, other=0.0).to(tl.float32)
    loss, slope, clipped, ratio, d = clipped_terms(log_prob, old, advantage, clip)
    if tokens.weights is not None:
        weight = tl.load(tokens.weights + place, mask=token, other=0.0).to(tl.float32)
        loss, slope = loss * weight, slope * weight
    out = sums + program * 4
    tl.store(out, tl.sum(tl.where(token, loss, 0.0), 0) / divisor)
    tl.store(out + 1, tl.sum(tl.where(token, ratio, 0.0), 0) / divisor)
    tl.store(out + 2, tl.sum(tl.where(token, expm1_minus(d), 0.0), 0) / divisor)
    tl.store(out + 3, tl.sum((token & clipped).to(tl.float32), 0) / divisor)
    tl.store(grads + place, tl.where(token, slope, 0.0) / divisor, mask=inside)


@triton.jit(do_not_specialize=["n"])
def _value(values, old_values, returns, mask, weights, clip_range, count, sums, grads, n, TILE: tl.constexpr):
    """Sums of a block: loss and clip_frac, divided by the count; squared errors, returns, their squares."""
    program = tl.program_id(0).to(tl.int64)
    place = program * TILE + tl.arange(0, TILE)
    inside = place < n
    token = inside & (tl.load(mask + place, mask=inside, other=0) != 0)
    divisor = tl.load(count)
    value = tl.load(values + place, mask=token, other=0.0).to(tl.float32)
    target = tl.load(returns + place, mask=token, other=0.0).to(tl.float32)
    error = value - target
    plain, slope = error * error, error
    worst, clipped = plain, plain
    if clip_range is not None:
        before = tl.load(old_values + place, mask=token, other=0.0).to(tl.float32)
        high, low = before + clip_range, before - clip_range
        near = tl.where(value > high, high, tl.where(value < low, low, value)) - target
        clipped = near * near
        wins = plain >= clipped
        worst = tl.where(wins, plain, clipped)
        slope = tl.where(wins, error, near * 0.0)
    if weights is not None:
        weight = tl.load(weights + place, mask=token, other=0.0).to(tl.float32)
        worst, slope = worst * weight, slope * weight
    out = sums + program * 5
    tl.store(out, 0.5 * tl.sum(tl.where(token, worst, 0.0), 0) / divisor)
    tl.store(out + 1, tl.sum((token & (clipped > plain)).to(tl.float32), 0) / divisor)
    tl.store(out + 2, tl.sum(tl.where(token, plain, 0.0), 0))
    tl.store(out + 3, tl.sum(tl.where(token, target, 0.0), 0))
    tl.store(out + 4, tl.sum(tl.where(token, target * target, 0.0), 0))
    tl.store(grads + place, tl.where(token, slope, 0.0) / divisor, mask=inside)


@triton.jit(do_not_specialize=["blocks"])
def _add_up(sums, outs, blocks, NUMBER: tl.constexpr, ROWS: tl.constexpr):
    """Columns of sums [blocks, NUMBER], each added up into a tensor of its own."""
    lane = tl.arange(0, ROWS)
    for column in tl.static_range(NUMBER):
        total = tl.zeros((ROWS,), tl.float32)
        for first in range(0, blocks, ROWS):
            there = first + lane < blocks
            total += tl.load(sums + (first + lane) * NUMBER + column, mask=there, other=0.0)
        tl.store(outs[column], tl.sum(total, 0))


def _run(kernel, number: int, like: Tensor, *arguments) -> tuple[Tensor, ...]:
    """`number` sums over tokens, as 0-d tensors that share no memory, and the gradient in the shape of `like`."""
    n, device = like.numel(), like.device
    blocks = -(-n // TILE)
    sums = torch.empty(blocks, number, dtype=torch.float32, device=device)
    grads = torch.empty(like.shape, dtype=torch.float32, device=device)
    launch(kernel, blocks, device, *arguments, sums, grads, n, TILE=TILE, warps=4)
    outs = tuple(torch.empty((), dtype=torch.float32, device=device) for _ in range(number))
    rows = min(1024, max(16, triton.next_power_of_2(max(1, blocks))))
    launch(_add_up, 1, device, sums, outs, blocks, NUMBER=number, ROWS=rows, warps=4)
    return *outs, grads


def policy_loss(log_probs: Tensor, tokens: Tokens, count: Tensor, options: LossOptions):
    """As `losses.policy_loss`: loss, ratio, approx_kl, clip_frac, and the gradient per token."""
    tokens = tokens.map(Tensor.contiguous)
    return _run(_policy, 4, tokens.mask, log_probs.contiguous(), tokens, Clip.of(options), count)


def value_loss(values, old_values, returns, mask, weights, count: Tensor, clip_range: float | None):
    """As `losses.value_loss`: loss, clip_frac, the sums it lists, the number of tokens, and the gradient per token."""
    tensors = (values, old_values, returns, mask, weights)
    tensors = [None if t is None else t.contiguous() for t in tensors]
    *sums, grads = _run(_value, 5, mask, *tensors, None if clip_range is None else float(clip_range), count)
    return *sums, mask.sum().to(torch.float32), grads
