"""Who takes part in PPO: the policy, the reference, the critic; on models of their own or on one backbone.

critic = separate               policy, reference and critic are three models
critic = shared_trunk           the critic is a head on the policy's trunk
lora                            one frozen base: policy (and separate critic) are adapters, reference is the base, or
                                the adapter the run started from; so is a reward model that is an adapter of that base
ref_refresh_every               with lora the reference is an adapter too (reference.py)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.config.errors import UserError
from fastrlhf.config.stages import PPOConfig
from fastrlhf.models import loading
from fastrlhf.models.adapter_folder import read_adapter
from fastrlhf.models.backbone import load_backbone
from fastrlhf.models.lora import POLICY, REFERENCE, REWARD, VALUE, Adapters
from fastrlhf.models.offload import Offload
from fastrlhf.rl.critic import Critic
from fastrlhf.rl.scorers import FunctionScorer, RewardModelScorer

Source = str | PreTrainedModel | None


@dataclass
class Roles:
    """ref_policy None: what the policy started from, its own adapter off. critic None: an estimator without values."""

    policy: PreTrainedModel
    ref_policy: PreTrainedModel | None
    critic: Critic | None
    adapters: Adapters | None
    offload: Offload

    @contextmanager
    def reference(self) -> Iterator[PreTrainedModel]:
        """Inside, the model it gives is the reference policy, on the device; no gradient can be taken."""
        if self.ref_policy is not None:
            way = self.offload.here(self.ref_policy)
        else:
            way = self.adapters.using(REFERENCE if REFERENCE in self.adapters.roles else None)
        with way as model, torch.inference_mode():
            yield model


def load_roles(
    config: PPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    scorer: RewardModelScorer | FunctionScorer,
    policy: str | PreTrainedModel,
    ref_policy: Source,
    value_model: Source,
    on_base: str | None = None,
) -> Roles:
    """Load what is named, make the rest. UserError for a model that cannot take its role, before any training.

    on_base: the folder of the reward model where that is an adapter on the policy's base.
    """
    how = (config.dtype, config.attention)
    _check_value_model(config, value_model)
    names = [POLICY, VALUE] if config.advantage == "gae" and config.critic == "separate" else [POLICY]
    names += [REFERENCE] if config.ref_refresh_every else []  # B = 0: the base, until the first refresh
    trained, adapters = load_backbone(policy, config, names)
    if on_base is not None:
        scorer.over(adapters, read_adapter(on_base, "reward"))
    if ref_policy is not None:
        reference = loading.freeze(loading.load_policy(ref_policy, *how))
    else:
        reference = loading.frozen_copy(trained) if adapters is None else None
    critic = _make_critic(config, tokenizer, scorer, trained, value_model, adapters)
    return Roles(trained, reference, critic, adapters, Offload(trained.device))


def _check_value_model(config: PPOConfig, value_model: Source) -> None:
    """Its weights need a trunk of their own."""
    if value_model is None:
        return
    if config.advantage != "gae":
        raise UserError(f"value_model: advantage = {config.advantage} has no critic; leave value_model out")
    if config.critic == "shared_trunk" or config.lora is not None:
        which = "critic = shared_trunk" if config.critic == "shared_trunk" else "lora"
        raise UserError(f"value_model: with {which} the critic reads the policy's base; leave value_model out")


def _make_critic(
    config: PPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    scorer: RewardModelScorer | FunctionScorer,
    policy: PreTrainedModel,
    value_model: Source,
    adapters: Adapters | None,
) -> Critic | None:
    """A model of its own is the one given, else a copy of a reward model that reads the same tokens, else the policy's
    trunk with a zero head. An adapter starts from the reward model's where that is one of the same layers and ranks."""
    if config.advantage != "gae":
        return None
    if config.critic == "shared_trunk":
        return Critic.shared_trunk(policy)
    if adapters is not None:
        shared = isinstance(scorer, RewardModelScorer) and scorer.same_tokenizer and scorer.adapters is adapters
        started = shared and adapters.start_from(VALUE, REWARD)
        return Critic.adapter(adapters, scorer.head if started else None)
    if value_model is not None:
        model = loading.load_reward_model(value_model, config.dtype, config.attention, role="value_model")
    elif isinstance(scorer, RewardModelScorer) and scorer.same_tokenizer:
        model = loading.frozen_copy(scorer.model)
    else:
        model = loading.scalar_model(policy, tokenizer, seed=None)
    return Critic.separate(model)
