"""The attention that generation uses: registered with transformers, so that unmodified models call it.

A forward of packed prompts attends inside each prompt; a decoding step attends from one token a slot to that slot's
positions. Models of transformers that do not go through its attention interface (CodeGen, which MOSS is, GPT-J ...)
keep their own attention and are given a mask instead; the engine checks such a model once against its plain forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from fastrlhf.rollout.kv_cache import Segment, SlotCache
from fastrlhf_kernels import decode_attention
from fastrlhf_kernels.layers import store_tokens

NAME = "fastrlhf"
_active: list[SlotCache] = []  # the cache of the rollout that runs
in_region: list[LayerStep] = []  # the layer whose step is compiled, while it is traced


class LayerStep:
    """What a layer's decoding step does with its cache, in a compiled region: two opaque operators.

    keys and values [slots, positions, heads, size]; slots, lengths and seen [rows], as `SlotCache.decode` has them.
    """

    def __init__(self, keys: Tensor, values: Tensor, slots: Tensor, lengths: Tensor, seen: Tensor) -> None:
        self.keys, self.values, self.slots, self.lengths, self.seen = keys, values, slots, lengths, seen
        self.products: list[tuple[Tensor, Tensor, Tensor]] = []  # input, weight, result

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x weight^T + bias, once for all that ask for it: inference graphs keep equal products apart."""
        for known, other, result in self.products:
            if known is x and other is weight:
                return result
        self.products.append((x, weight, F.linear(x, weight, bias)))
        return self.products[-1][2]

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object):
        """Store the new token's; the attention reads the store itself."""
        store_tokens(key_states[:, :, 0], value_states[:, :, 0], self.keys, self.values, self.slots, self.lengths)
        return key_states, value_states

    def attend(self, query: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
        rows = len(query)
        options = {"scale": scale, "softcap": softcap, "window": window, "validate": False}
        return decode_attention(query[:, :, 0], self.keys[:rows], self.values[:rows], self.seen, **options)[:, None]


@contextmanager
def attending(model: PreTrainedModel, cache: SlotCache) -> Iterator[None]:
    """The model's attention is ours in this context, where it has a choice, and what it was behind it, also after an
    error."""
    if not uses_interface(model):
        yield
        return
    before = model.config._attn_implementation
    _active.append(cache)
    try:
        model.set_attn_implementation(NAME)
        yield
    finally:
        _active.pop()
        model.set_attn_implementation(before)


def uses_interface(model: PreTrainedModel) -> bool:
    """Whether the model calls the attention it is configured with."""
    return model.base_model._can_set_attn_implementation()


def cache_argument(model: PreTrainedModel) -> str:
    """The name of the cache in the model's forward: `cache` from transformers 5.24 on, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model.base_model.forward).parameters else "past_key_values"


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [B, Hq, Q, D], key and value as `SlotCache` gives them -> [B, Q, Hq, D].

    Raises ValueError for attention sinks, which it does not know.
    """
    if s_aux is not None:
        raise ValueError("generation does not support attention sinks (s_aux) yet; use another model")
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    if in_region:
        return in_region[-1].attend(query, scale, sliding_window, softcap), None
    cache = _active[-1]
    cache.calls += 1
    if cache.packed is not None:
        return attend_inside_prompts(cache.packed.segments, query, key, value, scale, sliding_window, softcap), None
    window = sliding_window if sliding_window is not None and sliding_window < cache.longest else None
    if query.is_cuda and key.shape[3] == value.shape[3]:
        q, k, v = query[:, :, 0], key.transpose(1, 2), value.transpose(1, 2)
        out = decode_attention(q, k, v, cache.seen, scale=scale, softcap=softcap, window=window, validate=False)
        return out[:, None], None
    return _softmax_attention(query, key, value, cache.mask(window, query.dtype), scale, softcap).transpose(1, 2), None


def attend_inside_prompts(
    segments: list[Segment],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """query [1, Hq, columns, D], key and value [1, Hkv, columns, D] of packed prompts -> [1, columns, Hq, D].

    A segment is a batch. Behind a shorter prompt stand copies of its last token: no token looks at what comes later, so
    only they see them, and they are dropped.
    """
    out = query.new_empty(query.shape[2], query.shape[1], value.shape[3])
    for start, stop, prompts, longest, index, places in segments:
        parts = [t[0, :, start:stop] for t in (query, key, value)]  # [H, columns, D]
        if index is None:
            q, k, v = (t.unflatten(1, (prompts, longest)).transpose(0, 1) for t in parts)
        else:
            q, k, v = (t.transpose(0, 1)[index].transpose(1, 2) for t in parts)
        mask = None
        if softcap is not None or (window is not None and window < longest):
            position = torch.arange(longest, device=query.device)
            distance = position[:, None] - position
            seen = (distance >= 0) & (distance < (window or longest))
            mask = torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill_(~seen, -torch.inf)
        found = _softmax_attention(q, k, v, mask, scale, softcap).transpose(1, 2).flatten(0, 1)
        out[start:stop] = found if places is None else found[places]
    return out[None]


def _softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """softmax(softcap * tanh(scale * q k^T / softcap)) v, causal where mask is None; with a softcap, scores in fp32."""
    if softcap is None:
        options = {"attn_mask": mask, "is_causal": mask is None, "scale": scale, "enable_gqa": True}
        return F.scaled_dot_product_attention(query, key, value, **options)
    repeat = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(repeat, 1).float() for t in (key, value))
    scores = softcap * torch.tanh(scale * query.float() @ key.transpose(2, 3) / softcap) + mask.float()
    return (torch.softmax(scores, 3) @ value).to(query.dtype)


AttentionInterface.register(NAME, attend)
