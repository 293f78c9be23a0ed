"""Templates: what the presets write, which ids each stage gets, and what is refused."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from fastrlhf.config.errors import UserError
from fastrlhf.data.templates import (
    PRESETS,
    encode_conversation,
    encode_prompt,
    encode_response,
    end_of_turn,
    render,
    render_prompt,
    resolve_chat_template,
    stop_token_ids,
)

# Merged by hand, so that the ids below can be checked by eye: bytes come first (sorted alphabet), then these.
MERGES = ["H i", "o k", "Ċ Ċ", "Ġ Hi", "Ġ ok", "ä ½", "ä½ ł", "å ¥", "å¥ ½", "a b"]
HI, OK, TWO_LINES, SPACE_OK, NI, HAO, AB = 256, 257, 258, 260, 262, 264, 265
SYSTEM = {"role": "system", "content": "ok"}
USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "ok"}
CHAT = [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "你好"}, {"role": "assistant", "content": "好"}]


def build(*, eos="</s>", bos=None, pad=None, add_bos=False, add_eos=False, extra=()) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [tuple(m.split(" ")) for m in MERGES]
    vocab = {token: i for i, token in enumerate([*alphabet, *("".join(m) for m in merges)])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True) for t in dict.fromkeys(filter(None, (eos, bos, *extra)))])
    if add_bos or add_eos:
        single = [*([bos] if add_bos else []), "$A", *([eos] if add_eos else [])]
        ids = [(token, core.token_to_id(token)) for token in (bos, eos) if token]
        core.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, bos_token=bos, pad_token=pad)


def pieces(tokenizer, ids: list[int]) -> list[str]:
    """Tokens as they stand in the vocabulary, single ASCII bytes joined to words."""
    result: list[str] = []
    for token in tokenizer.convert_ids_to_tokens(ids):
        single = len(token) == 1 and token.isascii()
        if single and result and result[-1].startswith("~"):
            result[-1] += token
        else:
            result.append("~" + token if single else token)
    return [piece.lstrip("~") for piece in result]


TEXTS = {
    "default": "System:\nok\n\nUser:\nHi\n\nAssistant:\nok</s>\n\nUser:\n你好\n\nAssistant:\n好</s>",
    "chatml": "<|im_start|>system\nok<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nok<|im_end|>\n"
    "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n好<|im_end|>",
    "moss": "ok<|Human|>: Hi<eoh>\n<|MOSS|>: ok<eom>\n<|Human|>: 你好<eoh>\n<|MOSS|>: 好<eom>",
    "moss-rlhf-en": "<s>Human:ok\nHi</s>Assistant:ok</s>Human:你好</s>Assistant:好</s>",
    "moss-rlhf-zh": "<s><|Human|>ok\nHi</s><|MOSS|>ok</s><|Human|>你好</s><|MOSS|>好</s>",
}
REPLIES = {
    "default": ["ok", "</s>"],
    "chatml": ["ok", "<|im_end|>"],
    "moss": ["Ġok", "<eom>"],
    "moss-rlhf-en": ["ok", "</s>"],
    "moss-rlhf-zh": ["ok", "</s>"],
}


def preset_tokenizer(name: str) -> PreTrainedTokenizerFast:
    extra = {
        "chatml": ("<|im_start|>", "<|im_end|>"),
        "moss": ("<eoh>", "<eom>", "<eot>", "<eoc>", "<eor>"),
        "moss-rlhf-zh": ("<|Human|>", "<|MOSS|>"),
    }.get(name, ())
    tokenizer = build(bos="<s>" if name.startswith("moss-rlhf") else None, extra=extra)
    assert resolve_chat_template(tokenizer, name) == name
    return tokenizer


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_writes_a_whole_conversation_as_documented(name):
    tokenizer = preset_tokenizer(name)
    ids, _ = encode_conversation(tokenizer, CHAT)
    assert tokenizer.decode(ids) == TEXTS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_the_mask_of_a_preset_is_what_the_assistant_says_and_its_stop_tokens(name):
    tokenizer = preset_tokenizer(name)
    ids, mask = encode_conversation(tokenizer, CHAT)
    said = [i for i, target in zip(ids, mask) if target]
    space = ["Ġ"] if name == "moss" else []
    assert pieces(tokenizer, said) == [*REPLIES[name], *space, "å¥½", REPLIES[name][1]]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("conversation", [CHAT[1:3], CHAT[:3], CHAT])
def test_a_conversation_is_its_prompt_and_its_response(name, conversation):
    tokenizer = preset_tokenizer(name)
    ids, mask = encode_conversation(tokenizer, conversation)
    prompt = encode_prompt(tokenizer, conversation[:-1])
    response = encode_response(tokenizer, conversation[:-1], conversation[-1]["content"])
    assert ids == prompt + response
    assert mask[len(prompt) :] == [True] * len(response)
    # what stock transformers gives the model at inference
    stock = tokenizer.apply_chat_template(conversation[:-1], add_generation_prompt=True, return_dict=False)
    assert prompt == stock


def test_the_ids_of_english_and_chinese_turns_are_known():
    tokenizer = preset_tokenizer("moss-rlhf-zh")
    eos, bos, human, moss = tokenizer.convert_tokens_to_ids(["</s>", "<s>", "<|Human|>", "<|MOSS|>"])
    assert (eos, bos, human, moss) == (266, 267, 268, 269)
    assert encode_prompt(tokenizer, [USER]) == [267, 268, HI, 266, 269]
    assert encode_response(tokenizer, [USER], "ok") == [OK, 266]
    assert encode_prompt(tokenizer, [{"role": "user", "content": "你好"}]) == [267, 268, NI, HAO, 266, 269]
    assert encode_response(tokenizer, [{"role": "user", "content": "你"}], "好") == [HAO, 266]


def test_moss_tool_conversation_is_written_in_its_own_tags():
    tokenizer = preset_tokenizer("moss")
    call = "<|Inner Thoughts|>: ok<eot>\n<|Commands|>: Hi<eoc>"
    messages = [USER, {"role": "assistant", "content": call}, {"role": "tool", "content": "\n4\n"}, ASSISTANT]
    ids, mask = encode_conversation(tokenizer, messages)
    assert tokenizer.decode(ids) == (
        "<|Human|>: Hi<eoh>\n<|Inner Thoughts|>: ok<eot>\n<|Commands|>: Hi<eoc>\n<|Results|>:\n4\n<eor>\n"
        "<|MOSS|>: ok<eom>"
    )
    assert tokenizer.decode([i for i, target in zip(ids, mask) if target]) == call + " ok<eom>"


@pytest.mark.parametrize("results", ["\n4\n", "None", " 4", "<|Results|>: <eor>"])
def test_of_moss_results_the_tags_are_learnt_and_the_content_is_not(results):
    """As finetune_moss.py has it, token by token; its human turns, which it learns too, are masked here."""
    tokenizer = preset_tokenizer("moss")
    call = "<|Inner Thoughts|>: ok<eot>\n<|Commands|>: Hi<eoc>"
    tool = {"role": "tool", "content": results, "weight": 1}
    turn = [USER, {"role": "assistant", "content": call}, tool, ASSISTANT]
    blank = "" if results.startswith("\n") else " "
    parts = [("<|Human|>: Hi<eoh>\n", False), (f"{call}\n<|Results|>:", True), (f"{blank}{results}", False)]
    parts += [("<eor>\n<|MOSS|>: ok<eom>", True)]
    parts = [*parts, ("\n", False), *parts]
    encoded = [(tokenizer(text, add_special_tokens=False)["input_ids"], learnt) for text, learnt in parts]
    ids, mask = encode_conversation(tokenizer, [*turn, *turn])
    assert ids == [i for part, _ in encoded for i in part]
    assert mask == [learnt for part, learnt in encoded for _ in part]


# Shapes of the chat templates of current models, reduced to what matters here.
LLAMA3 = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[I] ' + m['content'] + ' [/I]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
THINKING = (  # the last reply gets an empty thinking block, earlier ones lose it
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '<|eot|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
NO_THINKING = THINKING.replace("{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}", "")
NO_THINKING = NO_THINKING.replace("'<|start|>assistant\n'", "'<|start|>assistant\n<think></think>'")
NO_STOP = (
    "{% for m in messages %}{{ m['role'] + ':\n' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "first", "last"),
    [
        (LLAMA3, "ok<|eot|>", "好<|eot|>"),
        (MISTRAL, " ok</s>", " 好</s>"),
        (THINKING, "ok<|eot|>", "<think></think>好<|eot|>"),
        (NO_THINKING, "ok<|eot|>", "好<|eot|>"),
        (NO_STOP, "ok", "好</s>"),
    ],
)
def test_templates_of_other_shapes_are_masked_too(template, first, last):
    tokenizer = build(extra=("<|eot|>", "<|start|>", "<|end|>"))
    tokenizer.chat_template = template
    assert resolve_chat_template(tokenizer, None) == "the tokenizer's own"
    ids, mask = encode_conversation(tokenizer, CHAT[1:])
    assert tokenizer.decode([i for i, target in zip(ids, mask) if target]) == first + last
    assert ids == encode_prompt(tokenizer, CHAT[1:-1]) + encode_response(tokenizer, CHAT[1:-1], "好")


def test_a_template_that_rewrites_earlier_turns_is_refused_by_turn():
    tokenizer = build()
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m['role'] + m['content'] + eos_token }}{% endfor %}"
    )
    with pytest.raises(UserError, match="before turn 2"):
        encode_conversation(tokenizer, [USER, ASSISTANT])


def test_a_template_that_rewrites_the_reply_is_refused():
    tokenizer = build()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper + eos_token }}{% endfor %}"
    with pytest.raises(UserError, match="does not show the assistant's content"):
        resolve_chat_template(tokenizer, None)


def test_the_templates_own_refusal_names_the_roles():
    tokenizer = build()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{{ m['content'] + eos_token }}{% endfor %}"
    )
    resolve_chat_template(tokenizer, None)
    with pytest.raises(UserError, match="system, user: no system here"):
        encode_prompt(tokenizer, [SYSTEM, USER])


# ------------------------------------------------------------------------------ plain prompts, borders


def test_plain_prompt_keeps_bos_and_gets_no_eos():
    tokenizer = build(bos="<s>", add_bos=True, add_eos=True)
    assert pieces(tokenizer, encode_prompt(tokenizer, "Hi")) == ["<s>", "Hi"]
    assert pieces(tokenizer, encode_response(tokenizer, "Hi", " ok")) == ["Ġok", "</s>"]
    assert pieces(tokenizer, encode_prompt(tokenizer, "Hi</s>")) == ["<s>", "Hi", "</s>"]


def test_a_written_eos_is_not_doubled():
    tokenizer = build()
    assert pieces(tokenizer, encode_response(tokenizer, "Hi", "ok</s>")) == ["ok", "</s>"]


def test_a_token_across_the_border_is_split_there():
    tokenizer = build()
    assert tokenizer("ab")["input_ids"] == [AB]
    prompt, response = encode_prompt(tokenizer, "a"), encode_response(tokenizer, "a", "b")
    assert pieces(tokenizer, prompt + response) == ["ab", "</s>"]  # two tokens, joined by pieces()
    assert len(prompt) == 1 and len(response) == 2 and AB not in prompt + response


def test_a_token_across_the_border_of_an_earlier_turn_is_not_trained_on():
    tokenizer = preset_tokenizer("default")
    messages = [USER, {"role": "assistant", "content": "\nok"}, USER, ASSISTANT]
    ids, mask = encode_conversation(tokenizer, messages)
    assert TWO_LINES in ids
    assert pieces(tokenizer, [i for i, target in zip(ids, mask) if target]) == ["ok", "</s>", "ok", "</s>"]


@pytest.mark.parametrize("pad", [None, "</s>"])
def test_pad_plays_no_part(pad):
    tokenizer = build(pad=pad)
    resolve_chat_template(tokenizer, "default")
    ids, mask = encode_conversation(tokenizer, CHAT)
    assert [target for i, target in zip(ids, mask) if i == tokenizer.eos_token_id] == [True, True]


# ------------------------------------------------------------------------------ resolve and round trip


@pytest.mark.parametrize("name", PRESETS)
def test_template_round_trips_with_the_saved_tokenizer(name, tmp_path):
    tokenizer = preset_tokenizer(name)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.chat_template == tokenizer.chat_template
    assert encode_conversation(loaded, CHAT) == encode_conversation(tokenizer, CHAT)
    assert resolve_chat_template(loaded, None) == "the tokenizer's own"
    assert stop_token_ids(loaded) == stop_token_ids(tokenizer)


def test_default_is_installed_where_there_is_no_template_and_own_is_kept():
    tokenizer = build()
    assert resolve_chat_template(tokenizer, None) == "default"
    assert tokenizer.chat_template == PRESETS["default"]
    tokenizer.chat_template = LLAMA3
    resolve_chat_template(tokenizer, None)
    assert tokenizer.chat_template == LLAMA3


def test_default_begins_with_bos_only_where_the_tokenizer_adds_one():
    adds, has = build(bos="<s>", add_bos=True), build(bos="<s>")
    for tokenizer in (adds, has):
        resolve_chat_template(tokenizer, "default")
    assert encode_prompt(adds, [USER])[0] == adds.bos_token_id
    assert adds.bos_token_id not in encode_prompt(adds, [USER])[1:]
    assert has.bos_token_id not in encode_prompt(has, [USER])


def test_a_template_may_be_a_file(tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text(MISTRAL, encoding="utf-8")
    tokenizer = build()
    assert resolve_chat_template(tokenizer, str(path)) == str(path)
    assert render(tokenizer, [USER], add_generation_prompt=True) == "[I] Hi [/I]"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("chat-ml", "did you mean 'chatml'"),
        ("nothing-like-it.jinja", "presets: default, chatml"),
        ("chatml", "<|im_end|>, which is no token"),
        ("moss", "<eom>, which is no token"),
        ("broken.jinja", "line 2 of the chat template is broken"),
        ("latin.jinja", "must be UTF-8"),
    ],
)
def test_refused_templates_leave_the_tokenizer_as_it_was(name, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jinja").write_text("{% for m in messages %}\n{% endif %}", encoding="utf-8")
    (tmp_path / "latin.jinja").write_bytes(b"caf\xe9")
    tokenizer = build()
    with pytest.raises(UserError) as error:
        resolve_chat_template(tokenizer, name)
    assert says in str(error.value)
    assert tokenizer.chat_template is None


def test_no_eos_is_a_user_error_everywhere():
    tokenizer = build(eos=None)
    for call in (
        lambda: resolve_chat_template(tokenizer, None),
        lambda: encode_response(tokenizer, "Hi", "ok"),
        lambda: stop_token_ids(tokenizer),
    ):
        with pytest.raises(UserError, match="has no EOS token.*eos_token"):
            call()


def test_messages_without_a_template_say_what_to_do():
    with pytest.raises(UserError, match='chat_template="default"'):
        encode_prompt(build(), [USER])


# ------------------------------------------------------------------------------ stop tokens, text form


def test_stop_tokens_are_eos_generation_config_and_end_of_turn():
    tokenizer = preset_tokenizer("chatml")
    eos, end = tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])
    assert stop_token_ids(tokenizer) == sorted([eos, end])
    assert stop_token_ids(tokenizer, GenerationConfig(eos_token_id=7)) == sorted([7, eos, end])
    assert stop_token_ids(tokenizer, GenerationConfig(eos_token_id=[7, 9, eos])) == sorted([7, 9, eos, end])
    assert stop_token_ids(build()) == [eos]


def test_end_of_turn_follows_a_changed_template():
    tokenizer = preset_tokenizer("chatml")
    assert end_of_turn(tokenizer) == "<|im_end|>"
    resolve_chat_template(tokenizer, "default")
    assert end_of_turn(tokenizer) == "</s>"


def test_a_prompt_is_rendered_as_people_read_it():
    assert render_prompt("as it is ") == "as it is "
    assert render_prompt([USER]) == "Hi"
    assert render_prompt(CHAT[:4]) == "system: ok\nuser: Hi\nassistant: ok\nuser: 你好"
