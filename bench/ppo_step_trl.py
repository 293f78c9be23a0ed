"""TRL 1.12's side of `bench.ppo_step`: its PPOTrainer as released, timed from outside.

It runs in the environment `bench/.venvs/trl-1.12.0`. Where its defaults differ from what both sides do: temperature 1
(0.7), no sample generations (10), no bf16 and use_cpu on a CPU, the epochs, and no report to other tools. Replies have
one length on both sides: its default is no stop token, and the padding id is beyond what the model can draw, so no
reply seems cut. Its last line of output is JSON.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile

import torch
import trl
from datasets import Dataset
from transformers import TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from bench.models import classifier_of, policy_of, prompts_of, tokenizer_of
from bench.ppo_step_clock import Clock, report


class Watch(TrainerCallback):
    """Times of the phases: generation, the passes before the update, the update, gc.collect (wherever it is)."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.collected = clock, 0.0
        self.generated: tuple[float, float] | None = None  # the time, `collected` at that time
        self.updating: tuple[float, float] | None = None
        self.trainer: PPOTrainer | None = None

    def install(self, trainer: PPOTrainer) -> None:
        self.trainer = trainer
        generation, forward, collect = ppo_trainer.batch_generation, ppo_trainer.forward, gc.collect

        def timed_generation(*args, **kwargs):
            with self.clock.phase("rollout"):
                made = generation(*args, **kwargs)
            self.generated = (self.clock.now(), self.collected)
            return made

        def marked_forward(model, *args, **kwargs):
            if self.updating is None and model is trainer.model:  # the policy with its value model: the update's first
                self.updating = (self.clock.now(), self.collected)
            return forward(model, *args, **kwargs)

        def timed_collect(*args):
            start = self.clock.now()
            count = collect(*args)
            self.collected += self.clock.now() - start
            self.clock.add("gc", self.clock.now() - start)
            return count

        ppo_trainer.batch_generation, ppo_trainer.forward, gc.collect = timed_generation, marked_forward, timed_collect

    def on_train_begin(self, *args, **kwargs) -> None:
        self.clock.start()

    def on_step_end(self, *args, **kwargs) -> None:
        now, (began, before) = self.clock.now(), self.updating
        self.clock.add("experience", began - self.generated[0] - (before - self.generated[1]))
        self.clock.add("update", now - began - (self.collected - before))
        self.updating = None
        self.clock.step()


def trainer_of(spec: dict, folder: str, watch: Watch) -> PPOTrainer:
    device, cuda = torch.device(spec["device"]), spec["device"] != "cpu"
    policy = policy_of(spec["model"], device, torch.float32)
    vocabulary, batch = policy.config.vocab_size, spec["batch"]
    tokenizer = tokenizer_of(vocabulary)
    texts = prompts_of(vocabulary, batch * (1 + spec["steps"]), spec["prompt"])
    micro = min(batch, spec["peer_micro"])
    config = PPOConfig(
        output_dir=folder, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=not cuda, bf16=cuda,
        per_device_train_batch_size=micro, gradient_accumulation_steps=batch // micro, num_mini_batches=1,
        num_ppo_epochs=spec["epochs"], total_episodes=batch * (1 + spec["steps"]), response_length=spec["new"],
        temperature=1.0, num_sample_generations=0, seed=0,
    )  # fmt: skip
    return PPOTrainer(
        config, processing_class=tokenizer, model=policy, ref_model=None, reward_model=classifier_of(policy, 1),
        train_dataset=Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"] for text in texts]}),
        value_model=classifier_of(policy, 2),
        eval_dataset=Dataset.from_dict({"input_ids": [tokenizer(texts[0])["input_ids"]]}),
        callbacks=[watch],
    )  # fmt: skip


def main(spec: dict) -> None:
    watch = Watch(Clock(torch.device(spec["device"])))
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(spec, folder, watch)
        watch.install(trainer)
        trainer.train()
    report(watch.clock, what={"trl": trl.__version__, "metrics": trainer.state.log_history[-1]})


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
