"""What people judge: prompts, each with the replies to it, from a file such as `generate --output` writes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrlhf.config.errors import UserError
from fastrlhf.data.checks import BadRow, Messages, text_of
from fastrlhf.data.dataset import load_prompts
from fastrlhf.data.feedback import Prompt, responses_of

Say = Callable[[str], None]  # prints one line for people
_BLANK, _UNREADABLE, _REPEATED = "empty", "with characters that no feedback file may hold", "that repeat another one"


@dataclass(frozen=True)
class Candidate:
    """A reply that may be judged: its text, its token ids, and the folder and hash of the model that wrote it; None:
    not known."""

    text: str
    ids: list[int] | None = None
    model: str | None = None
    model_hash: str | None = None


@dataclass(frozen=True)
class Item:
    """A prompt and different replies to it. id: a hash of their texts."""

    id: str
    prompt: str | Messages
    replies: tuple[Candidate, ...]


def read_items(replies: str | Path, prompts: str | Path | None, say: Say) -> list[Item]:
    """The items of a file of replies, in the order of their first rows; `say` tells what was left out of it.

    prompts: what the replies must be replies to; None: whatever the file has. Raises UserError naming file, line and
    field for rows without a reply, for a reply to a prompt that is not among `prompts`, and where nothing is left.
    """
    rows = load_prompts(replies)[0]
    if prompts is not None:
        asked = {_text(row.prompt) for row in load_prompts(prompts)[0]}
        other = next((row for row in rows if _text(row.prompt) not in asked), None)
        if other is not None:
            problem = f"the reply is to a prompt that {prompts} does not have ({_text(other.prompt)[:60]})"
            remedy = "give the replies to these prompts, or leave PROMPTS out"
            raise UserError(f"--replies: {other.where}: {problem}; {remedy}")
        unanswered = len(asked) - len({_text(row.prompt) for row in rows})
        if unanswered:
            say(f"{unanswered} of {len(asked)} prompts have no reply in {replies} and are left out")
    return make_items(((row.prompt, candidates_of(row)) for row in rows), str(replies), say)


def make_items(rows: Iterable[tuple[str | Messages, list[Candidate]]], source: str, say: Say) -> list[Item]:
    """Items of prompts and their replies; rows of one prompt are one item. UserError where there is no reply."""
    prompts: dict[str, str | Messages] = {}
    replies: dict[str, dict[str, Candidate]] = {}
    left_out: Counter[str] = Counter()
    for prompt, candidates in rows:
        key = _text(prompt)
        prompts[key] = prompt
        known = replies.setdefault(key, {})
        for candidate in candidates:
            reason = unusable(candidate.text) or (_REPEATED if candidate.text in known else None)
            if reason is None:
                known[candidate.text] = candidate
            else:
                left_out[reason] += 1
    for reason, count in left_out.items():
        say(f"{count} replies {reason} are left out")
    items = [Item(_id(key, known), prompts[key], tuple(known.values())) for key, known in replies.items() if known]
    if not items:
        raise UserError(f"{source}: no reply that can be judged")
    if len(items) < len(replies):
        say(f"{len(replies) - len(items)} prompts without any reply are left out")
    return items


def candidates_of(row: Prompt) -> list[Candidate]:
    """The replies of a row, with what its other columns say of them."""
    texts = responses_of(row)
    ids = row.columns.get("response_ids")
    ids = ids if "responses" in row.columns and isinstance(ids, list) else [ids]
    ids = [one if _is_ids(one) else None for one in ids] if len(ids) == len(texts) else [None] * len(texts)
    model, model_hash = (row.columns.get(name) for name in ("model", "model_hash"))
    model, model_hash = (value if isinstance(value, str) else None for value in (model, model_hash))
    return [Candidate(text, one, model, model_hash) for text, one in zip(texts, ids)]


def user_text(prompt: str | Messages) -> str:
    """What a person said in a prompt, whose system message may be in another language."""
    return prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt if m["role"] == "user")


def _text(prompt: str | Messages) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False, sort_keys=True)


def _id(prompt: str, replies: Iterable[str]) -> str:
    return hashlib.sha256(json.dumps([prompt, sorted(replies)]).encode()).hexdigest()[:16]


def unusable(text: str) -> str | None:
    """Why a file of feedback could not hold a reply; None: it can."""
    if not text.strip():
        return _BLANK
    try:
        text_of(text, "", "response")
    except BadRow:
        return _UNREADABLE
    return None


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(token, int) for token in value)
