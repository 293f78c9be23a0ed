"""The models of a PPO run beside its rows, before any weights are loaded: each must read what the policy will write.

The policy reads prompts and samples replies; critic and reference read the same ids, and so does a reward model of the
same vocabulary. A reward model of another one reads texts, through its own chat template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.config.errors import UserError
from fastrlhf.config.stages import PPOConfig
from fastrlhf.data.batches import encode_many
from fastrlhf.data.checks import BadRow
from fastrlhf.data.encode import Encoded, EncodedPrompt, Example, ptx_limit
from fastrlhf.data.templates import replies_steps
from fastrlhf.models.heads import Readout, ValueHead
from fastrlhf.models.loading import check_scalar_form, load_tokenizer, skeleton
from fastrlhf.models.lora import target_layers
from fastrlhf.models.reward_folder import kept_readout
from fastrlhf.preflight.disk import Trained, head_bytes, trained_bytes
from fastrlhf.preflight.fits import check_ids, check_limit, positions_of, vocabulary_of
from fastrlhf.rl.functions import UserFunction
from fastrlhf.rl.scorers import Part, reward_tokenizer
from fastrlhf.rollout.engine import position_limits
from fastrlhf.rollout.parity import unsupported
from fastrlhf.runtime.hardware import resolve_dtype

PROBE_REPLY = "fastrlhf-probe"  # in place of the replies to come


@dataclass(frozen=True)
class RewardModel:
    """name: as errors say it; model None: a GGUF file. tokenizer: of one that reads texts through its own template;
    None: it reads the policy's ids. own_view: an encoder, which reads the reply alone and cuts it itself."""

    name: str
    model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None
    own_view: bool


@dataclass(frozen=True)
class Roles:
    """The models by role, without weights; policy None: a GGUF file, which is looked at when it is loaded."""

    policy: PreTrainedModel | None
    rewards: list[RewardModel]
    others: dict[str, PreTrainedModel | None]  # ref_policy and value_model, where given


def read_roles(
    config: PPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    policy: Any,
    reward: Any,
    ref_policy: Any = None,
    value_model: Any = None,
) -> Roles:
    """Find every model of a run. reward: as `read_reward` has it. UserError for a model that is missing, cannot take
    its role, or does not share the policy's vocabulary."""
    writer = skeleton(policy, "policy")
    if writer is not None:
        _check_supported(writer)
        if config.lora is not None:
            target_layers(writer, config.lora["target_modules"])
    parts = reward if isinstance(reward, list) else [Part("", 1.0, reward)]
    rewards = [_reward_model(p, tokenizer) for p in parts if not isinstance(p.source, UserFunction)]
    others: dict[str, PreTrainedModel | None] = {}
    for role, source in (("ref_policy", ref_policy), ("value_model", value_model)):
        if source is not None:
            others[role] = skeleton(source, role, scalar=role == "value_model")
            _check_shared(role, source, others[role], writer, tokenizer)
    if writer is not None and value_model is None and _makes_critic(config, reward, rewards):
        check_scalar_form(writer)
    return Roles(writer, rewards, others)


def _check_supported(policy: PreTrainedModel) -> None:
    problem = unsupported(policy)
    if problem is not None:
        raise UserError(f"policy: {problem}; use another model")


def _reward_model(part: Part, tokenizer: PreTrainedTokenizerBase) -> RewardModel:
    source = part.source
    model = skeleton(source, "reward", scalar=True)
    name = f"reward model {part.name or source}" if isinstance(source, str) else f"reward model {type(source).__name__}"
    own_view = part.label is not None and not hasattr(model, "score")
    if own_view or not isinstance(source, str):
        return RewardModel(name, model, None, own_view)
    own = reward_tokenizer(source, tokenizer)
    same = own.get_vocab() == tokenizer.get_vocab()
    return RewardModel(name, model, None if same else own, own_view=False)


def _makes_critic(config: PPOConfig, reward: Any, rewards: list[RewardModel]) -> bool:
    """Whether the critic, where no value_model is given, is a classifier made of the policy's trunk."""
    if config.advantage != "gae" or config.critic == "shared_trunk" or config.lora is not None:
        return False
    return isinstance(reward, list) or rewards[0].tokenizer is not None or kept_readout(reward) != Readout()


def _check_shared(
    role: str,
    source: Any,
    model: PreTrainedModel | None,
    policy: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """UserError where a role that reads the policy's ids has another vocabulary."""
    remedy = f"the {role} reads the policy's token ids; use a model with the same tokenizer"
    try:
        own = load_tokenizer(source, needs_eos=False) if isinstance(source, str) else tokenizer
    except UserError:  # a folder without one: its weights must do
        own = tokenizer
    if own.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"{role}: {source!r} has another vocabulary ({len(own)} tokens, here {len(tokenizer)}); {remedy}"
        )
    if model is not None and policy is not None:
        _check_sampled(role, model, policy, tokenizer)


