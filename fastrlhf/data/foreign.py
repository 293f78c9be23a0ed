"""Rows of other projects turned into prompts, replies and conversations.

Read as they are: Anthropic hh-rlhf transcripts, TRL (standard and conversational, with or without an explicit
prompt), ShareGPT / LLaMA-Factory, Alpaca, KTO, MOSS SFT, and the turn lists of MOSS-RLHF. The format is
taken from the columns of each row. Field names of these formats: their own documentation; for MOSS and
MOSS-RLHF the code and the sample files of OpenLMLab/MOSS and OpenLMLab/MOSS-RLHF.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable
from typing import Any, NamedTuple

from fastrlhf.data.checks import (
    BadRow,
    DroppedRow,
    Messages,
    check_order,
    messages_of,
    missing,
    plain_reply,
    show,
    text_of,
    wrong,
)

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
# As they are copied by hand: without the lines in front, or with one line feed where hh-rlhf has two.
_SAID = re.compile(r"\s*(Human|User):")
_TURNS = (re.compile(r"\n\s*\n(Human|User|Assistant):"), re.compile(r"\n(Human|User|Assistant):"))


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


def open_transcript(text: str) -> Messages | None:
    """The messages of a prompt that is a transcript, and ends with the human's turn or the bare tag of the assistant's;
    None for any other text. "Human:" or "User:" begins one where "Assistant:" begins a line behind it."""
    turn = _HH_TURN if is_transcript(text) else None
    if turn is None and _SAID.match(text):
        text = f"\n\n{text.strip()}"
        turn = next((turn for turn in _TURNS if "Assistant" in turn.findall(text)), None)
    if turn is None:
        return None
    try:
        messages = transcript_of(re.sub(r"\s*\nAssistant:\s*$", "", text), "", "prompt", turn)
    except (BadRow, DroppedRow):
        return None
    return messages if messages[-1]["role"] == "user" else None


def transcript_of(value: str, where: str, field: str, turn: re.Pattern[str] = _HH_TURN) -> Messages:
    """The turns of an hh-rlhf transcript, each without the blanks around it.

    Two turns of the same speaker in a row (the published files have some) are one turn; a transcript that
    ends with an empty turn raises DroppedRow, an empty turn elsewhere BadRow.
    """
    _, *parts = turn.split(value)  # the text before the first tag is empty; then tag and content in turn
    messages: Messages = []
    for tag, content in zip(parts[::2], parts[1::2]):
        role = "assistant" if tag == "Assistant" else "user"
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
    """A reply: text, one message as a dict, or a list of messages (only one assistant message: its text, where it is
    nothing more). A transcript is the whole conversation, and so are messages with a human's."""
    if is_transcript(value):
        value = transcript_of(value, where, field)
    if isinstance(value, str):
        return text_of(value, where, field)
    messages = messages_of([value] if isinstance(value, dict) else value, where, field, fragment=True)
    if messages[-1]["role"] != "assistant":
        raise BadRow(where, f'field "{field}" must end with an assistant message, not {messages[-1]["role"]}')
    return messages[0]["content"] if len(messages) == 1 and len(messages[0]) == 2 else messages


# ------------------------------------------------------------------------------------------- where a prompt stands


def _own_prompt(row: dict, where: str) -> str | Messages:
    prompt = row["prompt"]
    return text_of(prompt, where, "prompt") if isinstance(prompt, str) else conversation_of(prompt, where, "prompt")


