"""The metrics table of docs/api.md is held equal to what the stages write."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fastrlhf import PPOConfig, PPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from tests import tiny

PROMPTS = [tiny.chat(p) for p in tiny.PROMPTS]
ONLY_ON_A_GPU = {"mem/peak_gib"}
ONLY_OF_RANKS = {"sft": set(), "reward": set(), "ppo": {"perf/rollout_idle"}}  # tests/rank_runs.py looks for it


def documented() -> dict[str, set[str]]:
    """Stage -> names, from the table under `## Metrics`."""
    text = (Path(__file__).parents[1] / "docs" / "api.md").read_text(encoding="utf-8").partition("## Metrics")[2]
    found: dict[str, set[str]] = {"sft": set(), "reward": set(), "ppo": set()}
    for names, stages in re.findall(r"^\| (`[^|]*) \| ([^|]*) \|", text, re.MULTILINE):
        for stage in found if stages.strip() == "all" else stages.split(", "):
            found[stage.strip()] |= set(re.findall(r"`([^`]+)`", names))
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, set[str]]:
    folder = tmp_path_factory.mktemp("runs")
    replies = [{"prompt": p, "response": "yes"} for p in PROMPTS]
    pairs = [{"prompt": p, "chosen": "yes", "rejected": "no"} for p in PROMPTS]
    scores = [{"prompt": PROMPTS[0], "response": text, "score": score} for text, score in (("a", 1), ("b", 5))]
    common = {"model": tiny.llama(), "tokenizer": tiny.tokenizer()}
    sft = SFTConfig(total_steps=2, mini_batch_size=4, eval_every=1, save_every=1, output_dir=str(folder / "sft"))
    SFTTrainer(sft, data=replies, eval_data=replies, **common).train()
    files = {"eval_every": 1, "save_every": 1, "output_dir": str(folder / "reward")}
    reward = RewardConfig(total_steps=2, mini_batch_size=4, lm_coef=1.0, ensemble=2, **files)
    trainer = RewardTrainer(reward, data=pairs, eval_data=pairs + scores, **common)
    trainer.train()
    trainer.save(folder / "model")
    ppo = PPOConfig(
        total_steps=2,
        rollout_batch_size=4,
        mini_batch_size=4,
        max_new_tokens=6,
        eval_every=1,
        save_every=1,
        target_kl=1e-9,
        learning_rate=1e-2,
        output_dir=str(folder / "ppo"),
        ptx_coef=1.0,
        samples_per_prompt=2,
        importance_mask=(0.5, 5.0),
        critic_warmup_steps=1,
        critic_pretrain_epochs=1,
    )
    PPOTrainer(
        ppo,
        policy=tiny.llama(),
        tokenizer=tiny.tokenizer(),
        prompts=PROMPTS,
        eval_prompts=PROMPTS[:1],
        reward=[
            ("length", 1.0, lambda prompts, responses: [float(len(r)) for r in responses]),
            ("model", 1.0, str(folder / "model")),
        ],
        ptx_data=replies,
        judge=lambda prompts, responses, baselines: [0.5] * len(responses),
    ).train()
    names: dict[str, set[str]] = {}
    for stage in ("sft", "reward", "ppo"):
        lines = [(folder / stage / f"{file}.jsonl").read_text().splitlines() for file in ("metrics", "timings")]
        names[stage] = {name for line in sum(lines, []) for name in json.loads(line)} - {"step", "nonfinite"}
    return names


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_every_metric_is_documented_and_every_documented_one_is_written(written, stage):
    assert written[stage] | ONLY_ON_A_GPU | ONLY_OF_RANKS[stage] == documented()[stage]
