"""The model of a stage as it is trained: all of its weights, or adapters over frozen, perhaps quantised, weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.config.base import StageConfig
from fastrlhf.config.errors import UserError
from fastrlhf.data.sources import modelscope_folder
from fastrlhf.models import adapter_folder, loading
from fastrlhf.models.adapter_folder import AdapterFolder, is_adapter
from fastrlhf.models.heads import Head, lm_head
from fastrlhf.models.loading import Source
from fastrlhf.models.lora import REWARD, Adapters
from fastrlhf.models.quantization import quantize_trunk
from fastrlhf.parallel import mapped, sharding
from fastrlhf.runtime.batching import derive_seed


def load_backbone(
    source: Source, config: StageConfig, roles: Sequence[str], report: Callable[[str], None]
) -> tuple[PreTrainedModel, Adapters | None]:
    """A causal LM, and with `lora` the adapters of its roles. An adapter folder is merged where all weights train;
    with `lora` it stays frozen under every role. report is told in sentences what the adapters stand on."""
    precision, to_cut = (config.dtype, config.attention), sharding.wanted(config)
    if config.lora is None:
        return loading.load_policy(source, *precision, to_cut=to_cut), None
    base_adapter = _base_adapter(source, "policy")
    if base_adapter is None:
        model = loading.load_policy(source, *precision, config.quantize, to_cut=to_cut)
    elif base_adapter.head:
        raise UserError(f"policy: {str(source)!r} is the adapter of a reward model, not of a causal LM")
    else:
        model = loading.load_policy(base_adapter.base, *precision, config.quantize, to_cut=to_cut)
        adapter_folder.take_generation_config(model, base_adapter.path)
    return model, _adapters(model, config, roles, base_adapter, report)


def load_scalar_backbone(
    source: Source, config: StageConfig, tokenizer: PreTrainedTokenizerBase, report: Callable[[str], None]
) -> tuple[PreTrainedModel, Adapters | None, Head | None]:
    """A reward model to go on with, or a causal LM's trunk under a new head; with `lora` its adapter; and the head of
    the causal LM: tied to the embeddings of the trunk where it was to its own, else as it is, without gradients."""
    head = None
    precision, to_cut = (config.dtype, config.attention), sharding.wanted(config)
    base_adapter = None if config.lora is None else _base_adapter(source, "model")
    if loading.is_scalar_model(source):
        load = partial(loading.load_reward_model, centred=False) if base_adapter is None else loading.scalar_base
        model = load(source, *precision, "model", config.quantize, to_cut=to_cut)
    else:
        live = isinstance(source, PreTrainedModel)  # its own trunk is left as it is
        base = source if base_adapter is None else base_adapter.base
        trunk = loading.load_policy(base, *precision, None if live else config.quantize, to_cut=to_cut)
        shared = mapped.twin(trunk) if live and to_cut else trunk
        model = loading.scalar_model(shared, tokenizer, seed=config.seed, share=to_cut or not live)
        if live and config.quantize is not None:
            quantize_trunk(model, config.quantize, model.device)
        head = _language_head(trunk, model)
    return model, None if config.lora is None else _adapters(model, config, [REWARD], base_adapter, report), head


def _language_head(language_model: PreTrainedModel, scalar: PreTrainedModel) -> Head:
    head = lm_head(language_model)
    if head.weight is language_model.get_input_embeddings().weight:
        return head._replace(weight=scalar.get_input_embeddings().weight)
    bias = None if head.bias is None else head.bias.detach()
    return head._replace(weight=head.weight.detach(), bias=bias)


def _base_adapter(source: Source, role: str) -> AdapterFolder | None:
    return adapter_folder.read_adapter(source, role) if is_adapter(source) else None


def _adapters(
    model: PreTrainedModel,
    config: StageConfig,
    roles: Sequence[str],
    base_adapter: AdapterFolder | None,
    report: Callable[[str], None],
) -> Adapters:
    adapters = Adapters(model, config.lora, roles, derive_seed(config.seed, "lora"), base_adapter, report)
    for sentence in adapters.notes():
        report(sentence)
    return adapters


def same_base(policy: Source, reward: object) -> bool:
    """Whether `reward` is the adapter of a reward model on the very model that the policy is, or is an adapter of."""
    if not (isinstance(policy, str) and is_adapter(reward) and adapter_folder.is_reward_adapter(reward, "reward")):
        return False
    ours = adapter_folder.base_of(policy, "policy") if is_adapter(policy) else policy
    theirs = adapter_folder.base_of(reward, "reward")
    ours, theirs = (modelscope_folder(name, "policy") or name for name in (ours, theirs))
    if Path(ours).exists() and Path(theirs).exists():
        return Path(ours).resolve() == Path(theirs).resolve()
    return ours == theirs
