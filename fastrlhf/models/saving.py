"""The four roles as transformers models: load them, run their trunks, read their heads, save them.

A policy is a causal LM; reward and value models are `AutoModelForSequenceClassification` with one label, so that
other tools load them too. Both kinds are used through `hidden_states` (the trunk) and their head separately:
no logits tensor [tokens, vocabulary] is ever made in training.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.data.templates import stop_token_ids


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id to fill padding with: the tokenizer's own unless that also ends replies (then unk, bos, another special
    token that ends nothing, else EOS).

    Our masks come from lengths, so the choice never matters here; stock sequence classifiers read their score at the
    last id that is not the padding id, which must not be the end of the reply.
    """
    eos = tokenizer.eos_token_id
    added = sorted(i for text, i in tokenizer.get_added_vocab().items() if not re.search("end|eo[a-z]|/s", text))
    for candidate in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *added):
        if candidate is not None and candidate != eos:
            return candidate
    return eos


# -------------------------------------------------------------------------------------------------------- saving


def write_model(
    folder: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    weights: dict[str, Tensor] | None = None,
    adapter: Callable[[Path], None] | None = None,
) -> None:
    """Write what stock transformers runs: safetensors, tokenizer with its chat template, generation config.

    stop_ids become the generation config's eos_token_id, so that `pipeline()` ends replies where training did. The
    tokenizer of a reward model pads with the id that the stock classifier looks for. weights: a state dict to write
    in place of the model's own. adapter: writes an adapter's files in place of weights and config.
    """
    generation = getattr(model, "generation_config", None)
    if generation is not None and model.can_generate():
        ends = {
            "eos_token_id": list(stop_ids) if len(stop_ids) > 1 else stop_ids[0],
            "pad_token_id": padding_id(tokenizer),
        }
        generation.eos_token_id, generation.pad_token_id = ends.values()
        try:
            generation.validate(strict=True)
        except ValueError:  # defaults that contradict each other, as some hub models bring: they cannot be saved
            model.generation_config = GenerationConfig(bos_token_id=generation.bos_token_id, **ends)
    elif model.config.pad_token_id not in (None, tokenizer.pad_token_id):
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.pad_token_id)
    if adapter is None:
        model.save_pretrained(folder, state_dict=weights)
    else:
        adapter(Path(folder))
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def padding_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that pads on the right with a token that ends no reply; every text keeps its ids.

    Stock sequence classifiers read their score at the last id that is not padding. Where the tokenizer pads with its
    EOS, that would be the token before the end of the reply, so another one takes over: unk, bos, an added token, or
    one that is spelt as in no text (GPT-2's "\u0120gazed" for " gazed"): special tokens are looked for in it first.
    """
    made, stops = copy.deepcopy(tokenizer), set(stop_token_ids(tokenizer))
    made.padding_side = "right"
    added = sorted(tokenizer.get_added_vocab().values())
    for token in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *added):
        if token is not None and token not in stops:
            break
    else:
        vocabulary = sorted(set(tokenizer.get_vocab().values()) - stops, reverse=True)
        unspelt = (t for t in vocabulary if tokenizer.decode([t]) != tokenizer.convert_ids_to_tokens(t))
        token = next(unspelt, vocabulary[0])
    if token != tokenizer.pad_token_id:
        made.pad_token = tokenizer.convert_ids_to_tokens(token)
    return made
