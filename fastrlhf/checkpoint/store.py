"""Checkpoints that survive kill -9, a full disk and damaged files.

A checkpoint is the folder `RUN_DIR/checkpoints/step-000120`: a normal Hugging Face folder for each model,
`NAME.safetensors` for each group of tensors, `state.json`, and `MANIFEST.json` with the SHA-256 and size of
every file. Nothing in it is a pickle.

Order of a save: write everything into `.tmp-...` in the same directory, fsync files and folders, rename,
fsync the parent, and only then remove old checkpoints (never below two, and never the one just committed).
Whatever moment a process dies at, the folder called `step-...` is complete or absent. Left out: locking (one
process saves), sharded state of several ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastrlhf._version import __version__
from fastrlhf.checkpoint.atomic import CheckpointError, files, recover, replace_folder, sha256
from fastrlhf.checkpoint.owned import MANIFEST
from fastrlhf.checkpoint.quiet import quiet_loading
from fastrlhf.checkpoint.state import mismatch
from fastrlhf.checkpoint.weight_files import Streamed, save_in_parts
from fastrlhf.config.errors import UserError

FORMAT_VERSION = 1
FAILURES_ALLOWED = 3
SPACE_FACTOR = 1.2  # file headers, tokenizer, and file-system rounding above the bytes of the tensors
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
STEP = re.compile(r"step-(\d{6,})")
FIELDS = {"format_version": int, "step": int, "versions": dict, "files": dict}  # of a manifest


class DamagedError(Exception):
    """A checkpoint folder is not what its manifest says; the message names the file and what is wrong."""


def folder_name(step: int) -> str:
    return f"step-{step:06d}"


def versions() -> dict[str, str]:
    """Of everything that a checkpoint's bytes depend on, by name."""
    libraries = {library.__name__: library.__version__ for library in (torch, transformers, safetensors)}
    return {"fastrlhf": __version__, "python": platform.python_version(), **libraries}


# ------------------------------------------------------------------------------------------------------ the manifest


def manifest_text(manifest: dict[str, Any]) -> str:
    """The one spelling of a manifest: a file that differs from it in any byte is damaged, its own hash
    included.
    """
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1, sort_keys=True) + "\n"


def _write_manifest(folder: Path, step: int) -> None:
    listed = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in files(folder)
    }
    manifest = {"format_version": FORMAT_VERSION, "step": step, "versions": versions(), "files": listed}
    (folder / MANIFEST).write_text(manifest_text(manifest), encoding="utf-8")


