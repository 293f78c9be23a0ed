"""The operators of the losses: they return the gradients that they computed in the forward."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import wide
from .eager import losses
from .operands import HEAD_GRADIENTS, Head, LossOptions, Need, Rows, Tokens, operator, or_empty
from .ops import counted_rows, empty_gradients, gather, rows_of, scatter, where


@operator(returns=12)
def linear_ppo_loss(head: Head, tokens: Tokens, count: Tensor, options: LossOptions, triton: bool, need: Need):
    """loss, ratio, approx_kl, clip_frac, mean entropy (0-d), log-probs, entropies [n], and the HEAD_GRADIENTS."""
    if triton:
        from .gpu.linear_log_probs import linear_forward
        from .gpu.linear_ppo_loss import linear_ppo
    else:
        from .eager.chunked import linear_forward, linear_ppo
    n, dtype = len(tokens.mask), wide(head.hidden, head.weight)
    part, rows, masked = counted_rows(head, tokens.mask, triton)
    tokens, count = tokens.map(lambda t: gather(rows, t)).counted(dtype), count.to(dtype)
    if any(need):
        loss, log_probs, entropy, (hidden, *others) = linear_ppo(part, tokens, count, options, need)
        gradients = (scatter(n, rows, hidden), *others)
    else:
        log_probs, entropy, _, _ = linear_forward(part, entropy=True)
        log_probs, entropy = where(masked, log_probs), where(masked, entropy)
        loss, _ = losses.policy_terms(log_probs, tokens, options)
        gradients = (None,) * len(HEAD_GRADIENTS)
    numbers = _numbers(loss, log_probs, entropy, tokens, count, options)
    per_token = (scatter(n, rows, log_probs), scatter(n, rows, entropy))
    return *numbers, *per_token, *or_empty(gradients, log_probs)


@linear_ppo_loss.fake
def _(head, need, **_):
    dtype = wide(head.hidden, head.weight)
    return *_empty_results(head.hidden, len(head.labels), dtype), *empty_gradients(head, need, dtype)


linear_ppo_loss.gives_its_gradients(*HEAD_GRADIENTS, in_place=True)


@operator(returns=8)
def token_ppo_loss(rows: Rows, tokens: Tokens, count: Tensor, options: LossOptions, triton: bool, need: bool):
    """loss, ratio, approx_kl, clip_frac, mean entropy (0-d), log-probs, entropies [n], and the logits' gradient."""
    logits, dtype = rows.logits, wide(rows.logits)
    gradient = torch.empty(logits.shape if need else 0, dtype=logits.dtype, device=logits.device)
    tokens, count = tokens.map(lambda t: t.reshape(-1)).counted(dtype), count.to(dtype)
    out = gradient.view(-1, logits.shape[-1]) if need else None
    loss, log_probs, entropy = rows_of(triton).rows_ppo(rows, tokens, count, options, out)
    return *_numbers(loss, log_probs, entropy, tokens, count, options), log_probs, entropy, gradient


@token_ppo_loss.fake
def _(rows, need, **_):
    logits = rows.logits
    gradient = torch.empty(logits.shape if need else 0, dtype=logits.dtype, device=logits.device)
    return *_empty_results(logits, rows.labels.numel(), wide(logits)), gradient


token_ppo_loss.gives_its_gradients("logits", in_place=True)


def _numbers(loss, log_probs, entropy, tokens: Tokens, count: Tensor, options: LossOptions) -> tuple[Tensor, ...]:
    """loss, ratio, approx_kl, clip_frac and mean entropy, 0-d, from the terms of the tokens [n]."""
    total = loss.sum() / count
    if options.entropy_coef != 0:
        total = total - options.entropy_coef * entropy.sum() / count
    return total, *losses.policy_stats(log_probs, tokens, count, options), entropy.sum() / count


def _empty_results(like: Tensor, n: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Five numbers and two rows of n tokens."""
    return tuple(like.new_empty(shape, dtype=dtype) for shape in [()] * 5 + [(n,)] * 2)


def _losses_of(triton: bool):
    """The module whose policy_loss and value_loss run."""
    if triton:
        from .gpu import ppo_losses

        return ppo_losses
    return losses


@operator(returns=5)
def ppo_policy_loss(log_probs: Tensor, tokens: Tokens, count: Tensor, options: LossOptions, triton: bool):
    """loss, ratio, approx_kl, clip_frac (0-d), and the gradient of the log-probs."""
    return _losses_of(triton).policy_loss(log_probs, tokens, count, options)


@operator(returns=7)
def ppo_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    weights: Tensor | None,
    count: Tensor,
    clip_range: float | None,
    triton: bool,
):
    """loss, clip_frac, sum_sq_error, sum_return, sum_return_sq, count (0-d), and the gradient of the values."""
    return _losses_of(triton).value_loss(values, old_values, returns, mask, weights, count, clip_range)


def _loss_shapes(like: Tensor, numbers: int) -> tuple[Tensor, ...]:
    """0-d results, and a gradient of the shape of `like`."""
    scalars = tuple(like.new_empty((), dtype=wide(like)) for _ in range(numbers))
    return *scalars, torch.empty(like.shape, dtype=wide(like), device=like.device)


@ppo_policy_loss.fake
def _(log_probs, **_):
    return _loss_shapes(log_probs, 4)


@ppo_value_loss.fake
def _(values, **_):
    return _loss_shapes(values, 6)


ppo_policy_loss.gives_its_gradients("log_probs", in_place=False)
ppo_value_loss.gives_its_gradients("values", in_place=False)
