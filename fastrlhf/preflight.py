"""`--dry-run`: read every data row, find every model and reward function, say how large the run is; load no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastrlhf.config.base import StageConfig
from fastrlhf.config.inputs import INPUTS
from fastrlhf.config.stages import PPOConfig, critic_updates, policy_updates, pretraining_updates, updates_per_step
from fastrlhf.data.dataset import Counts, load_conversations, load_feedback, load_prompts, reading
from fastrlhf.data.encode import check_ptx
from fastrlhf.models.adapter_folder import is_adapter
from fastrlhf.models.backbone import same_base
from fastrlhf.models.loading import check_source, load_tokenizer
from fastrlhf.rl.alarms import doubt_of
from fastrlhf.rl.evaluation import Evaluation
from fastrlhf.rl.functions import is_function_reference
from fastrlhf.rl.scorers import held_out_records, read_reward


def check_inputs(stage: str, inputs: Mapping[str, Any], config: StageConfig) -> list[str]:
    """Rows read and dropped of each input, and of PPO the outline. UserError for the first input a run would refuse."""
    lines, columns = [], {}
    for name, spec in INPUTS[stage].items():
        value = inputs.get(name)
        if value is None:
            continue
        if spec.kind == "data":
            rows, counts = _rows(name, value, config)
            lines.append(f"{name}: {counts.line()}")
            if name in ("prompts", "eval_prompts"):
                columns[name] = {column for prompt in rows for column in prompt.columns}
        elif spec.kind == "model":
            check_source(value, name)
    if isinstance(config, PPOConfig):
        check_ptx(config, inputs.get("ptx_data"))
        judge = Evaluation(config, inputs.get("judge"), prompts="eval_prompts" in inputs).judge
        if judge is not None:
            judge.bind(columns["eval_prompts"], "eval_prompts")
        reward = read_reward(inputs["reward"], config, columns)
        inputs = {**inputs, "reward": inputs["reward"] if isinstance(inputs["reward"], str) else reward}
        lines += outline(inputs, config)
        doubt = doubt_of(held_out_records(reward))
        lines += [f"alarm: {doubt}"] if doubt else []
    return lines


def _rows(name: str, source: Any, config: StageConfig) -> tuple[Sequence[Any], Counts]:
    how = reading(config, name)
    if name == "ptx_data":
        return load_conversations(source, **how)
    if config.stage == "sft":
        return load_conversations(source, format=config.format, **how)
    if config.stage == "reward":
        return load_feedback(source, score_range=config.score_range, **how)
    return load_prompts(source, **how)


def outline(inputs: Mapping[str, Any], config: PPOConfig) -> list[str]:
    """What the recipe does not say of a PPO run: where its roles come from, and its sizes. Loads no weights."""
    batch, steps, updates = config.rollout_batch_size, config.total_steps, updates_per_step(config)
    prompts = f"{batch // config.samples_per_prompt} prompts x {config.samples_per_prompt}"
    cut = f"{config.ppo_epochs} x {updates // config.ppo_epochs} mini-batches of {config.mini_batch_size}"
    total = f"{steps} steps, {steps * batch} responses, {policy_updates(config)} optimizer steps of the policy"
    if config.advantage == "gae":
        total += f", {critic_updates(config)} of the critic"
    lines = [
        f"reference: {_reference(inputs, config)}",
        f"critic: {_critic(inputs, config)}",
        f"reward: {_reward(inputs, config)}",
        f"a step: {batch} responses ({prompts}) of up to {config.max_new_tokens} tokens, then {cut}",
        f"in all: {total}",
    ]
    if config.critic_warmup_steps:
        rows, passes = config.critic_warmup_steps * batch, config.critic_pretrain_epochs
        then = f"then {passes} passes over their {rows} responses, {pretraining_updates(config)} optimizer steps"
        lines.append(f"critic warm-up: {config.critic_warmup_steps} steps with a frozen policy, {then}")
    return lines


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
