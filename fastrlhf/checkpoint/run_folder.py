"""The run folder and the loop every stage shares: log, evaluate, checkpoint, resume, stop.

A stage owns the algorithm (`run_step`); this file owns everything around it, once. The loop is a generator, so that
the user can own it: `for step in trainer`.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import fastrlhf
from fastrlhf.config.base import StageConfig
from fastrlhf.config.errors import UserError

INLINE_ITEMS = 100  # a longer list is data handed over in Python, not part of a recipe
# Fields a resumed run may change: they steer the run, not its numbers (a longer run goes on from where it was), or save
# memory and change no more than rounding.
MAY_CHANGE = {"output_dir", "resume", "overwrite", "save_every", "total_steps", "epochs"}
MAY_CHANGE |= {"probe", "offload", "gradient_checkpointing", "micro_batch_tokens"}


def prepare_folder(folder: Path, *, overwrite: bool, resume: bool, verb: str | None = None) -> None:
    """Refuse a folder in use, or empty it. Only what a run wrote is ever removed: a folder without run.json is not.

    resume: the folder must hold a run (of `verb`, where given), or nothing yet.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir: {str(folder)!r} is a file; name a folder")
    if resume and not folder.is_dir():
        raise UserError(f"output_dir: {str(folder)!r} does not exist, so there is nothing to resume")
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if resume:
        if found - {"config.yaml"} and not found & {"run.json", "checkpoints"}:  # config.yaml: killed between the two
            raise UserError(f"output_dir: {str(folder)!r} holds files that no run wrote; there is nothing to resume")
        was = _run_json(folder)["verb"] if "run.json" in found else verb
        if verb is not None and verb != was:
            raise UserError(f"output_dir: {str(folder)!r} holds a {was} run, which {verb} cannot go on with")
        return
    if not found:
        return
    if not overwrite:
        raise UserError(
            f"output_dir: {str(folder)!r} is not empty; name another folder, or use --overwrite (resume=true goes on)"
        )
    if "run.json" not in found:
        raise UserError(f"output_dir: {str(folder)!r} holds files that no run wrote; empty it by hand")
    shutil.rmtree(folder)


def write_run_json(folder: Path, *, verb: str, **fields: Any) -> None:
    """What `fastrlhf resume` and the report read first: the verb, the inputs, the versions."""
    folder.mkdir(parents=True, exist_ok=True)
    versions = {
        "fastrlhf": fastrlhf.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    content = {"verb": verb, **fields, "versions": versions, "started": time.strftime("%Y-%m-%d %H:%M:%S")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    content["device"] = device
    write_whole(folder / "run.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that a reader finds the old one or the new one, whole."""
    fresh = path.with_name(f".tmp-{path.name}")
    with open(fresh, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def _run_json(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / "run.json"
    if not path.is_file():
        raise UserError(f"{str(folder)!r} is no run folder: it has no run.json")
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); start again with another output_dir") from error
    if not isinstance(run, dict) or "verb" not in run:
        raise UserError(f"{path}: not written by a run; name the run folder itself")
    return run


def read_run_json(folder: str | Path) -> dict[str, Any]:
    """run.json of a run folder. UserError when the folder is none, or holds objects only Python can pass again."""
    run = _run_json(folder)
    if run.get("from_python"):
        names = ", ".join(run["from_python"])
        raise UserError(
            f"{str(folder)!r} was started from Python with objects for {names}; resume it from Python: build the same "
            "trainer with resume=True"
        )
    return run


def identity(config: StageConfig) -> dict[str, Any]:
    """The fields that determine a run's numbers, as JSON knows them."""
    dumped = json.loads(config.model_dump_json())
    return {name: value for name, value in dumped.items() if name not in MAY_CHANGE}


def is_plain(value: Any) -> bool:
    """True for what YAML can hold: names and paths, but no loaded models, functions or data sets."""
    if isinstance(value, (list, tuple)):
        return len(value) <= INLINE_ITEMS and all(is_plain(item) for item in value)
    return value is None or isinstance(value, (str, int, float, Path))


def described(value: Any) -> Any:
    if is_plain(value):
        return str(value) if isinstance(value, Path) else value
    if isinstance(value, PreTrainedModel):
        return f"<loaded {type(value).__name__}>"
    return f"<{getattr(value, '__name__', type(value).__name__)}>"
