"""Frozen models that wait in host memory: on the device only while a phase reads them.

Their weights never change, so nothing is ever copied back: the host's copy stays where it is, and the one on the device
is dropped. ZeRO-Offload (Ren et al. 2021) does this for what trains; here it is the two roles that do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel


class Offload:
    """Which models are parked in host memory, and the way to `device` and back. Without any it does nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._parked: list[PreTrainedModel] = []

    @torch.no_grad()
    def park(self, model: PreTrainedModel) -> None:
        """Into host memory, page-locked where there is a GPU, for copies at full speed; dtypes stay."""
        for tensor in _tensors(model):
            home = tensor.data.to("cpu")
            tensor.data = home.pin_memory() if self.device.type == "cuda" else home
        self._parked.append(model)

    def forget(self, model: PreTrainedModel | None) -> None:
        """It is not needed any more."""
        self._parked = [parked for parked in self._parked if parked is not model]

    @contextmanager
    def here(self, model: PreTrainedModel | None) -> Iterator[PreTrainedModel | None]:
        """Inside, the model is on the device. One that is not parked, or is here already, stays as it is."""
        if not any(model is parked for parked in self._parked):
            yield model
            return
        self._parked.remove(model)
        tensors = _tensors(model)
        homes = [tensor.data for tensor in tensors]
        try:
            with torch.no_grad():
                for tensor, home in zip(tensors, homes, strict=True):
                    tensor.data = home.to(self.device, non_blocking=True)
            yield model
        finally:
            for tensor, home in zip(tensors, homes, strict=True):
                tensor.data = home
            self._parked.append(model)


def _tensors(model: PreTrainedModel) -> list[Tensor]:
    """Each tensor once, tied ones too."""
    return [*model.parameters(), *model.buffers()]
