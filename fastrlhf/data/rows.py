"""Rows of files and datasets, each with the place it came from.

JSON and JSONL are read here, line by line, because a message must name the line of a fault; CSV through the
standard library, which leaves "NA" and "007" as they stand; Parquet, saved datasets and hub ids through
`datasets`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastrlhf.config.errors import UserError
from fastrlhf.data.checks import BadRow
from fastrlhf.data.limits import bounded_content, bounded_lines
from fastrlhf.data.sources import is_packaged, packaged_file, python_rows

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet", ".csv")
# What the cells of a CSV column hold, where that is not text. A prompt may be either: text, or messages as JSON.
_CSV_LISTS = ("messages", "conversations", "responses", "scores", "ranking", "history")
_CSV_MESSAGES = ("prompt", "chosen", "rejected", "completion")
_CSV_NUMBERS = ("score", "margin")
_CSV_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}

Rows = Iterator[tuple[str, Any]]  # (where, row); where is "file:line", "file row N" or "row N", all from 1


def read_rows(source: Any) -> Rows:
    """(where, row) of every row of source.

    source: a path (.json, .jsonl, both also .gz, .parquet, .csv), a folder (written by Dataset.save_to_disk, or
    one of such files), package://NAME/FILE, a hub id, or a Python object that has rows: see sources.python_rows. A line
    that is no JSON or no UTF-8 comes as a BadRow in the row's place, so that the caller may skip it. where is
    "file:line", "file row N" or "row N" (all from 1). Raises UserError: unreadable or unknown source, a file that is
    broken as a whole.
    """
    if isinstance(source, (str, Path)):
        packaged = isinstance(source, str) and is_packaged(source)
        path = packaged_file(source, "data") if packaged else Path(source).expanduser()
        if path.is_dir():
            yield from _read_folder(path)
        elif path.is_file():
            yield from _read_file(path)
        else:
            yield from _read_hub(str(source), path)
    else:
        yield from _dataset(python_rows(source))


def _dataset(rows: Any, source: Any = None) -> Rows:
    """Rows of a datasets.Dataset, of the right split of a DatasetDict, or of any iterable."""
    if isinstance(rows, dict):
        if "train" not in rows and len(rows) != 1:
            name = source or "the dataset"
            raise UserError(f"{name} has the splits {', '.join(rows)} but no train; pass the dataset of one split")
        rows = rows["train"] if "train" in rows else next(iter(rows.values()))
    if hasattr(rows, "with_format"):
        rows = rows.with_format(None)  # a format set for training would give tensors and arrays
    name = f"{source} row" if source else "row"
    return ((f"{name} {number}", row) for number, row in enumerate(rows, 1))


def _read_hub(name: str, path: Path) -> Rows:
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.lower().endswith(SUFFIXES)
    if looks_local or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(f"{name}: no such file or folder")
    import datasets

    try:
        rows = datasets.load_dataset(name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        problem = "neither a file or folder here nor a dataset that can be loaded from the hub"
        raise UserError(f"{name}: {problem} ({reason})") from error
    yield from _dataset(rows, name)


def _read_folder(path: Path) -> Rows:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        import datasets

        try:
            rows = datasets.load_from_disk(str(path))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: the saved dataset cannot be read ({error})") from error
        yield from _dataset(rows, path)
        return
    files = sorted(p for p in path.iterdir() if p.is_file() and p.name.lower().endswith(SUFFIXES))
    if not files:
        raise UserError(f"{path}: the folder holds no data file ({', '.join(SUFFIXES)}) and no saved dataset")
    words = {file.name: set(re.split(r"[^a-z]+", file.name.lower())) for file in files}
    train = [name for name in words if "train" in words[name]]
    held_out = [name for name in words if words[name] & {"valid", "validation", "val", "test", "dev", "eval"}]
    if train and held_out:
        remedy = "name the file, so that nothing held out is trained on"
        raise UserError(f"{path}: the folder holds {train[0]} and {held_out[0]}; {remedy}")
    for file in files:
        yield from _read_file(file)


def _read_file(path: Path) -> Rows:
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise UserError(f"{path}: unknown kind of file; use one of {', '.join(SUFFIXES)}")
    try:
        if name.endswith(".parquet"):
            yield from _parquet(path)
            return
        with gzip.open(path, "rb") if name.endswith(".gz") else open(path, "rb") as file:
            if name.endswith((".jsonl", ".jsonl.gz")):
                yield from _json_lines(bounded_lines(file, str(path)) if name.endswith(".gz") else file, str(path))
            elif name.endswith(".csv"):
                yield from _csv(file.read(), str(path))
            else:
                packed = name.endswith(".gz")
                yield from _json(bounded_content(file, str(path)) if packed else file.read(), str(path))
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def _decode(data: bytes, name: str, line: int = 1) -> str:
    """data, which begins at that line of the file, as text. Raises BadRow naming the line that is no UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        column = error.start - data.rfind(b"\n", 0, error.start)
        problem = f"byte {column} of the line is not valid UTF-8; save the file as UTF-8"
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
        json.loads(first.decode("utf-8-sig"))
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
                yield where, {key: _cell(key, value) for key, value in row.items()}
    except csv.Error as error:
        raise BadRow(f"{name} row {number + 1}", f"not valid CSV ({error})") from error


def _cell(column: str, text: str | None) -> Any:
    """A CSV cell: empty is missing; lists, messages, numbers and booleans where the column asks for them."""
    if not text:
        return None
    if column == "label":
        return _CSV_BOOLEANS.get(text.strip().lower(), text)
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
