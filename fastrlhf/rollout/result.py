"""What a rollout is: token rows that learning needs, texts that people and rewards need, and what the sampler said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastrlhf.data.encode import EncodedPrompt
from fastrlhf.data.feedback import Prompt
from fastrlhf.data.templates import render_prompt
from fastrlhf.models.token_batch import TokenRows
from fastrlhf.rollout.sampling import Generation
from fastrlhf.runtime import distributed


@dataclass(frozen=True)
class Texts:
    """What people and reward functions read, prompt-major. prompts: as `render_prompt` has them; raw_prompts: as
    the data has them; columns: of the data set, an entry a response."""

    prompts: list[str]
    raw_prompts: list[str | list[dict]]
    responses: list[str]
    columns: dict[str, list]

    def __getitem__(self, part: slice) -> Texts:
        columns = {name: column[part] for name, column in self.columns.items()}
        return Texts(self.prompts[part], self.raw_prompts[part], self.responses[part], columns)


@dataclass(frozen=True)
class Rollout:
    """Sampled responses to prompts, prompt-major, `samples_per_prompt` to each.

    finished: ended by a stop token. log_probs, policy_log_probs, values: lists of 1-d fp32 CPU tensors, as `Generation`
    has them; values None: no critic reads the policy's trunk. stats: counts of the engine. idle: share of the time in
    which ranks waited for the slowest of them; None: there is one.
    """

    rows: TokenRows
    texts: Texts
    samples_per_prompt: int
    finished: list[bool]
    log_probs: list[Tensor]
    policy_log_probs: list[Tensor]
    values: list[Tensor] | None
    stats: dict[str, float]
    idle: float | None = field(default=None, kw_only=True)

    @property
    def prompts(self) -> list[str]:
        return self.texts.prompts

    @property
    def responses(self) -> list[str]:
        return self.texts.responses

    @property
    def prompt_ids(self) -> list[list[int]]:
        return self.rows.prompt_ids

    @property
    def response_ids(self) -> list[list[int]]:
        return self.rows.response_ids

    def scored(self, scores: list[float | None]) -> ScoredRollout:
        """Return the same rollout with its scores."""
        return ScoredRollout(**vars(self), scores=scores)


@dataclass(frozen=True)
class ScoredRollout(Rollout):
    """A rollout and the raw score of each response; None: unscorable."""

    scores: list[float | None]


def reply_texts(tokenizer: PreTrainedTokenizerBase, generation: Generation) -> list[str]:
    """Return the replies as text, special tokens left out, and the stop token that ended a reply whether the tokenizer
    calls it special or not."""
    ended = zip(generation.response_ids, generation.finished, strict=True)
    said = [ids[:-1] if finished else ids for ids, finished in ended]
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in said]


def texts_of(asked: Sequence[Prompt], responses: list[str]) -> Texts:
    """Return what was asked, a prompt a response, and what was said; a column that a prompt lacks is None there."""
    names = sorted({name for prompt in asked for name in prompt.columns})
    return Texts(
        prompts=[render_prompt(prompt.prompt) for prompt in asked],
        raw_prompts=[prompt.prompt for prompt in asked],
        responses=responses,
        columns={name: [prompt.columns.get(name) for prompt in asked] for name in names},
    )


def make_rollout(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[EncodedPrompt],
    samples_per_prompt: int,
    generation: Generation,
    *,
    joined: bool,
    idle: float | None = None,
) -> Rollout:
    """Put together what was asked and what was sampled. joined: how `TokenRows` puts a micro-batch into rows."""
    asked = [pair for pair in prompts for _ in range(samples_per_prompt)]
    return Rollout(
        rows=TokenRows([ids for _, ids in asked], generation.response_ids, joined),
        texts=texts_of([prompt for prompt, _ in asked], reply_texts(tokenizer, generation)),
        samples_per_prompt=samples_per_prompt,
        finished=generation.finished,
        log_probs=generation.log_probs,
        policy_log_probs=generation.policy_log_probs,
        values=generation.values,
        stats=generation.stats,
        idle=idle,
    )


def gather_generation(part: Generation, shares: Sequence[Sequence[int]], samples: int, *, values: bool) -> Generation:
    """Return what all ranks sampled, in the order of the prompts. shares: each rank's prompts, with so many samples of
    each. values: whether the engine reads a critic (a rank without prompts cannot tell).

    What a response is depends on its number in the whole rollout, not on the rank that sampled it; so any number of
    ranks gives the same rollout. A prompt's samples stay in one rank: a reward function may compare them.
    """
    if distributed.size() == 1:
        return part
    counts = torch.tensor(list(part.stats.values()), dtype=torch.float64)
    distributed.all_reduce_sum(counts)
    sizes = [len(ids) for ids in part.response_ids]
    lengths = distributed.gather(torch.tensor(sizes, dtype=torch.int64)).tolist()
    rows = [prompt * samples + sample for share in shares for prompt in share for sample in range(samples)]
    order = sorted(range(len(rows)), key=rows.__getitem__)  # where each response stands in what is gathered

    def whole(pieces: list[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """A piece of each response of this rank -> those of all responses."""
        found = distributed.gather(torch.cat([torch.zeros(0, dtype=dtype), *pieces])).split(lengths)
        return [found[at] for at in order]

    tokens = whole([torch.tensor(ids) for ids in part.response_ids], torch.int64)
    finished = distributed.gather(torch.tensor(part.finished, dtype=torch.bool)).tolist()
    return Generation(
        response_ids=[ids.tolist() for ids in tokens],
        log_probs=whole(part.log_probs),
        policy_log_probs=whole(part.policy_log_probs),
        finished=[finished[at] for at in order],
        stats=dict(zip(part.stats, counts.tolist(), strict=True)),
        values=whole(part.values or []) if values else None,
    )


def idle_share(busy: float) -> float | None:
    """1 - mean / largest of the seconds that each rank was busy: the share of the time, over all of them, in which they
    waited for the slowest; None: there is one rank."""
    if distributed.size() == 1:
        return None
    seconds = distributed.gather(torch.tensor([busy], dtype=torch.float64))
    return float(1 - seconds.mean() / seconds.max().clamp(min=1e-9))
