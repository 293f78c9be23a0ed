"""One judgement: from what the page sends to a row of feedback, and back.

The page knows replies by their place on the screen, which is another one for each annotator, and nothing else of them.
A row holds them in the order of the item; `positions` says where each stood on the screen (0 is the first).
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

from fastrlhf.data.checks import BadRow, number_of, text_of
from fastrlhf.label.items import Item

LOWEST, HIGHEST = 1, 5
LONGEST_S = 86_400.0  # a day: no judgement takes longer
KINDS = ("score", "rank", "edit", "skip")
SAID = ("responses", "scores", "ranking", "response", "edited", "unsafe", "skipped")  # what a judgement consists of


class Refused(ValueError):
    """What the page asked for cannot be done, and nothing was changed. status: of HTTP."""

    def __init__(self, message: str, status: int = 422) -> None:
        super().__init__(message)
        self.status = status


def shown_order(annotator: str, item: Item) -> list[int]:
    """Indices of the item's replies in the order in which this annotator sees them, always the same."""
    order = list(range(len(item.replies)))
    random.Random(f"{annotator}\n{item.id}").shuffle(order)
    return order


def judgement_id(annotator: str, item: Item) -> str:
    return f"{annotator}:{item.id}"


def row_of(body: dict[str, Any], item: Item, annotator: str) -> dict[str, Any]:
    """The row of feedback that a judgement is. Raises Refused, naming what is wrong with it."""
    order = shown_order(annotator, item)
    kind = body.get("kind")
    if kind not in KINDS:
        raise Refused(f"kind must be one of {', '.join(KINDS)}, found {kind!r}")
    unsafe = _flags(body.get("unsafe", [False] * len(order)), len(order))
    if kind == "skip":
        said, judged = {"skipped": True}, list(range(len(order)))
    elif kind == "edit":
        return _edit(body.get("edit"), item, annotator, order, unsafe) | _about(body, item, annotator)
    elif kind == "score" or all(unsafe):
        scores = _scores(body.get("scores") if kind == "score" else None, unsafe)
        judged = [place for place, score in enumerate(scores) if score is not None]
        said = {"scores": [scores[place] for place in judged]}
    else:
        judged = list(range(len(order)))
        said = {"ranking": _ranking(body.get("ranking"), unsafe)}
    # From places on the screen to the order of the item.
    judged.sort(key=lambda place: order[place])
    of = {place: i for i, place in enumerate(judged)}
    if "scores" in said:
        said = {"scores": [scores[place] for place in judged]}
    if "ranking" in said:
        groups = [sorted(of[place] for place in group) for group in said["ranking"]]
        said = {"ranking": [group[0] if len(group) == 1 else group for group in groups]}
    if kind != "skip" and any(unsafe):
        said["unsafe"] = [unsafe[place] for place in judged]
    indices = [order[place] for place in judged]
    texts = {"responses": [item.replies[i].text for i in indices]}
    return {"prompt": item.prompt} | texts | said | _sources(item, indices, judged) | _about(body, item, annotator)


