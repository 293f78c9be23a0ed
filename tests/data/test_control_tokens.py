"""Control tokens that a text carries already are not added again, in no stage and for no role."""

from __future__ import annotations

import pytest

from fastrlhf import RewardConfig, UserError
from fastrlhf.data.batches import encode_one
from fastrlhf.data.checks import DroppedRow
from fastrlhf.data.encode import Encoder, Example, example_steps
from fastrlhf.data.feedback import parse_conversation, parse_feedback, parse_prompt
from fastrlhf.data.templates import encode_prompt, encode_response, settle_template
from tests import tiny

CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|stop|>\n\n{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}"
)
HEADS = {None: "<|{}|>", CHATML: "<|start|>{}\n", LLAMA_3: "<|start|>{}<|stop|>\n\n"}
TEMPLATES = pytest.mark.parametrize("template", HEADS, ids=["one token", "chatml", "llama 3"])


def settled(template: str | None = None):
    tokenizer = tiny.tokenizer()
    if template:
        tokenizer.add_tokens(["<|start|>", "<|stop|>"])
        tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
        tokenizer.chat_template = template
    settle_template(tokenizer, None)
    return tokenizer


def encoded(tokenizer, row: dict) -> Example:
    return encode_one(tokenizer, example_steps(tokenizer, parse_conversation(row, "f:1")))


def turn(role: str, text: str, **more: object) -> dict:
    return {"role": role, "content": text, **more}


BARE = [
    turn("system", "be brief"),
    turn("user", "a"),
    turn("assistant", "b"),
    turn("user", "c"),
    turn("assistant", "d"),
]


@TEMPLATES
@pytest.mark.parametrize(("head", "tail"), [(True, "<|end|>"), (True, ""), (False, "<|end|>"), (True, "<|end|>\n")])
def test_a_message_that_carries_its_own_marks_is_the_message_without(template, head, tail):
    tokenizer = settled(template)
    marked = [turn(m["role"], HEADS[template].format(m["role"]) * head + m["content"] + tail) for m in BARE]
    marked[0]["content"] = "<|bos|>" * (template == LLAMA_3) + marked[0]["content"]
    want = encoded(tokenizer, {"messages": BARE})
    example = encoded(tokenizer, {"messages": marked})
    assert (example.ids, example.target) == (want.ids, want.target)
    prompt = parse_prompt({"messages": marked[:-1]}, "f:1").prompt
    assert encode_prompt(tokenizer, prompt) == encode_prompt(tokenizer, BARE[:-1])
    pair = parse_feedback({"prompt": marked[:-1], "chosen": marked[-1]["content"], "rejected": "e"}, "f:1")
    assert (
        encode_prompt(tokenizer, pair.prompt) + encode_response(tokenizer, pair.prompt, pair.responses[0]) == want.ids
    )


@TEMPLATES
def test_a_reply_behind_a_prompt_that_a_template_wrote(template):
    tokenizer, head = settled(template), HEADS[template].format("assistant")
    prompt = tokenizer.apply_chat_template([turn("user", "a")], tokenize=False, add_generation_prompt=True)
    want = encode_response(tokenizer, prompt, "b")
    assert tokenizer.decode(want) == "b<|end|>"
    for reply in ("b<|end|>", "b<|end|>\n", head + "b", head + "b<|end|>"):
        assert encode_response(tokenizer, prompt, reply) == want, reply


def test_what_a_text_says_itself_stays():
    """BOS that stands in a later message, an answer that is the prompt's last token, and what a tool says."""
    tokenizer = settled(LLAMA_3)
    prompt = [turn("system", "be brief"), turn("user", "<|bos|>a")]
    assert tokenizer.decode(encode_prompt(tokenizer, prompt)).count("<|bos|>") == 2
    assert tokenizer.decode(encode_response(tokenizer, "the cat<|pad|>", "<|pad|>")) == "<|pad|><|end|>"
    tool = [turn("user", "a"), turn("assistant", "b"), turn("tool", HEADS[LLAMA_3].format("tool") + "4<|end|>")]
    assert tokenizer.decode(encode_prompt(tokenizer, tool)).count("<|start|>tool<|stop|>") == 2


@pytest.mark.parametrize("end", ["<|end|>", "<|end|>\n", "<|end|> \n\n"])
def test_a_text_that_ends_itself(end):
    tokenizer = settled()
    want = encoded(tokenizer, {"text": "the cat"})
    assert encoded(tokenizer, {"text": "the cat" + end}).ids == want.ids
    assert tokenizer.decode(want.ids) == "the cat<|end|>"


def test_a_text_of_nothing_but_control_tokens_stays():
    tokenizer = settled()
    assert tokenizer.decode(encode_prompt(tokenizer, tiny.chat("<|user|>"))) == "<|user|><|user|><|end|><|assistant|>"
    assert tokenizer.decode(encode_response(tokenizer, tiny.chat("a"), "<|end|>")).startswith("<|end|>")


def test_a_pair_that_differs_by_such_tokens_alone_teaches_nothing():
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b<|end|>", "rejected": "b"}]
    records = Encoder(RewardConfig(), settled()).records(rows, "data")
    assert len(records.items) == 1 and "1 with equal replies" in records.counts.line()


@pytest.mark.parametrize(
    ("key", "value", "learnt"),
    [("weight", 0, 1), ("weight", 1.0, 2), ("train", 0, 1), ("train", False, 1), ("train", 1, 2), ("loss", 0.0, 1)],
)
def test_turns_that_are_not_to_be_learnt(key, value, learnt):
    def targets(*messages: dict) -> list[bool]:
        return encoded(settled(), {"messages": [*messages]}).target

    assert sum(targets(*BARE[:2], turn("assistant", "b", **{key: value}), *BARE[3:])) == 2 * learnt  # letter and end
    last = targets(*BARE[:4], turn("assistant", "d", **{key: value}))
    assert sum(last) == 2 * learnt and last[-1] == (learnt == 2)
    with pytest.raises(UserError, match=f"message 2: {key} 'no'"):
        targets(turn("user", "a"), turn("assistant", "b", **{key: "no"}))
    if learnt == 1:
        with pytest.raises(DroppedRow):
            targets(turn("user", "a"), turn("assistant", "b", **{key: value}))
