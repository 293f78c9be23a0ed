"""Records of human feedback, conversations and prompts: one row in, one checked record out.

A feedback row is one of
    {"prompt", "chosen", "rejected", "margin"?}
    {"prompt", "responses": [...], "ranking": [0-based, best first; ties as lists]}
    {"prompt", "response": str, "score": number} or {"prompt", "responses": [...], "scores": [...]}
    {"prompt", "response": str, "ratings": [number of each person]} or {"prompt", "responses", "ratings": [[...], ...]}
    {"prompt", "response", "edited"}
or a row of one of the formats in foreign.py; a column `unsafe` marks replies that must never be chosen (unsafe.py). A
prompt is a string, used as it is, or messages, which go through the chat template. Rows of one `judgement_id` are one
judgement, the last of them: `fastrlhf label` only appends to its file; `skipped` or `undone` takes it back. A row that
cannot be used raises BadRow; one that teaches nothing (chosen equals rejected) raises DroppedRow, which the loaders
count. Nothing is skipped without one of the two.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, Literal

from fastrlhf.data.checks import (
    BadRow,
    DroppedRow,
    Messages,
    check_order,
    marks_of,
    meant,
    missing,
    number_of,
    plain_reply,
    show,
    text_of,
    wrong,
)
from fastrlhf.data.columns import as_pair
from fastrlhf.data.foreign import (
    CONTEXT,
    asked,
    bare_prompt,
    completion_of,
    is_empty,
    is_transcript,
    joined,
    pair_of,
    prompt_columns,
    prompt_format,
    prompt_of,
    with_context,
)

Kind = Literal["pair", "ranking", "score", "edit"]
Ranking = tuple[tuple[int, ...], ...]
LOWEST = -1.0  # of scores
FIRST_IS_BETTER: Ranking = ((0,), (1,))
CUT = "prompts cut behind their last human turn"
UNSAFE = "replies marked unsafe"


@dataclass(frozen=True)
class Feedback:
    """One judgement of one or more replies to a prompt.

    pair: responses (chosen, rejected), ranking ((0,), (1,)), margin or None. edit: responses (edited,
    original), ranking ((0,), (1,)). ranking: groups of indices into responses, best first, ties in one group.
    score: scores in [-1, 1], one a response, mapped linearly from score_range. ratings: what several people gave each
    response, on the same scale; its score is their mean. where is "file:line". unsafe: replies that the row marks so;
    seen: replies to the prompt that the row has beside those it judges. annotator, source: the row's columns of these
    names, as texts; None: it has none. strength: how far an ensemble of reward models scores the better replies above
    the worse ones, in raw scores, below 0 where it disagrees; strength_sd: the deviation of that over its members;
    None: not measured.
    """

    kind: Kind
    prompt: str | Messages
    responses: tuple[str, ...]
    ranking: Ranking | None = None
    scores: tuple[float, ...] | None = None
    margin: float | None = None
    where: str = ""
    unsafe: tuple[str, ...] = ()
    seen: tuple[str, ...] = ()
    annotator: str | None = None
    source: str | None = None
    strength: float | None = None
    strength_sd: float | None = None
    ratings: tuple[tuple[float, ...], ...] | None = None

    def ordered_pairs(self) -> list[tuple[int, int]]:
        """(better, worse) index pairs that it implies; of scores those of responses with different ones."""
        if self.scores is not None:
            pairs = combinations(range(len(self.scores)), 2)
            ordered = [(i, j) if self.scores[i] > self.scores[j] else (j, i) for i, j in pairs]
            return [(i, j) for i, j in ordered if self.scores[i] != self.scores[j]]
        groups = self.ranking
        return [(i, j) for g, group in enumerate(groups) for i in group for rest in groups[g + 1 :] for j in rest]

    def lowered(self, unsafe: Iterable[str]) -> Feedback:
        """The judgement with its unsafe replies last, tied; where all of them are, with the lowest score of each."""
        bad = set(unsafe)
        marks = [reply in bad for reply in self.responses]
        if not any(marks):
            return self
        if self.kind == "score" or all(marks):
            given = self.scores or (LOWEST,) * len(marks)
            scores = tuple(LOWEST if mark else score for mark, score in zip(marks, given))
            return replace(self, kind="score", ranking=None, margin=None, scores=scores, ratings=None)
        safe = (tuple(i for i in group if not marks[i]) for group in self.ranking)
        ranking = (*filter(None, safe), tuple(i for i, mark in enumerate(marks) if mark))
        if ranking == self.ranking:
            return self
        return replace(self, kind="ranking", margin=None, ranking=ranking)


@dataclass(frozen=True)
class Conversation:
    """One SFT example: (prompt, response), or messages that end with an assistant turn, or plain text."""

    prompt: str | None = None
    response: str | None = None
    messages: Messages | None = None
    text: str | None = None
    where: str = ""


@dataclass(frozen=True)
class Prompt:
    """One prompt for rollouts. columns: the row's other columns, for reward functions; used: the names of the columns
    that the prompt was made of; note: what was cut."""

    prompt: str | Messages
    columns: dict[str, Any] = field(default_factory=dict)
    where: str = ""
    note: str | None = None
    used: frozenset[str] = frozenset()


def _record(row: Any, where: str) -> dict:
    """The row as a dict without its empty (None) columns; a bare list of turns or messages is its conversation."""
    if isinstance(row, list) and row:
        row = {"messages": row}
    if not isinstance(row, dict):
        raise BadRow(where, f"a row must be a JSON object or a list of turns, found {show(row)}")
    return {
        key: _unpacked(value) if type(value) is str and key in _MESSAGES else value
        for key, value in row.items()
        if value is not None
    }


# Columns that some published files hold as JSON texts: what begins as a list of messages is one.
_MESSAGES = {"messages", "conversations", "prompt", "chosen", "rejected", "completion", "response", "edited"}
_MESSAGES_IN_JSON = re.compile(r"\s*\[\s*\{")


def _unpacked(value: str) -> str | Messages:
    """The messages that a text is in JSON; any other text as it is."""
    if not _MESSAGES_IN_JSON.match(value):
        return value
    try:
        messages = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return messages if all(isinstance(m, dict) and not {"role", "from"}.isdisjoint(m) for m in messages) else value


def _require(row: dict, where: str, names: tuple[str, ...], expected: str) -> None:
    for name in names:
        if name not in row:
            raise missing(where, name, row, expected)


def _replies(row: dict, where: str, name: str, least: int) -> tuple[str, ...]:
    values = row[name]
    if not isinstance(values, list) or len(values) < least:
        raise wrong(where, name, f"a list of at least {least} texts", values)
    return tuple(_reply(value, where, f"{name}[{i}]") for i, value in enumerate(values))


def _reply(value: Any, where: str, name: str) -> str:
    reply = completion_of(value, where, name)
    if isinstance(reply, str):
        return reply
    if len(reply) > 1:
        raise BadRow(where, f'field "{name}" must be one reply, found {len(reply)} messages')
    return plain_reply(reply[0], where, name)


def parse_feedback(row: Any, where: str, score_range: tuple[float, float] = (1.0, 5.0)) -> Feedback:
    """The judgement in a row. score_range: the annotators' scale, lowest and highest.

    Raises BadRow (where, field, what was expected) and DroppedRow (the row holds no preference).
    """
    row = as_pair(_standing(_record(row, where)), where)
    _check_weights(row, where)
    if "edited" in row:
        return _marked(_edit(row, where), row, where)
    if "chosen" in row or "rejected" in row:
        return _marked(_pair(row, where), row, where)
    if "ranking" in row:
        return _marked(_ranking(row, where), row, where)
    if "ratings" in row:
        return _marked(_ratings(row, where, score_range), row, where)
    if "score" in row or "scores" in row:
        return _marked(_scores(row, where, score_range), row, where)
    if "label" in row or "kto_tag" in row:
        return _marked(_label(row, where), row, where)
    if row.get("unsafe") not in (None, False) and ("response" in row or "responses" in row):
        return _marked(_mark_alone(row, where), row, where)
    expected = "chosen and rejected, or responses and ranking, or response and score, or response and edited"
    judgements = ("chosen", "rejected", "ranking", "scores", "score", "ratings", "edited", "label")
    likely = "ranking" if "responses" in row else "score" if "response" in row else "chosen"
    raise missing(where, next((name for name in judgements if meant(name, row)), likely), row, expected)


_WEIGHTS = ("weight", "loss_weight", "sample_weight", "loss_mask", "mask")


def _check_weights(row: dict, where: str) -> None:
    """Raise BadRow where a column says that a row counts more or less than others, or in part: all count alike."""
    if row.keys().isdisjoint(_WEIGHTS):
        return
    name = next((name for name in _WEIGHTS if name in row and row[name] not in (1, "1", "", [])), None)
    if name is not None:
        remedy = "remove the rows that should not count, or leave the column out with ignore_columns"
        raise BadRow(where, f'field "{name}" is {show(row[name])}, but every row counts alike; {remedy}')


def judgement_id(row: Any) -> str | None:
    """What a row's judgement is known by; None: the row is a judgement of its own."""
    name = row.get("judgement_id") if isinstance(row, dict) else None
    return name if isinstance(name, str) else None


