"""Rows to learn from token by token: SFT's, plain text, and PPO's mix of both (ptx).

The loss of an optimizer step is a mean over target tokens, so how rows are grouped or packed never changes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf import models
from fastrlhf.feedback import Conversation
from fastrlhf.templates import encode_conversation, encode_prompt, encode_response
from fastrlhf_kernels import linear_log_probs


@dataclass(frozen=True)
class Example:
    """Token ids, and which of them are targets (the first never is: nothing predicts it); group: what it answers."""

    ids: list[int]
    target: list[bool]
    group: str


@dataclass(frozen=True)
class Batch:
    """input_ids, position_ids [B, L]; index [N] into B*L of what predicts each target; labels [N]."""

    input_ids: Tensor
    position_ids: Tensor
    index: Tensor
    labels: Tensor

    @classmethod
    def build(cls, rows: list[list[Example]], device: torch.device) -> Batch:
        """Positions restart with every example, which also keeps packed examples from seeing each other.

        Padding counts on, so that rows of one example each need no attention mask; behind packed rows, which may be
        longer than the model has positions, it stays at 0.
        """
        width, packed = max(sum(len(e.ids) for e in row) for row in rows), max(map(len, rows)) > 1
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        positions = torch.zeros(len(rows), width, dtype=torch.int64)
        index, labels = [], []
        for r, row in enumerate(rows):
            start = 0
            for example in row:
                end = start + len(example.ids)
                ids[r, start:end] = torch.tensor(example.ids)
                positions[r, start:end] = torch.arange(len(example.ids))
                wanted = [t for t in range(1, len(example.ids)) if example.target[t]]
                index += [r * width + start + t - 1 for t in wanted]
                labels += [example.ids[t] for t in wanted]
                start = end
            if not packed:
                positions[r, start:] = torch.arange(start, width)
        tensors = (ids, positions, torch.tensor(index), torch.tensor(labels))
        return cls(*(t.to(device) for t in tensors))


def target_log_probs(model: PreTrainedModel, batch: Batch) -> Tensor:
    """log p [N] fp32 of the target tokens at temperature 1; only their hidden states reach the head."""
    head = models.lm_head(model)
    hidden = models.hidden_states(model, batch.input_ids, batch.position_ids).flatten(0, 1)[batch.index]
    return linear_log_probs(hidden, head.weight, batch.labels, **head.kwargs())


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
