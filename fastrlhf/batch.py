"""What one PPO step passes on: the rollout, the experience, and rows of prompt + response as tensors.

Rows are padded once, on the right. The value and the log-prob of the token at t are both read at position t - 1 of the
trunk's output: one index, made here, serves both (an off-by-one between them is the classic PPO bug).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrlhf.models import hidden_states, right_padded


@dataclass
class Rollout:
    """Prompts and sampled responses of one step, prompt-major. Token ids are the sampled ones, never re-encoded."""

    prompts: list[str]
    raw_prompts: list[str | list[dict]]
    samples_per_prompt: int
    columns: dict[str, list]
    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    responses: list[str]
    finished: list[bool]
    log_probs: list[Tensor]
    policy_log_probs: list[Tensor]
    values: list[Tensor] | None = None  # of a critic on the policy's trunk
    scores: list[float | None] = field(default_factory=list)
    token_rewards: list[Tensor] | None = None  # of per-token reward functions; they sum to the scores

    def tokens(self, rows: list[int], device: torch.device) -> TokenBatch:
        """These rows as tensors."""
        return TokenBatch.build([self.prompt_ids[i] for i in rows], [self.response_ids[i] for i in rows], device)


@dataclass
class Experience:
    """What the update needs, all [B, T], fp32 and zero outside the masks.

    token_mask: every response token; response_mask: those that count (rows without a score do not).
    """

    token_mask: Tensor

    response_mask: Tensor
    old_log_probs: Tensor
    ref_log_probs: Tensor
    values: Tensor | None
    advantages: Tensor
    returns: Tensor
    weights: Tensor | None = None  # truncated importance weights of the tokens

    def take(self, rows: list[int]) -> Callable[[Tensor], Tensor]:
        """-> a function from [B, T] to the [N] response tokens of these rows, in the order of TokenBatch."""
        own = self.token_mask[rows]
        return lambda tensor: tensor[rows][own]


class MiniBatch(NamedTuple):
    """The rows of one optimizer step: those of all ranks, and this rank's own as micro-batches."""

    rows: list[int]
    groups: list[list[int]]


@dataclass(frozen=True)
class TokenBatch:
    """input_ids [B, L] int64, right padded; index [N] into B*L: what predicts each response token; labels [N]."""

    input_ids: Tensor
    index: Tensor
    labels: Tensor

    @classmethod
    def build(cls, prompts: Sequence[list[int]], responses: Sequence[list[int]], device: torch.device) -> TokenBatch:
        """N runs over the response tokens of all rows in order, so it flattens [B, T] tensors under their mask."""
        input_ids, _ = right_padded([p + r for p, r in zip(prompts, responses, strict=True)], 0, device)
        width = input_ids.shape[1]
        spans = [
            torch.arange(len(p) - 1, len(p) - 1 + len(r)) + row * width
            for row, (p, r) in enumerate(zip(prompts, responses, strict=True))
        ]
        labels = torch.tensor([token for response in responses for token in response], dtype=torch.int64)
        return cls(input_ids, torch.cat(spans).to(device), labels.to(device))

    def hidden(self, model: PreTrainedModel) -> Tensor:
        """[N, H]: the states that predict the response tokens; nothing else reaches a head."""
        return hidden_states(model, self.input_ids).flatten(0, 1)[self.index]


def length_mask(lengths: Sequence[int], device: torch.device) -> Tensor:
    """[B, T] bool, true on the first lengths[b] entries of row b."""
    sizes = torch.tensor(lengths, device=device)
    return torch.arange(int(sizes.max()), device=device) < sizes[:, None]


def scatter(flat: Tensor, mask: Tensor) -> Tensor:
    """[N] back to [B, T] fp32, zero outside the mask."""
    return torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_scatter_(mask, flat.float())


def minibatches(count: int, size: int, order: Sequence[int]) -> list[list[int]]:
    """`order` (a permutation of 0..count-1) cut into pieces of `size`; the last may be smaller, none is dropped."""
    edges = [*range(0, count, size), count]
    return [list(order[a:b]) for a, b in pairwise(edges)]