def _standing(row: dict) -> dict:
    """The row; raises DroppedRow where it says that its judgement is none."""
    if judgement_id(row) is not None:
        for name, reason in (("skipped", "skipped by the annotator"), ("undone", "taken back by the annotator")):
            if row.get(name) is True:
                raise DroppedRow(reason)
    return row


# Columns of preference strength: those that `fastrlhf reward-eval --strength` writes, and those of
# fnlp/hh-rlhf-strength-cleaned, the data of Wang et al. 2024.
_STRENGTH = (
    ("strength", "mean preference difference"),
    ("strength_sd", "std preference difference"),
    ("strength", "strength"),
    ("strength_sd", "strength_sd"),
)
_ABOUT = ("annotator", "source", *(column for _, column in _STRENGTH))


def _marked(feedback: Feedback, row: dict, where: str) -> Feedback:
    """The judgement with the row's own marks of unsafe replies applied, who gave it and where it is from; DroppedRow
    where nothing is preferred then."""
    if not row.keys().isdisjoint(_ABOUT):
        about = {name: str(row[name]) for name in ("annotator", "source") if isinstance(row.get(name), (str, int))}
        about |= {name: number_of(row[column], where, column) for name, column in _STRENGTH if column in row}
        feedback = replace(feedback, **about)
    replies = feedback.responses
    if feedback.kind == "edit":
        replies = _replies(row, where, "responses", 1) if "responses" in row else replies[1:]
    marks = marks_of(row, where, len(replies))
    if replies is not feedback.responses or any(marks):
        unsafe = tuple(reply for reply, mark in zip(replies, marks) if mark)
        seen = tuple(reply for reply in replies if reply not in feedback.responses)
        feedback = replace(feedback, unsafe=unsafe, seen=seen).lowered(unsafe)
    if feedback.ranking is not None and len(feedback.ranking) == 1:
        raise DroppedRow("rankings that are one tie")
    return feedback


