"""The model of a stage as it is trained: all of its weights, or adapters over frozen, perhaps quantised, weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.config.base import StageConfig
from fastrlhf.config.errors import UserError
from fastrlhf.models import loading
from fastrlhf.models.adapter_folder import (
    AdapterFolder,
    base_of,
    is_adapter,
    is_reward_adapter,
    read_adapter,
    take_generation_config,
)
from fastrlhf.models.lora import REWARD, Adapters
from fastrlhf.models.quantization import quantize_trunk
from fastrlhf.runtime.batching import derive_seed

Source = str | PreTrainedModel


def load_backbone(source: Source, config: StageConfig, roles: Sequence[str]) -> tuple[PreTrainedModel, Adapters | None]:
    """A causal LM, and with `lora` the adapters of its roles. An adapter folder is merged where all weights train;
    with `lora` it stays frozen under every role."""
    how = (config.dtype, config.attention)
    if config.lora is None:
        return loading.load_policy(source, *how), None
    under = _under(source, "policy")
    if under is not None and under.head:
        raise UserError(f"policy: {str(source)!r} is the adapter of a reward model, not of a causal LM")
    model = loading.load_policy(source if under is None else under.base, *how, config.quantize)
    if under is not None:
        take_generation_config(model, under.path)
    return model, _adapters(model, config, roles, under)


def load_scalar_backbone(
    source: Source, config: StageConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, Adapters | None]:
    """A reward model to go on with, or a causal LM's trunk under a new head; and with `lora` its adapter."""
    how = (config.dtype, config.attention)
    under = None if config.lora is None else _under(source, "model")
    plain = source if under is None else under.base
    if loading.is_scalar_model(source):
        load = loading.load_reward_model if under is None else loading.scalar_base
        model = load(source, *how, "model", config.quantize)
    else:
        live = isinstance(source, PreTrainedModel)  # its own trunk is left as it is
        trunk = loading.load_policy(plain, *how, None if live else config.quantize)
        model = loading.scalar_model(trunk, tokenizer, seed=config.seed, share=not live)
        if live and config.quantize is not None:
            quantize_trunk(model, config.quantize, model.device)
    return model, None if config.lora is None else _adapters(model, config, [REWARD], under)


def _under(source: Source, role: str) -> AdapterFolder | None:
    return read_adapter(source, role) if is_adapter(source) else None


def _adapters(
    model: PreTrainedModel, config: StageConfig, roles: Sequence[str], under: AdapterFolder | None
) -> Adapters:
    return Adapters(model, config.lora, roles, derive_seed(config.seed, "lora"), under)


def same_base(policy: Source, reward: object) -> bool:
    """Whether `reward` is the adapter of a reward model on the very model that the policy is, or is an adapter of."""
    if not (isinstance(policy, str) and is_adapter(reward) and is_reward_adapter(reward, "reward")):
        return False
    ours = base_of(policy, "policy") if is_adapter(policy) else policy
    theirs = base_of(reward, "reward")
    both = Path(ours), Path(theirs)
    return both[0].resolve() == both[1].resolve() if all(path.exists() for path in both) else ours == theirs
