"""The models of a recipe by their configurations alone: every layer, and no weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.initialization import no_init_weights

from fastrlhf.config.errors import UserError
from fastrlhf.models import adapter_folder
from fastrlhf.models.attention import default_attention
from fastrlhf.models.loading import class_of, is_scalar_model, read_config
from fastrlhf.models.sources import loaded, locate
from fastrlhf.plan.unknown import UnknownNumbers
from fastrlhf.rollout.parity import digest, keep_parity, refusal, unfit

WORD = "a"  # of the texts that stand in for a run's rows
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers")
ALL_POSITIONS = 10**9


def base_of(source: str, role: str) -> str:
    """The model that a source names; of an adapter, the one under it."""
    return adapter_folder.base_of(source, role) if adapter_folder.is_adapter(source) else source


def sized_config(source: str, role: str) -> PreTrainedConfig:
    """The configuration of a folder or hub id. UserError for a GGUF file, which has none without its weights, and where
    config.json leaves a size out: transformers would take that of another model."""
    config = read_config(source, role)
    if config is None:
        raise UserError(
            f"{role}: {source!r} is a GGUF file, whose sizes come with its weights; name a folder with a config.json"
        )
    where, _ = locate(source, role)
    given, _ = loaded(role, source, lambda: type(config).get_config_dict(where))
    given = {**given, **(given.get("text_config") or {})}
    text = config.get_text_config()
    for name in SIZES:
        spelt = text.attribute_map.get(name, name)
        if name not in given and spelt not in given:
            raise UserError(f"{role}: config.json of {source!r} has no {spelt}, so the model's size is not known")
    return config


def model_without_weights(
    live: UnknownNumbers, source: str, role: str, *, scalar: bool, dtype: torch.dtype, attention: str
) -> PreTrainedModel:
    """A causal LM, or with `scalar` a classifier of one label, as it would be loaded. UserError as `sized_config` has
    it, and for a model that transformers has no such form of."""
    base = base_of(source, role)
    config = sized_config(base, role)
    auto = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    kind = class_of(auto, config, role, source)
    if scalar and not is_scalar_model(base):
        config.num_labels = 1

    def make() -> PreTrainedModel:
        with no_init_weights():
            how = "eager" if attention == "eager" else default_attention(kind)
            model = auto.from_config(config, dtype=dtype, attn_implementation=how)
        model.tie_weights()
        return model.eval()

    model = live.unknown(make)
    model.config._name_or_path = str(Path(base))
    if not scalar:  # whether it decodes exactly would need numbers, whether it decodes at all does not
        reason = unfit(model) or refusal(model)
        keep_parity(model, [digest(model), ALL_POSITIONS, not reason, reason])
    return model


def stand_in_tokenizer(others: int = 0) -> PreTrainedTokenizerBase:
    """Knows `WORD`, an end and so many other words w0, w1 ...: the rows of a plan have lengths, and no text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    known = {"</s>": 0, WORD: 1, **{f"w{i}": 2 + i for i in range(others)}}
    words = Tokenizer(models.WordLevel(known, unk_token=WORD))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")


def parameters_of(model: Any) -> list[torch.Tensor]:
    """Parameters and buffers of a model, or of nothing."""
    return [] if model is None else [*model.parameters(), *model.buffers()]
