"""Policy loss, value loss, their statistics and both gradients of a batch of tokens in one launch.

Every block of tokens writes its own sums; they are added in a second stage in a fixed order, without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .losses import LossOptions
from .triton_launch import launch
from .triton_terms import clipped_terms, expm1_minus

TILE = 1024
SUMS = 9  # policy loss, ratio, approx_kl, clip_frac, value loss, its clip_frac, squared errors, returns, their squares


@triton.jit(do_not_specialize=["n"])
def _losses(
    log_probs, olds, advantages, values, old_values, returns, mask, weights, count, sums, policy_grads, value_grads,
    n, low_clip, high_clip, dual_clip, value_clip,
    POLICY: tl.constexpr, VALUE: tl.constexpr, WEIGHTS: tl.constexpr, DUAL: tl.constexpr, VALUE_CLIP: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    place = program * TILE + tl.arange(0, TILE)
    inside = place < n
    token = inside & (tl.load(mask + place, mask=inside, other=0) != 0)
    divisor = tl.load(count)
    weight = tl.load(weights + place, mask=token, other=0.0).to(tl.float32) if WEIGHTS else 1.0
    out = sums + program * 9
    if POLICY:
        log_prob = tl.load(log_probs + place, mask=token, other=0.0).to(tl.float32)
        old = tl.load(olds + place, mask=token, other=0.0).to(tl.float32)
        advantage = tl.load(advantages + place, mask=token, other=0.0).to(tl.float32)
        loss, slope, clipped, ratio, d = clipped_terms(log_prob, old, advantage, low_clip, high_clip, dual_clip, DUAL)
        tl.store(out, tl.sum(tl.where(token, loss * weight, 0.0), 0) / divisor)
        tl.store(out + 1, tl.sum(tl.where(token, ratio, 0.0), 0) / divisor)
        tl.store(out + 2, tl.sum(tl.where(token, expm1_minus(d), 0.0), 0) / divisor)
        tl.store(out + 3, tl.sum((token & clipped).to(tl.float32), 0) / divisor)
        tl.store(policy_grads + place, tl.where(token, slope * weight, 0.0) / divisor, mask=inside)
    if VALUE:
        value = tl.load(values + place, mask=token, other=0.0).to(tl.float32)
        target = tl.load(returns + place, mask=token, other=0.0).to(tl.float32)
        error = value - target
        plain, slope = error * error, error
        worst, value_clipped = plain, plain
        if VALUE_CLIP:
            before = tl.load(old_values + place, mask=token, other=0.0).to(tl.float32)
            high, low = before + value_clip, before - value_clip
            near = tl.where(value > high, high, tl.where(value < low, low, value)) - target
            value_clipped = near * near
            wins = plain >= value_clipped
            worst = tl.where(wins, plain, value_clipped)
            slope = tl.where(wins, error, near * 0.0)
        tl.store(out + 4, 0.5 * tl.sum(tl.where(token, worst * weight, 0.0), 0) / divisor)
        tl.store(out + 5, tl.sum((token & (value_clipped > plain)).to(tl.float32), 0) / divisor)
        tl.store(out + 6, tl.sum(tl.where(token, plain, 0.0), 0))
        tl.store(out + 7, tl.sum(tl.where(token, target, 0.0), 0))
        tl.store(out + 8, tl.sum(tl.where(token, target * target, 0.0), 0))
        tl.store(value_grads + place, tl.where(token, slope * weight, 0.0) / divisor, mask=inside)


@triton.jit
def _column(sums, column, blocks, ROWS: tl.constexpr):
    lane = tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, blocks, ROWS):
        total += tl.load(sums + (first + lane) * 9 + column, mask=first + lane < blocks, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["blocks"])
def _add_up(sums, blocks, a, b, c, d, e, FIRST: tl.constexpr, FIVE: tl.constexpr, ROWS: tl.constexpr):
    """Columns FIRST and following of sums [blocks, 9], each added up into a tensor of its own."""
    tl.store(a, _column(sums, FIRST, blocks, ROWS))
    tl.store(b, _column(sums, FIRST + 1, blocks, ROWS))
    tl.store(c, _column(sums, FIRST + 2, blocks, ROWS))
    tl.store(d, _column(sums, FIRST + 3, blocks, ROWS))
    if FIVE:
        tl.store(e, _column(sums, FIRST + 4, blocks, ROWS))


def _start(policy, value, mask, weights, count: Tensor, options: LossOptions | None, value_clip: float | None):
    """(sums [blocks, 9], the two gradients); policy and value: three tensors each, or None."""
    n, device = mask.numel(), mask.device
    mask = mask.contiguous()
    tensors = [t.contiguous() for group in (policy, value) for t in (group or [mask] * 3)]
    blocks = -(-n // TILE)
    sums = torch.empty(blocks, SUMS, dtype=torch.float32, device=device)
    make = lambda group: sums if group is None else torch.empty(mask.shape, dtype=torch.float32, device=device)  # noqa: E731
    grads = make(policy), make(value)
    options = options or LossOptions(0.0, 0.0, None)
    launch(
        _losses, blocks, device, *tensors, mask, mask if weights is None else weights.contiguous(), count, sums, *grads,
        n, options.clip_low, options.clip_high, float(options.dual_clip or 0.0), float(value_clip or 0.0),
        POLICY=policy is not None, VALUE=value is not None, WEIGHTS=weights is not None,
        DUAL=options.dual_clip is not None, VALUE_CLIP=value_clip is not None, TILE=TILE, warps=4,
    )  # fmt: skip
    return sums, *grads


def _totals(sums: Tensor, first: int, number: int) -> list[Tensor]:
    """The columns' sums as 0-d tensors that share no memory, as an operator must return them."""
    out = [torch.empty((), dtype=torch.float32, device=sums.device) for _ in range(number)]
    rows = min(1024, max(16, triton.next_power_of_2(max(1, len(sums)))))
    launch(
        _add_up, 1, sums.device, sums, len(sums), *out, *out[: 5 - number], FIRST=first, FIVE=number == 5, ROWS=rows,
        warps=4,
    )  # fmt: skip
    return out


def both_losses(
    log_probs, old_log_probs, advantages, values, old_values, returns, mask, weights, count: Tensor,
    options: LossOptions, value_clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(the SUMS [9], d policy loss / d log_probs, d value loss / d values), all fp32."""
    policy, value = (log_probs, old_log_probs, advantages), (values, old_values, returns)
    sums, *grads = _start(policy, value, mask, weights, count, options, value_clip)
    return sums[0] if len(sums) == 1 else sums.sum(0), *grads


def policy_loss(log_probs, old_log_probs, advantages, mask, weights, count: Tensor, options: LossOptions):
    """As `losses.policy_loss`: loss, ratio, approx_kl, clip_frac, and the gradient per token."""
    sums, grad, _ = _start((log_probs, old_log_probs, advantages), None, mask, weights, count, options, None)
    return *_totals(sums, 0, 4), grad


def value_loss(values, old_values, returns, mask, weights, count: Tensor, clip_range: float | None):
    """As `losses.value_loss`: loss, clip_frac, the sums it lists, the number of tokens, and the gradient per token."""
    sums, _, grad = _start(None, (values, old_values, returns), mask, weights, count, None, clip_range)
    return *_totals(sums, 4, 5), mask.sum().to(torch.float32), grad
