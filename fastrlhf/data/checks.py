"""Checks of texts and turns that every format shares, and the errors that name what failed them.

A row that cannot be used raises BadRow; one that is well formed but teaches nothing raises DroppedRow, which the
loaders count. Every check takes `where` ("file:line") and the name of the field, because its message must say both.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from fastrlhf.config.errors import UserError

Messages = list[dict[str, Any]]  # role, content; and of some: weight 0 (not learnt), a key of REASONING
REASONING = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
_MORE_THAN_TEXT = ("tools", "functions", "documents", "image", "images", "video", "videos", "audio", "audios")

_JUDGEMENTS = ("chosen", "rejected", "margin", "ranking", "score", "scores", "ratings", "edited", "label", "unsafe")
_TEXTS = ("prompt", "response", "responses", "messages", "conversations", "completion", "text")
FIELDS = frozenset((*_JUDGEMENTS, *_TEXTS, "instruction", "output", "chat"))

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


def missing(where: str, field: str, row: Mapping[str, Any], expected: str) -> BadRow:
    """The error for an absent field: the column that was probably meant, and how to map one that has another name."""
    close = meant(field, row)
    hint = f'found "{close}"; did you mean "{field}"?' if close else f"columns: {', '.join(map(str, row)) or 'none'}"
    mapped = f"columns={{{field}: NAME}} reads it from another column"
    others = f" (there are: {', '.join(map(str, row))})" if close else ""
    return BadRow(where, f'field "{field}" is missing ({hint}); expected {expected}; {mapped}{others}')


def meant(field: str, row: Mapping[str, Any]) -> str | None:
    """The column that looks like a misspelt field and holds what the field may hold, or None."""
    if row.keys() <= FIELDS:  # no field is another's misspelling
        return None
    for name in row:
        if _is_misspelt(field, str(name)) and _may_hold(field, row[name]):
            return name
    return None


_KINDS: dict[str, type | tuple[type, ...]] = {  # of the fields that hold no messages
    **dict.fromkeys(("ranking", "scores", "ratings", "responses"), list),
    **dict.fromkeys(("score", "margin"), (int, float)),
    **dict.fromkeys(("text", "instruction"), str),
    "label": bool,
    "unsafe": (bool, list),
    "chat": dict,
}
_TURNS = ("prompt", "chosen", "rejected", "messages", "conversations")  # a list of texts is one conversation


def _may_hold(field: str, value: Any) -> bool:
    """Whether a value is of the field's kind: a whole number is no KTO label, a list of records no conversation."""
    if field in _KINDS:
        return isinstance(value, _KINDS[field]) and (field in ("label", "unsafe") or not isinstance(value, bool))
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, str):
        return first is value or field in _TURNS
    return isinstance(first, dict) and not {"role", "from"}.isdisjoint(first)


@lru_cache(maxsize=4096)  # asked of every row
def _is_misspelt(field: str, column: str) -> bool:
    """Whether a column's name is the field's with one slip of the pen, in other case, in the plural or without its end.

    A name that says more than the field (response_1, promptId, labeled) is one of its own.
    """
    name = column.strip().lower()
    if column in FIELDS or name in (field, field + "s"):
        return column not in FIELDS
    if field in name or name[:1] != field[0]:
        return False
    if field.startswith(name):
        return 4 * len(name) >= 3 * len(field)
    start = len(os.path.commonprefix([name, field]))
    theirs, ours = name[start:], field[start:]
    if len(theirs) == len(ours):
        swapped = ours[1::-1] + ours[2:]
        return theirs == swapped or len(field) > 5 and theirs[1:] == ours[1:]
    return theirs == ours[1:] or theirs[1:] == ours


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
    is_plain = len(message) == 2 and content_key in message
    if not is_plain:
        _check_text_alone(message, where, name)
    content = _content(message.get(content_key), where, f"{field}[{index}].{content_key}")
    checked = {"role": _ROLES[role], "content": content}
    if is_plain:
        return checked
    if not _is_learnt(message, where, name) and checked["role"] == "assistant":
        checked["weight"] = 0
    return checked | {
        key: text_of(message[key], where, f"{field}[{index}].{key}") for key in REASONING if message.get(key)
    }


def _check_text_alone(message: dict, where: str, name: str) -> None:
    """Raise BadRow where a message holds what cannot be written as text."""
    for key in ("tool_calls", "function_call"):
        if message.get(key):
            raise BadRow(where, f"{name}: {key} are not supported; write the call into the content")
    more = next((key for key in _MORE_THAN_TEXT if message.get(key)), None)
    if more is not None:
        raise BadRow(where, f"{name}: {more} are not supported; write what they say into the content, or remove them")


def _is_learnt(message: dict, where: str, name: str) -> bool:
    """Whether a turn is to be learnt: weight 0 (OpenAI, Mistral), train or loss false (Axolotl, Swift) say no."""
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise BadRow(where, f"{name}: weight {weight!r} must be 0 (not learnt) or 1")
    for key in ("train", "loss"):
        if message.get(key) not in (None, 0, 1):
            raise BadRow(where, f"{name}: {key} {message[key]!r} must be true or false (not learnt)")
    return 0 not in (weight, message.get("train"), message.get("loss"))


def plain_reply(message: dict, where: str, field: str) -> str:
    """The content of a reply that is judged or compared as one text. Raises BadRow where it is more than that."""
    more = [key for key in message if key not in ("role", "content")]
    if more:
        raise BadRow(where, f'field "{field}": {more[0]} of a reply that is judged cannot be used; remove it')
    return message["content"]


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


def marks_of(row: dict[str, Any], where: str, replies: int) -> tuple[bool, ...]:
    """Which of a row's replies are marked unsafe; none where the row says nothing.

    Raises BadRow for a column that is no mark, and for one that is probably a misspelt `unsafe`.
    """
    if "unsafe" not in row:
        close = meant("unsafe", row)
        if close is not None:
            raise missing(where, "unsafe", row, "true, false, or a list of them")
        return (False,) * replies
    value = row["unsafe"]
    marks = [value] * replies if value is False or replies == 1 and value is True else value
    if not isinstance(marks, list) or len(marks) != replies or not all(isinstance(mark, bool) for mark in marks):
        form = "true or false" if replies == 1 else f"a list of {replies} times true or false, one a reply"
        raise wrong(where, "unsafe", f"{form} (ignore_columns=unsafe leaves the column out)", value)
    return tuple(marks)
