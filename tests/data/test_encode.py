"""Rows as token ids: the same ids in a batch as alone and as ever; what does not fit is counted, what the template
refuses is named, nothing left is an error."""

from __future__ import annotations

import json
import random
import threading
import zlib
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast

from fastrlhf import PPOConfig, RewardConfig, SFTConfig
from fastrlhf.config.errors import UserError
from fastrlhf.data import batches, rendering, templates
from fastrlhf.data.batches import encode_many, encode_one
from fastrlhf.data.checks import DroppedRow
from fastrlhf.data.dataset import load_prompts
from fastrlhf.data.encode import Encoder, ptx_limit
from fastrlhf.data.templates import encode_prompt, encode_response, prompt_steps, replies_steps, settle_template
from tests import encoding_cases as cases
from tests import tiny

ROWS = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]
GOLDEN = json.loads(Path(__file__).with_name("golden_ids.json").read_text())


def upper(**failures: Exception):
    """Upper case of a prompt, but for those that fail."""

    def encode(prompt):
        if prompt.prompt in failures:
            raise failures[prompt.prompt]
        return prompt.prompt.upper()
        yield

    return encode


def usable(rows, encode, *, skip: bool, **how):
    prompts, counts = load_prompts(rows)
    encoder = Encoder(PPOConfig(skip_bad_rows=skip), tiny.tokenizer())
    return encoder.usable(prompts, encode, counts, "data", **how)


# -------------------------------------------------------------------------------------------------------- the same ids


def encoder(name: str, config: type) -> Encoder:
    make, template, form = cases.TOKENIZERS[name]
    tokenizer = make()
    label, _ = settle_template(tokenizer, template, form)
    return Encoder(config(chat_template=template, prompt_format=form), tokenizer, label)


def digest(row: list) -> str:
    return format(zlib.crc32(json.dumps(row).encode()), "08x")


@pytest.mark.parametrize("name", cases.TOKENIZERS)
def test_ids_are_those_of_version_0_1_which_encoded_text_by_text(name):
    """golden_ids.json holds a checksum a row, written by commit 810054c: ids and, of SFT, which of them are learnt. New
    since then: moss-rlhf and "the cat</s>", a message whose end the template wrote once more."""
    sft = encoder(name, SFTConfig).examples(cases.CONVERSATIONS, "data").items
    learnt = [[e.ids, [i for i, wanted in enumerate(e.target) if wanted]] for e in sft]
    rewards = [record.rows for record in encoder(name, RewardConfig).records(cases.FEEDBACK, "data").items]
    prompts = [prompt.ids for prompt in encoder(name, PPOConfig).prompts(cases.PROMPTS, "prompts").items]
    for stage, rows in (("sft", learnt), ("reward", rewards), ("ppo", prompts)):
        assert [digest(row) for row in rows] == GOLDEN[name][stage].split(), stage


@pytest.mark.parametrize("name", ["chat", "bos and eos", "strips"])
def test_a_row_alone_has_the_ids_that_it_has_among_others(name, monkeypatch):
    monkeypatch.setattr(batches, "TEXTS", 4)  # several calls of the tokenizer for each of several chunks
    tokenizer = encoder(name, PPOConfig).tokenizer
    pairs = [(prompt, reply) for prompt in cases.PROMPTS for reply in cases.REPLIES]
    random.Random(0).shuffle(pairs)
    many = encode_many(tokenizer, pairs, lambda pair: replies_steps(tokenizer, pair[0], [pair[1]]), size=10)
    for (prompt, reply), (ids, [reply_ids]) in many:
        assert ids == encode_prompt(tokenizer, prompt)
        assert reply_ids == encode_response(tokenizer, prompt, reply)


def test_texts_go_to_the_tokenizer_in_lists():
    """Not one by one: of 50 pairs the prompts and the replies are one list."""
    calls = []

    class Watched(Called):
        def __call__(self, text, **how):
            calls.append(len(text))
            return super().__call__(text, **how)

    tokenizer = tiny.tokenizer()
    tokenizer.__class__ = Watched
    settle_template(tokenizer, None)
    calls.clear()
    pairs = [{"prompt": tiny.chat(f"the {n}"), "chosen": "yes", "rejected": "no"} for n in range(50)]
    assert len(Encoder(RewardConfig(), tokenizer).records(pairs, "data").items) == 50
    assert calls == [150]


class Called(PreTrainedTokenizerFast):
    """A tokenizer with a call of its own: of what that does with a text nothing is known, so texts are given whole."""

    def __call__(self, text, **how):
        return super().__call__(text, **how)


