"""The prompts PPO answers, as token ids; what is too long is dropped and counted."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from fastrlhf.config import PPOConfig, UserError
from fastrlhf.data import encode_rows, load_prompts
from fastrlhf.feedback import Prompt
from fastrlhf.templates import encode_prompt

EncodedPrompt = tuple[Prompt, list[int]]


def load_encoded_prompts(
    config: PPOConfig, tokenizer: PreTrainedTokenizerBase, source: Any, role: str
) -> tuple[list[EncodedPrompt] | None, str]:
    """-> prompts with their ids, and what became of the rows; (None, "") where there is no source.

    Raises UserError, naming `role`, for bad rows and where no prompt is short enough.
    """
    if source is None:
        return None, ""
    prompts, counts = load_prompts(source, skip_bad_rows=config.skip_bad_rows)
    limit = config.max_prompt_tokens
    encoded = list(encode_rows(prompts, lambda p: encode_prompt(tokenizer, p.prompt), counts, config.skip_bad_rows))
    kept = [pair for pair in encoded if len(pair[1]) <= limit]
    if len(kept) < len(encoded):
        counts.add(f"longer than max_prompt_tokens = {limit}", len(encoded) - len(kept))
    if not kept:
        if not encoded:
            raise UserError(f"{role}: nothing left to train on ({counts.line()})")
        shortest = min(len(ids) for _, ids in encoded)
        raise UserError(
            f"{role}: every prompt is longer than max_prompt_tokens = {limit} (the shortest: {shortest}); raise it"
        )
    return kept, f"{role}: {counts.line()}"
