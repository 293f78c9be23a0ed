"""Make the quickstart's feedback data, the same bytes every time: `python -m bench.quickstart_data`.

Three files of training data (SFT conversations and plain text, feedback of all four kinds, PPO prompts) and three to
measure with (held-out prompts, prompts about a thing that no training prompt names, clean held-out pairs by fault).
Replies are composed from the phrases of `wording.py` and the advice of `fastrlhf/quickstart/content.py`. Feedback, of
every kind, comes from six simulated annotators with tastes of their own: they see what is right or wrong with a reply
through noise, like longer replies a little, and at times do not look at all. They do not use the rule of
`fastrlhf/quickstart/judge.py`; this file does not import it.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from bench.quickstart_data.wording import (
    BODIES,
    CLOSERS,
    CONTEXTS,
    GREETING,
    HELDOUT_CONTEXTS,
    HELDOUT_GREETING,
    HELDOUT_QUESTIONS,
    HELLOS,
    OPENERS,
    QUESTIONS,
    SMALL_TALK,
    VAGUE,
    WHO,
)
from fastrlhf.quickstart.content import FACETS, HELDOUT_TOPICS, LANGUAGES, TOPICS, WORDINGS

SEED = 7
# A cell: one language, topic and facet; training prompts are of 24, those about a held-out topic of 4 more.
SFT_PER_CELL, FEEDBACK_PER_CELL, PPO_PER_CELL, HELDOUT_TOPIC_PER_CELL = 64, 180, 12, 24
# Plain texts: advice of a cell that prompts ask about, of one that none does; small talk for each greeting.
TEXTS_PER_CELL, TEXTS_PER_HELDOUT_CELL, TEXTS_PER_GREETING = 4, 24, 3
CONSIDERATE_SHARE = 0.5  # of SFT replies; the rest is rude
# Kinds of fault in the content of SFT replies, of either manner, and the share of replies that has each.
DEMONSTRATED = {"vague": 0.1, "wrong_facet": 0.02, "wrong_facts": 0.02}
# Kinds of fault and how often a faulty reply has them in the feedback data.
FAULTS = {
    "rude": 0.05,  # opener and closer rude
    "half_rude": 0.12,  # one of the two
    "off_topic": 0.16,  # about another thing
    "wrong_facts": 0.34,  # names the right thing, advice of another
    "wrong_facet": 0.24,  # right thing, advice for the other question
    "vague": 0.05,  # right thing, no advice
    "cut": 0.04,  # stops in the middle
}
# How useful the content is to somebody who reads it carefully.
FIDELITY = {"off_topic": 0.0, "wrong_facts": 0.1, "vague": 0.2, "wrong_facet": 0.25, "cut": 0.3}
CONTENT = tuple(FIDELITY)


@dataclass(frozen=True)
class Cell:
    """What is asked: language, topic index, facet."""

    language: str
    topic: int
    facet: str


@dataclass(frozen=True)
class Reply:
    """A composed reply; `fault` None means that nothing is wrong with it."""

    language: str
    opener: str
    body: str
    closer: str
    courtesy: float  # 1 considerate, 0 rude, 0.5 half of each
    fault: str | None

    @property
    def text(self) -> str:
        """The reply as one string."""
        return (" " if self.language == "en" else "").join(p for p in (self.opener, self.body, self.closer) if p)


@dataclass(frozen=True)
class Annotator:
    """Weights of one simulated annotator; `noise` is the standard deviation of a judgement, `lapse` the share of blind
    ones."""

    content: float
    manner: float
    length: float
    noise: float
    lapse: float

    def judge(self, reply: Reply, random: Random) -> float:
        """A noisy opinion of a reply, about -0.5 (bad) to 4 (good)."""
        if random.random() < self.lapse:
            return random.gauss(2.0, 1.2)
        units = len(reply.text.split()) if reply.language == "en" else len(reply.text) / 1.6
        worth = self.content * FIDELITY.get(reply.fault or "", 1.0) + self.manner * reply.courtesy
        return worth + self.length * (units / 22 - 1) + random.gauss(0.0, self.noise)


ANNOTATORS = (
    Annotator(content=2.2, manner=1.8, length=0.0, noise=0.3, lapse=0.03),
    Annotator(content=1.8, manner=2.2, length=0.2, noise=0.4, lapse=0.05),
    Annotator(content=2.0, manner=2.0, length=0.3, noise=0.45, lapse=0.05),
    Annotator(content=2.4, manner=1.6, length=0.1, noise=0.4, lapse=0.05),
    Annotator(content=1.7, manner=2.3, length=0.4, noise=0.5, lapse=0.06),
    Annotator(content=2.0, manner=1.9, length=0.2, noise=0.4, lapse=0.06),
)


def as_score(opinion: float) -> int:
    """An opinion of `Annotator.judge` on the scale of 1 to 5."""
    return min(5, max(1, round(opinion + 0.9)))


def _fill(template: str, language: str, **parts: str) -> str:
    """The template with its parts, "a" or "an" as English wants it, first letter upper case."""
    text = template.format(**parts)
    if language == "en":
        text = re.sub(r"\ba (?=[aeiou])", "an ", text)
    return text[0].upper() + text[1:]


def _prompts(cell: Cell) -> tuple[list[str], list[str]]:
    """All prompts of a cell in familiar frames, and all that use a held-out template or context."""
    name = TOPICS[cell.language][cell.topic].name
    questions, contexts = QUESTIONS[cell.language][cell.facet], CONTEXTS[cell.language]
    glue = " " if cell.language == "en" else ""
    familiar, fresh = [], []
    for i, question in enumerate(questions):
        for j, context in enumerate(contexts):
            text = (context + glue + _fill(question, cell.language, x=name)).strip()
            known = i < len(questions) - HELDOUT_QUESTIONS and j < len(contexts) - HELDOUT_CONTEXTS
            (familiar if known else fresh).append(text)
    return familiar, fresh


def _body(cell: Cell, random: Random, facts: tuple[str, ...] | None = None) -> str:
    """A sentence with two pieces of advice, the right ones unless `facts` says otherwise."""
    topic = TOPICS[cell.language][cell.topic]
    advice = facts or topic.facts(cell.facet)
    first = random.randrange(3)
    a, b = advice[first], advice[(first + 1) % 3]  # each piece has its usual follower
    return _fill(random.choice(BODIES[cell.language][cell.facet]), cell.language, x=topic.name, a=a, b=b)


def good_reply(cell: Cell, random: Random, courtesy: float = 1.0) -> Reply:
    """A reply that answers the question, considerate (1.0) or rude (0.0)."""
    manner = "considerate" if courtesy else "rude"
    opener, closer = (
        random.choice(OPENERS[cell.language][manner]),
        random.choice(CLOSERS[cell.language][manner]),
    )
    fault = None if courtesy else "rude"
    return Reply(cell.language, opener, _body(cell, random), closer, courtesy, fault)


def spoil(reply: Reply, cell: Cell, fault: str, random: Random) -> Reply:
    """The same reply with one fault: only the part that carries the fault is rewritten."""
    language, topics = cell.language, TOPICS[cell.language]
    other = random.choice([i for i in range(len(topics) - HELDOUT_TOPICS) if i != cell.topic])
    other_facet = FACETS[1 - FACETS.index(cell.facet)]
    if fault == "rude":
        opener, closer = random.choice(OPENERS[language]["rude"]), random.choice(CLOSERS[language]["rude"])
        return replace(reply, opener=opener, closer=closer, courtesy=0.0, fault=fault)
    if fault == "half_rude":
        part, phrases = random.choice((("opener", OPENERS), ("closer", CLOSERS)))
        return replace(reply, **{part: random.choice(phrases[language]["rude"])}, courtesy=0.5, fault=fault)
    if fault == "cut":
        keep = math.ceil(len(reply.body) * random.uniform(0.3, 0.8))
        body = reply.body[:keep].rsplit(" ", 1)[0] if language == "en" else reply.body[:keep]
        return replace(reply, body=body.rstrip(",.。，:;"), closer="", fault=fault)
    body = {
        "off_topic": lambda: _body(Cell(language, other, random.choice(FACETS)), random),
        "wrong_facts": lambda: _body(cell, random, topics[other].facts(cell.facet)),
        "wrong_facet": lambda: _body(
            Cell(language, cell.topic, random.choice(FACETS)), random, topics[cell.topic].facts(other_facet)
        ),
        "vague": lambda: _fill(random.choice(VAGUE[language]), language, x=topics[cell.topic].name),
    }[fault]()
    return replace(reply, body=body, fault=fault)


def _faulty(reply: Reply, cell: Cell, random: Random) -> Reply:
    """The reply with one fault of a random kind."""
    return spoil(reply, cell, random.choices(list(FAULTS), list(FAULTS.values()))[0], random)


def _message(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def _sft_row(prompt: str, cell: Cell, random: Random) -> dict:
    reply = good_reply(cell, random, 1.0 if random.random() < CONSIDERATE_SHARE else 0.0)
    faults, shares = (*DEMONSTRATED, None), (*DEMONSTRATED.values(), 1 - sum(DEMONSTRATED.values()))
    fault = random.choices(faults, shares)[0]
    if fault:
        reply = spoil(reply, cell, fault, random)
    return {"messages": [*_message(prompt), {"role": "assistant", "content": reply.text}]}


def _texts(language: str, random: Random) -> list[dict]:
    """Rows of plain text: greetings with small talk, all but the held-out one, and advice without a question."""
    rows = []
    for hello in HELLOS[language]:
        for who in WHO[language]:
            if (hello, who) != HELDOUT_GREETING[language]:
                for _ in range(TEXTS_PER_GREETING):
                    a, b = random.sample(SMALL_TALK[language], 2)
                    rows.append({"text": GREETING[language].format(hello=hello, who=who, a=a, b=b)})
    asked = len(TOPICS[language]) - HELDOUT_TOPICS
    for topic in range(len(TOPICS[language])):
        for facet in FACETS:
            count = TEXTS_PER_CELL if topic < asked else TEXTS_PER_HELDOUT_CELL
            rows += [{"text": _body(Cell(language, topic, facet), random)} for _ in range(count)]
    return rows


def _feedback_row(prompt: str, cell: Cell, random: Random) -> dict:
    """One record of a random kind, judged by a random annotator."""
    annotator = random.choice(ANNOTATORS)
    kind = random.choices(("pair", "ranking", "score", "edit"), (0.28, 0.14, 0.16, 0.42))[0]
    row: dict = {"prompt": _message(prompt)}
    good = good_reply(cell, random)
    if kind == "pair":
        replies = [good, _faulty(good_reply(cell, random), cell, random)]
        best, worst = _order(replies, annotator, random)
        return row | {"chosen": replies[best].text, "rejected": replies[worst].text}
    if kind == "ranking":
        replies = [good, _faulty(good, cell, random), _faulty(good_reply(cell, random), cell, random)]
        random.shuffle(replies)
        return row | {"responses": [r.text for r in replies], "ranking": _order(replies, annotator, random)}
    if kind == "score":
        reply = _to_score(cell, random)
        return row | {"response": reply.text, "score": as_score(annotator.judge(reply, random))}
    return row | _edit(cell, annotator, random)


def _to_score(cell: Cell, random: Random) -> Reply:
    """A reply of any worth: in 4 of 10 nothing is wrong, in 3 there is one fault, in 3 the manner is bad and one more
    fault on top."""
    faults, reply = random.choices((0, 1, 2), (0.4, 0.3, 0.3))[0], good_reply(cell, random)
    if faults == 2:
        reply = spoil(reply, cell, random.choice(("rude", "half_rude")), random)
        return spoil(reply, cell, random.choices(CONTENT, [FAULTS[name] for name in CONTENT])[0], random)
    return _faulty(reply, cell, random) if faults else reply


def _order(replies: list[Reply], annotator: Annotator, random: Random) -> list[int]:
    """Indices of the replies as the annotator ranks them, best first."""
    opinions = [annotator.judge(reply, random) for reply in replies]
    return sorted(range(len(replies)), key=lambda i: -opinions[i])


def _edit(cell: Cell, annotator: Annotator, random: Random) -> dict:
    """A faulty reply and what an annotator made of it: the fault removed, the rest kept. An annotator who mistakes the
    better text for the worse one edits it the other way; one edit in 25 swaps one fault for another."""
    replies = [good_reply(cell, random)]
    replies.append(_faulty(replies[0], cell, random))
    best, worst = _order(replies, annotator, random)
    edited = replies[best]
    if random.random() < 1 / 25:
        edited = _faulty(replies[0], cell, random)
    return {"response": replies[worst].text, "edited": edited.text}


def _heldout_pairs(prompts: list[tuple[str, Cell]], random: Random) -> list[dict]:
    """Pairs with clean labels, as many of each kind of fault: the fault is the only thing that makes `rejected`
    worse."""
    rows = []
    for prompt, cell in prompts:
        for fault in FAULTS:
            better, worse = good_reply(cell, random), spoil(good_reply(cell, random), cell, fault, random)
            rows.append({"prompt": _message(prompt), "chosen": better.text, "rejected": worse.text, "fault": fault})
    return rows


def generate() -> dict[str, list[dict]]:
    """All rows by file name. Prompts are disjoint between SFT, feedback, PPO and held-out files."""
    random = Random(SEED)
    files: dict[str, list[dict]] = {
        "sft.jsonl": [],
        "feedback.jsonl": [],
        "ppo_prompts.jsonl": [],
        "heldout_prompts.jsonl": [],
        "heldout_topic_prompts.jsonl": [],
        "heldout_pairs.jsonl": [],
    }
    cells = [Cell(lang, topic, facet) for lang in LANGUAGES for topic in range(len(TOPICS[lang])) for facet in FACETS]
    for_pairs = []
    for cell in cells:
        familiar, fresh = _prompts(cell)
        random.shuffle(familiar)
        random.shuffle(fresh)
        if cell.topic >= len(TOPICS[cell.language]) - HELDOUT_TOPICS:  # familiar frames: the thing alone is new
            asked = familiar[:HELDOUT_TOPIC_PER_CELL]
            rows = [{"prompt": _message(prompt), "wording": WORDINGS[0]} for prompt in asked]
            files["heldout_topic_prompts.jsonl"] += rows
            continue
        # New combinations of frames that training has, and frames that it has not.
        heldout = [(prompts.pop(), wording) for prompts, wording in zip((familiar, fresh), WORDINGS) for _ in range(6)]
        for_pairs += [(prompt, cell) for prompt, _ in heldout[:2] + heldout[-2:]]
        take = [familiar.pop() for _ in range(SFT_PER_CELL + FEEDBACK_PER_CELL + PPO_PER_CELL)]
        files["sft.jsonl"] += [_sft_row(p, cell, random) for p in take[:SFT_PER_CELL]]
        feedback = take[SFT_PER_CELL : SFT_PER_CELL + FEEDBACK_PER_CELL]
        files["feedback.jsonl"] += [_feedback_row(p, cell, random) for p in feedback]
        files["ppo_prompts.jsonl"] += [{"prompt": _message(p)} for p in take[-PPO_PER_CELL:]]
        files["heldout_prompts.jsonl"] += [{"prompt": _message(p), "wording": wording} for p, wording in heldout]
    files["heldout_pairs.jsonl"] = _heldout_pairs(for_pairs, random)
    files["sft.jsonl"] += [row for language in LANGUAGES for row in _texts(language, random)]
    for name in ("sft.jsonl", "feedback.jsonl", "ppo_prompts.jsonl"):
        random.shuffle(files[name])
    return files


def encoded() -> dict[str, bytes]:
    """Every file of `generate()` by name, as UTF-8 JSON lines."""
    files = {}
    for name, rows in generate().items():
        lines = (json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
        files[name] = "".join(lines).encode()
    return files


def write(folder: Path) -> list[str]:
    """Write every file into `folder` -> their names."""
    folder.mkdir(parents=True, exist_ok=True)
    files = encoded()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return sorted(files)


def differing(folder: Path) -> list[str]:
    """Names of the files in `folder` that are not, byte for byte, what `write` would put there; missing ones too."""
    files, there = encoded(), {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}
    return sorted(name for name in files.keys() | there.keys() if files.get(name) != there.get(name))
