"""Weights as files: the shards of a folder read a tensor at a time, and new shards written as they fill.

Safetensors, and torch's .bin through torch.load(weights_only=True): its unpickler builds tensors and plain containers
and calls nothing else. Both are mapped into memory where the file allows it, so what is read is what is asked for.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from fastrlhf.config.errors import UserError
from fastrlhf.config.outcome import outcome

T = TypeVar("T")
STEMS = ("model", "pytorch_model", "adapter_model")  # as transformers and peft name them
SHARD_OF = re.compile(r"(?P<stem>[\w.-]+?)-(?P<number>\d{5})-of-(?P<count>\d{5})\.(?P<ending>safetensors|bin)$")
WEIGHT_FILE = re.compile(rf"({'|'.join(STEMS)})(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?$")
LFS_POINTER = b"version https://git-lfs"
PART_BYTES = 1 << 30  # parts of a state dict are written together until they are so many
NAMES = {  # of dtypes in safetensors, whose files have the last of these first
    **{torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16"},
    **{torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"},
}
SHARD_BYTES = 4 << 30  # the most a written shard holds, beside a single larger tensor


class Header(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights of a model or adapter: safetensors where there are any, else .bin; may be none."""
    for ending in (".safetensors", ".bin"):
        found = [path for path in sorted(folder.glob(f"*{ending}")) if WEIGHT_FILE.fullmatch(path.name)]
        if found or (folder / f"{'model' if ending != '.bin' else 'pytorch_model'}{ending}.index.json").is_file():
            return found
    return []


def tensor_names(folder: Path) -> set[str]:
    """Names of the tensors of a folder, from its index or the headers of safetensors; no pickle is opened.

    What cannot be read gives no names: loading it says why.
    """
    indexes = sorted(folder.glob("*.index.json"))
    try:
        if indexes:
            return set(json.loads(indexes[0].read_text(encoding="utf-8"))["weight_map"])
        return {name for path in folder.glob("*.safetensors") for name in _Shard(path).names()}
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return set()


def _read(path: Path, load: Callable[[], T]) -> T:
    """What a library makes of a file of weights: whatever it raises over it is one UserError that names it."""
    result, error = outcome(load)
    if error is None:
        return result
    kind = type(error).__name__
    if kind == "UnpicklingError":  # torch's own text advises to switch the check off
        problem = "it is damaged or holds more than tensors; nothing of it was run"
    else:
        problem = f"it is damaged ({kind}: {(str(error).splitlines() or [''])[0][:200]}); copy it again"
    raise UserError(f"{path}: cannot be read as weights: {problem}") from error


