"""Folders that appear whole or not at all: write beside the target, force to the disk, rename.

Whatever moment the process dies at, a reader finds the old folder, the new one, or (between two renames,
when one replaces the other) a `.old-NAME` that `recover` puts back. Power loss is covered as far as fsync
keeps its word.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from fastrlhf.checkpoint import owned
from fastrlhf.config.errors import UserError

HALF_WRITTEN = re.compile(r"\.tmp-(.+-\d+|remove-step-\d+)")  # with the process that wrote it


class CheckpointError(UserError):
    """A checkpoint could not be written; nothing was left behind and older ones are untouched.

    Training may go on and try again at the next interval unless `fatal` is set: that was the third failure
    in a row.
    """

    def __init__(self, message: str, *, fatal: bool = False):
        super().__init__(message)
        self.fatal = fatal


def fsync(path: Path) -> None:
    """Force a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def settle(folder: Path) -> None:
    """Give every file the mode that the umask asks for (safetensors writes 0600) and force folder and files
    to the disk.
    """
    probe = folder / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in files(folder):
        path.chmod(mode)
        fsync(path)
    # A file is on the disk, but not under its name, until its folder is there too.
    for path in [*sorted(path for path in folder.rglob("*") if path.is_dir()), folder]:
        fsync(path)


def publish(tmp: Path, target: Path) -> None:
    """Rename `tmp` to `target`. A folder already there is moved to `.old-...` first; `recover` puts it back
    after a crash in between.
    """
    old = target.with_name(f".old-{target.name}")
    if target.exists():
        if old.exists():
            shutil.rmtree(old)
        os.rename(target, old)
    try:
        os.rename(tmp, target)
    except OSError:
        if old.exists():
            os.rename(old, target)
        raise
    fsync(target.parent)
    if old.exists():
        shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """Finish or undo what a killed process left in `folder`: half-written `.tmp-*`, and `.old-*` whose
    replacement never arrived.
    """
    for old in folder.glob(".old-*"):
        target = old.with_name(old.name.removeprefix(".old-"))
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, target)
    for tmp in folder.glob(".tmp-*"):
        if HALF_WRITTEN.fullmatch(tmp.name) and tmp.is_dir() and not tmp.is_symlink():
            shutil.rmtree(tmp, ignore_errors=True)


def export_folder(write: Callable[[Path], None], target: str | Path) -> None:
    """`replace_folder` for a folder that people may put files into: with a list of its files, and refused where another
    file is in the folder that would be replaced.

    Raises UserError naming that file, or the folder where nothing tells who wrote it.
    """
    target = Path(os.path.realpath(target))  # what a link points to is written, the link stays
    check_export(target)
    check_export(target.with_name(f".old-{target.name}"))

    def write_listed(folder: Path) -> None:
        write(folder)
        owned.write_list(folder)

    replace_folder(write_listed, target)


def check_export(folder: Path) -> None:
    """UserError where `folder` cannot be replaced without losing what an export did not write."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"save: {str(folder)!r} is a file; name a folder")
    try:
        other = owned.unlisted(folder) if folder.is_dir() else None
    except OSError as error:
        raise UserError(f"save: {str(folder)!r} cannot be read ({error.strerror}); name another folder") from error
    if other is not None:
        what = "is not known to be an export" if other == folder else "was not written by an export"
        raise UserError(f"save: {str(other)!r} {what}, so nothing is replaced; move it away, or name another folder")


def replace_folder(write: Callable[[Path], None], target: Path) -> None:
    """Publish a folder atomically: `write(tmp)` fills a fresh folder beside `target`, which then takes its
    place.

    Readers see the old folder or the new one, never a mixture. Raises CheckpointError, its cause the disk's own error
    and `target` as it was, when the disk fails.
    """
    target = Path(target)
    tmp = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir()
        write(tmp)
        settle(tmp)
        publish(tmp, target)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk with an error of its own
        raise CheckpointError(f"could not write {target}: {error}") from error
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
