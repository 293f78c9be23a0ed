"""Feedback of every kind and reward trainers on tiny models."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
)

from fastrlhf import RewardConfig, RewardTrainer
from fastrlhf.models.heads import sequence_scores
from tests import tiny

REAL = Path(__file__).parents[2] / "shared" / "data"
CAT, MOON, WEATHER = (tiny.chat(p) for p in tiny.PROMPTS[:3])
PAIR = {"prompt": CAT, "chosen": "the answer is yes", "rejected": "no"}
MARGIN = {"prompt": "the cat", "chosen": " sat on the mat", "rejected": " looked at the moon", "margin": 0.7}
RANKING = {"prompt": MOON, "responses": ["no", "the moon", "谢谢您", "yes; no"], "ranking": [2, [0, 3], 1]}
SCORE = {"prompt": WEATHER, "response": "天气很好", "score": 4}
SCORES = {"prompt": MOON, "responses": ["no", "the weather is yes", "天气"], "scores": [1, 5, 3]}
EDIT = {"prompt": CAT, "response": "no", "edited": "no, thank you"}
MIXED = [PAIR, MARGIN, RANKING, SCORE, SCORES, EDIT]
MODELS = pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])


def config(**fields: object) -> RewardConfig:
    base = {"total_steps": 1, "mini_batch_size": len(MIXED), "max_tokens": 64, "learning_rate": 1e-3, "eval_every": 0}
    return RewardConfig(**{**base, "lr_schedule": "constant", "eval_fraction": 0.0, **fields})


def trainer(
    cfg: RewardConfig | None = None, *, model: object = None, data: object = MIXED, **inputs: object
) -> RewardTrainer:
    inputs = {"tokenizer": tiny.tokenizer(), **inputs}
    return RewardTrainer(cfg or config(), model=model or tiny.llama(), data=data, **inputs)


def weights(model: PreTrainedModel) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    off = sum(float((x - y).double().square().sum()) for x, y in zip(a, b, strict=True))
    return math.sqrt(off / sum(float(y.double().square().sum()) for y in b))


def one_step(cfg: RewardConfig, model: PreTrainedModel, data: object = MIXED) -> tuple[float, list[Tensor]]:
    """(loss, gradients before clipping) of one optimizer step."""
    t = trainer(cfg.replace(max_grad_norm=1e9), model=model, data=data)
    grads: list[Tensor] = []
    t.optimizer.inner.register_step_pre_hook(lambda *_: grads.extend(p.grad.clone() for p in t.optimizer.params))
    return t.train()["loss/train"], grads


def scores_of(t: RewardTrainer, rows: list[list[int]]) -> list[float]:
    with torch.no_grad():
        return [float(sequence_scores(t.model, [row])) for row in rows]


def events(run: Path, kind: str) -> list[dict]:
    found = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [e for e in found if e["kind"] == kind]
