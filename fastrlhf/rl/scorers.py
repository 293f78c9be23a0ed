"""Scoring of responses: a reward model, a Python function, or a weighted sum of both kinds.

A reward function is `reward(prompts, responses, **columns) -> list[float | None]`: texts in (special tokens skipped),
one number a response out, None for a response it cannot judge. Columns of the prompt data set are passed by name to
functions that ask for them; the conventions of TRL, verl and OpenRLHF are in functions.py. One with a parameter
`response_ids` (or `completion_ids`) gets the sampled token ids under that name, and may return for a response a list
instead: a number for each of its tokens, the stop token included. A plain number is the reward of the last token.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.config.errors import UserError
from fastrlhf.config.stages import PPOConfig
from fastrlhf.data.templates import encode_prompt, encode_response, settle_template
from fastrlhf.models.adapter_folder import AdapterFolder
from fastrlhf.models.heads import last_hidden, right_padded, sequence_scores
from fastrlhf.models.loading import (
    check_source,
    is_scalar_model,
    labels_of,
    load_classifier,
    load_reward_model,
    load_tokenizer,
)
from fastrlhf.models.lora import REWARD, Adapters
from fastrlhf.models.offload import Offload
from fastrlhf.models.reward_folder import HeldOut, bias_of, heads_of, held_out_of
from fastrlhf.models.token_batch import TokenRows
from fastrlhf.parallel.sharding import gathered, in_step, reading, wanted
from fastrlhf.rl.functions import (
    MESSAGES,
    QUERIES,
    TOKEN_LISTS,
    UserFunction,
    check_no_bare_file,
    is_function_reference,
    load_function,
    name_of,
)
from fastrlhf.rollout.result import Rollout, Texts
from fastrlhf.runtime import distributed
from fastrlhf.runtime.batching import micro_batches, shard
from fastrlhf.runtime.memory import MemoryBackoff, token_budget

RewardFunction = Callable[..., Sequence[float | None | Sequence[float]]]
Reward = float | None | list[float]  # of a response: on its last token, none, or on each token


class Scores(NamedTuple):
    """values: a raw score a response, None where it cannot be judged. token_rewards: 1-d fp32 each, of per-token reward
    functions; they sum to the scores (zeros where there is none). None: rewards are of whole responses. spread: mean
    over responses of the standard deviation over the heads of an ensemble; None: no reward model is one."""

    values: list[float | None]
    token_rewards: list[Tensor] | None
    spread: float | None = None


class Scorer(ABC):
    """Scores a rollout over all ranks: each judges its share of the prompts, and all get the whole.

    per_token: rewards are lists, a number for each token. model: the reward model, where there is one of its own.
    ensemble: its heads, where it has several.
    """

    per_token = False
    model: PreTrainedModel | None = None
    ensemble: Ensemble | None = None

    @property
    def models(self) -> list[PreTrainedModel]:
        """Every model that scores, beside the policy's base."""
        return [] if self.model is None else [self.model]

    @property
    def read(self) -> list[PreTrainedModel]:
        """Every model that is run to score."""
        return self.models

    def __call__(self, rollout: Rollout) -> Scores:
        self.take_spread()  # of responses that something else had judged
        with gathered(*self.read):  # each rank judges its own, in micro-batches of its own
            mine, ensembles = self._judged_here(rollout), self.take_spread()
        rewards = self._over_ranks(mine, [len(ids) for ids in rollout.response_ids], rollout.samples_per_prompt)
        spread = None
        if ensembles is not None:
            distributed.all_reduce_sum(ensembles)
            spread = float(ensembles[0] / ensembles[1].clamp(min=1))
        if not self.per_token:
            return Scores(rewards, None, spread)
        return split_rewards(rewards, rollout.response_ids)._replace(spread=spread)

    def take_spread(self) -> Tensor | None:
        """Sum [2] of the deviations over an ensemble's heads, and of responses, in this process since the last call;
        None: no reward model is an ensemble."""
        return None if self.ensemble is None else self.ensemble.take_spread()

    @abstractmethod
    def judge(self, texts: Texts, rows: TokenRows) -> list[Reward]:
        """Return the rewards of these responses, in this process."""

    def _judged_here(self, rollout: Rollout) -> list[Reward]:
        """Of this rank's share of the prompts; inside of it no rank may wait for another."""
        if distributed.size() == 1:
            return self.judge(rollout.texts, rollout.rows)
        mine = _share(len(rollout.rows), rollout.samples_per_prompt)
        return self.judge(rollout.texts[mine], rollout.rows[mine]) if mine.start < mine.stop else []

    def _over_ranks(self, rewards: list[Reward], lengths: list[int], samples: int) -> list[Reward]:
        """Each rank's rewards -> those of all responses, which are of so many tokens."""
        if distributed.size() == 1:
            return rewards
        if not self.per_token:
            scores = torch.tensor([math.nan if reward is None else reward for reward in rewards], dtype=torch.float64)
            return [None if math.isnan(score) else score for score in distributed.gather(scores).tolist()]
        mine = _share(len(lengths), samples)
        rows = [[math.nan] * n if reward is None else reward for reward, n in zip(rewards, lengths[mine], strict=True)]
        flat = torch.tensor([value for row in rows for value in row], dtype=torch.float64)
        whole = [part.tolist() for part in distributed.gather(flat).split(lengths)]
        return [None if math.isnan(row[0]) else row for row in whole]


