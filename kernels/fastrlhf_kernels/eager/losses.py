"""Per-token PPO terms with their closed-form gradients, reward shaping, GAE and whitening, vectorised in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import wide
from ..operands import LossOptions, Tokens


def kl_terms(log_probs: Tensor, ref_log_probs: Tensor, estimator: str) -> Tensor:
    """The per-token estimate of KL(policy || reference) from d = log_probs - ref_log_probs."""
    d = log_probs - ref_log_probs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d * d / 2
    return torch.expm1(-d) + d if estimator == "k3" else d.abs()


def kl_gradient(log_probs: Tensor, ref_log_probs: Tensor, estimator: str) -> Tensor:
    """d kl_terms / d log_probs."""
    d = log_probs - ref_log_probs
    if estimator == "k1":
        return torch.ones_like(d)
    if estimator == "k2":
        return d
    return -torch.expm1(-d) if estimator == "k3" else d.sign()


def ratio_and_clip(log_probs: Tensor, tokens: Tokens, options: LossOptions):
    """(ratio, -A ratio, -A clip(ratio))."""
    ratio = torch.exp(log_probs - tokens.old_log_probs)
    clipped = -tokens.advantages * ratio.clamp(1 - options.clip_low, 1 + options.clip_high)
    return ratio, -tokens.advantages * ratio, clipped


def policy_terms(log_probs: Tensor, tokens: Tokens, options: LossOptions):
    """(loss, d loss / d log_prob) of every token, not yet divided by the normalizer and without the entropy bonus.

    Where the two branches of the maximum are equal the whole gradient goes to the unclipped one. A zero advantage
    costs nothing, however large the ratio.
    """
    _, plain, clipped = ratio_and_clip(log_probs, tokens, options)
    wins = plain >= clipped  # false for NaN; clipped * 0 is then NaN in turn
    loss, grad = torch.where(wins, plain, clipped), torch.where(wins, plain, clipped * 0)
    if options.dual_clip is not None:
        bound = -tokens.advantages * options.dual_clip
        capped = (tokens.advantages < 0) & (loss > bound)
        loss, grad = torch.where(capped, bound, loss), torch.where(capped, 0, grad)
    if tokens.weights is not None:
        loss, grad = loss * tokens.weights, grad * tokens.weights
    if options.kl_coef != 0:
        loss = loss + options.kl_coef * kl_terms(log_probs, tokens.ref_log_probs, options.kl_estimator)
        grad = grad + options.kl_coef * kl_gradient(log_probs, tokens.ref_log_probs, options.kl_estimator)
    return loss, grad


def policy_stats(log_probs: Tensor, tokens: Tokens, count: Tensor, options: LossOptions):
    """(ratio, approx_kl, clip_frac): sums over the mask / count; outside it log-probs and advantages must be 0."""
    ratio, plain, clipped = ratio_and_clip(log_probs, tokens, options)
    d = log_probs - tokens.old_log_probs  # 0 outside the mask, so that only the ratio, 1 there, has to be masked
    clip_frac = (clipped > plain).sum() / count
    ratio_sum = torch.where(tokens.mask, ratio, 0).sum()
    return ratio_sum / count, (torch.expm1(d) - d).sum() / count, clip_frac.to(ratio.dtype)


def policy_loss(log_probs: Tensor, tokens: Tokens, count: Tensor, options: LossOptions):
    """loss, ratio, approx_kl, clip_frac (0-d) and d loss / d log_probs."""
    dtype, mask = wide(log_probs), tokens.mask
    log_probs, tokens = torch.where(mask, log_probs, 0).to(dtype), tokens.counted(dtype)
    terms, grad = policy_terms(log_probs, tokens, options)
    stats = policy_stats(log_probs, tokens, count, options)
    return terms.sum() / count, *stats, torch.where(mask, grad, 0) / count


def value_loss(values, old_values, returns, mask, weights, count: Tensor, clip_range: float | None):
    """loss, clip_frac, sum_sq_error, sum_return, sum_return_sq, count (0-d) and d loss / d values."""
    dtype = wide(values)
    v, old, ret = (torch.where(mask, t, 0).to(dtype) for t in (values, old_values, returns))
    error = v - ret
    plain, grad = error * error, error
    terms, clipped = plain, plain
    if clip_range is not None:
        near = torch.clamp(v, old - clip_range, old + clip_range) - ret
        clipped = near * near
        wins = plain >= clipped
        terms, grad = torch.where(wins, plain, clipped), torch.where(wins, error, near * 0)
    if weights is not None:
        weight = torch.where(mask, weights, 0).to(dtype)
        terms, grad = terms * weight, grad * weight
    sums = ((clipped > plain).sum() / count, plain.sum(), ret.sum(), (ret * ret).sum(), mask.sum().to(dtype))
    return terms.sum() / 2 / count, *(t.to(dtype) for t in sums), torch.where(mask, grad, 0) / count


def shape_rewards(scores: Tensor, log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, kl_coef: float, estimator):
    """[B, T]: -kl_coef * KL on every response token, the score on the last one."""
    dtype = wide(log_probs, scores)
    rewards = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    if kl_coef != 0:
        rewards = torch.where(mask, -kl_coef * kl_terms(log_probs.to(dtype), ref_log_probs.to(dtype), estimator), 0)
    position = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, position, -1).amax(1, keepdim=True) if mask.shape[1] else position.new_zeros(len(mask), 1)
    return torch.where((position == last) & mask, rewards + scores.to(dtype)[:, None], rewards)


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    gae_lambda: float | Tensor,
    bootstrap: Tensor | None,
):
    """Advantages and returns [B, T]: A_t = sum over k of (gamma lambda)^k delta_{t+k}, response tokens only.

    The recurrence A_t = delta_t + c_t A_{t+1} (c = gamma * lambda on a token, delta = 0 and c = 1 in a hole) is
    composed with itself at distances 1, 2, 4, ...: log2(T) vector operations instead of T.
    """
    dtype = wide(rewards, values)
    length = mask.shape[1]
    v = torch.where(mask, values, 0).to(dtype)
    end = v.new_zeros(len(v), 1) if bootstrap is None else bootstrap.to(dtype)[:, None]
    position = torch.arange(length, device=v.device)
    here = torch.where(mask, position, length)  # then the first token at or after each position
    here = torch.cat([here, here.new_full((len(v), 1), length)], 1).flip(1).cummin(1).values.flip(1)
    following = torch.cat([v, end], 1).gather(1, here[:, 1:])
    decay = gamma * (gae_lambda.to(dtype)[:, None] if isinstance(gae_lambda, Tensor) else gae_lambda)
    carry = torch.full_like(v, 1).mul(decay).masked_fill(~mask, 1)
    total = torch.where(mask, torch.where(mask, rewards, 0).to(dtype) + gamma * following - v, 0)
    step = 1
    while step < length:
        total = torch.cat([total[:, :-step] + carry[:, :-step] * total[:, step:], total[:, -step:]], 1)
        carry = torch.cat([carry[:, :-step] * carry[:, step:], carry[:, -step:]], 1)
        step *= 2
    advantages = torch.where(mask, total, 0)
    return advantages, torch.where(mask, total + v, 0)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the mask, biased variance; equal values give exactly 0."""
    x = torch.where(mask, x, 0).to(wide(x))
    count = mask.sum().clamp(min=1)
    first = mask.flatten().to(torch.uint8).argmax(0, keepdim=True) if x.numel() else None
    pivot = x.new_zeros(1) if first is None else x.flatten().gather(0, first)  # a value: differences of equals are 0
    centred = torch.where(mask, x - pivot, 0)
    shift = centred.sum() / count
    centred = torch.where(mask, centred - shift, 0)
    out = centred * torch.rsqrt((centred * centred).sum() / count + eps)
    return torch.where(mask, out if shift_mean else out + pivot + shift, 0)
