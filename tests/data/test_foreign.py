"""Foreign formats: what each row becomes, down to the token ids, and which rows are refused."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fastrlhf.data.checks import BadRow, DroppedRow
from fastrlhf.data.feedback import parse_conversation, parse_feedback, parse_prompt
from fastrlhf.data.templates import encode_conversation, encode_prompt, encode_response, resolve_chat_template

SENTENCES = ["Hello there, how are you?", "I am fine, thank you.", "你好，世界！", "今天天气很好。"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on four sentences, MOSS-RLHF's Chinese tags as tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    core.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>", "<|Human|>", "<|MOSS|>")])
    fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    resolve_chat_template(fast, "moss-rlhf-zh")
    return fast


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


Q1, A1, Q2 = "你好，世界！", "I am fine", "how are you?"
CONTEXT = [user(Q1), assistant(A1), user(Q2)]
GOOD, BAD = "fine, thank you.", "今天"
HH = f"\n\nHuman: {Q1}\n\nAssistant: {A1}\n\nHuman: {Q2}\n\nAssistant: "
SHAREGPT = [{"from": "human", "value": Q1}, {"from": "gpt", "value": A1}, {"from": "human", "value": Q2}]
PAIRS = {
    "own, messages": {"prompt": CONTEXT, "chosen": GOOD, "rejected": BAD},
    "hh-rlhf": {"chosen": HH + GOOD, "rejected": HH + BAD},
    "TRL conversational": {"prompt": CONTEXT, "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]},
    "TRL implicit prompt": {"chosen": [*CONTEXT, assistant(GOOD)], "rejected": [*CONTEXT, assistant(BAD)]},
    "prompt repeated as text": {
        "prompt": Q1,
        "chosen": [*CONTEXT, assistant(GOOD)],
        "rejected": [*CONTEXT, assistant(BAD)],
    },
    "completion of several messages": {
        "prompt": Q1,
        "chosen": [assistant(A1), user(Q2), assistant(GOOD)],
        "rejected": [assistant(A1), user(Q2), assistant(BAD)],
    },
    "LLaMA-Factory": {
        "conversations": SHAREGPT,
        "chosen": {"from": "gpt", "value": GOOD},
        "rejected": {"from": "gpt", "value": BAD},
    },
    "MOSS-RLHF": {"chosen": [Q1, A1, Q2, GOOD], "rejected": [Q1, A1, Q2, BAD]},
    "Alpaca pair": {"instruction": Q2, "history": [[Q1, A1]], "chosen": GOOD, "rejected": BAD},
    "Arrow's empty columns": {"prompt": CONTEXT, "chosen": GOOD, "rejected": BAD, "score": None, "edited": None},
    "content in parts": {
        "prompt": [*CONTEXT[:2], {"role": "user", "content": [{"type": "text", "text": Q2}]}],
        "chosen": GOOD,
        "rejected": BAD,
    },
}


@pytest.mark.parametrize("name", PAIRS)
def test_every_pair_format_gives_the_same_tokens(name, tokenizer):
    feedback = parse_feedback(PAIRS[name], "file:1")
    assert (feedback.kind, feedback.prompt, feedback.responses) == ("pair", CONTEXT, (GOOD, BAD))
    assert feedback.ranking == ((0,), (1,)) and feedback.scores is None and feedback.where == "file:1"
    expected = f"<s><|Human|>{Q1}</s><|MOSS|>{A1}</s><|Human|>{Q2}</s><|MOSS|>"
    ids = encode_prompt(tokenizer, feedback.prompt)
    assert ids == tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert encode_response(tokenizer, feedback.prompt, GOOD) == tokenizer(GOOD + "</s>")["input_ids"]
    assert encode_response(tokenizer, feedback.prompt, BAD) == tokenizer(BAD + "</s>")["input_ids"]


CONVERSATIONS = {
    "own, messages": {"messages": [*CONTEXT, assistant(GOOD)]},
    "bare list of messages": [*CONTEXT, assistant(GOOD)],
    "MOSS-RLHF list": [Q1, A1, Q2, GOOD],
    "ShareGPT": {"conversations": [*SHAREGPT, {"from": "gpt", "value": GOOD}], "id": "x"},
    "Alpaca": {"instruction": Q2, "input": "", "output": GOOD, "history": [[Q1, A1]]},
    "TRL prompt and completion": {"prompt": CONTEXT, "completion": [assistant(GOOD)]},
    "prompt and messages": {"prompt": Q1, "messages": [*CONTEXT, assistant(GOOD)]},
    "KTO, liked": {"messages": [*CONTEXT, assistant(GOOD)], "label": True},
    "hh-rlhf, chosen": {"chosen": HH + GOOD, "rejected": HH + BAD},
    "edit, edited": {"prompt": CONTEXT, "response": BAD, "edited": GOOD},
    "MOSS SFT": {
        "meta_instruction": "",
        "num_turns": 2,
        "chat": {
            "turn_1": {"Human": f"<|Human|>: {Q1}<eoh>\n", "MOSS": f"<|MOSS|>: {A1}<eom>\n"},
            "turn_2": {
                "Human": f"<|Human|>: {Q2}<eoh>\n",
                "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n",
                "Commands": "<|Commands|>: None<eoc>\n",
                "Tool Responses": "<|Results|>: None<eor>\n",
                "MOSS": f"<|MOSS|>: {GOOD}<eom>\n",
            },
        },
    },
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_every_conversation_format_gives_the_same_tokens(name, tokenizer):
    conversation = parse_conversation(CONVERSATIONS[name], "file:1")
    assert conversation.messages == [*CONTEXT, assistant(GOOD)]
    ids, mask = encode_conversation(tokenizer, conversation.messages)
    text = f"<s><|Human|>{Q1}</s><|MOSS|>{A1}</s><|Human|>{Q2}</s><|MOSS|>{GOOD}</s>"
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode([i for i, target in zip(ids, mask) if target]) == f"{A1}</s>{GOOD}</s>"


def test_the_ids_of_a_chinese_conversation_are_known(tokenizer):
    """Tags and stop tokens are single ids, the Chinese text between them is what the bytes' merges give."""
    messages = parse_conversation({"conversations": SHAREGPT[:2]}, "file:1").messages
    ids, mask = encode_conversation(tokenizer, messages)
    human, moss, bos, eos = tokenizer.convert_tokens_to_ids(["<|Human|>", "<|MOSS|>", "<s>", "</s>"])
    chinese = tokenizer.convert_tokens_to_ids(list("ä½łå¥½ï¼Įä¸ĸçķĮï¼ģ"))
    merged = ids[2 : ids.index(eos)]
    assert ids[:2] == [bos, human] and ids[ids.index(eos) + 1] == moss and ids[-1] == eos
    assert "".join(tokenizer.convert_ids_to_tokens(merged)) == "".join(tokenizer.convert_ids_to_tokens(chinese))
    assert len(merged) < len(chinese) and tokenizer.decode(merged) == Q1
    assert mask == [False] * (ids.index(moss) + 1) + [True] * (len(ids) - ids.index(moss) - 1)


