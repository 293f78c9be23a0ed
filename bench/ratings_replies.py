"""Replies to the held-out prompts of `python -m bench.ratings`, and what two reward models say of them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bench.ratings_data import PROMPTS
from fastrlhf.data.templates import encode_prompt, stop_token_ids
from fastrlhf.eval.statistics import estimate
from fastrlhf.models.loading import load_reward_model
from fastrlhf.models.token_batch import TokenRows, target_log_probs
from fastrlhf.rl.evaluation import best_of_n_kl, expected_best
from fastrlhf.rl.scorers import score_rows
from fastrlhf.rollout.engine import RolloutEngine
from fastrlhf.rollout.sampling import SamplingParams
from fastrlhf.runtime.batching import derive_seed
from fastrlhf.runtime.memory import token_budget
from fastrlhf.runtime.metrics import distinct_2

SHOWN = 3  # samples of a model in the report
KL_ROWS = 32


@dataclass
class Judge:
    """A reward model, in people's units: the line that reads their mean rating off its score on the test part.

    It learnt from whole sentences, so a reply that was cut off is none that it can judge: its rating is None. worst:
    its lowest score of a test sentence, which a cut reply has in training.
    """

    folder: Path
    slope: float
    offset: float
    worst: float

    @cached_property
    def model(self) -> PreTrainedModel:
        return load_reward_model(str(self.folder)).eval()

    def __call__(self, rows: TokenRows, finished: Sequence[bool]) -> list[float | None]:
        """The rating of each reply."""
        ids = [p + r for p, r in zip(rows.prompt_ids, rows.response_ids, strict=True)]
        return self.ratings(score_rows(self.model, ids, token_budget(None, self.model.device)).tolist(), finished)

    def ratings(self, scores: Sequence[float], finished: Sequence[bool]) -> list[float | None]:
        """The same of scores that are known."""
        return [self.slope * s + self.offset if done else None for s, done in zip(scores, finished, strict=True)]


@dataclass
class Replies:
    """What a model said to the held-out prompts, prompt-major, `samples` to each, in ids and as texts; finished: not
    cut off."""

    rows: TokenRows
    texts: list[str]
    finished: list[bool]
    samples: int

    def groups(self, *values: Sequence[Any]) -> list[tuple[list[Any], ...]]:
        """Of each prompt, the values of its replies that are not None."""
        starts = range(0, len(self.texts), self.samples)
        whole = ([one[i : i + self.samples] for one in values] for i in starts)
        return [tuple([v for v in part if v is not None] for part in some) for some in whole]


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: int, options: argparse.Namespace
) -> Replies:
    """Sampled at temperature 1, the same random numbers for every model."""
    prompts = [encode_prompt(tokenizer, prompt) for prompt in PROMPTS["held out"]]
    params = SamplingParams(
        options.new_tokens,
        n=samples,
        stop_token_ids=stop_token_ids(tokenizer, model.generation_config),
        seed=derive_seed(options.seed, "held out"),
    )
    said = RolloutEngine(model, tokenizer).generate(prompts, params)
    asked = [ids for ids in prompts for _ in range(samples)]
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in said.response_ids]
    texts = [text if done else f"{text} …" for text, done in zip(texts, said.finished, strict=True)]
    return Replies(TokenRows(asked, said.response_ids), texts, said.finished, samples)


def worth(replies: Replies, values: dict[str, list[float | None]]) -> dict[str, Any]:
    """values: proxy, gold and KL of each reply -> their means with standard errors over prompts, and first samples."""
    found: dict[str, Any] = {name: estimate(some, replies.samples) for name, some in values.items()}
    shown = [n * replies.samples for n in range(SHOWN)]
    return found | {
        "replies": len(replies.texts),
        "finished": fmean(map(float, replies.finished)),
        "length": fmean(map(len, replies.rows.response_ids)),
        "distinct2": distinct_2(replies.texts),
        "samples": [sample(replies, values, n) for n in shown],
    }


def sample(replies: Replies, values: dict[str, list[float | None]], n: int) -> dict[str, Any]:
    prompt = PROMPTS["held out"][n // replies.samples].strip()
    return {"prompt": prompt, "reply": replies.texts[n], "proxy": values["proxy"][n], "gold": values["gold"][n]}


@torch.no_grad()
def log_probs(model: PreTrainedModel, replies: Replies) -> list[float]:
    """The summed log-prob of each reply."""
    found: list[float] = []
    for first in range(0, len(replies.texts), KL_ROWS):
        rows = replies.rows[first : first + KL_ROWS]
        tokens = target_log_probs(model, rows.batch(range(len(rows)), model.device)).double()
        found += [float(part.sum()) for part in tokens.split([len(ids) for ids in rows.response_ids])]
    return found


def best_of_curve(groups: Sequence[tuple[Sequence[float], ...]], most: int) -> list[dict[str, Any]]:
    """groups: of each prompt, ratings of its replies by proxy and gold -> a row for n = 1, 2, 4, ... up to `most`: the
    bound of the KL, the expected proxy of the reply with the highest one, and the expected gold of that same reply. A
    prompt with fewer than n replies counts not."""
    rows, n = [], 1
    while n <= most:
        some = [(by, values) for by, values in groups if len(by) >= n]
        proxy = [expected_best(by, n) for by, _ in some]
        gold = [expected_best_by(by, values, n) for by, values in some]
        row = {"n": n, "prompts": len(some), "kl": best_of_n_kl(n)}
        rows.append(row | {"proxy": estimate(proxy, 1), "gold": estimate(gold, 1)})
        n *= 2
    return rows


def expected_best_by(by: Sequence[float], values: Sequence[float], n: int) -> float:
    """Mean, over all subsets of n of the N replies, of the value of the one with the highest `by` (see
    `expected_best`)."""
    order = sorted(range(len(by)), key=by.__getitem__)
    subsets = math.comb(len(by), n)
    return sum(math.comb(i, n - 1) / subsets * values[own] for i, own in enumerate(order))
