"""Scoring of responses: a reward model, a Python function, or a weighted sum of named functions.

A reward function is `reward(prompts, responses, **columns) -> list[float | None]`: texts in (special tokens skipped),
one number a response out, None for a response it cannot judge. Columns of the prompt data set are passed by name to
functions that accept them. One with a parameter `response_ids` gets the sampled token ids under that name, and may
return for a response a list instead: a number for each of its tokens, the stop token included. A plain number is the
reward of the last token.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.config.errors import UserError
from fastrlhf.config.stages import PPOConfig
from fastrlhf.data.templates import encode_prompt, encode_response, settle_template
from fastrlhf.models.adapter_folder import AdapterFolder
from fastrlhf.models.heads import sequence_scores
from fastrlhf.models.loading import load_reward_model, load_tokenizer
from fastrlhf.models.lora import REWARD, Adapters
from fastrlhf.models.offload import Offload
from fastrlhf.models.token_batch import TokenRows
from fastrlhf.rl.functions import UserFunction, is_function_reference, load_function, name_of
from fastrlhf.rollout.result import Rollout, Texts
from fastrlhf.runtime import distributed
from fastrlhf.runtime.batching import micro_batches, shard
from fastrlhf.runtime.memory import MemoryBackoff, token_budget

RewardFunction = Callable[..., Sequence[float | None | Sequence[float]]]
Reward = float | None | list[float]  # of a response: on its last token, none, or on each token


class Scores(NamedTuple):
    """values: a raw score a response, None where it cannot be judged. token_rewards: 1-d fp32 each, of per-token reward
    functions; they sum to the scores (zeros where there is none). None: rewards are of whole responses."""

    values: list[float | None]
    token_rewards: list[Tensor] | None


class Scorer(ABC):
    """Scores a rollout over all ranks: each judges its share of the prompts, and all get the whole.

    per_token: rewards are lists, a number for each token. model: the reward model, where there is one of its own.
    """

    per_token = False
    model: PreTrainedModel | None = None

    def __call__(self, rollout: Rollout) -> Scores:
        rewards = self._over_ranks(rollout)
        if not self.per_token:
            return Scores(rewards, None)
        return split_rewards(rewards, rollout.response_ids)

    @abstractmethod
    def judge(self, texts: Texts, rows: TokenRows) -> list[Reward]:
        """Return the rewards of these responses, in this process."""

    def _over_ranks(self, rollout: Rollout) -> list[Reward]:
        if distributed.size() == 1:
            return self.judge(rollout.texts, rollout.rows)
        per_prompt = rollout.samples_per_prompt
        prompts = shard(len(rollout.rows) // per_prompt)
        mine = slice(prompts.start * per_prompt, prompts.stop * per_prompt)
        rewards = self.judge(rollout.texts[mine], rollout.rows[mine]) if mine.start < mine.stop else []
        if not self.per_token:
            scores = torch.tensor([math.nan if reward is None else reward for reward in rewards], dtype=torch.float64)
            return [None if math.isnan(score) else score for score in distributed.gather(scores).tolist()]
        lengths = [len(ids) for ids in rollout.response_ids]
        rows = [[math.nan] * n if reward is None else reward for reward, n in zip(rewards, lengths[mine], strict=True)]
        flat = torch.tensor([value for row in rows for value in row], dtype=torch.float64)
        whole = [part.tolist() for part in distributed.gather(flat).split(lengths)]
        return [None if math.isnan(row[0]) else row for row in whole]


def split_rewards(rewards: Sequence[Reward], response_ids: Sequence[Sequence[int]]) -> Scores:
    """Split rewards into scores (the sum over a response's tokens) and rewards of single tokens."""
    scores = [sum(reward) if isinstance(reward, list) else reward for reward in rewards]
    tokens = []
    for reward, ids in zip(rewards, response_ids, strict=True):
        row = reward if isinstance(reward, list) else [0.0] * (len(ids) - 1) + [reward or 0.0]
        tokens.append(torch.tensor(row, dtype=torch.float32))
    return Scores(scores, tokens)


# ---------------------------------------------------------------------------------------------------------- a model


class RewardModelScorer(Scorer):
    """Scores with a sequence classifier: the policy's own token ids if the tokenizers agree, else re-encoded text."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        policy_tokenizer: PreTrainedTokenizerBase,
        memory: MemoryBackoff,
        offload: Offload,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.memory, self.offload = tokenizer, memory, offload
        self.same_tokenizer = tokenizer.get_vocab() == policy_tokenizer.get_vocab()

    def judge(self, texts: Texts, rows: TokenRows) -> list[float | None]:
        ids = self._token_ids(texts, rows)
        with self.offload.here(self.model) as model:
            return self.memory.attempt(lambda: score_rows(model, ids, self.memory.tokens)).tolist()

    def _token_ids(self, texts: Texts, rows: TokenRows) -> list[list[int]]:
        if self.same_tokenizer:
            return [rows.whole(row) for row in range(len(rows))]
        return encode_pairs(self.tokenizer, texts.raw_prompts, texts.responses)


class AdapterScorer(RewardModelScorer):
    """Scores with a reward adapter over the very base that the policy's adapters are on: no second model."""

    def __init__(
        self,
        adapters: Adapters,
        folder: AdapterFolder,
        tokenizer: PreTrainedTokenizerBase,
        policy_tokenizer: PreTrainedTokenizerBase,
        memory: MemoryBackoff,
    ) -> None:
        adapters.add(REWARD, folder)
        self.adapters, self.tokenizer, self.memory = adapters, tokenizer, memory
        self.same_tokenizer = tokenizer.get_vocab() == policy_tokenizer.get_vocab()
        self.head = nn.Linear(folder.head["weight"].shape[1], 1, bias="bias" in folder.head).requires_grad_(False)
        self.head.load_state_dict(folder.head)
        self.head.to(adapters.model.device)

    def judge(self, texts: Texts, rows: TokenRows) -> list[float | None]:
        ids = self._token_ids(texts, rows)
        with self.adapters.using(REWARD) as model:
            return self.memory.attempt(lambda: score_rows(model, ids, self.memory.tokens, self.head)).tolist()


def score_rows(model: PreTrainedModel, rows: list[list[int]], budget: int, head: nn.Linear | None = None) -> Tensor:
    """Return scores [B] fp32 on the CPU, computed in micro-batches of at most `budget` padded tokens; head None:
    `score`."""
    scores = torch.empty(len(rows), dtype=torch.float32)
    for group in micro_batches([len(row) for row in rows], budget):
        with torch.inference_mode():
            part = sequence_scores(model, [rows[i] for i in group], head)
        scores[group] = part.cpu()
    return scores


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str | list[dict]], responses: Sequence[str]
) -> list[list[int]]:
    """Encode (prompt, response) pairs exactly as reward training encodes them."""
    pairs = zip(prompts, responses, strict=True)
    return [encode_prompt(tokenizer, p) + encode_response(tokenizer, p, r) for p, r in pairs]


