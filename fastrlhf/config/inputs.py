"""The arguments of the three trainers, which a recipe names besides the config. Imports no torch."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from fastrlhf.config.errors import UserError, shown
from fastrlhf.config.plain_yaml import parse_value

PACKED = (".gz", ".bz2", ".xz", ".zst")
_TEXT_FILES = (".json", ".jsonl", ".ndjson", ".csv")
DATA_SUFFIXES = (*_TEXT_FILES, ".parquet", *(kind + packed for kind in _TEXT_FILES for packed in PACKED))
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


MODELSCOPE = "modelscope:"
USE_MODELSCOPE = "FASTRLHF_USE_MODELSCOPE"
_MODELSCOPE_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def modelscope_id(text: str) -> str | None:
    """The ORG/NAME of a model or data set of ModelScope; None: the text names none.

    `modelscope:ORG/NAME` always does; a plain ORG/NAME that is no folder here does where the environment says
    FASTRLHF_USE_MODELSCOPE=1. Raises UserError for a prefix with another thing behind it, for another value of the
    variable, and where `modelscope` is not installed.
    """
    name = text.removeprefix(MODELSCOPE)
    if name == text and not (_use_modelscope() and _MODELSCOPE_ID.fullmatch(text) and not os.path.exists(text)):
        return None
    if not _MODELSCOPE_ID.fullmatch(name):
        raise UserError(f"{text}: an id of ModelScope is written {MODELSCOPE}ORG/NAME")
    if importlib.util.find_spec("modelscope") is None:
        why = "" if name != text else f" ({USE_MODELSCOPE}=1)"
        raise UserError(f"{text} is an id of ModelScope{why}, which needs its package: pip install modelscope")
    return name


def _use_modelscope() -> bool:
    value = os.environ.get("FASTRLHF_USE_MODELSCOPE", "")
    value = value.strip().lower()
    if value not in ("", "0", "1", "false", "true"):
        raise UserError(f"{USE_MODELSCOPE} = {value!r}: expected 1 or 0")
    return value in ("1", "true")


class StageInput(NamedTuple):
    """An argument of the trainer, and whether it names a model, rows, a reward or a function."""

    required: bool
    kind: Literal["model", "data", "reward", "function"]
    description: str


_ROWS = "JSON, JSONL, CSV (each also packed), Parquet, or a folder or hub id, [:CONFIG]:SPLIT behind it"
_MODEL = "Hugging Face folder, hub id or GGUF file"
_REWARD = (
    "reward model, FILE.py:FUNCTION, MODULE:FUNCTION, {model: CLASSIFIER, label: LABEL}, or a list of "
    "[name, weight, one of the first three] or {name, weight, model or function, label}"
)
_TRAINED = {"model": StageInput(True, "model", f"the model to train: {_MODEL}")}
_OPTIONAL = {
    "eval_data": StageInput(False, "data", "held-out rows in the same formats"),
    "tokenizer": StageInput(False, "model", "folder or hub id; none: the one of the model"),
    "compute_metrics": StageInput(False, "function", "FILE.py:FUNCTION or MODULE:FUNCTION: numbers of held-out rows"),
}
_TEXTS = StageInput(True, "data", f"conversations or text to learn from: {_ROWS}")
_FEEDBACK = StageInput(True, "data", f"feedback records (pairs, rankings, scores, edits, mixed): {_ROWS}")
INPUTS: dict[str, dict[str, StageInput]] = {
    "sft": _TRAINED | {"data": _TEXTS} | _OPTIONAL,
    "reward": _TRAINED
    | {"data": _FEEDBACK, "sft_data": StageInput(False, "data", f"SFT replies for center_rewards: {_ROWS}")}
    | _OPTIONAL,
    "ppo": {
        "policy": StageInput(True, "model", f"the model to align: {_MODEL}"),
        "reward": StageInput(True, "reward", _REWARD),
        "prompts": StageInput(True, "data", f"prompts to answer: {_ROWS}"),
        "eval_prompts": StageInput(False, "data", "held-out prompts, answered every eval_every steps"),
        "tokenizer": StageInput(False, "model", "folder or hub id; none: the one of the policy"),
        "ref_policy": StageInput(False, "model", "what the KL is measured to; none: the policy as it starts"),
        "ptx_data": StageInput(False, "data", "conversations or text for ptx_coef, in the formats of fastrlhf sft"),
        "judge": StageInput(False, "function", "FILE.py:FUNCTION or MODULE:FUNCTION that compares two responses"),
        "value_model": StageInput(False, "model", "initial critic; none: from the reward model, else the policy"),
    },
}
MAX_RANK = 1 << 16
MAX_NUMBER = 1e30  # fp32 holds a little more
MAX_COUNT = 10**9


class DataName(NamedTuple):
    """What an input of rows names: a path or hub id, and which part of it; None: what there is without a choice."""

    path: str
    config: str | None = None
    split: str | None = None


def data_name(text: str) -> DataName:
    """NAME, NAME:SPLIT or NAME:CONFIG:SPLIT. A file or folder that has such a name is meant first.

    Raises UserError for a slice, which `datasets` knows and this does not.
    """
    text = os.path.expanduser(text)
    head, _, split = text.rpartition(":")
    is_split = re.fullmatch(r"\w+([.-]\w+)*", split) and not split.lower().endswith(DATA_SUFFIXES)
    if os.path.exists(text) or not head or not is_split:
        if re.search(r":\w+\[[^]]*\]$", text) and not os.path.exists(text):
            raise UserError(f"{text}: a split is read whole; max_samples=N takes its first N rows")
        return DataName(text)
    base, _, config = head.rpartition(":")
    if os.path.exists(head) or not base or not re.fullmatch(r"[\w.-]+", config):
        return DataName(head, None, split)
    return DataName(base, config, split)


def check_arguments(config: Any, kind: type, inputs: Mapping[str, Any]) -> None:
    """UserError, a line for each, where a trainer's arguments are of types that the docs do not name: a config of
    another stage, a model or tokenizer that is neither a path, a name nor a loaded one, a required one that is missing.

    Rows and rewards are told apart where they are read.
    """
    problems = []
    if not isinstance(config, kind):
        problems.append(f"config: expected a {kind.__name__}, found {type(config).__name__}")
    for name, spec in INPUTS[kind.stage].items():
        value = inputs.get(name)
        if value is None:
            problems += [f"{name}: missing; {spec.description}"] if spec.required else []
        elif isinstance(value, (str, os.PathLike)):
            problems += [f"{name}: is empty; {spec.description}"] if not str(value).strip() else []
        elif spec.kind == "model" and not all(hasattr(value, part) for part in _LOADED[name == "tokenizer"]):
            loaded = "tokenizer" if name == "tokenizer" else "transformers model"
            problems.append(f"{name}: expected a folder, a hub id or a loaded {loaded}, found {shown(value)}")
    if problems:
        raise UserError("\n".join(problems))


_LOADED = {True: ("get_vocab", "save_pretrained"), False: ("config", "save_pretrained")}
EXPECTED = "a rank, or {r: rank, alpha: number (default 2 r), target_modules: [names] (default: every linear layer)}"


def lora_options(value: Any) -> dict[str, Any] | None:
    """8, "8", {"r": 8}, "{r: 8, alpha: 16}" -> {"r", "alpha", "target_modules"}; None stays None.

    There is no dropout: PPO compares log-probs of several forwards of the same weights. Raises ValueError.
    """
    if isinstance(value, str):
        try:
            value = parse_value(value)
        except ValueError:
            raise ValueError(EXPECTED) from None
    if value is None:
        return None
    options = {"r": value} if isinstance(value, int) else dict(value) if isinstance(value, Mapping) else {}
    rank, unknown = options.get("r"), options.keys() - {"r", "alpha", "target_modules"}
    if unknown or isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise ValueError(EXPECTED)
    alpha, targets = options.get("alpha", 2 * rank), options.get("target_modules")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha <= MAX_NUMBER:
        raise ValueError(EXPECTED)
    if targets is not None and not (
        isinstance(targets, (list, tuple)) and targets and all(isinstance(t, str) for t in targets)
    ):
        raise ValueError(EXPECTED)
    return {"r": rank, "alpha": alpha, "target_modules": None if targets is None else list(targets)}