ADDED = ["<|u|>", "<|a|>", "<|b|>", "<|a|><|b|>", "|><|", "word", "<e>"]
PARTS = st.sampled_from([*ADDED, "<|", "|>", "the", "cat", " ", "\n", "a", "Ö", "今"])


@st.composite
def added_tokens(draw):
    flags = st.fixed_dictionaries({name: st.booleans() for name in ("lstrip", "rstrip", "single_word", "normalized")})
    return [AddedToken(text, **draw(flags)) for text in draw(st.lists(st.sampled_from(ADDED), unique=True))]


@pytest.mark.parametrize("scheme", ["bytes", "first", "always"])
@given(added=added_tokens(), prompt=st.lists(PARTS, min_size=1), reply=st.lists(PARTS, min_size=1))
@settings(max_examples=40, deadline=None)
def test_a_reply_behind_a_control_token_has_the_ids_that_it_has_behind_the_whole_prompt(scheme, added, prompt, reply):
    """Whatever tokens overlap or take blanks with them, and however words that begin a text are written."""
    said = "{% if m.role == 'user' %}<|u|>{{ m.content }}{% else %}<|a|>{{ m.content }}<e>{% endif %}"
    template = f"{{% for m in messages %}}{said}{{% endfor %}}{{% if add_generation_prompt %}}<|a|>{{% endif %}}"
    tokenizer = cases.tokenizer(template=template)
    backend = tokenizer.backend_tokenizer
    if scheme != "bytes":
        backend.normalizer = normalizers.Lowercase()
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.add_tokens(added)
    messages, reply = tiny.chat("".join(prompt)), "".join(reply)
    try:
        ids = encode_response(tokenizer, messages, reply)
    except UserError:
        ids = None
    tokenizer.__class__ = Called
    with suppress(UserError):
        assert encode_response(tokenizer, messages, reply) == ids


@pytest.mark.parametrize(
    ("added", "borders"),
    [
        ({"<|a|>": {}}, ["<|a|>"]),
        ({"<|a|>": {"lstrip": True, "rstrip": True}}, ["<|a|>"]),
        ({}, []),
        ({"<|a|>": {"single_word": True}}, []),
        ({"<|a|>": {"normalized": True}}, []),
        ({"<|a|>": {}, "<|a|><|b|>": {}}, []),  # a reply that begins with <|b|> would take it
        ({"<|a|>": {}, "x<|": {}}, []),  # and so would a prompt that ends with x
        ({"<|a|>": {}, "|>x": {}}, ["<|a|>"]),
    ],
)
def test_which_tokens_cut_a_text_wherever_they_stand(added, borders):
    tokenizer = cases.tokenizer(template="{% for m in messages %}{{ m.content }}<|a|>{% endfor %}")
    tokenizer.add_tokens([AddedToken(text, **({"normalized": False} | flags)) for text, flags in added.items()])
    assert templates._borders(tokenizer, templates._known_of(tokenizer)) == borders


def test_a_tokenizer_with_a_call_of_its_own_is_called():
    class Own(Called):
        def __call__(self, text, **how):
            return super().__call__([part.upper() for part in text], **how)

    tokenizer = tiny.tokenizer()
    plain = encode_prompt(tokenizer, "THE CAT")
    tokenizer.__class__ = Own
    assert encode_prompt(tokenizer, "the cat") == plain


def test_a_tokenizer_that_was_set_to_cut_and_pad_gives_every_token():
    tokenizer = tiny.tokenizer()
    ids = encode_prompt(tokenizer, "the cat sat")
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    assert encode_prompt(tokenizer, "the cat sat") == ids


