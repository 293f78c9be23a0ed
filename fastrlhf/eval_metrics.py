"""`compute_metrics`: a user's own figures of SFT and reward training, over the held-out rows of an evaluation.

    def compute_metrics(predictions, rows):
        hits = [p == t for prediction in predictions for p, t in zip(prediction.predicted, prediction.tokens)]
        return {"token_accuracy": sum(hits) / len(hits)}

predictions and rows are lists of the same length and order. rows: a held-out row each, as a dict in README's form
(`messages`, `prompt` and `response`, or `text`; of feedback `prompt`, `responses`, `ranking` or `scores` and `ratings`
in [-1, 1], `margin`, `kind`) with its place in `where`. predictions: of SFT a `TokenPrediction` each; of a reward model
a list with the raw score of each of the row's responses, in their order. The numbers that it returns go to
metrics.jsonl under their own names. With several ranks each of them calls it with the whole.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from fastrlhf.config.errors import UserError, shown
from fastrlhf.config.outcome import outcome
from fastrlhf.config.stages import SupervisedConfig
from fastrlhf.data.feedback import Conversation, Feedback
from fastrlhf.rl.functions import UserFunction, check_no_bare_file, is_function_reference, load_function, name_of

NAME = "compute_metrics"
NO_HELD_OUT = f"{NAME}: it is called with held-out rows; give eval_data, or eval_fraction above 0"
OF_THE_STEP = {"step", "nonfinite", "loss/train", "accuracy/train", "grad_norm", "learning_rate", "update/skipped"}


class TokenPrediction(NamedTuple):
    """What a model makes of a row's learnt tokens, each read behind the true tokens before it (teacher forcing).

    tokens: their ids; predicted: the likeliest id at each place; log_probs: log p of the true token, nats.
    """

    tokens: list[int]
    predicted: list[int]
    log_probs: list[float]


class EvalMetrics:
    """A user's function, called in every evaluation."""

    def __init__(self, function: object, config: SupervisedConfig) -> None:
        """UserError for what is no function of two arguments, and where no evaluation would ever call it."""
        check_no_bare_file(function, NAME)
        if is_function_reference(function):
            function = load_function(function, NAME)  # type: ignore[arg-type]
        if not callable(function):
            raise UserError(f"{NAME}: {function!r} is neither a function nor 'module:function' or 'file.py:function'")
        self.function = UserFunction(f"{NAME} {name_of(function)}", function)
        self._check_arguments()
        if not config.eval_every:
            raise UserError(f"{NAME}: it is called in evaluations; set eval_every above 0")

    def _check_arguments(self) -> None:
        try:
            inspect.signature(self.function.function).bind([], [])
        except TypeError as error:
            raise UserError(f"{self.function.what}: is called with (predictions, rows): {error}") from error
        except ValueError:  # some builtins do not say
            return

    def __call__(
        self, predictions: Sequence[Any], rows: Sequence[Conversation | Feedback], taken: Collection[str]
    ) -> dict[str, float]:
        """-> its numbers by name. taken: names of the other metrics of the evaluation. UserError for an exception of
        the function, for what is no mapping of names to finite numbers, and for a name that is taken."""
        what = self.function.what
        result = self.function.once(list(predictions), [_plain(row) for row in rows])
        if not isinstance(result, Mapping):
            raise UserError(f"{what}: returned {shown(result)}; return a mapping of names to numbers")
        return {self._name(name, taken): self._number(name, value) for name, value in result.items()}

    def _name(self, name: object, taken: Collection[str]) -> str:
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{self.function.what}: returned the name {shown(name)}; expected text")
        if name in taken or name in OF_THE_STEP:
            raise UserError(f"{self.function.what}: returned {name!r}, a metric of that name is there; take another")
        return name

    def _number(self, name: object, value: Any) -> float:
        number, error = outcome(lambda: float(value))
        if number is None or not math.isfinite(number) or isinstance(value, (str, bytes)):
            raise UserError(f"{self.function.what}: {name!r} is {shown(value)}; expected a finite number") from error
        return number


def load_eval_metrics(function: object, config: SupervisedConfig, *, held_out: bool) -> EvalMetrics | None:
    """The function that a trainer was given; None where there is none. held_out: there are rows to call it with."""
    if function is None:
        return None
    metrics = EvalMetrics(function, config)
    if not held_out:
        raise UserError(NO_HELD_OUT)
    return metrics


def _plain(row: Conversation | Feedback) -> dict[str, Any]:
    """A row as a dict of lists, texts and numbers, a copy that may be changed."""
    return {name: _lists(value) for name, value in asdict(row).items() if value is not None}


def _lists(value: Any) -> Any:
    return [_lists(part) for part in value] if isinstance(value, (list, tuple)) else value
