"""Rollout and scoring over the ranks: each answers and scores its share of the prompts, and all get the whole.

What a response is depends on its number in the whole rollout, not on the rank that sampled it; so any number of ranks
gives the same rollout. A prompt's samples stay in one rank: a reward function may compare them.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace

import torch
from torch import Tensor

from fastrlhf import distributed
from fastrlhf.rewards import FunctionScorer, RewardModelScorer, Scorable
from fastrlhf.rollout import Generation, RolloutEngine, SamplingParams


def generate(engine: RolloutEngine, prompt_ids: list[list[int]], params: SamplingParams) -> Generation:
    """`engine.generate` of all prompts, in the order of the prompts, in every rank."""
    mine = distributed.share(len(prompt_ids))
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


def score(scorer: RewardModelScorer | FunctionScorer, batch: Scorable, samples_per_prompt: int) -> list[float | None]:
    """The scorer's scores of all responses, in every rank."""
    if distributed.size() == 1:
        return scorer(batch)
    prompts = distributed.share(len(batch.responses) // samples_per_prompt)
    mine = slice(prompts.start * samples_per_prompt, prompts.stop * samples_per_prompt)
    lists = {f.name: getattr(batch, f.name)[mine] for f in fields(batch) if f.name != "columns"}
    part = replace(batch, **lists, columns={name: column[mine] for name, column in batch.columns.items()})
    found = scorer(part) if part.responses else []
    if scorer.per_token:
        lengths = [len(ids) for ids in batch.response_ids]
        rows = [[math.nan] * n if r is None else r for r, n in zip(found, lengths[mine], strict=True)]
        flat = torch.tensor([value for row in rows for value in row], dtype=torch.float64)
        whole = [part.tolist() for part in distributed.gather(flat).split(lengths)]
        return [None if math.isnan(row[0]) else row for row in whole]
    scores = torch.tensor([math.nan if s is None else s for s in found], dtype=torch.float64)
    return [None if math.isnan(s) else s for s in distributed.gather(scores).tolist()]
