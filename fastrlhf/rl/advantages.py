"""From scores to advantages: score scaling, KL in the reward, GAE or a group baseline, whitening, clipping."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf.config.stages import PPOConfig
from fastrlhf.rl.alarms import SAME
from fastrlhf_kernels import kl_estimate, shape_and_gae

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

    In this order: scaling by the running moments (this batch included), clipping to +-reward_clip, then, for every
    response that no stop token ended, missing_eos_penalty off it or missing_eos_score in its place (Huang et al. 2024:
    whatever the reward model says of it), length_penalty for each token, and
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
    if config.missing_eos_score is not None:
        scores = scores.where(finished | scores.isnan(), config.missing_eos_score)
    scores = scores - config.length_penalty * lengths
    if config.overlong_penalty is not None:
        over = lengths - (config.max_new_tokens - config.overlong_penalty)
        scores = scores - (over / config.overlong_penalty).clamp(0.0, 1.0)
    return scores


@dataclass(frozen=True)
class Signals:
    """What an estimator reads: shaped scores [B], 0 where unscorable; log_probs, ref_log_probs, values [B, T] fp32;
    response_mask [B, T]; kl_coef as it acts on the reward; token_rewards [B, T] and bootstrap_values [B] or None."""

    scores: Tensor
    log_probs: Tensor
    ref_log_probs: Tensor
    values: Tensor | None
    response_mask: Tensor
    kl_coef: float
    token_rewards: Tensor | None
    bootstrap_values: Tensor | None


Estimator = Callable[[Signals, PPOConfig], tuple[Tensor, Tensor]]  # -> advantages, returns [B, T] fp32


def estimate_advantages(
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
    """Return advantages and returns [B, T] fp32 from shaped scores [B] (NaN rows must be masked out already), by the
    estimator that the config names.

    Positions inside a row that response_mask leaves out are skipped: no reward, no discount, no advantage. kl_coef: of
    the step; None: the configured one. token_rewards [B, T], in the scale of the scores: gae and reinforce++ get them
    where they fall, and the last token what is left of the score, so that a row's rewards still sum to its score.
    bootstrap_values [B]: gae's value of the state after each row (0: the response ended there).
    """
    kl_coef = config.kl_coef if kl_coef is None else kl_coef
    signals = Signals(
        scores=scores.nan_to_num(nan=0.0),
        log_probs=log_probs,
        ref_log_probs=ref_log_probs,
        values=values,
        response_mask=response_mask,
        kl_coef=kl_coef if config.kl_in == "reward" else 0.0,
        token_rewards=token_rewards,
        bootstrap_values=bootstrap_values,
    )
    advantages, returns = ESTIMATORS[config.advantage](signals, config)
    if config.advantage_clip is not None:
        advantages = advantages.clamp(-config.advantage_clip, config.advantage_clip)
    return advantages, returns


def gae_advantages(signals: Signals, config: PPOConfig) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over per-token rewards (Schulman et al. 2016).

    The lambda of the advantages and that of the returns may differ (Yue et al. 2025, VAPO: decoupled GAE):
    see `policy_lambda` and `critic_lambda`.
    """
    gae = partial(_from_token_rewards, signals, config, signals.values, bootstrap_values=signals.bootstrap_values)
    advantages, returns = gae(policy_lambda(signals.response_mask, config))
    if config.length_adaptive_lambda is None and critic_lambda(config) == config.gae_lambda:
        return advantages, returns
    return advantages, gae(critic_lambda(config))[1]


def policy_lambda(response_mask: Tensor, config: PPOConfig) -> float | Tensor:
    """Return the lambda of the advantages: gae_lambda, or with length_adaptive_lambda = alpha one for each row [B],
    1 - 1 / (alpha l) of its l tokens, and not below 0 (Yue et al. 2025, VAPO, length-adaptive GAE: the weights
    lambda^k of a row then sum to about alpha l, as many steps as a share alpha of it)."""
    if config.length_adaptive_lambda is None:
        return config.gae_lambda
    tokens = response_mask.sum(1).clamp(min=1).float()
    return (1.0 - 1.0 / (config.length_adaptive_lambda * tokens)).clamp(min=0.0)


def critic_lambda(config: PPOConfig) -> float:
    """Return the lambda of the returns that the critic learns."""
    return config.gae_lambda if config.critic_gae_lambda is None else config.critic_gae_lambda


def reinforce_plus_plus(signals: Signals, config: PPOConfig) -> tuple[Tensor, Tensor]:
    """Reward-to-go without a critic (Hu 2025): GAE with values 0 and lambda 1."""
    return _from_token_rewards(signals, config, torch.zeros_like(signals.log_probs), 1.0)


def reinforce_plus_plus_baseline(signals: Signals, config: PPOConfig) -> tuple[Tensor, Tensor]:
    """The same from scores less the mean of their group, without its deviation; the whitening is over the whole step
    (Hu 2025, REINFORCE++-baseline)."""
    scorable = signals.response_mask.any(1)
    centred, _ = _centred(signals.scores, scorable, config.samples_per_prompt)
    return reinforce_plus_plus(replace(signals, scores=centred.flatten()), config)


