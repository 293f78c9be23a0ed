"""`--dry-run`: read every data row, find every model and reward function, load no weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastrlhf.callables import is_function_reference, load_function
from fastrlhf.config import INPUTS, PPOConfig, StageConfig
from fastrlhf.data import Counts, load_conversations, load_feedback, load_prompts
from fastrlhf.evaluation import Evaluation
from fastrlhf.models import check_source


def check_inputs(stage: str, inputs: Mapping[str, Any], config: StageConfig) -> list[str]:
    """What was found, a line an input. UserError for the first input that a run would refuse."""
    lines = []
    for name, spec in INPUTS[stage].items():
        value = inputs.get(name)
        if value is None:
            continue
        if spec.kind == "data":
            lines.append(f"{name}: {_rows(name, value, config).line()}")
        elif spec.kind == "reward":
            _check_reward(value)
        elif spec.kind == "model":
            check_source(value, name)
    if isinstance(config, PPOConfig):
        Evaluation(config, inputs.get("judge"), prompts="eval_prompts" in inputs)
    return lines


def _rows(name: str, source: Any, config: StageConfig) -> Counts:
    skip = config.skip_bad_rows
    if name == "ptx_data":
        return load_conversations(source, skip_bad_rows=skip)[1]
    if config.stage == "sft":
        return load_conversations(source, format=config.format, skip_bad_rows=skip)[1]
    if config.stage == "reward":
        return load_feedback(source, score_range=config.score_range, skip_bad_rows=skip)[1]
    return load_prompts(source, skip_bad_rows=skip)[1]


def _check_reward(reward: Any) -> None:
    parts = [part[-1] for part in reward if isinstance(part, list)] if isinstance(reward, list) else [reward]
    for part in parts:
        if is_function_reference(part):
            load_function(part)
        else:
            check_source(part, "reward")