def moss_conversation(row: dict, where: str) -> Messages:
    """Messages of a MOSS SFT row: meta_instruction and chat.turn_N with Human, Inner Thoughts, ..., MOSS.

    Where any turn uses a tool, every turn keeps its parts: thoughts and commands are one assistant message
    in MOSS's own tags (the "moss" template writes it as it is), results a tool message of weight 1: as in MOSS's
    training, its tags are learnt and what a tool said is not. Otherwise a turn is a user and an assistant message.
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
            messages += [{"role": "assistant", "content": call}, {"role": "tool", "content": results, "weight": 1}]
        messages.append({"role": "assistant", "content": turn["MOSS"]})
    return messages


def _moss_turn(chat: dict, name: str, where: str) -> dict[str, str]:
    """The parts that a turn has, without their tags; what stands between the tags is kept to the letter."""
    turn = chat.get(name)
    if not isinstance(turn, dict):
        expected = f"expected turns turn_1 ... turn_{len(chat)} in chat, found {', '.join(chat)}"
        raise BadRow(where, f'field "{name}" is missing; {expected}')
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
    return conversation_of(row["conversations"], where, "conversations")


def _alpaca(row: dict, where: str) -> Messages:
    """The instruction and, a line each, Alpaca's input and Dolly's context, as one user message."""
    parts = [text_of(row["instruction"], where, "instruction")]
    extras = (text_of(row.get(name) or "", where, name, empty=True) for name in ("input", "context"))
    parts += [extra for extra in extras if extra.strip()]
    return [{"role": "user", "content": "\n".join(parts)}]


def _user_prompt(row: dict, where: str) -> Messages:
    return [{"role": "user", "content": text_of(row["user_prompt"], where, "user_prompt")}]


class PromptFormat(NamedTuple):
    """A format that a prompt may have: the columns it is made from, and the function that makes it of a row. The first
    column is the one by which the format is recognised, if it holds one of `kinds`."""

    columns: tuple[str, ...]
    kinds: tuple[type, ...]
    read: Callable[[dict, str], str | Messages]


# In the order in which they are tried.
_OWN = PromptFormat(("prompt",), (object,), _own_prompt)
_CONVERSATIONS = (
    PromptFormat(("chat", "meta_instruction", "num_turns"), (dict,), moss_conversation),
    PromptFormat(("conversations", "system", "tools"), (list,), _sharegpt),
    PromptFormat(("messages",), (list,), lambda row, where: conversation_of(row["messages"], where, "messages")),
    PromptFormat(("instruction", "input", "context", "history", "system"), (str,), _alpaca),
    PromptFormat(("user_prompt",), (str,), _user_prompt),
)
_FORMATS = (_OWN, *_CONVERSATIONS)
_OF_CONVERSATIONS = {known.columns[0] for known in _CONVERSATIONS}


def prompt_format(row: dict) -> PromptFormat | None:
    """The format of row's prompt; None: it has no column of a prompt."""
    return next((known for known in _FORMATS if row.get(known.columns[0]) is not None), None)


def prompt_columns(row: dict) -> set[str]:
    """The columns that row's prompt is made of."""
    return {column for known in _formats_of(row) for column in known.columns}


def _formats_of(row: dict) -> list[PromptFormat]:
    """The formats that a row has columns of, the most telling first: a conversation before a prompt beside it."""
    if row.keys().isdisjoint(_OF_CONVERSATIONS):
        return [_OWN] if row.get("prompt") is not None else []
    first = prompt_format(row)
    if first is None:
        return []
    others = [known for known in _CONVERSATIONS if isinstance(row.get(known.columns[0]), known.kinds)]
    return [*others, _OWN] if first is _OWN else [first, *(known for known in others if known is not first)]


def prompt_of(row: dict, where: str) -> str | Messages | None:
    """The prompt, or the whole conversation, that row's prompt columns hold; None without such columns.

    A "prompt" is a string (used as it is) or messages or turns; every other format gives messages. Where a row has
    several, all must say the same, and the conversation is taken. Raises BadRow.
    """
    prompt = _whole(_formats_of(row), row, where)
    return None if prompt is None else with_context(prompt, row, where)


def _whole(formats: list[PromptFormat], row: dict, where: str) -> str | Messages | None:
    """prompt_of without what the columns of the context add to it."""
    if not formats:
        return None
    first, *others = formats
    prompt = first.read(row, where)
    for other in others:
        check_agreement(other.read(row, where), prompt, where, other.columns[0], first.columns[0])
    return prompt


def bare_prompt(row: dict, where: str) -> str | Messages | None:
    """The prompt of a row whose replies stand in columns of their own, without the columns of the context.

    A conversation beside a "prompt" may have its reply at the end, which is no part of the prompt.
    """
    formats = _formats_of(row)
    prompt = _whole(formats, row, where)
    return asked(prompt) if prompt is not None and len(formats) > 1 else prompt


def asked(conversation: str | Messages) -> str | Messages:
    """What a conversation asks for: itself without the reply at its end."""
    ends_with_reply = isinstance(conversation, list) and conversation[-1]["role"] == "assistant"
    return conversation[:-1] if ends_with_reply else conversation


def check_agreement(stated: str | Messages, conversation: str | Messages, where: str, field: str, beside: str) -> None:
    """Raise BadRow, which shows both, where a prompt contradicts the conversation beside it.

    They agree, blanks apart, where the prompt is the whole of what the conversation asks, its first or its last user
    turn, or all its turns in one text, with or without marks of who speaks.
    """
    prompt = _as_messages(asked(conversation))
    if isinstance(stated, list):
        systems, turns = _contents(asked(stated), system=True), _contents(asked(stated), system=False)
        agrees = turns == _contents(prompt, system=False) or len(turns) == 1 and _is_turn_of(turns[0], prompt)
        agrees = agrees and (not systems or systems == _contents(prompt, system=True))
    else:
        agrees = _is_turn_of(_without_blanks(stated), prompt) or _is_rendered(stated, prompt)
    if not agrees:
        remedy = "mend the row, or name the wrong column in ignore_columns"
        both = f'field "{field}" is {_spelled(stated)}, but "{beside}" asks {_spelled(prompt)}'
        raise BadRow(where, f"{both}; {remedy}")


