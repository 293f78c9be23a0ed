"""RLHF kernels on plain tensors: log-probs without logits, PPO losses, advantages, sampling."""

from .attention import decode_attention
from .functional import (
    PPOLoss,
    ShapedAdvantages,
    gae,
    kl_estimate,
    linear_log_probs,
    linear_ppo_loss,
    masked_whiten,
    ppo_policy_loss,
    ppo_value_loss,
    shape_and_gae,
    shape_rewards,
    token_log_probs,
    token_ppo_loss,
)
from .sampling import SampledTokens, sample_tokens

__all__ = [
    "PPOLoss",
    "SampledTokens",
    "ShapedAdvantages",
    "decode_attention",
    "gae",
    "kl_estimate",
    "linear_log_probs",
    "linear_ppo_loss",
    "masked_whiten",
    "ppo_policy_loss",
    "ppo_value_loss",
    "sample_tokens",
    "shape_and_gae",
    "shape_rewards",
    "token_log_probs",
    "token_ppo_loss",
]
