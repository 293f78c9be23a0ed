"""Scores to whitened advantages in one call: reward shaping, GAE and whitening."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, losses, ops
from .backend import choose_backend


class ShapedAdvantages(NamedTuple):
    """rewards, advantages, returns: [B, T] fp32, 0 outside the mask."""

    rewards: Tensor
    advantages: Tensor
    returns: Tensor


@torch.no_grad()
def shape_and_gae(
    scores: Tensor,
    log_probs: Tensor,
    ref_log_probs: Tensor,
    values: Tensor,
    response_mask: Tensor,
    *,
    kl_coef: float,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
    estimator: str = "k1",
    whiten: bool = True,
    eps: float = 1e-8,
    bootstrap_values: Tensor | None = None,
    backend: str = "auto",
    validate: bool | None = None,
) -> ShapedAdvantages:
    """`shape_rewards`, then `gae`, then `masked_whiten` of the advantages (not of the returns; not with whiten=False).

    scores [B], the others [B, T], bootstrap_values [B]. In Triton one launch, two with whitening, and nothing waits
    for the GPU. No gradient. Raises ValueError as the three functions do.
    """
    checks.floating(
        scores=scores,
        log_probs=log_probs,
        ref_log_probs=ref_log_probs,
        values=values,
        bootstrap_values=bootstrap_values,
    )
    checks.rows_of_tokens("values", values)
    mask = checks.token_mask(response_mask, values, "values", log_probs=log_probs, ref_log_probs=ref_log_probs)
    checks.shapes(values.shape[:1], "the rows of values", scores=scores, bootstrap_values=bootstrap_values)
    checks.devices(values=values, scores=scores, bootstrap_values=bootstrap_values)
    checks.number("kl_coef", kl_coef)
    checks.number("eps", eps, low=0)
    checks.discounts(gamma, gae_lambda)
    checks.estimator("estimator", estimator)
    if choose_backend(backend, scores, log_probs, ref_log_probs, values).name == "triton":
        shaping = (scores, log_probs, ref_log_probs, float(kl_coef), estimator, float(eps) if whiten else None)
        return ShapedAdvantages(
            *ops.gae(None, values, mask, float(gamma), float(gae_lambda), bootstrap_values, *shaping)
        )
    rewards = losses.shape_rewards(scores, log_probs, ref_log_probs, mask, kl_coef, estimator)
    advantages, returns = losses.gae(rewards, values, mask, gamma, gae_lambda, bootstrap_values)
    if whiten:
        advantages = losses.masked_whiten(advantages, mask, True, eps)
    return ShapedAdvantages(rewards, advantages, returns)
