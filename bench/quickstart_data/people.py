"""Simulated people at the label page, in the quickstart's world: they read a model's replies and say what they think.

A person sees a reply as text. What opens it, what closes it and what it advises is read with the generator's own
phrases and facts (`wording.py`, `content.py`), then judged by one of the six annotators of `generate.py`, each with
tastes of their own, with more noise, at times without looking. The hidden rule of `fastrlhf/quickstart/judge.py`
judges no reply here; of that file only the reading of a prompt is used.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

from bench.quickstart_data.generate import (
    ANNOTATORS,
    FAULTS,
    Annotator,
    Cell,
    Reply,
    as_score,
    good_reply,
    spoil,
)
from bench.quickstart_data.wording import CLOSERS, OPENERS
from fastrlhf.label.workbench import Workbench
from fastrlhf.quickstart.content import FACETS, TOPICS
from fastrlhf.quickstart.judge import parse_prompt

# Noisier than those who made the shipped feedback: they prefer the reply that keeps the rule in about 5 of 6 pairs,
# so that two of them would agree on 7 in 10, as people do (Ouyang et al. 2022: 73%).
PEOPLE = {
    f"person {i}": replace(annotator, noise=3 * annotator.noise, lapse=0.1) for i, annotator in enumerate(ANNOTATORS, 1)
}
KINDS = {"score": 0.35, "rank": 0.4, "edit": 0.25}
TIE = 0.25  # opinions nearer than this are a tie
SLIP = 1 / 25  # of the edits put another fault in, as in the shipped feedback
_END = re.compile(r"[.!?。！？]$")


def read(text: str, cell: Cell) -> Reply:
    """What a careful reader finds in a reply to a question: its parts, its manner, the worst fault of its content."""
    body, found = text.strip(), {}
    for name, phrases, cut in (("opener", OPENERS, str.removeprefix), ("closer", CLOSERS, str.removesuffix)):
        known = [(phrase, manner) for manner, some in phrases[cell.language].items() for phrase in some]
        fits = [(phrase, manner) for phrase, manner in known if cut(body, phrase) != body]
        phrase, manner = max(fits, default=("", ""), key=lambda one: len(one[0]))
        found[name] = (phrase, manner)
        body = cut(body, phrase).strip()
    manners = [manner for _, manner in found.values() if manner]
    courtesy = manners.count("considerate") / len(manners) if manners else 0.5
    (opener, _), (closer, _) = found.values()
    return Reply(cell.language, opener, body, closer, courtesy, _fault(text.strip(), body, cell))


def _fault(text: str, body: str, cell: Cell) -> str | None:
    topics, said = TOPICS[cell.language], body.lower()
    named = {i for i, topic in enumerate(topics) if topic.name in said}
    stated = {(i, facet) for i, t in enumerate(topics) for facet in FACETS for fact in t.facts(facet) if fact in said}
    if named != {cell.topic}:
        return "off_topic"
    if any(topic != cell.topic for topic, _ in stated):
        return "wrong_facts"
    if any(facet != cell.facet for _, facet in stated):
        return "wrong_facet"
    if not _END.search(text):
        return "cut"
    return None if stated else "vague"


def mended(reply: Reply, cell: Cell, random: Random) -> Reply:
    """The reply with its faults removed and the rest kept."""
    good, language = good_reply(cell, random), cell.language
    opener = reply.opener if reply.opener in OPENERS[language]["considerate"] else good.opener
    closer = reply.closer if reply.closer in CLOSERS[language]["considerate"] else good.closer
    return replace(good, opener=opener, body=good.body if reply.fault else reply.body, closer=closer)


def judgement(screen: dict[str, Any], annotator: Annotator, random: Random) -> dict[str, Any]:
    """What a person sends who has this on the page: scores, a ranking with ties, or an edit of the reply that they like
    best of those that can be mended; scores where there is none."""
    cell = Cell(*parse_prompt(screen["turns"][-1]["content"]))
    replies = [read(text, cell) for text in screen["replies"]]
    opinions = [annotator.judge(reply, random) for reply in replies]
    kind = random.choices(list(KINDS), list(KINDS.values()))[0]
    said: dict[str, Any] = {"item": screen["id"], "kind": kind}
    better = [mended(reply, cell, random) for reply in replies]
    faulty = [i for i, reply in enumerate(better) if reply.text != screen["replies"][i]]
    if kind == "edit" and faulty and random.random() >= annotator.lapse:  # who does not look mends nothing
        place = max(faulty, key=opinions.__getitem__)
        fault = random.choices(list(FAULTS), list(FAULTS.values()))[0]
        reply = spoil(better[place], cell, fault, random) if random.random() < SLIP else better[place]
        if reply.text != screen["replies"][place]:
            return said | {"edit": {"reply": place, "text": reply.text}}
    if kind == "rank" and len(replies) > 1:
        return said | {"ranking": _with_ties(opinions)}
    return said | {"kind": "score", "scores": [as_score(opinion) for opinion in opinions]}


def _with_ties(opinions: Sequence[float]) -> list[list[int]]:
    """Groups of places, best first."""
    groups: list[list[int]] = []
    for place in sorted(range(len(opinions)), key=lambda i: -opinions[i]):
        if groups and opinions[groups[-1][-1]] - opinions[place] < TIE:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def judge_all(bench: Workbench, people: dict[str, Annotator], random: Random, count: int) -> None:
    """The people, in turns, judge what the workbench shows them, `count` times together. ValueError where it runs out
    of prompts before."""
    names = list(people)
    for i in range(count):
        name = names[i % len(names)]
        item = bench.screen(name)["item"]
        if item is None:
            raise ValueError(f"only {i} prompts for {count} judgements")
        bench.judge(name, judgement(item, people[name], random))