def _share(rows: int, samples: int) -> slice:
    """This rank's rows; a prompt's samples stay together."""
    prompts = shard(rows // samples)
    return slice(prompts.start * samples, prompts.stop * samples)


def split_rewards(rewards: Sequence[Reward], response_ids: Sequence[Sequence[int]]) -> Scores:
    """Split rewards into scores (the sum over a response's tokens) and rewards of single tokens."""
    scores = [sum(reward) if isinstance(reward, list) else reward for reward in rewards]
    tokens = []
    for reward, ids in zip(rewards, response_ids, strict=True):
        row = reward if isinstance(reward, list) else [0.0] * (len(ids) - 1) + [reward or 0.0]
        tokens.append(torch.tensor(row, dtype=torch.float32))
    return Scores(scores, tokens)


# ---------------------------------------------------------------------------------------------------------- a model


class Ensemble:
    """The heads [M, H] of a reward model, and what becomes of their scores.

    mean: what the model's own head gives. min: the lowest (worst-case optimisation of Coste et al. 2023).
    mean_minus_sd: mean - coef * standard deviation (M - 1 in its denominator), where their uncertainty-weighted
    optimisation subtracts the variance.
    """

    def __init__(self, heads: nn.Linear, config: PPOConfig) -> None:
        self.heads, self.how, self.coef = heads, config.reward_ensemble, config.reward_sd_coef
        self._spread = torch.zeros(2, dtype=torch.float64)

    def combined(self, scores: Tensor) -> Tensor:
        """Scores of the heads [B, M] fp32 -> [B] fp32."""
        deviations = scores.std(-1)
        known = deviations[deviations.isfinite()]
        self._spread += torch.tensor([float(known.double().sum()), len(known)], dtype=torch.float64)
        if self.how == "min":
            return scores.min(-1).values
        mean = scores.mean(-1)
        return mean if self.how == "mean" else mean - self.coef * deviations

    def take_spread(self) -> Tensor:
        """As `Scorer.take_spread`."""
        spread, self._spread = self._spread, torch.zeros(2, dtype=torch.float64)
        return spread


def ensemble_of(source: str | Path, score: nn.Linear, config: PPOConfig) -> Ensemble | None:
    """The heads beside a reward model whose own head is `score`; None: that is its only one."""
    heads = heads_of(source)
    return None if heads is None else Ensemble(heads.beside(score), config)


def check_ensemble(reward: str | PreTrainedModel | list[Part], config: PPOConfig) -> None:
    """UserError where reward_ensemble asks for the heads of an ensemble and no reward model, read, is one."""
    if config.reward_ensemble == "mean":
        return
    parts = reward if isinstance(reward, list) else [Part("", 1.0, reward)]
    models = [part.source for part in parts if isinstance(part.source, str) and part.label is None]
    if all(heads_of(model) is None for model in models):
        named = f"reward {models[0]!r} has one head" if models else "reward is no folder of a reward model"
        raise UserError(
            f"reward_ensemble = {config.reward_ensemble}: {named}; train one with fastrlhf reward ensemble=5, or use "
            "reward_ensemble=mean"
        )


class RewardModelScorer(Scorer):
    """Scores with a sequence classifier: the policy's own token ids if the tokenizers agree, else re-encoded text. One
    without a head `score` is no causal LM's: it has its own idea of a text, and reads the reply alone."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        policy_tokenizer: PreTrainedTokenizerBase,
        memory: MemoryBackoff,
        offload: Offload,
        label: int | None = None,
        ensemble: Ensemble | None = None,
    ) -> None:
        """label: the label of a classifier of several whose log-probability is the score."""
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.memory, self.offload, self.label = tokenizer, memory, offload, label
        self.ensemble = ensemble
        self.same_tokenizer = tokenizer.get_vocab() == policy_tokenizer.get_vocab()

    def judge(self, texts: Texts, rows: TokenRows) -> list[float | None]:
        ids = self._token_ids(texts, rows)
        head = None if self.ensemble is None else self.ensemble.heads
        with self.offload.here(self.model) as model:
            scores = self.memory.attempt(lambda: score_rows(model, ids, self.memory.tokens, head, self.label))
        return _scorable(scores if self.ensemble is None else self.ensemble.combined(scores))

    def _token_ids(self, texts: Texts, rows: TokenRows) -> list[list[int]]:
        if not hasattr(self.model, "score") and self.label is not None:
            limit = getattr(self.model.config, "max_position_embeddings", None)
            limit = min(limit or self.tokenizer.model_max_length, self.tokenizer.model_max_length)
            return self.tokenizer(texts.responses, truncation=True, max_length=limit)["input_ids"]
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
        config: PPOConfig,
    ) -> None:
        adapters.add(REWARD, folder)
        self.adapters, self.tokenizer, self.memory, self.label = adapters, tokenizer, memory, None
        self.same_tokenizer = tokenizer.get_vocab() == policy_tokenizer.get_vocab()
        bias = bias_of(folder.path)
        weights = folder.head if bias is None else {**folder.head, "bias": bias}
        self.head = nn.Linear(weights["weight"].shape[1], 1, bias="bias" in weights).requires_grad_(False)
        self.head.load_state_dict(weights)
        self.head.to(adapters.model.device)
        self.ensemble = ensemble_of(folder.path, self.head, config)

    @property
    def read(self) -> list[PreTrainedModel]:
        return [self.adapters.model]

    def judge(self, texts: Texts, rows: TokenRows) -> list[float | None]:
        ids = self._token_ids(texts, rows)
        head = self.head if self.ensemble is None else self.ensemble.heads
        with self.adapters.using(REWARD) as model:
            scores = self.memory.attempt(lambda: score_rows(model, ids, self.memory.tokens, head))
        return _scorable(scores if self.ensemble is None else self.ensemble.combined(scores))


def _scorable(scores: Tensor) -> list[float | None]:
    """A reward model's scores; what is not finite is none."""
    return [score if math.isfinite(score) else None for score in scores.tolist()]


def score_rows(
    model: PreTrainedModel,
    rows: list[list[int]],
    budget: int,
    head: nn.Linear | None = None,
    label: int | None = None,
) -> Tensor:
    """Return scores [B] fp32 on the CPU, computed in micro-batches of at most `budget` padded tokens; of M heads
    [B, M]. head None: `score`. label: see `label_log_probs`."""
    head = getattr(model, "score", None) if head is None else head
    heads = head.out_features if label is None else 1
    scores = torch.empty((len(rows), heads) if heads > 1 else (len(rows),), dtype=torch.float32)
    for group in in_step(model, micro_batches([len(row) for row in rows], budget)):
        batch = [rows[i] for i in group]
        with reading(model):
            part = sequence_scores(model, batch, head) if label is None else label_log_probs(model, batch, label)
        scores[group] = part.cpu()
    return scores


def label_log_probs(model: PreTrainedModel, rows: list[list[int]], label: int) -> Tensor:
    """Return the log-probability [B] fp32 of a label in nats: log softmax over the labels, or log sigmoid where
    config.problem_type says that several of them may hold. A head `score` is read at the last token of each row."""
    head = getattr(model, "score", None)
    if head is not None:
        hidden = last_hidden(model, rows).float()
        logits = F.linear(hidden, head.weight.float(), None if head.bias is None else head.bias.float())
    else:
        ids, lengths = right_padded(rows, model.config.pad_token_id or 0, model.device)
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        logits = model(input_ids=ids, attention_mask=mask.long()).logits.float()
    several = getattr(model.config, "problem_type", None) == "multi_label_classification"
    return (F.logsigmoid(logits) if several else logits.log_softmax(-1))[:, label]


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
    """A weighted sum of reward functions and reward models. A response one of them cannot judge (None) is judged by
    none.

    parts: (name, weight, function or scorer). per_token: one of them takes `response_ids`; the rewards are then lists,
    a number for each token.
    """

    def __init__(self, parts: Sequence[tuple[str, float, RewardFunction | UserFunction | Scorer]]) -> None:
        self.parts: list[tuple[float, UserFunction | Scorer]] = []
        for name, weight, judge in parts:
            known = isinstance(judge, (UserFunction, Scorer))
            self.parts.append((weight, judge if known else UserFunction(f"reward function {name}", judge)))
        functions = [judge for _, judge in self.parts if isinstance(judge, UserFunction)]
        self.per_token = any(function.takes(*TOKEN_LISTS) for function in functions)

    @property
    def models(self) -> list[PreTrainedModel]:
        return [model for _, judge in self.parts if isinstance(judge, Scorer) for model in judge.models]

    @property
    def read(self) -> list[PreTrainedModel]:
        return [model for _, judge in self.parts if isinstance(judge, Scorer) for model in judge.read]

    def take_spread(self) -> Tensor | None:
        spreads = [(w, judge.take_spread()) for w, judge in self.parts if isinstance(judge, Scorer)]
        weighted = [s * s.new_tensor([abs(weight), 1.0]) for weight, s in spreads if s is not None]
        return torch.stack(weighted).sum(0) if weighted else None

    def judge(self, texts: Texts, rows: TokenRows) -> list[Reward]:
        count = len(rows)
        totals, tokens = [0.0] * count, [[0.0] * len(ids) for ids in rows.response_ids]
        judged = [True] * count
        for weight, judge in self.parts:
            model = isinstance(judge, Scorer)
            rewards = judge.judge(texts, rows) if model else _rewards(judge, texts, rows.response_ids)
            for i, reward in enumerate(rewards):
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
    sees_tokens = function.takes(*TOKEN_LISTS)
    rewards = function(_lists(texts, response_ids))
    return [
        _checked(function, i, reward, len(response_ids[i]) if sees_tokens else None) for i, reward in enumerate(rewards)
    ]


def _lists(texts: Texts, response_ids: list[list[int]]) -> dict[str, list]:
    """All that a reward function may ask for, by name. completions: messages where the prompt is messages (TRL's)."""
    completions = [
        [{"role": "assistant", "content": response}] if isinstance(prompt, list) else response
        for prompt, response in zip(texts.raw_prompts, texts.responses, strict=True)
    ]
    return {
        **texts.columns,
        "prompts": texts.prompts,
        "responses": texts.responses,
        "completions": completions,
        **dict.fromkeys(TOKEN_LISTS, response_ids),
        MESSAGES: texts.raw_prompts,
        QUERIES: [prompt + response for prompt, response in zip(texts.prompts, texts.responses, strict=True)],
    }


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


class Part(NamedTuple):
    """An entry of a weighted sum. source: a function, a reward-model folder or hub id, or a loaded model; label: of a
    classifier, by name or number."""

    name: str
    weight: float
    source: UserFunction | str | PreTrainedModel
    label: str | int | None = None


def read_reward(
    reward: object, config: PPOConfig, columns: Mapping[str, Iterable[str]] | None = None
) -> str | PreTrainedModel | list[Part]:
    """Read what PPOTrainer accepts as `reward`, without weights: one model, or the parts of a sum with their functions
    imported. columns: of prompts and of eval_prompts; the functions' arguments are bound to them (None: when called).

    UserError says what is accepted, or what of a function's arguments no column is.
    """
    check_no_bare_file(reward)
    if isinstance(reward, (str, Path)) and not is_function_reference(reward):
        _check_model(str(reward), None)
        return str(reward)
    if isinstance(reward, PreTrainedModel):
        return reward
    if callable(reward) or is_function_reference(reward):
        reward = [(None, 1.0, reward)]
    if isinstance(reward, Mapping):
        reward = [reward]
    if not isinstance(reward, (list, tuple)) or not reward:
        raise _none_of(reward)
    parts = [item if isinstance(item, Part) else _part(item, reward, config) for item in reward]
    names = [part.name for part in parts]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"reward: {twice!r} is the name of two entries; give each one of its own, for its metrics")
    return [_bound(part, columns or {}) for part in parts]


