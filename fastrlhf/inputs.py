"""What a recipe names besides the config: the arguments of the three trainers. Imports no torch."""

from __future__ import annotations

from typing import Literal, NamedTuple


class StageInput(NamedTuple):
    """What a recipe names besides the config: an argument of the trainer."""

    required: bool
    kind: Literal["model", "data", "reward", "function"]
    description: str


_ROWS = "JSON, JSONL (.gz too), Parquet, CSV, a folder or a hub id"
_MODEL = "Hugging Face folder, hub id or GGUF file"
_REWARD = "reward model, FILE.py:FUNCTION, MODULE:FUNCTION, or a list of [name, weight, such a function]"
_TRAINED = {"model": StageInput(True, "model", f"the model to train: {_MODEL}")}
_OPTIONAL = {
    "eval_data": StageInput(False, "data", "held-out rows in the same formats"),
    "tokenizer": StageInput(False, "model", "folder or hub id; none: the one of the model"),
}
_TEXTS = StageInput(True, "data", f"conversations or text to learn from: {_ROWS}")
_FEEDBACK = StageInput(True, "data", f"feedback records (pairs, rankings, scores, edits, mixed): {_ROWS}")
INPUTS: dict[str, dict[str, StageInput]] = {
    "sft": _TRAINED | {"data": _TEXTS} | _OPTIONAL,
    "reward": _TRAINED | {"data": _FEEDBACK} | _OPTIONAL,
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
