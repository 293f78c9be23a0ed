"""The model of a stage as it is trained: all of its weights, or adapters over frozen, perhaps quantised, weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.config.base import StageConfig
from fastrlhf.config.errors import UserError
from fastrlhf.data.sources import modelscope_folder
from fastrlhf.models import adapter_folder, loading
from fastrlhf.models.adapter_folder import AdapterFolder, is_adapter
from fastrlhf.models.heads import UNSUPPORTED, Head, hidden_states, lm_head
from fastrlhf.models.loading import Source
from fastrlhf.models.lora import REWARD, Adapters
from fastrlhf.models.quantization import quantize_trunk
from fastrlhf.parallel import mapped, sharding
from fastrlhf.runtime.batching import derive_seed
from fastrlhf.runtime.memory import ran_out
from fastrlhf.runtime.regions import UNCOMPILED, CompiledLayers, check_compiler, give_back, missing_compiler, rests

TRIED = (3, 5)  # rows and tokens


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


def compile_layers(model: PreTrainedModel, wanted: bool | None, report: Callable[[str], None]) -> None:
    """The option `compile` for a model that trains, or is read as one that does: its layers run compiled from here on
    in the mode (`training`) that they are in now.

    They are tried first, forward and backward, beside the layers as they are; of that nothing stays but the graphs.
    Where they cannot be compiled or compute something else, auto (None) leaves them and tells report so in a sentence;
    UserError where wanted is true.
    """
    give_back(model)
    if rests(wanted, model.device):
        return
    check_compiler(wanted, model.device)
    reason = _compiled_or_why_not(model)
    if reason and wanted:
        raise UserError(f"compile = true: {reason}; use compile = auto or false")
    if reason:
        report(f"training is not compiled: {reason}")


def _compiled_or_why_not(model: PreTrainedModel) -> str:
    reason = missing_compiler(model.device)
    if not reason and sharding.is_sharded(model):
        reason = "its weights are sharded, and a layer's are gathered as it runs"
    if reason:
        return reason
    name = type(model).__name__
    try:
        layers = CompiledLayers(model)
    except ValueError as error:
        return str(error)
    try:
        plain = _tried(model, layers)
        layers.attach()
        ours = _tried(model, layers)
    except (*UNCOMPILED, *UNSUPPORTED) as error:
        give_back(model)
        if ran_out(error):
            raise
        lines = str(error).strip().splitlines() or [""]
        return f"the trial of compiled layers fails for {name} ({type(error).__name__}: {lines[0]})"
    # What overflows in the layers as they are shows nothing.
    pairs = [(one, other) for one, other in zip(ours, plain, strict=True) if other.isfinite().all()]
    if all(_within_rounding(one, other, model.dtype, len(layers.layers)) for one, other in pairs):
        layers.trying = False
        return ""
    give_back(model)
    return f"the layers of {name} compute something else when they are compiled"


def _within_rounding(ours: Tensor, theirs: Tensor, dtype: torch.dtype, layers: int) -> bool:
    """Whether |ours - theirs| / |theirs| is what a dtype rounds in a few places of each layer, which add up as a random
    walk does: compiled layers round in fewer places."""
    limit = min(max(8 * torch.finfo(dtype).eps * layers**0.5, 1e-3), 0.25)
    return bool((ours.float() - theirs.float()).norm() <= limit * theirs.float().norm())


def _tried(model: PreTrainedModel, layers: CompiledLayers) -> list[Tensor]:
    """What the trunk says of some tokens, and where it trains the gradients of its first trained layer, which all
    others lie behind."""
    rows, tokens = TRIED
    vocabulary = len(model.get_input_embeddings().weight)
    # From the middle: at the ends stand padding and reserved tokens, whose embeddings may be 0, where a norm's gradient
    # has no bound.
    ids = (torch.arange(rows * tokens, device=model.device).view(rows, tokens) + vocabulary // 2) % vocabulary
    with torch.set_grad_enabled(layers.trained):
        hidden = hidden_states(model, ids)
        if not layers.trained:
            return [hidden]
        weights = torch.arange(hidden.numel(), device=hidden.device, dtype=torch.float32).sin().view_as(hidden)
        first = next(layer for layer in layers.layers if any(p.requires_grad for p in layer.parameters()))
        trained = [p for p in first.parameters() if p.requires_grad]
        # Of adapters that wait there are none.
        grads = torch.autograd.grad((hidden.float() * weights).sum(), trained, allow_unused=True)
    return [hidden.detach(), *(grad for grad in grads if grad is not None)]