def _spelled(prompt: str | Messages) -> str:
    """A prompt in an error message: who says what, its middle left out where it is long."""
    turns = prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
    return repr(turns if len(turns) <= 200 else f"{turns[:100]} ... {turns[-95:]}")


def _as_messages(prompt: str | Messages) -> Messages:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _contents(messages: Messages, *, system: bool) -> list[str]:
    return [_without_blanks(m["content"]) for m in messages if (m["role"] == "system") == system]


def _is_turn_of(text: str, prompt: Messages) -> bool:
    """Whether text, without blanks, is the first or the last thing that the user says."""
    users = [_without_blanks(message["content"]) for message in prompt if message["role"] == "user"]
    return text in (users[:1] + users[-1:])


def _without_blanks(text: str) -> str:
    return "".join(unicodedata.normalize("NFC", text).split())


# What a text of several turns has beside their contents: tags, brackets, the names of those who speak.
_SPEAKERS = re.compile(
    r"Belowisaninstructionthatdescribesatask\.Writearesponsethatappropriatelycompletestherequest\."  # Alpaca's
    r"|<[^<>]*>|\[/?[A-Z]+\]|human|user|assistant|gpt|bot|system|prompter|model|instruction|input|response|question"
    r"|answer|round\d+|用户|助手|系统|人类|问|答|\W|_",
    re.IGNORECASE,
)


def _is_rendered(text: str, prompt: Messages) -> bool:
    """Whether text is these messages in their order, the system's left out or not, and otherwise marks of speakers."""
    text = _without_blanks(text)
    for messages in (prompt, [m for m in prompt if m["role"] != "system"]):
        position, rest = 0, ""
        for message in messages:
            content = _without_blanks(message["content"])
            index = text.find(content, position)
            if index < 0:
                break
            rest, position = rest + text[position:index], index + len(content)
        else:
            if not _SPEAKERS.sub("", rest + text[position:]):
                return True
    return False


# -------------------------------------------------------------------------------- columns that are part of the prompt

_SYSTEM = ("system", "system_prompt", "system_message", "system_instruction", "developer")
_TOOLS = "tool descriptions are not supported; put them into a system message"
_EARLIER = "earlier turns are read from history: [[human, reply], ...], or from messages"
_TEXT_ONLY = "only text is supported"
_OF_INSTRUCTIONS = ("context", "input")
_UNREADABLE = {
    **dict.fromkeys(("tools", "functions"), _TOOLS),
    **dict.fromkeys(_OF_INSTRUCTIONS, "it is part of an instruction's text only; put it into the prompt"),
    "documents": "put them into the prompt",
    **dict.fromkeys(("chat_history", "conversation_history"), _EARLIER),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _TEXT_ONLY),
}
CONTEXT = (*_SYSTEM, "history", *_UNREADABLE)
_CONTEXT = frozenset(CONTEXT)
_LEAVE_OUT = "or leave it out with ignore_columns"


def is_empty(value: Any) -> bool:
    """Whether a column says nothing: None, blank text, an empty list or mapping, written as JSON too."""
    return not value or isinstance(value, str) and value.strip() in ("", "[]", "{}", "null")


def with_context(prompt: str | Messages, row: dict, where: str) -> str | Messages:
    """The prompt with the columns beside it that are part of it: a system message in front, earlier turns behind that.

    Raises BadRow for a column that cannot be used: nothing that was asked is dropped in silence.
    """
    if _CONTEXT.isdisjoint(row):
        return prompt
    is_instruction = prompt_format(row) is not None and _formats_of(row)[0].read is _alpaca
    for name, why in _UNREADABLE.items():
        if not is_empty(row.get(name)) and not (name in _OF_INSTRUCTIONS and is_instruction):
            raise BadRow(where, f'field "{name}": {why}, {_LEAVE_OUT}')
    turns = [] if is_empty(row.get("history")) else _history(row["history"], where)
    systems = {name: text_of(row[name], where, name) for name in _SYSTEM if not is_empty(row.get(name))}
    if not turns and not systems:
        return prompt
    if isinstance(prompt, str):
        prompt = _message_of(prompt, where, next(iter(systems), "history"))
    messages = list(prompt)
    if messages[0]["role"] == "system":
        systems = {f"{messages[0]['role']} message": messages.pop(0)["content"], **systems}
    first, *more = systems.items() if systems else [(None, None)]
    for name, text in more:
        if _without_blanks(text) != _without_blanks(first[1]):
            raise BadRow(where, f'field "{name}" is given besides a {first[0]}; keep one of them, {_LEAVE_OUT}')
    if turns and (not messages or [m["role"] for m in asked(messages)] != ["user"]):
        raise BadRow(where, f'field "history" is given besides a conversation; keep one of them, {_LEAVE_OUT}')
    system = [{"role": "system", "content": first[1]}] if first[1] is not None else []
    return [*system, *turns, *messages]


