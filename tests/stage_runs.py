"""Short runs of every stage on tiny models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrlhf import PPOConfig, PPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from fastrlhf.checkpoint.state import optimizer_tensors
from tests import tiny
from tests.runs import PROMPTS, letters

PAIRS = [{"prompt": p, "chosen": "the answer is yes", "rejected": "no"} for p in PROMPTS]
COMMON = {"total_steps": 4, "mini_batch_size": 4, "learning_rate": 1e-3, "save_every": 2, "eval_every": 2}
Trainer = SFTTrainer | RewardTrainer | PPOTrainer


STAGES = {"sft": (SFTConfig, SFTTrainer), "reward": (RewardConfig, RewardTrainer), "ppo": (PPOConfig, PPOTrainer)}


def inputs_of(stage: str) -> dict[str, Any]:
    """What a trainer of the stage reads: a tiny model, rows, rows that are held out."""
    if stage == "ppo":
        models = {"policy": tiny.llama(), "reward": letters}
        return {**models, "tokenizer": tiny.tokenizer(), "prompts": PROMPTS, "eval_prompts": PROMPTS[:2]}
    rows = PAIRS if stage == "reward" else [{"prompt": r["prompt"], "response": r["chosen"]} for r in PAIRS]
    return {"model": tiny.llama(), "tokenizer": tiny.tokenizer(), "data": rows, "eval_data": rows[:2]}


def build(
    stage: str, *, kind: type[Trainer] | None = None, inputs: dict[str, Any] | None = None, **fields: object
) -> Trainer:
    """A trainer of a tiny model; the numbers depend on the stage and the fields alone. kind: a subclass to build;
    inputs: others than usual."""
    config, trainer = STAGES[stage]
    if stage == "ppo":
        fields = {"rollout_batch_size": 4, "max_new_tokens": 6, "critic_learning_rate": 1e-3, **fields}
    common = COMMON if fields.get("output_dir") else {**COMMON, "save_every": 0}
    return (kind or trainer)(config(**{**common, **fields}), **inputs_of(stage) | (inputs or {}))


def everything(t: Trainer) -> dict[str, Tensor]:
    """Weights, optimizer state and fp32 masters of all that is trained."""
    found: dict[str, Tensor] = {}
    for name, (model, optimizer, *_) in t.trained().items():
        found |= {f"{name}.{key}": value for key, value in model.state_dict().items()}
        found |= optimizer_tensors(optimizer.inner, f"{name}.optimizer")[0]
        found |= {f"{name}.{key}": value for key, value in optimizer.master_tensors().items()}
    return found


def unequal(x: dict[str, Tensor], y: dict[str, Tensor]) -> list[str]:
    assert x.keys() == y.keys()
    return [name for name in x if not torch.equal(x[name], y[name])]


def differing(a: Trainer, b: Trainer) -> list[str]:
    return unequal(everything(a), everything(b))
