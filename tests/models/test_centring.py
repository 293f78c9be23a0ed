"""A reward model that is centred on SFT replies: the constant lies beside the weights and is in every score."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from fastrlhf import RewardConfig, UserError
from fastrlhf.config.recipe import load_recipe
from fastrlhf.data.templates import encode_prompt
from fastrlhf.inference import score
from fastrlhf.models.loading import load_reward_model
from fastrlhf.models.reward_folder import bias_of
from tests import tiny
from tests.runs import ANSWERS, PROMPTS, ROWS, leave_after, ppo_trainer, read, reward_trainer, same

TEXTS = [prompt[0]["content"] for prompt in PROMPTS]
MESSAGES = [{"messages": [*p, {"role": "assistant", "content": a}]} for p, a in zip(PROMPTS, ANSWERS)]


def centred(folder, **fields: object) -> str:
    t = reward_trainer(center_rewards=True, sft_data=ROWS, learning_rate=1e-2, total_steps=3, **fields)
    t.train()
    t.save(folder)
    return str(folder)


@pytest.mark.parametrize("rows", [ROWS, MESSAGES], ids=["pairs", "messages"])
def test_the_replies_of_sft_score_zero_on_average(tmp_path, rows):
    t = reward_trainer(center_rewards=True, sft_data=rows, learning_rate=1e-2, total_steps=3)
    t.train()
    before = [p.clone() for p in t.model.state_dict().values()]
    t.save(tmp_path / "rm")
    assert same(before, list(t.model.state_dict().values())) and t.model.score.bias is None
    scores = score(str(tmp_path / "rm"), PROMPTS, ANSWERS)
    assert sum(scores) / len(scores) == pytest.approx(0.0, abs=1e-6) and max(map(abs, scores)) > 0.01
    kept = json.loads((tmp_path / "rm" / "score_bias.json").read_text(encoding="utf-8"))
    assert kept["sft_replies"] == len(rows) and abs(kept["bias"]) > 1e-3 and "stock transformers" in kept["note"]
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    tokenizer = tiny.tokenizer()
    ids = encode_prompt(tokenizer, PROMPTS[0]) + tokenizer(ANSWERS[0] + "<|end|>")["input_ids"]
    raw = float(stock(torch.tensor([ids])).logits.detach()[0, 0])
    assert scores[0] == pytest.approx(raw + kept["bias"], abs=1e-5)


def test_ppo_reads_the_bias_as_reward_and_as_critic_and_resumes(tmp_path):
    folder = centred(tmp_path / "rm")
    bias = json.loads((tmp_path / "rm" / "score_bias.json").read_text(encoding="utf-8"))["bias"]
    fields = {"reward": folder, "total_steps": 2, "save_every": 1, "missing_eos_score": -1.0}
    t = ppo_trainer(**fields, output_dir=str(tmp_path / "run"))
    rollout = t.rollout([t.prompts[0]], 2, purpose="rollout")
    plain = load_reward_model(folder, centred=False)
    ids = torch.tensor([rollout.rows.whole(0)])
    with torch.no_grad():
        want = float(plain(ids).logits[0, 0]) + bias
    assert t.scorer(rollout).values[0] == pytest.approx(want, abs=1e-5)
    assert float(t.critic.head.bias.detach()) == pytest.approx(bias) and t.critic.head.bias.requires_grad
    leave_after(t, 1)
    again = ppo_trainer(**fields, output_dir=str(tmp_path / "run"), resume=True)
    assert again.steps_done == 1 and torch.equal(again.critic.head.bias, t.critic.head.bias)
    again.train()
    assert all(math.isfinite(row["value/loss"]) for row in read(tmp_path / "run" / "metrics.jsonl") if row["step"])


def test_an_adapter_has_it_too_beside_its_head_and_merged(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    t = reward_trainer(
        model=str(tmp_path / "base"), lora=2, center_rewards=True, sft_data=ROWS, learning_rate=1e-2, total_steps=3
    )
    t.train()
    t.save(tmp_path / "merged")
    t.save(tmp_path / "adapter", adapter=True)
    merged, alone = (score(str(tmp_path / name), PROMPTS, ANSWERS) for name in ("merged", "adapter"))
    assert alone == pytest.approx(merged, abs=1e-4) and sum(alone) == pytest.approx(0.0, abs=1e-4)
    shared = ppo_trainer(policy=str(tmp_path / "base"), reward=str(tmp_path / "adapter"), lora=2)
    rollout = shared.rollout([shared.prompts[0]], 1, purpose="rollout")
    rows = [rollout.rows.whole(0)]
    with torch.no_grad():
        model = load_reward_model(str(tmp_path / "adapter"))
        hidden = model.base_model(torch.tensor(rows)).last_hidden_state[0, -1]
        want = float(model.score(hidden))
    assert shared.scorer(rollout).values == [pytest.approx(want, abs=1e-4)]


def test_training_goes_on_from_the_raw_output(tmp_path):
    folder = centred(tmp_path / "rm")
    again = reward_trainer(model=folder, total_steps=1)
    assert again.model.score.bias is None
    again.train()
    again.save(tmp_path / "next")
    assert not (tmp_path / "next" / "score_bias.json").exists()


def test_without_the_option_no_file_is_written(tmp_path):
    t = reward_trainer(total_steps=1)
    t.train()
    t.save(tmp_path / "rm")
    assert not (tmp_path / "rm" / "score_bias.json").exists()


def test_center_rewards_and_sft_data_need_each_other():
    with pytest.raises(UserError, match="center_rewards = true: needs replies whose mean score is 0; give sft_data"):
        reward_trainer(center_rewards=True)
    with pytest.raises(
        UserError, match="center_rewards = false: sft_data would never be used; set center_rewards=true"
    ):
        reward_trainer(sft_data=ROWS)


def test_rows_without_a_reply_are_named():
    with pytest.raises(UserError, match="row 1: plain text has no reply that a reward model could judge"):
        reward_trainer(center_rewards=True, sft_data=[{"text": "the moon"}])


@pytest.mark.parametrize("text", ["{", '{"bias": null}', '{"bias": true}', "[]", '{"bias": NaN}', '{"bias": "1"}'])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, text):
    folder = centred(tmp_path / "rm")
    (tmp_path / "rm" / "score_bias.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="score_bias.json: holds no finite number `bias`; train the reward model anew"):
        load_reward_model(folder)


def test_a_recipe_may_name_it():
    given = ["model=m", "data=d.jsonl", "sft_data=s.jsonl", "center_rewards=true", "output_dir=out"]
    named, config = load_recipe("reward", None, given)
    assert named["sft_data"] == "s.jsonl" and config == RewardConfig(center_rewards=True, output_dir="out")


def test_the_centre_of_a_model_of_the_hub_is_looked_for_there(tmp_path, monkeypatch):
    asked = []
    (tmp_path / "score_bias.json").write_text('{"bias": -1.5}')

    def cached_file(name: str, file: str, **_: bool) -> str | None:
        asked.append((name, file))
        return str(tmp_path / file) if name == "org/centred" else None

    monkeypatch.setattr("fastrlhf.models.reward_folder.cached_file", cached_file)
    assert float(bias_of("org/centred")) == -1.5 and bias_of("org/plain") is None and bias_of(tmp_path / "no") is None
    assert asked == [("org/centred", "score_bias.json"), ("org/plain", "score_bias.json")]
