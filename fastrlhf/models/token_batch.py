"""What one PPO step passes on: the rollout, the experience, and rows of prompt + response as tensors.

Rows are padded once, on the right, or joined in one row without padding. The value and the log-prob of the token at t
are both read at the position before it in the trunk's output: one index, made here, serves both (an off-by-one between
them is the classic PPO bug).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrlhf.config.errors import UserError
from fastrlhf.data.encode import Example
from fastrlhf.models import heads
from fastrlhf.models.heads import check_packing, hidden_states, right_padded
from fastrlhf_kernels import linear_log_probs


@dataclass(frozen=True)
class TokenBatch:
    """input_ids [B, L] int64, right padded; index [N] into B*L: what predicts each response token; labels [N].

    Packed: B = 1 and position_ids [1, L] restart with every sequence; else None.
    """

    input_ids: Tensor
    index: Tensor
    labels: Tensor
    position_ids: Tensor | None = None

    @classmethod
    def build(
        cls,
        prompts: Sequence[list[int]],
        responses: Sequence[list[int]],
        device: torch.device,
        *,
        packed: bool = False,
    ) -> TokenBatch:
        """N runs over the response tokens of all rows in order, so it flattens [B, T] tensors under their mask."""
        rows = [p + r for p, r in zip(prompts, responses, strict=True)]
        if packed:
            input_ids, position_ids = joined(rows, device)
            starts = accumulate(map(len, rows[:-1]), initial=0)
        else:
            input_ids, position_ids = right_padded(rows, 0, device)[0], None
            starts = range(0, input_ids.numel(), input_ids.shape[1])
        spans = [
            torch.arange(len(p) - 1, len(p) - 1 + len(r)) + start
            for start, p, r in zip(starts, prompts, responses, strict=True)
        ]
        labels = torch.tensor([token for response in responses for token in response], dtype=torch.int64)
        return cls(input_ids, torch.cat(spans).to(device), labels.to(device), position_ids)

    def hidden(self, model: PreTrainedModel) -> Tensor:
        """[N, H]: the states that predict the response tokens; nothing else reaches a head."""
        return hidden_states(model, self.input_ids, self.position_ids).flatten(0, 1)[self.index]


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
    head = heads.lm_head(model)
    hidden = heads.hidden_states(model, batch.input_ids, batch.position_ids).flatten(0, 1)[batch.index]
    return linear_log_probs(hidden, head.weight, batch.labels, **head.kwargs())


def response_log_probs(
    model: PreTrainedModel, batch: TokenBatch, temperature: float, hidden: Tensor | None = None
) -> Tensor:
    """log pi(a_t | s_t) [N] fp32 of the response tokens, at the sampling temperature; no logits tensor is made.

    hidden [N, H]: `batch.hidden(model)`, where it is known.
    """
    head = heads.lm_head(model)
    hidden = batch.hidden(model) if hidden is None else hidden
    return linear_log_probs(hidden, head.weight, batch.labels, temperature=temperature, **head.kwargs())


def resolve_packing(wanted: bool | None, models: Sequence[PreTrainedModel]) -> bool:
    """`packing` of the configuration for the models that would read packed rows.

    auto (None): all of them run a flash attention and keep sequences apart. UserError where it is wanted of a model
    that would let them see each other.
    """
    if wanted is None:
        flash = all("flash" in str(model.config._attn_implementation) for model in models)
        return flash and all(map(_keeps_apart, models))
    if wanted:
        for model in models:
            check_packing(model)
    return wanted


def _keeps_apart(model: PreTrainedModel) -> bool:
    try:
        check_packing(model)
    except UserError:
        return False
    return True


def joined(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """-> input_ids [1, sum of lengths] int64, position_ids of the same shape, which restart with every row."""
    ids = torch.tensor([[token for row in rows for token in row]], dtype=torch.int64)
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    return ids.to(device), positions.to(device)
