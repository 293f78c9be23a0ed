"""Rows of other projects turned into prompts, replies and conversations.

Read as they are: Anthropic hh-rlhf transcripts, TRL (standard and conversational, with or without an explicit
prompt), ShareGPT / LLaMA-Factory, Alpaca, KTO, MOSS SFT, and the turn lists of MOSS-RLHF. The format is
taken from the columns of each row. Field names of these formats: their own documentation; for MOSS and
MOSS-RLHF the code and the sample files of OpenLMLab/MOSS and OpenLMLab/MOSS-RLHF.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from fastrlhf.data.checks import BadRow, DroppedRow, Messages, check_order, messages_of, missing, text_of, wrong

# The parts of a MOSS turn in their order, each with the tags around it.
_MOSS_TAGS = {
    "Human": ("<|Human|>:", "<eoh>"),
    "Inner Thoughts": ("<|Inner Thoughts|>:", "<eot>"),
    "Commands": ("<|Commands|>:", "<eoc>"),
    "Tool Responses": ("<|Results|>:", "<eor>"),
    "MOSS": ("<|MOSS|>:", "<eom>"),
}
_MOSS_SPEECH = ("Human", "MOSS")  # a turn must have these; the other parts are of its tools
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def turns_of(value: Any, where: str, field: str) -> Messages:
    """Messages of a MOSS-RLHF list of turns without role tags: human first, then in turn. Raises BadRow."""
    if not isinstance(value, list) or not value:
        raise wrong(where, field, "a list of turns", value)
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
    _, *parts = _HH_TURN.split(value)  # the text before the first tag is empty; then tag and content in turn
    messages: Messages = []
    for tag, content in zip(parts[::2], parts[1::2]):
        role = "user" if tag == "Human" else "assistant"
        content = text_of(content.strip(), where, field, empty=True)
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] = f"{messages[-1]['content']}\n\n{content}".strip()
        else:
            messages.append({"role": role, "content": content})
    if not messages[-1]["content"]:
        raise DroppedRow("transcripts with an empty last turn")
    if any(not message["content"] for message in messages):
        raise BadRow(where, f'field "{field}" has an empty turn; fill it or delete the row')
    return messages


def conversation_of(value: Any, where: str, field: str) -> Messages:
    """Messages from any of: a list of messages, a list of turns, a transcript. Raises BadRow."""
    if is_transcript(value):
        return transcript_of(value, where, field)
    if isinstance(value, list) and value and isinstance(value[0], str):
        return turns_of(value, where, field)
    return messages_of(value, where, field)


def completion_of(value: Any, where: str, field: str) -> str | Messages:
    """A reply: text, one message as a dict, or a list of messages (only one assistant message: its text)."""
    if isinstance(value, str):
        return text_of(value, where, field)
    messages = messages_of([value] if isinstance(value, dict) else value, where, field, fragment=True)
    if messages[-1]["role"] != "assistant":
        raise BadRow(where, f'field "{field}" must end with an assistant message, not {messages[-1]["role"]}')
    return messages[0]["content"] if len(messages) == 1 else messages


# ------------------------------------------------------------------------------------------- where a prompt stands


def _own_prompt(row: dict, where: str) -> str | Messages:
    prompt = row["prompt"]
    return text_of(prompt, where, "prompt") if isinstance(prompt, str) else conversation_of(prompt, where, "prompt")


def moss_conversation(row: dict, where: str) -> Messages:
    """Messages of a MOSS SFT row: meta_instruction and chat.turn_N with Human, Inner Thoughts, ..., MOSS.

    Where any turn uses a tool, every turn keeps its parts: thoughts and commands are one assistant message
    in MOSS's own tags (the "moss" template writes it as it is), results a tool message. Otherwise a turn is
    a user and an assistant message.
    """
    chat = row["chat"]
    if not isinstance(chat, dict) or not chat:
        raise wrong(where, "chat", '{"turn_1": ...}', chat)
    messages: Messages = []
    if str(row.get("meta_instruction") or "").strip():
        messages.append({"role": "system", "content": text_of(row["meta_instruction"], where, "meta_instruction")})
    turns = [_moss_turn(chat, f"turn_{i + 1}", where) for i in range(len(chat))]
    # The files write "None" for the thoughts, commands and results of a turn without tools. Whether a conversation uses
    # tools is asked of all its turns: were it asked of each, turns of one conversation would be written in two ways.
    tools = [part for part in _MOSS_TAGS if part not in _MOSS_SPEECH]
    uses_tools = any(turn.get(part, "None").strip() != "None" for turn in turns for part in tools)
    for turn in turns:
        messages.append({"role": "user", "content": turn["Human"]})
        if uses_tools:
            thoughts, commands, results = (turn.get(part, "None") for part in tools)
            call = f"<|Inner Thoughts|>: {thoughts}<eot>\n<|Commands|>: {commands}<eoc>"
            messages += [{"role": "assistant", "content": call}, {"role": "tool", "content": results}]
        messages.append({"role": "assistant", "content": turn["MOSS"]})
    return messages


def _moss_turn(chat: dict, name: str, where: str) -> dict[str, str]:
    """The parts that a turn has, without their tags; what stands between the tags is kept to the letter."""
    turn = chat.get(name)
    if not isinstance(turn, dict):
        raise missing(where, name, chat, f"turns turn_1 ... turn_{len(chat)} in chat")
    parts = {}
    for part, (head, end) in _MOSS_TAGS.items():
        if part in _MOSS_SPEECH or turn.get(part):
            field = f"chat.{name}.{part}"
            text = text_of(turn.get(part), where, field).rstrip("\n")
            if not text.startswith(head) or not text.endswith(end):
                raise wrong(where, field, f"{head} ... {end}", text)
            parts[part] = text_of(text[len(head) : -len(end)].removeprefix(" "), where, field)
    return parts


def _sharegpt(row: dict, where: str) -> Messages:
    if row.get("tools") and row["tools"] != "[]":
        raise BadRow(where, 'field "tools": tool descriptions are not supported; put them into a system message')
    return _with_system(messages_of(row["conversations"], where, "conversations"), row, where)


def _alpaca(row: dict, where: str) -> Messages:
    instruction = text_of(row["instruction"], where, "instruction")
    extra = text_of(row.get("input") or "", where, "input", empty=True)
    messages: Messages = []
    for i, pair in enumerate(row.get("history") or []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise wrong(where, f"history[{i}]", "[human, reply]", pair)
        messages += turns_of(pair, where, f"history[{i}]")
    messages.append({"role": "user", "content": f"{instruction}\n{extra}" if extra.strip() else instruction})
    return _with_system(messages, row, where)


def _with_system(messages: Messages, row: dict, where: str) -> Messages:
    if not row.get("system"):
        return messages
    if messages[0]["role"] == "system":
        raise BadRow(where, 'field "system" is given besides a system message; keep one of them')
    return [{"role": "system", "content": text_of(row["system"], where, "system")}, *messages]


def _user_prompt(row: dict, where: str) -> Messages:
    return [{"role": "user", "content": text_of(row["user_prompt"], where, "user_prompt")}]


class PromptFormat(NamedTuple):
    """A format that a prompt may have: the columns it is made from, and the function that makes it of a row. The first
    column is the one by which the format is recognised."""

    columns: tuple[str, ...]
    read: Callable[[dict, str], str | Messages]


# In the order in which they are tried.
_PROMPT_FORMATS = (
    PromptFormat(("prompt",), _own_prompt),
    PromptFormat(("chat", "meta_instruction", "num_turns"), moss_conversation),
    PromptFormat(("conversations", "system", "tools"), _sharegpt),
    PromptFormat(("instruction", "input", "history", "system"), _alpaca),
    PromptFormat(("user_prompt",), _user_prompt),
    PromptFormat(("messages",), lambda row, where: conversation_of(row["messages"], where, "messages")),
)


def prompt_format(row: dict) -> PromptFormat | None:
    """The format of row's prompt; None: it has no column of a prompt."""
    return next((known for known in _PROMPT_FORMATS if row.get(known.columns[0]) is not None), None)


