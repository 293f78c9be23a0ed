"""The policy loss of a micro-batch: clip, sequence ratio, KL in the loss and entropy bonus, through one seam.

The KL term has a value that estimates, and a gradient that is that of the KL. An estimator k(d) with
d = log_probs - ref_log_probs is a mean over samples of the policy, which moves with the policy. So differentiating k as
it stands misses half of the gradient of E[k]:

    grad E_pi[k] = E_pi[(k(d) + k'(d)) grad log pi]             (k(d): score function; k'(d): k as it stands)

k1: d + 1, and the 1 has mean 0. k3: exp(-d) - 1 + d + 1 - exp(-d) = d exactly. Both are unbiased for KL(pi || ref), and
d grad log pi is its gradient. As they stand they would give grad E: k1 0, k3 that of KL(ref || pi). k2 as it stands,
d grad log pi, is the gradient of the KL that it approximates. abs: |d| + sign(d), of E|d|, which is no KL.
(DeepSeek-V3.2, DeepSeek-AI 2025, eq. 7, corrects k3 alike.) Exact on policy, in the first update of a step; later
updates of the same samples leave out the ratio to the policy they come from, as GRPO does. kl_gradient = published
differentiates the estimator as it stands, which for k3 is GRPO's loss (Shao et al. 2024, eq. 3 and 4). The KL term is a
mean of the same kind as the loss beside it (loss_aggregation), without the importance weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrlhf.config.stages import PPOConfig
from fastrlhf.models.heads import Head
from fastrlhf.models.token_batch import TokenBatch
from fastrlhf.rl.experience import Experience, MiniBatch, TokenExperience, TokenValues
from fastrlhf_kernels import PPOLoss, kl_estimate, linear_loss, linear_ppo_loss, ppo_policy_loss, ppo_value_loss

AS_K2 = ("k1", "k2", "k3")  # estimators whose gradient is d grad log pi, which is that of k2 as it stands


def normalizer_of(experience_mask: Tensor, mini_batch: MiniBatch) -> Tensor:
    """Return what a mini-batch's summed losses are divided by: its response tokens, of all ranks (0-d fp32).

    It belongs to the optimizer step, not to the micro-batch, so that micro-batches just add up.
    """
    return experience_mask[mini_batch].sum().clamp(min=1).float()


def token_weights(experience: Experience, mini_batch: MiniBatch, config: PPOConfig) -> Tensor | None:
    """Return the weights [B, T] of the tokens in a mini-batch's policy loss; None: all 1.

    They are the importance weights, times what `aggregation_weights` says.
    """
    factor = aggregation_weights(experience, mini_batch, config)
    if factor is None or experience.weights is None:
        return experience.weights if factor is None else factor
    return factor * experience.weights


def aggregation_weights(experience: Experience, mini_batch: MiniBatch, config: PPOConfig) -> Tensor | None:
    """Return the weights [B, T] that make of a mean over the mini-batch's tokens the mean over responses of their means
    (sequence_mean), or the sum over max_new_tokens (constant; Liu et al. 2025, dr_grpo); None: all 1."""
    kind, mask = config.loss_aggregation, experience.response_mask
    if kind == "token_mean":
        return None
    tokens = mask[mini_batch].sum()
    if kind == "constant":
        return (tokens / (len(mini_batch) * config.max_new_tokens)).expand_as(experience.advantages)
    tokens_of_row = mask.sum(1, keepdim=True).clamp(min=1)
    rows = mask[mini_batch].any(1).sum().clamp(min=1)
    return (tokens / rows / tokens_of_row).expand_as(experience.advantages)


def policy_loss(
    hidden: Tensor,
    batch: TokenBatch,
    tokens: TokenExperience,
    config: PPOConfig,
    *,
    head: Head,
    normalizer: Tensor,
    workspace: int | None = None,
) -> PPOLoss:
    """Return the policy loss of a micro-batch, with its statistics and `log_probs` [N].

    hidden [N, H] predicts the N response tokens of `batch`, whose experience `tokens` is; head: of the policy.
    normalizer: of the mini-batch, so that the losses of its micro-batches add up. workspace: as of
    `target_log_probs`.
    """
    options = {"workspace": workspace, **head.kwargs()}
    exact = config.kl_gradient == "exact"
    own_kl = config.kl_in == "loss" and (tokens.kl_weights is not None or (exact and config.kl_estimator not in AS_K2))
    if config.ratio_level == "token" and config.policy_loss == "clip" and not own_kl:
        return _fused_loss(hidden, batch, tokens, config, head.weight, normalizer, options)

    def loss_fn(log_probs: Tensor, entropy: Tensor) -> PPOLoss:
        return loss_of_log_probs(log_probs, entropy, tokens, config, normalizer=normalizer)

    options |= {"temperature": config.temperature, "return_entropy": True}
    return PPOLoss(*linear_loss(hidden, head.weight, batch.labels, loss_fn, **options))


def _fused_loss(
    hidden: Tensor,
    batch: TokenBatch,
    tokens: TokenExperience,
    config: PPOConfig,
    weight: Tensor,
    normalizer: Tensor,
    options: dict[str, Any],
) -> PPOLoss:
    """From hidden states to loss and gradients in one sweep (one ratio a token; a KL whose gradient is that of k2, or
    of the estimator as it stands). weight [V, H], options: of the head."""
    kl_in_loss, exact = config.kl_in == "loss", config.kl_gradient == "exact"
    loss, stats = linear_ppo_loss(
        hidden,
        weight,
        batch.labels,
        tokens.old_log_probs,
        tokens.advantages,
        tokens.response_mask,
        temperature=config.temperature,
        clip_range=config.clip_range,
        clip_range_high=config.clip_range_high,
        dual_clip=config.dual_clip,
        weights=tokens.weights,
        ref_log_probs=tokens.ref_log_probs if kl_in_loss else None,
        kl_coef=config.kl_coef if kl_in_loss else 0.0,
        kl_estimator="k2" if exact else config.kl_estimator,
        entropy_coef=config.entropy_coef,
        normalizer=normalizer,
        **options,
    )
    if kl_in_loss and exact and config.kl_estimator != "k2":  # the gradient is right, the value is that of k2
        log_probs = stats["log_probs"]
        value, there = (
            kl_estimate(log_probs, tokens.ref_log_probs, estimator) for estimator in (config.kl_estimator, "k2")
        )
        loss = loss + config.kl_coef * (value - there).where(tokens.response_mask, 0.0).sum() / normalizer
    return PPOLoss(loss, stats)


def loss_of_log_probs(
    log_probs: Tensor, entropy: Tensor, tokens: TokenExperience, config: PPOConfig, *, normalizer: Tensor | float
) -> PPOLoss:
    """Return the policy loss from log_probs and entropy [N] that autograd knows, of whole responses.

    ratio_level = sequence: every token of a response carries s = exp(mean_t(log_probs - old_log_probs)), the geometric
    mean of its tokens' ratios (GSPO, Zheng et al. 2025, eq. 4 and 5); with loss_aggregation = sequence_mean the loss is
    theirs. policy_loss = cispo: see `cispo_loss`. The entropy bonus is a mean over tokens whatever the aggregation.
    """
    mask = tokens.response_mask
    log_probs, entropy = log_probs.where(mask, 0.0), entropy.where(mask, 0.0)
    compared = log_probs
    if config.ratio_level == "sequence":
        compared = tokens.old_log_probs + _mean_of_row(log_probs - tokens.old_log_probs, tokens.row_mask)
    if config.policy_loss == "cispo":
        loss, stats = cispo_loss(log_probs, tokens, config, normalizer=normalizer)
    else:
        loss, stats = _clipped_loss(compared, tokens, config, normalizer)
    bonus = entropy.sum() / normalizer
    loss = loss - config.entropy_coef * bonus
    if config.kl_in == "loss":
        loss = loss + kl_term(log_probs, tokens, config, normalizer)
    return PPOLoss(loss, {**stats, "entropy": bonus.detach(), "log_probs": log_probs.detach()})


def _clipped_loss(compared: Tensor, tokens: TokenExperience, config: PPOConfig, normalizer: Tensor | float) -> PPOLoss:
    return ppo_policy_loss(
        compared,
        tokens.old_log_probs,
        tokens.advantages,
        tokens.response_mask,
        clip_range=config.clip_range,
        clip_range_high=config.clip_range_high,
        dual_clip=config.dual_clip,
        weights=tokens.weights,
        normalizer=normalizer,
    )


def cispo_loss(log_probs: Tensor, tokens: TokenExperience, config: PPOConfig, *, normalizer: Tensor | float) -> PPOLoss:
    """Clipped importance sampling, of weights and not of updates (MiniMax 2025, MiniMax-M1, eq. 4 and 5):

        - sum_t sg(clip(r_t, 1 - clip_range, 1 + clip_range_high)) A_t log pi(a_t) / normalizer, r = pi / pi_old

    So a token beyond the clip still passes a gradient on, which is bounded, where PPO's passes none. clip_range = 1
    leaves the lower side open, as theirs is. log_probs [N], 0 outside the mask. clip_frac: share of clipped weights.
    """
    mask, fixed = tokens.response_mask, log_probs.detach()
    high = config.clip_range if config.clip_range_high is None else config.clip_range_high
    ratio = (fixed - tokens.old_log_probs).where(mask, 0.0).exp()
    weights = ratio.clamp(1.0 - config.clip_range, 1.0 + high)
    scale = weights * tokens.advantages if tokens.weights is None else weights * tokens.advantages * tokens.weights
    loss = -(scale.where(mask, 0.0) * log_probs).sum() / normalizer
    _, stats = _clipped_loss(fixed, tokens, config, normalizer)
    clipped = ((weights != ratio) & mask).sum() / normalizer
    return PPOLoss(loss, {**stats, "clip_frac": clipped})


def _mean_of_row(values: Tensor, row_mask: Tensor) -> Tensor:
    """Give each of the tokens [N] the mean over its row; row_mask [B, T] says which token is whose."""
    lengths = row_mask.sum(1)
    row_of = torch.repeat_interleave(lengths, output_size=len(values))  # its size is known: nobody waits
    column = torch.arange(len(values), device=values.device) - (lengths.cumsum(0) - lengths)[row_of]
    rows = values.new_zeros(row_mask.numel()).scatter(0, row_of * row_mask.shape[1] + column, values)
    return (rows.view(row_mask.shape).sum(1) / lengths.clamp(min=1))[row_of]


def kl_term(log_probs: Tensor, tokens: TokenExperience, config: PPOConfig, normalizer: Tensor | float) -> Tensor:
    """Return kl_coef * sum of the weighted estimates / normalizer, with the gradient that the config asks for, from
    log_probs [N] that can be differentiated."""
    ref_log_probs = tokens.ref_log_probs
    if config.kl_gradient == "published":
        kl = kl_estimate(log_probs, ref_log_probs, config.kl_estimator)
    else:
        fixed = log_probs.detach()
        d = fixed - ref_log_probs
        slope = d if config.kl_estimator in AS_K2 else d.abs() + d.sign()
        kl = kl_estimate(fixed, ref_log_probs, config.kl_estimator) + slope * (log_probs - fixed)
    if tokens.kl_weights is not None:
        kl = kl * tokens.kl_weights
    return config.kl_coef * kl.where(tokens.response_mask, 0.0).sum() / normalizer


def value_loss(values: Tensor, tokens: TokenValues, config: PPOConfig, *, normalizer: Tensor) -> PPOLoss:
    """Return the clipped value loss of a micro-batch from the critic's values [N], without vf_coef."""
    return ppo_value_loss(
        values,
        tokens.values,
        tokens.returns,
        tokens.response_mask,
        clip_range=config.clip_range_value,
        normalizer=normalizer,
    )