def _from_token_rewards(
    signals: Signals,
    config: PPOConfig,
    values: Tensor,
    gae_lambda: float | Tensor,
    bootstrap_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    scores, early = signals.scores, None
    if signals.token_rewards is not None:
        early = _before_last(signals.token_rewards, signals.response_mask)
        scores = scores - early.sum(1)  # what is left of the score, for the last token
    shaped = shape_and_gae(
        scores,
        signals.log_probs,
        signals.ref_log_probs,
        values,
        signals.response_mask,
        kl_coef=signals.kl_coef,
        gamma=config.gamma,
        gae_lambda=gae_lambda,
        estimator=config.kl_estimator,
        token_rewards=early,
        bootstrap_values=bootstrap_values,
        whiten=bool(config.whiten_advantages),
        group_size=config.samples_per_prompt if config.whiten_advantages == "group" else None,
    )
    return shaped.advantages, shaped.returns


def _before_last(token_rewards: Tensor, response_mask: Tensor) -> Tensor:
    """Keep [B, T] the rewards of every token of the mask but the last of its row."""
    tokens_left = response_mask.flip(1).cumsum(1).flip(1)  # in the row, from here on
    return token_rewards.where(response_mask & (tokens_left > 1), 0.0)


def grpo(signals: Signals, config: PPOConfig) -> tuple[Tensor, Tensor]:
    """(R - group mean) / (group deviation + 1e-4), R the score less the summed KL penalty (Shao et al. 2024)."""
    group = _Group.of(signals, config)
    variance = group.centred.square().sum(1, keepdim=True) / (group.count - 1).clamp(min=1)
    return _same_for_every_token(group.centred / (variance.sqrt() + GRPO_EPS), signals)


def dr_grpo(signals: Signals, config: PPOConfig) -> tuple[Tensor, Tensor]:
    """R - group mean, without the division by the deviation (Liu et al. 2025)."""
    return _same_for_every_token(_Group.of(signals, config).centred, signals)


def rloo(signals: Signals, config: PPOConfig) -> tuple[Tensor, Tensor]:
    """R - mean of the group's others (Ahmadian et al. 2024), which is (R - mean of all) * n / (n - 1)."""
    group = _Group.of(signals, config)
    return _same_for_every_token(group.centred * group.count / (group.count - 1).clamp(min=1), signals)


class _Group(NamedTuple):
    """Rewards of the responses to each prompt less their mean [prompts, n], 0 where unscorable; count [prompts, 1] of
    those that can be scored, which alone count in a statistic."""

    centred: Tensor
    count: Tensor

    @classmethod
    def of(cls, signals: Signals, config: PPOConfig) -> _Group:
        mask = signals.response_mask
        kl = kl_estimate(signals.log_probs, signals.ref_log_probs, config.kl_estimator)
        rewards = signals.scores - signals.kl_coef * kl.where(mask, 0.0).sum(1)
        return cls(*_centred(rewards, mask.any(1), config.samples_per_prompt))


def _centred(rewards: Tensor, scorable: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """From rewards [B] and which of them count [B] bool -> rewards less the mean of their group of `size`
    [prompts, size], 0 where they do not count; how many of each group do [prompts, 1]."""
    groups, scorable = rewards.view(-1, size), scorable.view(-1, size)
    count = scorable.sum(1, keepdim=True)
    mean = groups.where(scorable, 0.0).sum(1, keepdim=True) / count.clamp(min=1)
    return (groups - mean).where(scorable, 0.0), count


def equal_groups(scores: Tensor, size: int) -> Tensor:
    """Which groups [prompts] bool of `size` shaped scores [B] (NaN: unscorable) hold less than two different ones, so
    that a baseline of the group leaves nothing of them (Yu et al. 2025, DAPO, eq. 11: they are sampled again there)."""
    groups = scores.view(-1, size)
    known = groups.isfinite()
    low, high = groups.where(known, math.inf).amin(1), groups.where(known, -math.inf).amax(1)
    largest = groups.where(known, 0.0).abs().amax(1).clamp(min=1.0)
    return (known.sum(1) < 2) | (high - low <= SAME * largest)


def _same_for_every_token(advantages: Tensor, signals: Signals) -> tuple[Tensor, Tensor]:
    """Spread an advantage a response over its tokens; there is no critic, so returns are 0."""
    spread = advantages.flatten()[:, None].expand_as(signals.log_probs).where(signals.response_mask, 0.0)
    return spread, torch.zeros_like(spread)


ESTIMATORS: dict[str, Estimator] = {
    "gae": gae_advantages,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce++": reinforce_plus_plus,
    "reinforce++-baseline": reinforce_plus_plus_baseline,
}


KL_ERROR_CLIP = 0.2  # the error is clipped to +-20%, as in the paper


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
        error = min(max(kl / self.config.kl_controller_target - 1.0, -KL_ERROR_CLIP), KL_ERROR_CLIP)
        self.coef *= 1.0 + error * self.config.rollout_batch_size / self.config.kl_horizon

    def state(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state(self, state: dict[str, float]) -> None:
        self.coef = state["coef"]
