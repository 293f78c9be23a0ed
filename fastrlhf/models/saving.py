"""Model folders that stock transformers runs, and the token that they pad with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.checkpoint.quiet import quiet_loading
from fastrlhf.checkpoint.weight_files import save_in_parts
from fastrlhf.data.templates import stop_token_ids


def padding_token(tokenizer: PreTrainedTokenizerBase, stops: Collection[int], *, special: bool = False) -> int:
    """The id to pad with, which ends no reply (`stops`): the tokenizer's pad, unk, bos, or an added token.

    Stock sequence classifiers read their score at the last id that is not padding: where they pad with a stop, that
    would be the token before the end of the reply. Our own masks come from lengths, so to us it never matters.
    Where all of these are stops, a token takes over that is spelt as in no text (GPT-2's "\u0120gazed" for " gazed"):
    special tokens are looked for in it first, so every text keeps its ids. special: not there, because generation
    prints what is not special; EOS then, and where everything is a stop.
    """
    added = sorted(tokenizer.get_added_vocab().values())
    for token in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *added):
        if token is not None and token not in stops:
            return token
    rest = [] if special else sorted(set(tokenizer.get_vocab().values()) - set(stops), reverse=True)
    unspelt = (token for token in rest if tokenizer.decode([token]) != tokenizer.convert_ids_to_tokens(token))
    return next(unspelt, rest[0] if rest else tokenizer.eos_token_id)


def padding_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that pads on the right with a token that ends no reply; every text keeps its ids."""
    padded = _padding_with(tokenizer, padding_token(tokenizer, stop_token_ids(tokenizer)))
    padded.padding_side = "right"
    return padded


def _padding_with(tokenizer: PreTrainedTokenizerBase, token: int) -> PreTrainedTokenizerBase:
    """A copy whose padding token is this one."""
    padded = copy.deepcopy(tokenizer)
    if token != tokenizer.pad_token_id:
        padded.pad_token = tokenizer.convert_ids_to_tokens(token)
    return padded


def write_model(
    folder: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    weights: dict[str, Tensor] | Iterator[dict[str, Tensor]] | None = None,
    adapter: Callable[[Path], None] | None = None,
) -> None:
    """Write what stock transformers runs: safetensors, tokenizer with its chat template, generation config.

    stop_ids become the generation config's eos_token_id, so that `pipeline()` ends replies where training did. The
    tokenizer of a reward model pads with the id that the stock classifier looks for. weights: a state dict to write
    in place of the model's own, or its parts (`save_in_parts`). adapter: writes an adapter's files in place of weights
    and config.
    """
    generation = getattr(model, "generation_config", None)
    if generation is not None and model.can_generate():
        generation.eos_token_id = list(stop_ids) if len(stop_ids) > 1 else stop_ids[0]
        generation.pad_token_id = padding_token(tokenizer, stop_token_ids(tokenizer), special=True)
        try:
            generation.validate(strict=True)
        except ValueError:  # defaults that contradict each other, as some hub models bring: they cannot be saved
            kept = {name: getattr(generation, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            model.generation_config = GenerationConfig(**kept)
    elif model.config.pad_token_id is not None:
        tokenizer = _padding_with(tokenizer, model.config.pad_token_id)
    if adapter is None:
        with quiet_loading():
            if weights is None or isinstance(weights, dict):
                model.save_pretrained(folder, state_dict=weights)
            else:
                save_in_parts(model, Path(folder), weights)
    else:
        adapter(Path(folder))
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
