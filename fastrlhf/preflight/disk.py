"""The run folder before a run: it can be taken and written, and the disk has room for what will be in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from fastrlhf.checkpoint.run_folder import check_output_dir
from fastrlhf.config.base import StageConfig
from fastrlhf.config.errors import UserError
from fastrlhf.models.lora import target_layers
from fastrlhf.runtime import distributed
from fastrlhf.runtime.hardware import resolve_dtype

AT_ONCE = 3  # checkpoints: two are kept, the next is written before one of them goes
MOMENTS = {"adamw": 8, "adamw8bit": 2, "paged_adamw8bit": 2}  # bytes of the optimizer's state for a parameter


def check_folder(config: StageConfig) -> None:
    """UserError for a run folder that cannot be used or written; removes nothing."""
    if config.output_dir is None or not distributed.is_lead():  # the lead may have taken it already
        return
    check_output_dir(config)
    there = _existing(Path(config.output_dir))
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(
            f"output_dir: {config.output_dir!r} cannot be written: the folder {str(there)!r} is read-only; name another"
        )


def _existing(path: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


class Trained(NamedTuple):
    """What a role adds to the disk. saved: bytes of a checkpoint; exported: bytes of its model folder."""

    saved: int
    exported: int


def trained_bytes(model: PreTrainedModel, config: StageConfig, *, average: bool = False) -> Trained:
    """Bytes of a trained role, from its shapes alone. average: a copy in fp32 is saved too (ema_decay)."""
    whole = sum(parameter.numel() for parameter in model.parameters())
    dtype = model.dtype if model.device.type != "meta" else resolve_dtype(config.dtype)
    width = torch.finfo(dtype).bits // 8
    count = whole
    if config.lora is not None:
        layers = dict(model.named_modules())
        names = target_layers(model, config.lora["target_modules"])
        count = sum(config.lora["r"] * sum(layers[name].weight.shape) for name in names)
    elif getattr(config, "head_only", False):
        count = model.config.get_text_config().hidden_size + 1  # w and b
    masters = 4 if width < 4 else 0
    state = count * (MOMENTS[config.optimizer] + masters + 4 * average)
    weights = count if config.lora is not None else whole
    return Trained(weights * width + state, whole * width)


def head_bytes(count: int, config: StageConfig) -> Trained:
    """Bytes of a head of so many parameters in fp32, which no model folder holds."""
    return Trained(count * (4 + MOMENTS[config.optimizer]), 0)


def check_room(config: StageConfig, roles: Sequence[Trained], saves: int) -> str | None:
    """A sentence on the room that this run's checkpoints and model folders need; None where nothing is written.

    roles: the first is exported, as final and as best. saves: checkpoints that the run writes. UserError where the disk
    has less; what an older run in the folder takes comes free.
    """
    if config.output_dir is None or not roles or not distributed.is_lead():
        return None
    folder = Path(config.output_dir)
    checkpoints = min(saves, AT_ONCE)
    count = f"{checkpoints} checkpoint{'s' * (checkpoints > 1)}"
    needed = checkpoints * sum(role.saved for role in roles) + (2 if config.eval_every else 1) * roles[0].exported
    there = _existing(folder)
    usage = shutil.disk_usage(there)
    if not usage.total:  # a file system that tells no sizes
        return None
    free = usage.free + _size(folder)
    if needed > free:
        raise UserError(
            f"output_dir: {str(folder)!r}: this run writes about {_spelled(needed)} ({count} at once, "
            f"with the state of the optimizers, and its model folders), and {_spelled(free)} are free; make room, or "
            "name a folder on another disk"
        )
    return f"output_dir: about {_spelled(needed)} for {count} and the model, {_spelled(free)} are free"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def _spelled(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
