"""RLHF kernels on plain tensors: log-probs without logits, PPO losses, advantages, sampling."""

from .advantages import ShapedAdvantages, shape_and_gae
from .attention import decode_attention
from .both_losses import PPOLosses, ppo_losses
from .functional import (
    PPOLoss,
    gae,
    kl_estimate,
    linear_log_probs,
    linear_ppo_loss,
    masked_whiten,
    ppo_policy_loss,
    ppo_value_loss,
    shape_rewards,
    token_log_probs,
    token_ppo_loss,
)
from .sampling import SampledTokens, linear_sample_tokens, sample_tokens

__all__ = [
    "PPOLoss",
    "PPOLosses",
    "SampledTokens",
    "ShapedAdvantages",
    "decode_attention",
    "gae",
    "kl_estimate",
    "linear_log_probs",
    "linear_ppo_loss",
    "linear_sample_tokens",
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
