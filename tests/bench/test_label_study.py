"""Simulated people judge through the real workbench, and docs/label.md says what their judgements changed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from bench.label_study import CROWDS, agreement, fault_table, table
from bench.quickstart_data.generate import FAULTS, Cell, good_reply, spoil
from bench.quickstart_data.people import PEOPLE, judge_all, mended, read
from fastrlhf.data.dataset import load_feedback
from fastrlhf.label.items import Candidate, make_items
from fastrlhf.label.workbench import Workbench
from fastrlhf.quickstart.content import FACETS, shipped
from fastrlhf.quickstart.judge import Question, parse_prompt, rule

ROOT = Path(__file__).parents[2]
CELLS = [Cell(language, topic, facet) for language in ("en", "zh") for topic in range(6) for facet in FACETS]


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_people_find_the_fault_of_a_reply_in_its_text(fault):
    random = Random(1)
    for cell in CELLS:
        good = good_reply(cell, random)
        reply = spoil(good, cell, fault, random) if fault else good
        seen = read(reply.text, cell)
        assert seen.courtesy == reply.courtesy and seen.text == reply.text
        # One that was cut before it named the thing is about nothing.
        expected = {None, "off_topic", "cut"} if fault == "cut" else {None if "rude" in str(fault) else fault}
        assert seen.fault in expected and (fault != "cut" or seen.fault is not None)


def test_an_edit_keeps_the_rule_and_what_was_good():
    random, question = Random(2), {}
    for row in shipped("ppo_prompts"):
        asked: Question = parse_prompt(row["prompt"][0]["content"])
        question[Cell(*asked)] = row["prompt"][0]["content"]
    for cell in CELLS:
        for fault in FAULTS:
            spoilt = spoil(good_reply(cell, random), cell, fault, random)
            seen = read(spoilt.text, cell)
            better = mended(seen, cell, random)
            assert rule(question[cell], better.text) and not rule(question[cell], spoilt.text) or fault == "cut"
            if fault == "half_rude":
                assert better.body == spoilt.body and {better.opener, better.closer} & {spoilt.opener, spoilt.closer}


def judged(folder: Path, crowd: str) -> Path:
    random, rows = Random(3), []
    for row in shipped("ppo_prompts")[:120]:
        cell = Cell(*parse_prompt(row["prompt"][0]["content"]))
        replies = [good_reply(cell, random, float(random.random() < 0.5)) for _ in range(4)]
        rows.append((row["prompt"], [Candidate(reply.text) for reply in replies]))
    output = folder / f"{crowd}.jsonl"
    bench = Workbench(make_items(rows, "replies", print), list(PEOPLE), output, print)
    judge_all(bench, CROWDS[crowd], random, 120)
    with pytest.raises(ValueError, match="only 0 prompts for 1 judgements"):
        judge_all(bench, CROWDS[crowd], random, 1)
    bench.close()
    return output


def test_people_agree_with_the_rule_more_often_than_not_and_the_blind_do_not(tmp_path):
    given = load_feedback(judged(tmp_path, "people"))[0]
    kinds = Counter(one.kind for one in given)
    assert min(kinds[kind] for kind in ("score", "ranking", "edit")) >= 10
    assert 0.75 < agreement(given) < 0.92
    blind = load_feedback(judged(tmp_path, "blind"))[0]
    assert 0.4 < agreement(blind) < 0.6 and all(one.kind != "edit" for one in blind)


@pytest.mark.parametrize("name", ["docs/label.md", "docs/zh/label.md"])
def test_the_guide_says_in_both_languages_what_was_measured(name):
    page = (ROOT / name).read_text(encoding="utf-8")
    rows = json.loads((ROOT / "bench/results/label_study.json").read_text())["runs"]
    assert table(rows) in page and fault_table(rows) in page
    seeds = sorted({row["seed"] for row in rows})
    assert f"bench.label_study --seeds {' '.join(map(str, seeds))} --judgements 150" in page
