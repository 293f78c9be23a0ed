"""Conversations and SFT trainers on tiny models."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrlhf import SFTConfig, SFTTrainer
from fastrlhf.data.encode import Example
from tests import tiny

ANSWERS = [
    "the answer is yes",
    "no",
    "谢谢您的提问。",
    "the moon looked at the cat and sat on the mat",
    "yes; no",
    "在北京",
]
SINGLE = [{"prompt": tiny.chat(p), "response": a} for p, a in zip(tiny.PROMPTS, ANSWERS, strict=True)]
MULTI = {
    "messages": [
        {"role": "system", "content": "please"},
        *tiny.chat("thank you"),
        {"role": "assistant", "content": "the weather"},
        *tiny.chat("北京?"),
        {"role": "assistant", "content": "no, the answer"},
    ]
}
DATA = [*SINGLE, MULTI, {"prompt": "the cat sat", "response": " on the mat"}]
MODELS = pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])


def config(**fields: object) -> SFTConfig:
    base = {"total_steps": 1, "mini_batch_size": len(DATA), "max_tokens": 64, "learning_rate": 1e-3, "eval_every": 0}
    return SFTConfig(**{**base, "lr_schedule": "constant", **fields})


def trainer(cfg: SFTConfig | None = None, *, model: object = None, data: object = DATA, **inputs: object) -> SFTTrainer:
    inputs = {"tokenizer": tiny.tokenizer(), **inputs}
    return SFTTrainer(cfg or config(), model=model or tiny.llama(), data=data, **inputs)


def weights(model: PreTrainedModel) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """|a - b| / |b| over all tensors."""
    off = sum(float((x - y).double().square().sum()) for x, y in zip(a, b, strict=True))
    return math.sqrt(off / sum(float(y.double().square().sum()) for y in b))


def stock(model: PreTrainedModel, examples: list[Example]) -> Tensor:
    """The loss transformers computes itself from padded rows and labels."""
    width = max(len(e.ids) for e in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, e in enumerate(examples):
        size = len(e.ids)
        ids[row, :size], mask[row, :size] = torch.tensor(e.ids), 1
        labels[row, :size] = torch.tensor([i if wanted else -100 for i, wanted in zip(e.ids, e.target, strict=True)])
    return model(input_ids=ids, attention_mask=mask, labels=labels).loss


def settled(after: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Weights whose gradient is more than rounding: the first step of Adam goes by its sign, even where it should be 0
    (the key bias of GPT-2, to which a softmax is blind)."""
    return [weight[grad.abs() > 1e-6] for weight, grad in zip(after, grads, strict=True)]


def one_step(cfg: SFTConfig, model: PreTrainedModel, data: object = DATA) -> tuple[float, list[Tensor], list[Tensor]]:
    """(loss, gradients before clipping, weights afterwards) of one optimizer step."""
    t = trainer(cfg.replace(max_grad_norm=1e9), model=model, data=data)
    grads: list[Tensor] = []
    t.optimizer.inner.register_step_pre_hook(lambda *_: grads.extend(p.grad.clone() for p in t.optimizer.params))
    return t.train()["loss/train"], grads, weights(model)


def targets(t: SFTTrainer, example: Example) -> str:
    return t.tokenizer.decode([i for i, wanted in zip(example.ids, example.target, strict=True) if wanted])


def log(folder: Path) -> str:
    return (folder / "log.txt").read_text(encoding="utf-8")
