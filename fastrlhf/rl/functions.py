"""A user's functions (rewards, judges): found by name, called with data-set columns by name, their mistakes reported.

An error names the role and the function ("reward function brevity"), the sample, and what was wrong.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrlhf.config.errors import UserError


@dataclass(frozen=True)
class UserFunction:
    """what: as errors call it; lists: how many lists of one entry a sample it takes by position."""

    what: str
    function: Callable[..., Any]
    lists: int

    @property
    def accepted(self) -> set[str] | None:
        """Names it takes beside the lists; None: all (it has **kwargs)."""
        parameters = list(inspect.signature(self.function).parameters.values())
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
            return None
        return {p.name for p in parameters[self.lists :]}

    def takes(self, name: str) -> bool:
        """True where a parameter beside the lists has this very name."""
        return name in list(inspect.signature(self.function).parameters)[self.lists :]

    def __call__(self, *lists: list, **columns: list) -> list[Any]:
        """One entry a sample. columns: those the function accepts are passed by name.

        UserError for an exception of the function, naming the first sample it also fails on alone, and for a wrong
        count.
        """
        accepted, count = self.accepted, len(lists[0])
        passed = {name: column for name, column in columns.items() if accepted is None or name in accepted}
        with _Caught() as caught:
            found = list(self.function(*lists, **passed))
        if caught.error is not None:
            sample = self._blame(lists, passed)
            where = f"sample {sample}" if sample is not None else f"a batch of {count} samples"
            kind = type(caught.error).__name__
            raise UserError(f"{self.what}, {where}: raised {kind}: {caught.error}") from caught.error
        if len(found) != count:
            raise UserError(
                f"{self.what}, sample {min(len(found), count)}: returned {len(found)} scores for {count} responses; "
                "return one number (or None) for each"
            )
        return found

    def number(self, index: int, score: object, token: int | None = None) -> float:
        """`score` as a finite float. index, token: whose it is, for the UserError."""
        where = f"{self.what}, sample {index}" + ("" if token is None else f", token {token}")
        try:
            value = float(score)  # type: ignore[arg-type]
        except (TypeError, ValueError, RuntimeError) as error:  # the last: a tensor of several numbers
            raise UserError(f"{where}: {score!r} is not a number") from error
        if not math.isfinite(value):
            raise UserError(f"{where}: returned {value}; return None for a response that cannot be judged")
        return value

    def _blame(self, lists: Sequence[list], columns: dict[str, list]) -> int | None:
        """The first sample the function also fails on alone."""
        for i in range(len(lists[0])):
            with _Caught() as caught:
                one = {name: column[i : i + 1] for name, column in columns.items()}
                self.function(*(entries[i : i + 1] for entries in lists), **one)
            if caught.error is not None:
                return i
        return None


class _Caught:
    """Keeps what a user's function raises (whatever it is), so that the error can be reported under its name."""

    error: Exception | None = None

    def __enter__(self) -> _Caught:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> bool:
        if isinstance(error, Exception):
            self.error = error
        return self.error is error  # an interrupt passes through


def name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def is_function_reference(source: object) -> bool:
    """True for `module:function` and `file.py:function`, not for a folder, a hub id or `package://...`."""
    return isinstance(source, str) and "://" not in source and ":" in source and not Path(source).exists()


def load_function(reference: str, role: str = "reward") -> Callable[..., Any]:
    """`package.module:function` or `path/to/file.py:function`. UserError names the role and what is missing."""
    where, _, attribute = reference.rpartition(":")
    if where.endswith(".py"):
        path = Path(where)
        if not path.is_file():
            raise UserError(f"{role}: the file {where!r} of {reference!r} does not exist")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            raise UserError(f"{role}: cannot import {where!r} of {reference!r}: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"{role}: {where!r} has no function {attribute!r}")
    return function