def score_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict]],
    responses: list[str],
) -> list[float]:
    """Return raw scores of (prompt, response) pairs, encoded exactly as reward training and PPO encode them."""
    rows = encode_pairs(tokenizer, prompts, responses)
    return score_rows(model.eval(), rows, token_budget(None, model.device)).tolist()


# -------------------------------------------------------------------------------------------------------- functions


class FunctionScorer(Scorer):
    """A weighted sum of reward functions. A response one of them cannot judge (None) is judged by none.

    per_token: one of them takes `response_ids`; the rewards are then lists, a number for each token.
    """

    def __init__(self, functions: Sequence[tuple[str, float, RewardFunction]]) -> None:
        self.functions = [(UserFunction(f"reward function {name}", fn, 2), weight) for name, weight, fn in functions]
        self.per_token = any(function.takes("response_ids") for function, _ in self.functions)

    def judge(self, texts: Texts, rows: TokenRows) -> list[Reward]:
        count = len(rows)
        totals, tokens = [0.0] * count, [[0.0] * len(ids) for ids in rows.response_ids]
        judged = [True] * count
        for function, weight in self.functions:
            for i, reward in enumerate(_rewards(function, texts, rows.response_ids)):
                if reward is None:
                    judged[i] = False
                elif isinstance(reward, list):
                    tokens[i] = [total + weight * part for total, part in zip(tokens[i], reward, strict=True)]
                else:
                    totals[i] += weight * reward
        if self.per_token:
            for row, total in zip(tokens, totals, strict=True):
                row[-1] += total
        rewards = tokens if self.per_token else totals
        return [reward if known else None for reward, known in zip(rewards, judged, strict=True)]


def _rewards(function: UserFunction, texts: Texts, response_ids: list[list[int]]) -> list[Reward]:
    """Call once and check: numbers, None, or (from a function that sees the tokens) a list of a number for each."""
    sees_tokens = function.takes("response_ids")
    columns = texts.columns | ({"response_ids": response_ids} if sees_tokens else {})
    rewards = function(texts.prompts, texts.responses, **columns)
    return [
        _checked(function, i, reward, len(response_ids[i]) if sees_tokens else None) for i, reward in enumerate(rewards)
    ]


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


# --------------------------------------------------------------------------------------------------------- making one


def make_scorer(
    reward: object,
    policy_tokenizer: PreTrainedTokenizerBase,
    config: PPOConfig,
    memory: MemoryBackoff,
    offload: Offload,
) -> Scorer:
    """Turn whatever PPOTrainer accepts as `reward` into a scorer. UserError says what is accepted."""
    if is_function_reference(reward):
        reward = load_function(reward)  # type: ignore[arg-type]
    if isinstance(reward, (str, Path)):
        tokenizer = reward_tokenizer(str(reward), policy_tokenizer)
        model = load_reward_model(str(reward), config.dtype, config.attention)
        return RewardModelScorer(model, tokenizer, policy_tokenizer, memory, offload)
    if isinstance(reward, PreTrainedModel):
        return RewardModelScorer(load_reward_model(reward), policy_tokenizer, policy_tokenizer, memory, offload)
    if callable(reward):
        return FunctionScorer([(name_of(reward), 1.0, reward)])
    if isinstance(reward, (list, tuple)) and reward and all(_is_triple(item) for item in reward):
        parts = [(name, float(weight), load_function(fn) if isinstance(fn, str) else fn) for name, weight, fn in reward]
        return FunctionScorer(parts)
    raise UserError(
        f"reward: {reward!r} is none of: a reward-model folder or hub id, a function, 'module:function', "
        "or a list of (name, weight, function)"
    )


def reward_tokenizer(reward: str, policy_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a reward-model folder, with its chat template where it will read texts."""
    tokenizer = load_tokenizer(reward)
    if tokenizer.get_vocab() != policy_tokenizer.get_vocab():
        settle_template(tokenizer, None)
    return tokenizer


def _is_triple(item: object) -> bool:
    return isinstance(item, (list, tuple)) and len(item) == 3 and isinstance(item[1], (int, float))
