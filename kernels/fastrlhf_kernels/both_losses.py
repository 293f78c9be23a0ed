"""The policy loss and the value loss of one batch of tokens, together."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from . import checks, functional, loss_ops
from .backend import choose_backend
from .functional import PPOLoss


class PPOLosses(NamedTuple):
    """What `ppo_policy_loss` and `ppo_value_loss` return."""

    policy: PPOLoss
    value: PPOLoss


def ppo_losses(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    *,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    clip_range_value: float | None = 0.2,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    backend: str = "auto",
    validate: bool | None = None,
) -> PPOLosses:
    """`ppo_policy_loss` and `ppo_value_loss` of tensors of one shape; `weights` and `normalizer` count for both.

    In Triton one launch computes both losses, all statistics and both gradients (a second adds up the sums of more
    than 1,024 tokens); nothing waits for the GPU. Raises ValueError as the two functions do.
    """
    tensors = (log_probs, old_log_probs, advantages, values, old_values, returns)
    names = ("log_probs", "old_log_probs", "advantages", "values", "old_values", "returns")
    checks.floating(**dict(zip(names, tensors, strict=True)), weights=weights)
    if choose_backend(backend, *tensors).name != "triton":
        more = {"weights": weights, "normalizer": normalizer, "backend": "torch", "validate": validate}
        clips = {"clip_range": clip_range, "clip_range_high": clip_range_high, "dual_clip": dual_clip}
        return PPOLosses(
            functional.ppo_policy_loss(log_probs, old_log_probs, advantages, response_mask, **clips, **more),
            functional.ppo_value_loss(values, old_values, returns, response_mask, clip_range=clip_range_value, **more),
        )
    others = dict(zip(names[1:], tensors[1:], strict=True))
    mask = checks.token_mask(response_mask, log_probs, "log_probs", **others, weights=weights)
    checks.clips(clip_range, clip_range_high, dual_clip)
    if clip_range_value is not None:
        checks.number("clip_range_value", clip_range_value, low=0)
    count = checks.divisor(normalizer, mask, checks.wide(log_probs), validate)
    checks.no_transforms(log_probs, values)
    high = clip_range if clip_range_high is None else clip_range_high
    sums, _, _ = loss_ops.ppo_losses(
        log_probs, values, *(t.detach() for t in (old_log_probs, advantages, old_values, returns)), mask,
        None if weights is None else weights.detach(), count, clip_range, high, dual_clip, clip_range_value,
    )  # fmt: skip
    stats = sums.detach()
    policy = dict(zip(("ratio", "approx_kl", "clip_frac"), stats[1:4], strict=True))
    value = dict(zip(("clip_frac", "sum_sq_error", "sum_return", "sum_return_sq"), stats[5:9], strict=True))
    value["count"] = mask.sum().to(stats.dtype)
    return PPOLosses(PPOLoss(sums[0], policy), PPOLoss(sums[4], value))
