"""Sampling: which code draws, and the operators of it, which only torch.compile needs.

A decode step calls the code itself: the dispatcher of an operator costs 0.1 ms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import chunked, inverse_cdf
from .checks import wide
from .ops import operator

COLUMNS = 16384  # of the head's weight at a time in torch, which computes in fp32
RESULTS = "float temperature, int top_k, float top_p, int seed, Tensor offset, Tensor stream, bool triton"
HEAD = (
    "Tensor hidden, Tensor weight, Tensor? bias, float logit_scale, float? logit_softcap, Tensor? lora_a, "
    "Tensor? lora_b, float lora_scale"
)


def _sample(*args):
    *rest, triton = args
    if triton:
        from .triton_sampling import draw
    else:
        from .inverse_cdf import draw
    return draw(*rest)


def _linear_sample(hidden, weight, bias, logit_scale, logit_softcap, a, b, lora_scale, *settings):
    *settings, triton = settings
    head = (hidden, weight, None, bias, 1.0, logit_scale, logit_softcap, a, b, lora_scale)
    if triton:
        from .triton_linear_sampling import Head, linear_draw

        return linear_draw(Head.build(*head), *settings)
    logits = hidden.new_empty(len(hidden), len(weight), dtype=wide(hidden, weight))
    part = chunked.Head.build(*head)
    for low, high, w in part.slices(COLUMNS):
        part.logits(w, low, high, logits[:, low:high])
    return inverse_cdf.draw(logits, *settings)


sample_operator = operator("sample_tokens", f"(Tensor logits, {RESULTS}) -> (Tensor, Tensor, Tensor)")(_sample)
linear_operator = operator("linear_sample_tokens", f"({HEAD}, {RESULTS}) -> (Tensor, Tensor, Tensor)")(_linear_sample)


def _fake(like: Tensor, dtype: torch.dtype):
    n = len(like)
    return like.new_empty(n, dtype=torch.int64), like.new_empty(n, dtype=dtype), like.new_empty(n, dtype=dtype)


@sample_operator.register_fake
def _(logits, *_):
    return _fake(logits, wide(logits))


@linear_operator.register_fake
def _(hidden, weight, *_):
    return _fake(hidden, wide(hidden, weight))


def sample(*args):
    """(tokens, log_probs, policy_log_probs); arguments as in the operator's schema."""
    return (sample_operator if torch.compiler.is_compiling() else _sample)(*args)


def linear_sample(*args):
    """The same from hidden states."""
    if torch.compiler.is_compiling():
        return linear_operator(*args)
    with torch.autocast(args[0].device.type, enabled=False):
        return _linear_sample(*args)
