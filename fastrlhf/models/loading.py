"""The four roles as transformers models: where they are loaded, copied, frozen and made trainable.

A policy is a causal LM; reward and value models are `AutoModelForSequenceClassification` with one label, so that
other tools load them too.
"""

from __future__ import annotations

import copy
import logging
import re
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from fastrlhf.checkpoint.quiet import quiet_loading
from fastrlhf.checkpoint.weight_files import WeightFiles
from fastrlhf.config.errors import UserError
from fastrlhf.data.sources import modelscope_folder
from fastrlhf.data.templates import stop_token_ids
from fastrlhf.models import adapter_folder, moss
from fastrlhf.models.attention import attention_for, default_attention, has_attention, tell_foreign_attention
from fastrlhf.models.heads import check_head
from fastrlhf.models.quantization import quantize_trunk
from fastrlhf.models.reward_folder import as_kept
from fastrlhf.models.saving import padding_token
from fastrlhf.models.sources import load_pretrained, loaded, locate
from fastrlhf.parallel import mapped
from fastrlhf.runtime import distributed
from fastrlhf.runtime.distributed import device as local_device
from fastrlhf.runtime.hardware import resolve_attention, resolve_dtype

LOG = logging.getLogger(__name__)
Source = str | PreTrainedModel  # folder, hub id, GGUF file, or a loaded model
SIZES = {"num_hidden_layers": 10_000, "hidden_size": 10**7, "vocab_size": 10**8, "max_position_embeddings": 10**9}
NO_CLASSIFIER = (
    "{} has no sequence-classification form of its own in transformers, which critic=separate and reward models need: "
    "use critic=shared_trunk, or advantage=grpo or rloo, which have no critic; for a reward model use another base"
)
TOKENIZER_FILE = re.compile(r"tokenizer|vocab|spiece|sentencepiece|.*\.(model|tiktoken)$")


def check_source(source: object, role: str) -> None:
    """UserError when a folder, GGUF file or cached hub model (an adapter's own) cannot be there; loads no weights."""
    if adapter_folder.is_adapter(source):
        check_source(adapter_folder.base_of(source, role), role)
    elif isinstance(source, str):
        read_config(source, role)


def read_config(source: str, role: str) -> PreTrainedConfig | None:
    """None for a GGUF file, whose config comes with its weights. UserError as `check_source` has it."""
    where, extra = locate(source, role)
    if extra:
        return None
    moss.check_stock(where, role)
    config = loaded(role, source, lambda: AutoConfig.from_pretrained(where, trust_remote_code=False))
    _check_sizes(loaded(role, source, config.get_text_config), f"{role}: cannot load {str(source)!r}: config.json")
    return config


def _check_sizes(config: PreTrainedConfig, where: str) -> None:
    """UserError for sizes that no model has: building one of them would fail late, or have no end."""
    for name, most in SIZES.items():
        value = getattr(config, name, None)
        if value is not None and not (isinstance(value, int) and 1 <= value <= most):
            raise UserError(f"{where}: {name} is {value!r}; expected a whole number from 1 to {most}")


def skeleton(source: Source, role: str, *, scalar: bool = False) -> PreTrainedModel | None:
    """The model without its weights (on the meta device): what can be checked before they are loaded. A loaded model as
    it is; None for a GGUF file. scalar: a sequence classifier, else a causal LM; an adapter's is its base model's.

    UserError as `check_source` has it, and for a model that has no such form.
    """
    if isinstance(source, PreTrainedModel):
        return source
    if adapter_folder.is_adapter(source):
        base = adapter_folder.base_of(source, role)
        return skeleton(base, role, scalar=scalar and is_scalar_model(base))
    config = read_config(source, role)
    if config is None:
        return None
    auto = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    with torch.device("meta"), no_init_weights():
        return loaded(role, source, lambda: auto.from_config(config, attn_implementation="eager"))


