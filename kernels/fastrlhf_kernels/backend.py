"""Which implementation runs: one decision, one sentence that says why."""

from __future__ import annotations

import os
from typing import NamedTuple

NAMES = ("auto", "torch", "triton")


class Backend(NamedTuple):
    """A chosen implementation and the reason it was chosen (for logs and `fastrlhf doctor`)."""

    name: str
    reason: str


def choose_backend(requested: str = "auto") -> Backend:
    """Resolve the `backend` argument. FASTRLHF_BACKEND overrides "auto", never an explicit argument.

    Raises ValueError for an unknown name and for "triton", which this version does not have.
    """
    name, source = requested, "the backend argument"
    if requested == "auto":
        name, source = (
            os.environ.get("FASTRLHF_BACKEND") or "auto",
            "the environment variable FASTRLHF_BACKEND",
        )
    if name not in NAMES:
        raise ValueError(f"{source} is {name!r}; expected one of {', '.join(map(repr, NAMES))}")
    if name == "triton":
        raise ValueError(
            f'{source} asks for "triton", but the Triton kernels are not part of this version; use "torch" or "auto"'
        )
    if name == "torch":
        return Backend("torch", f"{source} says so")
    return Backend("torch", "the Triton kernels are not part of this version")