class _Shard:
    """One open file of weights."""

    def __init__(self, path: Path) -> None:
        self.path, self.mapped = path, True
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise UserError(f"{path}: is a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
        self._tensors = None if path.suffix == ".safetensors" else self._unpickled()
        self._file = _read(path, lambda: safe_open(path, framework="pt")) if self._tensors is None else None

    def _unpickled(self) -> dict[str, Tensor]:
        def load() -> Any:
            try:
                return torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
            self.mapped = False  # written by a torch before 1.6, not as a zip file: it is read whole
            return torch.load(self.path, map_location="cpu", weights_only=True)

        tensors = _read(self.path, load)
        if not isinstance(tensors, Mapping):
            raise UserError(f"{self.path}: holds a {type(tensors).__name__}, not tensors by name")
        wrong = next((name for name, value in tensors.items() if not isinstance(value, Tensor)), None)
        if wrong is not None:
            kind = type(tensors[wrong]).__name__
            raise UserError(f"{self.path}: {wrong!r} is a {kind}; a checkpoint of weights holds nothing but tensors")
        if not tensors:
            raise UserError(f"{self.path}: holds no tensors; copy it again")
        for name, tensor in tensors.items():
            if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
                raise UserError(f"{self.path}: {name!r} is sparse, quantised or without values; expected plain weights")
        return {str(name): tensor.detach() for name, tensor in tensors.items()}

    def names(self) -> list[str]:
        return list(self._file.keys()) if self._tensors is None else list(self._tensors)

    def header(self, name: str) -> Header:
        if self._tensors is not None:
            return Header(tuple(self._tensors[name].shape), self._tensors[name].dtype)
        part = self._file.get_slice(name)
        empty = part[:0] if part.get_shape() else self._file.get_tensor(name)
        return Header(tuple(part.get_shape()), empty.dtype)

    def get(self, name: str) -> Tensor:
        return _read(self.path, lambda: self._file.get_tensor(name)) if self._tensors is None else self._tensors[name]


def _headers(shard: _Shard) -> dict[str, Header]:
    return {name: shard.header(name) for name in shard.names()}


class WeightFiles:
    """The weights of a folder, a tensor at a time. headers: shape and dtype by name.

    Raises UserError, naming files, for shards that are missing, damaged or hold other tensors than the index says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.paths = folder, weight_files(folder)
        missing = self._missing()
        if missing:
            names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise UserError(f"{folder}: of its weights {len(missing)} shards are missing: {names}; copy them there too")
        if not self.paths:
            raise UserError(f"{folder}: holds no weights (model*.safetensors or pytorch_model*.bin)")
        self.headers: dict[str, Header] = {}
        self._path_of: dict[str, Path] = {}
        self._open: _Shard | None = None
        for path in self.paths:
            shard = self._shard(path)
            found = _read(path, partial(_headers, shard))
            self._path_of |= dict.fromkeys(found, path)
            self.headers |= found
        lost = sorted(set(self._weight_map()) - set(self.headers))
        if lost:
            where = self._weight_map()[lost[0]]
            raise UserError(f"{folder}: {where} holds no {lost[0]!r}, which the index says it does; copy it again")

    def _weight_map(self) -> dict[str, str]:
        ending = self.paths[0].suffix if self.paths else None
        for path in sorted(self.folder.glob("*.index.json")):
            if WEIGHT_FILE.fullmatch(path.name) and ending in (None, Path(path.name.split(".index")[0]).suffix):
                try:
                    return {
                        str(k): str(v) for k, v in json.loads(path.read_text(encoding="utf-8"))["weight_map"].items()
                    }
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise UserError(f"{path}: is no index of shards ({type(error).__name__}); copy it again") from error
        return {}

    def _missing(self) -> list[str]:
        """Shards that the index or the count in the files' names speaks of and that are not there."""
        named = set(self._weight_map().values())
        for path in self.paths:
            match = SHARD_OF.fullmatch(path.name)
            if match:
                stem, count, ending = match["stem"], int(match["count"]), match["ending"]
                named |= {f"{stem}-{i:05d}-of-{count:05d}.{ending}" for i in range(1, count + 1)}
        return sorted(named - {path.name for path in self.paths})

    def _shard(self, path: Path) -> _Shard:
        if self._open is None or self._open.path != path:
            self._open = None  # the old mapping goes before the new one comes
            self._open = _Shard(path)
        return self._open

    def release(self) -> None:
        """Give the pages of what was read back. A file that had to be read whole stays: it would be read again."""
        if self._open is not None and self._open.mapped:
            self._open = None

    def __contains__(self, name: str) -> bool:
        return name in self._path_of

    def get(self, name: str) -> Tensor:
        """A tensor on the CPU, perhaps a view of the mapped file: it is not to be written into."""
        return self._shard(self._path_of[name]).get(name)

    def shards(self) -> Iterator[list[str]]:
        """The names of each file's tensors, file after file."""
        for path in self.paths:
            yield [name for name, own in self._path_of.items() if own == path]


class Streamed(NamedTuple):
    """Tensors of which the lead never holds all: shapes and dtypes by name, and the tensors, a few at a time."""

    headers: dict[str, Header]
    parts: Iterable[dict[str, Tensor]]

    @property
    def nbytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.headers.values())

    def write(self, path: Path) -> None:
        """The very file that `safetensors.torch.save_file` writes of all of them, in whatever order they come. OSError
        of the disk; RuntimeError where other tensors come than were announced, or not all."""
        kinds = list(NAMES)
        order = sorted(self.headers, key=lambda name: (-kinds.index(self.headers[name].dtype), name))
        places, end = {}, 0
        for name in order:
            shape, dtype = self.headers[name]
            places[name] = (end, end := end + math.prod(shape) * dtype.itemsize)
        described = {
            name: {
                "dtype": NAMES[self.headers[name].dtype],
                "shape": list(self.headers[name].shape),
                "data_offsets": list(places[name]),
            }
            for name in order
        }
        header = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
        header += b" " * (-len(header) % 8)
        missing = set(order)
        with path.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            begins = file.tell()
            for part in self.parts:
                for name, tensor in part.items():
                    if name not in missing or Header(tuple(tensor.shape), tensor.dtype) != self.headers[name]:
                        raise RuntimeError(f"{path}: {name} is not as it was announced")
                    missing.remove(name)
                    file.seek(begins + places[name][0])
                    file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
                    del tensor  # or it would live until the next one is here
                del part
            file.truncate(begins + end)
        if missing:
            raise RuntimeError(f"{path}: {min(missing)} did not come")


