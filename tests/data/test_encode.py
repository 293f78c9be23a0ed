"""Rows as token ids: what does not fit is counted, what the template refuses is named, nothing left is an error."""

from __future__ import annotations

import pytest

from fastrlhf import PPOConfig
from fastrlhf.config.errors import UserError
from fastrlhf.data.checks import DroppedRow
from fastrlhf.data.dataset import load_prompts
from fastrlhf.data.encode import encode_usable, load_encoded_prompts, load_ptx
from tests import tiny

ROWS = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]


def encoder(**failures: Exception):
    """Upper case of a prompt, but for those that fail."""

    def encode(prompt):
        if prompt.prompt in failures:
            raise failures[prompt.prompt]
        return prompt.prompt.upper()

    return encode


def test_a_conversation_the_template_refuses_is_named_by_its_line():
    encode = encoder(b=UserError("the chat template refuses it"))
    prompts, counts = load_prompts(ROWS)
    with pytest.raises(UserError, match=r"row 2.*the chat template refuses it.*skip_bad_rows=true"):
        encode_usable(prompts, encode, counts, role="data", skip_bad_rows=False)
    encoded, note = encode_usable(prompts, encode, counts, role="data", skip_bad_rows=True)
    assert encoded == ["A", "C"] and counts.malformed == ["row 2: the chat template refuses it"]
    assert note.startswith("data: 3 rows read, 2 used, dropped: 1 malformed; first malformed: row 2")


def test_a_row_that_does_not_fit_is_counted_under_its_reason_and_is_not_malformed():
    prompts, counts = load_prompts(ROWS)
    encode = encoder(a=DroppedRow("longer than max_tokens = 3"), c=DroppedRow("longer than max_tokens = 3"))
    encoded, note = encode_usable(prompts, encode, counts, role="data", skip_bad_rows=False)
    assert (encoded, note) == (["B"], "data: 3 rows read, 1 used, dropped: 2 longer than max_tokens = 3")
    assert counts.malformed == []


@pytest.mark.parametrize(("remedy", "end"), [("raise max_tokens", "; raise max_tokens"), ("", "")])
def test_nothing_left_names_the_rows_and_the_remedy(remedy, end):
    prompts, counts = load_prompts(ROWS[:1])
    with pytest.raises(UserError) as error:
        encode_usable(prompts, encoder(a=DroppedRow("empty")), counts, role="x", skip_bad_rows=True, remedy=remedy)
    assert str(error.value) == f"x: nothing left to train on (1 rows read, 0 used, dropped: 1 empty){end}"


def test_long_prompts_are_dropped_and_counted_and_the_shortest_is_named_where_all_are():
    tokenizer = tiny.tokenizer()
    sizes = [len(tokenizer(text)["input_ids"]) for text in tiny.TEXTS[:3]]
    shortest = min(sizes)
    kept, note = load_encoded_prompts(PPOConfig(max_prompt_tokens=shortest), tokenizer, tiny.TEXTS[:3], "prompts")
    note = note.splitlines()[0]
    assert [item.prompt.prompt for item in kept] == [tiny.TEXTS[sizes.index(shortest)]]
    assert len(kept[0].ids) == shortest
    assert note == f"prompts: 3 rows read, 1 used, dropped: 2 longer than max_prompt_tokens = {shortest}"
    with pytest.raises(UserError, match=rf"prompts: every prompt is longer .* \(the shortest: {shortest}\); raise it"):
        load_encoded_prompts(PPOConfig(max_prompt_tokens=shortest - 1), tokenizer, tiny.TEXTS[:3], "prompts")


def test_ptx_rows_may_be_as_long_as_a_prompt_and_its_reply():
    tokenizer = tiny.tokenizer()
    sizes = sorted(len(tokenizer(text)["input_ids"]) + 1 for text in tiny.TEXTS)  # and EOS
    config = PPOConfig(ptx_coef=1.0, max_prompt_tokens=sizes[1] - 3, max_new_tokens=3)
    examples, note = load_ptx(config, tokenizer, [{"text": text} for text in tiny.TEXTS])
    assert [len(example.ids) for example in sorted(examples, key=lambda e: len(e.ids))] == sizes[:2]
    assert note.endswith(f"2 used, dropped: 2 longer than max_prompt_tokens + max_new_tokens = {sizes[1]}")