def _mark_alone(row: dict, where: str) -> Feedback:
    """Replies of which some are unsafe and nothing else is said: they are tied."""
    replies = (
        _replies(row, where, "responses", 1) if "responses" in row else (_reply(row["response"], where, "response"),)
    )
    return Feedback("ranking", _prompt(row, where), replies, ranking=(tuple(range(len(replies))),), where=where)


def _prompt(row: dict, where: str) -> str | Messages:
    """The prompt of a row whose reply stands in another column: it must end with the human's turn."""
    prompt = bare_prompt(row, where)
    if prompt is None:
        raise missing(where, "prompt", row, "text or a list of messages")
    return _asking(with_context(prompt, row, where), where)


def _asking(prompt: str | Messages, where: str) -> str | Messages:
    if not _is_open(prompt):
        raise BadRow(where, f"the prompt must end with the human's turn, its last role is {prompt[-1]['role']!r}")
    return prompt


def _is_open(prompt: str | Messages) -> bool:
    """Whether the assistant speaks next."""
    return isinstance(prompt, str) or prompt[-1]["role"] in ("user", "tool")


def _pair(row: dict, where: str) -> Feedback:
    _require(row, where, ("chosen", "rejected"), "both chosen and rejected")
    prompt, chosen, rejected = pair_of(row, where)
    if chosen == rejected:
        raise DroppedRow("chosen equals rejected")
    if "margin" not in row and meant("margin", row):
        raise missing(where, "margin", row, "no such column, or margin")
    margin = number_of(row["margin"], where, "margin") if "margin" in row else None
    if margin is not None and margin < 0:
        raise BadRow(where, f'field "margin" is {margin:g}; it must be at least 0: swap chosen and rejected instead')
    prompt = _asking(prompt, where)
    return Feedback("pair", prompt, (chosen, rejected), ranking=FIRST_IS_BETTER, margin=margin, where=where)


def _edit(row: dict, where: str) -> Feedback:
    _require(row, where, ("response",), "the text that was edited")
    original, edited = (_reply(row[name], where, name) for name in ("response", "edited"))
    prompt = _prompt(row, where)
    if original == edited:
        raise DroppedRow("edited equals the response")
    return Feedback("edit", prompt, (edited, original), ranking=FIRST_IS_BETTER, where=where)


