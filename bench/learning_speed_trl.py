"""TRL 1.12's side of `bench.learning_speed`: its PPOTrainer as released, on the task's own settings.

It runs in the environment `bench/.venvs/trl-1.12.0`. Its last line of output is JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import trl
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

from bench.ppo_step_clock import Clock, versions


class Save(TrainerCallback):
    """The policy as it is after some steps, and the seconds until then without what it takes to save."""

    def __init__(self, clock: Clock, spec: dict) -> None:
        self.clock, self.every, self.folder = clock, spec["every"], Path(spec["folder"])
        self.seconds: dict[int, float] = {}
        self.trainer: PPOTrainer | None = None

    def on_train_begin(self, *args, **kwargs) -> None:
        self.clock.start()

    def on_step_end(self, arguments, state, *args, **kwargs) -> None:
        self.clock.step()
        step = len(self.clock.steps)
        if step % self.every == 0:
            self.trainer.model.policy.save_pretrained(self.folder / str(step))
            self.trainer.processing_class.save_pretrained(self.folder / str(step))
            self.seconds[step] = sum(self.clock.steps)
        self.clock.start()


def main(spec: dict) -> None:
    task, models = spec["task"], Path(spec["models"])
    how = {"trust_remote_code": False, "dtype": torch.float32}
    tokenizer = AutoTokenizer.from_pretrained(models / "sft/final", trust_remote_code=False, padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(models / "sft/final", **how)
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(models / "reward/final", **how) for _ in range(2)
    )
    lines = Path(spec["prompts"]).read_text(encoding="utf-8").splitlines()
    asked = [json.loads(line)["prompt"] for line in lines]
    ids = [tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) for messages in asked]
    batch = task["rollout_batch_size"]
    config = PPOConfig(
        output_dir=spec["folder"],
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        num_sample_generations=0,
        seed=spec["seed"],
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        num_mini_batches=batch // task["mini_batch_size"],
        total_episodes=batch * spec["steps"],
        local_rollout_forward_batch_size=batch,
        num_ppo_epochs=task["ppo_epochs"],
        response_length=task["max_new_tokens"],
        temperature=task["temperature"],
        kl_coef=task["kl_coef"],
        gamma=task["gamma"],
        lam=task["gae_lambda"],
        cliprange=task["clip_range"],
        cliprange_value=task["clip_range_value"],
        learning_rate=task["learning_rate"],
        lr_scheduler_type="constant",
        vf_coef=task["vf_coef"],
        stop_token="eos",
        missing_eos_penalty=task["missing_eos_penalty"],
    )
    save = Save(Clock(torch.device(spec["device"])), spec)
    trainer = PPOTrainer(
        config,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": ids}),
        eval_dataset=Dataset.from_dict({"input_ids": ids[:1]}),
        callbacks=[save],
    )
    save.trainer = trainer
    trainer.train()
    about = versions() | {"trl": trl.__version__}
    print(json.dumps({"seconds": save.seconds, "folder": spec["folder"], "versions": about}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
