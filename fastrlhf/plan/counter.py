"""Bytes of the tensors that are alive, and the most that there were: one counter of predictions and real runs."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROUND, LARGE, LARGE_ROUND = 512, 10 << 20, 2 << 20  # of torch's CUDA allocator: block, large request, its segment


def allocated(size: int) -> int:
    """Bytes that torch's CUDA allocator takes for a storage of `size`: blocks of 512 bytes, and of 2 MiB from 10 MiB on
    (CUDACachingAllocator's kMinBlockSize, kMinLargeAlloc and kRoundLarge)."""
    unit = LARGE_ROUND if size >= LARGE else ROUND
    return -(-size // unit) * unit


class LiveBytes(TorchDispatchMode):
    """Counts, while it is entered, every storage that an operator returns, until it is freed.

    A storage counts once, however many views there are. What an operator takes inside and gives back is not seen: the
    tiles of the fused head, a library's workspace. now, peak: bytes; rounded, rounded_peak: as `allocated` has them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.rounded = self.rounded_peak = 0
        self._alive: dict[int, int] = {}

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that are there already."""
        for tensor in tensors:
            self._add(tensor)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()
        self._alive[key] = size
        self.now += size
        self.rounded += allocated(size)
        self.peak, self.rounded_peak = max(self.peak, self.now), max(self.rounded_peak, self.rounded)
        weakref.finalize(storage, self._gone, key).atexit = False

    def _gone(self, key: int) -> None:
        size = self._alive.pop(key)
        self.now -= size
        self.rounded -= allocated(size)

    @contextmanager
    def phase(self) -> Iterator[None]:
        """Have `peak` and `rounded_peak` be those of what runs inside, from what is alive at its start."""
        self.peak, self.rounded_peak = self.now, self.rounded
        yield

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function.namespace == "prim":  # asks for a property
            return function(*args, **(kwargs or {}))
        if function.namespace == "aten" and function._can_decompose():
            # In inference mode whole ones come here: what they are made of is counted there too.
            TorchDispatchMode.__enter__(self)
            try:
                return function.decompose(*args, **(kwargs or {}))
            finally:
                TorchDispatchMode.__exit__(self, None, None, None)
        result = self.run(function, args, kwargs or {})
        for tensor in tensors_in(result):
            self._add(tensor)
        return result

    def run(self, function: Any, args: tuple, kwargs: dict) -> Any:
        """The result of an operator."""
        return function(*args, **kwargs)


def tensors_in(*values: Any) -> Iterator[Tensor]:
    """The tensors among an operator's arguments or results, which nest in lists and tuples only."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(*value)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages of tensors."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