def held_out_records(reward: str | PreTrainedModel | list[Part]) -> dict[str, HeldOut | None]:
    """What reward training measured of each reward model, read or loaded, by its name; None: it has no record. Labels
    of classifiers are not trained on pairs."""
    parts = reward if isinstance(reward, list) else [Part("", 1.0, reward)]
    models = [part.source for part in parts if not isinstance(part.source, UserFunction) and part.label is None]
    return {_named(model): held_out_of(model) for model in models}


def _bound(part: Part, columns: Mapping[str, Iterable[str]]) -> Part:
    """Check a part's model, or its function's arguments for each of these data sets."""
    source = part.source
    if isinstance(source, (str, PreTrainedModel)):
        _check_model(source, part.label)
    if not isinstance(source, UserFunction):
        return part
    for role, names in columns.items():
        source.bind(names, role)
    everywhere = source.columns.union(*columns.values())  # rows of a step may lack one
    return part._replace(source=replace(source, columns=everywhere))


def _part(item: object, reward: object, config: PPOConfig) -> Part:
    """Read (name, weight, source) or {name, weight, model or function, label}."""
    label = None
    if isinstance(item, Mapping):
        name, weight, sources, label = _entry(item)
    elif isinstance(item, (list, tuple)) and len(item) == 3:
        name, weight, sources = item[0], item[1], [item[2]]
    else:
        raise _none_of(reward)
    if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not math.isfinite(weight):
        raise UserError(f"reward: {name!r} has the weight {weight!r}; expected a number")
    source = sources[0]
    check_no_bare_file(source)
    if is_function_reference(source):
        source = load_function(source)  # type: ignore[arg-type]
    if isinstance(source, (str, Path, PreTrainedModel)):
        source = source if isinstance(source, PreTrainedModel) else str(source)
        known = next(part for part in (name, label, _named(source)) if part is not None)
        return Part(str(known), float(weight), source, label)
    if not callable(source):
        raise _none_of(reward)
    if label is not None:
        raise UserError(f"reward: {name!r} is a function and has no labels; leave label out")
    name = name_of(source) if name is None else str(name)
    what = f"reward function {name}"
    function = UserFunction(what, source, timeout=config.reward_timeout, retries=config.reward_retries)
    return Part(name, float(weight), function)


