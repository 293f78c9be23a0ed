"""What is measured of a model's replies: refusals, keywords, scripts, repetition, length, rewards."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastrlhf.data.checks import Messages
from fastrlhf.data.feedback import Prompt
from fastrlhf.eval.phrases import keywords_in, refusal_in
from fastrlhf.eval.scripts import NONE, script_of
from fastrlhf.eval.statistics import estimate
from fastrlhf.inference import Reply
from fastrlhf.rl.evaluation import quantile
from fastrlhf.runtime.metrics import distinct, mean, ngrams

PERCENTILES = (5, 25, 50, 75, 95)
REPEATED = 4  # units of an n-gram that a reply repeats


@dataclass(frozen=True)
class Judged:
    """A reply and what was found in it. refusal: the words that a pattern found; script: see scripts.py; same_script:
    as its prompt has it, None where one of them has no letters; repeated: share of its 4-grams that stood there before,
    None where it has none; score: None without a reward, and where that cannot judge it."""

    text: str
    tokens: int
    finished: bool
    refusal: str | None
    keywords: list[str]
    script: str
    same_script: bool | None
    repeated: float | None
    score: float | None


def judge(
    prompts: Sequence[Prompt],
    replies: Sequence[Sequence[Reply]],
    scores: Sequence[float | None] | None,
    refusals: Sequence[re.Pattern[str]],
    keywords: dict[str, re.Pattern[str]],
) -> list[Judged]:
    """What is found in the replies to each prompt, prompt-major. scores: of all replies, None without a reward."""
    found: list[Judged] = []
    for prompt, group in zip(prompts, replies, strict=True):
        asked = script_of(last_turn(prompt.prompt))
        for reply in group:
            script = script_of(reply.text)
            grams = ngrams(reply.text, REPEATED)
            found.append(
                Judged(
                    text=reply.text,
                    tokens=len(reply.ids),
                    finished=reply.finished,
                    refusal=refusal_in(reply.text, refusals),
                    keywords=keywords_in(reply.text, keywords),
                    script=script,
                    same_script=None if NONE in (asked, script) else asked == script,
                    repeated=1 - len(set(grams)) / len(grams) if grams else None,
                    score=None if scores is None else scores[len(found)],
                )
            )
    return found


def figures_of(replies: Sequence[Judged], samples: int, keywords: Sequence[str], *, scored: bool) -> dict[str, Any]:
    """The figures of a model, as they stand in the JSON; shares are of all replies where nothing else is said."""

    def share(test: Any) -> dict[str, float | None]:
        known = [test(reply) for reply in replies]
        return estimate([None if value is None else float(value) for value in known], samples)

    texts = [reply.text for reply in replies]
    scripts = Counter(reply.script for reply in replies)
    figures: dict[str, Any] = {
        "replies": len(replies),
        "refusals": share(lambda reply: reply.refusal is not None),
        "scripts": {name: count / len(replies) for name, count in scripts.most_common()},
        "same_script_as_prompt": share(lambda reply: reply.same_script),
        "empty": share(lambda reply: not reply.text.strip()),
        "cut_off": share(lambda reply: not reply.finished),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "repeated_4grams": share(lambda reply: reply.repeated),
        "length": _spread([float(reply.tokens) for reply in replies]),
    }
    if keywords:
        each = {word: share(lambda reply, word=word: word in reply.keywords) for word in keywords}
        figures["keywords"] = {"any": share(lambda reply: bool(reply.keywords)), "each": each}
    if scored:
        known = [reply.score for reply in replies if reply.score is not None]
        spread = _spread(known) if known else {}
        figures["reward"] = spread | share(lambda reply: reply.score) | {"unscored": len(replies) - len(known)}
    return figures


def last_turn(prompt: str | Messages) -> str:
    """What is answered: the last message, or the text itself."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _spread(values: Sequence[float]) -> dict[str, float]:
    """The mean, the percentiles and the extremes."""
    percentiles = {f"p{p}": quantile(values, p / 100) for p in PERCENTILES}
    return {"mean": mean(values), "min": min(values), **percentiles, "max": max(values)}