def test_a_text_that_many_rows_ask_for_is_given_to_the_tokenizer_once():
    given: list[str] = []

    class Watched(Called):
        def __call__(self, text, **how):
            given.extend(text)
            return super().__call__(text, **how)

    tokenizer = encoder("chat", RewardConfig).tokenizer
    tokenizer.__class__ = Watched
    pairs = [{"prompt": tiny.chat("the cat"), "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(5)]
    assert len(Encoder(RewardConfig(), tokenizer).records(pairs, "data").items) == 5
    prompts = [text for text in given if "the cat" in text and "yes" not in text and "no" not in text]
    assert len(prompts) == 1


def test_a_slow_template_is_found_out_and_does_not_hold_up_every_row(monkeypatch):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for a in range(999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
    chats = [tiny.chat("a")] * 9
    assert isinstance(
        rendering.render_many(tokenizer, chats[:1], add_generation_prompt=True, seconds=0.05)[0], UserError
    )
    with pytest.raises(rendering.SlowTemplate, match="takes more than 0.05 s"):
        rendering.render_many(tokenizer, chats, add_generation_prompt=True, seconds=0.05)


def test_one_refused_conversation_does_not_touch_the_others_of_its_batch():
    tokenizer = tiny.tokenizer()
    refuse = "{% if messages[0].content == 'b' %}{{ raise_exception('no b') }}{% endif %}"
    tokenizer.chat_template = refuse + tokenizer.chat_template
    many = encode_many(tokenizer, map(tiny.chat, "abc"), lambda prompt: prompt_steps(tokenizer, prompt))
    first, second, third = (result for _, result in many)
    assert "no b" in str(second)
    assert [first, third] == [encode_one(tokenizer, prompt_steps(tokenizer, tiny.chat(p))) for p in "ac"]


def test_the_first_texts_are_with_the_tokenizer_while_their_source_is_still_being_read(monkeypatch):
    begun, encoded = threading.Event(), batches._encoded
    monkeypatch.setattr(batches, "ROWS", 4)
    monkeypatch.setattr(batches, "_encoded", lambda *texts: begun.set() or encoded(*texts))

    def source():
        for n in range(9):
            yield {"prompt": tiny.chat(f"the cat {n}"), "chosen": "yes", "rejected": "no"}
        assert begun.wait(timeout=60)

    prepared = encoder("chat", RewardConfig)  # which has the tokenizer encode some texts of its own
    encode_prompt(prepared.tokenizer, tiny.chat("the cat"))
    begun.clear()
    assert len(prepared.records(source(), "data").items) == 9


JUDGED = [
    {"prompt": tiny.chat(f"the cat {n % 3}"), "chosen": f"yes {n}", "rejected": "no", "judgement_id": f"{n % 4}"}
    for n in range(9)
]
MARKED = [{"prompt": "the cat", "response": f"yes {n}", "score": 1 + n % 5, "unsafe": n == 7} for n in range(9)]


@pytest.mark.parametrize("rows", [JUDGED, MARKED, cases.FEEDBACK], ids=["replaced", "added to", "as they stand"])
def test_rows_that_were_begun_too_early_are_not_those_of_the_source(rows, monkeypatch):
    """A later row of its judgement_id takes the place of one; a mark adds judgements behind the last."""
    whole = encoder("chat", RewardConfig).records(rows, "data")
    monkeypatch.setattr(batches, "ROWS", 2)
    begun = encoder("chat", RewardConfig).records(rows, "data")
    assert (begun.items, begun.counts, begun.forms) == (whole.items, whole.counts, whole.forms)


def test_rows_that_are_cut_or_dropped_are_counted_once_where_they_were_begun_early(monkeypatch):
    monkeypatch.setattr(batches, "ROWS", 2)
    tokenizer, counted = tiny.tokenizer(), []
    for ahead in (True, False):
        if not ahead:
            monkeypatch.setattr(Encoder, "_ahead", lambda *_: None)
        config = SFTConfig(max_tokens=12, overlong="truncate")
        sizes = [(n % 5 + 1, n % 3 + 1) for n in range(11)]
        rows = [{"prompt": tiny.chat("cat " * a), "response": "the moon " * b} for a, b in sizes]
        counted.append(Encoder(config, tokenizer).examples(rows, "data").counts)
    assert counted[0] == counted[1] and counted[0].noted and counted[0].dropped


def test_a_refused_reply_is_the_error_of_its_row_and_of_no_other():
    tokenizer = tiny.tokenizer()
    refuse = "{% if messages[-1].content == 'b' %}{{ raise_exception('no b') }}{% endif %}"
    tokenizer.chat_template = refuse + tokenizer.chat_template
    pairs = [("a", "c"), ("c", "b"), ("c", "a")]
    many = encode_many(tokenizer, pairs, lambda pair: replies_steps(tokenizer, tiny.chat("the cat"), pair))
    first, second, third = (result for _, result in many)
    assert isinstance(second, UserError) and "no b" in str(second)
    assert first[1] == third[1][::-1]


def test_what_a_conversation_sets_in_the_template_is_gone_before_the_next_of_its_batch():
    tokenizer = tiny.tokenizer()
    once = "{% if messages[0].content == 'a' %}{% set heard = 'a' %}{% endif %}{{ heard | default('nothing') }}"
    tokenizer.chat_template = once + tokenizer.chat_template
    chats = [tiny.chat(content) for content in "abab"]
    alone = [rendering.render(tokenizer, chat, add_generation_prompt=True) for chat in chats]
    assert alone[1].startswith("nothing")
    assert rendering.render_many(tokenizer, chats, add_generation_prompt=True) == alone


# ------------------------------------------------------------------------------------------------------ what is counted


def test_a_conversation_the_template_refuses_is_named_by_its_line():
    encode = upper(b=UserError("the chat template refuses it"))
    with pytest.raises(UserError, match=r"row 2.*the chat template refuses it.*skip_bad_rows=true"):
        usable(ROWS, encode, skip=False)
    read = usable(ROWS, encode, skip=True)
    assert read.items == ["A", "C"] and read.counts.malformed == ["row 2: the chat template refuses it"]
    assert read.counts.line().startswith("3 rows read, 2 used, dropped: 1 malformed; first malformed: row 2")
    assert read.dropped == pytest.approx(1 / 3)


def test_a_row_that_does_not_fit_is_counted_under_its_reason_and_is_not_malformed():
    encode = upper(a=DroppedRow("longer than max_tokens = 3"), c=DroppedRow("longer than max_tokens = 3"))
    read = usable(ROWS, encode, skip=False)
    assert read.items == ["B"] and read.counts.malformed == []
    assert read.counts.line() == "3 rows read, 1 used, dropped: 2 longer than max_tokens = 3"


@pytest.mark.parametrize(("remedy", "end"), [("raise max_tokens", "; raise max_tokens"), ("", "")])
def test_nothing_left_names_the_rows_and_the_remedy(remedy, end):
    with pytest.raises(UserError) as error:
        usable(ROWS[:1], upper(a=DroppedRow("empty")), skip=True, remedy=remedy)
    assert str(error.value) == f"data: nothing left to train on (1 rows read, 0 used, dropped: 1 empty){end}"


def test_a_sample_is_encoded_and_its_losses_stand_for_all():
    rows = [{"prompt": f"{'long ' * (n % 4)}"[:-1] or "x"} for n in range(400)]
    counted = []
    tokenizer = tiny.tokenizer()
    how = {"sample": 100, "progress": lambda *at: counted.append(at)}
    read = Encoder(PPOConfig(max_prompt_tokens=9), tokenizer, **how).prompts(rows, "prompts")
    whole = Encoder(PPOConfig(max_prompt_tokens=9), tokenizer).prompts(rows, "prompts")
    assert (read.sampled, whole.sampled) == (400, None) and counted[-1] == ("prompts", 100, 100)
    assert 0 < whole.dropped < 1 and read.dropped == pytest.approx(whole.dropped, abs=0.15)


def test_long_prompts_are_dropped_and_counted_and_the_shortest_is_named_where_all_are():
    tokenizer = tiny.tokenizer()
    sizes = [len(tokenizer(text)["input_ids"]) for text in tiny.TEXTS[:3]]
    shortest = min(sizes)
    read = Encoder(PPOConfig(max_prompt_tokens=shortest), tokenizer).prompts(tiny.TEXTS[:3], "prompts")
    assert [item.prompt.prompt for item in read.items] == [tiny.TEXTS[sizes.index(shortest)]]
    assert read.lengths() == [shortest]
    assert read.counts.line() == f"3 rows read, 1 used, dropped: 2 longer than max_prompt_tokens = {shortest}"
    with pytest.raises(UserError, match=rf"prompts: every prompt is longer .* \(the shortest: {shortest}\); raise it"):
        Encoder(PPOConfig(max_prompt_tokens=shortest - 1), tokenizer).prompts(tiny.TEXTS[:3], "prompts")


def test_ptx_rows_may_be_as_long_as_a_prompt_and_its_reply():
    tokenizer = tiny.tokenizer()
    sizes = sorted(len(tokenizer(text)["input_ids"]) + 1 for text in tiny.TEXTS)  # and EOS
    config = PPOConfig(ptx_coef=1.0, max_prompt_tokens=sizes[1] - 3, max_new_tokens=3)
    read = Encoder(config, tokenizer).ptx([{"text": text} for text in tiny.TEXTS])
    assert sorted(read.lengths()) == sizes[:2] and ptx_limit(config) == sizes[1]
    assert read.counts.line().endswith(
        f"2 used, dropped: 2 longer than max_prompt_tokens + max_new_tokens = {sizes[1]}"
    )