def prompt_of(row: dict, where: str) -> str | Messages | None:
    """The prompt, or the whole conversation, that row's prompt columns hold; None without such columns.

    A "prompt" is a string (used as it is) or messages or turns; every other format gives messages.
    """
    known = prompt_format(row)
    return known.read(row, where) if known else None


# ----------------------------------------------------------------------------------------------- chosen and rejected


class Pair(NamedTuple):
    prompt: str | Messages
    chosen: str
    rejected: str


def pair_of(row: dict, where: str) -> Pair:
    """The pair of a row with columns chosen and rejected, in whatever of the formats. Raises BadRow."""
    both = {key: row[key] for key in ("chosen", "rejected")}
    prompt = prompt_of(row, where)
    if prompt is None:
        if all(isinstance(v, str) for v in both.values()) and not all(map(is_transcript, both.values())):
            return _pair_of_texts(row, where)
        return _pair_of_conversations(*(conversation_of(v, where, key) for key, v in both.items()), where)
    replies = {key: completion_of(v, where, key) for key, v in both.items()}
    if all(isinstance(reply, str) for reply in replies.values()):
        return Pair(prompt, **replies)
    start = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    full = []
    for key, reply in replies.items():
        tail = [{"role": "assistant", "content": reply}] if isinstance(reply, str) else reply
        # Some published sets repeat the whole conversation in chosen and rejected, the prompt included.
        repeats = len(tail) > 1 and tail[0]["role"] in ("system", "user")
        full.append(tail if repeats else [*start, *tail])
        check_order(full[-1], where, key)
    return _pair_of_conversations(*full, where)


def _pair_of_conversations(chosen: Messages, rejected: Messages, where: str) -> Pair:
    """Two conversations that differ in their last reply only; what stands before it is the prompt."""
    for key, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1]["role"] != "assistant":
            raise BadRow(where, f'field "{key}" must end with a reply, but its last turn is the human\'s')
        if len(messages) < 2:
            raise BadRow(where, f'field "{key}" has a reply but no prompt')
    if chosen[:-1] != rejected[:-1]:
        turn = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), 0) + 1
        at = f"at turn {turn} of {len(chosen)} and {len(rejected)}"
        problem = f'"chosen" and "rejected" differ before their last turn ({at}); only the last reply may differ'
        raise BadRow(where, problem)
    return Pair(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def _pair_of_texts(row: dict, where: str) -> Pair:
    """TRL's implicit prompt: the common head of both texts up to the end of its last whole word.

    Only where no other column could be the prompt: two replies often begin alike too.
    """
    chosen, rejected = (text_of(row[key], where, key) for key in ("chosen", "rejected"))
    common = os.path.commonprefix([chosen, rejected])
    # What stands behind the last blank may be half a word, so the replies begin with it and the blanks before it.
    prompt = common[: len(common) - len(re.split(r"\s", common)[-1])].rstrip()
    others = [key for key, value in row.items() if isinstance(value, (str, list)) and key not in ("chosen", "rejected")]
    if others or not prompt and chosen != rejected:
        raise missing(where, "prompt", row, "a prompt, or two texts alone that begin with the same one")
    if chosen == rejected:
        raise DroppedRow("chosen equals rejected")
    replies = (text_of(row[key][len(prompt) :], where, key) for key in ("chosen", "rejected"))
    return Pair(prompt, *replies)
