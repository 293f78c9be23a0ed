"""Sets that name the better of two replies in a column of its own, and what else a wrong reading would hide."""

from __future__ import annotations

import pytest

from fastrlhf.config.errors import UserError
from fastrlhf.data.dataset import load_conversations, load_feedback, load_prompts
from fastrlhf.data.feedback import parse_prompt

USER = [{"role": "user", "content": "Hi"}]


def said(text: str) -> list[dict]:
    return [*USER, {"role": "assistant", "content": text}]


PKU = {"prompt": "Hi", "response_0": "zero", "response_1": "one", "better_response_id": 0, "safer_response_id": 1}
NVIDIA2 = {"prompt": "Hi", "response_1": "one", "response_2": "two"}
NVIDIA3 = {"context": USER, "response1": "one", "response2": "two"}
SHP = {"history": "Hi", "human_ref_A": "a", "human_ref_B": "b"}
ARENA = {"conversation_a": said("a"), "conversation_b": said("b"), "turn": 1}
TLDR = {"info": {"post": "Hi"}, "summaries": [{"text": "zero"}, {"text": "one"}]}
CASES = [  # row, columns, the better reply and the other; None: a tie
    (PKU, {}, "zero one"),
    (PKU, {"better_response_id": "safer_response_id"}, "one zero"),
    *((NVIDIA2 | {"preference_strength": n}, {}, "one two" if n < 0 else "two one") for n in (-3, -1, 1, 3.0)),
    (NVIDIA2 | {"preference_strength": "-2"}, {}, "one two"),  # of a CSV file
    (NVIDIA2 | {"preference_strength": 0}, {}, None),
    (NVIDIA3 | {"overall_preference": -1}, {"prompt": "context"}, "one two"),
    (NVIDIA3 | {"overall_preference": 2}, {"prompt": "context"}, "two one"),
    (NVIDIA3 | {"overall_preference": 0}, {"prompt": "context"}, None),
    (SHP | {"labels": 1}, {"prompt": "history"}, "a b"),
    (SHP | {"labels": 0}, {"prompt": "history"}, "b a"),
    (ARENA | {"winner": "model_a"}, {}, "a b"),
    (ARENA | {"winner": "model_b"}, {}, "b a"),
    (ARENA | {"winner": "tie"}, {}, None),
    (ARENA | {"winner": "tie (bothbad)"}, {}, None),
    (TLDR | {"choice": 0}, {"prompt": "info.post"}, "zero one"),
    (TLDR | {"choice": 1}, {"prompt": "info.post"}, "one zero"),
]


@pytest.mark.parametrize(("row", "columns", "replies"), CASES)
def test_the_better_reply_is_the_one_that_the_row_names(row, columns, replies):
    [prompt], _ = load_prompts([row], columns=columns)
    assert prompt.prompt in ("Hi", USER)
    assert row.keys() - prompt.used <= prompt.columns.keys()  # reward functions get the rest
    for load in (load_feedback, load_conversations):
        items, counts = load([row, {"prompt": "x", "chosen": "y", "rejected": "z"}], columns=columns)
        if replies is None:
            assert len(items) == 1 and counts.dropped == {"comparisons that are a tie": 1}
        elif load is load_feedback:
            assert items[0].responses == tuple(replies.split()) and items[0].prompt == prompt.prompt
        else:
            assert (items[0].response or items[0].messages[-1]["content"]) == replies.split()[0]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (PKU | {"better_response_id": 2}, "better_response_id.* must be one of 0, 1, found int 2"),
        (PKU | {"better_response_id": True}, "better_response_id.* must be one of 0, 1, found bool"),
        (NVIDIA2 | {"preference_strength": "much"}, "preference_strength.* must be a number, found str"),
        (ARENA | {"winner": "gpt"}, "winner.* must be one of 'model_a', 'model_b', 'tie'"),
        (NVIDIA2, '"chosen" is missing'),
        (NVIDIA2 | {"preference_strength": None}, '"chosen" is missing'),
    ],
)
def test_a_verdict_that_is_none_is_refused(row, says):
    with pytest.raises(UserError, match=says):
        load_feedback([row])


