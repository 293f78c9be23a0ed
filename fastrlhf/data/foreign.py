"""Rows of other projects turned into fastrlhf's own records, and the checks of text and turns both share.

Read as they are: Anthropic hh-rlhf transcripts, TRL (standard and conversational, with or without an explicit
prompt), ShareGPT / LLaMA-Factory, Alpaca, KTO, MOSS SFT, and the turn lists of MOSS-RLHF. The format is
taken from the columns of each row. Field names of these formats: their own documentation; for MOSS and
MOSS-RLHF the code and the sample files of OpenLMLab/MOSS and OpenLMLab/MOSS-RLHF.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from fastrlhf.config.errors import UserError

Messages = list[dict[str, str]]


class BadRow(UserError):
    """A row that cannot be used as it stands: where it is, which field, what was expected."""

    def __init__(self, where: str, problem: str):
        super().__init__(f"{where}: {problem}")


class DroppedRow(ValueError):
    """A well-formed row that teaches nothing; the loader leaves it out and counts it under reason."""

    def __init__(self, reason: str):
        self.reason = reason
        super().__init__(reason)


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
_MOSS_PARTS = {
    "Human": ("<|Human|>:", "<eoh>"),
    "Inner Thoughts": ("<|Inner Thoughts|>:", "<eot>"),
    "Commands": ("<|Commands|>:", "<eoc>"),
    "Tool Responses": ("<|Results|>:", "<eor>"),
    "MOSS": ("<|MOSS|>:", "<eom>"),
}
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
# The columns each format makes its prompt from, in the order the formats are tried.
PROMPT_COLUMNS = (
    ("prompt",),
    ("chat", "meta_instruction", "num_turns"),
    ("conversations", "system", "tools"),
    ("instruction", "input", "history", "system"),
    ("user_prompt",),
    ("messages",),
)
FIELDS = (
    "prompt",
    "chosen",
    "rejected",
    "margin",
    "response",
    "responses",
    "ranking",
    "score",
    "scores",
    "edited",
    "messages",
    "conversations",
    "completion",
    "label",
    "text",
    "instruction",
    "output",
    "chat",
)


def missing(where: str, field: str, row: Iterable[str], expected: str) -> BadRow:
    """The error for an absent field, naming the column that was probably meant."""
    columns = [str(name) for name in row]
    close = meant(field, columns)
    found = f'found "{close}"; did you mean "{field}"?' if close else f"columns: {', '.join(columns) or 'none'}"
    return BadRow(where, f'field "{field}" is missing ({found}); expected {expected}')


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


def text_of(value: Any, where: str, field: str, *, empty: bool = False) -> str:
    """A string without NUL and lone surrogates; not blank unless empty. Raises BadRow."""
    if not isinstance(value, str):
        raise BadRow(where, f'field "{field}" must be text, found {show(value)}')
    if not empty and not value.strip():
        raise BadRow(where, f'field "{field}" is empty; fill it or delete the row')
    if "\0" in value:
        raise BadRow(where, f'field "{field}" contains a NUL character at position {value.index(chr(0))}')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(where, f'field "{field}" is not valid Unicode at character {error.start}') from error
    return value


def _content(value: Any, where: str, field: str) -> str:
    """Message content: text, or a list of parts that are all text."""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        for part in value:
            if part.get("type") != "text":
                raise BadRow(where, f"{field}: only text is supported, found a part of type {part.get('type')!r}")
        value = "".join(text_of(part.get("text"), where, field, empty=True) for part in value)
    return text_of(value, where, field)


def messages_of(value: Any, where: str, field: str, *, fragment: bool = False) -> Messages:
    """[{"role", "content"}], roles system, user, assistant, tool, from role/content or from/value.

    Checks the order: an optional system message, then user and assistant in turn, a tool between two
    assistant messages. fragment: a completion, to be joined to its prompt, is not checked. Raises BadRow.
    """
    if not isinstance(value, list) or not value:
        raise BadRow(where, f'field "{field}" must be a list of messages, found {show(value)}')
    result: Messages = []
    for i, message in enumerate(value):
        place = f'field "{field}", message {i + 1}'
        if not isinstance(message, dict):
            raise BadRow(where, f'{place} must be {{"role", "content"}}, found {show(message)}')
        names = ("from", "value") if "from" in message or "value" in message else ("role", "content")
        role = message.get(names[0])
        if not isinstance(role, str) or role not in _ROLES:
            raise BadRow(where, f"{place}: {names[0]} {role!r} is unknown; use system, user, assistant or tool")
        if message.get("tool_calls"):
            raise BadRow(where, f"{place}: tool_calls are not supported; write the call into the content")
        content = _content(message.get(names[1]), where, f"{field}[{i}].{names[1]}")
        result.append({"role": _ROLES[role], "content": content})
    if not fragment:
        check_order(result, where, field)
    return result


def check_order(messages: Messages, where: str, field: str) -> None:
    """Raises BadRow naming the first message whose role may not follow the one before it."""
    before = None
    for i, message in enumerate(messages):
        role = message["role"]
        if before not in _MAY_FOLLOW[role]:
            after = f"after {before!r}" if before else "at the beginning"
            raise BadRow(
                where,
                f'field "{field}", message {i + 1} has role {role!r} {after}; '
                "expected system (optional), then user and assistant in turn",
            )
        before = role


def turns_of(value: Any, where: str, field: str) -> Messages:
    """A MOSS-RLHF list of turns without role tags: human first, then in turn. Raises BadRow."""
    if not isinstance(value, list) or not value:
        raise BadRow(where, f'field "{field}" must be a list of turns, found {show(value)}')
    return [
        {"role": ("user", "assistant")[i % 2], "content": text_of(turn, where, f"{field}[{i}]")}
        for i, turn in enumerate(value)
    ]


def is_transcript(value: Any) -> bool:
    """Whether value is an hh-rlhf transcript: it begins with "\\n\\nHuman:"."""
    return isinstance(value, str) and value.startswith("\n\nHuman:")


def transcript_of(value: str, where: str, field: str) -> Messages:
    """The turns of an hh-rlhf transcript, each without the blanks around it.

    Two turns of the same speaker in a row (the published files have some) are one turn; a transcript that
    ends with an empty turn raises DroppedRow, an empty turn elsewhere BadRow.
    """
    parts = _HH_TURN.split(value)
    result: Messages = []
    for tag, content in zip(parts[1::2], parts[2::2]):
        role = "user" if tag == "Human" else "assistant"
        content = text_of(content.strip(), where, field, empty=True)
        if result and result[-1]["role"] == role:
            result[-1]["content"] = f"{result[-1]['content']}\n\n{content}".strip()
        else:
            result.append({"role": role, "content": content})
    if not result[-1]["content"]:
        raise DroppedRow("transcripts with an empty last turn")
    if any(not m["content"] for m in result):
        raise BadRow(where, f'field "{field}" has an empty turn; fill it or delete the row')
    return result


def conversation_of(value: Any, where: str, field: str) -> Messages:
    """Messages from any of: a list of messages, a list of turns, a transcript. Raises BadRow."""
    if is_transcript(value):
        return transcript_of(value, where, field)
    if isinstance(value, list) and value and isinstance(value[0], str):
        return turns_of(value, where, field)
    return messages_of(value, where, field)


def _moss_part(turn: dict, key: str, where: str, name: str) -> str:
    """One part of a MOSS turn without its tags; what stands between them is kept to the letter."""
    head, end = _MOSS_PARTS[key]
    value = text_of(turn.get(key), where, f"chat.{name}.{key}").rstrip("\n")
    if not value.startswith(head) or not value.endswith(end):
        raise BadRow(where, f'field "chat.{name}.{key}" must be {head} ... {end}, found {show(value)}')
    return text_of(value[len(head) : -len(end)].removeprefix(" "), where, f"chat.{name}.{key}")


def moss_conversation(row: dict, where: str) -> Messages:
    """Messages of a MOSS SFT row: meta_instruction and chat.turn_N with Human, Inner Thoughts, ..., MOSS.

    Where any turn uses a tool, every turn keeps its parts: thoughts and commands are one assistant message
    in MOSS's own tags (the "moss" template writes it as it is), results a tool message. Otherwise a turn is
    a user and an assistant message.
    """
    chat = row["chat"]
    if not isinstance(chat, dict) or not chat:
        raise BadRow(where, f'field "chat" must be {{"turn_1": ...}}, found {show(chat)}')
    result: Messages = []
    if str(row.get("meta_instruction") or "").strip():
        result.append({"role": "system", "content": text_of(row["meta_instruction"], where, "meta_instruction")})
    turns: list[dict[str, str]] = []
    for name in [f"turn_{i + 1}" for i in range(len(chat))]:
        turn = chat.get(name)
        if not isinstance(turn, dict):
            raise missing(where, name, chat, f"turns turn_1 ... turn_{len(chat)} in chat")
        turns.append(
            {k: _moss_part(turn, k, where, name) for k in _MOSS_PARTS if k in ("Human", "MOSS") or turn.get(k)}
        )
    tools = ("Inner Thoughts", "Commands", "Tool Responses")
    uses_tools = any(turn.get(k, "None").strip() != "None" for turn in turns for k in tools)
    for turn in turns:
        result.append({"role": "user", "content": turn["Human"]})
        if uses_tools:
            thoughts, commands, results = (turn.get(k, "None") for k in tools)
            content = f"<|Inner Thoughts|>: {thoughts}<eot>\n<|Commands|>: {commands}<eoc>"
            result.append({"role": "assistant", "content": content})
            result.append({"role": "tool", "content": results})
        result.append({"role": "assistant", "content": turn["MOSS"]})
    return result


def _sharegpt(row: dict, where: str) -> Messages:
    if row.get("tools") and row["tools"] != "[]":
        raise BadRow(where, 'field "tools": tool descriptions are not supported; put them into a system message')
    messages = messages_of(row["conversations"], where, "conversations")
    return _with_system(messages, row, where)


def _with_system(messages: Messages, row: dict, where: str) -> Messages:
    if not row.get("system"):
        return messages
    if messages[0]["role"] == "system":
        raise BadRow(where, 'field "system" is given besides a system message; keep one of them')
    return [{"role": "system", "content": text_of(row["system"], where, "system")}, *messages]


def _alpaca(row: dict, where: str) -> Messages:
    instruction = text_of(row["instruction"], where, "instruction")
    extra = text_of(row.get("input") or "", where, "input", empty=True)
    history: Messages = []
    for i, pair in enumerate(row.get("history") or []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow(where, f'field "history[{i}]" must be [human, reply], found {show(pair)}')
        history += turns_of(pair, where, f"history[{i}]")
    user = {"role": "user", "content": f"{instruction}\n{extra}" if extra.strip() else instruction}
    return _with_system([*history, user], row, where)


def prompt_format(row: dict) -> tuple[str, ...] | None:
    """The entry of PROMPT_COLUMNS that row's prompt is made from; None: it has no column of a prompt."""
    return next((columns for columns in PROMPT_COLUMNS if row.get(columns[0]) is not None), None)


