"""Files that are only appended to, a JSON row a line, each on the disk before anybody is told that it is kept."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastrlhf.checkpoint.atomic import fsync
from fastrlhf.checkpoint.records import json_line, parse
from fastrlhf.config.errors import UserError
from fastrlhf.label.items import Say


class AppendLog:
    """The rows of a file, and a way to add one that is either there whole or not at all.

    A row counts once its line ends. What a kill or a full disk left without an end was confirmed to nobody: it is cut
    off when the file is opened, and `say` tells it. Raises UserError for a line that is no JSON object.
    """

    def __init__(self, path: Path, say: Say, *, mode: int = 0o644) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, mode)
        except OSError as error:
            raise UserError(f"--output: {path} cannot be written: {error.strerror}") from error
        fsync(path.parent)
        self.rows = self._read(say)

    def _read(self, say: Say) -> list[dict[str, Any]]:
        data = self.path.read_bytes()
        whole, newline, tail = data.rpartition(b"\n")
        if tail and isinstance(parse(tail), dict):  # written by hand, or by a program that ends no line
            os.write(self._descriptor, b"\n")
            whole, tail = data, b""
        if tail:
            os.ftruncate(self._descriptor, len(whole) + len(newline))
            say(f"{self.path}: its last line has no end ({len(tail)} bytes of a row that was not kept) and is cut off")
        rows = [(number, parse(line)) for number, line in enumerate(whole.split(b"\n"), 1) if line.strip()]
        for number, row in rows:
            if isinstance(row, str):
                raise UserError(f"{self.path}:{number}: {row}; mend the line, or name another --output")
        return [row for _, row in rows]

    def append(self, row: dict[str, Any]) -> None:
        """Add a row and force it to the disk. Raises OSError, with the file as it was, where that cannot be done."""
        data = json_line(row).encode()
        if not self._is_there():
            raise OSError(errno.ENOENT, "was moved or removed while it was in use", str(self.path))
        size = os.fstat(self._descriptor).st_size
        try:
            if os.write(self._descriptor, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            os.fsync(self._descriptor)
        except OSError:
            with suppress(OSError):  # a line without an end is cut off at the next start
                os.ftruncate(self._descriptor, size)
            raise
        self.rows.append(row)

    def _is_there(self) -> bool:
        """Whether the name still leads to the file that is written."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        os.close(self._descriptor)