def _ranking(row: dict, where: str) -> Feedback:
    if not {"score", "scores", "ratings"}.isdisjoint(row):
        raise BadRow(where, "a record has a ranking or scores, not both; delete one of the columns")
    _require(row, where, ("responses",), "the list of texts that ranking orders")
    responses = _replies(row, where, "responses", 2)
    ranking = row["ranking"]
    if not isinstance(ranking, list):
        raise wrong(where, "ranking", "a list, best first", ranking)
    # One shape for all: [2, [0, 1]] becomes [[2], [0, 1]]. Then every index is looked at before they are sorted, for a
    # text or a list inside a tie cannot be compared with a number, and True and 1.0 would pass for 1. An empty group is
    # refused here because the sorted indices do not show it; the loss would take it for a stage that nobody won.
    groups = [group if isinstance(group, list) else [group] for group in ranking]
    indices = [index for group in groups for index in group]
    if any(isinstance(index, bool) or not isinstance(index, int) for index in indices) or not all(groups):
        raise BadRow(where, f'field "ranking" must hold whole numbers and lists of them (ties), found {show(ranking)}')
    if sorted(indices) != list(range(len(responses))):
        each = f"name each of the {len(responses)} responses once, as 0 to {len(responses) - 1}"
        raise BadRow(where, f'field "ranking" must {each}, found {show(ranking)}')
    prompt = _prompt(row, where)
    # Well formed, but nothing is preferred to anything (one tie: see _marked). The checks above come first: a bad row
    # is never merely dropped.
    if len(groups) > 1 and len(set(responses)) == 1:
        raise DroppedRow("rankings of identical responses")
    return Feedback("ranking", prompt, responses, ranking=tuple(map(tuple, groups)), where=where)


def _scores(row: dict, where: str, score_range: tuple[float, float]) -> Feedback:
    several = "responses" in row or "scores" in row
    names = ("responses", "scores") if several else ("response", "score")
    _require(row, where, names, f"{names[0]} and {names[1]} together")
    responses = _replies(row, where, "responses", 1) if several else (_reply(row["response"], where, "response"),)
    scores = row["scores"] if several else [row["score"]]
    if not isinstance(scores, list) or len(scores) != len(responses):
        raise wrong(where, "scores", f"a list of {len(responses)} numbers", scores)
    fields = [f"scores[{i}]" for i in range(len(scores))] if several else ["score"]
    on_scale = tuple(_on_scale(s, where, field, score_range, "score") for s, field in zip(scores, fields))
    return Feedback("score", _prompt(row, where), responses, scores=on_scale, where=where)


def _on_scale(value: Any, where: str, field: str, score_range: tuple[float, float], what: str) -> float:
    """A number that an annotator gave, as `Feedback` has it."""
    number, (low, high) = number_of(value, where, field), score_range
    if not low <= number <= high:
        raise BadRow(where, f"{what} {number:g} is outside the declared range {low:g} to {high:g}; set score_range")
    return 2 * (number - low) / (high - low) - 1


def _ratings(row: dict, where: str, score_range: tuple[float, float]) -> Feedback:
    """Several people's numbers for each reply; the score of a reply is their mean."""
    if "score" in row or "scores" in row:
        name = "score" if "score" in row else "scores"
        raise BadRow(
            where, f"a record has ratings or {name}, not both; leave one out with ignore_columns, as in [{name}]"
        )
    several = "responses" in row
    name = "responses" if several else "response"
    _require(row, where, (name,), f"{name} and ratings together")
    responses = _replies(row, where, "responses", 1) if several else (_reply(row["response"], where, "response"),)
    given = row["ratings"] if several else [row["ratings"]]
    lists = isinstance(given, list) and all(isinstance(some, list) and some for some in given)
    if not lists or len(given) != len(responses):
        people = "what each person gave it"
        each = f"a list for each of the {len(responses)} responses, {people} (one number a response: scores)"
        raise wrong(where, "ratings", each if several else f"a list of numbers, {people}", row["ratings"])
    ratings = tuple(
        tuple(
            _on_scale(one, where, f"ratings[{i}][{n}]" if several else f"ratings[{n}]", score_range, "rating")
            for n, one in enumerate(some)
        )
        for i, some in enumerate(given)
    )
    means = tuple(math.fsum(some) / len(some) for some in ratings)
    return Feedback("score", _prompt(row, where), responses, scores=means, ratings=ratings, where=where)


