"""The engine's cache of keys and values: slots of fixed size, each holding one sequence from position 0.

Sequences start at position 0 of their slot, as they do in training: no left padding, no shifted positions, and a slot
is reused by starting over. What lies behind a sequence's length is finite garbage that attention leaves out.
transformers' own static cache has one length for the whole batch; here every slot has its own.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from fastrlhf_kernels.layers import store_tokens


class Segment(NamedTuple):
    """Prompts that attend in one call: columns start to stop of the packed row, each prompt behind the one before.

    index [prompts, longest] int64: the column of each token, counted from start, and behind a shorter prompt that of
    any; places [stop - start] int64: where in the flattened index each column stands. None where all are as long.
    """

    start: int
    stop: int
    prompts: int
    longest: int
    index: Tensor | None
    places: Tensor | None


class Packed(NamedTuple):
    """Prompts of a forward, in the order of their lengths in one row; slots and positions [columns] int64: where in the
    cache each token goes."""

    segments: list[Segment]
    slots: Tensor
    positions: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], slots: Sequence[int], device: torch.device, ragged: float) -> Packed:
        """lengths: in order. ragged: how many times as long as its shortest the longest prompt of a segment may be.

        Made on the host and copied at once: nothing in the forward waits, however many lengths there are.
        """
        counts = torch.tensor(lengths)
        positions = torch.cat([torch.arange(length) for length in lengths])
        starts = [0, *counts.cumsum(0).tolist()]
        segments, first = [], 0
        while first < len(lengths):
            last = first
            while last + 1 < len(lengths) and lengths[last + 1] <= ragged * lengths[first]:
                last += 1
            longest, count, start = lengths[last], last + 1 - first, starts[first]
            index = places = None
            if lengths[first] != longest:
                begins = torch.tensor(starts[first : last + 1])[:, None] - start
                column = torch.arange(longest)
                index = begins + column.minimum(counts[first : last + 1, None] - 1)
                places = (torch.arange(count)[:, None] * longest + column)[column < counts[first : last + 1, None]]
                index, places = (t.to(device, non_blocking=True) for t in (index, places))
            segments.append(Segment(start, starts[last + 1], count, longest, index, places))
            first = last + 1
        where = torch.tensor(slots).repeat_interleave(counts)
        return cls(segments, *(t.to(device, non_blocking=True) for t in (where, positions)))


class _Layer(CacheLayerMixin):
    """Keys and values [slots, positions, heads, size] of one layer."""

    is_sliding = False  # a window is the attention's business: all positions are kept

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        # The cache owns its layers. Were they to own it too, its memory would stay until Python looks for circles.
        self.cache = weakref.proxy(cache)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        size = (self.cache.slots, self.cache.positions, key_states.shape[1])
        # Zeros: 0 * NaN at a position that is masked would still be NaN.
        self.keys = key_states.new_zeros(*size, key_states.shape[3])
        self.values = value_states.new_zeros(*size, value_states.shape[3])
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Store [rows, heads, new, size]; returns what the queries may look at, in the same layout."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache = self.cache
        if cache.packed is not None:
            for states, store in ((key_states, self.keys), (value_states, self.values)):
                store[cache.packed.slots, cache.packed.positions] = states.transpose(1, 2).flatten(0, 1)
            return key_states, value_states
        token = (key_states[:, :, 0], value_states[:, :, 0])
        store_tokens(*token, self.keys, self.values, cache.rows, cache.lengths)
        seen = (slice(len(cache.rows)), slice(cache.longest))
        return self.keys[seen].transpose(1, 2), self.values[seen].transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length if self.cache.packed is not None else self.cache.longest), 0

    def get_seq_length(self) -> int:
        return 0 if self.cache.packed is not None else self.cache.longest - 1

    def get_max_length(self) -> int:
        return self.cache.positions

    get_max_cache_shape = get_max_length  # its older name, abstract in transformers 5.11


class SlotCache(Cache):
    """The cache of all layers, and what their attention must know of the forward that runs.

    `prefill(packed)` before a forward of packed prompts, `decode(...)` before one of a token a slot.
    """

    def __init__(self, layers: int, slots: int, positions: int) -> None:
        super().__init__(layers=[_Layer(self) for _ in range(layers)])
        self.slots, self.positions = slots, positions
        self.packed: Packed | None = None
        self.rows = self.lengths = self.seen = None
        self.longest = 0
        self.calls = 0  # of the attention: one a layer and forward
        self._masks: dict[int | None, Tensor] = {}

    def fits(self, slots: int, positions: int, model: PreTrainedModel) -> bool:
        """Whether it serves a rollout of this size; one more than twice as large is not worth keeping."""
        keys = self.layers[0].keys
        if keys is not None and (keys.dtype, keys.device) != (model.dtype, model.device):
            return False
        enough = slots <= self.slots and positions <= self.positions
        return enough and self.slots * self.positions <= 2 * slots * positions

    def prefill(self, packed: Packed) -> None:
        self.packed = packed

    def decode(self, rows: Tensor, lengths: Tensor, longest: int) -> None:
        """rows: arange of the slots that decode; lengths [rows]: tokens each slot holds; longest: no length + 1 is
        more (a number that the host knows without waiting)."""
        self.packed, self.rows, self.lengths, self.longest = None, rows, lengths, longest
        self.seen = lengths + 1  # with the new token, which looks at itself too
        self._masks.clear()

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """[rows, 1, 1, longest], 0 where the new token may look and -inf elsewhere; one a step and window."""
        if window not in self._masks:
            positions = torch.arange(self.longest, device=self.lengths.device)
            hidden = positions > self.lengths[:, None]
            if window is not None:
                hidden |= positions <= self.lengths[:, None] - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -math.inf)
            self._masks[window] = mask[:, None, None]
        return self._masks[window]

    def copy(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """The first `length` positions of each source into the slot beside it: prompts for their other samples, slots
        that move. No slot is both. All in two launches a store, however many there are."""
        if not sources:
            return
        device = self.layers[0].keys.device
        taken, written = (torch.tensor(slots).to(device, non_blocking=True) for slots in (sources, targets))
        for layer in self.layers:
            for store in (layer.keys, layer.values):
                store[written, :length] = store[taken, :length]


def cache_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of keys and values of one position in all layers; of a model without attention, next to nothing."""
    config = model.config.get_text_config()
    if not getattr(config, "num_attention_heads", None):
        return model.dtype.itemsize
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    # Read by name, a width that differs between layers is an error of transformers.
    width = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
