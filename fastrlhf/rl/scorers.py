"""Scoring of responses: a reward model, a Python function, or a weighted sum of named functions.

A reward function is `reward(prompts, responses, **columns) -> list[float | None]`: texts in (special tokens skipped),
one number a response out, None for a response it cannot judge. Columns of the prompt data set are passed by name to
functions that accept them. One with a parameter `response_ids` gets the sampled token ids under that name, and may
return for a response a list instead: a number for each of its tokens, the stop token included. A plain number is the
reward of the last token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.config.errors import UserError
from fastrlhf.data.templates import encode_prompt, encode_response, resolve_chat_template
from fastrlhf.models.adapter_folder import AdapterFolder
from fastrlhf.models.heads import sequence_scores
from fastrlhf.models.loading import load_reward_model, load_tokenizer
from fastrlhf.models.lora import REWARD, Adapters
from fastrlhf.rl.functions import UserFunction, is_function_reference, load_function, name_of
from fastrlhf.runtime import batching, distributed
from fastrlhf.runtime.batching import micro_batches
from fastrlhf.runtime.memory import Backoff, token_budget

RewardFunction = Callable[..., Sequence[float | None | Sequence[float]]]
Reward = float | None | list[float]  # of a response: on its last token, none, or on each token


@dataclass(frozen=True)
class Scorable:
    """What a scorer may look at, prompt-major. texts for functions, ids for a reward model of the same tokenizer."""

    prompts: list[str]
    responses: list[str]
    raw_prompts: list[str | list[dict]]
    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    columns: dict[str, list]


class RewardModelScorer:
    """Scores with a sequence classifier: the policy's own token ids if the tokenizers agree, else re-encoded text.

    model None: `over` gives it later, the reward model is an adapter on the policy's base.
    """

    name, per_token = "reward model", False

    def __init__(
        self,
        model: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase,
        policy_tokenizer: PreTrainedTokenizerBase,
        micro_batch_tokens: int | None,
    ) -> None:
        self.model = None if model is None else model.eval().requires_grad_(False)
        self.adapters: Adapters | None = None
        self.head: nn.Linear | None = None
        self.micro_batch_tokens = micro_batch_tokens
        self.tokenizer = tokenizer
        self.same_tokenizer = tokenizer.get_vocab() == policy_tokenizer.get_vocab()
        self.backoff: Backoff | None = None  # of the run that it scores for

    def over(self, adapters: Adapters, folder: AdapterFolder) -> None:
        """Score with the reward adapter of a folder, over the base that `adapters` are on."""
        adapters.add(REWARD, folder)
        self.adapters = adapters
        self.head = nn.Linear(folder.head["weight"].shape[1], 1, bias="bias" in folder.head).requires_grad_(False)
        self.head.load_state_dict(folder.head)
        self.head.to(adapters.model.device)

    def __call__(self, batch: Scorable) -> list[float | None]:
        if self.same_tokenizer:
            rows = [p + r for p, r in zip(batch.prompt_ids, batch.response_ids, strict=True)]
        else:
            pairs = zip(batch.raw_prompts, batch.responses, strict=True)
            rows = [encode_prompt(self.tokenizer, p) + encode_response(self.tokenizer, p, r) for p, r in pairs]
        backoff = self.backoff
        with nullcontext(self.model) if self.adapters is None else self.adapters.using(REWARD) as model:
            if backoff is None:
                budget = token_budget(self.micro_batch_tokens, model.device)
                return score_rows(model, rows, budget, self.head).tolist()
            return backoff.attempt(lambda: score_rows(model, rows, backoff.tokens, self.head)).tolist()


def score_rows(model: PreTrainedModel, rows: list[list[int]], budget: int, head: nn.Linear | None = None) -> Tensor:
    """Scores [B] fp32 on the CPU, computed in micro-batches of at most `budget` padded tokens; head None: `score`."""
    scores = torch.empty(len(rows), dtype=torch.float32)
    for group in micro_batches([len(row) for row in rows], budget):
        with torch.inference_mode():
            found = sequence_scores(model, [rows[i] for i in group], head)
        scores[group] = found.cpu()
    return scores


class FunctionScorer:
    """A weighted sum of reward functions. A response one of them cannot judge (None) is judged by none.

    per_token: one of them takes `response_ids`; the rewards are then lists, a number for each token.
    """

    model: PreTrainedModel | None = None  # it has none

    def __init__(self, functions: Sequence[tuple[str, float, RewardFunction]]) -> None:
        self.functions = [(UserFunction(f"reward function {name}", fn, 2), weight) for name, weight, fn in functions]
        self.name = " + ".join(name for name, *_ in functions)
        self.per_token = any(function.takes("response_ids") for function, _ in self.functions)

    def __call__(self, batch: Scorable) -> list[Reward]:
        count = len(batch.responses)
        totals, tokens = [0.0] * count, [[0.0] * len(ids) for ids in batch.response_ids]
        judged = [True] * count
        for function, weight in self.functions:
            for i, reward in enumerate(_rewards(function, batch)):
                if reward is None:
                    judged[i] = False
                elif isinstance(reward, list):
                    tokens[i] = [sum_ + weight * part for sum_, part in zip(tokens[i], reward, strict=True)]
                else:
                    totals[i] += weight * reward
        if self.per_token:
            for own, total in zip(tokens, totals, strict=True):
                own[-1] += total
        rewards = tokens if self.per_token else totals
        return [reward if known else None for reward, known in zip(rewards, judged, strict=True)]


def _rewards(function: UserFunction, batch: Scorable) -> list[Reward]:
    """One call, checked: numbers, None, or (from a function that sees the tokens) lists of a number for each token."""
    given = function.takes("response_ids")
    columns = batch.columns | ({"response_ids": batch.response_ids} if given else {})
    found = function(batch.prompts, batch.responses, **columns)
    return [_checked(function, i, r, len(batch.response_ids[i]) if given else None) for i, r in enumerate(found)]


def _checked(function: UserFunction, index: int, reward: object, tokens: int | None) -> Reward:
    if reward is None:
        return None
    parts = reward.tolist() if hasattr(reward, "tolist") else reward
    if tokens is None or not isinstance(parts, (list, tuple)):
        return function.number(index, reward)
    if len(parts) != tokens:
        raise UserError(
            f"{function.what}, sample {index}: returned {len(parts)} token rewards for {tokens} response tokens; "
            "return one for each, the stop token included"
        )
    return [function.number(index, part, t) for t, part in enumerate(parts)]


def split_rewards(rewards: list[Reward], response_ids: list[list[int]]) -> tuple[list[float | None], list[Tensor]]:
    """-> scores (the sum over the tokens; None stays None), token rewards (1-d fp32 each; zeros where None)."""
    scores = [sum(reward) if isinstance(reward, list) else reward for reward in rewards]
    tokens = []
    for reward, ids in zip(rewards, response_ids, strict=True):
        own = reward if isinstance(reward, list) else [0.0] * (len(ids) - 1) + [reward or 0.0]
        tokens.append(torch.tensor(own, dtype=torch.float32))
    return scores, tokens


def make_scorer(
    reward: object,
    policy_tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: str = "auto",
    attention: str = "auto",
    micro_batch_tokens: int | None = None,
    on_base: bool = False,
) -> RewardModelScorer | FunctionScorer:
    """Whatever PPOTrainer accepts as `reward` -> a scorer. UserError says what is accepted.

    on_base: it is an adapter on the policy's base, which `RewardModelScorer.over` gives it.
    """
    if is_function_reference(reward):
        reward = load_function(reward)  # type: ignore[arg-type]
    if isinstance(reward, (str, Path)):
        tokenizer = load_tokenizer(str(reward))
        if tokenizer.get_vocab() != policy_tokenizer.get_vocab():
            resolve_chat_template(tokenizer, None)
        model = None if on_base else load_reward_model(str(reward), dtype, attention)
        return RewardModelScorer(model, tokenizer, policy_tokenizer, micro_batch_tokens)
    if isinstance(reward, PreTrainedModel):
        model = load_reward_model(reward)
        return RewardModelScorer(model, policy_tokenizer, policy_tokenizer, micro_batch_tokens)
    if callable(reward):
        return FunctionScorer([(name_of(reward), 1.0, reward)])
    if isinstance(reward, (list, tuple)) and reward and all(_is_triple(item) for item in reward):
        parts = [(name, float(weight), load_function(fn) if isinstance(fn, str) else fn) for name, weight, fn in reward]
        return FunctionScorer(parts)
    raise UserError(
        f"reward: {reward!r} is none of: a reward-model folder or hub id, a function, 'module:function', "
        "or a list of (name, weight, function)"
    )


def _is_triple(item: object) -> bool:
    return isinstance(item, (list, tuple)) and len(item) == 3 and isinstance(item[1], (int, float))


def score_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict]],
    responses: list[str],
) -> list[float]:
    """Raw scores of (prompt, response) pairs, encoded exactly as reward training and PPO encode them."""
    rows = [
        encode_prompt(tokenizer, p) + encode_response(tokenizer, p, r) for p, r in zip(prompts, responses, strict=True)
    ]
    return score_rows(model.eval(), rows, token_budget(None, model.device)).tolist()


def score(scorer: RewardModelScorer | FunctionScorer, batch: Scorable, samples_per_prompt: int) -> list[float | None]:
    """The scorer's scores of all responses, in every rank."""
    if distributed.size() == 1:
        return scorer(batch)
    prompts = batching.share(len(batch.responses) // samples_per_prompt)
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