PROMPTS = {
    "own, text": ({"prompt": Q2}, Q2, None),
    "bare text": (Q2, Q2, None),
    "own, messages": ({"prompt": CONTEXT}, CONTEXT, None),
    "MOSS user prompt": ({"user_prompt": Q2}, [user(Q2)], None),
    "Alpaca with input": ({"instruction": Q1, "input": Q2, "output": "x"}, [user(f"{Q1}\n{Q2}")], None),
    "Alpaca with system": ({"instruction": Q1, "system": "ok"}, [system("ok"), user(Q1)], None),
    "MOSS-RLHF, odd": ([Q1, A1, Q2], CONTEXT, None),
    "MOSS-RLHF, even": ([Q1, A1, Q2, GOOD], CONTEXT, "cut"),
    "whole conversation": ({"messages": [*CONTEXT, assistant(GOOD)]}, CONTEXT, "cut"),
    "ShareGPT pair": ({"conversations": SHAREGPT, "chosen": {"from": "gpt", "value": "x"}}, CONTEXT, None),
    "hh-rlhf": ({"chosen": HH + GOOD, "rejected": HH + BAD}, CONTEXT, None),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_every_format_gives_its_prompt(name):
    row, expected, note = PROMPTS[name]
    prompt = parse_prompt(row, "file:3")
    assert prompt.prompt == expected and prompt.where == "file:3"
    assert (prompt.note is None) == (note is None) and (note is None or note in prompt.note)


def test_other_columns_go_to_the_reward_functions():
    row = {"prompt": Q2, "answer": "4", "level": None, "system": "kept"}
    assert parse_prompt(row, "f:1").columns == {"answer": "4", "level": None, "system": "kept"}
    assert parse_prompt({"instruction": Q1, "input": Q2, "answer": "4"}, "f:1").columns == {"answer": "4"}


def test_kto_is_a_score_at_the_end_of_the_range():
    liked = parse_feedback({"prompt": Q1, "completion": GOOD, "label": True}, "f:1", (0, 10))
    disliked = parse_feedback({"messages": [*CONTEXT, assistant(BAD)], "label": False}, "f:1")
    assert (liked.kind, liked.prompt, liked.responses, liked.scores) == ("score", Q1, (GOOD,), (1.0,))
    assert (disliked.kind, disliked.prompt, disliked.responses, disliked.scores) == ("score", CONTEXT, (BAD,), (-1.0,))
    with pytest.raises(DroppedRow, match="not liked"):
        parse_conversation({"messages": [*CONTEXT, assistant(BAD)], "label": False}, "f:1")


def test_implicit_text_prompt_is_the_common_head_to_the_last_whole_word():
    feedback = parse_feedback({"chosen": "The sky is blue.", "rejected": "The sky is black."}, "f:1")
    assert feedback.prompt == "The sky is" and feedback.responses == (" blue.", " black.")


def test_moss_tools_keep_their_parts_in_every_turn():
    parts = {
        "Human": "<|Human|>: 2+2?<eoh>\n",
        "Inner Thoughts": "<|Inner Thoughts|>: sum<eot>\n",
        "Commands": '<|Commands|>: Calculate("2+2")<eoc>\n',
        "Tool Responses": "<|Results|>:\n4\n<eor>\n",
        "MOSS": "<|MOSS|>: 4<eom>\n",
    }
    plain = {"Human": "<|Human|>: Hi<eoh>\n", "MOSS": "<|MOSS|>: Hello<eom>\n"}
    row = {"meta_instruction": "You are MOSS.\n", "chat": {"turn_1": parts, "turn_2": plain}}
    assert parse_conversation(row, "f:1").messages == [
        system("You are MOSS.\n"),
        user("2+2?"),
        assistant('<|Inner Thoughts|>: sum<eot>\n<|Commands|>: Calculate("2+2")<eoc>'),
        {"role": "tool", "content": "\n4\n", "weight": 1},
        assistant("4"),
        user("Hi"),
        assistant("<|Inner Thoughts|>: None<eot>\n<|Commands|>: None<eoc>"),
        {"role": "tool", "content": "None", "weight": 1},
        assistant("Hello"),
    ]


def test_hh_turns_of_one_speaker_are_joined():
    text = "\n\nHuman: a\n\nHuman: b\n\nAssistant: c\n\nAssistant:  d "
    feedback = parse_feedback({"chosen": text, "rejected": text + "e"}, "f:1")
    assert feedback.prompt == [user("a\n\nb")] and feedback.responses == ("c\n\nd", "c\n\nd e")


def test_hh_without_a_reply_is_dropped_with_a_reason():
    with pytest.raises(DroppedRow, match="empty last turn"):
        parse_feedback({"chosen": "\n\nHuman: a\n\nAssistant: ", "rejected": "\n\nHuman: a\n\nAssistant: b"}, "f:1")


BAD_ROWS = {
    "contexts differ": ({"chosen": HH + GOOD, "rejected": HH.replace(A1, "x") + BAD}, "at turn 2 of 4 and 4"),
    "no reply": ({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: b"}, '"chosen" must end with a reply'),
    "turns end with the human": ({"chosen": ["a", "b", "c"], "rejected": ["a", "b", "d"]}, "must end with a reply"),
    "nothing in common": ({"chosen": "yes", "rejected": "no"}, 'field "prompt" is missing'),
    "two humans": (
        {"prompt": [user("a"), user("b")], "chosen": "c", "rejected": "d"},
        "message 2 has role 'user' after",
    ),
    "system in the middle": (
        {"prompt": [user("a"), system("b"), user("c")], "chosen": "c", "rejected": "d"},
        "message 2 has role 'system' after 'user'",
    ),
    "assistant first": ({"prompt": [assistant("a")], "chosen": "c", "rejected": "d"}, "'assistant' at the beginning"),
    "prompt ends with a reply": (
        {"prompt": [user("a"), assistant("b")], "chosen": "c", "rejected": "d"},
        "must end with the human's turn, its last role is 'assistant'",
    ),
    "unknown role": (
        {"prompt": [{"role": "bot", "content": "a"}], "chosen": "c", "rejected": "d"},
        "role 'bot' is unknown",
    ),
    "odd role": ({"prompt": [{"role": ["user"], "content": "a"}], "chosen": "c", "rejected": "d"}, "is unknown"),
    "no content": ({"prompt": [{"role": "user"}], "chosen": "c", "rejected": "d"}, 'prompt[0].content" must be text'),
    "an image": (
        {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "chosen": "c", "rejected": "d"},
        "part of type 'image'",
    ),
    "tool calls": (
        {"prompt": [{"role": "user", "content": "a", "tool_calls": [{}]}], "chosen": "c", "rejected": "d"},
        "tool_calls are not supported",
    ),
    "tools": ({"conversations": SHAREGPT, "tools": "[{}]", "chosen": "c", "rejected": "d"}, 'field "tools"'),
    "two systems": (
        {"conversations": [{"from": "system", "value": "a"}, *SHAREGPT], "system": "b", "chosen": "c", "rejected": "d"},
        "besides a system message",
    ),
    "history": ({"instruction": "a", "history": ["b"], "chosen": "c", "rejected": "d"}, 'field "history[0]"'),
    "KTO label": ({"prompt": "a", "completion": "b", "label": "good"}, 'field "label" must be true or false'),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_say_where_and_what(name):
    row, says = BAD_ROWS[name]
    with pytest.raises(BadRow) as error:
        parse_feedback(row, "data.jsonl:7")
    assert str(error.value).startswith("data.jsonl:7: ") and says in str(error.value)


@pytest.mark.parametrize(
    ("chat", "says"),
    [
        ([], 'field "chat" must be'),
        ({"turn_2": {}}, 'field "turn_1" is missing'),
        ({"turn_1": {"Human": "Hi", "MOSS": "<|MOSS|>: a<eom>"}}, 'chat.turn_1.Human" must be <|Human|>: ... <eoh>'),
        ({"turn_1": {"Human": "<|Human|>: a<eoh>"}}, 'chat.turn_1.MOSS" must be text'),
        ({"turn_1": {"Human": "<|Human|>: a<eoh>", "MOSS": "<|MOSS|>: <eom>"}}, "empty"),
    ],
)
def test_a_bad_moss_row_says_what_is_wrong(chat, says):
    with pytest.raises(BadRow) as error:
        parse_conversation({"chat": chat}, "moss.json:1")
    assert says in str(error.value)


def test_a_prompt_column_of_messages_must_end_with_the_user():
    with pytest.raises(BadRow, match="must end with a user message"):
        parse_prompt({"prompt": [user("a"), assistant("b")]}, "f:1")
    with pytest.raises(BadRow, match="no human turn"):
        parse_prompt({"messages": [system("a")]}, "f:1")


def test_moss_rlhf_list_as_sft_needs_a_reply_at_the_end():
    with pytest.raises(BadRow, match="must end with a reply"):
        parse_conversation([Q1, A1, Q2], "f:1")
