"""Generation in the training process, with the very weights being trained.

Left out on purpose: beam search, repetition penalties and everything else of `generation_config`. A policy-gradient
step needs samples of the policy itself, and the log-probs they were drawn with.

A rollout is decoded in slots of a cache (`decoder.py`, `kv_cache.py`): each distinct prompt is computed once, packed
with others; a sequence that ends leaves, and one that waits takes its place. Every sequence starts at position 0 of its
slot, so a row is the same alone or in company.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. temperature 0 is greedy; top_k 0 and top_p 1 are off; stop_token_ids None: the model's own."""

    max_new_tokens: int
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: Sequence[int] | None = None
    min_new_tokens: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "n": (self.n >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "min_new_tokens": (0 <= self.min_new_tokens <= self.max_new_tokens, "between 0 and max_new_tokens"),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)}")


@dataclass
class Generation:
    """Prompt-major results, n per prompt. log_probs: of the distribution sampled from; policy_log_probs: of the whole
    vocabulary at the same temperature (what the trainer recomputes). Both lists of 1-d fp32 CPU tensors.
    finished: ended by a stop token (which is included), not by max_new_tokens. values: V(s_t) of the engine's
    value_head, like log_probs; None without one."""

    response_ids: list[list[int]]
    log_probs: list[Tensor]
    policy_log_probs: list[Tensor]
    finished: list[bool]
    stats: dict[str, float] = field(default_factory=dict)
    values: list[Tensor] | None = None
