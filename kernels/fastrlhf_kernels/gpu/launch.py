"""Starting a kernel: a one-dimensional grid on the device of its tensors, or a record of it instead."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    """One start of a kernel, as `bench/compile_kernels.py` compiles it for chips that are not here."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    stages: int


_records: list[Launch] | None = None
_started = False  # whether what is recorded runs too


@contextmanager
def recorded(*, start: bool = False):
    """Kernels are listed in this context, not started: with `meta` tensors the launchers run without any device.
    start: they are started too."""
    global _records, _started
    before = (_records, _started)
    _records, _started = [], start
    try:
        yield _records
    finally:
        _records, _started = before


def launch(kernel, programs: int, device: torch.device, *arguments, warps: int = 4, stages: int = 2, **constants):
    """Start `kernel` on a grid of `programs` (none for 0) on `device`, which need not be the current one.

    The grid is one-dimensional: the second and third axes end at 65,535.
    """
    if programs == 0:
        return
    if _records is not None:
        _records.append(Launch(kernel, arguments, constants, warps, stages))
        if not _started:
            return
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[(programs,)](*arguments, **constants, **options)
    else:
        kernel[(programs,)](*arguments, **constants, **options)
