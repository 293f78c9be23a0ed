"""Replies marked unsafe are below every safe reply of their prompt; a later row of a judgement replaces it."""

from __future__ import annotations

import json

import pytest

from fastrlhf.data.checks import BadRow, DroppedRow
from fastrlhf.data.dataset import REPLACED, load_conversations, load_feedback, load_prompts
from fastrlhf.data.feedback import parse_conversation, parse_feedback
from fastrlhf.data.unsafe import ADDED, LOWERED

P = {"prompt": "p"}
ABC = {**P, "responses": ["a", "b", "c"]}
PAIR = {**P, "chosen": "a", "rejected": "b", "margin": 1}


def parse(row):
    return parse_feedback(row, "f:1")


@pytest.mark.parametrize(
    ("row", "kind", "responses", "judged"),
    [
        ({**ABC, "ranking": [0, 1, 2], "unsafe": [True, False, False]}, "ranking", "abc", ((1,), (2,), (0,))),
        ({**ABC, "ranking": [[0, 1], 2], "unsafe": [False, True, False]}, "ranking", "abc", ((0,), (2,), (1,))),
        ({**ABC, "ranking": [[0, 1, 2]], "unsafe": [False, True, True]}, "ranking", "abc", ((0,), (1, 2))),
        ({**ABC, "ranking": [0, 1, 2], "unsafe": [False] * 3}, "ranking", "abc", ((0,), (1,), (2,))),
        ({**ABC, "ranking": [0, 1, 2], "unsafe": False}, "ranking", "abc", ((0,), (1,), (2,))),
        ({**ABC, "ranking": [0, 1, 2], "unsafe": [True] * 3}, "score", "abc", (-1.0, -1.0, -1.0)),
        ({**ABC, "scores": [5, 5, 3], "unsafe": [True, False, False]}, "score", "abc", (-1.0, 1.0, 0.0)),
        ({**PAIR, "unsafe": [False, True]}, "pair", "ab", ((0,), (1,))),
        ({**PAIR, "unsafe": [True, False]}, "ranking", "ab", ((1,), (0,))),
        ({**PAIR, "unsafe": [True, True]}, "score", "ab", (-1.0, -1.0)),
        ({**P, "response": "a", "score": 5, "unsafe": True}, "score", "a", (-1.0,)),
        ({**P, "completion": "a", "label": True, "unsafe": True}, "score", "a", (-1.0,)),
        ({**P, "response": "a", "edited": "b", "unsafe": True}, "edit", "ba", ((0,), (1,))),
        # a mark alone
        ({**P, "response": "a", "unsafe": True}, "score", "a", (-1.0,)),
        ({**ABC, "unsafe": [False, False, True]}, "ranking", "abc", ((0, 1), (2,))),
    ],
)
def test_an_unsafe_reply_is_never_chosen(row, kind, responses, judged):
    feedback = parse(row)
    assert (feedback.kind, feedback.responses) == (kind, tuple(responses))
    assert (feedback.scores if kind == "score" else feedback.ranking) == judged
    assert feedback.margin == (1.0 if kind == "pair" else None)
    unsafe = set(feedback.unsafe)
    assert not any(feedback.responses[i] in unsafe for i, _ in feedback.ordered_pairs())


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({**PAIR, "unsafe": True}, 'field "unsafe" must be a list of 2 times true or false, one a reply'),
        ({**ABC, "ranking": [0, 1, 2], "unsafe": [True]}, "a list of 3 times true or false"),
        ({**P, "response": "a", "score": 1, "unsafe": 1}, "must be true or false (ignore_columns=unsafe"),
        ({**P, "response": "a", "score": 1, "unsafe": "yes"}, "found str 'yes'"),
        ({**P, "response": "a", "score": 1, "unsfe": True}, 'found "unsfe"; did you mean "unsafe"?'),
    ],
)
def test_a_mark_that_cannot_be_read_is_an_error(row, says):
    with pytest.raises(BadRow) as error:
        parse(row)
    assert says in str(error.value)


