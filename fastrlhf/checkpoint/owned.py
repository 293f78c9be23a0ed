"""Which files of a folder are ours: what replaces or empties a folder removes those and no other.

A model folder that was exported lists its files in `.fastrlhf-files.json`, a checkpoint in its manifest. The other
files of a run have fixed names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from fastrlhf.checkpoint.lock import LOCK
from fastrlhf.config.errors import UserError

LIST = ".fastrlhf-files.json"
MANIFEST = "MANIFEST.json"
STAGE_FOLDERS = ("sft", "reward", "ppo")
MODEL_FOLDERS = ("base", "best", "final", "adapter")
RUN_FILES = {"config.yaml", "run.json", "metrics.jsonl", "samples.jsonl", "events.jsonl", "timings.jsonl", "log.txt"}
RUN_FILES |= {"report.html", ".report.html.partial", "verdict.json", "heldout.jsonl", LOCK}
RUN_FILES |= {f".tmp-{name}" for name in ("config.yaml", "run.json")} | {".mode"}
# What libraries write beside weights: for folders of older versions and damaged ones, which list nothing.
MODEL_FILE = re.compile(r".*\.(safetensors|json|jinja|txt|model|py)|\.mode")
_EVENTS = re.compile(r"events\.out\.tfevents\.")
CHECKPOINT = re.compile(r"(\.(tmp|old)-.*)?step-\d{6,}(-\d+)?")


def write_list(folder: Path) -> None:
    """List every file in a folder that is about to be published."""
    names = sorted({path.relative_to(folder).as_posix() for path in _entries(folder)} | {LIST})
    (folder / LIST).write_text(json.dumps({"files": names}, indent=1) + "\n", encoding="utf-8")


def unlisted(folder: Path) -> Path | None:
    """The first file of a folder that is not in its list; the folder itself where it has files and no list."""
    entries = list(_entries(folder))
    names = _listed(folder / LIST)
    if names is None and folder.name in MODEL_FOLDERS and (folder.parent / "run.json").is_file():
        return next(_others(folder, None, LIST), None)
    if names is None:
        return folder if entries else None
    return next((path for path in entries if path.relative_to(folder).as_posix() not in names), None)


def check_no_link(run: Path) -> None:
    """UserError where a file that a run writes is a link: writing would change what somebody else's link points to."""
    link = next((run / name for name in sorted(RUN_FILES) if (run / name).is_symlink()), None)
    if link is not None:
        raise UserError(f"{str(link)!r} is a link, and a run writes files of its own only; remove it")


def foreign(run: Path) -> Path | None:
    """The first file in a run folder that no run wrote, or None."""
    return next(_foreign(run), None)


def _foreign(run: Path) -> Iterator[Path]:
    for path in sorted(run.iterdir()):
        name = path.name
        if path.is_symlink() or not path.is_dir():
            if path.is_symlink() or name not in RUN_FILES:
                yield path
        elif name in STAGE_FOLDERS and _has_stages(run):
            yield from _foreign(path)
        elif name == "checkpoints":
            yield from _foreign_checkpoints(path)
        elif name == "tensorboard":
            yield from (file for file in _entries(path) if file.is_symlink() or not _EVENTS.match(file.name))
        elif name in MODEL_FOLDERS or (path / LIST).is_file() or name.startswith((".tmp-", ".old-")):
            yield from _others(path, _listed(path / LIST), LIST)
        else:
            yield next(_entries(path), path)


def _has_stages(run: Path) -> bool:
    """Whether a run is a quickstart's; in the folder of another, sft/ is a run of its own that somebody put there."""
    try:
        return json.loads((run / "run.json").read_text(encoding="utf-8"))["verb"] == "quickstart"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _foreign_checkpoints(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_dir() or not CHECKPOINT.fullmatch(path.name):
            yield path
        else:
            yield from _others(path, _listed(path / MANIFEST), MANIFEST)


def _others(folder: Path, names: set[str] | None, own: str) -> Iterator[Path]:
    """Files that a list does not name; without a list, those that no library writes into a model folder."""
    for path in _entries(folder):
        known = MODEL_FILE.fullmatch(path.name) if names is None else path.relative_to(folder).as_posix() in names
        if path.is_symlink() or not (known or path.name == own):
            yield path


def _listed(path: Path) -> set[str] | None:
    """Names in a list or a manifest; None where it is missing or damaged."""
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["files"]
        return set(names)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _entries(folder: Path) -> Iterator[Path]:
    """Everything below a folder but plain folders with something in them, in order; links are not followed."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            inside = list(_entries(path))
            yield from inside or [path]
        else:
            yield path
