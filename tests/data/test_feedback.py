"""Feedback records, conversations and prompts of fastrlhf's own formats: what is parsed, dropped, refused."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrlhf.config.errors import UserError
from fastrlhf.data.checks import FIELDS, BadRow, DroppedRow
from fastrlhf.data.feedback import Feedback, parse_conversation, parse_feedback, parse_prompt

WHERE = "feedback.jsonl:7"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好"}]


def parse(row, score_range=(1.0, 5.0)):
    return parse_feedback(row, WHERE, score_range)


def test_a_pair_keeps_its_margin_and_its_messages():
    row = {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?", "margin": 2, "annotator": "a7"}
    expected = Feedback("pair", "Hi", ("Hello!", "What?"), ((0,), (1,)), None, 2.0, WHERE, annotator="a7")
    assert parse(row) == expected
    assert parse({**row, "margin": None}).margin is None
    assert parse({**row, "prompt": MESSAGES}).prompt == MESSAGES


@pytest.mark.parametrize("parse_row", [parse_conversation, parse_feedback])
@pytest.mark.parametrize("column", ["weight", "loss_weight", "sample_weight", "loss_mask", "mask"])
def test_a_column_that_weighs_rows_is_refused_where_it_says_anything(parse_row, column):
    row = {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}
    for nothing in (1, 1.0, True, None, ""):
        assert parse_row({**row, column: nothing}, WHERE) == parse_row(row, WHERE)
    for value in (0, 0.5, False, [1, 0, 1]):
        with pytest.raises(BadRow, match=rf'{WHERE}: field "{column}" is .*every row counts alike; .*ignore_columns'):
            parse_row({**row, column: value}, WHERE)
        with pytest.raises(BadRow, match=rf'{WHERE}: field "{column}" is .*every row counts alike; .*ignore_columns'):
            parse_prompt({**row, column: value}, WHERE)


@pytest.mark.parametrize("parse_row", [parse_conversation, parse_feedback, parse_prompt])
def test_the_input_of_an_instruction_beside_a_prompt_is_refused_and_not_left_out(parse_row):
    row = {"prompt": "Translate.", "chosen": "Bonjour", "rejected": "Hallo"}
    with pytest.raises(
        BadRow, match=r'field "input": it is part of an instruction\'s text only; put it into the prompt'
    ):
        parse_row({**row, "input": "Good day"}, WHERE)
    assert parse_row({**row, "input": ""}, WHERE).prompt == "Translate."


def test_edit_puts_the_edited_text_first():
    row = {"prompt": MESSAGES, "response": "ok", "edited": "好的。"}
    assert parse(row) == Feedback("edit", MESSAGES, ("好的。", "ok"), ((0,), (1,)), None, None, WHERE)


def test_ratings_of_several_people_are_one_score_each_their_mean():
    one = parse({"prompt": "p", "response": "a", "ratings": [1, 5, 5, 3], "mean": 9})
    assert one == Feedback("score", "p", ("a",), scores=(0.25,), ratings=((-1.0, 1.0, 1.0, 0.0),), where=WHERE)
    both = parse({"prompt": "p", "responses": ["a", "b"], "ratings": [[4], [-4, 0]]}, (-4.0, 4.0))
    assert both.scores == (1.0, -0.5) and both.ratings == ((1.0,), (-1.0, 0.0)) and both.ordered_pairs() == [(0, 1)]


def test_an_unsafe_reply_has_no_ratings_left():
    marked = parse({"prompt": "p", "responses": ["a", "b"], "ratings": [[5], [5, 3]], "unsafe": [False, True]})
    assert marked.scores == (1.0, -1.0) and marked.ratings is None


@pytest.mark.parametrize(
    ("ranking", "groups"),
    [
        ([2, 0, 1], ((2,), (0,), (1,))),
        ([2, [0, 1]], ((2,), (0, 1))),
        ([[1, 2], [0]], ((1, 2), (0,))),
    ],
)
def test_ranking_with_ties(ranking, groups):
    feedback = parse({"prompt": "Hi", "responses": ["a", "b", "c"], "ranking": ranking})
    assert feedback == Feedback("ranking", "Hi", ("a", "b", "c"), groups, None, None, WHERE)


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(6)), st.lists(st.booleans(), min_size=5, max_size=5))
def test_any_permutation_cut_into_groups_is_kept_as_it_is(order, cuts):
    groups = [[order[0]]]
    for index, new in zip(order[1:], [*cuts[:-1], True]):
        groups.append([index]) if new else groups[-1].append(index)
    feedback = parse({"prompt": "p", "responses": list("abcdef"), "ranking": groups})
    assert feedback.ranking == tuple(map(tuple, groups))


def test_scores_are_mapped_to_minus_one_to_one():
    single = parse({"prompt": "Hi", "response": "a", "score": 4})
    assert single == Feedback("score", "Hi", ("a",), None, (0.5,), None, WHERE)
    several = parse({"prompt": "Hi", "responses": ["a", "b", "c"], "scores": [0, 5.0, 10]}, (0, 10))
    assert several.scores == (-1.0, 0.0, 1.0) and several.responses == ("a", "b", "c")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "chosen equals rejected"),
        ({"chosen": "same", "rejected": "same"}, "chosen equals rejected"),
        ({"prompt": "p", "response": "a", "edited": "a"}, "edited equals the response"),
        ({"prompt": "p", "responses": ["a", "b"], "ranking": [[0, 1]]}, "one tie"),
        ({"prompt": "p", "responses": ["a", "a"], "ranking": [0, 1]}, "identical responses"),
    ],
)
def test_rows_without_a_preference_are_dropped_not_bad(row, reason):
    with pytest.raises(DroppedRow, match=reason) as error:
        parse(row)
    assert not isinstance(error.value, UserError)


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
RANKED = {"prompt": "p", "responses": ["a", "b"], "ranking": [0, 1]}
SCORED = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]}
RATED = {"prompt": "p", "response": "a", "ratings": [1, 5, 4]}


def without(row: dict, *names: str, **more) -> dict:
    return {**{key: value for key, value in row.items() if key not in names}, **more}


BAD_ROWS = [
    # misspelt and missing columns
    (without(PAIR, "prompt", promt="p"), 'field "prompt" is missing (found "promt"; did you mean "prompt"?)'),
    (
        {"promt": "p", "chosen": "The sky is blue", "rejected": "The sky is red"},
        'field "prompt" is missing (found "promt"; did you mean "prompt"?)',
    ),
    ({"question": "p", "chosen": "The sky is blue", "rejected": "The sky is red"}, 'field "prompt" is missing'),
    (without(PAIR, "chosen", choosen="a"), 'field "chosen" is missing (found "choosen"; did you mean "chosen"?)'),
    (without(PAIR, "rejected", Rejected="b"), 'found "Rejected"; did you mean "rejected"?'),
    (without(PAIR, margn=1), 'field "margin" is missing (found "margn"'),
    (without(RANKED, "ranking", rankings=[0, 1]), 'field "ranking" is missing (found "rankings"'),
    (without(RANKED, "responses", respones=["a"]), 'field "responses" is missing (found "respones"'),
    (without(SCORED, "scores", socres=[1, 2]), 'field "scores" is missing (found "socres"'),
    ({"prompt": "p", "response": "a", "editted": "b"}, 'field "edited" is missing (found "editted"'),
    ({"prompt": "p", "edited": "b"}, 'field "response" is missing'),
    ({"prompt": "p", "response": "a"}, 'field "score" is missing (columns: prompt, response)'),
    ({"prompt": "p", "responses": ["a", "b"]}, 'field "ranking" is missing'),
    ({"prompt": "p", "response": "a", "scores": [1]}, 'field "responses" is missing'),
    ({"question": "p"}, 'field "chosen" is missing (columns: question)'),
    ({}, "(columns: none)"),
    # wrong types
    ("text", "a row must be a JSON object or a list of turns, found str 'text'"),
    (None, "found NoneType"),
    (without(PAIR, prompt=3), 'field "prompt" must be a list of messages, found int 3'),
    (without(PAIR, prompt=[]), 'field "prompt" must be a list of messages'),
    (without(PAIR, chosen=["x"]), "must be"),
    (without(PAIR, chosen=7), 'field "chosen" must be a list of messages, found int 7'),
    (without(PAIR, margin="big"), 'field "margin" must be a number, found str'),
    (without(PAIR, margin=-1), 'field "margin" is -1; it must be at least 0'),
    (without(SCORED, scores=[1, True]), 'field "scores[1]" must be a number, found bool'),
    (without(SCORED, scores=[1, math.nan]), 'field "scores[1]" must be a number, found float nan'),
    (without(SCORED, scores=[1, 10**400]), 'field "scores[1]" must be a number, found int'),
    (without(SCORED, scores=[1]), 'field "scores" must be a list of 2 numbers'),
    (without(SCORED, scores=3), 'field "scores" must be a list of 2 numbers, found int 3'),
    (
        without(RATED, ratings=[]),
        'field "ratings" must be a list of numbers, what each person gave it, found list []',
    ),
    (without(RATED, ratings=4), 'field "ratings" must be a list of numbers, what each person gave it, found int 4'),
    (without(RATED, ratings=[4, "5"]), 'field "ratings[1]" must be a number, found str'),
    (without(RATED, ratings=[4, 7]), "rating 7 is outside the declared range 1 to 5; set score_range"),
    (
        without(RATED, score=4),
        "a record has ratings or score, not both; leave one out with ignore_columns, as in [score]",
    ),
    (without(RATED, "response"), 'field "response" is missing'),
    (without(RATED, ranking=[0]), "a record has a ranking or scores, not both"),
    (without(SCORED, "scores", ratings=[1, 2]), "a list for each of the 2 responses"),
    (without(SCORED, "scores", ratings=[[1]]), "a list for each of the 2 responses"),
    (without(SCORED, "scores", ratings=[[1], [2, True]]), 'field "ratings[1][1]" must be a number, found bool'),
    (without(SCORED, "scores", ratngs=[[1], [2]]), 'field "ratings" is missing (found "ratngs"'),
    (without(SCORED, responses="ab"), 'field "responses" must be a list of at least 1 texts'),
    (without(SCORED, scores=[0, 2]), "score 0 is outside the declared range 1 to 5; set score_range"),
    (without(SCORED, scores=[1, 5.5]), "score 5.5 is outside the declared range 1 to 5"),
    (without(RANKED, ranking=[1, 2]), "must name each of the 2 responses once, as 0 to 1, found list [1, 2]"),
    (without(RANKED, ranking=[0]), "must name each of the 2 responses once"),
    (without(RANKED, ranking=[0, 0]), "must name each of the 2 responses once"),
    (without(RANKED, ranking=[0, [1, []]]), "must hold whole numbers"),
    (without(RANKED, ranking=[0, 1, []]), "must hold whole numbers"),
    (without(RANKED, ranking=[0.0, 1]), "must hold whole numbers"),
    (without(RANKED, ranking="0>1"), 'field "ranking" must be a list, best first'),
    (without(RANKED, scores=[1, 2]), "a ranking or scores, not both"),
    (without(RANKED, responses=["a"], ranking=[0]), "at least 2 texts"),
    # empty and broken text
    (without(PAIR, prompt=""), 'field "prompt" is empty'),
    (without(PAIR, prompt=" \n"), 'field "prompt" is empty'),
    (without(PAIR, rejected=""), 'field "rejected" is empty'),
    (without(RANKED, responses=["a", ""]), 'field "responses[1]" is empty'),
    (without(PAIR, prompt=[{"role": "user", "content": ""}]), 'field "prompt[0].content" is empty'),
    (without(PAIR, chosen="a\0b"), 'field "chosen" contains a NUL character at position 1'),
    (without(PAIR, chosen="ab\ud800"), 'field "chosen" is not valid Unicode at character 2'),
]


@pytest.mark.parametrize(("row", "says"), BAD_ROWS)
def test_bad_rows_name_the_place_the_field_and_the_remedy(row, says):
    with pytest.raises(BadRow) as error:
        parse(row)
    message = str(error.value)
    assert message.startswith(f"{WHERE}: ") and says in message and "\n" not in message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
columns = st.sampled_from([*FIELDS, "input", "history", "system", "user_prompt", "tools", "kto_tag"])


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(columns, json_values) | json_values)
def test_no_row_does_anything_but_parse_or_say_why_not(row):
    for parser in (parse, lambda r: parse_conversation(r, WHERE), lambda r: parse_prompt(r, WHERE)):
        try:
            parser(row)
        except (BadRow, DroppedRow) as error:
            assert str(error)


# ------------------------------------------------------------------------------------------------ SFT examples, prompts


def test_a_conversation_is_a_pair_messages_or_text():
    plain = parse_conversation({"prompt": "Hi", "response": "Hello!"}, WHERE)
    assert (plain.prompt, plain.response, plain.messages, plain.text) == ("Hi", "Hello!", None, None)
    chat = parse_conversation({"prompt": MESSAGES, "response": "好"}, WHERE)
    assert chat.messages == [*MESSAGES, {"role": "assistant", "content": "好"}] and chat.prompt is None
    for row in ({"text": "春眠不觉晓"}, "春眠不觉晓"):
        text = parse_conversation(row, WHERE)
        assert (text.text, text.prompt, text.messages) == ("春眠不觉晓", None, None)
    row = {"messages": [*MESSAGES, {"role": "assistant", "content": "好"}], "text": "as text"}
    assert parse_conversation(row, WHERE).messages == chat.messages
    assert parse_conversation(row, WHERE, "text").text == "as text"


@pytest.mark.parametrize(
    ("row", "format_", "says"),
    [
        ({"prompt": "a", "response": "b"}, "text", 'field "text" is missing'),
        ({"txt": "b"}, "text", 'found "txt"; did you mean "text"?'),
        ({"prompt": "a"}, "auto", 'field "response" is missing'),
        ({"prompt": "a", "respnse": "b"}, "auto", 'found "respnse"; did you mean "response"?'),
        ({"response": "b"}, "auto", 'field "prompt" is missing'),
        ({"prompt": "a", "response": "b", "score": 1}, "auto", 'field "score": judged replies are no SFT data'),
        ({"prompt": "a", "response": "b", "ratings": [1]}, "auto", 'field "ratings": judged replies are no SFT data'),
        (RANKED, "auto", 'field "ranking": judged replies'),
        ({"messages": MESSAGES}, "auto", "must end with a reply, its last role is 'user'"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "auto", "'assistant' at the beginning"),
        ({"text": ""}, "auto", 'field "text" is empty'),
    ],
)
def test_a_bad_conversation_says_what_is_wrong(row, format_, says):
    with pytest.raises(BadRow) as error:
        parse_conversation(row, WHERE, format_)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"promt": "a"}, 'found "promt"; did you mean "prompt"?'),
        ({"prompt": ""}, 'field "prompt" is empty'),
        ("", 'field "prompt" is empty'),
        ({"text": "a"}, 'field "prompt" is missing (columns: text)'),
        (3, "a row must be a JSON object"),
    ],
)
def test_a_bad_prompt_says_what_is_wrong(row, says):
    with pytest.raises(BadRow) as error:
        parse_prompt(row, WHERE)
    assert says in str(error.value)
