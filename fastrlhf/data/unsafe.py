"""Replies that people marked as unsafe: never chosen, and below every safe reply of their prompt.

A row says it in a column `unsafe`: true or false where it has one reply (`response`), else a list with an entry for
each of its replies (`responses`, or chosen and rejected). A mark holds for that reply wherever the source has it again,
whoever else judged it.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

from fastrlhf.data.feedback import Feedback

LOWERED = "with replies marked unsafe put last"
ADDED = "rankings added: safe replies above those marked unsafe"


def settle(items: list[Feedback], noted: Counter[str]) -> list[Feedback]:
    """All judgements of a source, with the marks that any of them makes applied to each.

    Where the judgements of a prompt leave a safe reply beside or below an unsafe one, a ranking of its known replies is
    added: the safe ones, tied, above the unsafe ones. What changed is counted in `noted`.
    """
    unsafe: dict[str, dict[str, None]] = {}
    for item in items:
        if item.unsafe:
            unsafe.setdefault(_key(item), {}).update(dict.fromkeys(item.unsafe))
    if not unsafe:
        return items
    settled, of_prompt = [], {key: [] for key in unsafe}
    for item in items:
        key = _key(item)
        after = item.lowered(unsafe.get(key, ()))
        noted[LOWERED] += after != item
        settled.append(after)
        if key in of_prompt:
            of_prompt[key].append(after)
    for key, judgements in of_prompt.items():
        ranking = _missing_order(judgements, unsafe[key])
        if ranking is not None:
            settled.append(ranking)
            noted[ADDED] += 1
    noted -= Counter()  # without the zeros
    return settled


def _key(item: Feedback) -> str:
    return json.dumps(item.prompt, sort_keys=True)


def _missing_order(judgements: list[Feedback], unsafe: dict[str, None]) -> Feedback | None:
    """Safe above unsafe, for one prompt; None where the judgements say so already."""
    known = dict.fromkeys(reply for item in judgements for reply in (*item.responses, *item.seen))
    safe, bad = [r for r in known if r not in unsafe], [r for r in known if r in unsafe]
    said = {(item.responses[i], item.responses[j]) for item in judgements for i, j in item.ordered_pairs()}
    if all((s, b) in said for s in safe for b in bad):
        return None
    ranking = (tuple(range(len(safe))), tuple(range(len(safe), len(known))))
    return replace(
        judgements[0], kind="ranking", responses=(*safe, *bad), ranking=ranking, scores=None, margin=None, seen=()
    )
