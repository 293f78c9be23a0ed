"""From scores to advantages: score scaling, KL in the reward, GAE or a group baseline, whitening, clipping."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastrlhf.config.stages import PPOConfig
from fastrlhf_kernels import gae, kl_estimate, masked_whiten, shape_rewards

GROUP_ESTIMATORS = ("grpo", "dr_grpo", "rloo")
GRPO_EPS = 1e-4  # added to a group's deviation, as in TRL: a group of equal scores gives 0, not noise


class RunningMoments:
    """Mean and variance of every score seen so far (Chan et al. 1979; MOSS-RLHF's reward scaling).

    A first batch of one score has no deviation: its scale is 1 instead of the infinity of the original.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.sum_sq = 0, 0.0, 0.0

    def update(self, scores: Tensor) -> None:
        """scores [n] finite."""
        n = scores.numel()
        if n == 0:
            return
        batch = scores.double()
        mean = float(batch.mean())
        delta, total = mean - self.mean, self.count + n
        self.sum_sq += float((batch - mean).square().sum()) + delta * delta * self.count * n / total
        self.mean += delta * n / total
        self.count = total

    @property
    def std(self) -> float:
        """sqrt(sum of squares / (n - 1)); 1 before two different scores were seen."""
        if self.count < 2 or self.sum_sq == 0.0:
            return 1.0
        return math.sqrt(self.sum_sq / (self.count - 1))

    def state(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "sum_sq": self.sum_sq}

    def load_state(self, state: dict[str, float]) -> None:
        self.count, self.mean, self.sum_sq = int(state["count"]), state["mean"], state["sum_sq"]


def shape_scores(
    scores: Tensor, finished: Tensor, config: PPOConfig, moments: RunningMoments, lengths: Tensor
) -> Tensor:
    """What the policy is optimised for, from raw scores [B] (NaN: unscorable, stays NaN).

    In this order: scaling by the running moments (this batch included), clipping to +-reward_clip, then
    missing_eos_penalty off every response that no stop token ended, length_penalty for each token, and
    min(max((length - (max_new_tokens - overlong_penalty)) / overlong_penalty, 0), 1) (Yu et al. 2025, eq. 13).
    finished [B] bool, lengths [B] in tokens.
    """
    if config.reward_scaling != "none":
        moments.update(scores[scores.isfinite()])
        centre = moments.mean if config.reward_scaling == "running_norm" else 0.0
        scores = (scores - centre) / moments.std
    if config.reward_clip is not None:
        scores = scores.clamp(-config.reward_clip, config.reward_clip)
    if config.missing_eos_penalty is not None:
        scores = scores - config.missing_eos_penalty * (~finished).float()
    scores = scores - config.length_penalty * lengths
    if config.overlong_penalty is not None:
        over = lengths - (config.max_new_tokens - config.overlong_penalty)
        scores = scores - (over / config.overlong_penalty).clamp(0.0, 1.0)
    return scores


def estimate(
    scores: Tensor,
    log_probs: Tensor,
    ref_log_probs: Tensor,
    values: Tensor | None,
    response_mask: Tensor,
    config: PPOConfig,
    kl_coef: float | None = None,
    *,
    token_rewards: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns [B, T] fp32 from shaped scores [B] (NaN rows must be masked out already).

    gae: Schulman et al. 2016 over per-token rewards (values [B, T]). reinforce++: reward-to-go, no critic (Hu 2025).
    grpo: (R - group mean) / (group deviation + 1e-4) (Shao et al. 2024); dr_grpo: without the division (Liu et al.
    2025); rloo: minus the mean of the group's others (Ahmadian et al. 2024). R is the score less the summed KL penalty.
    Positions inside a row that response_mask leaves out are skipped: no reward, no discount, no advantage.
    kl_coef: of the step; None: the configured one. token_rewards [B, T], in the scale of the scores: gae and
    reinforce++ get them where they fall, and the last token what is left of the score, so that a row's rewards still
    sum to its score. bootstrap_values [B]: gae's value of the state after each row (0: the response ended there).
    """
    kl_coef = config.kl_coef if kl_coef is None else kl_coef
    kl_coef = kl_coef if config.kl_in == "reward" else 0.0
    scores = scores.nan_to_num(nan=0.0)
    if config.advantage in GROUP_ESTIMATORS:
        penalty = kl_estimate(log_probs, ref_log_probs, config.kl_estimator).where(response_mask, 0.0).sum(1)
        advantages = _group_advantages(scores - kl_coef * penalty, response_mask.any(1), config)
        advantages = advantages[:, None].expand_as(log_probs).where(response_mask, 0.0)
        returns = torch.zeros_like(advantages)
    else:
        early = torch.zeros_like(log_probs) if token_rewards is None else _before_last(token_rewards, response_mask)
        rewards = early + shape_rewards(
            scores - early.sum(1), log_probs, ref_log_probs, response_mask,
            kl_coef=kl_coef, estimator=config.kl_estimator,
        )  # fmt: skip
        use_critic = config.advantage == "gae"
        base = values if use_critic else torch.zeros_like(log_probs)
        gae_lambda = config.gae_lambda if use_critic else 1.0
        advantages, returns = gae(
            rewards, base, response_mask, gamma=config.gamma, gae_lambda=gae_lambda, bootstrap_values=bootstrap_values
        )
        if config.whiten_advantages:
            size = config.samples_per_prompt if config.whiten_advantages == "group" else len(advantages)
            parts = zip(advantages.split(size), response_mask.split(size), strict=True)
            advantages = torch.cat([masked_whiten(part, mask) for part, mask in parts])
    if config.advantage_clip is not None:
        advantages = advantages.clamp(-config.advantage_clip, config.advantage_clip)
    return advantages, returns


def _before_last(token_rewards: Tensor, response_mask: Tensor) -> Tensor:
    """[B, T]: the rewards of every token of the mask but the last of its row."""
    left = response_mask.flip(1).cumsum(1).flip(1)  # tokens of the row from here on
    return token_rewards.where(response_mask & (left > 1), 0.0)


def _group_advantages(rewards: Tensor, scorable: Tensor, config: PPOConfig) -> Tensor:
    """rewards [B] prompt-major, scorable [B] bool -> [B]; unscorable responses count in no statistic."""
    groups = rewards.view(-1, config.samples_per_prompt)
    good = scorable.view_as(groups)
    count = good.sum(1, keepdim=True)
    mean = groups.where(good, 0.0).sum(1, keepdim=True) / count.clamp(min=1)
    centred = (groups - mean).where(good, 0.0)
    if config.advantage == "rloo":  # R_i - mean of the others = (R_i - mean of all) * n / (n - 1)
        centred = centred * count / (count - 1).clamp(min=1)
    elif config.advantage == "grpo":
        variance = centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + GRPO_EPS)
    return centred.flatten()


CLIP = 0.2  # the error is clipped to +-20%, as in the paper


class KLController:
    """kl_coef, fixed or adaptive (Ziegler et al. 2019, sec. 2.2): after each step

        coef *= 1 + clip(kl / kl_controller_target - 1, +-0.2) * responses / kl_horizon

    with kl in nats a response (`kl/ref`) and the responses of all devices.
    """

    def __init__(self, config: PPOConfig) -> None:
        self.config, self.coef = config, config.kl_coef

    def update(self, kl: float) -> None:
        """kl: `kl/ref` of the step, measured before its updates."""
        if self.config.kl_controller == "fixed":
            return
        error = min(max(kl / self.config.kl_controller_target - 1.0, -CLIP), CLIP)
        self.coef *= 1.0 + error * self.config.rollout_batch_size / self.config.kl_horizon

    def state(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state(self, state: dict[str, float]) -> None:
        self.coef = state["coef"]