def check_scalar_form(model: PreTrainedModel) -> None:
    """UserError where transformers has no sequence classifier with the model's trunk."""
    as_gptj = model.config.model_type == "codegen"  # see scalar_model
    if type(model.config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and not as_gptj:
        raise UserError(NO_CLASSIFIER.format(type(model).__name__))


def load_tokenizer(source: str, *, needs_eos: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, hub id or GGUF file. UserError when it is missing or has no end-of-sequence token."""
    if adapter_folder.is_adapter(source) and not any(TOKENIZER_FILE.match(f.name) for f in Path(source).glob("*")):
        return load_tokenizer(adapter_folder.base_of(source, "tokenizer"))
    where, extra = locate(source, "tokenizer")
    files = [file.name for file in Path(where).glob("*")]
    if files and not extra and not any(TOKENIZER_FILE.match(name) for name in files):
        raise UserError(f"tokenizer: {str(source)!r} holds no tokenizer files; pass tokenizer=FOLDER")
    if not extra:
        moss.check_stock(where, "tokenizer", weights=False)

    def load() -> PreTrainedTokenizerBase:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False, **extra)
        tokenizer("a word")  # some are broken in a way that only shows here
        return tokenizer

    tokenizer = loaded("tokenizer", source, load)
    if needs_eos and tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer: {str(source)!r} has no eos_token; set one, replies could never end")
    return tokenizer


def tokenizer_for(tokenizer: str | PreTrainedTokenizerBase | None, model: Source) -> PreTrainedTokenizerBase:
    """The tokenizer given, or the one that lies with the model. UserError when a loaded model brings none along."""
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        if tokenizer.eos_token_id is None:
            raise UserError("tokenizer: it has no eos_token; set one, replies could never end")
        return tokenizer
    if tokenizer is None and isinstance(model, PreTrainedModel):
        raise UserError("tokenizer: a loaded model needs its tokenizer too; pass tokenizer=")
    return load_tokenizer(tokenizer or model)


def _load(
    auto: type, source: Source, role: str, dtype: str, attention: str, *, to_cut: bool = False
) -> PreTrainedModel:
    """The model of a folder, hub id or file, on the CPU; a loaded model as it is. to_cut: its weights wait in their
    files (parallel/mapped.py), as far as transformers takes them over as they are."""
    if isinstance(source, PreTrainedModel):
        return source
    device, config = local_device(), read_config(source, role)
    torch_dtype = resolve_dtype(dtype, device)
    if config is None:  # transformers reads it from the GGUF file
        how = {"attn_implementation": resolve_attention(attention, device, torch_dtype)}
    else:
        tell_foreign_attention(config, role, source)
        kind = attention_for(class_of(auto, config, role, source), attention, device, torch_dtype)
        how = {"config": config, "attn_implementation": kind}  # read by transformers, config.json could win
    as_written = to_cut and config is not None  # a cast of a mapped tensor would be in memory
    model = load_pretrained(auto, source, role, dtype=_written_in(source, role) if as_written else torch_dtype, **how)
    quantized = getattr(model.config, "quantization_config", None)
    if str(source).endswith(".gguf") or "gguf" in str(quantized or ""):
        model = _fresh_copy(model)
    elif quantized is not None:
        raise UserError(
            f"{role}: the weights of {str(source)!r} are quantised; name the model that they were made from (lora with "
            "quantize=nf4 or int8 holds that in 4 or 8 bits)"
        )
    else:
        moss.check_no_difference(model, str(source), role)
    if to_cut:
        dtypes = _dtypes_in(model, torch_dtype) if as_written else {}
        if dtypes is None:
            model = load_pretrained(auto, source, role, dtype=torch_dtype, **how)
        _tell_what_is_in_memory(model, role, source)
        mapped.wait(model, device, dtypes)
    # What an adapter of it names as its base.
    model.config._name_or_path = str(modelscope_folder(str(source), role) or source)
    return model


def _written_in(source: str, role: str) -> torch.dtype | str:
    """The dtype of the weights in the files of a folder. Of several, and of a hub id, "auto": transformers takes the
    one that config.json names, or the first weight's."""
    folder = Path(locate(source, role)[0])
    if not folder.is_dir():
        return "auto"
    try:
        headers = WeightFiles(folder).headers
    except UserError:  # reading it whole says why
        return "auto"
    found = {header.dtype for header in headers.values() if header.dtype.is_floating_point}
    return found.pop() if len(found) == 1 else "auto"


def _dtypes_in(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype] | None:
    """The dtypes that its parameters would have if it were loaded in this one (transformers keeps some in fp32); its
    buffers and configs, which hold no more, become what they then would be. None: its weights are no copy of its files
    to the bit, so that casting them is not what loading does."""
    parameters = dict(model.named_parameters())
    written = {p.dtype for p in parameters.values()}
    if written == {dtype}:
        return {}
    if len(written) > 1 or not all(map(mapped.is_mapped, parameters.values())):
        return None
    state = {name: mapped.stand_in(p.shape, dtype) for name, p in parameters.items()}
    tied = dict(model.named_parameters(remove_duplicate=False))
    state |= {name: buffer for name, buffer in model.state_dict().items() if name not in tied}
    with quiet_loading():
        options = {"config": model.config, "state_dict": state, "dtype": dtype, "output_loading_info": True}
        made, info = type(model).from_pretrained(None, trust_remote_code=False, **options)
    if info["missing_keys"]:
        return None
    for name, module in made.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            setattr(model.get_submodule(name), key, buffer)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.dtype = dtype
    return {name: p.dtype for name, p in made.named_parameters()}


def _tell_what_is_in_memory(model: PreTrainedModel, role: str, source: Source) -> None:
    """Say it where weights of more than a layer are no views of their files."""
    made = sum(p.nbytes for p in model.parameters() if not mapped.is_mapped(p))
    layer = max((sum(p.nbytes for p in one.parameters()) for one in mapped.layers_of(model)), default=0)
    if made > layer and distributed.is_lead():
        LOG.warning(
            "%s: parallel = fsdp: %.2f GiB of %r are made in the host's memory, in each rank, before they are cut: "
            "transformers casts, restacks or dequantises them; the GPU holds a layer of them at a time",
            role,
            made / (1 << 30),
            str(source),
        )


def class_of(auto: type, config: PreTrainedConfig, role: str, source: Source) -> type[PreTrainedModel]:
    """The class that `auto` makes of a config. UserError where transformers has none."""
    form, mapping = "causal LM", MODEL_FOR_CAUSAL_LM_MAPPING
    if auto is AutoModelForSequenceClassification:
        form, mapping = "sequence classifier", MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if type(config) not in mapping:
        raise UserError(
            f"{role}: {str(source)!r} is a model of type {config.model_type!r}, and transformers has no {form} of it"
        )
    return mapping[type(config)]


def _settle(model: PreTrainedModel, source: Source, quantize: str | None, *, to_cut: bool = False) -> PreTrainedModel:
    """Quantised, on its device (this process's; a loaded model stays where it is), dropout off. to_cut: it waits."""
    device = model.device if model is source else local_device()
    if quantize is not None:
        quantize_trunk(model, quantize, device)
    if model is not source and not to_cut:
        model = model.to(device)
    prepare(model)
    return model


def load_policy(
    source: Source,
    dtype: str = "auto",
    attention: str = "auto",
    quantize: str | None = None,
    *,
    to_cut: bool = False,
) -> PreTrainedModel:
    """A causal LM on this process's device, dropout off. A loaded model is used as it is (its dtype and attention too).

    An adapter folder is merged into its model. quantize: nf4 or int8; on a GPU only the quantised layers arrive.
    to_cut: for `sharding.shard`; its weights wait in their files (parallel/mapped.py), and the device has a layer of
    them at a time while the model is checked. Raises UserError when the source is missing or is no causal LM with an
    output head.
    """
    if adapter_folder.is_adapter(source):
        base = load_policy(adapter_folder.base_of(source, "policy"), dtype, attention, to_cut=to_cut)
        return _with_adapter(base, source)
    model = _load(AutoModelForCausalLM, source, "policy", dtype, attention, to_cut=to_cut)
    with mapped.running(_settle(model, source, quantize, to_cut=to_cut)):
        check_head(model)
    return model


def _with_adapter(model: PreTrainedModel, source: str) -> PreTrainedModel:
    """The adapter of a policy merged in; what the folder says of generation goes along."""
    folder = adapter_folder.read_adapter(source, "policy")
    if folder.head:
        raise UserError(f"policy: {str(source)!r} is the adapter of a reward model; name the one of a causal LM")
    loaded("policy", source, lambda: adapter_folder.take_generation_config(model, folder.path))
    return adapter_folder.merge_into(model, folder)


def _fresh_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The dequantised weights in a model that `save_pretrained` accepts (the loaded one remembers its GGUF origin)."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with no_init_weights():
        fresh = AutoModelForCausalLM.from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    fresh.load_state_dict(model.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.generation_config = copy.deepcopy(model.generation_config)
    return fresh.eval()


def is_scalar_model(source: Source, role: str = "model") -> bool:
    """True for a sequence classifier (a reward or value model), false for a causal LM; reads the config only."""
    if isinstance(source, PreTrainedModel):
        return isinstance(getattr(source, "score", None), nn.Linear)
    if adapter_folder.is_adapter(source):
        return adapter_folder.is_reward_adapter(source, role)
    names = getattr(read_config(source, role), "architectures", None) or []
    return "SequenceClassification" in str(names)


def load_reward_model(
    source: Source,
    dtype: str = "auto",
    attention: str = "auto",
    role: str = "reward",
    quantize: str | None = None,
    *,
    centred: bool = True,
    to_cut: bool = False,
) -> PreTrainedModel:
    """A one-label sequence classifier (reward or value model). UserError when it has more labels or none.

    An adapter folder is merged into its model. quantize, to_cut: as `load_policy` has them. centred: with the bias that
    center_rewards put beside it; without, as training has it.
    """
    if adapter_folder.is_adapter(source):
        model = scalar_base(source, dtype, attention, role, to_cut=to_cut)
        model = adapter_folder.merge_into(model, adapter_folder.read_adapter(source, role))
        return as_kept(model, source, centred=centred)
    if isinstance(source, str | Path) and not is_scalar_model(source, role):
        raise UserError(f"{role}: {str(source)!r} is no sequence classifier; train one with `fastrlhf reward`")
    model = _load(AutoModelForSequenceClassification, source, role, dtype, attention, to_cut=to_cut)
    if getattr(model.config, "num_labels", None) != 1 or not isinstance(getattr(model, "score", None), nn.Linear):
        raise UserError(f"{role}: {type(model).__name__} must have a scalar head `score` (num_labels=1)")
    model = _settle(model, source, quantize, to_cut=to_cut)
    return as_kept(model, source, centred=centred) if isinstance(source, (str, Path)) else model


def load_classifier(
    source: Source, dtype: str = "auto", attention: str = "auto", *, to_cut: bool = False
) -> PreTrainedModel:
    """A sequence classifier of whatever labels and architecture, an encoder too. to_cut: as `load_policy` has it.
    UserError when it cannot be loaded."""
    model = _load(AutoModelForSequenceClassification, source, "reward", dtype, attention, to_cut=to_cut)
    return _settle(model, source, None, to_cut=to_cut)


def labels_of(source: Source) -> dict[int, str]:
    """The labels of a sequence classifier by their numbers, from its config; nothing for adapters and GGUF files."""
    if isinstance(source, PreTrainedModel):
        return dict(source.config.id2label)
    config = None if adapter_folder.is_adapter(source) else read_config(source, "reward")
    return {} if config is None else {int(index): str(name) for index, name in config.id2label.items()}


def scalar_base(
    source: str, dtype: str, attention: str, role: str, quantize: str | None = None, *, to_cut: bool = False
) -> PreTrainedModel:
    """The model under the adapter of a reward model, with the adapter's head and without its low-rank matrices.
    to_cut: as `load_policy` has it."""
    if not adapter_folder.is_reward_adapter(source, role):
        raise UserError(f"{role}: {source!r} is no adapter of a reward model; train one with `fastrlhf reward`")
    base, head = adapter_folder.base_of(source, role), adapter_folder.read_adapter(source, role).head
    if is_scalar_model(base):
        model = load_reward_model(base, dtype, attention, role, quantize, centred=False, to_cut=to_cut)
    else:
        trunk = load_policy(base, dtype, attention, quantize, to_cut=to_cut)
        model = scalar_model(trunk, load_tokenizer(source), seed=None, share=True)
    model.score.load_state_dict(head)
    return model


def scalar_model(
    trunk_of: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int | None, *, share: bool = False
) -> PreTrainedModel:
    """A new scalar-head model on a copy of another model's trunk (share: on that trunk itself).

    The head starts at N(0, 1/(H+1)) drawn from `seed` (Stiennon et al. 2020, as summarize_from_feedback does), or at
    zero where seed is None (a value model that predicts 0 before it has seen a return). On a CodeGen (MOSS) it is a
    GPT-J of the same weights.
    """
    if trunk_of.config.model_type == "codegen":
        trunk_of = moss.gptj_of(trunk_of)
    config = copy.deepcopy(trunk_of.config)
    config.num_labels = 1
    config.id2label, config.label2id = {0: "score"}, {"score": 0}
    config.pad_token_id = padding_token(tokenizer, stop_token_ids(tokenizer))
    check_scalar_form(trunk_of)
    kind, attention = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)], trunk_of.config._attn_implementation
    with torch.device("meta") if share else nullcontext():
        model = AutoModelForSequenceClassification.from_config(
            config,
            dtype=trunk_of.dtype,
            attn_implementation=attention if has_attention(kind, attention) else default_attention(kind),
        )
    same_trunk = type(model.base_model) is type(trunk_of.base_model)
    if not (same_trunk and isinstance(getattr(model, "score", None), nn.Linear)):
        raise UserError(NO_CLASSIFIER.format(type(trunk_of).__name__))
    if share:
        setattr(model, model.base_model_prefix, trunk_of.base_model)
        model.score.to_empty(device=trunk_of.device)
    else:
        model.base_model.load_state_dict(trunk_of.base_model.state_dict())
    hidden = model.score.weight.shape[1]
    head = torch.zeros(1, hidden)
    if seed is not None:
        head = torch.randn(1, hidden, generator=torch.Generator().manual_seed(seed)) * (hidden + 1) ** -0.5
    with torch.no_grad():
        model.score.weight.copy_(head)
    prepare(model)
    return model if share else model.to(trunk_of.device)


def frozen_copy(model: PreTrainedModel, *, to_cut: bool = False) -> PreTrainedModel:
    """A deep copy that takes no gradients: the reference policy. to_cut: its parameters have the model's own values,
    and `sharding.shard` makes the copy."""
    return freeze(mapped.twin(model) if to_cut else copy.deepcopy(model))


def make_trainable(
    model: PreTrainedModel, gradient_checkpointing: bool | None, *, frozen: bool = False
) -> PreTrainedModel:
    """Every parameter takes gradients (frozen: those stay as they are, adapters train). Checkpointing works in training
    mode only, where our models behave the same: their dropout is off."""
    if gradient_checkpointing:
        model.train()
        new = getattr(model, "activation_checkpointing_enable", None)  # from transformers 5.24 on
        (new or model.gradient_checkpointing_enable)()
    return model if frozen else model.requires_grad_(True)


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    return model.eval().requires_grad_(False)


def prepare(model: PreTrainedModel) -> None:
    """Dropout off, and every embedding trained: torch gives the padding id's row no gradient, which may be the EOS."""
    disable_dropout(model)
    embeddings = model.get_input_embeddings()
    if isinstance(embeddings, nn.Embedding):
        embeddings.padding_idx = None


def disable_dropout(model: nn.Module) -> None:
    """PPO compares log-probs of several forwards of the same weights; dropout would make their ratio noise."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    for holder in (*model.modules(), *configs.values()):
        if isinstance(holder, nn.Dropout):
            holder.p = 0.0
        for name, value in list(vars(holder).items()):  # rates that forwards read: layerdrop, attn_pdrop, dropout ...
            if isinstance(value, float) and "drop" in name:
                setattr(holder, name, 0.0)
