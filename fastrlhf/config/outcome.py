"""Running code of others, which may raise anything: the one place where anything is caught."""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


def outcome(work: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """Call work -> (its result, None), or (None, what it raised), which the caller reports as a failure of that code.

    For a user's functions (rewards, judges, the file they stand in), and for libraries that read files of others: the
    tokenizers library raises plain `Exception`. Never for code of our own, whose bugs must stay bugs. sys.exit and a
    cancelled or closed coroutine are failures too. What is none passes: Ctrl-C and the signals' own BaseExceptions.
    """
    try:
        return work(), None
    except (Exception, SystemExit, CancelledError, GeneratorExit) as error:  # noqa: BLE001 - code of others
        return None, error


async def outcome_of(awaitable: Awaitable[T]) -> tuple[T | None, BaseException | None]:
    """`outcome` of what has to be awaited."""
    try:
        return await awaitable, None
    except (Exception, SystemExit, CancelledError, GeneratorExit) as error:  # noqa: BLE001 - code of others
        return None, error