def _entry(item: Mapping[str, Any]) -> tuple[Any, Any, list[Any], Any]:
    """Read a mapping of a weighted list -> name, weight, [source], label."""
    known = ("name", "weight", "model", "function", "label")
    unknown = [str(key) for key in item if key not in known]
    sources = [item[key] for key in ("model", "function") if item.get(key) is not None]
    if unknown or len(sources) != 1:
        problem = f"no such field: {', '.join(unknown)}" if unknown else "one of model and function is needed"
        raise UserError(f"reward: {dict(item)!r}: {problem}; an entry has name, weight, model or function, label")
    return item.get("name"), item.get("weight", 1.0), sources, item.get("label")


def _check_model(source: str | PreTrainedModel, label: str | int | None) -> None:
    """UserError for a source that is no sequence classifier, or has no such label; loads no weights."""
    if isinstance(source, str):
        check_source(source, "reward")
        if not is_scalar_model(source):
            raise UserError(f"reward: {source!r} is no sequence classifier; train one with `fastrlhf reward`")
    names = labels_of(source)
    if label is not None:
        label_index(source, label)
        if not isinstance(source, str) and not hasattr(source, "score"):
            raise UserError(f"reward: {_named(source)} reads tokens of its own; give its folder instead")
    elif len(names) > 1:
        example = "{model: MODEL, label: LABEL}"
        raise UserError(f"reward: {_named(source)} has the labels {', '.join(names.values())}; name one: {example}")


