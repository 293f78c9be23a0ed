"""The constant that centres a reward model: kept beside its weights, added to every score that is read here.

Ouyang et al. 2022 (sec. 3.5) and Huang et al. 2024 shift a reward model so that the replies that SFT learnt
score 0 on average. Pairs fix a score up to a constant only, and a constant matters where scores meet a number: a score
for replies without an end, a clip. Stock transformers leaves it out, so its scores differ by it; the file says so.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastrlhf.config.errors import UserError

FILE = "score_bias.json"
NOTE = "fastrlhf adds bias to the output of the head `score`; stock transformers does not"


def text_of(mean: float, replies: int) -> str:
    """The content of FILE. mean: of the raw scores of so many SFT replies."""
    return json.dumps({"bias": -mean, "sft_replies": replies, "note": NOTE}, indent=1) + "\n"


def bias_of(folder: str | Path) -> Tensor | None:
    """What is added to the scores of the model in a folder [1] fp32; None: nothing. UserError for a damaged file."""
    path = Path(folder) / FILE
    try:
        written = path.read_text(encoding="utf-8")
    except OSError:  # there is none, or the source is no folder
        return None
    try:
        bias = json.loads(written)["bias"]
    except (ValueError, LookupError, TypeError):
        bias = None
    if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not math.isfinite(bias):
        raise UserError(f"{path}: holds no finite number `bias`; train the reward model anew with center_rewards=true")
    return torch.tensor([float(bias)])


def centre(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """Give the head `score` the bias of the folder that the model was read from, where there is one."""
    bias = bias_of(folder)
    if bias is not None:
        model.score.bias = nn.Parameter(bias.to(model.score.weight), requires_grad=model.score.weight.requires_grad)
    return model
