"""Columns that are part of a prompt are used or refused; recipes map columns of other names, or leave them out."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fastrlhf import PPOConfig, PPOTrainer, SFTConfig
from fastrlhf.config.errors import ConfigError, UserError
from fastrlhf.data.batches import encode_one
from fastrlhf.data.checks import meant
from fastrlhf.data.dataset import load_conversations, load_feedback, load_prompts
from fastrlhf.data.encode import EncodedPrompt, example_steps
from fastrlhf.data.feedback import Prompt, parse_conversation
from fastrlhf.data.templates import encode_conversation, encode_prompt, encode_response
from fastrlhf.rollout.result import make_rollout
from fastrlhf.rollout.sampling import Generation
from tests import tiny

USER = [{"role": "user", "content": "Name a river."}]
SEINE = {"role": "assistant", "content": "La Seine."}
NO = {"role": "assistant", "content": "No."}
FRENCH = {"role": "system", "content": "Answer in French."}
PAIR = {"chosen": "La Seine.", "rejected": "Ebro."}

USED = {
    "pair, text": (load_feedback, {"prompt": "Name a river.", **PAIR}),
    "pair, messages": (load_feedback, {"prompt": USER, **PAIR}),
    "pair, conversations": (load_feedback, {"chosen": [*USER, SEINE], "rejected": [*USER, NO]}),
    "score": (load_feedback, {"prompt": "Name a river.", "response": "La Seine.", "score": 3}),
    "edit": (load_feedback, {"prompt": USER, "response": "Ebro.", "edited": "La Seine."}),
    "sft, text": (load_conversations, {"prompt": "Name a river.", "response": "La Seine."}),
    "sft, messages": (load_conversations, {"messages": [*USER, SEINE]}),
    "sft, instruction": (load_conversations, {"instruction": "Name a river.", "output": "La Seine."}),
    "ppo, text": (load_prompts, {"prompt": "Name a river."}),
    "ppo, messages": (load_prompts, {"messages": USER}),
    "ppo, ShareGPT": (load_prompts, {"conversations": [{"from": "human", "value": "Name a river."}]}),
    "ppo, user_prompt": (load_prompts, {"user_prompt": "Name a river."}),
}


def prompt_of(load, row: dict, **how) -> object:
    [item], _ = load([row], **how)
    if load is not load_conversations:
        return item.prompt
    return item.messages[:-1] if item.messages else item.prompt


@pytest.mark.parametrize("column", ["system", "system_prompt", "developer"])
@pytest.mark.parametrize("name", USED)
def test_a_system_column_is_the_system_message_of_every_form(name, column):
    load, row = USED[name]
    assert prompt_of(load, {**row, column: "Answer in French."}) == [FRENCH, *USER]
    assert prompt_of(load, {**row, column: ""}) == prompt_of(load, row)


@pytest.mark.parametrize("name", USED)
def test_earlier_turns_in_a_history_come_before_what_is_asked(name):
    load, row = USED[name]
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Salut."}]
    assert prompt_of(load, {**row, "history": [["Hi", "Salut."]], "system": "Answer in French."}) == [
        FRENCH,
        *turns,
        *USER,
    ]


@pytest.mark.parametrize(
    ("column", "value"),
    [("tools", [{"name": "w"}]), ("tools", '[{"name": "w"}]'), ("context", "Seine"), ("images", ["a.png"])],
)
@pytest.mark.parametrize("name", USED)
def test_what_cannot_be_used_is_refused_and_left_out_and_counted_where_the_recipe_says_so(name, column, value):
    load, row = USED[name]
    if column == "context" and "instruction" in row:
        assert prompt_of(load, {**row, column: value})[0]["content"] == "Name a river.\nSeine"
        return
    row = {**row, column: value}
    with pytest.raises(UserError, match=f'row 1: field "{column}".*ignore_columns'):
        load([row])
    assert prompt_of(load, row, ignore_columns=[column]) == prompt_of(load, USED[name][1])
    _, counts = load([row, row], ignore_columns=[column])
    assert counts.noted[f'without their column "{column}" (ignore_columns)'] == 2


def test_a_system_column_that_contradicts_another_is_refused():
    with pytest.raises(UserError, match="system_prompt.*besides a system"):
        load_prompts([{"prompt": "Hi", "system": "Be brief.", "system_prompt": "Be long."}])
    assert load_prompts([{"prompt": "Hi", "system": "Be brief.", "system_prompt": "Be brief. "}])[0][0].prompt[1:]


def test_a_reward_function_still_gets_what_is_left_out_of_the_prompt():
    [prompt], _ = load_prompts([{"prompt": "Hi", "context": "Seine", "answer": "4"}], ignore_columns=["context"])
    assert prompt.columns == {"context": "Seine", "answer": "4"}


@pytest.mark.parametrize(
    "row",
    [
        {"text": "Name a river.", "role": "prompter"},
        {"text": "a", "parent_id": "b"},
        {"text": "a", "message_id": "b"},
        {"text": "a", "label": 0},
        {"text": "a", "rank": 0},
        {"text": "a", "system": "Be brief."},
    ],
)
def test_a_text_that_is_part_of_something_is_no_plain_text(row):
    with pytest.raises(UserError, match="is no plain text.*columns: text, .*format=text"):
        load_conversations([row])
    assert load_conversations([row], format="text")[0][0].text == row["text"]


# ------------------------------------------------------------------------------------------------- keys of a message


def learnt(messages: list[dict]) -> str:
    tokenizer = tiny.tokenizer()
    ids, mask = encode_conversation(tokenizer, parse_conversation({"messages": messages}, "file:1").messages)
    assert tokenizer.decode(ids).count("the cat") == 2
    return tokenizer.decode([i for i, target in zip(ids, mask) if target])


@pytest.mark.parametrize("key", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}])
def test_a_turn_of_weight_0_is_read_and_not_learnt(key):
    ask, bad, good = (
        tiny.chat("the cat"),
        {"role": "assistant", "content": "no"},
        {"role": "assistant", "content": "yes"},
    )
    assert learnt([*ask, bad, *ask, good]) == "no<|end|>yes<|end|>"
    assert learnt([*ask, bad | key, *ask, good | {"weight": 1}]) == "yes<|end|>"
    assert learnt([*ask, bad, *ask, good | key]) == "no<|end|>"
    _, counts = load_conversations([{"messages": [*ask, good]}, {"messages": [*ask, bad | key]}])
    assert counts.dropped == {"conversations without a turn to learn: all have weight 0": 1}
    _, counts = load_conversations([{"prompt": ask, "completion": [good]}, {"prompt": ask, "completion": [bad | key]}])
    assert counts.used == 1


def test_a_weight_between_0_and_1_is_refused():
    with pytest.raises(UserError, match="weight 0.5 must be 0"):
        load_conversations([{"messages": [*USER, {**SEINE, "weight": 0.5}]}])


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_learnt_where_the_template_writes_it_and_refused_elsewhere(key):
    tokenizer = tiny.tokenizer()
    [row], _ = load_conversations([{"messages": [*USER, {**SEINE, key: "It is long."}]}])
    with pytest.raises(UserError, match=f"message 2 has {key}"):
        encode_one(tokenizer, example_steps(tokenizer, row))
    written = "{% if m." + key + " %}<think>{{ m." + key + " }}</think>{% endif %}{{ m.content }}"
    tokenizer.chat_template = tiny.CHAT_TEMPLATE.replace("{{ m.content }}", written)
    example = encode_one(tokenizer, example_steps(tokenizer, row))
    text = tokenizer.decode([i for i, target in zip(example.ids, example.target) if target])
    assert text == "<think>It is long.</think>La Seine.<|end|>"
    with pytest.raises(UserError, match=f"{key} of a reply that is judged"):
        load_feedback([{"prompt": USER, "chosen": [{**SEINE, key: "x"}], "rejected": [SEINE]}])


# --------------------------------------------------------------------------------------- tokens that are there already


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that puts <s> in front of every text and </s> behind, as T5's and some Llamas' do."""
    words = {word: i for i, word in enumerate(["<s>", "</s>", "[UNK]", "hi", "there", "yes"])}
    raw = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    specials = [("<s>", 0), ("</s>", 1)]
    raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=specials)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="[UNK]")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    return tokenizer


