"""Lean RLHF: human feedback in, aligned model out. The public names below are imported when they are first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "PPOConfig": "config",
    "RewardConfig": "config",
    "SFTConfig": "config",
    "UserError": "config",
    "PPOTrainer": "ppo",
    "RewardTrainer": "reward_model",
    "SFTTrainer": "sft",
    "RolloutEngine": "rollout",
    "SamplingParams": "rollout",
}
__all__ = [
    "PPOConfig",
    "PPOTrainer",
    "RewardConfig",
    "RewardTrainer",
    "RolloutEngine",
    "SFTConfig",
    "SFTTrainer",
    "SamplingParams",
    "UserError",
    "__version__",
]

if TYPE_CHECKING:
    from fastrlhf.config import PPOConfig, RewardConfig, SFTConfig, UserError
    from fastrlhf.ppo import PPOTrainer
    from fastrlhf.reward_model import RewardTrainer
    from fastrlhf.rollout import RolloutEngine, SamplingParams
    from fastrlhf.sft import SFTTrainer


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'fastrlhf' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastrlhf.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
