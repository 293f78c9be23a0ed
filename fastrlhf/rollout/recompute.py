"""Generation without keys and values: every step reads its sequences anew, in the very forward that training runs.

For models whose cached steps are not what their plain forward gives: states of a recurrence, biases by position, masks
that only the whole batch knows. Its cost grows with the square of a sequence, so it is the second choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrlhf.models.heads import hidden_states
from fastrlhf.rollout.trunk import PREFILL_TOKENS, Prompt


class TokenCache:
    """Token ids [slots, positions], each slot one sequence from position 0; behind its end stand ids of older ones,
    which no causal model sees."""

    def __init__(self, slots: int, positions: int, device: torch.device) -> None:
        self.slots, self.positions = slots, positions
        self.tokens = torch.zeros(slots, positions, dtype=torch.int64, device=device)

    def fits(self, slots: int, positions: int, model: PreTrainedModel) -> bool:
        """Whether it serves a rollout of this size."""
        return slots <= self.slots and positions <= self.positions and self.tokens.device == model.device

    def copy(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """The first `length` tokens of each source into the slot beside it."""
        if sources:
            self.tokens[targets, :length] = self.tokens[sources, :length]


class RecomputedTrunk:
    """`CachedTrunk` over token ids alone: the same calls, the same results, no state of the model kept."""

    def __init__(self, model: PreTrainedModel, cache: TokenCache) -> None:
        self.model, self.cache = model, cache
        self.slots = torch.arange(cache.slots, device=model.device)

    def prefill(self, slot_of: Mapping[Prompt, int]) -> dict[Prompt, Tensor]:
        """Write the prompts into their slots -> each one's last hidden state [H]."""
        if not slot_of:
            return {}
        for prompt, slot in slot_of.items():
            self.cache.tokens[slot, : len(prompt)] = torch.tensor(prompt, device=self.slots.device)
        ends = torch.tensor([len(prompt) - 1 for prompt in slot_of], device=self.slots.device)
        slots = torch.tensor(list(slot_of.values()), device=self.slots.device)
        hidden = self._last(self.cache.tokens[slots, : max(map(len, slot_of))], ends)
        return dict(zip(slot_of, hidden, strict=True))

    def step(self, tokens: Tensor, lengths: Tensor, longest: int) -> Tensor:
        """One token in each of the first slots, behind `lengths` others -> hidden states [rows, H]."""
        rows = self.slots[: len(tokens)]
        self.cache.tokens[rows, lengths] = tokens
        return self._last(self.cache.tokens[: len(tokens), :longest], lengths)

    def _last(self, input_ids: Tensor, ends: Tensor) -> Tensor:
        """The hidden states [B, H] at the positions `ends` of the rows, in forwards of bounded size."""
        size = max(1, PREFILL_TOKENS // input_ids.shape[1])
        parts = zip(input_ids.split(size), ends.split(size), strict=True)
        return torch.cat([hidden_states(self.model, ids)[self.slots[: len(ids)], end] for ids, end in parts])
