"""Rows to learn from token by token: SFT's, plain text, and PPO's mix of both (ptx).

The loss of an optimizer step is a mean over target tokens, so how rows are grouped or packed never changes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastrlhf.config.errors import UserError
from fastrlhf.config.stages import PPOConfig
from fastrlhf.data.dataset import encode_rows, load_conversations, load_prompts
from fastrlhf.data.feedback import Conversation, Prompt
from fastrlhf.data.templates import encode_conversation, encode_prompt, encode_response


@dataclass(frozen=True)
class Example:
    """Token ids, and which of them are targets (the first never is: nothing predicts it); group: what it answers."""

    ids: list[int]
    target: list[bool]
    group: str


def target_count(examples: Iterable[Example]) -> int:
    """Target tokens of these examples: what their summed loss is divided by."""
    return sum(sum(example.target) for example in examples)


def encode_example(tokenizer: PreTrainedTokenizerBase, row: Conversation) -> Example:
    """Loss on assistant tokens only, all turns of them; on every token of plain text, EOS included."""
    if row.text is not None:
        ids = encode_prompt(tokenizer, row.text) + [tokenizer.eos_token_id]
        target, group = [True] * len(ids), row.text
    elif row.messages is not None:
        ids, target = encode_conversation(tokenizer, row.messages)
        group = json.dumps(list(takewhile(lambda m: m["role"] != "assistant", row.messages)))
    else:
        prompt = encode_prompt(tokenizer, row.prompt)
        response = encode_response(tokenizer, row.prompt, row.response)
        ids, target = prompt + response, [False] * len(prompt) + [True] * len(response)
        group = json.dumps(row.prompt)
    return Example(ids, [False, *target[1:]], group)


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


def check_ptx(config: PPOConfig, ptx_data: Any) -> None:
    """UserError where one of ptx_coef and ptx_data stands without the other."""
    if config.ptx_coef > 0 and ptx_data is None:
        raise UserError(
            f"ptx_data: ptx_coef = {config.ptx_coef:g} needs rows to learn from; give ptx_data, or ptx_coef=0"
        )
    if config.ptx_coef == 0 and ptx_data is not None:
        raise UserError("ptx_coef = 0: ptx_data would never be used; set ptx_coef above 0 or leave ptx_data out")


def load_ptx(config: PPOConfig, tokenizer: PreTrainedTokenizerBase, ptx_data: Any) -> tuple[list[Example], str]:
    """ptx_data as examples, and what became of its rows; nothing without ptx. What is longer than max_prompt_tokens +
    max_new_tokens is dropped and counted. UserError where nothing is left."""
    check_ptx(config, ptx_data)
    if ptx_data is None:
        return [], ""
    rows, counts = load_conversations(ptx_data, skip_bad_rows=config.skip_bad_rows)
    encoded = encode_rows(rows, partial(encode_example, tokenizer), counts, config.skip_bad_rows)
    examples, limit = [example for _, example in encoded], ptx_limit(config)
    kept = [example for example in examples if len(example.ids) <= limit]
    counts.add(f"longer than max_prompt_tokens + max_new_tokens = {limit}", len(examples) - len(kept))
    if not kept:
        raise UserError(f"ptx_data: nothing left to train on ({counts.line()}); raise max_prompt_tokens")
    return kept, f"ptx_data: {counts.line()}"


def ptx_limit(config: PPOConfig) -> int:
    return config.max_prompt_tokens + config.max_new_tokens
