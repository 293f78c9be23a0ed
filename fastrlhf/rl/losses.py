"""The KL term of the policy loss: a value that estimates, and a gradient that is that of the KL.

An estimator k(d), d = log_probs - ref_log_probs, is a mean over samples of the policy, which moves with the policy. So
differentiating k as it stands misses half of the gradient of E[k]:

    grad E_pi[k] = E_pi[(k(d) + k'(d)) grad log pi]             (k(d): score function; k'(d): k as it stands)

k1: d + 1, and the 1 has mean 0. k3: exp(-d) - 1 + d + 1 - exp(-d) = d exactly. Both are unbiased for KL(pi || ref), and
d grad log pi is its gradient. As they stand they would give grad E: k1 0, k3 that of KL(ref || pi). k2 as it stands,
d grad log pi, is the gradient of the KL that it approximates. abs: |d| + sign(d), of E|d|, which is no KL.
(DeepSeek-V3.2, DeepSeek-AI 2025, eq. 7, corrects k3 alike.) Exact on policy, in the first update of a step; later
updates of the same samples leave out the ratio to the policy they come from, as GRPO does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrlhf.config.stages import PPOConfig
from fastrlhf_kernels import PPOLoss, kl_estimate, ppo_policy_loss

AS_K2 = ("k1", "k2", "k3")  # estimators whose gradient is d grad log pi, which is that of k2 as it stands


def separate_kl(config: PPOConfig) -> bool:
    """True where `linear_ppo_loss` cannot give the gradient, and log-probs that autograd knows are needed."""
    return config.kl_in == "loss" and config.kl_estimator not in AS_K2


def fused_kl(config: PPOConfig, ref_log_probs: Tensor) -> dict[str, Any]:
    """The KL arguments of `linear_ppo_loss`; nothing where the KL is in the reward."""
    if config.kl_in == "reward":
        return {}
    return {"ref_log_probs": ref_log_probs, "kl_coef": config.kl_coef, "kl_estimator": "k2"}


def with_value(
    result: PPOLoss, ref_log_probs: Tensor, counted: Tensor, config: PPOConfig, normalizer: Tensor | float
) -> PPOLoss:
    """The result of `linear_ppo_loss(**fused_kl(...))` with the value of kl_estimator in the loss, the gradient as it
    is. ref_log_probs, counted [N]."""
    if config.kl_in == "reward" or config.kl_estimator == "k2":
        return result
    log_probs = result.stats["log_probs"]
    wanted, there = (kl_estimate(log_probs, ref_log_probs, name) for name in (config.kl_estimator, "k2"))
    off = (wanted - there).where(counted, 0.0).sum() / normalizer
    return PPOLoss(result.loss + config.kl_coef * off, result.stats)


def kl_term(
    log_probs: Tensor, ref_log_probs: Tensor, counted: Tensor, config: PPOConfig, normalizer: Tensor | float
) -> Tensor:
    """kl_coef * sum of the estimates / normalizer, with the gradient above, from log_probs [N] that can be
    differentiated. counted [N] bool."""
    fixed = log_probs.detach()
    d = fixed - ref_log_probs
    value = kl_estimate(fixed, ref_log_probs, config.kl_estimator)
    slope = d if config.kl_estimator in AS_K2 else d.abs() + d.sign()
    kl = value + slope * (log_probs - fixed)
    return config.kl_coef * kl.where(counted, 0.0).sum() / normalizer


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
