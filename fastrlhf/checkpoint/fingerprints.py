"""What a run reads, so that a resumed run can prove that it reads the same: an absolute path and a hash of each input.

SHA-256 of the bytes: of a data file, of all files of a data folder, of the files of a model folder that a loader reads
(weights, config, tokenizer; those of the base too where the folder is an adapter), of FILE.py or MODULE's file for
FILE.py:FUNCTION and MODULE:FUNCTION. A model of the hub: its revision. Objects from Python: the rows as JSON, a
checksum of the weights, the vocabulary of a tokenizer, the source text of a function. What none of this fits is "not
checked".
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import PreTrainedTokenizerBase

from fastrlhf.checkpoint.atomic import sha256
from fastrlhf.config.inputs import MODELSCOPE, DataName, data_name
from fastrlhf.data.sources import PREFIX, is_packaged, modelscope_folder, packaged_file

MODEL_SUFFIXES = (".safetensors", ".gguf", ".json", ".jinja", ".txt", ".model")
CHUNK = 1 << 22  # elements of a tensor that are widened at a time


class NotChecked(Exception):  # noqa: N818
    """An input that cannot be compared; the message says why."""


class Fingerprint(NamedTuple):
    """path: absolute, None where nothing on this disk was named. digest: None where there is none, for `reason`."""

    path: str | None
    digest: str | None
    reason: str | None = None


class _Input(NamedTuple):
    """An input still to be hashed. files: relative name -> file; rest: what the input says beside its path."""

    name: str
    path: Path | None
    files: dict[str, Path]
    digest: Callable[[], str] | None = None
    rest: str = ""


class Fingerprints:
    """Hashes the inputs of a run in a thread, each file once. Loaded models are read at once: training changes them.

    kinds: of the inputs by name, as in config/inputs.py. texts: more that has to stay the same, by name: (path or None,
    text).
    """

    def __init__(
        self, inputs: Mapping[str, Any], kinds: Mapping[str, str], texts: Mapping[str, tuple[Path | None, Any]]
    ) -> None:
        self.seconds, self.bytes = 0.0, 0
        self._loaded: dict[int, str] = {}
        self._files: dict[str, str] = {}
        self._result: dict[str, Fingerprint] = {}
        plan = [part for name, value in inputs.items() for part in self._inputs(name, value, kinds[name])]
        plan += [_Input(name, path, {}, partial(_digest, [_json(text)])) for name, (path, text) in texts.items()]
        self._thread = threading.Thread(target=self._hash, args=(plan,), name="hashes of the inputs", daemon=True)
        self._thread.start()

    def result(self) -> dict[str, Fingerprint]:
        """The fingerprints by name, once all are there. An entry of a list is called NAME.ENTRY, the base of an adapter
        NAME.base."""
        self._thread.join()
        return self._result

    def line(self) -> str:
        """For people: what was hashed, in how many seconds, and what was not."""
        checked = [name for name, one in self.result().items() if one.digest is not None]
        skipped = [f"{name} ({one.reason})" for name, one in self.result().items() if one.digest is None]
        text = f"hashed {', '.join(checked) or 'nothing'}: {self.bytes / 1e6:,.1f} MB in {self.seconds:.1f} s"
        return f"{text}; not checked at a resume: {', '.join(skipped)}" if skipped else text

    def _hash(self, plan: list[_Input]) -> None:
        start = time.monotonic()
        for part in plan:
            path = None if part.path is None else str(part.path.absolute())
            try:
                digest = self._content(part.files, part.rest) if part.digest is None else part.digest()
                self._result[part.name] = Fingerprint(path, digest)
            except (NotChecked, OSError, ValueError, TypeError) as error:
                self._result[part.name] = Fingerprint(path, None, str(error))
        self.seconds += time.monotonic() - start

    def _content(self, files: Mapping[str, Path], rest: str) -> str:
        """Hash the files of a folder, or one file whatever it is called."""
        if not files:
            raise NotChecked("no files")
        lines = [rest] * bool(rest)
        for name, path in sorted(files.items()):
            real = os.path.realpath(path)
            if real not in self._files:
                self._files[real] = sha256(Path(real))
                self.bytes += os.path.getsize(real)
            lines.append(f"{name} {self._files[real]}")
        return _digest(line.encode() for line in lines)

    # --------------------------------------------------------------------------------------- from an argument to files

    def _inputs(self, name: str, value: Any, kind: str) -> Iterator[_Input]:
        if value is None:
            return
        if kind == "reward" and isinstance(value, (list, tuple)):
            kept = []
            for number, entry in enumerate(value):
                source, rest = _entry(entry)
                kept.append(rest)
                yield from self._inputs(f"{name}.{_entry_name(entry) or number}", source, kind)
            yield _Input(name, None, {}, partial(_digest, [_json(kept)]))  # names, weights, labels
        elif isinstance(value, (str, Path)):
            yield from self._named(name, str(value), kind)
        elif isinstance(value, nn.Module):
            start = time.monotonic()
            if id(value) not in self._loaded:
                self._loaded[id(value)] = _checksum(value)
            digest = self._loaded[id(value)]
            self.seconds += time.monotonic() - start
            yield _Input(name, None, {}, lambda: digest)
        elif isinstance(value, PreTrainedTokenizerBase):
            yield _Input(name, None, {}, lambda: _digest([_json(sorted(value.get_vocab().items()))]))
        elif callable(value):
            yield _Input(name, None, {}, partial(_source_text, value))
        else:
            yield _Input(name, None, {}, partial(_rows, value))

    def _named(self, name: str, text: str, kind: str) -> Iterator[_Input]:
        path, rest = path_of(text, kind, name)
        if path is None:
            yield _Input(name, None, {}, partial(_hub_revision, text, kind))
            return
        if path.is_file():
            yield _Input(name, path, {"": path}, rest=rest)
            return
        models = kind != "data"
        inside = (p for p in (path.iterdir() if models else path.rglob("*")) if p.is_file() and p.name[0] != ".")
        files = {p.relative_to(path).as_posix(): p for p in inside if not models or p.suffix in MODEL_SUFFIXES}
        yield _Input(name, path, files, rest=rest)
        base = _base_of(path) if models else None
        if base is not None and len(name) < 200:  # an adapter that leads back to itself was refused before
            yield from self._named(f"{name}.base", base, kind)


def path_of(text: str, kind: str, role: str) -> tuple[Path | None, str]:
    """-> the file or folder that the value of an input names, None: none that is here (a hub id); and what it says
    beside that (a function, a split). kind: of the input, which errors call `role`."""
    if is_packaged(text):
        return packaged_file(text, role), ""
    if kind != "function":
        name = data_name(text) if kind == "data" else DataName(text)
        downloaded = modelscope_folder(name.path, role, data=kind == "data")
        if downloaded is not None:
            return downloaded, ":".join(filter(None, name[1:]))
    path = Path(text).expanduser()
    if os.path.exists(path):
        return path, ""
    where, colon, rest = text.rpartition(":")
    if not colon or "://" in text or kind == "model":
        return None, ""
    if kind == "data":  # NAME:SPLIT
        path, before = path_of(where, kind, role)
        return path, f"{before}:{rest}"
    if where.endswith(".py"):
        return (Path(where) if os.path.isfile(where) else None), rest
    try:
        spec = importlib.util.find_spec(where)
    except (ImportError, ValueError):
        return None, ""
    return (None if spec is None or not spec.has_location else Path(spec.origin)), rest


def absolute(value: Any, kind: str) -> Any:
    """The value of an input with the paths in it absolute, so that it means the same in every current directory."""
    if kind == "reward" and isinstance(value, (list, tuple)):
        return [_replace_source(entry, kind) for entry in value]
    if not isinstance(value, (str, Path)) or str(value).startswith((PREFIX, MODELSCOPE)):
        return value
    text = str(value)
    for end in [len(text), *(i for i in reversed(range(len(text))) if text[i] == ":")]:
        if end and os.path.exists(os.path.expanduser(text[:end])):
            return os.path.abspath(os.path.expanduser(text[:end])) + text[end:]
    return text


def _entry(entry: Any) -> tuple[Any, Any]:
    """Source and the rest of an entry of a weighted list."""
    if isinstance(entry, Mapping):
        rest = {key: value for key, value in entry.items() if key not in ("model", "function")}
        return entry.get("model") if entry.get("function") is None else entry["function"], rest
    return entry[2], [*entry[:2], *entry[3:]]


def _entry_name(entry: Any) -> str:
    name = entry.get("name") if isinstance(entry, Mapping) else entry[0]
    return "" if name is None else str(name)


def _replace_source(entry: Any, kind: str) -> Any:
    if isinstance(entry, Mapping):
        return {k: absolute(v, kind) if k in ("model", "function") else v for k, v in entry.items()}
    return [*entry[:2], absolute(entry[2], kind), *entry[3:]]


def _base_of(folder: Path) -> str | None:
    try:
        return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


# ------------------------------------------------------------------------------------------------- what is no file here


def _digest(lines: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line + b"\n")
    return digest.hexdigest()


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")


def _rows(value: Any) -> str:
    """Hash rows that were given from Python, as JSON; whatever can be read only once is left alone."""
    if not hasattr(value, "__len__"):
        raise NotChecked(f"a {type(value).__name__} can be read only once")
    if isinstance(value, Mapping):
        return _digest(_json([name, _rows(rows)]) for name, rows in sorted(value.items()))
    if hasattr(value, "with_format"):  # a datasets.Dataset that was formatted for training
        value = value.with_format(None)
    return _digest(map(_json, value))


def _source_text(function: Callable[..., Any]) -> str:
    """Hash a function as it is written, not its file: a script that is told to resume has changed itself."""
    while isinstance(function, partial):
        function = function.func
    written = function if inspect.isroutine(function) or inspect.isclass(function) else type(function)
    try:
        return _digest([inspect.getsource(written).encode()])
    except (OSError, TypeError) as error:
        raise NotChecked("its source is not known") from error


def _hub_revision(name: str, kind: str) -> str:
    """The commit that the cache of the hub has for a model."""
    if kind != "data":
        for file in ("config.json", "adapter_config.json", "tokenizer_config.json"):
            found = try_to_load_from_cache(name, file)
            if isinstance(found, str):
                return f"revision {Path(found).parent.name}"
    raise NotChecked("from the hub")


@torch.no_grad()
def _checksum(model: nn.Module) -> str:
    """Hash the weights without copying them to the host: of each tensor the sum of its words, each times its place
    (both modulo 2^64), which is the same on every device and in any order of adding."""
    lines = []
    for name, tensor in model.state_dict().items():
        words = tensor.detach().contiguous().flatten()
        kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        words = words.view(kinds[words.element_size()])
        total = torch.zeros((), dtype=torch.int64, device=words.device)
        for start in range(0, len(words), CHUNK):
            piece = words[start : start + CHUNK].to(torch.int64)
            places = torch.arange(start + 1, start + 1 + len(piece), device=words.device)
            total += (piece * places).sum()
        lines.append((name, list(tensor.shape), str(tensor.dtype), total))
    return _digest(_json([*rest, int(total)]) for *rest, total in lines)


# ------------------------------------------------------------------------------------------------------------ compared


def changes(saved: Mapping[str, Fingerprint], now: Mapping[str, Fingerprint]) -> tuple[dict[str, str], list[str]]:
    """-> (name: sentence of each input that is not what it was; notes on what moved or cannot be compared)."""
    changed, notes = {}, []
    for name in sorted(saved.keys() | now.keys()):
        if name not in saved or name not in now:
            there = saved.get(name) or now[name]
            first, then = ("with", "without") if name in saved else ("without", "with")
            changed[name] = f"{name}: this run was started {first} and would resume {then} it ({_where(there)})"
            continue
        before, here = saved[name], now[name]
        moved = "" if before.path == here.path else f", which was {_where(before)} then,"
        if before.digest is None or here.digest is None:
            notes.append(f"{name}: not checked whether it is as before ({before.reason or here.reason})")
        elif before.digest != here.digest:
            changed[name] = f"{name}: {_where(here)}{moved} is not what this run was started with (other content)"
        elif moved:
            notes.append(f"{name}: {_where(here)}{moved} has the same content")
    return changed, notes


def _where(one: Fingerprint) -> str:
    return one.path or "what was given"