def save_in_parts(model: PreTrainedModel, folder: Path, parts: Iterable[dict[str, Tensor]]) -> None:
    """`model.save_pretrained` of a state dict that comes in parts, which are written as soon as they are PART_BYTES
    together: a file each, and their index, as other tools write models of several files; the usual files where they are
    not. A part holds all of what transformers renames or splits together (a layer, or what is outside of layers)."""
    own, files = folder / ".part", []
    state: dict[str, Tensor] = {}

    def write() -> None:
        model.save_pretrained(own, state_dict=dict(state), max_shard_size=1 << 62)
        found = own / "model.safetensors"
        files.append((folder / f".part-{len(files) + 1:05d}", tensor_names(own)))
        found.rename(files[-1][0])
        state.clear()

    for part in parts:
        state |= part
        del part
        if sum(tensor.nbytes for tensor in state.values()) >= PART_BYTES:
            write()
    if state or not files:
        write()
    for path in list(own.iterdir()):
        path.rename(folder / path.name)
    own.rmdir()
    if len(files) == 1:
        files[0][0].rename(folder / "model.safetensors")
        return
    weight_map, total = {}, 0
    for number, (path, names) in enumerate(files, 1):
        final = folder / f"model-{number:05d}-of-{len(files):05d}.safetensors"
        path.rename(final)
        weight_map |= dict.fromkeys(sorted(names), final.name)
        total += final.stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


class ShardWriter:
    """Tensors into `STEM-00001-of-0000N.safetensors` and their index, or one `STEM.safetensors`; peak: one shard."""

    def __init__(self, folder: Path, stem: str = "model", limit: int = SHARD_BYTES) -> None:
        self.folder, self.stem, self.limit = folder, stem, limit
        self._tensors: dict[str, Tensor] = {}
        self._storages: set[int] = set()
        self._bytes, self._total = 0, 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> bool:
        """Take a tensor -> whether that filled the shard, which is then on the disk. What shares memory is copied."""
        storage = tensor.untyped_storage().data_ptr()
        shared = storage in self._storages or tensor.untyped_storage().nbytes() > tensor.nbytes
        tensor = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
        self._storages.add(storage)
        self._tensors[name] = tensor
        self._bytes += tensor.nbytes
        if self._bytes >= self.limit:
            self.flush()
        return not self._tensors

    def flush(self) -> None:
        """End the shard."""
        if not self._tensors:
            return
        try:
            save_file(self._tensors, self._path(len(self._shards)), metadata={"format": "pt"})
        except KeyError as error:
            raise UserError(
                f"{error} is a dtype that safetensors does not hold; convert those weights first"
            ) from error
        self._shards.append(list(self._tensors))
        self._total += self._bytes
        self._tensors, self._storages, self._bytes = {}, set(), 0

    def close(self) -> None:
        """End the last shard, give all their final names, write the index."""
        self.flush()
        count = len(self._shards)
        if count == 1:
            self._path(0).rename(self.folder / f"{self.stem}.safetensors")
            return
        weight_map = {}
        for i, names in enumerate(self._shards):
            final = f"{self.stem}-{i + 1:05d}-of-{count:05d}.safetensors"
            self._path(i).rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        (self.folder / f"{self.stem}.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")

    def _path(self, index: int) -> Path:
        return self.folder / f".shard-{index + 1:05d}"