def _edit(value: Any, item: Item, annotator: str, order: list[int], unsafe: list[bool]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Refused("edit must be an object with reply and text")
    place = _place(value.get("reply"), len(order))
    try:
        text = text_of(value.get("text"), "edit", "text")
    except BadRow as error:
        raise Refused(str(error)) from error
    reply = item.replies[order[place]]
    if text == reply.text:
        raise Refused("the edited text is the reply as it was; change it, or skip")
    row = {"prompt": item.prompt, "response": reply.text, "edited": text}
    if any(unsafe):
        row["responses"] = [one.text for one in item.replies]
        row["unsafe"] = [unsafe[order.index(i)] for i in range(len(order))]
    about = _sources(item, [order[place]], [place])
    return row | {name: value[0] if isinstance(value, list) else value for name, value in about.items()}


def _scores(value: Any, unsafe: list[bool]) -> list[int | None]:
    """A score a place: the lowest for unsafe replies, None for those that have none."""
    scores = [None] * len(unsafe) if value is None else value
    if not isinstance(scores, list) or len(scores) > len(unsafe):
        raise Refused(_not_there(len(scores) - 1 if isinstance(scores, list) else scores, len(unsafe)))
    for score in scores:
        if score is not None and (isinstance(score, bool) or score not in range(LOWEST, HIGHEST + 1)):
            raise Refused(f"a score must be a whole number from {LOWEST} to {HIGHEST}, found {score!r}")
    scores = scores + [None] * (len(unsafe) - len(scores))
    scores = [LOWEST if mark else score for score, mark in zip(scores, unsafe)]
    if all(score is None for score in scores):
        raise Refused("no reply has a score; score one, or skip")
    return scores


def _ranking(value: Any, unsafe: list[bool]) -> list[list[int]]:
    """Groups of places, best first, the unsafe ones last."""
    groups = [group if isinstance(group, list) else [group] for group in value] if isinstance(value, list) else []
    places = [_place(place, len(unsafe)) for group in groups for place in group]
    if len(unsafe) < 2:
        raise Refused("one reply alone cannot be ranked; score it, or edit it")
    if len(set(places)) < len(places):
        raise Refused("a reply stands twice in the ranking")
    absent = [place for place in range(len(unsafe)) if place not in places and not unsafe[place]]
    if absent:
        raise Refused(f"reply {absent[0]} has no place in the ranking")
    safe = [[place for place in group if not unsafe[place]] for group in groups]
    return [group for group in [*safe, [place for place, mark in enumerate(unsafe) if mark]] if group]


def _place(value: Any, replies: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < replies:
        raise Refused(_not_there(value, replies))
    return value


def _not_there(value: Any, replies: int) -> str:
    return f"reply {value!r} is not there: this prompt has {replies}, numbered from 0"


def _flags(value: Any, replies: int) -> list[bool]:
    if not isinstance(value, list) or len(value) != replies or not all(isinstance(flag, bool) for flag in value):
        raise Refused(f"unsafe must be {replies} times true or false, one a reply")
    return value


def _sources(item: Item, indices: Sequence[int], places: Sequence[int]) -> dict[str, Any]:
    """What is known of the replies beside their texts. model, model_hash: one value where all have the same."""
    replies = [item.replies[i] for i in indices]
    known: dict[str, Any] = {}
    for name in ("model", "model_hash"):
        values = [getattr(reply, name) for reply in replies]
        if any(value is not None for value in values):
            known[name] = values[0] if len(set(values)) == 1 else values
    if all(reply.ids is not None for reply in replies):
        known["response_ids"] = [reply.ids for reply in replies]
    return known | {"positions": list(places)}


def _about(body: dict[str, Any], item: Item, annotator: str) -> dict[str, Any]:
    """Who judged, when and how long."""
    try:
        seconds = number_of(body.get("seconds", 0.0), "judgement", "seconds")
    except BadRow as error:
        raise Refused(str(error)) from error
    if not 0 <= seconds <= LONGEST_S:
        raise Refused(f"seconds must be between 0 and {LONGEST_S:.0f}, found {seconds:g}")
    about = {"annotator": annotator, "seconds": round(seconds, 1), "time": round(time.time(), 1)}
    return about | {"judgement_id": judgement_id(annotator, item)}


def undone_row(row: dict[str, Any]) -> dict[str, Any]:
    """The row that takes a judgement back."""
    about = {name: row[name] for name in ("annotator", "judgement_id")}
    return {"prompt": row["prompt"], "undone": True, "time": round(time.time(), 1), **about}


def same(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two rows are the same judgement, whenever they were given."""
    return all(row.get(name) == other.get(name) for name in SAID)


def as_shown(row: dict[str, Any], item: Item, annotator: str) -> dict[str, Any]:
    """A row as the page had sent it, for a judgement that is taken back in order to be changed."""
    order = shown_order(annotator, item)
    place_of = {item.replies[index].text: place for place, index in enumerate(order)}
    if row.get("skipped"):
        return {"kind": "skip"}
    responses = row.get("responses") or [row["response"]]
    places = [place_of[text] for text in responses]
    unsafe = [False] * len(order)
    for place, mark in zip(places, row.get("unsafe", [])):
        unsafe[place] = mark
    if "edited" in row:
        edit = {"reply": place_of[row["response"]], "text": row["edited"]}
        return {"kind": "edit", "edit": edit, "unsafe": unsafe}
    if "scores" in row:
        scores: list[int | None] = [None] * len(order)
        for place, score in zip(places, row["scores"]):
            scores[place] = score
        return {"kind": "score", "scores": scores, "unsafe": unsafe}
    groups = [group if isinstance(group, list) else [group] for group in row["ranking"]]
    return {"kind": "rank", "ranking": [sorted(places[i] for i in group) for group in groups], "unsafe": unsafe}
