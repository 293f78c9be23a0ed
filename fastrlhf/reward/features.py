"""What a linear reward model learns from: states of a frozen trunk, read once, and the place that tells most."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrlhf.config.errors import UserError
from fastrlhf.data.encode import Record
from fastrlhf.models.heads import POOLINGS, Readout, readout_of, row_states, states_of_layers
from fastrlhf.reward.link import ScoreLink
from fastrlhf.runtime import distributed
from fastrlhf.runtime.batching import assign_rows, micro_batches

Rows = Sequence[list[int]]
LAYERS = 8  # that `choose_readout` tries, evenly spaced, the last one among them
RECORDS = 512  # to learn from and held out, each, that it tries them on at most
DECAY = 0.01  # half of it times |w|^2 is added to the mean loss of a record there, in units of standardised features
NEEDS_HELD_OUT = "readout = auto: chooses on held-out rows, and there are none; give eval_data, or name last or mean"


class Features:
    """The states [H] of token rows, as a model's readout gives them, on the CPU.

    Every rank reads its share and gets them all, since each step hands out the records anew. Rows are known by the very
    list that they are, which must not change.
    """

    def __init__(self, model: PreTrainedModel, rows: Rows, budget: int) -> None:
        """budget: padded tokens of one forward."""
        self._rows, readout = list(rows), readout_of(model)
        self._places = {id(row): place for place, row in enumerate(self._rows)}
        width = model.score.weight.shape[1]
        self._states = torch.zeros(len(self._rows), width, dtype=model.dtype if readout.pooling == "last" else None)
        mine = assign_rows([len(row) for row in self._rows])
        for group in micro_batches([len(self._rows[i]) for i in mine], budget):
            places = [mine[i] for i in group]
            with torch.inference_mode():
                part = row_states(model, [self._rows[place] for place in places], readout)
            self._states[places] = part.cpu()
        distributed.all_reduce_sum(self._states)

    def of(self, rows: Rows) -> Tensor:
        """The states [B, H] of these rows; KeyError for one that was not read."""
        return self._states[[self._places[id(row)] for row in rows]]


class KeptReadout:
    """A model's readout as a part of a checkpoint: `auto` might choose another one on another machine."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def state(self) -> dict[str, Any]:
        return readout_of(self.model)._asdict()

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.score_readout = Readout(**state)


class Tried(NamedTuple):
    """loss: of a held-out record, of a linear model on what the readout gives."""

    readout: Readout
    loss: float


def candidates(layers: int) -> list[Readout]:
    """The readouts that `choose_readout` tries on a trunk of so many layers; the stock one is the first."""
    count = min(LAYERS, layers)
    some = sorted({round(layers * (i + 1) / count) for i in range(count)}, reverse=True)
    return [Readout(pooling, -1 if layer == layers else layer) for layer in some for pooling in POOLINGS]


def choose_readout(
    model: PreTrainedModel, items: Sequence[Record], held_out: Sequence[Record], link: ScoreLink, budget: int, seed: int
) -> list[Tried]:
    """Try readouts: a linear model is fitted on each (L-BFGS, DECAY), and its loss on held-out records taken.

    -> best first, and of equals the stock one; the same on all ranks. link: says the loss of a record. budget: padded
    tokens of one forward. UserError without held-out records.
    """
    if not held_out:
        raise UserError(NEEDS_HELD_OUT)
    draw = random.Random(f"readout {seed}")
    parts = [draw.sample(list(some), min(RECORDS, len(some))) for some in (items, held_out)]
    readouts = candidates(model.config.get_text_config().num_hidden_layers)
    states = [_states(model, [row for record in part for row in record.rows], readouts, budget) for part in parts]
    losses = [_held_out_loss(link, parts, [some[i] for some in states]) for i in range(len(readouts))]
    agreed = distributed.gather_each(torch.tensor(losses, dtype=torch.float64))[0].tolist()
    return sorted(map(Tried, readouts, agreed), key=lambda tried: tried.loss)


def _states(model: PreTrainedModel, rows: Rows, readouts: Sequence[Readout], budget: int) -> list[Tensor]:
    """Of each readout the states [len(rows), H] fp32 on the CPU."""
    width = model.score.weight.shape[1]
    found = [torch.empty(len(rows), width) for _ in readouts]
    for group in micro_batches([len(row) for row in rows], budget):
        with torch.inference_mode():
            parts = states_of_layers(model, [rows[i] for i in group], readouts)
        for states, part in zip(found, parts):
            states[group] = part.float().cpu()
    return found


def _held_out_loss(link: ScoreLink, parts: Sequence[Sequence[Record]], states: Sequence[Tensor]) -> float:
    """Fit w'y + b to the first part -> the mean loss of a record of the second; infinite where a state is not finite.
    The features are standardised by the first."""
    mean, deviation = states[0].mean(0), states[0].std(0, unbiased=False)
    if not all(some.isfinite().all() for some in states):
        return math.inf
    train, held_out = ((some - mean) / deviation.clamp_min(1e-6) for some in states)
    head = torch.zeros(train.shape[1] + 1, requires_grad=True)
    solver = torch.optim.LBFGS([head], max_iter=60, line_search_fn="strong_wolfe")

    def mean_loss(records: Sequence[Record], features: Tensor) -> Tensor:
        outputs = (features @ head[:-1] + head[-1]).split([len(record.rows) for record in records])
        losses = [link.loss(output, record.feedback) for output, record in zip(outputs, records, strict=True)]
        return torch.stack(losses).mean()

    def closure() -> Tensor:
        solver.zero_grad()
        loss = mean_loss(parts[0], train) + DECAY / 2 * head[:-1].square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    link.take_gradient()  # of a link that is not fitted here
    with torch.no_grad():
        loss = float(mean_loss(parts[1], held_out))
    return loss if math.isfinite(loss) else math.inf
