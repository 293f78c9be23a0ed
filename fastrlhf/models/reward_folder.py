"""What lies in a reward model's folder beside its weights: how good it is on held-out rows, its bias, what its head
reads, and the way from its raw output to the scale of people's scores.

The first is what reward training measured; PPO looks there for what to doubt. The last is read where training goes on.
The bias is a constant that is added to every score read here: that of r(y) = w'y + b, which head_only learns, and what
centres the scores. Ouyang et al. 2022 (sec. 3.5) and Huang et al. 2024 shift a reward model so that the replies that
SFT learnt score 0 on average. Pairs fix a score up to a constant only, and a constant matters where scores meet a
number: a score for replies without an end, a clip. Stock transformers has no such bias and reads the last token of the
last layer, so it scores otherwise; the files say so.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from fastrlhf.config.errors import UserError
from fastrlhf.config.inputs import HUB_ID
from fastrlhf.data.sources import modelscope_folder
from fastrlhf.models.heads import POOLINGS, Readout, readout_of

HELD_OUT_FILE = "held_out.json"
LEAST_ACCURACY = 0.6  # of ordered pairs; 0.5 is chance
LEAST_CORRELATION = 0.31  # where rows have scores only: of two normal variables so correlated, 0.6 of all pairs agree
BIAS_FILE = "score_bias.json"
LINK_FILE = "score_link.json"
READOUT_FILE = "score_readout.json"
HEADS_FILE = "score_heads.json"
HEADS_NOTE = "of each head of the ensemble; the head `score`, all that stock transformers reads, is their mean"
NOTE = "fastrlhf adds bias to the output of the head `score`; stock transformers does not"
READOUT_NOTE = "the head `score` reads {}; stock transformers, which reads the last token of layer -1, scores otherwise"


@dataclass
class HeldOut:
    """rows: held out, 0 where none were. step: of the last evaluation. accuracy: share of the pairs in the right order;
    correlation: with given scores; None where the rows have no such thing, or were never evaluated."""

    rows: int = 0
    step: int = 0
    pairs: int = 0
    accuracy: float | None = None
    correlation: float | None = None

    def doubt(self) -> str | None:
        """Why a policy should not be trained against this reward model, behind its name; None: nothing known is."""
        if not self.rows:
            return "has no held-out rows, so nobody knows whether it ranks what it has not seen"
        if self.accuracy is not None and self.accuracy < LEAST_ACCURACY:
            pairs = f"{self.accuracy:.1%} of {self.pairs} held-out pairs"
            return f"ranks {pairs} as people did (50% is chance, an alarm below {LEAST_ACCURACY:.0%})"
        if self.accuracy is None and self.correlation is not None and self.correlation < LEAST_CORRELATION:
            return f"gives held-out replies scores that correlate {self.correlation:.2f} with people's"
        if self.accuracy is None and self.correlation is None:
            return f"is not measured on its {self.rows} held-out rows, so nobody knows whether it ranks them"
        return None

    def state(self) -> dict[str, Any]:
        return asdict(self)

    def load_state(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def text(self) -> str:
        """The content of HELD_OUT_FILE."""
        return json.dumps(self.state(), indent=1) + "\n"


def held_out_of(source: str | PreTrainedModel) -> HeldOut | None:
    """What lies in a reward model's folder (of a loaded model: the one it came from); None: no record that we know."""
    name = source.config._name_or_path if isinstance(source, PreTrainedModel) else source
    folder = modelscope_folder(str(name), "reward") or name
    try:
        return _read(json.loads((Path(folder) / HELD_OUT_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _read(record: dict[str, Any]) -> HeldOut:
    """Raises TypeError, ValueError for what `text` did not write."""
    held_out = HeldOut(**record)
    counts = (held_out.rows, held_out.step, held_out.pairs)
    shares = [share for share in (held_out.accuracy, held_out.correlation) if share is not None]
    if not all(isinstance(count, int) and count >= 0 for count in counts) or not all(map(math.isfinite, shares)):
        raise ValueError(f"no record of held-out rows: {record}")
    return held_out


def bias_text(mean: float, replies: int, learnt: float = 0.0) -> str:
    """The content of BIAS_FILE. mean: of the raw scores of so many SFT replies, 0 without any. learnt: the bias b of
    r(y) = w'y + b, which is part of those scores; training goes on from it."""
    numbers = {"bias": learnt - mean, "learnt": learnt, "sft_replies": replies}
    return json.dumps({**numbers, "note": NOTE}, indent=1) + "\n"


def bias_of(source: str | Path) -> Tensor | None:
    """What is added to the scores of the model in a folder or on a hub [1] fp32; None: nothing. UserError for a damaged
    file."""
    return _bias(source, "bias")


def learnt_bias_of(source: str | Path) -> Tensor | None:
    """The part of `bias_of` that training learnt and goes on from [1] fp32; None: nothing."""
    bias = _bias(source, "learnt", 0.0)
    return None if bias is None or not bias else bias


def _bias(source: str | Path, name: str, otherwise: float | None = None) -> Tensor | None:
    path = _beside(source, BIAS_FILE)
    if path is None or not path.is_file():
        return None
    bias, found = _numbers(path, "bias")[0], _numbers(path, name)[0]
    if bias is None:
        raise UserError(f"{path}: holds no finite number `bias`; train the reward model anew with center_rewards=true")
    found = otherwise if found is None else found
    return None if found is None else torch.tensor([found])


def readout_text(readout: Readout) -> str:
    """The content of READOUT_FILE."""
    return json.dumps({**readout._asdict(), "note": READOUT_NOTE.format(readout)}, indent=1) + "\n"


def kept_readout(source: str | Path | PreTrainedModel) -> Readout:
    """What the head of a reward model reads: of one in a folder or on a hub what lies beside its weights, else what
    stock transformers reads. UserError for a damaged file."""
    if isinstance(source, PreTrainedModel):
        return readout_of(source)
    path = _beside(source, READOUT_FILE)
    if path is None or not path.is_file():
        return Readout()
    try:
        written = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        pooling, layer = written["pooling"], written["layer"]
    except (ValueError, LookupError, TypeError):
        pooling, layer = None, None
    if pooling not in POOLINGS or type(layer) is not int:
        raise UserError(f"{path}: holds no `pooling` (last or mean) and whole number `layer`; train the model anew")
    return Readout(pooling, layer)


def link_of(source: str | Path) -> tuple[float, float] | None:
    """The scale and offset from raw outputs to people's scores of the model in a folder or on a hub; None: it has none.
    UserError for a damaged file."""
    path = _beside(source, LINK_FILE)
    if path is None or not path.is_file():
        return None
    scale, offset = _numbers(path, "scale", "offset")
    if scale is None or offset is None or scale <= 0:
        raise UserError(f"{path}: holds no numbers `scale` > 0 and `offset`; remove the file to learn them anew")
    return scale, offset


@dataclass(frozen=True)
class Heads:
    """The heads of an ensemble: weight [M, H] and bias [M], fp32 on the CPU."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, layer: nn.Linear) -> Heads:
        """Those of a layer [M, H]."""
        weight = layer.weight.detach().float().cpu()
        return cls(weight, torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach().float().cpu())

    @property
    def count(self) -> int:
        return len(self.weight)

    def whole(self) -> bool:
        """Whether these are several heads of finite numbers."""
        fits = self.weight.dim() == 2 and self.bias.shape == self.weight.shape[:1] and self.count > 1
        return fits and bool(self.weight.isfinite().all() and self.bias.isfinite().all())

    def text(self) -> str:
        """The content of HEADS_FILE."""
        numbers = {"bias": self.bias.tolist(), "weight": self.weight.tolist()}
        return json.dumps({"note": HEADS_NOTE, **numbers}) + "\n"

    def beside(self, score: nn.Linear) -> nn.Linear:
        """A layer [M, H] of the heads whose mean is `score`, with the shift that it has got by center_rewards."""
        if self.weight.shape[1] != score.weight.shape[1]:
            raise UserError(
                f"{HEADS_FILE}: its heads read {self.weight.shape[1]} states and the model has {score.weight.shape[1]}"
            )
        layer = nn.Linear(self.weight.shape[1], self.count, device=score.weight.device).requires_grad_(False)
        shift = 0.0 if score.bias is None else float(score.bias.detach()) - float(self.bias.mean())
        layer.weight.copy_(self.weight)
        layer.bias.copy_(self.bias + shift)
        return layer


def heads_of(source: str | Path) -> Heads | None:
    """The heads of the ensemble in a folder or on a hub; None: the model there has one head. UserError for a damaged
    file."""
    path = _beside(source, HEADS_FILE)
    if path is None or not path.is_file():
        return None
    try:
        written = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        heads = Heads(torch.tensor(written["weight"]), torch.tensor(written["bias"]))
    except (ValueError, LookupError, TypeError):
        heads = None
    if heads is None or not heads.whole():
        raise UserError(f"{path}: holds no `weight` and `bias` of two heads or more; remove it to use their mean")
    return heads


def _numbers(path: Path, *names: str) -> list[float | None]:
    """The finite numbers of these names in a JSON file, None for what is none."""
    try:
        written = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        found = [written[name] for name in names]
    except (ValueError, LookupError, TypeError):
        return [None] * len(names)
    numbers = [isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) for x in found]
    return [float(x) if number else None for x, number in zip(found, numbers)]


def _beside(source: str | Path, file: str) -> Path | None:
    """Where a file beside the weights of a model would lie; None: its hub has none."""
    folder = modelscope_folder(str(source), "reward") or Path(source)
    if folder.is_dir() or not HUB_ID.fullmatch(str(source)):
        return folder / file
    missing = dict.fromkeys(("missing_entries", "connection_errors", "gated_repo"), False)  # the weights told of those
    found = cached_file(str(source), file, **{f"_raise_exceptions_for_{name}": no for name, no in missing.items()})
    return None if found is None else Path(found)


def as_kept(model: PreTrainedModel, source: str | Path, *, centred: bool) -> PreTrainedModel:
    """Give the head `score` what lies beside the weights that the model was read from: its readout and its bias.

    centred: with the shift of center_rewards; without, as training has it, with the bias that training learnt alone.
    """
    readout, bias = kept_readout(source), bias_of(source) if centred else learnt_bias_of(source)
    if readout != Readout():
        layers = model.config.get_text_config().num_hidden_layers
        readout.check(layers, f"{_beside(source, READOUT_FILE)}: layer")
        model.score_readout = readout
    if bias is not None:
        model.score.bias = nn.Parameter(bias.to(model.score.weight), requires_grad=model.score.weight.requires_grad)
    return model
