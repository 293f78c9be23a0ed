"""The clipped loss with one ratio a response (GSPO, Zheng et al. 2025): the geometric mean of its tokens' ratios."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrlhf.config import PPOConfig
from fastrlhf.kl_loss import kl_term
from fastrlhf_kernels import PPOLoss, ppo_policy_loss


def sequence_ratio_loss(
    log_probs: Tensor,
    entropy: Tensor,
    old_log_probs: Tensor,
    ref_log_probs: Tensor,
    advantages: Tensor,
    counted: Tensor,
    rows: Tensor,
    config: PPOConfig,
    *,
    weights: Tensor | None,
    normalizer: Tensor | float,
) -> PPOLoss:
    """All [N] over the response tokens of whole responses; counted [N] bool; rows [B, T] bool: which tokens are whose
    (rows of one token each: the ratio of each token, as in PPO).

    Every token of a response carries s = exp(mean_t(log_probs - old_log_probs)), eq. 4 and 5 of the paper; with
    loss_aggregation = sequence_mean the loss is theirs. Entropy bonus and KL in the loss are per token, as elsewhere.
    """
    log_probs, entropy = log_probs.where(counted, 0.0), entropy.where(counted, 0.0)
    difference = torch.zeros(rows.shape, device=rows.device).masked_scatter(rows, log_probs - old_log_probs)
    mean = difference.sum(1, keepdim=True) / rows.sum(1, keepdim=True).clamp(min=1)
    level = old_log_probs + mean.expand_as(difference)[rows]
    loss, stats = ppo_policy_loss(
        level, old_log_probs, advantages, counted, clip_range=config.clip_range,
        clip_range_high=config.clip_range_high, dual_clip=config.dual_clip, weights=weights, normalizer=normalizer,
    )  # fmt: skip
    bonus = entropy.sum() / normalizer
    loss = loss - config.entropy_coef * bonus
    if config.kl_in == "loss":
        loss = loss + kl_term(log_probs, ref_log_probs, counted, config, normalizer)
    return PPOLoss(loss, {**stats, "entropy": bonus.detach(), "log_probs": log_probs.detach()})
