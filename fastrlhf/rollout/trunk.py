"""A model's trunk over a cache of slots: prompts into their slots, then a token a slot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrlhf.models.token_batch import joined
from fastrlhf.rollout.attention import cache_argument, uses_interface
from fastrlhf.rollout.compiled import Regions
from fastrlhf.rollout.fused import fused
from fastrlhf.rollout.kv_cache import Packed, SlotCache

PREFILL_TOKENS = 8192  # prompts of one forward; a longer prompt goes alone
RAGGED = 2.0  # times the shortest prompt that attends in one call the longest may be: less than half is padding
Prompt = tuple[int, ...]


class CachedTrunk:
    """The trunk of `model`, run with `cache` for its keys and values, where the model attends our way (`attending`)."""

    def __init__(self, model: PreTrainedModel, cache: SlotCache, regions: Regions | None = None) -> None:
        """regions: the compiled layers that decode; prompts go through the model's own."""
        self.model, self.cache, self.regions = model, cache, regions
        self.interface, self.argument = uses_interface(model), cache_argument(model)
        self.slots = torch.arange(cache.slots, device=model.device)

    def prefill(self, slot_of: Mapping[Prompt, int]) -> dict[Prompt, Tensor]:
        """Keys and values of the prompts into their slots -> each one's last hidden state [H]."""
        with nullcontext() if self.regions is None else fused(self.model):
            return self._prefill_all(slot_of)

    def _prefill_all(self, slot_of: Mapping[Prompt, int]) -> dict[Prompt, Tensor]:
        states: dict[Prompt, Tensor] = {}
        for chunk in _chunks(slot_of):
            # Packed prompts need our attention; a model with its own gets one length at a time, which needs no mask.
            parts = [chunk] if self.interface else [list(same) for _, same in groupby(chunk, len)]
            for prompts in parts:
                states |= self._prefill(prompts, slot_of)
        return states

    def _prefill(self, prompts: list[Prompt], slot_of: Mapping[Prompt, int]) -> dict[Prompt, Tensor]:
        """prompts: sorted by length."""
        # A GPU waits for launches, so prompts of like lengths attend together; a CPU would compute the padding.
        ragged = RAGGED if self.model.device.type == "cuda" else 1.0
        slots = [slot_of[prompt] for prompt in prompts]
        self.cache.prefill(Packed.of([len(prompt) for prompt in prompts], slots, self.model.device, ragged))
        ids, positions = joined(prompts, self.model.device)
        rows, before = 1 if self.interface else len(prompts), self.cache.calls
        hidden = self._forward(ids.view(rows, -1), positions.view(rows, -1)).flatten(0, 1)
        calls, layers = self.cache.calls - before, len(self.cache.layers)
        if self.interface and calls != layers:
            raise RuntimeError(
                f"{type(self.model).__name__} called its attention {calls} times for {layers} layers: it does not "
                "attend the way generation needs, and its tokens would be wrong"
            )
        ends = torch.tensor([len(prompt) for prompt in prompts], device=hidden.device).cumsum(0) - 1
        return dict(zip(prompts, hidden[ends], strict=True))

    def step(self, tokens: Tensor, lengths: Tensor, longest: int) -> Tensor:
        """One token in each of the first slots, behind `lengths` others -> hidden states [rows, H].

        No length + 1 is more than `longest`, a number that the host knows without waiting for the device. A CUDA graph
        may replay the step: it reads and writes fixed addresses only.
        """
        self.cache.decode(self.slots[: len(tokens)], lengths, longest)
        mask = {} if self.interface else {"attention_mask": self.cache.mask(None, self.model.dtype)}
        with nullcontext() if self.regions is None else self.regions.active(self.cache):
            return self._forward(tokens[:, None], lengths[:, None].clone(), **mask)[:, -1]

    def _forward(self, input_ids: Tensor, position_ids: Tensor, **mask: Tensor) -> Tensor:
        inputs = {"input_ids": input_ids, "position_ids": position_ids, self.argument: self.cache}
        return self.model.base_model(**inputs, **mask, use_cache=True).last_hidden_state


def _chunks(prompts: Mapping[Prompt, int]) -> Iterator[list[Prompt]]:
    """Prompts in the order of their lengths, at most PREFILL_TOKENS together."""
    chunk: list[Prompt] = []
    room = PREFILL_TOKENS
    for prompt in sorted(prompts, key=len):
        if chunk and len(prompt) > room:
            yield chunk
            chunk, room = [], PREFILL_TOKENS
        chunk.append(prompt)
        room -= len(prompt)
    if chunk:
        yield chunk
