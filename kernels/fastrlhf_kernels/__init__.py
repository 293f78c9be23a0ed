"""RLHF kernels on plain tensors: log-probs without logits, PPO losses, advantages, sampling."""

from .any_loss import LinearLoss, linear_loss
from .attention import decode_attention
from .functional import (
    PPOLoss,
    ShapedAdvantages,
    entropy_from_logits,
    gae,
    kl_estimate,
    linear_log_probs,
    linear_ppo_loss,
    masked_whiten,
    ppo_policy_loss,
    ppo_value_loss,
    selective_log_softmax,
    shape_and_gae,
    shape_rewards,
    token_log_probs,
    token_ppo_loss,
)
from .sampling import SampledTokens, sample_tokens

__all__ = [
    "LinearLoss",
    "PPOLoss",
    "SampledTokens",
    "ShapedAdvantages",
    "decode_attention",
    "entropy_from_logits",
    "gae",
    "kl_estimate",
    "linear_log_probs",
    "linear_loss",
    "linear_ppo_loss",
    "masked_whiten",
    "ppo_policy_loss",
    "ppo_value_loss",
    "sample_tokens",
    "selective_log_softmax",
    "shape_and_gae",
    "shape_rewards",
    "token_log_probs",
    "token_ppo_loss",
]
