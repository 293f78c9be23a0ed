"""Trainers, rewards and tiny runs of every stage: small, fast, and the same numbers each time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastrlhf import PPOConfig, PPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from fastrlhf.config.base import StageConfig
from fastrlhf.rl.experience import Experience, MiniBatch, make_experience, plan_epochs
from fastrlhf.rl.scorers import Scores
from fastrlhf.rollout.result import Rollout
from fastrlhf.trainer import Trainer
from tests import tiny

PROMPTS = [tiny.chat(p) for p in tiny.PROMPTS]
ANSWERS = ["the answer is yes", "no", "谢谢您的提问。", "the moon looked at the cat", "yes; no", "在北京"]
ROWS = [{"prompt": p, "response": a} for p, a in zip(PROMPTS, ANSWERS, strict=True)]
PAIRS = [{"prompt": row["prompt"], "chosen": row["response"], "rejected": "the weather"} for row in ROWS]
TEXTS = [{"text": text} for text in tiny.TEXTS]
MESSAGES = [*tiny.chat("thank you"), {"role": "assistant", "content": "yes; no"}]
PTX = [*TEXTS, {"prompt": "the cat", "response": " sat on the mat"}, {"messages": MESSAGES}]

COMMON = {"total_steps": 2, "mini_batch_size": 4, "learning_rate": 1e-2, "eval_every": 0}
SUPERVISED = {**COMMON, "max_tokens": 64}
PPO = {**COMMON, "rollout_batch_size": 8, "max_new_tokens": 10, "critic_learning_rate": 1e-2, "ppo_epochs": 1}


def letters(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward that varies: how many letters e, and a little of the length."""
    return [r.count("e") - 0.1 * len(r) for r in responses]


# ------------------------------------------------------------------------------------------------------------ trainers


def ppo_trainer(**fields_and_inputs: Any) -> PPOTrainer:
    """Fields of the config and inputs of the trainer, mixed; tiny and fast where nothing is said."""
    inputs = {"policy": tiny.llama(), "tokenizer": tiny.tokenizer(), "reward": letters, "prompts": PROMPTS}
    return _made(PPOTrainer, PPOConfig, PPO, inputs, fields_and_inputs)


def sft_trainer(**fields_and_inputs: Any) -> SFTTrainer:
    """As `ppo_trainer`, for SFT."""
    inputs = {"model": tiny.llama(), "tokenizer": tiny.tokenizer(), "data": ROWS}
    return _made(SFTTrainer, SFTConfig, SUPERVISED, inputs, fields_and_inputs)


def reward_trainer(**fields_and_inputs: Any) -> RewardTrainer:
    """As `ppo_trainer`, for a reward model; nothing is held out."""
    inputs = {"model": tiny.llama(), "tokenizer": tiny.tokenizer(), "data": PAIRS}
    return _made(RewardTrainer, RewardConfig, {**SUPERVISED, "eval_fraction": 0.0}, inputs, fields_and_inputs)


def _made(
    trainer: type[Trainer], config: type[StageConfig], fields: dict, inputs: dict, given: dict[str, Any]
) -> Trainer:
    fields = fields | {name: value for name, value in given.items() if name in config.model_fields}
    inputs = inputs | {name: value for name, value in given.items() if name not in config.model_fields}
    if fields.get("advantage", "gae") != "gae":  # a shared default of a test may be idle in one of its forms
        fields.pop("critic_learning_rate")
    if "output_dir" not in fields:
        fields.pop("save_every", None)
    return trainer(config(**fields), **inputs)


# -------------------------------------------------------------------------------------------------- a PPO step, by hand


def last_layer(t: PPOTrainer) -> nn.Linear:
    """The layer of the critic's head that starts from zero: all of a linear one, the last of a ValueHead."""
    return getattr(t.critic.head, "out", t.critic.head)


def experience_of(
    t: PPOTrainer, rollout: Rollout, scores: Scores | None = None
) -> tuple[Experience, list[list[MiniBatch]], dict[str, float]]:
    """What `t.step` makes of a rollout before it updates: experience, mini-batches of its epochs, metrics.

    scores None: those of the trainer's own scorer.
    """
    scores = t.scorer(rollout) if scores is None else scores
    epochs = plan_epochs(t.config, len(rollout.rows), t.steps_done)
    experience, metrics = make_experience(
        rollout,
        scores,
        t.roles,
        t.config,
        kl_coef=t.kl_controller.coef,
        moments=t.moments,
        first_epoch=epochs[0],
        memory=t.memory,
    )
    return experience, epochs, metrics


def gradients_of(
    t: PPOTrainer, work: Callable[[], object], parameters: Iterable[nn.Parameter] | None = None
) -> list[Tensor]:
    """Gradients at the first policy update of `work`, in place of it: as the optimizer gets them, so already clipped.

    parameters None: those that the policy's optimizer trains.
    """
    optimizer, kept = t.learner.policy_optimizer, []
    parameters = list(optimizer.params if parameters is None else parameters)

    def keep(*_: object) -> None:
        kept.extend(p.grad.clone() for p in parameters)
        raise InterruptedError

    hook = optimizer.inner.register_step_pre_hook(keep)
    with pytest.raises(InterruptedError):
        work()
    hook.remove()
    t.learner.drop_gradients()
    return kept


# ---------------------------------------------------------------------------------------------------- what runs leave


def leave_after(t: Trainer, steps: int) -> None:
    """Run so many steps, then leave the loop as a user would."""
    for number, _ in enumerate(t, 1):
        if number == steps:
            break


def train_keeping(t: Trainer, steps: int, kept: Path) -> Trainer:
    """Train to the end -> t. `kept` becomes its run folder as it was after so many steps, which is what a kill there
    leaves; tests/test_resume.py kills, and leaves the loop too."""
    for step, _ in enumerate(t, 1):
        if step == steps:
            shutil.copytree(t.config.output_dir, kept)
    return t


def resumed_equals_whole(
    folder: Path, steps: int, *, make: Callable[..., Trainer] = ppo_trainer, **fields: object
) -> dict[str, bytes]:
    """Run through; go on with a new trainer from what was there after `steps` steps; every byte of the end must agree
    -> these."""
    fields = {"save_every": 1, **fields}
    train_keeping(make(**fields, output_dir=str(folder / "whole")), steps, folder / "parts")
    torch.manual_seed(99)
    again = make(**fields, output_dir=str(folder / "parts"), resume=True)
    assert again.steps_done == steps
    again.train()
    whole, parts = bytes_of(folder / "whole"), bytes_of(folder / "parts")
    assert whole.keys() == parts.keys() and [name for name in whole if whole[name] != parts[name]] == []
    return whole


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file of the newest checkpoint that holds numbers, and the metrics."""
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    files = {str(p.relative_to(newest)): p.read_bytes() for p in newest.rglob("*.safetensors")}
    return {**files, "metrics": (folder / "metrics.jsonl").read_bytes()}


def read(path: Path) -> list[dict]:
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def copies(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


def weights(model: nn.Module) -> list[Tensor]:
    return copies(model.parameters())


def same(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    """Equal bit for bit."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def storages(t: PPOTrainer) -> int:
    """Bytes of the distinct memories that hold the parameters of every role of PPO."""
    sizes = {}
    modules = [t.policy, t.ref_policy, t.value_model, None if t.critic is None else t.critic.head]
    for module in filter(None, modules):
        for p in module.parameters():
            memory = p.untyped_storage()
            sizes[memory.data_ptr()] = memory.nbytes()
    return sum(sizes.values())
