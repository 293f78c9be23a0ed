"""fastrlhf's side of `bench.ppo_step`: one process, one form, a few PPO steps. Its last line of output is JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch

from bench.models import classifier_of, policy_of, prompts_of, tokenizer_of
from bench.ppo_step_clock import Clock, report
from fastrlhf import PPOConfig, PPOTrainer, RolloutEngine, SamplingParams
from fastrlhf.rollout.sampling import Generation

FORMS = {  # fields of PPOConfig, the dtype of every model
    "separate": ({"critic": "separate"}, torch.float32),
    "separate_rollout": ({"critic": "separate", "old_log_probs": "rollout"}, torch.float32),
    "shared_trunk": ({"critic": "shared_trunk", "old_log_probs": "rollout"}, torch.float32),
    "shared_trunk_bf16": ({"critic": "shared_trunk", "old_log_probs": "rollout"}, torch.bfloat16),
    "shared_trunk_lora": ({"critic": "shared_trunk", "old_log_probs": "rollout", "lora": 16}, torch.float32),
}
PHASES = {"rollout": "rollout", "score": "experience", "advantages": "experience", "update": "update"}


class WholeReplies(RolloutEngine):
    """Every reply has all its tokens."""

    def generate(self, prompt_ids: list[list[int]], params: SamplingParams, **where: Any) -> Generation:
        return super().generate(prompt_ids, replace(params, stop_token_ids=[]), **where)


def trainer_of(spec: dict) -> PPOTrainer:
    device = torch.device(spec["device"])
    fields, dtype = FORMS[spec["side"]]
    dtype = torch.bfloat16 if device.type == "cuda" else dtype  # the masters are fp32
    policy = policy_of(spec["model"], device, dtype)
    vocabulary = policy.config.vocab_size
    batch = spec["batch"]
    config = PPOConfig(
        total_steps=1 + spec["steps"], rollout_batch_size=batch, mini_batch_size=batch, ppo_epochs=spec["epochs"],
        max_prompt_tokens=spec["prompt"], max_new_tokens=spec["new"], learning_rate=3e-6, critic_learning_rate=3e-6,
        vf_coef=0.1, save_every=0, eval_every=0, **fields,
    )  # fmt: skip
    trainer = PPOTrainer(
        config, policy=policy, tokenizer=tokenizer_of(vocabulary), reward=classifier_of(policy, 1),
        prompts=prompts_of(vocabulary, batch * (1 + spec["steps"]), spec["prompt"]),
        value_model=classifier_of(policy, 2) if fields["critic"] == "separate" else None,
    )  # fmt: skip
    trainer.engine = WholeReplies(trainer.policy, trainer.tokenizer, value_head=trainer.engine.value_head)
    return trainer


def timed_phases(
    real: Callable[[str], AbstractContextManager[None]], clock: Clock
) -> Callable[[str], AbstractContextManager[None]]:
    @contextmanager
    def phase(name: str) -> Iterator[None]:
        with real(name), clock.phase(PHASES[name]):
            yield

    return phase


def main(spec: dict) -> None:
    clock = Clock(torch.device(spec["device"]))
    trainer = trainer_of(spec)
    trainer.tracker.phase = timed_phases(trainer.tracker.phase, clock)
    clock.start()
    for step in trainer:
        clock.step()
        assert {len(reply) for reply in step.rollout.response_ids} == {spec["new"]}
    report(clock, what={"reward": type(trainer.scorer.model).__name__, "metrics": step.metrics})


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