def _check_sampled(
    role: str, model: PreTrainedModel, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """UserError where the policy may write ids that a model has not. Ids above the tokenizer's own are padding of the
    policy's weights, which no reply holds."""
    writes = min(vocabulary_of(policy), max(tokenizer.get_vocab().values()) + 1)
    if vocabulary_of(model) < writes:
        raise UserError(
            f"{role}: it has {vocabulary_of(model)} tokens, and the policy writes ids up to {writes - 1}; use a model "
            "with the same tokenizer"
        )


def readable_prompts(
    config: PPOConfig, roles: Roles, sources: Sequence[Encoded[EncodedPrompt]]
) -> list[Encoded[EncodedPrompt]]:
    """The prompts without those that a reward model's own template refuses: with skip_bad_rows, else they are an error,
    as is a prompt that needs more tokens or positions than such a model has."""
    sources = list(sources)
    for reward in roles.rewards:
        if reward.tokenizer is not None:
            sources = [_read_by(reward, encoded, config) for encoded in sources]
    return sources


def check_readers(
    config: PPOConfig,
    roles: Roles,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[Encoded[EncodedPrompt]],
) -> None:
    """UserError where a model that reads the policy's ids has not the tokens or positions of prompt and reply."""
    longest = max(max(encoded.lengths()) for encoded in sources)
    for reward in roles.rewards:
        if reward.model is None or reward.own_view or reward.tokenizer is not None:
            continue
        _check_length(config, reward.name, positions_of(reward.model), longest)
        if roles.policy is not None:
            _check_sampled(reward.name, reward.model, roles.policy, tokenizer)
    for role, model in roles.others.items():
        if model is not None:
            _check_length(config, role, positions_of(model), longest)


def check_rollout_dtype(config: PPOConfig, policy: Any) -> None:
    """UserError where the policy, a loaded model or the name of one, has the dtype of its rollouts already."""
    if config.rollout_dtype is None:
        return
    own = policy.dtype if isinstance(policy, PreTrainedModel) else resolve_dtype(config.dtype)
    if own == resolve_dtype(config.rollout_dtype):
        raise UserError(
            f"rollout_dtype = {config.rollout_dtype}: the policy is in {config.rollout_dtype} already; use a policy in "
            "fp32 (dtype=fp32), or leave rollout_dtype out"
        )


def check_policy(
    config: PPOConfig,
    sources: Sequence[Encoded[EncodedPrompt]],
    ptx: Sequence[Encoded[Example]],
    policy: PreTrainedModel,
) -> None:
    """UserError where the policy has not the tokens and positions of its prompts and their replies, or of ptx_data."""
    check_ids(policy, max(encoded.highest() for encoded in (*sources, *ptx)), "policy")
    _check_length(config, "policy", position_limits(policy), max(max(encoded.lengths()) for encoded in sources))
    for encoded in ptx:
        field = "max_prompt_tokens + max_new_tokens"
        check_limit(policy, max(encoded.lengths()), field, ptx_limit(config), "policy")


def trained_roles(config: PPOConfig, roles: Roles) -> list[Trained]:
    """What the policy and the critic add to the disk; nothing is known of GGUF files."""
    policy = roles.policy
    if policy is None:
        return []
    trained = [trained_bytes(policy, config, average=config.ema_decay is not None)]
    if config.advantage == "gae" and config.critic == "separate":
        readers = [r.model for r in roles.rewards if r.tokenizer is None and not r.own_view]
        model = roles.others.get("value_model") or next((m for m in readers if m is not None), policy)
        trained.append(trained_bytes(model if config.lora is None else policy, config))
    elif config.advantage == "gae":
        trained.append(head_bytes(ValueHead.size(policy.get_output_embeddings().weight.shape[1]), config))
    return trained


def _check_length(config: PPOConfig, role: str, positions: float | None, longest: int, whose: str = "") -> None:
    needed = longest + config.max_new_tokens
    if positions is None or needed <= positions:
        return
    room = int(positions) - config.max_new_tokens
    remedy = f"set max_prompt_tokens={room} (longer prompts are dropped), or lower " if room > 0 else "lower "
    raise UserError(
        f"max_prompt_tokens = {config.max_prompt_tokens}, max_new_tokens = {config.max_new_tokens}: the longest prompt "
        f"has {longest} tokens{whose}, with its reply up to {needed}, and the {role} has {int(positions)} positions; "
        f"{remedy}max_new_tokens"
    )


def _read_by(reward: RewardModel, encoded: Encoded[EncodedPrompt], config: PPOConfig) -> Encoded[EncodedPrompt]:
    """The rows that a reward model of another vocabulary can read, a reply in place of those to come."""

    def steps(item: EncodedPrompt):  # noqa: ANN202
        return replies_steps(reward.tokenizer, item.prompt.prompt, [PROBE_REPLY])

    kept, longest, highest = [], 0, 0
    for item, result in encode_many(reward.tokenizer, encoded.items, steps):
        if isinstance(result, UserError):
            problem = BadRow(item.prompt.where, f"the own chat template of {reward.name}: {result}")
            encoded.counts.add_bad(problem, skip=config.skip_bad_rows)
            continue
        prompt, [reply] = result
        kept.append(item)
        longest, highest = max(longest, len(prompt)), max(highest, *prompt, *reply)
    if not kept:
        raise UserError(f"{encoded.role}: {reward.name} can read none of the prompts ({encoded.counts.line()})")
    if reward.model is not None:
        check_ids(reward.model, highest, reward.name)
        _check_length(config, reward.name, positions_of(reward.model), longest, " of that model")
    dropped = 1 - (1 - encoded.dropped) * len(kept) / len(encoded.items)
    return replace(encoded, items=kept, dropped=dropped)