# Of the templates that are known: a text that holds one has its turns and its system message in it already.
_TEMPLATE_MARK = re.compile(r"<\|[\w ]+\|>|<｜[^｜]+｜>|\[/?INST\]|<(start|end)_of_turn>|<</?SYS>>")


def _message_of(prompt: str, where: str, beside: str) -> Messages:
    """The messages of a string prompt that has a system text or earlier turns in columns of their own."""
    if _TEMPLATE_MARK.search(prompt):
        raise BadRow(
            where, f'field "{beside}" is given besides a prompt that a template wrote; put it there, {_LEAVE_OUT}'
        )
    return open_transcript(prompt) or _as_messages(prompt)


def _history(value: Any, where: str) -> Messages:
    """Earlier turns: Alpaca's [[human, reply], ...]."""
    if not isinstance(value, list):
        raise BadRow(where, f'field "history" must be a list of [human, reply], found {show(value)}; {_MAP_HISTORY}')
    turns: Messages = []
    for i, pair in enumerate(value):
        if not isinstance(pair, list) or len(pair) != 2:
            raise wrong(where, f"history[{i}]", "[human, reply]", pair)
        turns += turns_of(pair, where, f"history[{i}]")
    return turns


_MAP_HISTORY = f"columns={{prompt: history}} reads it as the prompt, {_LEAVE_OUT}"


# ----------------------------------------------------------------------------------------------- chosen and rejected


class Pair(NamedTuple):
    prompt: str | Messages
    chosen: str
    rejected: str


def pair_of(row: dict, where: str) -> Pair:
    """The pair of a row with columns chosen and rejected, in whatever of the formats. Raises BadRow."""
    both = {key: row[key] for key in ("chosen", "rejected")}
    prompt = bare_prompt(row, where)
    if prompt is None:
        if all(isinstance(v, str) for v in both.values()) and not all(map(is_transcript, both.values())):
            pair = _pair_of_texts(row, where)
        else:
            pair = _pair_of_conversations(*(conversation_of(v, where, key) for key, v in both.items()), where)
    else:
        replies = {key: completion_of(v, where, key) for key, v in both.items()}
        if all(isinstance(reply, str) for reply in replies.values()):
            pair = Pair(prompt, **replies)
        else:
            full = (joined(prompt, reply, where, key) for key, reply in replies.items())
            pair = _pair_of_conversations(*full, where)
    whole = with_context(pair.prompt, row, where)
    return pair if whole is pair.prompt else pair._replace(prompt=whole)


def joined(prompt: str | Messages, reply: str | Messages, where: str, field: str) -> Messages:
    """The conversation of a prompt and a reply. Some published sets repeat the prompt in the reply. Raises BadRow."""
    tail = [{"role": "assistant", "content": reply}] if isinstance(reply, str) else reply
    if len(tail) > 1 and tail[0]["role"] in ("system", "user"):
        check_order(tail, where, field)
        check_agreement(prompt, tail, where, "prompt", field)
        return tail
    messages = [*_as_messages(prompt), *tail]
    check_order(messages, where, field)
    return messages


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
    replies = [plain_reply(m[-1], where, key) for key, m in (("chosen", chosen), ("rejected", rejected))]
    return Pair(chosen[:-1], *replies)


def _pair_of_texts(row: dict, where: str) -> Pair:
    """TRL's implicit prompt: the common head of both texts up to the end of its last whole word.

    Only where no other column could be the prompt: two replies often begin alike too.
    """
    chosen, rejected = (text_of(row[key], where, key) for key in ("chosen", "rejected"))
    common = os.path.commonprefix([chosen, rejected])
    # What stands behind the last blank may be half a word, so the replies begin with it and the blanks before it.
    prompt = common[: len(common) - len(re.split(r"\s|(?<=\|>)|(?<=INST\])", common)[-1])].rstrip()
    others = [key for key, value in row.items() if isinstance(value, (str, list)) and key not in ("chosen", "rejected")]
    if others or not prompt and chosen != rejected:
        raise missing(where, "prompt", row, "a prompt, or two texts alone that begin with the same one")
    if chosen == rejected:
        raise DroppedRow("chosen equals rejected")
    replies = (text_of(row[key][len(prompt) :], where, key) for key in ("chosen", "rejected"))
    return Pair(prompt, *replies)
