"""JSON Lines: how a row is written, and the reader of files that a run wrote (people's data: fastrlhf/data/rows.py).

A kill tears the last line and a full disk more than that, so a damaged line ends nothing. It is never dropped in
silence either: the caller gets its file, its number and the reason, and says so where people look.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastrlhf.config import encodings

_BREAKS = {mark: f"\\u{mark:04x}" for mark in (0x85, 0x2028, 0x2029)}


def json_line(row: Mapping[str, Any]) -> str:
    """A row as one line, for every reader: many take more than a newline for the end of one (str.splitlines does)."""
    return json.dumps(row, ensure_ascii=False, default=str).translate(_BREAKS) + "\n"


def read_records(
    path: Path, problems: list[str], required: Mapping[str, type] | None = None
) -> Iterator[dict[str, Any]]:
    """The rows of a file in order, one at a time; none when there is no such file.

    required: fields without which a row is of no use, and their types. A line that gives no row is appended to
    `problems` as "FILE:LINE: what is wrong with it".
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.strip()
            if not line:
                continue
            row = parse(line)
            wrong = row if isinstance(row, str) else _lacking(row, required or {})
            if wrong:
                problems.append(f"{path}:{number}: {wrong}")
            else:
                yield row


def parse(data: bytes) -> dict[str, Any] | str:
    """The JSON object in `data`, or what is wrong with it."""
    try:
        value = json.loads(encodings.decode(data))
    except UnicodeDecodeError as error:
        known = encodings.guess_encoding(bytes(error.object)) is not None  # else it is damage, not another encoding
        return f"is not UTF-8; {encodings.remedy(error)}" if known else "is not UTF-8"
    except json.JSONDecodeError as error:
        return f"is not JSON ({error.msg.removesuffix(' at')} at character {error.pos + 1})"
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, lists in lists in lists
        return f"cannot be read ({error})"
    return value if isinstance(value, dict) else f"is no JSON object but a {type(value).__name__}"


def _lacking(row: Mapping[str, Any], required: Mapping[str, type]) -> str:
    names = [name for name, kind in required.items() if not isinstance(row.get(name), kind)]
    return f"has no {required[names[0]].__name__} {names[0]!r}" if names else ""
