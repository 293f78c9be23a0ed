"""How many optimizer steps a PPO run makes, where nothing ends it early: what learning-rate schedules fall over."""

from __future__ import annotations

from fastrlhf.config import PPOConfig


def updates_per_step(config: PPOConfig) -> int:
    """ppo_epochs * ceil(rollout_batch_size / mini_batch_size), of the policy and of the critic."""
    return config.ppo_epochs * -(-config.rollout_batch_size // config.mini_batch_size)


def policy_updates(config: PPOConfig) -> int:
    """Of all steps behind the critic's warm-up."""
    return (config.total_steps - config.critic_warmup_steps) * updates_per_step(config)


def pretraining_updates(config: PPOConfig) -> int:
    """Of the critic over the stored rollouts of its warm-up, in all passes."""
    rows = config.critic_warmup_steps * config.rollout_batch_size
    return config.critic_pretrain_epochs * -(-rows // config.mini_batch_size)


def critic_updates(config: PPOConfig) -> int:
    """Of all steps, and of the passes at the end of the warm-up."""
    return config.total_steps * updates_per_step(config) + pretraining_updates(config)