def _label(row: dict, where: str) -> Feedback:
    """KTO: a reply that was liked (true) or not (false) has the highest or the lowest score of the range."""
    name = "label" if "label" in row else "kto_tag"
    if not isinstance(row[name], (bool, int)) or row[name] not in (0, 1):
        raise wrong(where, name, "true or false (ignore_columns leaves another kind of label out)", row[name])
    prompt, reply = _prompt_and_reply(row, where)
    return Feedback("score", prompt, (reply,), scores=(1.0 if row[name] else -1.0,), where=where)


def _reply_column(row: dict) -> str | None:
    """The column of the reply; None: it ends the conversation, or there is none."""
    return next(iter(_reply_columns(row)), None)


def _reply_columns(row: dict) -> list[str]:
    columns = ("response", "completion", "output") if "instruction" in row else ("response", "completion")
    return [name for name in columns if name in row]


_ASKING = ("prompt", "instruction", "user_prompt")  # columns of a prompt; others hold a conversation, reply and all


def _with_reply(row: dict, where: str) -> tuple[str | Messages, Messages]:
    """The prompt of a row and the assistant's message behind it, from two columns or from one conversation."""
    name, *others = _reply_columns(row) or [None]
    for other in others:
        if row[other] != row[name]:
            remedy = "keep one of them, or leave one out with ignore_columns"
            raise BadRow(where, f'fields "{name}" and "{other}" are two replies; {remedy}')
    if name is None:
        messages = prompt_of(row, where)
        is_open = messages is None or _is_open(messages)
        if is_open and (prompt_format(row) is None or prompt_format(row).columns[0] in _ASKING):
            raise missing(where, "response", row, "a prompt and a response, or messages that end with a reply")
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            raise BadRow(where, f"a conversation must end with a reply, its last role is {messages[-1]['role']!r}")
        return messages[:-1], messages[-1:]
    reply = completion_of(row[name], where, name)
    if isinstance(reply, str):
        return _prompt(row, where), [{"role": "assistant", "content": reply}]
    messages = _conversation(row, where, name, reply)
    return messages[:-1], messages[-1:]


def _conversation(row: dict, where: str, name: str, reply: Messages) -> Messages:
    """The conversation of a row whose reply, in column `name`, is several messages."""
    prompt = bare_prompt(row, where)
    if prompt is None:
        check_order(reply, where, name)
        return with_context(reply, row, where)
    return with_context(joined(prompt, reply, where, name), row, where)


def _prompt_and_reply(row: dict, where: str) -> tuple[str | Messages, str]:
    prompt, [reply] = _with_reply(row, where)
    return prompt, plain_reply(reply, where, _reply_column(row) or "messages")


def parse_conversation(row: Any, where: str, format: str = "auto") -> Conversation:
    """The SFT example in a row.

    format "text": the column text (or a bare string); all of it is learnt. "auto": prompt and response (or
    completion), messages, a foreign conversation, or text where there is no prompt. Of a pair the chosen reply
    is learnt, of an edit the edited one, of KTO the liked ones (the others raise DroppedRow). Rows with rankings,
    scores or ratings raise BadRow: which of their replies are good enough to imitate is not said.
    """
    row = as_pair(_standing(_record({"text": row} if isinstance(row, str) else row, where)), where)
    _check_weights(row, where)
    if format == "text" or ("text" in row and prompt_format(row) is None):
        if format != "text":
            _check_plain(row, where)
        _require(row, where, ("text",), 'a column of plain text (format "text")')
        return Conversation(text=text_of(row["text"], where, "text"), where=where)
    for name in ("ranking", "score", "scores", "ratings"):
        if name in row:
            keep = f'keep "prompt" and one "response", or leave "{name}" out with ignore_columns'
            raise BadRow(where, f'field "{name}": judged replies are no SFT data; {keep}')
    if "edited" in row or "chosen" in row or "rejected" in row:
        feedback = _edit(row, where) if "edited" in row else _marked(_pair(row, where), row, where)
        if feedback.kind not in ("edit", "pair"):
            raise DroppedRow(UNSAFE)
        prompt, reply = feedback.prompt, {"role": "assistant", "content": feedback.responses[0]}
    else:
        is_kto = isinstance(row.get("label"), (bool, int, float)) or "kto_tag" in row
        if is_kto and _label(row, where).scores[0] < 0:
            raise DroppedRow("replies that were not liked")
        prompt, [reply] = _with_reply(row, where)
        if any(marks_of(row, where, 1)):
            raise DroppedRow(UNSAFE)
    if isinstance(prompt, str):
        return Conversation(prompt, reply["content"], where=where)
    messages = [*prompt, reply]
    if all(message.get("weight") == 0 for message in messages if message["role"] == "assistant"):
        raise DroppedRow("conversations without a turn to learn: all have weight 0")
    return Conversation(messages=messages, where=where)


