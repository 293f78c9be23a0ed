"""Who takes part in PPO: policy, reference, critic and reward; on models of their own or on one backbone.

critic = separate               policy, reference and critic are three models
critic = shared_trunk           the critic is a small network on the policy's states, which it leaves as they are
lora                            one frozen base: policy (and separate critic) are adapters, reference is the base, or
                                the adapter the run started from; so is a reward model that is an adapter of that base
ref_refresh_every               with lora the reference is an adapter too (extras.py)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.config.errors import UserError
from fastrlhf.config.stages import PPOConfig
from fastrlhf.models.adapter_folder import read_adapter
from fastrlhf.models.backbone import compile_layers, load_backbone, same_base
from fastrlhf.models.heads import Readout, readout_of
from fastrlhf.models.loading import freeze, frozen_copy, load_policy, load_reward_model, scalar_model
from fastrlhf.models.lora import POLICY, REFERENCE, REWARD, VALUE, Adapters
from fastrlhf.models.offload import Offload
from fastrlhf.models.reward_folder import kept_readout
from fastrlhf.parallel.mapped import twin
from fastrlhf.parallel.sharding import hold_together, layer_by_layer, reading, settle, shard, wanted
from fastrlhf.rl.critic import Critic
from fastrlhf.rl.scorers import AdapterScorer, RewardModelScorer, Scorer, make_scorer, reward_tokenizer
from fastrlhf.runtime.memory import MemoryBackoff
from fastrlhf.runtime.regions import is_compiled

Source = str | PreTrainedModel | None


@dataclass
class Roles:
    """ref_policy None: what the policy started from, its own adapter off. critic None: an estimator without values."""

    policy: PreTrainedModel
    ref_policy: PreTrainedModel | None
    critic: Critic | None
    scorer: Scorer
    adapters: Adapters | None
    offload: Offload

    @property
    def value_model(self) -> PreTrainedModel | None:
        """The model that the critic reads; None without a critic."""
        return None if self.critic is None else self.critic.trunk

    def compile_layers(self, wanted: bool | None, report: Callable[[str], None]) -> None:
        """The option `compile` for what trains, in the mode that it trains in, and for the reference, whose distance
        from the policy would else be one of rounding too. UserError as `backbone.compile_layers` has it."""
        models = [self.policy, self.ref_policy]
        if self.critic is not None and self.critic.owns_trunk:
            models.append(self.critic.trunk)
        told: list[str] = []
        for model in filter(None, models):
            with self.offload.here(model):
                compile_layers(model, wanted, told.append)
        for sentence in dict.fromkeys(told):  # often one reason for all of them
            report(sentence)

    @contextmanager
    def reference(self) -> Iterator[PreTrainedModel]:
        """Give the reference policy, on the device; no gradient can be taken inside."""
        if self.ref_policy is not None:
            way = self.offload.here(self.ref_policy)
        else:
            way = self.adapters.using(REFERENCE if REFERENCE in self.adapters.roles else None)
        # Compiled, it is read through the graphs of training, which inference mode has not.
        with way as model, torch.no_grad() if is_compiled(model) else reading(model):
            yield model
            settle(model)


def load_roles(
    config: PPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    policy: str | PreTrainedModel,
    reward: Any,
    ref_policy: Source,
    value_model: Source,
    memory: MemoryBackoff,
    device: torch.device,
    report: Callable[[str], None],
) -> Roles:
    """Load what is named, make the rest. UserError for a model that cannot take its role, before any training.

    report is told in a sentence what an adapter's base holds and what merging into it costs.
    """
    how, to_cut = (config.dtype, config.attention), wanted(config)
    offload = Offload(device)
    on_base = config.lora is not None and same_base(policy, reward)
    scorer = None if on_base else make_scorer(reward, tokenizer, config, memory, offload)
    reference = None if ref_policy is None else freeze(load_policy(ref_policy, *how, to_cut=to_cut))
    names = [POLICY, VALUE] if config.advantage == "gae" and config.critic == "separate" else [POLICY]
    names += [REFERENCE] if config.ref_refresh_every else []  # B = 0: the base, until the first refresh
    trained, adapters = load_backbone(policy, config, names, report)
    if on_base:
        folder = read_adapter(reward, "reward")
        report("reward: an adapter on the policy's base")
        scorer = AdapterScorer(adapters, folder, reward_tokenizer(reward, tokenizer), tokenizer, memory, config)
    if reference is None and adapters is None:
        reference = frozen_copy(trained, to_cut=to_cut)
    critic = _make_critic(config, tokenizer, scorer, trained, value_model, adapters)
    if to_cut:
        if reference is not None:
            shard(reference)
        for model in scorer.models:
            shard(freeze(model))
        if critic is not None and critic.owns_trunk:
            shard(critic.trunk.requires_grad_(True))
        shard(trained if adapters is not None else trained.requires_grad_(True))
        hold_together(trained, reference, None if critic is None else critic.trunk, *scorer.models)
        for what, models in (("generation", [trained]), ("scoring", scorer.read)):
            if layer_by_layer(*models):
                report(f"parallel = fsdp: {what} gathers weights a layer at a time: whole they would not fit")
    if config.offload:
        for model in filter(None, (reference, *scorer.models)):
            offload.park(model)
    return Roles(trained, reference, critic, scorer, adapters, offload)


def check_value_model(config: PPOConfig, value_model: Source) -> None:
    """Its weights need a trunk of their own, and its head reads the state of each token."""
    if value_model is None:
        return
    if kept_readout(value_model) != Readout():
        raise UserError(
            f"value_model: the head of {value_model!r} reads {kept_readout(value_model)}, where a critic reads each "
            "token's last state; leave value_model out"
        )
    if config.advantage != "gae":
        raise UserError(f"value_model: advantage = {config.advantage} has no critic; leave value_model out")
    if config.critic == "shared_trunk" or config.lora is not None:
        which = "critic = shared_trunk" if config.critic == "shared_trunk" else "lora"
        raise UserError(f"value_model: with {which} the critic reads the policy's base; leave value_model out")


def _make_critic(
    config: PPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    scorer: Scorer,
    policy: PreTrainedModel,
    value_model: Source,
    adapters: Adapters | None,
) -> Critic | None:
    """A model of its own is the one given, else a copy of a reward model that reads the same tokens and the states that
    a critic does, else the policy's trunk with a zero head. An adapter starts from the reward model's where that is one
    of the same layers and ranks."""
    to_cut = wanted(config)
    if config.advantage != "gae":
        return None
    if config.critic == "shared_trunk":
        return Critic.shared_trunk(policy, config.seed)
    reads_our_tokens = isinstance(scorer, RewardModelScorer) and scorer.same_tokenizer
    if adapters is not None:
        shared = isinstance(scorer, AdapterScorer) and reads_our_tokens
        started = shared and adapters.start_from(VALUE, REWARD)
        return Critic.adapter(adapters, scorer.head if started else None)
    if value_model is not None:
        model = load_reward_model(value_model, config.dtype, config.attention, role="value_model", to_cut=to_cut)
    elif reads_our_tokens and readout_of(scorer.model) == Readout():
        model = frozen_copy(scorer.model, to_cut=to_cut)
    else:
        model = scalar_model(twin(policy) if to_cut else policy, tokenizer, seed=None, share=to_cut)
    return Critic.separate(model)
