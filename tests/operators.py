"""What a call dispatches, counted."""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")


class Operators(TorchDispatchMode):
    """Operators that compute or copy: neither views nor tensors that are only made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if not func.is_view and not name.startswith(("empty", "new_empty", "_unsafe_view")):
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


def waits_for_the_gpu(func, args, kwargs) -> str | None:
    """The name of an operation for which a host waits until a GPU has done all before it; None of another."""
    name = func._schema.name.split("::")[1]
    if name in WAITS or (name == "repeat_interleave" and (kwargs or {}).get("output_size") is None):
        return name
    if name in INDEXING and any(t is not None and t.dtype == torch.bool for t in args[1]):
        return "boolean index"
    return None