def test_a_column_about_safety_of_another_project_is_no_mark():
    assert parse({**PAIR, "safe": False, "is_safe": True}).unsafe == ()
    assert load_feedback([{**PAIR, "unsafe": "S1"}], ignore_columns=["unsafe"])[0][0].kind == "pair"


def test_it_is_below_every_safe_reply_of_its_prompt_whoever_judged():
    rows = [
        {**P, "responses": ["a", "b"], "ranking": [0, 1], "annotator": "x"},
        {**P, "response": "c", "score": 1},
        {**P, "response": "d", "edited": "e", "responses": ["d", "f"], "unsafe": [False, False]},
        {**P, "response": "a", "score": 5, "unsafe": True, "annotator": "y"},
        {"prompt": "other", "responses": ["a", "z"], "ranking": [0, 1]},
    ]
    items, counts = load_feedback(rows)
    assert [item.ranking for item in items[:1]] == [((1,), (0,))] and items[4].ranking == ((0,), (1,))
    added = items[5]
    assert (added.prompt, added.responses) == ("p", ("b", "c", "e", "d", "f", "a"))
    assert added.ranking == ((0, 1, 2, 3, 4), (5,)) and len(items) == 6
    assert counts.noted == {LOWERED: 1, ADDED: 1} and counts.used == 5


def test_nothing_is_added_where_the_judgements_say_it_already():
    rows = [{**ABC, "ranking": [0, 1, 2], "unsafe": [False, False, True]}, {"prompt": "q", "response": "a", "score": 2}]
    items, counts = load_feedback(rows)
    assert len(items) == 2 and not counts.noted


def test_unsafe_replies_are_not_imitated():
    with pytest.raises(DroppedRow, match="marked unsafe"):
        parse_conversation({**P, "response": "a", "unsafe": True}, "f:1")
    with pytest.raises(DroppedRow, match="marked unsafe"):
        parse_conversation({**PAIR, "unsafe": [True, False]}, "f:1")
    assert parse_conversation({**PAIR, "unsafe": [False, True]}, "f:1").response == "a"
    assert parse_conversation({**P, "response": "a", "edited": "b", "unsafe": True}, "f:1").response == "b"


def test_marks_in_csv(tmp_path):
    path = tmp_path / "f.csv"
    path.write_text("prompt,response,score,unsafe\np,a,5,true\np,b,2,False\np,c,3,\n", encoding="utf-8")
    items, _ = load_feedback(path)
    assert [item.scores for item in items[:3]] == [(-1.0,), (-0.5,), (0.0,)] and len(items) == 4


def judged(name, **row):
    return {**P, "judgement_id": name, **row}


def test_the_last_row_of_a_judgement_counts(tmp_path):
    rows = [
        judged("x:1", responses=["a", "b"], ranking=[0, 1]),
        {**PAIR, "judgement_id": None},
        judged("x:2", response="a", score=1, unsafe=True),
        judged("x:1", undone=True),
        judged("x:2", undone=True),
        judged("x:2", responses=["a", "b"], scores=[4, 2]),
        judged("x:3", responses=["a"], skipped=True),
    ]
    path = tmp_path / "f.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    items, counts = load_feedback(path)
    assert [item.kind for item in items] == ["pair", "score"]
    assert counts.read == 7 and counts.used == 2 and not counts.noted, "a mark that was taken back marks nothing"
    assert counts.dropped == {REPLACED: 2, "taken back by the annotator": 2, "skipped by the annotator": 1}


def test_taken_back_rows_are_no_sft_data_and_prompts_all_the_same():
    rows = [
        judged("x:1", response="a", edited="b"),
        judged("x:1", response="a", edited="c"),
        judged("x:2", undone=True),
    ]
    assert [row.response for row in load_conversations(rows)[0]] == ["c"]
    assert len(load_prompts(rows)[0]) == 3


def test_only_rows_of_a_judgement_are_skipped_or_undone():
    """Other people's columns may have these names."""
    assert parse({**PAIR, "skipped": True, "undone": True}).kind == "pair"
