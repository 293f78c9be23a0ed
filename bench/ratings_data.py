"""Rated sentences as rows of feedback, and the prompts of `python -m bench.ratings`."""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fastrlhf.data.checks import BadRow, text_of
from fastrlhf.data.feedback import Feedback, parse_feedback
from fastrlhf.data.rows import read_rows

# DATA of docs/ratings.md: 8605 sentences about films, each rated by 15 to 29 people.
SCALE = (-4.0, 4.0)
SUBJECTS = (
    "a film",
    "a film you have seen",
    "a new film",
    "an old film",
    "a film that is on this week",
    "a film for a newspaper",
    "a film for a friend",
    "the last film you saw",
    "a film and its actors",
    "a film and its story",
)
OPENINGS = {
    "train": ("Write one sentence about", "Say something about", "Give me a sentence on", "Your opinion of",
              "A critic's sentence about", "In one line, judge"),
    "held out": ("In a single sentence, review", "Tell me what you think of"),
}  # fmt: skip
PROMPTS = {part: [f"{opening} {what}.\n" for opening in some for what in SUBJECTS] for part, some in OPENINGS.items()}


def read(data: Path, tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace) -> dict[str, list[dict]]:
    """The parts of the sentences: rows of feedback, each with one of the training prompts. No sentence is in two."""
    rows, seen = [], set[str]()
    draw_prompt = random.Random(f"prompts {options.seed}")
    for where, row in read_rows(data):
        if isinstance(row, BadRow):
            raise row
        if not isinstance(row, dict) or not {"sentence", "ratings"} <= row.keys():
            found = ", ".join(map(str, row)) if isinstance(row, dict) else "no object"
            raise BadRow(where, f'expected "sentence" and "ratings", found {found}')
        sentence = text_of(row["sentence"], where, "sentence")
        made = {"prompt": draw_prompt.choice(PROMPTS["train"]), "response": sentence, "ratings": row["ratings"]}
        parse_feedback(made, where, SCALE)
        if sentence not in seen and len(tokenizer(sentence)["input_ids"]) < options.max_tokens:  # one is the end
            seen.add(sentence)
            rows.append(made)
    random.Random(f"split {options.seed}").shuffle(rows)
    sizes = {name: getattr(options, name) for name in ("proxy", "gold", "test")}
    if sum(sizes.values()) > len(rows):
        asked = " + ".join(f"{size} {name}" for name, size in sizes.items())
        raise SystemExit(
            f"{data}: {len(rows)} different sentences below --max-tokens {options.max_tokens}, not {asked} "
            f"= {sum(sizes.values())}; ask for fewer, or for longer ones"
        )
    parts, first = {}, 0
    for name, size in sizes.items():
        parts[name] = rows[first : first + size]
        first += size
    return parts


def feedback(rows: Sequence[dict]) -> list[Feedback]:
    """The same, as the reward trainer reads them."""
    return [parse_feedback(row, f"row {n}", SCALE) for n, row in enumerate(rows, 1)]


def rating_of(score: float) -> float:
    """A score in [-1, 1] on people's scale."""
    low, high = SCALE
    return low + (score + 1) / 2 * (high - low)
