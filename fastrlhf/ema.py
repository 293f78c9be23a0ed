"""An average of the policy's weights, which evaluation and export use in place of the last ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastrlhf.optim import Optimizer


class WeightAverage:
    """e <- decay * e + (1 - decay) * w after every applied update of the policy, from e = w at the start.

    Polyak and Juditsky 1992, in the exponential form of InstructGPT (Ouyang et al. 2022, appendix C.4: decay 0.992).
    fp32, of what the optimizer trains: all weights or an adapter, of their fp32 masters where the model is bf16.
    Rollouts and training go on with the live weights.
    """

    def __init__(self, optimizer: Optimizer, decay: float) -> None:
        self.optimizer, self.decay, self._in_use = optimizer, decay, False
        self.weights = [master.detach().clone() for master in optimizer.masters]

    @torch.no_grad()
    def update(self) -> None:
        for average, master in zip(self.weights, self.optimizer.masters, strict=True):
            average.lerp_(master, 1.0 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model holds the average, in the same storages; behind, the very bytes it held before. May nest.

        fp32 weights change places with their average, so no second copy is made; bf16 weights are made again from
        their masters.
        """
        if self._in_use:
            yield
            return
        self._in_use = True
        try:
            self._exchange(back=False)
            yield
        finally:
            self._exchange(back=True)
            self._in_use = False

    @torch.no_grad()
    def _exchange(self, *, back: bool) -> None:
        for param, master, average in zip(self.optimizer.params, self.optimizer.masters, self.weights, strict=True):
            if master is param:
                held = param.clone()
                param.copy_(average)
                average.copy_(held)
            else:
                param.copy_(master if back else average)

    def tensors(self) -> dict[str, Tensor]:
        """Of the checkpoint, in the order of the optimizer's parameters."""
        return {str(i): average for i, average in enumerate(self.weights)}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        for i, average in enumerate(self.weights):
            average.copy_(tensors[str(i)])