def prompt_of(row: dict, where: str) -> str | Messages | None:
    """The prompt, or the whole conversation, that row's prompt columns hold; None without such columns.

    A "prompt" is a string (used as it is) or messages or turns; every other format gives messages.
    """
    format_ = prompt_format(row)
    key = format_[0] if format_ else None
    if key == "prompt":
        value = row["prompt"]
        return text_of(value, where, "prompt") if isinstance(value, str) else conversation_of(value, where, key)
    if key == "chat":
        return moss_conversation(row, where)
    if key == "conversations":
        return _sharegpt(row, where)
    if key == "instruction":
        return _alpaca(row, where)
    if key == "user_prompt":
        return [{"role": "user", "content": text_of(row["user_prompt"], where, "user_prompt")}]
    return conversation_of(row["messages"], where, "messages") if key else None


def pair_of(row: dict, where: str) -> tuple[str | Messages, str, str]:
    """(prompt, chosen, rejected) of a row with those columns, in whatever of the formats. Raises BadRow."""
    prompt = prompt_of(row, where)
    if prompt is not None:
        return _explicit_pair(prompt, row, where)
    both = [row["chosen"], row["rejected"]]
    if not all(map(is_transcript, both)) and all(isinstance(v, str) for v in both):
        return _common_prompt(row, where)
    chosen, rejected = (conversation_of(row[k], where, k) for k in ("chosen", "rejected"))
    return shared_context(chosen, rejected, where)


