"""What a run computes in and attends with: `dtype` and `attention` of the configuration, resolved for a device."""

from __future__ import annotations

import importlib.util
import logging
import sys
from types import ModuleType

import torch

from fastrlhf.config.errors import UserError
from fastrlhf.runtime.distributed import device as local_device
from fastrlhf.runtime.distributed import size

FLASH_PACKAGES = {
    "flash_attention_2": ("flash_attn", "pip install flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "build flash-attn 3 from its hopper/ folder"),
    "flash_attention_4": ("flash_attn.cute", "pip install flash-attn-4"),
}
BEST_FLASH = {  # compute capability -> what `auto` takes first, if it is installed
    9: ("flash_attention_3", "flash_attention_2", "flash_attention_4"),
    10: ("flash_attention_4", "flash_attention_2"),
}


def resolve_dtype(name: str, device: torch.device | None = None) -> torch.dtype:
    """`auto` is bf16 on a CUDA device that computes in it, else fp32."""
    if name == "auto":
        device = device or local_device()
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def gpu_alone() -> bool:
    """Whether this process is the whole run and has a GPU."""
    return size() == 1 and local_device().type == "cuda"


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package of a dotted name is missing
        return False


def bitsandbytes(field: str, remedy: str) -> ModuleType:
    """The package, imported without the network: on CPUs with AVX512-BF16 its import asks Hugging Face's `kernels` to
    download one, so that package is out of its sight meanwhile. UserError: how to install it, or the remedy."""
    if not installed("bitsandbytes"):
        raise UserError(f"{field} needs `pip install bitsandbytes` (extra '8bit'), or {remedy}")
    if "bitsandbytes" not in sys.modules:
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # its warning that it found none
        hidden = {"kernels": sys.modules["kernels"]} if "kernels" in sys.modules else {}
        sys.modules["kernels"] = None  # type: ignore[assignment]
        try:
            importlib.import_module("bitsandbytes")
        finally:
            del sys.modules["kernels"]
            sys.modules.update(hidden)
    return sys.modules["bitsandbytes"]


def resolve_attention(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The `attn_implementation` to load with: `auto` is the flash-attention for the GPU that is installed, else SDPA.

    UserError names the package that an impossible choice would need.
    """
    can_flash = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    if name == "auto":
        found = [kind for kind in _best_flash(device) if installed(FLASH_PACKAGES[kind][0])] if can_flash else []
        return found[0] if found else "sdpa"
    if name in FLASH_PACKAGES:
        module, remedy = FLASH_PACKAGES[name]
        if not installed(module):
            raise UserError(f"attention: {name!r} needs the package {module!r} ({remedy}), or use 'sdpa'")
        if not can_flash:
            raise UserError(f"attention: {name!r} needs a CUDA device and bf16, this run has {device} and {dtype}")
    return name


def _best_flash(device: torch.device) -> tuple[str, ...]:
    return BEST_FLASH.get(torch.cuda.get_device_capability(device)[0], ("flash_attention_2",))
