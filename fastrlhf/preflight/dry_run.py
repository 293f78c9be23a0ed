"""`--dry-run`: everything that the run does before it loads weights, and what it would say; nothing is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastrlhf.config.base import StageConfig
from fastrlhf.config.stages import PPOConfig
from fastrlhf.preflight.outline import origins
from fastrlhf.preflight.stages import prepare_ppo, prepare_supervised
from fastrlhf.rl.alarms import doubt_of
from fastrlhf.runtime.console import yellow

SAMPLE = 200_000  # rows of a source that are encoded; a run encodes all


def check_inputs(inputs: Mapping[str, Any], config: StageConfig, sample: int = SAMPLE) -> list[str]:
    """The run's own sentences about its rows and sizes, and of PPO where its roles come from. UserError for the first
    thing that a run would refuse."""
    if not isinstance(config, PPOConfig):
        said = prepare_supervised(config, **inputs, sample=sample).said
        return [*said.notes, *map(yellow, said.warnings)]
    ready = prepare_ppo(config, **inputs, sample=sample)
    reward = inputs["reward"] if isinstance(inputs["reward"], str) else ready.reward
    lines = origins({**inputs, "reward": reward}, config)
    doubt = doubt_of(ready.reward_records)
    lines += [yellow(f"alarm: {doubt}")] if doubt else []
    return [*ready.said.notes, *map(yellow, ready.said.warnings), *lines]
