"""Limits for what others wrote: the time and memory of a template, the size of a row that unpacks from a small file;
and none where Python's collector would look for cycles that are not there."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import FrameType
from typing import IO

from fastrlhf.config.errors import UserError

TEMPLATE_SECONDS = 10.0  # a real one takes a millisecond a conversation
AGAIN_SECONDS = 0.5  # jinja swallows what is raised while it folds constants
TEMPLATE_BYTES = 512 << 20  # of memory, beside what the process has
TEMPLATE_CHARS = 1 << 20  # that it may add to four times the content
ROW_BYTES = 64 << 20  # of a line of a packed .jsonl file, unpacked
BLANK_BYTES = 1 << 20  # of blank lines in a row of such a file
FILE_BYTES = 1 << 30  # of a packed .json file, unpacked


@contextmanager
def time_limit(seconds: float, sentence: str, kind: type[UserError] = UserError) -> Iterator[None]:
    """A UserError of this kind with the sentence where the block takes longer, by the wall clock.

    It needs the main thread and a system with SIGALRM, and yields to an alarm that somebody else has set; there is no
    limit without them.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or not hasattr(signal, "setitimer") or signal.getitimer(signal.ITIMER_REAL)[0] > 0:
        yield
        return

    def end(_: int, __: FrameType | None) -> None:
        raise kind(sentence)

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Python's cycle collector off: while objects are made by the million and stay (rows of a data set, modules that
    are imported) it goes through all of them again and again. Nor does it free anything meanwhile."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@lru_cache(maxsize=1)
def _sizes(_: int) -> int:
    """The open file that tells the memory of the process with this id: to open it takes ten times as long as a read."""
    return os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)


def address_space() -> int:
    """Bytes of the process's address space. OSError where the system does not tell."""
    try:
        text = os.pread(_sizes(os.getpid()), 64, 0)
        return int(text.split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):  # somebody closed the file, and its number may be another file's by now
        _sizes.cache_clear()
    return int(os.pread(_sizes(os.getpid()), 64, 0).split()[0]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def memory_limit(size: int) -> Iterator[None]:
    """MemoryError in the block where the process takes `size` more bytes than it has now. No limit on systems that do
    not tell how much that is (other than Linux)."""
    try:
        import resource

        now = address_space()
    except (ImportError, OSError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY or soft > now + size:
        resource.setrlimit(resource.RLIMIT_AS, (now + size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def bounded_lines(file: IO[bytes], name: str, limit: int = ROW_BYTES) -> Iterator[bytes]:
    """The lines of a packed file. UserError for one above `limit` bytes, and for blank ones of BLANK_BYTES together: a
    few kilobytes may unpack to gigabytes."""
    number = blank = 0
    while line := file.readline(limit + 1):
        number += 1
        blank = 0 if line.strip() else blank + len(line)
        if blank > BLANK_BYTES:
            raise UserError(f"{name}:{number}: more than {BLANK_BYTES >> 20} MiB of blank lines; remove them")
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
