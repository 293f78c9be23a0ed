"""RLHF kernels on plain tensors: log-probs without logits, PPO losses, advantages, sampling."""

from .advantages import ShapedAdvantages, shape_and_gae
from .both_losses import PPOLosses, ppo_losses
from .functional import (
    PPOLoss,
    SampledTokens,
    gae,
    kl_estimate,
    linear_log_probs,
    linear_ppo_loss,
    masked_whiten,
    ppo_policy_loss,
    ppo_value_loss,
    sample_tokens,
    shape_rewards,
    token_log_probs,
    token_ppo_loss,
)

__all__ = [
    "PPOLoss",
    "PPOLosses",
    "SampledTokens",
    "ShapedAdvantages",
    "gae",
    "kl_estimate",
    "linear_log_probs",
    "linear_ppo_loss",
    "masked_whiten",
    "ppo_losses",
    "ppo_policy_loss",
    "ppo_value_loss",
    "sample_tokens",
    "shape_and_gae",
    "shape_rewards",
    "token_log_probs",
    "token_ppo_loss",
]
