"""Short LoRA runs of every stage on tiny models, and what they hold in memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastrlhf import PPOConfig, PPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from fastrlhf.models.lora import Adapters
from tests import tiny
from tests.runs import letters

ANSWERS = ["the answer is yes", "no", "谢谢您的提问。", "the moon looked at the cat", "yes; no", "在北京"]
ROWS = [{"prompt": tiny.chat(p), "response": a} for p, a in zip(tiny.PROMPTS, ANSWERS, strict=True)]
PAIRS = [{"prompt": r["prompt"], "chosen": r["response"], "rejected": "the weather"} for r in ROWS]
COMMON = {"lora": 4, "mini_batch_size": 4, "learning_rate": 1e-2, "eval_every": 0, "total_steps": 2}
IDS = torch.arange(3, 20)[None]


def base(folder: Path, make=tiny.llama, **changes: object) -> str:
    """A model folder on the disk."""
    make(**changes).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def sft(model: str | PreTrainedModel, **fields: object) -> SFTTrainer:
    return SFTTrainer(SFTConfig(**{**COMMON, **fields}), model=model, tokenizer=tiny.tokenizer(), data=ROWS)


def reward_model(model: str | PreTrainedModel, **fields: object) -> RewardTrainer:
    config = RewardConfig(**{**COMMON, "eval_fraction": 0.0, **fields})
    return RewardTrainer(config, model=model, tokenizer=tiny.tokenizer(), data=PAIRS)


def ppo(policy: str | PreTrainedModel, reward: object = letters, **fields: object) -> PPOTrainer:
    base = {"rollout_batch_size": 8, "max_new_tokens": 8, "critic_learning_rate": 1e-2, "ppo_epochs": 1}
    config = PPOConfig(**{**COMMON, **base, **fields})
    prompts = [r["prompt"] for r in ROWS]
    return PPOTrainer(config, policy=policy, tokenizer=tiny.tokenizer(), reward=reward, prompts=prompts)


@torch.no_grad()
def stir(adapters: Adapters, role: str, size: float = 0.1) -> None:
    """Make an adapter do something."""
    draw = torch.Generator().manual_seed(5)
    for p in adapters.parameters(role).values():
        p.add_(torch.randn(p.shape, generator=draw) * size)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def held_bytes(*modules: nn.Module | None) -> int:
    """Bytes of the distinct memories behind parameters and buffers."""
    found = {}
    for module in filter(None, modules):
        for tensor in (*module.parameters(), *module.buffers()):
            memory = tensor.untyped_storage()
            found[memory.data_ptr()] = memory.nbytes()
    return sum(found.values())


def roles_of(t: PPOTrainer) -> list[nn.Module | None]:
    """Every module of every role of a PPO run."""
    scorer = t.scorer
    critic = [] if t.critic is None else [t.critic.trunk, t.critic.head]
    return [t.policy, t.ref_policy, *critic, getattr(scorer, "model", None), getattr(scorer, "head", None)]
