"""Rows of files and datasets, each with the place it came from.

JSON and JSONL are read here, line by line, because a message must name the line of a fault; CSV through the
standard library, which leaves "NA" and "007" as they stand; Parquet, saved datasets and hub ids through
`datasets`.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from fastrlhf.config import encodings
from fastrlhf.config.errors import UserError
from fastrlhf.config.inputs import DATA_SUFFIXES, HUB_ID, PACKED, DataName, data_name, modelscope_id
from fastrlhf.config.limits import bounded_content, bounded_lines
from fastrlhf.data.checks import BadRow
from fastrlhf.data.sources import files_of, is_packaged, is_saved, modelscope_folder, packaged_file, python_rows

# What the cells of a CSV column hold, where that is not text. A prompt may be either: text, or messages as JSON.
_CSV_LISTS = ("messages", "conversations", "responses", "scores", "ratings", "ranking", "history")
_CSV_MESSAGES = ("prompt", "chosen", "rejected", "completion")
_CSV_NUMBERS = ("score", "margin")
_CSV_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}

Rows = Iterator[tuple[str, Any]]  # (where, row); where is "file:line", "file row N" or "row N", all from 1


def read_rows(source: Any) -> Rows:
    """(where, row) of every row of source.

    source: a path (.json, .jsonl, .ndjson, .csv, each also .gz, .bz2, .xz or .zst; .parquet), a folder (written by
    save_to_disk, or of such files: see sources.py) or a hub id, both also with :SPLIT or :CONFIG:SPLIT behind them,
    package://NAME/FILE, or a Python object that has rows. A line that is no JSON or no UTF-8 comes as a BadRow in
    the row's place, so that the caller may skip it. where is "file:line", "file row N" or "row N" (all from 1). Raises
    UserError: unreadable or unknown source, a file that is broken as a whole, a split that is not there.
    """
    if isinstance(source, str) and is_packaged(source):
        name = DataName(str(packaged_file(source, "data")))
    elif isinstance(source, (str, Path)):
        name = data_name(str(source))
    else:
        yield from _dataset(python_rows(source))
        return
    path = Path(name.path)
    if path.is_dir():
        yield from _read_folder(path, name.config, name.split)
    elif path.is_file():
        if name.split is not None:
            raise UserError(f"{path} is a file, which has no split {name.split!r}; a folder or a hub id may have")
        yield from _read_file(path)
    else:
        yield from _read_hub(name)


def _dataset(rows: Any, source: Any = None, split: str | None = None) -> Rows:
    """Rows of a datasets.Dataset, of the named or the right split of a DatasetDict, or of any iterable."""
    name = source or "the dataset"
    if isinstance(rows, dict):
        if split is None and "train" not in rows and len(rows) != 1:
            how = f"name one, {source}:{next(iter(rows))}" if source else "pass the dataset of one split"
            raise UserError(f"{name} has the splits {', '.join(rows)} but no train; {how}")
        if split is not None and split not in rows:
            raise UserError(f"{name}: no split {split!r}; there are {', '.join(rows)}")
        rows = rows[split or ("train" if "train" in rows else next(iter(rows)))]
    elif split is not None and split != str(rows.split):
        only = f"split {rows.split}" if rows.split else "dataset without splits"
        raise UserError(f"{name}: no split {split!r}; it is one {only}")
    if hasattr(rows, "with_format"):
        rows = rows.with_format(None)  # a format set for training would give tensors and arrays
    name = f"{source} row" if source else "row"
    return ((f"{name} {number}", row) for number, row in enumerate(rows, 1))


def _read_hub(name: DataName) -> Rows:
    path = Path(name.path)
    looks_local = path.is_absolute() or name.path.startswith(".") or name.path.lower().endswith(DATA_SUFFIXES)
    if looks_local or not (HUB_ID.fullmatch(name.path) or modelscope_id(name.path)):
        raise UserError(f"{name.path}: no such file or folder")
    import datasets

    whole = ":".join(filter(None, name))
    downloaded = modelscope_folder(name.path, "data", data=True)  # whose files `datasets` reads as those of its hub
    try:
        rows = datasets.load_dataset(str(downloaded or name.path), name.config, split=name.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).splitlines()[:2]) or type(error).__name__
        problem = "neither a file or folder here nor a dataset that can be loaded from the hub"
        raise UserError(f"{whole}: {problem} ({reason})") from error
    yield from _dataset(rows, whole)


def _read_folder(path: Path, config: str | None, split: str | None) -> Rows:
    if config is not None and is_saved(path / config):
        path, config = path / config, None
    if is_saved(path):
        if config is not None:
            raise UserError(f"{path}: no config {config!r}; a saved dataset has none, only splits")
        import datasets

        try:
            rows = datasets.load_from_disk(str(path))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: the saved dataset cannot be read ({error})") from error
        yield from _dataset(rows, path, split)
        return
    for file in files_of(path, config, split):
        yield from _read_file(file)


def _read_file(path: Path) -> Rows:
    name = path.name.lower()
    if not name.endswith(DATA_SUFFIXES):
        raise UserError(f"{path}: unknown kind of file; use one of {', '.join(DATA_SUFFIXES)}")
    if name.endswith(".parquet"):
        yield from _parquet(path)
        return
    packed = name.endswith(PACKED)
    kind = (path.stem if packed else path.name).lower()
    try:
        with _opened(path) as file:
            if kind.endswith((".jsonl", ".ndjson")):
                yield from _json_lines(bounded_lines(file, str(path)) if packed else file, str(path))
            else:
                content = bounded_content(file, str(path)) if packed else file.read()
                yield from (_csv if kind.endswith(".csv") else _json)(content, str(path))
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def _opened(path: Path) -> IO[bytes]:
    """A file, unpacked as its last suffix says."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow  # which `datasets` brings

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(suffix, open)(path, "rb")


