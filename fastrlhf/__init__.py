"""Lean RLHF: human feedback in, aligned model out. The public names below are imported when they are first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fastrlhf._version import __version__

_HOME = {
    "PPOConfig": "config.stages",
    "RewardConfig": "config.stages",
    "SFTConfig": "config.stages",
    "UserError": "config.errors",
    "PPOTrainer": "ppo",
    "RewardTrainer": "reward_model",
    "SFTTrainer": "sft",
    "RolloutEngine": "rollout.engine",
    "SamplingParams": "rollout.sampling",
}
__all__ = [*_HOME, "__version__"]

if TYPE_CHECKING:
    from fastrlhf.config.errors import UserError as UserError
    from fastrlhf.config.stages import PPOConfig as PPOConfig
    from fastrlhf.config.stages import RewardConfig as RewardConfig
    from fastrlhf.config.stages import SFTConfig as SFTConfig
    from fastrlhf.ppo import PPOTrainer as PPOTrainer
    from fastrlhf.reward_model import RewardTrainer as RewardTrainer
    from fastrlhf.rollout.engine import RolloutEngine as RolloutEngine
    from fastrlhf.rollout.sampling import SamplingParams as SamplingParams
    from fastrlhf.sft import SFTTrainer as SFTTrainer


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'fastrlhf' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastrlhf.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