def _named(source: str | PreTrainedModel) -> str:
    return repr(source) if isinstance(source, str) else type(source).__name__


def _none_of(reward: object) -> UserError:
    return UserError(
        f"reward: {reward!r} is none of: a reward-model folder or hub id, a function, 'module:function', "
        "{model, label}, or a list of (name, weight, function or model) or of {name, weight, function or model, label}"
    )


def make_scorer(
    reward: object,
    policy_tokenizer: PreTrainedTokenizerBase,
    config: PPOConfig,
    memory: MemoryBackoff,
    offload: Offload,
) -> Scorer:
    """Turn whatever PPOTrainer accepts as `reward`, read or not, into a scorer; errors as `read_reward` has them."""
    reward = read_reward(reward, config)

    def scorer(source: str | PreTrainedModel, label: str | int | None = None) -> RewardModelScorer:
        how = () if isinstance(source, PreTrainedModel) else (config.dtype, config.attention)
        load = load_reward_model if label is None else load_classifier
        model = load(source, *how, to_cut=wanted(config))
        index = None if label is None else label_index(source, label)
        if isinstance(source, PreTrainedModel):
            tokenizer = policy_tokenizer
        elif index is not None and not hasattr(model, "score"):
            tokenizer = load_tokenizer(source, needs_eos=False)
        else:
            tokenizer = reward_tokenizer(source, policy_tokenizer)
        ensemble = ensemble_of(source, model.score, config) if how and label is None else None
        return RewardModelScorer(model, tokenizer, policy_tokenizer, memory, offload, index, ensemble)

    if not isinstance(reward, list):
        return scorer(reward)
    return FunctionScorer(
        [
            (name, weight, source if isinstance(source, UserFunction) else scorer(source, label))
            for name, weight, source, label in reward
        ]
    )


def label_index(source: str | PreTrainedModel, label: str | int) -> int:
    """Return the number of a label that is given by name, in whatever case, or number. UserError with the labels."""
    names = labels_of(source)
    alike = [i for i, name in names.items() if name == label]
    alike = alike or [i for i, name in names.items() if name.casefold() == str(label).casefold()]
    index = alike[0] if len(alike) == 1 else label
    if isinstance(index, str) and index.isdecimal():
        index = int(index)
    if not isinstance(index, int) or isinstance(index, bool) or index not in names:
        known = ", ".join(names.values()) or "none"
        raise UserError(f"reward: label {label!r} of {_named(source)} is none of: {known}")
    return index


def reward_tokenizer(reward: str, policy_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a reward-model folder, with its chat template where it will read texts."""
    tokenizer = load_tokenizer(reward)
    if tokenizer.get_vocab() != policy_tokenizer.get_vocab():
        settle_template(tokenizer, None)
    return tokenizer
