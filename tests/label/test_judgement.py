"""One judgement: what the page sends becomes a row of feedback in the order of the item, and back."""

from __future__ import annotations

import pytest

from fastrlhf.data.feedback import parse_feedback
from fastrlhf.label.judgement import Refused, as_shown, row_of, same, shown_order, undone_row
from tests.label_runs import ROWS, Bench


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench")).items


def place_of(item, annotator, text):
    return [item.replies[i].text for i in shown_order(annotator, item)].index(text)


def test_every_annotator_has_an_order_of_their_own_always_the_same(items):
    item = items[2]
    orders = {tuple(shown_order(f"person {i}", item)) for i in range(200)}
    assert len(orders) == 24, "200 people see every order of four replies"
    assert shown_order("ann", item) == shown_order("ann", item)
    assert sorted(shown_order("ann", item)) == [0, 1, 2, 3]


@pytest.mark.parametrize("annotator", ["ann", "bo", "陈"])
def test_scores_come_back_in_the_order_of_the_item(items, annotator):
    item = items[2]
    given = {"晾干再收。": 5, "不知道。": 2, "扔掉。": None, "放在太阳下。": None}
    scores = [None] * 4
    unsafe = [False] * 4
    for text, score in given.items():
        scores[place_of(item, annotator, text)] = score
    unsafe[place_of(item, annotator, "扔掉。")] = True
    row = row_of({"kind": "score", "scores": scores, "unsafe": unsafe, "seconds": 3.21}, item, annotator)
    assert row["responses"] == ["晾干再收。", "不知道。", "扔掉。"] and row["scores"] == [5, 2, 1]
    assert row["unsafe"] == [False, False, True] and row["seconds"] == 3.2
    assert row["response_ids"] == [[0, 5], [1, 4], [3, 3]] and row["model"] == "runs/secret-model"
    assert row["positions"] == [place_of(item, annotator, text) for text in row["responses"]]
    assert row["judgement_id"] == f"{annotator}:{item.id}" and row["annotator"] == annotator
    assert parse_feedback(row, "f:1").scores == (1.0, -0.5, -1.0)


@pytest.mark.parametrize("annotator", ["ann", "bo", "陈"])
def test_a_ranking_with_ties_and_an_unsafe_reply(items, annotator):
    item = items[2]
    best, tied, bad, also = (
        place_of(item, annotator, text) for text in ("晾干再收。", "不知道。", "扔掉。", "放在太阳下。")
    )
    unsafe = [place == bad for place in range(4)]
    row = row_of({"kind": "rank", "ranking": [[bad], [best], [also, tied]], "unsafe": unsafe}, item, annotator)
    assert row["responses"] == [reply.text for reply in item.replies]
    assert row["ranking"] == [0, [1, 2], 3] and row["unsafe"] == [False, False, False, True]
    assert parse_feedback(row, "f:1").ranking == ((0,), (1, 2), (3,))
    back = as_shown(row, item, annotator)
    assert [set(group) for group in back["ranking"]] == [{best}, {tied, also}, {bad}] and back["unsafe"] == unsafe


def test_all_unsafe_is_the_lowest_score_of_each(items):
    row = row_of({"kind": "rank", "ranking": [], "unsafe": [True] * 3}, items[0], "ann")
    assert row["scores"] == [1, 1, 1] and row["unsafe"] == [True] * 3 and "ranking" not in row


def test_an_edit_keeps_the_marks_of_the_other_replies(items):
    item = items[0]
    place, bad = place_of(item, "ann", "A pear."), place_of(item, "ann", "A car.")
    edit = {"kind": "edit", "edit": {"reply": place, "text": "A pear, or an apple."}}
    row = row_of(edit, item, "ann")
    assert (row["response"], row["edited"]) == ("A pear.", "A pear, or an apple.")
    assert "responses" not in row and row["response_ids"] == [0, 7] and row["positions"] == place
    row = row_of({**edit, "unsafe": [at == bad for at in range(3)]}, item, "ann")
    feedback = parse_feedback(row, "f:1")
    assert feedback.unsafe == ("A car.",) and set(feedback.seen) == {"A car.", "A nut?"}
    assert as_shown(row, item, "ann") == {
        "kind": "edit",
        "edit": edit["edit"],
        "unsafe": [at == bad for at in range(3)],
    }


