"""A lock on a run folder, or on one file: one process writes in it at a time, and the next one is told who that is.

It is a lock of the system (flock) on the file `.lock` (of a file: `.NAME.lock`), whose text names the process. It is
free when the process is gone, however that ended; the file alone means nothing. A process may take the folder again
that it holds already (a notebook that builds its trainer anew).

Where the file system knows no locks (some of NFS, FUSE, object stores) the text alone tells: "PID HOST START", with the
time at which the process began. A process of this machine that lives and began then has the folder; one that is gone,
or whose number another has now, has not. Of a process on another machine nothing can be known: its lock holds until
someone removes the file.
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
FLAGS = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)  # the file is written: a link would lead to another's
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
        descriptor = os.open(path, FLAGS | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            os.close(descriptor)
            raise UserError(_in_use(target)) from error
        except OSError as error:  # a file system without locks
            if _is_taken(path):
                os.close(descriptor)
                raise UserError(_in_use(target, by_text=True)) from error
        if _is(descriptor, path):
            break
        os.close(descriptor)  # its owner removed it between our two calls
    _held[name] = descriptor
    with suppress(OSError):  # a full disk: the next one is told less
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()} {socket.gethostname()} {_began(os.getpid())}\n".encode())


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
        descriptor = os.open(folder / LOCK, FLAGS)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, (BlockingIOError, PermissionError)):
            raise UserError(_in_use(folder)) from error
        if _is_taken(folder / LOCK):  # a file system without locks
            raise UserError(_in_use(folder, by_text=True)) from error
    finally:
        os.close(descriptor)


def _is(descriptor: int, path: Path) -> bool:
    """Whether the path is still the file that is open."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(descriptor))


def _holder(path: Path) -> tuple[int, str, str] | None:
    """The process in a lock's text: its number, its host, when it began; None where it says nothing."""
    try:
        pid, host, *began = path.read_text(encoding="utf-8").split()
        return int(pid), host, began[0] if began else ""
    except (OSError, ValueError):
        return None


def _began(pid: int) -> str:
    """When a process of this machine began, in clock ticks since boot; "-" on systems that do not tell."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return "-"


def _is_taken(path: Path) -> bool:
    """Whether the process in a lock's text has it, where the file system does not say."""
    holder = _holder(path)
    if holder is None:
        return False
    pid, host, began = holder
    if host != socket.gethostname():  # looked at first: in containers every process has the same few numbers
        return True
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return began in ("", "-") or began == _began(pid)


def _in_use(target: Path, *, by_text: bool = False) -> str:
    holder = _holder(_path(target))
    who = "another process" if holder is None else f"process {holder[0]} on {holder[1]}"
    option, kind = ("output_dir", "folder") if target.is_dir() else ("--output", "file")
    if by_text:
        gone = f"if that process is gone, remove {str(_path(target))!r}"
        return f"{option}: {str(target)!r} is in use by {who}, says its lock; {gone}"
    return f"{option}: {str(target)!r} is in use by {who}; wait for it, stop it, or name another {kind}"