def _decode(data: bytes, name: str, line: int = 1) -> str:
    """data, which begins at that line of the file, as text. Raises BadRow naming the line that is no UTF-8."""
    try:
        return encodings.decode(data)
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        column = error.start - data.rfind(b"\n", 0, error.start)
        problem = f"byte {column} of the line is not valid UTF-8; {encodings.remedy(error)}"
        raise BadRow(f"{name}:{line}", problem) from error


def _json_lines(lines: Iterable[bytes], name: str) -> Rows:
    for number, data in enumerate(lines, 1):
        if not data.strip():
            continue
        where = f"{name}:{number}"
        try:
            yield where, json.loads(_decode(data, name, number))
        except BadRow as error:
            yield where, error
        except (ValueError, RecursionError) as error:
            problem = f"not valid JSON ({_json_fault(error)}); every line must be one complete JSON value"
            yield where, BadRow(where, problem)


def _json(data: bytes, name: str) -> Rows:
    """Rows of a JSON file: an array, one object, or JSON lines, which are often named .json."""
    if _is_json_lines(data):
        yield from _json_lines(data.split(b"\n"), name)
        return
    text = _decode(data, name)
    try:
        line, counted = 1, 0
        for position, row in _json_values(text):
            line, counted = line + text.count("\n", counted, position), position
            yield f"{name}:{line}", row
    except json.JSONDecodeError as error:
        raise BadRow(f"{name}:{error.lineno}", f"not valid JSON ({error.msg}, column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise BadRow(name, f"not valid JSON ({_json_fault(error)})") from error


def _json_fault(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else "a number with too many digits"


def _is_json_lines(data: bytes) -> bool:
    """Whether the first of several lines is a JSON value by itself."""
    first, _, rest = data.strip().partition(b"\n")
    if not rest:
        return False
    try:
        json.loads(encodings.decode(first))
    except (ValueError, RecursionError):
        return False
    return True


def _json_values(text: str) -> Iterator[tuple[int, Any]]:
    """(position, value) of the elements of a JSON array, or of the one value of the text.

    json.loads tells no positions, and a message must name the line of a bad row. So only the outermost brackets and
    commas are read here; the decoder reads each element and says where it ends.
    """
    decode, blanks = json.JSONDecoder().raw_decode, re.compile(r"\s*")

    def skip(position: int) -> int:
        return blanks.match(text, position).end()

    start = skip(0)
    if start == len(text):
        return  # an empty file has no rows
    if text[start] != "[":
        value, end = decode(text, start)
        yield start, value
    else:
        start = end = skip(start + 1)
        more = not text.startswith("]", start)  # only here: after a comma the decoder is asked, and it refuses a "]"
        while more:
            value, end = decode(text, start)
            yield start, value
            end = skip(end)
            more = text.startswith(",", end)
            start = skip(end + 1)
        if not text.startswith("]", end):
            raise json.JSONDecodeError("expected a comma or ]", text, end)
        end += 1
    if skip(end) != len(text):
        raise json.JSONDecodeError("text behind the end of the value", text, skip(end))


def _csv(data: bytes, name: str) -> Rows:
    csv.field_size_limit(2**31 - 1)
    rows = csv.DictReader(io.StringIO(_decode(data, name), newline=""), strict=True)
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            where = f"{name} row {number}"
            if None in row:
                yield where, BadRow(where, f"has more cells than the header's {len(rows.fieldnames or ())}")
            else:
                yield where, CsvRow((key, csv_cell(key, value)) for key, value in row.items())
    except csv.Error as error:
        raise BadRow(f"{name} row {number + 1}", f"not valid CSV ({error})") from error


class CsvRow(dict):
    """A row whose values were texts before csv_cell read them by the names of their columns."""


def csv_cell(column: str, text: Any) -> Any:
    """A CSV cell: empty is missing; lists, messages, numbers and booleans where the column asks for them."""
    if not isinstance(text, str):
        return text
    if not text:
        return None
    if column in ("label", "unsafe"):
        return _CSV_BOOLEANS.get(text.strip().lower(), _parsed(text, list))
    if column in _CSV_NUMBERS:
        return _parsed(text, (int, float))
    if column in _CSV_LISTS:
        return _parsed(text, list)
    if column in _CSV_MESSAGES:
        value = _parsed(text, list)
        return value if value and isinstance(value[0], dict) else text
    return text


def _parsed(text: str, kind: type | tuple[type, ...]) -> Any:
    """The JSON value of text if it is of that kind, else text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, kind) else text


def _parquet(path: Path) -> Rows:
    import datasets

    try:
        # Streaming: no second copy of the file in a cache.
        rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        yield from _dataset(rows, path)
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({error})") from error
