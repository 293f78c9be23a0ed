"""The table "Published data sets" of docs/data.md: what rows of each become in every stage."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from fastrlhf.config.errors import UserError
from fastrlhf.data.checks import Messages
from fastrlhf.data.dataset import load_conversations, load_feedback, load_prompts
from fastrlhf.data.encode import encode_example
from fastrlhf.data.prompt_format import decide
from fastrlhf.data.rows import read_rows
from fastrlhf.data.templates import encode_prompt
from tests import tiny

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared" / "faults" / "rows"
LOADERS = {"sft": load_conversations, "reward": load_feedback, "ppo": load_prompts}
# Of the made-up rows in forms.jsonl: what a good reply is, and what a bad one.
GOOD = {"By scent and by colour.", "用八十度的水泡两分钟。", "Bees are back."}
BAD = {"They guess.", "用冷油泡。", "Hives are boxes."}


class Line(NamedTuple):
    """A line of the table: the rows, the settings they are read with, and what becomes of them, stage -> outcome."""

    form: str
    columns: dict[str, str] | None
    score_range: tuple[float, float]
    outcomes: dict[str, str]


def lines() -> Iterator[Line]:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    table = text.partition("| rows of | `columns` | sft | reward | ppo |\n")[2].partition("\n\n")[0]
    for line in table.splitlines()[1:]:
        form, settings, *outcomes = (cell.strip() for cell in line.strip().strip("|").split("|"))
        columns = re.search(r"`(\{.*?\})`", settings)
        scale = re.search(r"`score_range: ([\d.]+),([\d.]+)`", settings)
        yield Line(
            form.strip("`"),
            yaml.safe_load(columns[1]) if columns else None,
            tuple(map(float, scale.groups())) if scale else (1.0, 5.0),
            dict(zip(LOADERS, outcomes, strict=True)),
        )


LINES = list(lines())
IDS = [f"{line.form} {' '.join(line.columns or ())}".strip() for line in LINES]


@cache
def made_up() -> dict[str, list[Any]]:
    rows: dict[str, list[Any]] = {}
    for _, row in read_rows(Path(__file__).parent / "forms.jsonl"):
        rows.setdefault(row["form"], []).append(row["row"])
    return rows


@cache
def chat_tokenizer():
    tokenizer = tiny.tokenizer()
    decide(tokenizer, "auto", has_template=True)
    return tokenizer


def read(stage: str, row: Any, line: Line) -> tuple[str, Any]:
    """(what became of a row, the record or None), in the words of the table."""
    how = {"score_range": line.score_range} if stage == "reward" else {}
    try:
        [item], _ = LOADERS[stage]([row], columns=line.columns, **how)
    except UserError as error:
        if "dropped: 1" in str(error):
            return "dropped", None
        field = re.match(r'row 1: field "(\w+)"', str(error))
        return f"no: {field[1]}" if field else str(error), None
    if stage == "sft" and item.text is not None:
        return "plain text", item
    if stage == "sft":
        return "messages" if item.messages else "text", item
    form = "text" if isinstance(item.prompt, str) else "messages"
    return f"{item.kind}, {form}" if stage == "reward" else form, item


def check(row: Any, line: Line) -> dict[str, Any]:
    """The records of a row, once each is what the table says and all have the same prompt, in text and in tokens."""
    results = {stage: read(stage, row, line) for stage in LOADERS}
    assert {stage: outcome for stage, (outcome, _) in results.items()} == line.outcomes
    items = {stage: item for stage, (_, item) in results.items() if item is not None}
    prompts: list[str | Messages] = [item.prompt for stage, item in items.items() if stage != "sft"]
    if "sft" in items and items["sft"].text is None:
        sft = items["sft"]
        prompts.append(sft.prompt if sft.messages is None else sft.messages[:-1])
        ids = encode_prompt(chat_tokenizer(), prompts[-1])
        assert encode_example(chat_tokenizer(), sft).ids[: len(ids)] == ids
    assert len({json.dumps(prompt) for prompt in prompts}) <= 1
    return items


def test_the_table_has_every_form_and_only_forms_that_are_tried():
    assert {line.form for line in LINES} == set(made_up()) and len(made_up()) >= 64
    assert len(set(IDS)) == len(IDS)


@pytest.mark.parametrize("line", LINES, ids=IDS)
def test_made_up_rows_of_a_form_become_what_the_table_says(line):
    for row in made_up()[line.form]:
        items = check(row, line)
        if line.outcomes["reward"].startswith("pair"):
            better, worse = (reply.strip() for reply in items["reward"].responses)
            assert better in GOOD and worse in BAD
            sft = items["sft"]
            assert (sft.response or sft.messages[-1]["content"]) == items["reward"].responses[0]


@pytest.mark.parametrize("line", [line for line in LINES if line.columns], ids=lambda line: line.form)
def test_a_form_that_needs_columns_says_so_without_them(line):
    [row, *_] = made_up()[line.form]
    refusals = []
    for load in LOADERS.values():
        try:
            load([row])
        except UserError as error:
            refusals.append(str(error))
    assert refusals
    for refusal in refusals:
        assert re.search(r"columns=\{\w+: NAME\} reads it from another column", refusal)
        assert all(name in refusal for name in row if row[name] is not None) and "did you mean" not in refusal


@pytest.mark.real
@pytest.mark.skipif(not REAL.is_dir(), reason="../shared is not there")
def test_rows_of_the_public_schemas_become_what_the_table_says():
    files = {file.stem: file for file in REAL.glob("*.jsonl")}
    assert len(files) == 51 and files.keys() <= {line.form for line in LINES}
    tried = 0
    for line in LINES:
        for _, row in read_rows(files[line.form]) if line.form in files else ():
            check(row, line)
            tried += 1
    assert tried >= 153
