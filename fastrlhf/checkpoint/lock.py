"""A lock on a run folder, or on one file: one process writes in it at a time, and the next one is told who that is.

It is a lock of the system (flock) on the file `.lock` (of a file: `.NAME.lock`), whose text is "PID HOST". It is free
when the process is gone, however that ended; the file alone means nothing. A process may take the folder again that it
holds already (a notebook that builds its trainer anew). Where the file system knows no locks, it is used without one.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

from fastrlhf.config.errors import UserError

try:
    import fcntl
except ImportError:  # not a POSIX system: no lock
    fcntl = None

LOCK = ".lock"
_held: dict[str, int] = {}  # real path of a folder or file -> descriptor


def _forget() -> None:
    """In a process that was forked: a worker that outlives the run must not hold its folder."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_forget)


def _path(target: Path) -> Path:
    """The file that is locked."""
    return target / LOCK if target.is_dir() else target.with_name(f".{target.name}{LOCK}")


def acquire(target: Path) -> None:
    """Take a folder, which exists, or a file, which need not. Raises UserError naming the process that has it."""
    name, path = os.path.realpath(target), _path(target)
    if fcntl is None or (name in _held and _is(_held[name], path)):
        return
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            os.close(descriptor)
            raise UserError(_in_use(target)) from error
        except OSError:  # a file system without locks
            os.close(descriptor)
            return
        if _is(descriptor, path):
            break
        os.close(descriptor)  # its owner removed it between our two calls
    _held[name] = descriptor
    with suppress(OSError):  # a full disk: the next one is told less
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode())


def moved(before: Path, after: Path) -> None:
    """Tell that a folder of this process was renamed."""
    name = str(Path(os.path.realpath(after.parent), before.name))
    if name in _held:
        _held[os.path.realpath(after)] = _held.pop(name)


def release(target: Path) -> None:
    """Give a folder or file back; nothing where this process does not have it."""
    descriptor = _held.pop(os.path.realpath(target), None)
    if descriptor is None:
        return
    with suppress(OSError):  # a file that stays is no lock
        if _is(descriptor, _path(target)):
            os.unlink(_path(target))
    os.close(descriptor)


def check_free(folder: Path) -> None:
    """UserError where another process has the folder."""
    if fcntl is None or os.path.realpath(folder) in _held:
        return
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, (BlockingIOError, PermissionError)):  # else: a file system without locks
            raise UserError(_in_use(folder)) from error
    finally:
        os.close(descriptor)


def _is(descriptor: int, path: Path) -> bool:
    """Whether the path is still the file that is open."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(descriptor))


def _in_use(target: Path) -> str:
    try:
        pid, host = _path(target).read_text(encoding="utf-8").split()
        who = f"process {int(pid)} on {host}"
    except (OSError, ValueError):
        who = "another process"
    option, kind = ("output_dir", "folder") if target.is_dir() else ("--output", "file")
    return f"{option}: {str(target)!r} is in use by {who}; wait for it, stop it, or name another {kind}"
