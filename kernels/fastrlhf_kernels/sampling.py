"""The public functions that draw tokens: from logits, and from hidden states with the head behind them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, sampling_ops
from .backend import choose_backend

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
    (stream, offset) as counter gives one uniform number, and the token is found by inverse CDF. stream [B] is the id
    of the sequence (default 0..B-1), offset (a number or [B]) the position in the response.
    Order: temperature, top_k (0 or > V: off), top_p on what is left (a token is kept while the mass before it is
    < top_p); ties at a threshold are kept. temperature=0: the largest logit, lowest id first, with log_probs 0 and
    policy_log_probs of softmax(logits). A row without any finite logit gives some token and NaN log-probs.
    """
    checks.floating(logits=logits)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; expected [B, V] with V >= 1")
    triton = choose_backend(backend, logits).name == "triton"
    settings = _settings(logits, "logits", temperature, top_k, top_p, seed, offset, stream)
    return SampledTokens(*sampling_ops.sample(logits, *settings, triton))


@torch.no_grad()
def linear_sample_tokens(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    lora: checks.Lora | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int,
    offset: int | Tensor = 0,
    stream: Tensor | None = None,
    backend: str = "auto",
    validate: bool | None = None,
) -> SampledTokens:
    """`sample_tokens` of z = logit_scale * (hidden @ weight.T + bias), the last step of a decode, in fp32.

    hidden [B, H], weight [V, H], bias [V], lora = (A [r, H], B [V, r], scale) as in `linear_log_probs`; order: scale,
    softcap, temperature, filters. On a GPU the logits are not stored, unless top_k or top_p has to look at them again;
    in torch they are, in fp32. The token is the one `sample_tokens` draws from the fp32 logits, but for a uniform
    number that falls within their rounding of the edge of a token.
    """
    checks.floating(hidden=hidden, weight=weight)
    if hidden.ndim != 2:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}; expected [B, H]")
    settings = _settings(hidden, "hidden", temperature, top_k, top_p, seed, offset, stream)
    rows, weight, _, bias, _, _, scale, softcap, a, b, lora_scale = checks.head(
        hidden, weight, settings[-1], bias, 1.0, logit_scale, logit_softcap, lora, validate
    )
    triton = choose_backend(backend, hidden, weight).name == "triton"
    return SampledTokens(
        *sampling_ops.linear_sample(rows, weight, bias, scale, softcap, a, b, lora_scale, *settings, triton)
    )


def _settings(like: Tensor, of: str, temperature, top_k, top_p, seed, offset, stream) -> tuple:
    """The arguments that both functions share, checked, in the order of the operators' schema."""
    checks.number("temperature", temperature, low=0)
    checks.number("top_p", top_p)
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    for name, value in (("top_k", top_k), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} must be an int, got {type(value).__name__}")
    if top_k < 0:
        raise ValueError(f"top_k must be >= 0, got {top_k}")
    batch = like.shape[:1]
    if stream is None:
        stream = torch.arange(batch[0], device=like.device)
    if not isinstance(offset, Tensor):
        checks.number("offset", offset, low=0)
        offset = torch.full(batch, int(offset), dtype=torch.int64, device=like.device)
    checks.integers(stream=stream, offset=offset)
    checks.shapes(batch, f"the rows of {of}", stream=stream, offset=offset)
    checks.devices(**{of: like}, stream=stream, offset=offset)
    seed = (seed + WORDS // 2) % WORDS - WORDS // 2  # 64 bits, as the signed number an operator takes
    return temperature, top_k, top_p, seed, offset.long().contiguous(), stream.long().contiguous()
