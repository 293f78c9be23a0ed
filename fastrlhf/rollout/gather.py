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
    lengths = distributed.gather(torch.tensor([len(ids) for ids in part.response_ids], dtype=torch.int64)).tolist()
    tokens = [token for ids in part.response_ids for token in ids]
    counts = torch.tensor(list(part.stats.values()), dtype=torch.float64)
    distributed.add_up(counts)

    def whole(pieces: list[Tensor] | None) -> list[Tensor] | None:
        if engine.value_head is None and pieces is None:
            return None
        return list(distributed.gather(torch.cat([torch.zeros(0), *pieces])).split(lengths))

    return Generation(
        response_ids=[
            ids.tolist() for ids in distributed.gather(torch.tensor(tokens, dtype=torch.int64)).split(lengths)
        ],
        log_probs=whole(part.log_probs),
        policy_log_probs=whole(part.policy_log_probs),
        finished=distributed.gather(torch.tensor(part.finished, dtype=torch.bool)).tolist(),
        stats=dict(zip(part.stats, counts.tolist(), strict=True)),
        values=whole(part.values),
    )