# Columns that make a text one part of something: a turn of a tree, a labelled sample.
_PARTS = ("role", "parent_id", "message_id", "label", "rank")


def _check_plain(row: dict, where: str) -> None:
    """Raise BadRow where a column beside "text" says that the text is not the whole that is to be learnt."""
    context = [name for name in CONTEXT if not is_empty(row.get(name))]
    column = next((name for name in (*_PARTS, *context) if name in row), None)
    if column is not None:
        problem = f'field "text" beside "{column}" is no plain text (columns: {", ".join(row)})'
        raise BadRow(where, f"{problem}; make messages of it, or set format=text to learn each text as it is")


def parse_prompt(row: Any, where: str) -> Prompt:
    """The prompt in a row: a string, messages, or any record whose prompt can be told.

    Conversations (messages, turn lists) that end with a reply are cut behind their last human turn and say
    so in note. The other columns go to the reward functions. Raises BadRow, DroppedRow.
    """
    if isinstance(row, str):
        return Prompt(text_of(row, where, "prompt"), where=where)
    columns = row if isinstance(row, dict) else {}
    row = as_pair(_record(row, where), where, ties=True)
    _check_weights(row, where)
    used = frozenset(prompt_columns(row))
    rest = {key: value for key, value in columns.items() if key not in used}
    prompt = _whole_prompt(row, where)
    if prompt is None:
        raise missing(where, "prompt", row, "text or a list of messages")
    if _is_open(prompt):
        return Prompt(prompt, rest, where, used=used)
    if used == {"prompt"} and isinstance(row["prompt"][0], dict):
        raise BadRow(where, f'field "prompt" must end with a user message, its last role is {prompt[-1]["role"]!r}')
    if len(prompt) < 2 or not _is_open(asked(prompt)):
        raise BadRow(where, "the prompt has no human turn")
    return Prompt(asked(prompt), rest, where, CUT, used)


def _whole_prompt(row: dict, where: str) -> str | Messages | None:
    """The prompt of a row as the other stages read it; its replies may repeat it or add turns to it."""
    if "chosen" in row and "rejected" in row and (not prompt_columns(row) or _is_message(row["chosen"])):
        return pair_of(row, where).prompt
    name = _reply_column(row)
    if name is None or not {"chosen", "ranking", "scores"}.isdisjoint(row):  # its replies stand elsewhere
        return prompt_of(row, where)
    if _is_message(row[name]):
        reply = completion_of(row[name], where, name)
        if isinstance(reply, list):
            return asked(_conversation(row, where, name, reply))
    prompt = bare_prompt(row, where)
    return None if prompt is None else with_context(prompt, row, where)


def _is_message(value: Any) -> bool:
    """Whether a reply is written as messages or as a transcript of them, not as its text alone."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) or is_transcript(value)


_TO_SCORE = ("response", "responses", "completion")  # columns of a prompt's row that hold replies to it


def responses_of(prompt: Prompt) -> list[str]:
    """The replies beside a prompt: its response (completion), or each of its responses. UserError without them."""
    name = next((name for name in _TO_SCORE if prompt.columns.get(name) is not None), None)
    if name is None:
        raise missing(prompt.where, "response", prompt.columns, "the text to score, or a list of them in responses")
    value = prompt.columns[name]
    if name != "responses":
        return [_said(value, prompt.where, name)]
    if not isinstance(value, list) or not value:
        raise wrong(prompt.where, name, "a list of texts", value)
    return [_said(one, prompt.where, f"{name}[{i}]") for i, one in enumerate(value)]


def _said(value: Any, where: str, name: str) -> str:
    """A model may have said nothing at all: an empty reply is one too."""
    if isinstance(value, str):
        return text_of(value, where, name, empty=True)
    reply = completion_of(value, where, name)
    if not isinstance(reply, str):
        raise BadRow(where, f'field "{name}" must be one reply, found {len(reply)} messages')
    return reply
