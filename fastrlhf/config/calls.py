"""Calls of a user's function: bounded in time, awaited where they must be, what they raise a value.

An iterator is read to its end here, and arrays become lists: all of that is the user's code too, and may raise or hang.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import functools
import inspect
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from fastrlhf.config.outcome import outcome, outcome_of

# By the names of the classes and their bases: none of these packages is imported for it.
NETWORK = {
    "APIConnectionError",
    "ClientConnectionError",
    "ClientPayloadError",
    "ConnectionError",
    "HTTPError",
    "HTTPException",
    "InternalServerError",
    "RateLimitError",
    "RequestException",
    "SSLError",
    "TimeoutError",
    "TransportError",
    "URLError",
    "gaierror",
    "herror",
    "timeout",
}
UNREACHABLE = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN}
SAID = 400  # characters of an exception's text

Outcome = tuple[Any, BaseException | None]


class NoEnd(Exception):
    """A call that took longer than it may."""


def said(error: BaseException) -> str:
    """What a user's code did, in a line."""
    if isinstance(error, SystemExit):
        return f"called sys.exit({'' if error.code is None else repr(error.code)})"
    text = " ".join(str(error).split())
    return f"raised {type(error).__name__}: {text if len(text) <= SAID else text[:SAID] + '...'}"


def is_network_error(error: BaseException) -> bool:
    """Whether an exception is of the kind that may not come again: connections, time limits, a busy server. An answer
    of a server that will stay the same (404) is not."""
    if isinstance(error, (ValueError, SystemExit)):
        return False
    answer = getattr(error, "response", None)
    status = getattr(error, "code", None) or getattr(error, "status_code", None) or getattr(answer, "status_code", None)
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429):
        return False
    unreachable = isinstance(error, OSError) and error.errno in UNREACHABLE
    return unreachable or any(kind.__name__ in NETWORK for kind in type(error).__mro__)


def run(work: Callable[[], Any], read: Callable[[Any], Any], seconds: float | None) -> tuple[Any, Outcome]:
    """Call `work`, await what it returns where that waits (all entries of a list at once), and `read` it -> (what it
    returned, (what `read` made of it, error)). The error is NoEnd after so many seconds in all."""
    deadline = None if seconds is None else time.monotonic() + seconds

    def left() -> float | None:
        return None if deadline is None else max(0.0, deadline - time.monotonic())

    def begin() -> tuple[Any, Any]:
        result = work()
        return result, None if _waits(result) else read(result)

    begun, error = _bounded(begin, left())
    if error is not None:
        return None, (None, error)
    result, entries = begun
    if not _waits(result):
        return result, (entries, None)
    result, error = _await(result, left())
    return result, (None, error) if error is not None else _bounded(lambda: read(result), left())


def _bounded(work: Callable[[], Any], seconds: float | None) -> Outcome:
    """-> (result, error) of work, NoEnd after so many seconds. Only a thread can be left behind: one without an end
    does not keep the process from ending."""
    if seconds is None:
        return outcome(work)
    results: list[Outcome] = []
    thread = threading.Thread(target=lambda: results.append(outcome(work)), daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return None, NoEnd()
    return results[0] if results else (None, RuntimeError("it ended its thread"))


def _waits(result: Any) -> bool:
    return inspect.isawaitable(result) or (isinstance(result, list) and any(map(inspect.isawaitable, result)))


def _await(result: Any, seconds: float | None) -> Outcome:
    """Await a result, or all entries of one at once -> (result, error)."""
    entries = result if isinstance(result, list) else [result]

    async def gather() -> list[Outcome]:
        return await asyncio.gather(*map(_entry, entries))

    future = asyncio.run_coroutine_threadsafe(gather(), _loop())
    try:
        awaited = future.result(seconds)
    except concurrent.futures.TimeoutError:  # before Python 3.11 one of its own
        future.cancel()
        return None, NoEnd()
    error = next((error for _, error in awaited if error is not None), None)
    values = [value for value, _ in awaited]
    return values if isinstance(result, list) else values[0], error


async def _entry(value: Any) -> Outcome:
    """An entry, awaited where it must be; what it raises is a value, or SystemExit would end the loop."""
    return await outcome_of(value) if inspect.isawaitable(value) else (value, None)


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """One event loop for the process, in a thread: a user's client keeps connections that belong to their loop, and a
    notebook runs a loop of its own."""
    loop = asyncio.new_event_loop()

    def forever() -> None:
        while True:
            with suppress(SystemExit, KeyboardInterrupt):  # of a task that user code began: who awaits that gets it
                loop.run_forever()

    threading.Thread(target=forever, daemon=True).start()
    return loop
