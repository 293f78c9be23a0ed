"""From the raw output of a reward model to the scale of people's scores: two numbers, learnt beside the head.

score = scale * raw + offset, scale > 0, in deviations of the training scores from their mean. Without them the scores
would pull the raw output into [-1, 1] while pairs pull the differences of it far beyond.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor, nn

from fastrlhf.data.feedback import Feedback
from fastrlhf.reward.losses import SCORE_WEIGHT, record_loss
from fastrlhf.reward.raters import Raters

RATE = 0.01  # Adam's step of log scale and offset at the peak of the schedule, whatever the model's learning rate
NOTE = "a given score is about scale * raw + offset, raw the output of the head `score` without score_bias.json"


class ScoreLink:
    """The learnt scale and offset, and how given scores are read; weight: of the squared error.

    raters: of the training scores. known: scale and offset as `text` wrote them, to go on from; None: scale 1 and
    offset 0 in deviations from the mean, so that a raw output of 0 is the mean score. score_range: as in RewardConfig.
    """

    weight = SCORE_WEIGHT

    def __init__(
        self, raters: Raters, score_range: tuple[float, float], known: tuple[float, float] | None = None
    ) -> None:
        self.raters = raters
        self._low, self._half = score_range[0], (score_range[1] - score_range[0]) / 2
        scale, offset = 1.0, 0.0
        if known is not None:
            scale = known[0] / self._half / raters.deviation
            offset = ((known[1] - self._low) / self._half - 1 - raters.mean) / raters.deviation
        self.values = nn.Parameter(torch.tensor([math.log(scale), offset]))
        self._adam = torch.optim.Adam([self.values], lr=RATE)

    @property
    def scale(self) -> float:
        """Deviations of people's scores for a raw difference of 1."""
        return float(self.values.detach()[0].exp())

    @property
    def offset(self) -> float:
        """Deviations above the mean that a raw output of 0 stands for."""
        return float(self.values.detach()[1])

    def loss(self, scores: Tensor, feedback: Feedback, smoothing: float = 0.0) -> Tensor:
        """Loss of one record from the raw outputs [K] fp32 of its responses -> 0-d, also differentiable in `values`; of
        M heads [K, M] -> [M]. smoothing: of its labels."""
        if feedback.scores is None:
            return record_loss(scores, feedback, smoothing=smoothing)
        values = self.values.to(scores.device)
        read = scores * values[0].exp() + values[1]
        return record_loss(scores, feedback, read, self.raters.read(feedback), smoothing, self.weight)

    def take_gradient(self) -> Tensor:
        """The gradient [2] of `values` since the last call, which is forgotten then."""
        gradient, self.values.grad = self.values.grad, None
        return torch.zeros(2) if gradient is None else gradient

    def step(self, gradient: Tensor, share: float) -> None:
        """Update by Adam. gradient [2]: over all ranks. share: of the peak learning rate that the schedule has now."""
        self.values.grad = gradient.clone()
        self._adam.param_groups[0]["lr"] = RATE * share
        self._adam.step()
        self.values.grad = None

    def text(self) -> str:
        """The content of LINK_FILE, in the units of score_range."""
        unit = self._half * self.raters.deviation
        mean = self._low + self._half * (self.raters.mean + 1)
        return (
            json.dumps({"scale": self.scale * unit, "offset": mean + self.offset * unit, "note": NOTE}, indent=1) + "\n"
        )

    def state(self) -> dict[str, Any]:
        moments = self._adam.state.get(self.values, {})
        return {"values": self.values.tolist(), "moments": {name: moment.tolist() for name, moment in moments.items()}}

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        self.values.copy_(torch.tensor(state["values"]))
        self._adam.state.clear()
        if state["moments"]:
            self._adam.state[self.values] = {name: torch.tensor(value) for name, value in state["moments"].items()}
