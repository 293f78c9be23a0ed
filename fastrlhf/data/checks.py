"""Checks of texts and turns that every format shares, and the errors that name what failed them.

A row that cannot be used raises BadRow; one that is well formed but teaches nothing raises DroppedRow, which the
loaders count. Every check takes `where` ("file:line") and the name of the field, because its message must say both.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from fastrlhf.config.errors import UserError

Messages = list[dict[str, str]]

_JUDGEMENTS = ("chosen", "rejected", "margin", "ranking", "score", "scores", "edited", "label")
_TEXTS = ("prompt", "response", "responses", "messages", "conversations", "completion", "text")
FIELDS = (*_JUDGEMENTS, *_TEXTS, "instruction", "output", "chat")

_ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "ipython"), "tool"),
    **dict.fromkeys(("system", "developer"), "system"),
}
# Who may speak after whom; None is the beginning.
_MAY_FOLLOW = {
    "system": (None,),
    "user": (None, "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


class BadRow(UserError):
    """A row that cannot be used as it stands: where it is, which field, what was expected."""

    def __init__(self, where: str, problem: str):
        super().__init__(f"{where}: {problem}")


class DroppedRow(ValueError):
    """A well-formed row that teaches nothing; the loader leaves it out and counts it under reason."""

    def __init__(self, reason: str):
        self.reason = reason
        super().__init__(reason)


def wrong(where: str, field: str, expected: str, value: Any) -> BadRow:
    """The error for a field whose value is not the expected kind of thing."""
    return BadRow(where, f'field "{field}" must be {expected}, found {show(value)}')


def missing(where: str, field: str, row: Iterable[str], expected: str) -> BadRow:
    """The error for an absent field, naming the column that was probably meant."""
    columns = [str(name) for name in row]
    close = meant(field, columns)
    hint = f'found "{close}"; did you mean "{field}"?' if close else f"columns: {', '.join(columns) or 'none'}"
    return BadRow(where, f'field "{field}" is missing ({hint}); expected {expected}')


def meant(field: str, row: Iterable[str]) -> str | None:
    """The column that looks like a misspelt field, or None."""
    return next((column for column in row if _close(field, str(column))), None)


@lru_cache(maxsize=4096)
def _close(field: str, column: str) -> bool:
    return column not in FIELDS and bool(difflib.get_close_matches(field, [column.lower()], cutoff=0.8))


def show(value: Any) -> str:
    """A value in an error message: its type and at most 40 characters of it."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"


def number_of(value: Any, where: str, field: str) -> float:
    """A finite number; booleans are none. Raises BadRow."""
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not numeric or not abs(value) <= sys.float_info.max:  # neither nan nor a whole number that no float can hold
        raise wrong(where, field, "a number", value)
    return float(value)


def text_of(value: Any, where: str, field: str, *, empty: bool = False) -> str:
    """A string without NUL and lone surrogates; not blank unless empty. Raises BadRow."""
    if not isinstance(value, str):
        raise wrong(where, field, "text", value)
    if not empty and not value.strip():
        raise BadRow(where, f'field "{field}" is empty; fill it or delete the row')
    if "\0" in value:
        raise BadRow(where, f'field "{field}" contains a NUL character at position {value.index(chr(0))}')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(where, f'field "{field}" is not valid Unicode at character {error.start}') from error
    return value


def messages_of(value: Any, where: str, field: str, *, fragment: bool = False) -> Messages:
    """[{"role", "content"}], roles system, user, assistant, tool, from role/content or from/value.

    The order is checked: an optional system message, then user and assistant in turn, a tool between two
    assistant messages. fragment: a completion, to be joined to its prompt, is not checked. Raises BadRow.
    """
    if not isinstance(value, list) or not value:
        raise wrong(where, field, "a list of messages", value)
    messages = [_message(message, where, field, index) for index, message in enumerate(value)]
    if not fragment:
        check_order(messages, where, field)
    return messages


def _message(message: Any, where: str, field: str, index: int) -> dict[str, str]:
    name = f'field "{field}", message {index + 1}'
    if not isinstance(message, dict):
        raise BadRow(where, f'{name} must be {{"role", "content"}}, found {show(message)}')
    sharegpt = "from" in message or "value" in message
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    role = message.get(role_key)
    if not isinstance(role, str) or role not in _ROLES:
        raise BadRow(where, f"{name}: {role_key} {role!r} is unknown; use system, user, assistant or tool")
    if message.get("tool_calls"):
        raise BadRow(where, f"{name}: tool_calls are not supported; write the call into the content")
    content = _content(message.get(content_key), where, f"{field}[{index}].{content_key}")
    return {"role": _ROLES[role], "content": content}


def _content(value: Any, where: str, field: str) -> str:
    """Message content: text, or a list of parts that are all text."""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        for part in value:
            if part.get("type") != "text":
                raise BadRow(where, f"{field}: only text is supported, found a part of type {part.get('type')!r}")
        value = "".join(text_of(part.get("text"), where, field, empty=True) for part in value)
    return text_of(value, where, field)


def check_order(messages: Messages, where: str, field: str) -> None:
    """Raise BadRow naming the first message whose role may not follow the one before it."""
    before = None
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if before not in _MAY_FOLLOW[role]:
            after = f"after {before!r}" if before else "at the beginning"
            expected = "expected system (optional), then user and assistant in turn"
            raise BadRow(where, f'field "{field}", message {number} has role {role!r} {after}; {expected}')
        before = role
