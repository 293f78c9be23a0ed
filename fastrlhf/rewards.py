"""Scoring of responses: a reward model, a Python function, or a weighted sum of named functions.

A reward function is `reward(prompts, responses, **columns) -> list[float | None]`: texts in (special tokens skipped),
one number a response out, None for a response it cannot judge. Columns of the prompt data set are passed by name to
functions that accept them.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.adapter_folder import AdapterFolder
from fastrlhf.adapters import REWARD, Adapters
from fastrlhf.config import UserError
from fastrlhf.models import load_reward_model, load_tokenizer, sequence_scores
from fastrlhf.optim import micro_batches, token_budget
from fastrlhf.templates import encode_prompt, encode_response, resolve_chat_template

RewardFunction = Callable[..., Sequence[float | None]]


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

    name = "reward model"

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
        with nullcontext(self.model) if self.adapters is None else self.adapters.using(REWARD) as model:
            return score_rows(model, rows, token_budget(self.micro_batch_tokens, model.device), self.head).tolist()


@torch.no_grad()
def score_rows(model: PreTrainedModel, rows: list[list[int]], budget: int, head: nn.Linear | None = None) -> Tensor:
    """Scores [B] fp32 on the CPU, computed in micro-batches of at most `budget` padded tokens; head None: `score`."""
    scores = torch.empty(len(rows), dtype=torch.float32)
    for group in micro_batches([len(row) for row in rows], budget):
        scores[group] = sequence_scores(model, [rows[i] for i in group], head).cpu()
    return scores


class FunctionScorer:
    """A weighted sum of reward functions. A response one of them cannot judge (None) is judged by none."""

    def __init__(self, functions: Sequence[tuple[str, float, RewardFunction]]) -> None:
        self.functions = [(name, weight, fn, _accepted(fn)) for name, weight, fn in functions]
        self.name = " + ".join(name for name, *_ in self.functions)

    def __call__(self, batch: Scorable) -> list[float | None]:
        totals: list[float | None] = [0.0] * len(batch.responses)
        for name, weight, function, accepted in self.functions:
            columns = {k: v for k, v in batch.columns.items() if accepted is None or k in accepted}
            scores = _call(name, function, batch, columns)
            for i, score in enumerate(scores):
                total = totals[i]
                totals[i] = None if score is None or total is None else total + weight * score
        return totals


class _Caught:
    """Keeps what a user's function raises (whatever it is), so that the error can be reported under its name."""

    error: Exception | None = None

    def __enter__(self) -> _Caught:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> bool:
        if isinstance(error, Exception):
            self.error = error
        return self.error is error  # an interrupt passes through


def _call(name: str, function: RewardFunction, batch: Scorable, columns: dict[str, list]) -> list[float | None]:
    """One call, checked: the right count, numbers or None, no NaN. Errors name the function and the sample."""
    with _Caught() as caught:
        scores = list(function(batch.prompts, batch.responses, **columns))
    if caught.error is not None:
        sample = _blame(function, batch, columns)
        where = f"sample {sample}" if sample is not None else f"a batch of {len(batch.responses)} samples"
        kind = type(caught.error).__name__
        raise UserError(f"reward function {name}, {where}: raised {kind}: {caught.error}") from caught.error
    expected = len(batch.responses)
    if len(scores) != expected:
        first = min(len(scores), expected)
        raise UserError(
            f"reward function {name}, sample {first}: returned {len(scores)} scores for {expected} responses; "
            "return one number (or None) for each"
        )
    return [_number(name, i, score) for i, score in enumerate(scores)]


def _number(name: str, index: int, score: object) -> float | None:
    if score is None:
        return None
    try:
        value = float(score)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise UserError(f"reward function {name}, sample {index}: {score!r} is not a number") from error
    if not math.isfinite(value):
        raise UserError(f"reward function {name}, sample {index}: returned {value}; return None if unscorable")
    return value


def _blame(function: RewardFunction, batch: Scorable, columns: dict[str, list]) -> int | None:
    """The first sample the function also fails on alone, so that the error can name it."""
    for i in range(len(batch.responses)):
        with _Caught() as caught:
            function(
                batch.prompts[i : i + 1],
                batch.responses[i : i + 1],
                **{k: v[i : i + 1] for k, v in columns.items()},
            )
        if caught.error is not None:
            return i
    return None


def _accepted(function: RewardFunction) -> set[str] | None:
    """Names of the data-set columns a function takes; None: all (it has **kwargs)."""
    parameters = list(inspect.signature(function).parameters.values())
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters[2:]}


# ----------------------------------------------------------------------------------------- from what the user names


def load_function(reference: str) -> RewardFunction:
    """`package.module:function` or `path/to/file.py:function`. UserError names what is missing."""
    where, _, attribute = reference.rpartition(":")
    if where.endswith(".py"):
        path = Path(where)
        if not path.is_file():
            raise UserError(f"reward: the file {where!r} of {reference!r} does not exist")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            raise UserError(f"reward: cannot import {where!r} of {reference!r}: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"reward: {where!r} has no function {attribute!r}")
    return function


def is_function_reference(reward: object) -> bool:
    """True for `module:function` and `file.py:function`, not for a folder, a hub id or `package://...`."""
    return isinstance(reward, str) and "://" not in reward and ":" in reward and not Path(reward).exists()


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
        return FunctionScorer([(getattr(reward, "__name__", type(reward).__name__), 1.0, reward)])
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
