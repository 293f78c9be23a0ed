"""Whether a string prompt is a user's message is one decision: made once, said, and kept with the model."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from fastrlhf import PPOConfig, PPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer, inference
from fastrlhf.data.encode import Encoder
from fastrlhf.data.prompt_format import KEY, as_asked, decide
from fastrlhf.data.templates import encode_prompt, encode_response, settle_template
from tests import tiny

HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: the cat\n\nAssistant:"
HH_TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "the cat"},
]


def base_tokenizer():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def settled(tokenizer, prompt_format: str = "auto", name: str | None = None):
    settle_template(tokenizer, name, prompt_format)
    return tokenizer


@pytest.mark.parametrize(
    ("make", "prompt_format", "name", "prompt", "asked"),
    [
        (tiny.tokenizer, "auto", None, "the cat", tiny.chat("the cat")),
        (tiny.tokenizer, "raw", None, "the cat", "the cat"),
        (base_tokenizer, "auto", None, "the cat", "the cat"),
        (base_tokenizer, "auto", "default", "the cat", tiny.chat("the cat")),
        (base_tokenizer, "chat", None, "the cat", tiny.chat("the cat")),
        # Marks of the template, by its control tokens or in plain text; words that are none.
        (tiny.tokenizer, "auto", None, "<|user|>the cat<|end|><|assistant|>", "<|user|>the cat<|end|><|assistant|>"),
        (base_tokenizer, "auto", "default", "User:\nthe cat\n\nAssistant:\n", "User:\nthe cat\n\nAssistant:\n"),
        (base_tokenizer, "auto", "default", "System:\nBe brief.\n\nUser:\nx\n\nAssistant:", None),
        (tiny.tokenizer, "auto", None, "who is my assistant", tiny.chat("who is my assistant")),
        (tiny.tokenizer, "auto", None, "if a < b and c > d", tiny.chat("if a < b and c > d")),
        (tiny.tokenizer, "chat", None, "a<|end|>", tiny.chat("a<|end|>")),
        # Transcripts.
        (tiny.tokenizer, "auto", None, HH, HH_TURNS),
        (base_tokenizer, "auto", None, HH, HH_TURNS),
        (tiny.tokenizer, "raw", None, HH, HH),
        (base_tokenizer, "auto", None, HH + " Sure", HH + " Sure"),
        (tiny.tokenizer, "auto", None, HH.strip(), HH_TURNS),
        (tiny.tokenizer, "auto", None, HH.strip().replace("\n\n", "\n"), HH_TURNS),
        (tiny.tokenizer, "auto", None, HH.replace("Human", "User") + " \n", HH_TURNS),
        (tiny.tokenizer, "auto", None, "Human: rights are old", tiny.chat("Human: rights are old")),
        (
            tiny.tokenizer,
            "auto",
            None,
            "User: a\nAssistant: b\nShorten it.",
            tiny.chat("User: a\nAssistant: b\nShorten it."),
        ),
        (tiny.tokenizer, "chat", None, "User: the cat\nAssistant:", tiny.chat("the cat")),
        (base_tokenizer, "auto", "default", "User:\nthe cat\n\nAssistant:", "User:\nthe cat\n\nAssistant:"),
        (tiny.tokenizer, "raw", None, HH_TURNS, HH_TURNS),
    ],
)
def test_a_prompt_is_read_as_the_tokenizer_and_the_recipe_say(make, prompt_format, name, prompt, asked):
    tokenizer = settled(make(), prompt_format, name)
    assert as_asked(tokenizer, prompt) == (prompt if asked is None else asked)


def test_a_string_and_its_message_have_the_same_ids_in_prompt_and_reply():
    tokenizer = settled(tiny.tokenizer())
    assert encode_prompt(tokenizer, "the cat") == encode_prompt(tokenizer, tiny.chat("the cat"))
    assert encode_response(tokenizer, "the cat", "yes") == encode_response(tokenizer, tiny.chat("the cat"), "yes")
    for reply in (" yes", "\n\nAssistant: yes"):
        assert encode_response(tokenizer, HH, reply) == encode_response(tokenizer, HH_TURNS, "yes")
    assert encode_response(tokenizer, "the cat", "Assistant: yes") != encode_response(tokenizer, "the cat", "yes")
    ready = "<|user|>the cat<|end|><|assistant|>"
    assert encode_prompt(tokenizer, ready) == encode_prompt(tokenizer, "the cat")


def test_a_line_says_of_every_form_what_happened():
    tokenizer = settled(tiny.tokenizer())
    prompts = ["a", "b", "<|user|>c", HH, {"prompt": tiny.chat("d")}]
    read = Encoder(PPOConfig(), tokenizer, "the tokenizer's chat template").prompts(prompts, "prompts")
    assert read.forms == [
        "prompts: 2 string prompts: through the tokenizer's chat template",
        "prompts: 1 rendered prompts: raw text, because they hold control tokens or role marks of the template",
        "prompts: 1 transcripts: through the tokenizer's chat template, as messages",
        "prompts: 1 conversations: through the tokenizer's chat template",
    ]
    read = Encoder(PPOConfig(), settled(base_tokenizer()), "x").prompts(["a"], "prompts")
    assert read.forms == ["prompts: 1 raw prompts: raw text, without a chat template"]


def test_the_decision_is_kept_in_the_folder_and_a_run_that_differs_says_so(tmp_path):
    settled(base_tokenizer()).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_template and settle_template(tokenizer, None)[1] == []
    assert as_asked(tokenizer, "the cat") == "the cat"
    [line] = settle_template(tokenizer, None, "chat")[1]
    assert line == "prompt_format = chat: this run reads string prompts so, the model's folder says raw"
    tokenizer.init_kwargs[KEY] = "nonsense"
    with pytest.raises(ValueError, match="expected one of chat, raw"):
        decide(tokenizer, "auto", has_template=True)


def save(trainer, folder) -> str:
    trainer.save(folder)
    return str(folder)


@pytest.mark.parametrize("make", [tiny.tokenizer, base_tokenizer])
def test_all_stages_and_score_read_a_string_prompt_alike(make, tmp_path):
    row = {"prompt": "the cat", "chosen": "yes", "rejected": "no"}
    small = {"total_steps": 1, "mini_batch_size": 1, "eval_every": 0}
    sft = SFTTrainer(SFTConfig(**small), model=tiny.llama(), tokenizer=make(), data=[row])
    policy = save(sft, tmp_path / "sft")
    reward = RewardTrainer(RewardConfig(**small), model=policy, data=[row])
    reward_model = save(reward, tmp_path / "rm")
    config = PPOConfig(**small, rollout_batch_size=1, max_new_tokens=2)
    ppo = PPOTrainer(config, policy=policy, reward=reward_model, prompts=["the cat"])
    chat = make is tiny.tokenizer
    tokenizer = make()
    expected = "<|user|>the cat<|end|><|assistant|>" if chat else "the cat"
    assert tokenizer.decode(ppo.prompts[0].ids) == expected
    assert tokenizer.decode(sft.items[0].ids) == expected + "yes<|end|>"
    assert reward.items[0].rows == [sft.items[0].ids, ppo.prompts[0].ids + tokenizer("no<|end|>")["input_ids"]]
    same = ["the cat"] if not chat else ["<|user|>the cat<|end|><|assistant|>"]
    assert inference.score(reward_model, ["the cat"], ["yes"]) == inference.score(reward_model, same, ["yes"], raw=True)
    stock = AutoTokenizer.from_pretrained(policy)
    assert stock("the cat")["input_ids"] == tokenizer("the cat")["input_ids"]


def test_a_reward_model_that_reads_prompts_otherwise_is_named(tmp_path, capsys):
    small = {"total_steps": 1, "mini_batch_size": 1, "eval_every": 0}
    data = [{"prompt": "the cat", "chosen": "yes", "rejected": "no"}]
    config = RewardConfig(**small, prompt_format="raw")
    folder = save(RewardTrainer(config, model=tiny.llama(), tokenizer=tiny.tokenizer(), data=data), tmp_path)
    config = PPOConfig(**small, rollout_batch_size=1, max_new_tokens=2)
    capsys.readouterr()
    for reward in ([("rm", 1.0, folder), ("none", 1.0, lambda prompts, responses: [0.0])], folder):
        PPOTrainer(config, policy=tiny.llama(), tokenizer=tiny.tokenizer(), reward=reward, prompts=["the cat"])
        printed = capsys.readouterr().out
        assert "reward: its folder says prompt_format = raw, this run reads prompts as chat" in printed
    assert "prompts: 1 string prompts: through the tokenizer's chat template" in printed


def test_a_base_model_that_learnt_from_conversations_chats_afterwards(tmp_path):
    small = {"total_steps": 1, "mini_batch_size": 1, "eval_every": 0}
    data = [{"prompt": tiny.chat("the cat"), "response": "yes"}]
    trainer = SFTTrainer(SFTConfig(**small), model=tiny.llama(), tokenizer=base_tokenizer(), data=data)
    trainer.save(tmp_path)
    tokenizer = settled(AutoTokenizer.from_pretrained(tmp_path))
    assert as_asked(tokenizer, "the cat") == tiny.chat("the cat")
