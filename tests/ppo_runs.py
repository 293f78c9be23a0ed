"""Tiny PPO runs for the tests of its options: one trainer, an interrupted twin, and what they must have in common."""

from __future__ import annotations

from pathlib import Path

import torch

from fastrlhf import PPOConfig, PPOTrainer
from tests import tiny

PROMPTS = [tiny.chat(p) for p in tiny.PROMPTS]
TEXTS = [{"text": text} for text in tiny.TEXTS]
PTX = [*TEXTS, {"prompt": "the cat", "response": " sat on the mat"},
       {"messages": [*tiny.chat("thank you"), {"role": "assistant", "content": "yes; no"}]}]  # fmt: skip
INPUTS = ("ref_policy", "value_model", "reward", "ptx_data", "eval_prompts", "prompts")


def reward(prompts: list[str], responses: list[str]) -> list[float]:
    return [r.count("e") - 0.1 * len(r) for r in responses]


def trainer(*, policy=None, **fields: object) -> PPOTrainer:
    """Fields of the config and inputs of the trainer, mixed; small and fast where nothing is said."""
    base = {"total_steps": 2, "rollout_batch_size": 8, "mini_batch_size": 4, "max_new_tokens": 10, "eval_every": 0,
            "learning_rate": 1e-2, "critic_learning_rate": 1e-2, "ppo_epochs": 1}  # fmt: skip
    inputs = {name: fields.pop(name) for name in INPUTS if name in fields}
    inputs = {"reward": reward, "prompts": PROMPTS, **inputs}
    cfg = PPOConfig(**{**base, **fields})
    return PPOTrainer(cfg, policy=policy or tiny.llama(), tokenizer=tiny.tokenizer(), **inputs)


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file of the newest checkpoint that holds numbers, and the metrics."""
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    found = {str(p.relative_to(newest)): p.read_bytes() for p in newest.rglob("*.safetensors")}
    return {**found, "metrics": (folder / "metrics.jsonl").read_bytes()}


def resumed_equals_whole(folder: Path, leave_after: int, **fields: object) -> dict[str, bytes]:
    """Run through, and again with a new trainer after `leave_after` steps; every byte of the end must agree."""
    fields = {"save_every": 1, **fields}
    trainer(**fields, output_dir=str(folder / "whole")).train()
    steps = iter(trainer(**fields, output_dir=str(folder / "parts")))
    for _ in range(leave_after):
        next(steps)
    steps.close()
    torch.manual_seed(99)
    again = trainer(**fields, output_dir=str(folder / "parts"), resume=True)
    assert again.steps_done == leave_after
    again.train()
    whole, parts = bytes_of(folder / "whole"), bytes_of(folder / "parts")
    assert whole.keys() == parts.keys() and [name for name in whole if whole[name] != parts[name]] == []
    return whole


def copies(parameters) -> list[torch.Tensor]:
    return [p.detach().clone() for p in parameters]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
