"""`--dry-run`: read every data row, find every model and reward function, say what would run; load no weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastrlhf.config.base import StageConfig
from fastrlhf.config.errors import UserError
from fastrlhf.config.inputs import INPUTS
from fastrlhf.config.stages import PPOConfig, critic_updates, policy_updates, pretraining_updates, updates_per_step
from fastrlhf.data.dataset import Counts, load_conversations, load_feedback, load_prompts
from fastrlhf.data.encode import check_ptx
from fastrlhf.models.adapter_folder import is_adapter
from fastrlhf.models.backbone import same_base
from fastrlhf.models.loading import check_source, is_scalar_model, load_tokenizer
from fastrlhf.rl.evaluation import Evaluation
from fastrlhf.rl.functions import is_function_reference, load_function


def check_inputs(stage: str, inputs: Mapping[str, Any], config: StageConfig) -> list[str]:
    """What was found, a line an input, and of PPO what will run. UserError for the first input a run would refuse."""
    lines = []
    if isinstance(config, PPOConfig):
        check_ptx(config, inputs.get("ptx_data"))
    for name, spec in INPUTS[stage].items():
        value = inputs.get(name)
        if value is None:
            continue
        if spec.kind == "data":
            lines.append(f"{name}: {_rows(name, value, config).line()}")
        elif spec.kind == "reward":
            _check_reward(value)
        elif spec.kind == "model":
            check_source(value, name)
    if not isinstance(config, PPOConfig):
        return lines
    Evaluation(config, inputs.get("judge"), prompts="eval_prompts" in inputs)
    return lines + outline(inputs, config)


def _rows(name: str, source: Any, config: StageConfig) -> Counts:
    skip = config.skip_bad_rows
    if name == "ptx_data":
        return load_conversations(source, skip_bad_rows=skip)[1]
    if config.stage == "sft":
        return load_conversations(source, format=config.format, skip_bad_rows=skip)[1]
    if config.stage == "reward":
        return load_feedback(source, score_range=config.score_range, skip_bad_rows=skip)[1]
    return load_prompts(source, skip_bad_rows=skip)[1]


def _check_reward(reward: Any) -> None:
    parts = [part[-1] for part in reward if isinstance(part, list)] if isinstance(reward, list) else [reward]
    for part in parts:
        if is_function_reference(part):
            load_function(part)
        else:
            check_source(part, "reward")
            if not is_scalar_model(part):
                raise UserError(f"reward: {part!r} is no sequence classifier; train one with `fastrlhf reward`")


def outline(inputs: Mapping[str, Any], config: PPOConfig) -> list[str]:
    """What a PPO run of these inputs will do, a line each: roles, sizes, losses. Reads tokenizers, no weights."""
    has_critic = config.advantage == "gae"
    lines = [
        f"policy: {inputs['policy']}, {_trained(config)}",
        f"reference: {_reference(inputs, config)}",
        f"critic: {_critic(inputs, config) if has_critic else f'none ({config.advantage} does without)'}",
        f"reward: {_reward(inputs['reward'])}{_shares(inputs, config)}",
        *_sizes(config),
        f"advantages: {_advantages(config)}",
        f"KL to the reference: {_kl(config)}",
        f"policy loss: {_policy_loss(config)}",
    ]
    if config.ptx_coef:
        rows = f"{config.mini_batch_size} rows of {_short(inputs['ptx_data'])}"
        lines.append(f"ptx: + {config.ptx_coef:g} * language-model loss of {rows} in each of its optimizer steps")
    if config.ema_decay is not None:
        lines.append(f"average of the policy's weights: decay {config.ema_decay:g} an update; evaluated and saved")
    return [*lines, f"evaluation: {_evaluation(inputs, config)}"]


def _trained(config: PPOConfig) -> str:
    if config.lora is None:
        return "all weights trained"
    held = f", held in {config.quantize}" if config.quantize else ""
    return f"adapters of rank {config.lora['r']} trained on its frozen weights{held}"


def _reference(inputs: Mapping[str, Any], config: PPOConfig) -> str:
    start = "a frozen copy of the policy" if config.lora is None else "the policy's weights without adapters"
    if config.lora is not None and is_adapter(inputs["policy"]):
        start = "the policy's base with the adapter it starts from"
    text = str(inputs.get("ref_policy") or start)
    if config.ref_refresh_every:
        text += f"; after every {config.ref_refresh_every} steps the policy of then takes its place"
    return text


def _critic(inputs: Mapping[str, Any], config: PPOConfig) -> str:
    policy, reward, head = inputs["policy"], inputs["reward"], "with a head that starts at 0"
    if config.critic == "shared_trunk":
        return f"on the policy's trunk, {head}"
    if config.lora is not None:
        shared = " (or the reward model's, where layers and ranks agree)" if same_base(policy, reward) else ""
        return f"an adapter of its own on the policy's weights, {head}{shared}"
    if inputs.get("value_model") is not None:
        return f"a model of its own, initialised from value_model {inputs['value_model']}"
    if not isinstance(reward, str) or is_function_reference(reward):
        return f"a model of its own, initialised from the policy, {head} (the reward is no model)"
    own = load_tokenizer(inputs.get("tokenizer") or policy)
    if load_tokenizer(reward).get_vocab() == own.get_vocab():
        return f"a model of its own, initialised from the reward model {reward}"
    return f"a model of its own, initialised from the policy, {head} (the reward model reads other tokens)"


def _reward(reward: Any) -> str:
    if isinstance(reward, str):
        return f"function {reward}" if is_function_reference(reward) else f"model {reward}"
    return " + ".join(f"{float(weight):g} * {name}" for name, weight, _ in reward)


def _shares(inputs: Mapping[str, Any], config: PPOConfig) -> str:
    shares = config.lora is not None and same_base(inputs["policy"], inputs["reward"])
    return ", an adapter on the policy's base" if shares else ""


def _sizes(config: PPOConfig) -> list[str]:
    batch, per_prompt, per_step = config.rollout_batch_size, config.samples_per_prompt, updates_per_step(config)
    sampled = (
        f"{batch} responses ({batch // per_prompt} prompts x {per_prompt}) of up to {config.max_new_tokens} tokens"
    )
    cut = f"{per_step // config.ppo_epochs} mini-batches of {config.mini_batch_size}"
    total = f"{config.total_steps} steps, {config.total_steps * batch} responses"
    total += f", {policy_updates(config)} optimizer steps of the policy"
    if config.advantage == "gae":
        total += f", {critic_updates(config)} of the critic"
    lines = [
        f"a step: {sampled}, then {config.ppo_epochs} x {cut} = {per_step} optimizer steps",
        f"in all: {total}",
    ]
    if config.critic_warmup_steps:
        text = f"critic warm-up: the first {config.critic_warmup_steps} steps, the policy is frozen"
        if config.critic_pretrain_epochs:
            rows = config.critic_warmup_steps * batch
            text += f"; then {config.critic_pretrain_epochs} passes over their {rows} responses"
            text += f", {pretraining_updates(config)} optimizer steps"
        lines.append(text)
    return lines


def _advantages(config: PPOConfig) -> str:
    text = config.advantage
    if config.advantage == "gae":
        text += f", gamma {config.gamma:g}, lambda {config.gae_lambda:g}"
    if config.advantage in ("gae", "reinforce++") and config.whiten_advantages:
        over = "each prompt's group" if config.whiten_advantages == "group" else "the step"
        text += f", whitened over {over}"
    if config.reward_scaling != "none":
        text += f", of scores scaled by {config.reward_scaling}"
    if config.reward_clip is not None:
        text += f", scores clipped to +-{config.reward_clip:g}"
    return text


def _kl(config: PPOConfig) -> str:
    if config.kl_coef == 0:
        return "measured, no part of the objective"
    where = "off the reward of each token" if config.kl_in == "reward" else "added to the loss"
    text = f"{config.kl_coef:g} * {config.kl_estimator} {where}"
    if config.kl_controller == "adaptive":
        text += f", adapted towards {config.kl_target:g} nats a response"
    return text


def _policy_loss(config: PPOConfig) -> str:
    high = config.clip_range if config.clip_range_high is None else config.clip_range_high
    text = f"{config.ratio_level} ratio clipped to {1 - config.clip_range:g} .. {1 + high:g}, {config.loss_aggregation}"
    return text + (f", - {config.entropy_coef:g} * entropy" if config.entropy_coef else "")


def _evaluation(inputs: Mapping[str, Any], config: PPOConfig) -> str:
    if not config.eval_every:
        return "none (eval_every = 0)"
    what = inputs.get("eval_prompts")
    return f"every {config.eval_every} steps, " + (
        "samples only (no eval_prompts)" if what is None else f"on {_short(what)}"
    )


def _short(value: Any) -> str:
    return value if isinstance(value, str) else f"{len(value)} rows given"
