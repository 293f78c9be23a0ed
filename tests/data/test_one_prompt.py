"""A row that several stages accept has the same prompt in all of them, whatever its columns are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrlhf.config.errors import UserError
from fastrlhf.data.checks import DroppedRow
from fastrlhf.data.feedback import parse_conversation, parse_feedback, parse_prompt
from fastrlhf.data.rows import read_rows

ROWS = Path(__file__).parents[3] / "shared" / "faults" / "rows"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def prompts_of(row: object) -> dict[str, object]:
    """The prompt of a row in each stage that accepts it."""
    prompts = {}
    for stage, parse in (("sft", parse_conversation), ("reward", parse_feedback), ("ppo", parse_prompt)):
        try:
            item = parse(row, "file:1")
        except (UserError, DroppedRow):
            continue
        if stage == "sft":
            if item.text is None:
                prompts[stage] = item.prompt if item.messages is None else item.messages[:-1]
        else:
            prompts[stage] = item.prompt
    return prompts


def assert_one_prompt(row: object) -> None:
    prompts = prompts_of(row)
    assert len({json.dumps(prompt) for prompt in prompts.values()}) <= 1, (row, prompts)


TURNS = [user("Hi"), assistant("Hello."), user("Name a river.")]
ONE = [user("Name a river.")]
GOOD, BAD = "The Ebro.", "No."


def pair(prompt: object, turns: list[dict]) -> dict:
    return {"prompt": prompt, "chosen": [*turns, assistant(GOOD)], "rejected": [*turns, assistant(BAD)]}


AGREEING = {
    "UltraFeedback": (pair("Name a river.", ONE), ONE),
    "Capybara, all turns in one text": (pair("Hi\nHello.\nName a river.", TURNS), TURNS),
    "the last turn": (pair(" Name a river.\n", TURNS), TURNS),
    "the first turn": (pair("Hi", TURNS), TURNS),
    "a transcript": (pair("\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Name a river.\n\nAssistant:", TURNS), TURNS),
    "rendered": (pair("<|im_start|>user\nName a river.<|im_end|>\n<|im_start|>assistant\n", ONE), ONE),
    "messages": (pair(TURNS, TURNS), TURNS),
    "messages as JSON": (pair(json.dumps(TURNS), TURNS), TURNS),
    "all of it as JSON": ({k: json.dumps(v) for k, v in pair(TURNS, TURNS).items()}, TURNS),
    "rendered by Alpaca": (
        pair(
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\nName a river.\n\n### Response:",
            ONE,
        ),
        ONE,
    ),
    "rendered in Chinese": (pair("[Round 1]\n\n问：Name a river.\n\n答：", ONE), ONE),
    "rendered for Llama, with blanks": (pair("<s>[INST]  Name a\triver. [/INST] ", ONE), ONE),
    "letters composed": (pair("Cafe\u0301?", [user("Caf\u00e9?")]), [user("Caf\u00e9?")]),
    "replies as transcripts": (
        {"prompt": "Hi", **{k: f"\n\nHuman: Hi\n\nAssistant: {r}" for k, r in (("chosen", GOOD), ("rejected", BAD))}},
        [user("Hi")],
    ),
    "replies as transcripts of all turns": (
        {
            "prompt": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Name a river.\n\nAssistant:",
            **{
                name: f"\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Name a river.\n\nAssistant: {reply}"
                for name, reply in (("chosen", GOOD), ("rejected", BAD))
            },
        },
        TURNS,
    ),
    "two texts that a template wrote": (
        {k: f"<|user|>Hi<|end|><|assistant|>{r}<|end|>" for k, r in (("chosen", "yes"), ("rejected", "no"))},
        "<|user|>Hi<|end|><|assistant|>",
    ),
    "a transcript beside a history": (
        {
            "prompt": "\n\nHuman: Name a river.\n\nAssistant:",
            "history": [["Hi", "Hello."]],
            "response": GOOD,
            "label": True,
        },
        TURNS,
    ),
    "a system message under another name": (
        {"prompt": "Hi", "system_message": "Be brief.", "chosen": GOOD, "rejected": BAD},
        [system("Be brief."), user("Hi")],
    ),
    "a system message in the replies only": (pair(ONE, [system("Be brief."), *ONE]), [system("Be brief."), *ONE]),
    "UltraChat": ({"prompt": "Hi", "messages": [*TURNS, assistant(GOOD)]}, TURNS),
    "messages without a reply": ({"prompt": "Hi", "messages": TURNS, "response": GOOD}, TURNS),
    "messages, and the reply again": ({"prompt": "Hi", "messages": [*TURNS, assistant(GOOD)], "response": GOOD}, TURNS),
    "liked": ({"prompt": "Hi", "messages": [*TURNS, assistant(GOOD)], "label": True}, TURNS),
    "a completion of several turns": ({"prompt": "Hi", "completion": [*TURNS[1:], assistant(GOOD)]}, TURNS),
    "a completion that repeats its prompt": ({"prompt": "Hi", "completion": [*TURNS, assistant(GOOD)]}, TURNS),
    "a reply as a message": ({"prompt": "Hi", "completion": [assistant(GOOD)]}, "Hi"),
    "a tool before the reply": (
        {"messages": [*ONE, assistant("look(river)"), {"role": "tool", "content": "Ebro"}, assistant(GOOD)]},
        [*ONE, assistant("look(river)"), {"role": "tool", "content": "Ebro"}],
    ),
    "a ranking beside a completion": (
        {
            "prompt": ONE,
            "responses": [GOOD, BAD],
            "ranking": [0, 1],
            "completion": [system("Be brief."), *ONE, assistant(GOOD)],
        },
        ONE,
    ),
    "an instruction beside the prompt": ({"prompt": "Hi", "instruction": "Hi", "output": GOOD}, [user("Hi")]),
}


@pytest.mark.parametrize("name", AGREEING)
def test_a_prompt_beside_a_conversation_is_the_conversations_own(name):
    row, prompt = AGREEING[name]
    prompts = prompts_of(row)
    assert "ppo" in prompts and len(prompts) > 1
    assert all(value == prompt for value in prompts.values()), prompts


CONTRADICTING = {
    "a pair": (pair("Name a lake.", ONE), "Name a lake."),
    "several turns": (pair("Hi\nName a lake.", TURNS), "Hi"),
    "messages": (pair([user("Name a lake.")], ONE), "Name a lake."),
    "another system message": (pair([system("Be long."), *ONE], [system("Be brief."), *ONE]), "Be long."),
    "SFT": ({"prompt": "Name a lake.", "messages": [*ONE, assistant(GOOD)]}, "Name a lake."),
    "replies as transcripts": (
        {"prompt": "Name a lake.", "chosen": "\n\nHuman: Name a river.\n\nAssistant: a", "rejected": "b"},
        "Name a lake.",
    ),
    "a completion": ({"prompt": "Name a lake.", "completion": [*ONE, assistant(GOOD)]}, "Name a lake."),
    "a prompt that holds the answer": (
        {"prompt": "### Instruction: Hi ### Response: Hello", "instruction": "Hi", "output": "Hello"},
        "### Instruction",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTING)
def test_a_prompt_that_contradicts_its_conversation_is_refused_in_every_stage_and_both_are_shown(name):
    row, shown = CONTRADICTING[name]
    for parse in (parse_conversation, parse_prompt, *([parse_feedback] if "chosen" in row else [])):
        with pytest.raises(UserError, match='file:1: field "prompt"') as error:
            parse(row, "file:1")
        assert shown in str(error.value) and "ignore_columns" in str(error.value)
        assert ("Hi" if name == "several turns" else "river" if "instruction" not in row else "Hi") in str(error.value)


UNUSED = {
    **dict.fromkeys(("functions", "tools"), [{"name": "look"}]),
    **dict.fromkeys(("chat_history", "conversation_history"), [["Hi", "Hello."]]),
    **dict.fromkeys(("image", "images", "audio", "video", "documents"), ["a"]),
}


@pytest.mark.parametrize("column", UNUSED)
@pytest.mark.parametrize("inside", [False, True])
def test_what_belongs_to_a_prompt_and_cannot_be_used_is_refused(column, inside):
    if inside and "history" in column:
        pytest.skip("a message has no history")
    said = {"messages": [{**user("Hi"), column: UNUSED[column]}, assistant(GOOD)]}
    row = said if inside else {"prompt": "Hi", "chosen": GOOD, "rejected": BAD, column: UNUSED[column]}
    for parse in (parse_conversation, parse_prompt, *([] if inside else [parse_feedback])):
        with pytest.raises(UserError, match=f"{column}.*(ignore_columns|remove them)"):
            parse(row, "file:1")
    empty = {**row, column: []} if not inside else {"messages": [{**user("Hi"), column: None}, assistant(GOOD)]}
    assert prompts_of(empty)


def test_a_system_text_beside_a_prompt_that_a_template_wrote_is_refused():
    for prompt in (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "[INST] Hi [/INST]",
        "<start_of_turn>user\nHi",
    ):
        row = {"prompt": prompt, "system": "Be brief.", "chosen": GOOD, "rejected": BAD}
        for parse in (parse_conversation, parse_prompt, parse_feedback):
            with pytest.raises(UserError, match='field "system" is given besides a prompt that a template wrote'):
                parse(row, "file:1")


@pytest.mark.parametrize("text", ['[{"a": 1}]', '[{"role": "user"', "[{}]", '["a"]', "[{"])
def test_other_json_is_a_text(text):
    assert parse_prompt({"prompt": text}, "file:1").prompt == text


@pytest.mark.skipif(not ROWS.is_dir(), reason="../shared is not there")
def test_rows_of_public_data_sets_have_one_prompt_in_all_stages():
    used = 0
    for file in sorted(ROWS.glob("*.jsonl")):
        for _, row in read_rows(str(file)):
            assert_one_prompt(row)
            used += len(prompts_of(row)) > 1
    assert used >= 60


TEXTS = st.sampled_from(["Hi", "Name a river.", "Name a lake.", "Hello.", "\n\nHuman: Hi\n\nAssistant:"])


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, str]]:
    sharegpt = draw(st.booleans())
    keys, names = (("from", "value"), ("human", "gpt")) if sharegpt else (("role", "content"), ("user", "assistant"))
    turns = [{keys[0]: names[i % 2], keys[1]: draw(TEXTS)} for i in range(draw(st.integers(1, 4)))]
    if draw(st.integers(0, 3)) == 0:
        turns.insert(0, {keys[0]: "system", keys[1]: draw(st.sampled_from(["Be brief.", "Be long."]))})
    return turns[draw(st.integers(0, 1)) :]  # a fragment, now and then


VALUES = st.one_of(TEXTS, conversations())
MADE = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("prompt", "chosen", "rejected", "completion", "response", "messages"), VALUES),
        "conversations": conversations(),
        **dict.fromkeys(("instruction", "input", "context", "output", "edited", "user_prompt"), TEXTS),
        **dict.fromkeys(("system", "system_prompt", "developer"), st.sampled_from(["", "Be brief.", "Be long."])),
        "history": st.lists(st.lists(TEXTS, min_size=2, max_size=2), max_size=2),
        "tools": st.sampled_from(["[]", [], [{"name": "look"}]]),
        "score": st.integers(1, 5),
        "label": st.booleans(),
        "responses": st.lists(TEXTS, min_size=2, max_size=2),
        "ranking": st.just([0, 1]),
        **dict.fromkeys(("response_1", "response_2"), TEXTS),
        "preference_strength": st.integers(-1, 1),
        **dict.fromkeys(("conversation_a", "conversation_b"), conversations()),
        "winner": st.sampled_from(["model_a", "model_b", "tie"]),
    },
)


@settings(max_examples=400, deadline=None)
@given(MADE)
def test_any_row_has_one_prompt_in_all_stages_that_accept_it(row):
    assert_one_prompt(row)


@st.composite
def consistent_rows(draw: st.DrawFn) -> dict:
    """Rows whose columns agree: random columns rarely do."""
    turns = [(user, assistant)[i % 2](draw(TEXTS)) for i in range(draw(st.sampled_from((1, 3))))]
    head = draw(st.sampled_from(([], [system("Be brief.")])))
    whole = [*head, *turns]
    column = {"system": "Be brief."} if draw(st.booleans()) else {}
    prompt = draw(st.sampled_from(("none", "first", "last", "text", "messages")))
    texts = {"first": turns[0]["content"], "last": turns[-1]["content"], "messages": whole}
    texts["text"] = "\n".join(turn["content"] for turn in turns)
    stated = {} if prompt == "none" else {"prompt": texts[prompt]}
    good, bad = [*whole, assistant(GOOD)], [*whole, assistant(BAD)]
    replies = draw(
        st.sampled_from(
            (
                {"chosen": good, "rejected": bad},
                {"messages": good},
                {"messages": good, "label": True},
                {"messages": whole, "response": GOOD, "edited": BAD},
                {"completion": good, "label": True},
            )
        )
    )
    return {**column, **stated, **replies}


@settings(max_examples=300, deadline=None)
@given(consistent_rows())
def test_rows_whose_columns_agree_are_accepted_with_one_prompt(row):
    assert_one_prompt(row)
    prompts = prompts_of(row)
    assert {"sft", "ppo"} <= prompts.keys()
    assert ("Be brief." in json.dumps(prompts["ppo"])) == ("Be brief." in json.dumps(row))