def test_columns_cannot_fix_what_the_rows_decide():
    mapping = {"chosen": "response_0", "rejected": "response_1"}
    for load in (load_feedback, load_conversations, load_prompts):
        with pytest.raises(
            UserError, match='"better_response_id" says for each row which of them is better, and is read'
        ):
            load([PKU], columns=mapping)
    row = {name: value for name, value in PKU.items() if name != "better_response_id"}
    assert load_feedback([row], columns=mapping)[0][0].responses == ("zero", "one")


def test_a_row_that_has_its_pair_keeps_it():
    row = {**PKU, "chosen": "one", "rejected": "zero"}
    assert load_feedback([row])[0][0].responses == ("one", "zero")


# -------------------------------------------------------------------------------------------------- other misreadings


def test_what_stands_beside_a_nested_prompt_is_part_of_it():
    """OpenAI's preference format has tools and more beside the messages of its input."""
    row = {"input": {"messages": USER, "tools": [{"type": "function"}]}, "good": "a", "bad": "b"}
    columns = {"prompt": "input.messages", "chosen": "good", "rejected": "bad"}
    for load in (load_feedback, load_conversations, load_prompts):
        with pytest.raises(UserError, match='field "tools"'):
            load([row], columns=columns)
        items, counts = load([row], columns=columns, ignore_columns=["tools"])
        assert len(items) == 1 and counts.noted['without their column "tools" (ignore_columns)'] == 1
    row["input"] = {"messages": USER, "system": "Be brief.", "tools": []}
    for load in (load_feedback, load_prompts):
        assert load([row], columns=columns)[0][0].prompt[0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("label", "liked"), [(True, True), (1, True), (False, False), (0, False)], ids=["true", "1", "false", "0"]
)
def test_a_label_means_the_same_in_both_stages(label, liked):
    rows = [{"prompt": "Hi", "completion": "a", "label": label}, {"prompt": "Hi", "completion": "b", "label": True}]
    assert load_feedback(rows)[0][0].scores == ((1.0,) if liked else (-1.0,))
    items, counts = load_conversations(rows)
    assert len(items) == (2 if liked else 1) and counts.dropped == ({} if liked else {"replies that were not liked": 1})


@pytest.mark.parametrize("label", [2, 0.5])
def test_a_label_of_another_kind_is_refused_until_it_is_left_out(label):
    row = {"prompt": "Hi", "completion": "a", "label": label}
    for load in (load_feedback, load_conversations):
        with pytest.raises(UserError, match='field "label" must be true or false .ignore_columns'):
            load([row])
    assert load_conversations([row], ignore_columns=["label"])[0][0].response == "a"
    assert load_conversations([{**row, "label": "greeting"}])[0][0].response == "a"


def test_two_replies_that_differ_are_refused():
    row = {"instruction": "Hi", "output": "a", "response": "b"}
    with pytest.raises(UserError, match='fields "response" and "output" are two replies.*ignore_columns'):
        load_conversations([row])
    assert load_conversations([row], ignore_columns=["response"])[0][0].messages[-1]["content"] == "a"
    assert load_conversations([{**row, "response": "a"}])[0][0].messages[-1]["content"] == "a"
    assert parse_prompt(row, "file:1").prompt == USER


@pytest.mark.parametrize("row", [{"instruction": "Hi"}, {"user_prompt": "Hi"}, {"prompt": USER}, {"prompt": "Hi"}])
def test_a_prompt_without_a_reply_lacks_the_reply(row):
    with pytest.raises(UserError, match='field "response" is missing .columns: '):
        load_conversations([{**row, "answers": ["a"]}])


def test_scores_that_leave_out_an_end_of_the_scale_are_noted():
    rows = [{"prompt": "Hi", "response": "a", "score": score % 4 + 1} for score in range(20)]
    noted = "scored from 1 to 4 on a scale of 1 to 5 (score_range)"
    assert load_feedback(rows)[1].noted == {noted: 20} and noted in load_feedback(rows)[1].line()
    assert not load_feedback(rows, score_range=(1, 4))[1].noted and not load_feedback(rows[:19])[1].noted
    assert not load_feedback([*rows, {**rows[0], "score": 5}])[1].noted
    labels = [{"prompt": "Hi", "response": "a", "label": True}] * 20
    assert not load_feedback(labels)[1].noted
    rated = [
        {"prompt": "Hi", "response": "a", "ratings": [1, *[3] * (n % 3), 5]} for n in range(20)
    ]  # no mean is an end
    assert load_feedback(rated)[1].noted == {"rated by 2 to 4 people a reply, of whom the mean is learnt": 20}
