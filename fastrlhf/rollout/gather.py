"""Rollout and scoring over the ranks: each answers and scores its share of the prompts, and all get the whole.

What a response is depends on its number in the whole rollout, not on the rank that sampled it; so any number of ranks
gives the same rollout. A prompt's samples stay in one rank: a reward function may compare them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrlhf.rollout.engine import RolloutEngine
from fastrlhf.rollout.sampling import Generation, SamplingParams
from fastrlhf.runtime import batching, distributed


def generate(engine: RolloutEngine, prompt_ids: list[list[int]], params: SamplingParams) -> Generation:
    """`engine.generate` of all prompts, in the order of the prompts, in every rank."""
    mine = batching.share(len(prompt_ids))
    part = engine.generate(prompt_ids[mine], params, first=mine.start)
    if distributed.size() == 1:
        return part
    counts = torch.tensor(list(part.stats.values()), dtype=torch.float64)
    distributed.add_up(counts)
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
        values=None if part.values is None else whole(part.values),
    )
