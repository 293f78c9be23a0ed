"""Rows to learn from token by token: SFT's, plain text, and PPO's mix of both (ptx); and PPO's prompts.

The loss of an optimizer step is a mean over target tokens, so how rows are grouped or packed never changes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple, TypeVar

from transformers import PreTrainedTokenizerBase

from fastrlhf.config.errors import UserError
from fastrlhf.config.stages import PPOConfig
from fastrlhf.data.checks import DroppedRow
from fastrlhf.data.dataset import Counts, Located, encode_rows, load_conversations, load_prompts, reading
from fastrlhf.data.feedback import Conversation, Prompt
from fastrlhf.data.prompt_format import Form, describe, form_of
from fastrlhf.data.templates import encode_conversation, encode_prompt, encode_response, encode_text

E = TypeVar("E")


@dataclass(frozen=True)
class Example:
    """Token ids, and which of them are targets (the first never is: nothing predicts it); group: what it answers; row:
    what it was made of, where somebody asks for that."""

    ids: list[int]
    target: list[bool]
    group: str
    row: Conversation | None = None


def target_count(examples: Iterable[Example]) -> int:
    """Number of target tokens of these examples; their summed loss is divided by it."""
    return sum(sum(example.target) for example in examples)


def encode_example(tokenizer: PreTrainedTokenizerBase, row: Conversation) -> Example:
    """Loss on assistant tokens only, all turns of them; on every token of plain text, EOS included."""
    if row.text is not None:
        ids = encode_text(tokenizer, row.text)
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


class EncodedPrompt(NamedTuple):
    prompt: Prompt
    ids: list[int]


def encode_usable(
    items: Iterable[Located],
    encode: Callable[[Located], E],
    counts: Counts,
    *,
    role: str,
    skip_bad_rows: bool,
    remedy: str = "",
) -> tuple[list[E], str]:
    """Encode every item that can be used -> the results, and a sentence on what became of all rows.

    encode may raise DroppedRow, e.g. "longer than max_tokens = 32", or cut a row and note that in counts; what the chat
    template refuses is a bad row (see encode_rows). Raises UserError, naming role and remedy, where nothing is left.
    """
    encoded = [result for _, result in encode_rows(items, encode, counts, skip_bad_rows)]
    if not encoded:
        raise UserError(f"{role}: nothing left to train on ({counts.line()}){remedy and '; ' + remedy}")
    return encoded, f"{role}: {counts.line()}"


def load_encoded_prompts(
    config: PPOConfig, tokenizer: PreTrainedTokenizerBase, source: Any, role: str, template: str = "its chat template"
) -> tuple[list[EncodedPrompt] | None, str]:
    """-> prompts with their ids, and what became of the rows and their forms; (None, "") where there is no source.

    Raises UserError, naming `role`, for bad rows and where no prompt is short enough.
    """
    if source is None:
        return None, ""

    def encode(prompt: Prompt) -> EncodedPrompt:
        return EncodedPrompt(prompt, encode_prompt(tokenizer, prompt.prompt))

    prompts, counts = load_prompts(source, **reading(config, role))
    encoded, _ = encode_usable(prompts, encode, counts, role=role, skip_bad_rows=config.skip_bad_rows)
    # Lengths are compared once all are known: the shortest of them is what a user must allow.
    limit = config.max_prompt_tokens
    kept = [item for item in encoded if len(item.ids) <= limit]
    counts.add(f"longer than max_prompt_tokens = {limit}", len(encoded) - len(kept))
    if not kept:
        shortest = min(len(item.ids) for item in encoded)
        problem = f"every prompt is longer than max_prompt_tokens = {limit} (the shortest: {shortest})"
        raise UserError(f"{role}: {problem}; raise it")
    forms = [form_of(tokenizer, item.prompt.prompt) for item in kept]
    return kept, "\n".join([f"{role}: {counts.line()}", *describe(tokenizer, forms, role, template)])


def row_form(tokenizer: PreTrainedTokenizerBase, row: Conversation) -> Form:
    """What an SFT row is, for the log."""
    return "plain texts" if row.text is not None else form_of(tokenizer, row.prompt or row.messages)


def check_ptx(config: PPOConfig, ptx_data: Any) -> None:
    """Raise UserError where one of ptx_coef and ptx_data stands without the other."""
    if config.ptx_coef > 0 and ptx_data is None:
        remedy = "give ptx_data, or ptx_coef=0"
        raise UserError(f"ptx_data: ptx_coef = {config.ptx_coef:g} needs rows to learn from; {remedy}")
    if config.ptx_coef == 0 and ptx_data is not None:
        raise UserError("ptx_coef = 0: ptx_data would never be used; set ptx_coef above 0 or leave ptx_data out")


def load_ptx(config: PPOConfig, tokenizer: PreTrainedTokenizerBase, ptx_data: Any) -> tuple[list[Example], str]:
    """ptx_data as examples, and what became of its rows; nothing without ptx.

    Rows longer than max_prompt_tokens + max_new_tokens are dropped and counted. UserError where nothing is left.
    """
    check_ptx(config, ptx_data)
    if ptx_data is None:
        return [], ""
    limit = ptx_limit(config)

    def encode(row: Conversation) -> Example:
        example = encode_example(tokenizer, row)
        if len(example.ids) > limit:
            raise DroppedRow(f"longer than max_prompt_tokens + max_new_tokens = {limit}")
        return example

    rows, counts = load_conversations(ptx_data, **reading(config, "ptx_data"))
    return encode_usable(
        rows, encode, counts, role="ptx_data", skip_bad_rows=config.skip_bad_rows, remedy="raise max_prompt_tokens"
    )


def ptx_limit(config: PPOConfig) -> int:
    """The most tokens a row of ptx_data may have: as many as a prompt and its reply together."""
    return config.max_prompt_tokens + config.max_new_tokens
