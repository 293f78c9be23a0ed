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
    WEIGHTS: tl.constexpr, DUAL: tl.constexpr, VALUE_CLIP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    place = program * TILE + tl.arange(0, TILE)
    inside = place < n
    token = inside & (tl.load(mask + place, mask=inside, other=0) != 0)
    divisor = tl.load(count)
    weight = tl.load(weights + place, mask=token, other=0.0).to(tl.float32) if WEIGHTS else 1.0
    log_prob = tl.load(log_probs + place, mask=token, other=0.0).to(tl.float32)
    old = tl.load(olds + place, mask=token, other=0.0).to(tl.float32)
    advantage = tl.load(advantages + place, mask=token, other=0.0).to(tl.float32)
    loss, slope, clipped, ratio, d = clipped_terms(log_prob, old, advantage, low_clip, high_clip, dual_clip, DUAL)
    out = sums + program * 9
    tl.store(out, tl.sum(tl.where(token, loss * weight, 0.0), 0) / divisor)
    tl.store(out + 1, tl.sum(tl.where(token, ratio, 0.0), 0) / divisor)
    tl.store(out + 2, tl.sum(tl.where(token, expm1_minus(d), 0.0), 0) / divisor)
    tl.store(out + 3, tl.sum((token & clipped).to(tl.float32), 0) / divisor)
    tl.store(policy_grads + place, tl.where(token, slope * weight, 0.0) / divisor, mask=inside)
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


def both_losses(
    log_probs, old_log_probs, advantages, values, old_values, returns, mask, weights, count: Tensor,
    options: LossOptions, value_clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(the SUMS [9], d policy loss / d log_probs, d value loss / d values), all fp32."""
    n, device = mask.numel(), mask.device
    tensors = [t.contiguous() for t in (log_probs, old_log_probs, advantages, values, old_values, returns, mask)]
    blocks = -(-n // TILE)
    sums = torch.empty(blocks, SUMS, dtype=torch.float32, device=device)
    grads = [torch.empty(mask.shape, dtype=torch.float32, device=device) for _ in range(2)]
    launch(
        _losses, blocks, device, *tensors, tensors[0] if weights is None else weights.contiguous(), count, sums,
        *grads, n, options.clip_low, options.clip_high, float(options.dual_clip or 0.0), float(value_clip or 0.0),
        WEIGHTS=weights is not None, DUAL=options.dual_clip is not None, VALUE_CLIP=value_clip is not None, TILE=TILE,
        warps=4,
    )  # fmt: skip
    return sums[0] if blocks == 1 else sums.sum(0), *grads
