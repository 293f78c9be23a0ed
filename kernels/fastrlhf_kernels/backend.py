"""Which implementation runs: one decision, one sentence that says why."""

from __future__ import annotations

import importlib.util
import os
from typing import NamedTuple

import torch
from torch import Tensor

NAMES = ("auto", "torch", "triton")
TRITON = importlib.util.find_spec("triton") is not None
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton does, read once: its kernels are built at import
OLDEST = (8, 0)  # compute capability: bf16 products in tensor cores


class Backend(NamedTuple):
    """A chosen implementation and the reason it was chosen (for logs and `fastrlhf doctor`)."""

    name: str
    reason: str


def choose_backend(requested: str = "auto", *tensors: Tensor | None, kernel: bool = True) -> Backend:
    """Resolve the `backend` argument for the tensors of a call; `kernel`: whether there is a Triton kernel for it.

    "auto" takes Triton for CUDA (or ROCm) tensors and torch for all others; float64 always runs in torch. The
    environment variable FASTRLHF_BACKEND overrides "auto", never an explicit argument. Raises ValueError for an
    unknown name, and for "triton" where it cannot run: Triton not installed, tensors on the CPU without
    TRITON_INTERPRET=1, and, where the argument asks for it, float64 tensors and functions without a kernel.
    """
    name, source = requested, "the backend argument"
    if requested == "auto":
        name, source = os.environ.get("FASTRLHF_BACKEND") or "auto", "the environment variable FASTRLHF_BACKEND"
    if name not in NAMES:
        raise ValueError(f"{source} is {name!r}; expected one of {', '.join(map(repr, NAMES))}")
    if name == "torch":
        return Backend("torch", f"{source} says so")
    if requested != "triton" and any(t is not None and t.dtype == torch.float64 for t in tensors):
        return Backend("torch", "float64 runs in torch")
    if not kernel and requested != "triton":
        return Backend("torch", "this function has no Triton kernel yet")
    obstacle = _obstacle(tensors, name) if kernel else "this function has no Triton kernel yet"
    if name == "auto":
        return Backend("torch", obstacle) if obstacle else Backend("triton", "the tensors are on a GPU")
    if obstacle:
        raise ValueError(f'{source} asks for "triton", but {obstacle}; use "torch" or "auto"')
    return Backend("triton", f"{source} says so")


def _obstacle(tensors: tuple[Tensor | None, ...], name: str) -> str:
    """Why the Triton kernels cannot run on these tensors, or ''."""
    if not TRITON:
        return "triton is not installed (pip install triton)"
    given = [t for t in tensors if t is not None]
    if any(t.dtype == torch.float64 for t in given):
        return "float64 runs in torch only"
    kinds = {t.device.type for t in given}
    if kinds == {"cuda"}:
        return "" if all(_new_enough(t.device.index) for t in given) else "the GPU is older than sm_80"
    if kinds == {"cpu"} and INTERPRET:
        return "" if name == "triton" else "the tensors are on the CPU"
    what = " and ".join(sorted(kinds)) or "nothing"
    return f"the tensors are on {what} (its kernels run on a GPU, or on the CPU with TRITON_INTERPRET=1)"


def _new_enough(device: int | None) -> bool:
    return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= OLDEST


# What `torch.compiler.assume_constant_result` sets. It is not called: it imports torch._dynamo, a second and more, into
# every process that imports this package.
_new_enough._dynamo_marked_constant = True
