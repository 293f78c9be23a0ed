"""Rows that are given as Python objects: lists, tables, arrays."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from fastrlhf.config.errors import UserError
from fastrlhf.config.inputs import DATA_SUFFIXES


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


def _plain(value: Any) -> Any:
    """Mappings as dicts, tuples and arrays as lists, numpy's scalars as Python's."""
    if isinstance(value, (str, int, float, bool)) and type(value).__module__ == "builtins" or value is None:
        return value
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return str(value) if isinstance(value, str) else value