def _verify(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint after reading every byte it lists. Raises DamagedError; UserError
    for a format of the future.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes().decode("utf-8")  # not read_text: it takes \r\n for \n, so damage could hide
        manifest = json.loads(text)
        intact = isinstance(manifest, dict) and text == manifest_text(manifest)
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: {error}") from error
    if not intact:
        raise DamagedError(f"{path}: its content does not match its own hash")
    wrong = next((name for name, kind in FIELDS.items() if not isinstance(manifest.get(name), kind)), None)
    if wrong is not None:  # made by hand: its hash fits
        raise DamagedError(f"{path}: has no {wrong!r} as fastrlhf writes it")
    # From here on the manifest is what some version wrote, so its fields may be relied on: a format that is not known
    # is no damage, and an older checkpoint must not be taken in its place.
    if manifest["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{path}: checkpoint format {manifest['format_version']}, this version of fastrlhf reads "
            f"format {FORMAT_VERSION}; use the version that wrote it ({manifest['versions'].get('fastrlhf')})"
        )
    if folder.name != folder_name(manifest["step"]):
        raise DamagedError(f"{path}: written for step {manifest['step']}, found in a folder called {folder.name}")
    for name, expected in manifest["files"].items():
        if not isinstance(expected, dict) or {"bytes", "sha256"} - expected.keys() or not _inside(name):
            raise DamagedError(f"{path}: its entry {name!r} is not one that fastrlhf writes")
        _verify_file(folder / name, expected)
    return manifest


def _inside(name: str) -> bool:
    """Whether a name in a manifest stays in the checkpoint's own folder."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def _verify_file(file: Path, expected: dict[str, Any]) -> None:
    if not file.is_file():
        raise DamagedError(f"{file}: missing")
    try:
        size = file.stat().st_size
        if size != expected["bytes"]:  # the usual damage, seen without reading gigabytes
            raise DamagedError(f"{file}: {size} bytes, {expected['bytes']} were written")
        if sha256(file) != expected["sha256"]:
            raise DamagedError(f"{file}: its SHA-256 is not the one that was written")
    except OSError as error:
        raise DamagedError(f"{file}: {error}") from error


# -------------------------------------------------------------------------------------------------------- reading one


class Checkpoint:
    """A verified checkpoint: `step`, `state` (the dictionary given to `save`), and its tensors and models on
    demand.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path = path
        self.step: int = manifest["step"]
        self.versions: dict[str, str] = manifest["versions"]
        self.files: list[str] = sorted(manifest["files"])
        try:
            self.state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
        except RecursionError as error:  # made by hand: its hash fits
            raise DamagedError(f"{path}/state.json: {error}") from error

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors saved under `name`, on the CPU. Raises UserError when the checkpoint has none of that
        name.
        """
        if f"{name}.safetensors" not in self.files:
            raise mismatch(f"{self.path}: no tensors called {name!r}", "options as before")
        return load_file(self.path / f"{name}.safetensors")

    def load_model(self, name: str, model: torch.nn.Module) -> None:
        """Copy the saved weights into the live model in place: same storages, tied weights stay tied, other
        buffers untouched. Errors are those of `model_tensors`; nothing is changed then.
        """
        live = model.state_dict()
        with torch.no_grad():
            for key, tensor in self.model_tensors(name, model, live).items():
                live[key].copy_(tensor)

    def model_tensors(self, name: str, model: torch.nn.Module, live: dict[str, Tensor]) -> dict[str, Tensor]:
        """The saved weights under the names of the live ones, a state dict of `model`.

        Raises UserError naming the first tensor that is missing, unknown, or of another shape or dtype.
        """
        folder = self.path / name
        shards = [file for file in self.files if file.startswith(f"{name}/") and file.endswith(".safetensors")]
        if not shards:
            raise mismatch(f"{self.path}: no model called {name!r}", "options as before")
        saved: dict[str, Tensor] = {}
        for shard in shards:
            with safe_open(self.path / shard, framework="pt") as file:
                saved.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118 (not a dict)
        if saved.keys() - live.keys() and _model_type(folder) == model.config.model_type:
            saved = _in_memory_form(folder, type(model), next(iter(live.values())).dtype)
        _check_weights(str(folder), saved, live, getattr(model, "_keys_to_ignore_on_save", None) or ())
        return saved


def _model_type(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]


def _in_memory_form(folder: Path, kind: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights under the names of the live module. Transformers keeps the published names on disk and renames
    or stacks some architectures' weights (GPT-NeoX, mixtures of experts) only while loading.
    """
    with quiet_loading(), torch.random.fork_rng(devices=[]):  # building a model draws its first weights
        model, report = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    for problem, names in report.items():
        if names:
            raise mismatch(f"{folder}: {problem} {sorted(map(str, names))[0]}")
    return model.state_dict()


def _check_weights(where: str, saved: dict[str, Tensor], live: dict[str, Tensor], ignored: Any) -> None:
    for key, tensor in saved.items():
        if key not in live:
            raise mismatch(f"{where}: weight {key} is not in this run's model")
        before, here = (f"{weight.dtype} {list(weight.shape)}" for weight in (tensor, live[key]))
        if before != here:
            problem = f"weight {key} is {before} in the checkpoint, {here} in this run's model"
            raise mismatch(f"{where}: {problem}", "model and dtype")
    # Of tied weights the folder holds one name only, and a live model fills all of them through it. So what must be
    # complete is the set of storages, not of names; and two saved names of one storage must agree.
    filled: dict[tuple[Any, ...], str] = {}
    for key, tensor in saved.items():
        first = filled.setdefault(_storage(live[key]), key)
        if first != key and not torch.equal(saved[first], tensor):
            both = f"weights {first} and {key}"
            raise mismatch(f"{where}: {both} are one tensor in this run's model and two in the checkpoint")
    for key, tensor in live.items():
        if _storage(tensor) not in filled and key not in ignored:
            raise mismatch(f"{where}: weight {key} of this run's model is not in the checkpoint")


# ------------------------------------------------------------------------------------------------------------ tensors


def _storage(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _bytes(tensors: dict[str, Tensor]) -> int:
    """Bytes of the tensors, tied ones counted once."""
    return sum({_storage(tensor): tensor.nbytes for tensor in tensors.values()}.values())


def _portable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """CPU, contiguous, and no two sharing memory (safetensors refuses those; bitsandbytes shares its code
    maps).
    """
    seen: set[int] = set()
    result: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        result[key] = tensor
    return result


# --------------------------------------------------------------------------------------------------------- all of them


class CheckpointStore:
    """The checkpoints of one run folder. `notes` collects sentences about what was found or went wrong, for
    the run's log.
    """

    def __init__(self, run_dir: str | Path, keep: int = 2):
        if keep < 2:
            raise ValueError(f"keep is {keep}; at least 2 checkpoints must stay, or damage to one loses the run")
        self.run_dir = Path(run_dir)
        self.folder = self.run_dir / "checkpoints"
        self.keep = keep
        self.failures = 0
        self.notes: list[str] = []
        self._damaged: set[str] = set()
        for folder in (self.run_dir, self.folder):
            if folder.is_dir():
                recover(folder)

    def steps(self) -> list[int]:
        """Steps of the checkpoint folders, oldest first; not verified."""
        folders = (path for path in self.folder.glob("step-*") if path.is_dir())
        matches = (STEP.fullmatch(path.name) for path in folders)
        return sorted(int(match[1]) for match in matches if match)

    def save(
        self,
        step: int,
        *,
        models: dict[str, Any],
        tensors: Mapping[str, dict[str, Tensor] | Streamed],
        state: dict[str, Any],
        tokenizer: Any = None,
        weights: Mapping[str, tuple[int, Iterable[dict[str, Tensor]]]] | None = None,
    ) -> Path:
        """Commit a checkpoint of `step` and rotate the old ones. Returns its folder.

        models: name -> transformers model, written by `save_pretrained` in its own dtype; tensors: name ->
        tensors of any dtype and device; state: anything JSON can hold (floats come back exactly, tuples as
        lists); the tokenizer goes beside the first model; weights: name -> bytes and parts of a state dict
        (`save_in_parts`), in place of the model's own. Parts are taken in the order of models, then of tensors.
        Raises CheckpointError when the disk is full or fails: nothing of this save is left and older checkpoints are
        untouched.
        """
        for name in [*models, *tensors]:
            if not NAME.fullmatch(name) or (name in models and name in tensors):
                rule = "letters, digits, - and _, each name once"
                raise ValueError(f"{name!r} cannot name a part of a checkpoint: {rule}")

        given = weights or {}

        def write(folder: Path) -> None:
            states = [model.state_dict() for name, model in models.items() if name not in given]
            in_memory = [group for group in tensors.values() if not isinstance(group, Streamed)]
            to_come = [group.nbytes for group in tensors.values() if isinstance(group, Streamed)]
            to_come += [size for size, _ in given.values()]
            _require_space(folder, [*states, *in_memory], sum(to_come))
            for index, (name, model) in enumerate(models.items()):
                with quiet_loading():
                    if name in given:
                        (folder / name).mkdir()
                        save_in_parts(model, folder / name, given[name][1])
                    else:
                        model.save_pretrained(folder / name)
                if index == 0 and tokenizer is not None:
                    tokenizer.save_pretrained(folder / name)
            for name, group in tensors.items():
                if isinstance(group, Streamed):
                    group.write(folder / f"{name}.safetensors")
                else:
                    save_file(_portable(group), folder / f"{name}.safetensors")
            (folder / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
            _write_manifest(folder, step)

        target = self.folder / folder_name(step)
        try:
            replace_folder(write, target)
        except CheckpointError as error:
            raise self._failed(target, error.__cause__) from error
        self.failures = 0
        self._damaged.discard(target.name)
        self.rotate(target)
        return target

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint whose every byte is the one written, or None. A damaged one gives one
        warning and is passed over.

        Raises UserError when a checkpoint was written in a format this version does not know.
        """
        for step in reversed(self.steps()):
            folder = self.folder / folder_name(step)
            try:
                checkpoint = Checkpoint(folder, _verify(folder))
            except (DamagedError, OSError, ValueError) as error:
                if isinstance(error, UserError):
                    raise
                self._damaged.add(folder.name)
                self.notes.append(f"checkpoint {folder.name} is damaged and not used ({error})")
                warnings.warn(self.notes[-1], stacklevel=2)
                continue
            here = versions()
            changed = [f"{k} {v} -> {here.get(k)}" for k, v in checkpoint.versions.items() if here.get(k) != v]
            if changed:
                self.notes.append(f"resumed under other versions, so not bit for bit: {', '.join(changed)}")
            return checkpoint
        return None

    def _failed(self, target: Path, reason: BaseException | None) -> CheckpointError:
        self.failures += 1
        fatal = self.failures >= FAILURES_ALLOWED
        end = "the third failure in a row" if fatal else "training can go on and try again at the next interval"
        message = f"checkpoint {target} was not written ({reason}); {end}"
        self.notes.append(message)
        return CheckpointError(message, fatal=fatal)

    def rotate(self, committed: Path) -> None:
        """Remove damaged and surplus old checkpoints beside `committed`, which is known to be sound. `save` does this
        itself; a resumed run does it for a save that was killed before it came so far. A failure here is a note.
        """
        others = [name for name in map(folder_name, self.steps()) if name != committed.name]
        damaged = [name for name in others if name in self._damaged]
        sound = [name for name in others if name not in self._damaged]
        surplus = sound[: max(0, len(sound) + 1 - self.keep)]  # oldest first; `committed` is one of those kept
        for name in [*damaged, *surplus]:
            # First out of sight in one move: a kill halfway leaves nothing that looks like a checkpoint, and the next
            # process that opens the folder removes what begins with .tmp-.
            gone = self.folder / f".tmp-remove-{name}"
            try:
                os.rename(self.folder / name, gone)
                shutil.rmtree(gone)
            except OSError as error:
                self.notes.append(f"old checkpoint {name} could not be removed: {error}")


def _require_space(folder: Path, groups: list[dict[str, Tensor]], to_come: int) -> None:
    """Raise OSError where the disk has no room for the tensors and those to come, before a byte of them is written."""
    needed = int(SPACE_FACTOR * (sum(map(_bytes, groups)) + to_come))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{needed:,} bytes are needed and {free:,} are free: {needed - free:,} bytes are missing")