HI, YES = [{"role": "user", "content": "hi there"}], "yes"


@pytest.mark.parametrize("prompt", ["hi there", "<s>hi there", HI, [{"role": "user", "content": "<s>hi there"}]])
@pytest.mark.parametrize("reply", ["yes", "yes</s>"])
def test_control_tokens_that_a_text_carries_are_not_added_again(prompt, reply):
    tokenizer = word_tokenizer()
    ids = encode_prompt(tokenizer, prompt) + encode_response(tokenizer, prompt, reply)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "hi", "there", "yes", "</s>"]
    column = {"prompt": prompt, "response": reply}
    [row], _ = load_conversations([column])
    example = encode_one(tokenizer, example_steps(tokenizer, row))
    assert example.ids == ids and example.target == [False] * 3 + [True] * 2


@pytest.mark.parametrize("text", ["hi there", "<s>hi there", "hi there</s>", "<s>hi there</s>"])
def test_a_plain_text_has_one_bos_and_one_eos(text):
    [row], _ = load_conversations([{"text": text}])
    tokenizer = word_tokenizer()
    ids = encode_one(tokenizer, example_steps(tokenizer, row)).ids
    assert tokenizer.convert_ids_to_tokens(ids) == [
        "<s>",
        "hi",
        "there",
        "</s>",
    ]


