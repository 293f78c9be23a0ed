"""Limits for what others wrote: how long a template may take, how large a row may be that unpacks from a small file."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import IO

from fastrlhf.config.errors import UserError

TEMPLATE_SECONDS = 10.0  # a real one takes a millisecond a conversation
ROW_BYTES = 64 << 20  # of a line of a packed .jsonl file, unpacked
FILE_BYTES = 1 << 30  # of a packed .json file, unpacked


@contextmanager
def time_limit(seconds: float, sentence: str) -> Iterator[None]:
    """UserError with the sentence where the block takes longer, by the wall clock.

    It needs the main thread and a system with SIGALRM, and yields to an alarm that somebody else has set; there is no
    limit without them.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or not hasattr(signal, "setitimer") or signal.getitimer(signal.ITIMER_REAL)[0] > 0:
        yield
        return

    def end(_: int, __: FrameType | None) -> None:
        raise UserError(sentence)

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def bounded_lines(file: IO[bytes], name: str, limit: int = ROW_BYTES) -> Iterator[bytes]:
    """The lines of a packed file. UserError for one above `limit` bytes: a few kilobytes may unpack to gigabytes."""
    number = 0
    while line := file.readline(limit + 1):
        number += 1
        if len(line) > limit:
            raise UserError(f"{name}:{number}: the row unpacks to more than {limit >> 20} MiB, the most for a row")
        yield line


def bounded_content(file: IO[bytes], name: str, limit: int = FILE_BYTES) -> bytes:
    """The content of a packed file. UserError above `limit` bytes."""
    content = file.read(limit + 1)
    if len(content) > limit:
        raise UserError(
            f"{name}: it unpacks to more than {limit >> 20} MiB; use .jsonl (packed too), which is read by rows"
        )
    return content