def _explicit_pair(prompt: str | Messages, row: dict, where: str) -> tuple[str | Messages, str, str]:
    replies = {k: completion_of(row[k], where, k) for k in ("chosen", "rejected")}
    if all(isinstance(v, str) for v in replies.values()):
        return prompt, replies["chosen"], replies["rejected"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    full = []
    for key, value in replies.items():
        tail = [{"role": "assistant", "content": value}] if isinstance(value, str) else value
        # Some published sets repeat the whole conversation in chosen and rejected, the prompt included.
        repeats = len(tail) > 1 and tail[0]["role"] in ("system", "user")
        full.append(tail if repeats else [*prompt, *tail])
        check_order(full[-1], where, key)
    return shared_context(full[0], full[1], where)


def completion_of(value: Any, where: str, field: str) -> str | Messages:
    """A reply: text, one message as a dict, or a list of messages (only one assistant message: its text)."""
    if isinstance(value, str):
        return text_of(value, where, field)
    messages = messages_of([value] if isinstance(value, dict) else value, where, field, fragment=True)
    if messages[-1]["role"] != "assistant":
        raise BadRow(where, f'field "{field}" must end with an assistant message, not {messages[-1]["role"]}')
    return messages[0]["content"] if len(messages) == 1 else messages


def shared_context(chosen: Messages, rejected: Messages, where: str) -> tuple[Messages, str, str]:
    """Split two conversations with the same context into (context, last of one, last of the other)."""
    for key, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1]["role"] != "assistant":
            raise BadRow(where, f'field "{key}" must end with a reply, but its last turn is the human\'s')
        if len(messages) < 2:
            raise BadRow(where, f'field "{key}" has a reply but no prompt')
    if chosen[:-1] != rejected[:-1]:
        turn = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), 0) + 1
        raise BadRow(
            where,
            f'"chosen" and "rejected" differ before their last turn (at turn {turn} of {len(chosen)} and '
            f"{len(rejected)}); only the last reply may differ",
        )
    return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]


def _common_prompt(row: dict, where: str) -> tuple[str, str, str]:
    """TRL's implicit prompt: the common head of both texts up to the end of its last whole word.

    Only where no other column could be the prompt: two replies often begin alike too.
    """
    chosen, rejected = (text_of(row[key], where, key) for key in ("chosen", "rejected"))
    n = len(os.path.commonprefix([chosen, rejected]))
    while n and not chosen[n - 1].isspace():
        n -= 1
    prompt = chosen[:n].rstrip()
    others = [key for key, value in row.items() if isinstance(value, (str, list)) and key not in ("chosen", "rejected")]
    if others or not prompt and chosen != rejected:
        raise missing(where, "prompt", row, "a prompt, or two texts alone that begin with the same one")
    if chosen == rejected:
        raise DroppedRow("chosen equals rejected")
    n = len(prompt)
    for key in ("chosen", "rejected"):
        text_of(row[key][n:], where, key)
    return prompt, chosen[n:], rejected[n:]