# ------------------------------------------------------------------------------------------------------------ mapping


def test_columns_of_any_name_and_depth_are_mapped_in_every_stage():
    row = {"问题": "Hi", "answers": [{"text": "Yes"}, {"text": "No"}], "system": "Be brief."}
    mapping = {"prompt": "问题", "chosen": "answers.0.text", "rejected": "answers.1.text"}
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    [pair], _ = load_feedback([row], columns=mapping)
    assert (pair.prompt, pair.responses) == (asked, ("Yes", "No"))
    [conversation], _ = load_conversations([row], columns=mapping)
    assert conversation.messages == [*asked, {"role": "assistant", "content": "Yes"}]
    [prompt], _ = load_prompts([row], columns={"prompt": "问题", "truth": "answers.0.text"})
    assert prompt.prompt == asked and prompt.columns["truth"] == "Yes" and prompt.columns["answers"] == row["answers"]


def test_a_mapped_column_takes_the_place_of_one_of_that_name_and_of_its_own():
    [prompt], _ = load_prompts([{"prompt": "old", "history": "Hi"}], columns={"prompt": "history"})
    assert prompt.prompt == "Hi"
    [prompt], _ = load_prompts([{"a.b": "Hi", "a": {"b": "no"}}], columns={"prompt": "a.b"})
    assert prompt.prompt == "Hi"


def test_a_mapped_cell_of_a_csv_file_is_read_as_the_field_that_it_is(tmp_path):
    path = tmp_path / "f.csv"
    path.write_text(
        'question,helpfulness,turns,id\nHi,3,"[{""role"": ""user"", ""content"": ""Hi""}]",7\n', encoding="utf-8"
    )
    [item], _ = load_feedback(path, columns={"prompt": "question", "response": "id", "score": "helpfulness"})
    assert (item.prompt, item.responses, item.scores) == ("Hi", ("7",), (0.0,))
    [prompt], _ = load_prompts(path, columns={"messages": "turns"})
    assert prompt.prompt == [{"role": "user", "content": "Hi"}] and prompt.columns["id"] == "7"


def test_a_mapping_that_finds_nothing_says_what_there_is():
    with pytest.raises(UserError, match=r"columns = system: sytem: no row has such a column; there are: prompt, b"):
        load_prompts([{"prompt": "Hi"}, {"prompt": "Hi", "b": 1}], columns={"system": "sytem"})


@pytest.mark.parametrize("load", [load_conversations, load_feedback, load_prompts])
def test_a_missing_field_offers_the_mapping_with_the_rows_columns(load):
    with pytest.raises(UserError, match=r"field \"\w+\" is missing.*question, solution.*columns=\{\w+: NAME\}"):
        load([{"question": "1+1?", "solution": "2"}])


UNRELATED = {  # what is missing -> columns of other meaning
    "prompt": """prompt_id promptId promptid prompt_source prompt1 id_prompt system_prompt_hash prompts_en prompter prom
    problem product project question query input post topic instructions""",
    "response": """response_1 response1 responseId response_model responder respondent responsive correct_response resp
    reply reason reward source""",
    "chosen": "chosen_rating chosen_model chosenId choice chooser rating_chosen score_chosen chose_by preferred",
    "rejected": "rejected_model reject_reason rejection rejector unrejected",
    "text": "test next context texture title tent text_en textId t te ext",
}
NUMBERS = {
    "score": "score_A score_ratio store core scope scored scorer helpfulness overall_score 5core",
    "margin": "marginal margin_of_error imagine margins_left",
}


@pytest.mark.parametrize("field", [*UNRELATED, *NUMBERS])
def test_no_column_is_proposed_that_cannot_be_meant(field):
    for column in (UNRELATED | NUMBERS)[field].split():
        assert meant(field, {column: 3.5 if field in NUMBERS else "some text"}) is None, column


MISSPELT = {
    "prompt": "promt propmt prommpt prompf Prompt PROMPT prompts Prompt\t promp",
    "response": "reponse respnse resopnse responce Response respons respon",
    "chosen": "choosen chosne choses Chosen chose",
    "rejected": "rejcted rejeced rejectet reject rejectted",
    "text": "txt texts tetx Text tex",
}


