"""Generation over the ranks: each answers its share of the prompts, and all get the whole.

What a response is depends on its number in the whole rollout, not on the rank that sampled it; so any number of ranks
gives the same rollout. A prompt's samples stay in one rank: a reward function may compare them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrlhf.rollout.sampling import Generation
from fastrlhf.runtime import distributed


def gather_generation(part: Generation, *, values: bool) -> Generation:
    """Return what all ranks sampled, in the order of the prompts. values: whether the engine reads a critic (a rank
    without prompts cannot tell)."""
    if distributed.size() == 1:
        return part
    counts = torch.tensor(list(part.stats.values()), dtype=torch.float64)
    distributed.all_reduce_sum(counts)
    sizes = [len(ids) for ids in part.response_ids]
    lengths = distributed.gather(torch.tensor(sizes, dtype=torch.int64)).tolist()

    def whole(pieces: list[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """A piece of each response of this rank -> those of all responses."""
        return list(distributed.gather(torch.cat([torch.zeros(0, dtype=dtype), *pieces])).split(lengths))

    tokens = whole([torch.tensor(ids) for ids in part.response_ids], torch.int64)
    return Generation(
        response_ids=[ids.tolist() for ids in tokens],
        log_probs=whole(part.log_probs),
        policy_log_probs=whole(part.policy_log_probs),
        finished=distributed.gather(torch.tensor(part.finished, dtype=torch.bool)).tolist(),
        stats=dict(zip(part.stats, counts.tolist(), strict=True)),
        values=whole(part.values or []) if values else None,
    )
