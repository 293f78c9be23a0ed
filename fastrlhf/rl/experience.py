"""What one PPO step passes on: the rollout, the experience, and rows of prompt + response as tensors.

Rows are padded once, on the right, or joined in one row without padding. The value and the log-prob of the token at t
are both read at the position before it in the trunk's output: one index, made here, serves both (an off-by-one between
them is the classic PPO bug).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastrlhf.models.token_batch import TokenBatch
from fastrlhf.runtime import batching
from fastrlhf.runtime.batching import micro_batches


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
    packed: bool = False  # how `tokens` puts rows together

    def tokens(self, rows: list[int], device: torch.device) -> TokenBatch:
        """These rows as tensors."""
        prompts, responses = ([ids[i] for i in rows] for ids in (self.prompt_ids, self.response_ids))
        return TokenBatch.build(prompts, responses, device, packed=self.packed)

    def micro_batches(self, rows: Sequence[int], budget: int) -> list[list[int]]:
        """This rank's share of these rows in groups of at most `budget` tokens. Depends on which they are, not on their
        order."""
        lengths = {row: len(self.prompt_ids[row]) + len(self.response_ids[row]) for row in sorted(rows)}
        mine = [list(lengths)[i] for i in batching.own(list(lengths.values()))]
        groups = micro_batches([lengths[row] for row in mine], budget, packed=self.packed)
        return [[mine[i] for i in group] for group in groups]


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


def length_mask(lengths: Sequence[int], device: torch.device) -> Tensor:
    """[B, T] bool, true on the first lengths[b] entries of row b."""
    sizes = torch.tensor(lengths, device=device)
    return torch.arange(int(sizes.max()), device=device) < sizes[:, None]


def scatter(flat: Tensor, mask: Tensor) -> Tensor:
    """[N] back to [B, T] fp32, zero outside the mask."""
    return torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_scatter_(mask, flat.float())