@pytest.mark.parametrize("field", MISSPELT)
def test_a_slip_of_the_pen_is_named(field):
    for column in MISSPELT[field].split(" "):
        assert meant(field, {"id": "x", column: "some text"}) == column


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("prompts", value) for value in (3, True, [3], [{"text": "a"}], {"content": "a"})),
        *(("responces", value) for value in ("a", {"role": "assistant"}, 3)),
        *(("responce", value) for value in (3, ["a"], [{"text": "a"}], {"text": "a"})),
        *(("scorre", value) for value in ("3", True, [3])),
        *(("labels", value) for value in (1, 0, "good", [True])),
        *(("texts", value) for value in (["a"], 3)),
    ],
)
def test_a_column_that_cannot_hold_the_field_is_not_proposed(field, value):
    of = {"prompts": "prompt", "responces": "responses", "responce": "response", "scorre": "score", "labels": "label"}
    assert meant(of.get(field, "text"), {field: value}) is None


@pytest.mark.parametrize(
    ("load", "row"),
    [
        (load_conversations, {"prompt": "a", "response_1": "b", "response_2": "c"}),
        (load_conversations, {"prompt": "a", "responder": "b"}),
        (load_conversations, {"instruction": "a", "completions": [{"response": "b"}]}),
        (load_feedback, {"prompt": "a", "response": "b", "score_A": 3}),
        (load_feedback, {"history": "a", "labels": 1}),
        (load_prompts, {"promptId": "x"}),
    ],
)
def test_an_error_proposes_no_column_that_cannot_be_meant(load, row):
    with pytest.raises(UserError) as error:
        load([row])
    assert "did you mean" not in str(error.value)


def test_the_fields_are_typed_on_the_command_line_and_in_yaml():
    config = SFTConfig(columns="{prompt: question, response: answers.0.text}", ignore_columns="system, tools")
    assert config.columns == {"prompt": "question", "response": "answers.0.text"}
    assert config.ignore_columns == ["system", "tools"]
    assert PPOConfig(columns="prompt: question").columns == {"prompt": "question"}
    assert PPOConfig(columns="none", ignore_columns="none").columns is None
    with pytest.raises(ConfigError, match="columns = 'question': expected a mapping"):
        PPOConfig(columns="question")


# ------------------------------------------------------------------------------------------------ columns of a rollout


def test_every_prompt_has_the_columns_of_all_rows():
    rows = [{"prompt": "chat"}, "plain", {"prompt": "sum", "answer": "4"}, {"prompt": "x", "unit": "m"}]
    prompts, _ = load_prompts(rows)
    assert [p.columns for p in prompts] == [
        {"answer": None, "unit": None},
        {"answer": None, "unit": None},
        {"answer": "4", "unit": None},
        {"answer": None, "unit": "m"},
    ]


def test_a_reward_function_gets_every_column_in_every_step():
    seen = []

    def reward(prompts, responses, answer="none was given"):
        seen.extend(zip(prompts, answer, strict=True))
        return [0.0] * len(responses)

    rows = [{"prompt": f"chat {i}"} for i in range(3)] + [{"prompt": "sum", "answer": "4"}]
    config = PPOConfig(total_steps=4, rollout_batch_size=1, mini_batch_size=1, max_new_tokens=2, eval_every=0)
    for _ in PPOTrainer(config, policy=tiny.llama(), tokenizer=tiny.tokenizer(), reward=reward, prompts=rows):
        pass
    assert sorted(seen, key=str) == [("chat 0", None), ("chat 1", None), ("chat 2", None), ("sum", "4")]


def test_a_rollout_takes_the_names_of_its_columns_from_all_of_its_prompts():
    prompts = [EncodedPrompt(Prompt("a"), [5]), EncodedPrompt(Prompt("b", {"answer": "4"}), [6])]
    rewards = [torch.zeros(1)] * 2
    sampled = Generation([[7], [8]], log_probs=rewards, policy_log_probs=rewards, finished=[True, True])
    rollout = make_rollout(tiny.tokenizer(), prompts, 1, sampled, joined=False)
    assert rollout.texts.columns == {"answer": [None, "4"]}


def test_a_name_to_ignore_that_no_row_has_is_an_error():
    rows = [{"prompt": "a", "context": "b"}, {"prompt": "c", "tools": []}]
    assert len(load_prompts(rows, ignore_columns=["context", "tools"])[0]) == 2
    with pytest.raises(UserError, match="ignore_columns = nope: no row has such a column; there are: prompt, context"):
        load_prompts(rows, ignore_columns=["context", "nope"])
