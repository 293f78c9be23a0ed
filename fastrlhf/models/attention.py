"""The attention that a model of a class is loaded with: what was asked for, where the class has it.

What config.json says of it never counts. It may name a kernel of the hub, and that is code.
"""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from fastrlhf.config.errors import UserError
from fastrlhf.runtime.hardware import FLASH_PACKAGES, resolve_attention

LOG = logging.getLogger(__name__)
KNOWN = (None, "eager", "sdpa", "flex_attention", *FLASH_PACKAGES)


def attention_for(kind: type[PreTrainedModel], asked: str, device: torch.device, dtype: torch.dtype) -> str:
    """The `attn_implementation` of a model of this class. asked: the option `attention`; auto falls back to what the
    class has, UserError names it where another was asked for."""
    best = resolve_attention(asked, device, dtype)
    if asked == "auto":
        return best if has_attention(kind, best) else default_attention(kind)
    if not has_attention(kind, best):
        there = default_attention(kind)
        raise UserError(f"attention: transformers has no {best!r} for {kind.__name__}; use attention={there} or auto")
    return best


def has_attention(kind: type[PreTrainedModel], name: str) -> bool:
    """Whether transformers would load a model of this class with it. Other names than ours are for models that bring
    theirs along."""
    if name in FLASH_PACKAGES:
        return bool(kind._supports_flash_attn)
    return bool(kind._supports_sdpa) if name == "sdpa" else True


def default_attention(kind: type[PreTrainedModel]) -> str:
    """sdpa, or eager for a class that has none."""
    return "sdpa" if has_attention(kind, "sdpa") else "eager"


def tell_foreign_attention(config: PreTrainedConfig, role: str, source: object) -> None:
    """Say it where a folder names an attention of the hub, which is not loaded."""
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs or ())]
    for name in sorted({str(part._attn_implementation) for part in parts if isinstance(part, PreTrainedConfig)}):
        if name not in map(str, KNOWN):
            LOG.warning("%s: config.json of %r asks for the attention %r, which is left out", role, str(source), name)