@pytest.mark.parametrize("kind", ["score", "rank", "edit", "skip"])
def test_what_is_taken_back_can_be_given_again(items, kind):
    body = {"kind": kind, "scores": [1, None, 5], "ranking": [[2], [0, 1]], "edit": {"reply": 1, "text": "new"}}
    row = row_of(body, items[0], "ann")
    again = row_of(as_shown(row, items[0], "ann"), items[0], "ann")
    assert same(row, again) and undone_row(row)["judgement_id"] == row["judgement_id"]
    other = row_of({**body, "kind": "score", "scores": [2, None, 5]}, items[0], "ann")
    assert not same(row, other)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"kind": "love"}, "kind must be one of score, rank, edit, skip, found 'love'"),
        ({}, "kind must be"),
        ({"kind": "score"}, "no reply has a score"),
        ({"kind": "score", "scores": [None, None, None]}, "no reply has a score"),
        ({"kind": "score", "scores": [1, 2, 3, 4]}, "reply 3 is not there: this prompt has 3"),
        ({"kind": "score", "scores": "555"}, "is not there"),
        ({"kind": "score", "scores": [0, 1, 2]}, "a whole number from 1 to 5, found 0"),
        ({"kind": "score", "scores": [6]}, "found 6"),
        ({"kind": "score", "scores": [True]}, "found True"),
        ({"kind": "score", "scores": [[5]]}, "a whole number from 1 to 5"),
        ({"kind": "score", "scores": [2.5]}, "found 2.5"),
        ({"kind": "rank", "ranking": [0, 1]}, "reply 2 has no place"),
        ({"kind": "rank", "ranking": [0, 1, 2, 2]}, "stands twice"),
        ({"kind": "rank", "ranking": [0, 1, 7]}, "reply 7 is not there"),
        ({"kind": "rank", "ranking": [0, 1, -1]}, "reply -1 is not there"),
        ({"kind": "rank", "ranking": [0, 1, True]}, "reply True is not there"),
        ({"kind": "rank", "ranking": [[0, [1]], 2]}, "is not there"),
        ({"kind": "rank"}, "has no place"),
        ({"kind": "edit"}, "edit must be an object"),
        ({"kind": "edit", "edit": {"reply": 3, "text": "x"}}, "reply 3 is not there"),
        ({"kind": "edit", "edit": {"reply": 0, "text": " \n"}}, "is empty"),
        ({"kind": "edit", "edit": {"reply": 0, "text": "a\0b"}}, "NUL"),
        ({"kind": "edit", "edit": {"reply": 0, "text": "\ud800"}}, "not valid Unicode"),
        ({"kind": "edit", "edit": {"reply": 0, "text": 7}}, "must be text"),
        ({"kind": "skip", "unsafe": [True]}, "unsafe must be 3 times true or false"),
        ({"kind": "skip", "unsafe": [0, 0, 1]}, "unsafe must be"),
        ({"kind": "skip", "seconds": -1}, "seconds must be between"),
        ({"kind": "skip", "seconds": float("nan")}, "must be a number"),
        ({"kind": "skip", "seconds": "1"}, "must be a number"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(items, body, says):
    with pytest.raises(Refused) as error:
        row_of(body, items[0], "ann")
    assert says in str(error.value) and error.value.status == 422


def test_the_reply_as_it_was_is_no_edit_and_one_reply_no_ranking(items):
    item = items[3]
    assert ROWS[3][1] == ["One."]
    with pytest.raises(Refused, match="as it was"):
        row_of({"kind": "edit", "edit": {"reply": 0, "text": "One."}}, item, "ann")
    with pytest.raises(Refused, match="alone cannot be ranked"):
        row_of({"kind": "rank", "ranking": [0]}, item, "ann")
    assert row_of({"kind": "score", "scores": [4]}, item, "ann")["scores"] == [4]
