"""Frozen models that wait in host memory: on the device only while a phase reads them.

Their weights never change, so nothing is ever copied back: the host's copy stays where it is, and the one on the device
is dropped. ZeRO-Offload (Ren et al. 2021) does this for what trains; here it is the two roles that do not.

Where a GPU has room for it, a model is fetched while the phase before its own still runs, on a stream of its own.
No GPU has confirmed what that saves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrlhf.runtime.memory import free_bytes, total_bytes

SPARE = 8  # a model is fetched early where this part of the memory stays free beside it


class SideStream:
    """Copies to a GPU beside what it computes."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def begin(self, copies: Callable[[], None]) -> torch.cuda.Event:
        """Start copies() once all is done that was asked for before: the memory that it fills may have been theirs.
        -> what says that they are there."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            copies()
        return self.stream.record_event()

    def join(self, there: torch.cuda.Event) -> None:
        """What is asked for from here on starts after those copies; those of another model may go on."""
        torch.cuda.current_stream(self.device).wait_event(there)


class Offload:
    """Which models are parked in host memory, and the way to `device` and back. Without any it does nothing."""

    def __init__(self, device: torch.device, side: SideStream | None = None) -> None:
        """side: where models are fetched early; None: a stream of a GPU's own, and nowhere on a CPU."""
        self.device = device
        self.side = SideStream(device) if side is None and device.type == "cuda" else side
        self._parked: list[PreTrainedModel] = []
        # By the model's id: its tensors, which may be on their way, and what says that they are there.
        self._fetched: dict[int, tuple[list[Tensor], torch.cuda.Event]] = {}

    @torch.no_grad()
    def park(self, model: PreTrainedModel) -> None:
        """Into host memory, page-locked where there is a GPU, for copies at full speed; dtypes stay."""
        for tensor in _tensors(model):
            home = tensor.data.to("cpu")
            tensor.data = home.pin_memory() if self.device.type == "cuda" else home
        self._parked.append(model)

    @torch.no_grad()
    def fetch(self, model: PreTrainedModel | None) -> bool:
        """Begin to bring a parked model, for the next `here`, where the device has room -> whether it is on its way."""
        if self.side is None or not any(model is parked for parked in self._parked):
            return False
        if id(model) not in self._fetched:
            homes = [tensor.data for tensor in _tensors(model)]
            room = free_bytes(self.device) - total_bytes(self.device) // SPARE
            if any(type(home) is not Tensor for home in homes):  # a sharded model's go the plain way
                return False
            if sum(home.nbytes for home in homes) > room:
                return False
            copies = [torch.empty_like(home, device=self.device) for home in homes]  # of the stream that reads them
            self._fetched[id(model)] = copies, self.side.begin(lambda: _copy(copies, homes))
        return True

    def give_back(self) -> bool:
        """Memory is short: drop what is on its way, and fetch nothing early from now on -> whether there was any."""
        held = bool(self._fetched)
        for _, there in self._fetched.values():
            self.side.join(there)  # before anything else is given their memory
        self._fetched.clear()
        self.side = None if held else self.side
        return held

    def _arrived(self, model: PreTrainedModel, homes: list[Tensor]) -> list[Tensor]:
        """The model's tensors on the device, those that were fetched or new copies."""
        if id(model) not in self._fetched:
            return [home.to(self.device, non_blocking=True) for home in homes]
        copies, there = self._fetched.pop(id(model))
        self.side.join(there)
        return copies

    def forget(self, model: PreTrainedModel | None) -> None:
        """It is not needed any more."""
        _, there = self._fetched.pop(id(model), (None, None))
        if there is not None:
            self.side.join(there)
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
                for tensor, copy in zip(tensors, self._arrived(model, homes), strict=True):
                    tensor.data = copy
            yield model
        finally:
            for tensor, home in zip(tensors, homes, strict=True):
                tensor.data = home
            self._parked.append(model)


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=True)


def _tensors(model: PreTrainedModel) -> list[Tensor]:
    """Each tensor once, tied ones too."""
    return [*model.parameters(), *model.buffers()]
