"""`sample_tokens`: a token for each row of logits, which depends on that row and on (seed, stream, offset) only."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .backend import choose_backend
from .operands import operator

WORDS = 1 << 64


class SampledTokens(NamedTuple):
    """tokens [B] int64, log_probs [B] of the distribution drawn from, policy_log_probs [B] of softmax(logits / T)."""

    tokens: Tensor
    log_probs: Tensor
    policy_log_probs: Tensor


@torch.no_grad()
def sample_tokens(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int,
    offset: int | Tensor = 0,
    stream: Tensor | None = None,
    backend: str = "auto",
    validate: bool | None = None,
) -> SampledTokens:
    """Draw one token for each row of logits [B, V].

    The token depends only on its logits row and on (seed, stream, offset): Philox4x32-10 with the seed as key and
    (stream, offset) as counter gives one uniform number, and the token is found by inverse CDF. The seed may be any
    int: its lowest 64 bits count. stream [B] is the id of the sequence (default 0..B-1), offset (a number or [B]) the
    position in the response.
    Order: temperature, top_k (0 or > V: off), top_p on what is left (a token is kept while the mass before it is
    < top_p); ties at a threshold are kept. temperature=0: the largest logit, lowest id first, with log_probs 0 and
    policy_log_probs of softmax(logits). A row without any finite logit gives some token and NaN log-probs.
    """
    checks.floating(logits=logits)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; expected [B, V] with V >= 1")
    triton = choose_backend(backend, logits).name == "triton"
    checks.number("temperature", temperature, low=0)
    checks.number("top_p", top_p)
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    for name, value in (("top_k", top_k), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} must be an int, got {type(value).__name__}")
    if top_k < 0:
        raise ValueError(f"top_k must be >= 0, got {top_k}")
    batch = logits.shape[:1]
    if stream is None:
        stream = torch.arange(batch[0], device=logits.device)
    if not isinstance(offset, Tensor):
        checks.number("offset", offset, low=0)
        offset = torch.full(batch, int(offset), dtype=torch.int64, device=logits.device)
    checks.integers(stream=stream, offset=offset)
    checks.shapes(batch, "the rows of logits", stream=stream, offset=offset)
    checks.devices(logits=logits, stream=stream, offset=offset)
    seed = (seed + WORDS // 2) % WORDS - WORDS // 2  # 64 bits, as the signed number an operator takes
    places = (offset.long().contiguous(), stream.long().contiguous())
    return SampledTokens(*draw.direct(logits, temperature, top_k, top_p, seed, *places, triton))


@operator(returns=3, name="sample_tokens")
def draw(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    offset: Tensor,
    stream: Tensor,
    triton: bool,
):
    """tokens, log_probs and policy_log_probs, each [B]."""
    if triton:
        from .gpu.sampling import draw
    else:
        from .eager.inverse_cdf import draw
    return draw(logits, temperature, top_k, top_p, seed, offset, stream)


@draw.fake
def _(logits, **_):
    tokens = logits.new_empty(len(logits), dtype=torch.int64)
    return tokens, *(tokens.new_empty(len(logits), dtype=checks.wide(logits)) for _ in range(2))
