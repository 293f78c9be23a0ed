"""The figures of a summary, against values worked out by hand and a second definition of alpha."""

from __future__ import annotations

import json
from collections import Counter
from itertools import permutations

import pytest

from fastrlhf.config.errors import UserError
from fastrlhf.config.language import Words
from fastrlhf.label.summary import CHINESE, lines, read_judgements, summarize

TEXTS = ["short", "a longer one", "the longest of the three"]


def row(annotator="ann", prompt="p", **said):
    about = {"annotator": annotator, "seconds": 2.0, "judgement_id": f"{annotator}:{prompt}", "positions": [2, 0, 1]}
    return {"prompt": prompt, "responses": TEXTS, **about, **said}


def alpha(units: list[list[float]]) -> float:
    """Krippendorff (2011): 1 - D_observed / D_expected, ordinal distance, straight from the formulas."""
    units = [unit for unit in units if len(unit) > 1]
    values = Counter(value for unit in units for value in unit)
    order, n = sorted(values), sum(values.values())

    def distance(a, b):
        low, high = sorted((order.index(a), order.index(b)))
        between = sum(values[value] for value in order[low : high + 1])
        return (between - (values[a] + values[b]) / 2) ** 2

    observed = sum(distance(a, b) / (len(unit) - 1) for unit in units for a, b in permutations(unit, 2)) / n
    everything = [value for unit in units for value in unit]
    expected = sum(distance(a, b) for a, b in permutations(everything, 2)) / (n * (n - 1))
    return 1 - observed / expected


def test_counts_times_and_people():
    rows = [
        row(scores=[1, 2, 3], seconds=2, unsafe=[True, False, False]),
        row("bo", ranking=[0, [1, 2]], seconds=4),
        row("bo", "q", skipped=True, seconds=1),
        row("bo", "r", response="a", edited="b", seconds=12),
        row("cy", ranking=[0, 1, 2], seconds=99),
        row("cy", undone=True),
    ]
    figures = summarize(rows)
    counts = {name: figures[name] for name in ("judgements", "skipped", "taken_back", "unsafe", "prompts", "seconds")}
    assert counts == {"judgements": 3, "skipped": 1, "taken_back": 1, "unsafe": 1, "prompts": 2, "seconds": 4.0}
    assert figures["kinds"] == {"score": 1, "rank": 1, "edit": 1}
    people = [("ann", 1, 2.0), ("bo", 2, 4.0)]
    assert [(one["name"], one["judgements"], one["seconds"]) for one in figures["annotators"]] == people


def test_a_later_row_of_a_judgement_replaces_the_earlier():
    figures = summarize([row(scores=[1, 1, 5]), row(undone=True), row(ranking=[2, 1, 0])])
    assert (figures["judgements"], figures["kinds"], figures["taken_back"]) == (1, {"rank": 1}, 1)


def test_alpha_of_scores_is_the_formula():
    given = {"p": ([1, 2, 3], [1, 3, 3]), "q": ([5, 4, 4], [4, 4, 2]), "r": ([2, 2, 5], [2, 1, 5])}
    rows = [row(name, prompt, scores=s) for prompt, both in given.items() for name, s in zip(("ann", "bo"), both)]
    rows.append(row("ann", "alone", scores=[1, 1, 1]))  # one person: no agreement to speak of
    units = [list(pair) for both in given.values() for pair in zip(*both)]
    assert summarize(rows)["alpha_scores"] == pytest.approx(alpha(units), abs=1e-4)
    assert 0.5 < alpha(units) < 0.9


def test_alpha_of_preferences_is_the_formula_whichever_way_round_a_pair_is():
    # ann: 0 > 1 > 2; bo: 1 > 0 > 2; pairs (0,1): opposite, (0,2) and (1,2): the same
    rows = [row("ann", ranking=[0, 1, 2]), row("bo", scores=[4, 5, 1])]
    units = [[1, -1], [-1, 1], [1, 1], [-1, -1], [1, 1], [-1, -1]]
    assert summarize(rows)["alpha_preferences"] == pytest.approx(alpha(units), abs=1e-4)
    turned = [row("ann", responses=TEXTS[::-1], ranking=[2, 1, 0]), row("bo", scores=[4, 5, 1])]
    assert summarize(turned)["alpha_preferences"] == summarize(rows)["alpha_preferences"]


def test_full_agreement_is_one_and_one_person_has_none():
    rows = [row(name, ranking=[2, 0, 1]) for name in ("ann", "bo", "cy")]
    assert summarize(rows)["alpha_preferences"] == 1.0 and summarize(rows)["alpha_scores"] is None
    alone = summarize(rows[:1])
    assert alone["alpha_preferences"] is None and alone["disagreements"] == []


def test_an_unsafe_reply_is_below_one_with_the_lowest_score():
    rows = [row("ann", scores=[1, 1, 1], unsafe=[True, False, False]), row("bo", ranking=[0, 1, 2])]
    assert summarize(rows)["disagreements"] == [{"prompt": "p", "opposite": 2, "pairs": 3}]


def test_where_the_best_reply_stood_and_how_long_it_was():
    rows = [
        row("ann", ranking=[0, 1, 2]),  # best: TEXTS[0], which stood at place 2 of the screen
        row("bo", "q", ranking=[[0, 1], 2]),  # shared: places 2 and 0
        row("cy", "r", scores=[1, 2, 5]),  # TEXTS[2] at place 1
        row("di", "s", scores=[3, 3, 3]),  # none is best
    ]
    figures = summarize(rows)
    assert figures["places"] == [
        {"place": 1, "best": 0.5, "by_chance": 1.0},
        {"place": 2, "best": 1.0, "by_chance": 1.0},
        {"place": 3, "best": 1.5, "by_chance": 1.0},
    ]
    # ann 0 of 3; bo: (0,2) and (1,2) shorter ones: 0 of 2; cy 3 of 3; di: ties count for nothing
    assert figures["longer"] == {"preferred": 3, "pairs": 8}


def test_prompts_on_which_people_disagree_come_first():
    rows = [row("ann", "calm", ranking=[0, 1, 2]), row("bo", "calm", ranking=[0, 2, 1])]
    rows += [row("ann", "fierce", ranking=[0, 1, 2]), row("bo", "fierce", ranking=[2, 1, 0])]
    rows += [row("ann", "same", ranking=[0, 1, 2]), row("bo", "same", ranking=[0, [1, 2]])]
    expected = [{"prompt": "fierce", "opposite": 3, "pairs": 3}, {"prompt": "calm", "opposite": 1, "pairs": 3}]
    assert summarize(rows)["disagreements"] == expected


def test_the_lines_cannot_steer_a_terminal(tmp_path):
    path = tmp_path / "f.jsonl"
    nasty = "\x1b]0;x\x07\u202eevil\nsecond line"
    rows = [row("ann", nasty, ranking=[0, 1, 2]), row("bo", nasty, ranking=[1, 0, 2])]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    text = lines(summarize(read_judgements(str(path))), Words("en", CHINESE))
    assert text[0] == "2 judgements (2 rank) of 1 prompts; 0 skipped, 0 taken back, 0 replies marked unsafe"
    assert text[-1] == "  1 of 3: evil ⏎ second line"


def test_a_file_without_judgements_is_refused(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="holds no judgement of fastrlhf label"):
        read_judgements(str(path))
    path.write_text("{\n", encoding="utf-8")
    with pytest.raises(UserError, match="f.jsonl:1"):
        read_judgements(str(path))
