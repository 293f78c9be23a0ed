"""fastrlhf's side of `bench.learning_speed`: one process, one form of the critic. Its last line of output is JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from bench.ppo_step_clock import Clock, versions
from fastrlhf import PPOConfig, PPOTrainer

FORMS = {"separate": {}, "shared_trunk": {"critic_learning_rate": "auto", "gae_lambda": "auto"}}


def main(spec: dict) -> None:
    models, folder, seconds = Path(spec["models"]), Path(spec["folder"]), {}
    fields = spec["task"] | FORMS[spec["side"]]
    config = PPOConfig(
        critic=spec["side"],
        total_steps=spec["steps"],
        save_every=0,
        eval_every=0,
        dtype="fp32",
        seed=spec["seed"],
        **fields,
    )
    policy, reward = models / "sft/final", models / "reward/final"
    trainer = PPOTrainer(config, policy=str(policy), reward=str(reward), prompts=spec["prompts"])
    clock = Clock(torch.device(spec["device"]))
    clock.start()
    for number, _ in enumerate(trainer, 1):
        clock.step()
        if number % spec["every"] == 0:
            trainer.policy.save_pretrained(folder / str(number))
            trainer.tokenizer.save_pretrained(folder / str(number))
            seconds[number] = sum(clock.steps)
        clock.start()
    print(json.dumps({"seconds": seconds, "folder": str(folder), "versions": versions()}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
