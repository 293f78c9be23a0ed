"""What a recipe does not say of its run: how large it is, and where the roles of PPO come from. Loads no weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastrlhf.config.stages import (
    PPOConfig,
    SupervisedConfig,
    critic_updates,
    policy_updates,
    pretraining_updates,
    updates_per_step,
)
from fastrlhf.models.adapter_folder import is_adapter
from fastrlhf.models.backbone import same_base
from fastrlhf.models.loading import load_tokenizer
from fastrlhf.rl.functions import is_function_reference
from fastrlhf.runtime.console import number


def supervised_steps(config: SupervisedConfig, rows: int) -> int:
    """Optimizer steps of a run on so many rows: total_steps, or epochs * rows / mini_batch_size, rounded up."""
    return config.total_steps or -(-config.epochs * rows // config.mini_batch_size)


def sizes(config: PPOConfig) -> list[str]:
    """How large a step and the run are."""
    batch, steps, updates = config.rollout_batch_size, config.total_steps, updates_per_step(config)
    prompts = f"{batch // config.samples_per_prompt} prompts x {config.samples_per_prompt}"
    cut = f"{config.ppo_epochs} x {updates // config.ppo_epochs} mini-batches of {config.mini_batch_size}"
    total = f"{steps} steps, {steps * batch} responses, {policy_updates(config)} optimizer steps of the policy"
    if config.advantage == "gae":
        total += f", {critic_updates(config)} of the critic"
    lines = [
        f"a step: {batch} responses ({prompts}) of up to {config.max_new_tokens} tokens, then {cut}",
        f"in all: {total}, up to {number(steps * batch * config.max_new_tokens)} new tokens",
    ]
    if config.critic_warmup_steps:
        rows, passes = config.critic_warmup_steps * batch, config.critic_pretrain_epochs
        then = f"then {passes} passes over their {rows} responses, {pretraining_updates(config)} optimizer steps"
        lines.append(f"critic warm-up: {config.critic_warmup_steps} steps with a frozen policy, {then}")
    return lines


def origins(inputs: Mapping[str, Any], config: PPOConfig) -> list[str]:
    """Where reference, critic and reward come from. inputs: as a recipe names them; reward: read where it is a list."""
    return [
        f"reference: {_reference(inputs, config)}",
        f"critic: {_critic(inputs, config)}",
        f"reward: {_reward(inputs, config)}",
    ]


def _reference(inputs: Mapping[str, Any], config: PPOConfig) -> str:
    if inputs.get("ref_policy") is not None:
        return inputs["ref_policy"]
    if config.lora is None:
        return "a frozen copy of the policy"
    start = "with the adapter it starts from" if is_adapter(inputs["policy"]) else "without adapters"
    return f"the policy's base {start}"


def _critic(inputs: Mapping[str, Any], config: PPOConfig) -> str:
    reward, copied = inputs["reward"], "a model of its own, initialised from"
    if config.advantage != "gae":
        return f"none ({config.advantage} does without)"
    if config.critic == "shared_trunk":
        return "a new head on the policy's trunk"
    if config.lora is not None:
        or_copied = " (or the reward model's, where layers and ranks agree)" if _is_on_base(inputs, config) else ""
        return f"a new adapter on the policy's base, with a new head{or_copied}"
    if inputs.get("value_model") is not None:
        return f"{copied} value_model {inputs['value_model']}"
    if not isinstance(reward, str) or is_function_reference(reward):
        return f"{copied} the policy, with a new head (the reward is no model)"
    tokenizer = load_tokenizer(inputs.get("tokenizer") or inputs["policy"])
    if load_tokenizer(reward).get_vocab() != tokenizer.get_vocab():
        return f"{copied} the policy, with a new head (the reward model reads other tokens)"
    return f"{copied} the reward model {reward}"


def _reward(inputs: Mapping[str, Any], config: PPOConfig) -> str:
    reward = inputs["reward"]
    if not isinstance(reward, str):
        return " + ".join(f"{float(weight):g} * {name}" for name, weight, *_ in reward)
    if _is_on_base(inputs, config):
        return f"{reward}, an adapter on the policy's base"
    return f"function {reward}" if is_function_reference(reward) else f"model {reward}"


def _is_on_base(inputs: Mapping[str, Any], config: PPOConfig) -> bool:
    """The reward model is an adapter on the policy's base, so that all roles share one backbone."""
    return config.lora is not None and same_base(inputs["policy"], inputs["reward"])
