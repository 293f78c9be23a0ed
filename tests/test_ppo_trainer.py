"""PPOTrainer as people use it: reward models, critics, evaluation, prompts, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastrlhf import RewardConfig, RewardTrainer, UserError
from fastrlhf.models import loading, saving
from fastrlhf.rl.scorers import Scores, score_texts
from tests import tiny
from tests.runs import experience_of
from tests.test_ppo import PROMPTS, config, same, trainer, weights

# -------------------------------------------------------------------------------------------- reward model and critic


@pytest.fixture
def reward_folder(tmp_path) -> Path:
    rows = [{"prompt": p, "chosen": "yes", "rejected": "no no no"} for p in PROMPTS] * 2
    cfg = RewardConfig(total_steps=2, mini_batch_size=4, learning_rate=1e-3, eval_every=0)
    t = RewardTrainer(cfg, model=tiny.llama(), tokenizer=tiny.tokenizer(), data=rows)
    t.train()
    t.save(tmp_path / "rm")
    return tmp_path / "rm"


def test_the_critic_starts_as_the_reward_model_and_a_step_runs(reward_folder):
    t = trainer(reward=str(reward_folder))
    assert same(weights(t.value_model), weights(t.scorer.model))
    frozen = weights(t.scorer.model)
    t.train()
    assert same(frozen, weights(t.scorer.model)) and not same(frozen, weights(t.value_model))


def test_without_a_reward_model_the_critic_starts_as_the_policy():
    t = trainer()
    assert t.value_model is not t.policy
    assert same(weights(t.value_model.base_model), weights(t.policy.base_model))
    assert float(t.value_model.score.weight.detach().abs().sum()) == 0.0


@pytest.mark.parametrize("loaded", [False, True])
def test_the_critic_starts_as_the_value_model_that_is_given(reward_folder, tmp_path, loaded):
    """A folder or a loaded model, whatever the reward is."""
    given = loading.scalar_model(tiny.llama(seed=3), tiny.tokenizer(), seed=3)
    start = weights(given)
    saving.write_model(tmp_path / "critic", given, tiny.tokenizer(), [1])
    t = trainer(reward=str(reward_folder), value_model=given if loaded else str(tmp_path / "critic"))
    assert same(weights(t.value_model), start) and (t.value_model is given) == loaded
    t.train()
    assert not same(weights(t.value_model), start)


def test_a_reward_model_scores_the_same_ids_it_was_trained_on(reward_folder):
    t = trainer(reward=str(reward_folder))
    step = next(iter(t))
    done = [i for i, f in enumerate(step.rollout.finished) if f]
    ids = [t.tokenizer(step.rollout.responses[i], add_special_tokens=False)["input_ids"] for i in done]
    canonical = [i for i, own in zip(done, ids) if [*own, 1] == step.rollout.response_ids[i]]
    scores = score_texts(
        t.scorer.model, t.tokenizer, [step.rollout.texts.raw_prompts[i] for i in canonical],
        [step.rollout.responses[i] for i in canonical],
    )  # fmt: skip
    assert [step.rollout.scores[i] for i in canonical] == pytest.approx(scores, abs=1e-5)


def test_without_a_reward_model_values_start_at_zero():
    t = trainer()
    rollout = t.rollout(t.prompts[:2], 1, purpose="rollout")
    experience, *_ = experience_of(t, rollout, Scores([0.0, 0.0], None))
    assert experience.values.abs().sum() == 0


def test_a_reward_model_with_another_tokenizer_gets_text(tmp_path):
    from tokenizers import pre_tokenizers

    other = tiny.tokenizer()
    other.add_tokens(["moonlight"])
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model = loading.scalar_model(tiny.llama(vocab_size=len(other)), other, seed=1)
    saving.write_model(tmp_path / "rm", model, other, [1])
    t = trainer(reward=str(tmp_path / "rm"))
    assert not t.scorer.same_tokenizer
    step = next(iter(t))
    assert len([s for s in step.rollout.scores if s is not None]) == 8
    assert loading.is_scalar_model(t.value_model) and float(t.value_model.score.weight.detach().abs().sum()) >= 0


# ------------------------------------------------------------------------------------------------------------ the rest


def test_evaluation_uses_the_same_random_numbers_and_keeps_the_best(tmp_path):
    cfg = config(
        total_steps=4, eval_every=2, learning_rate=0.0, critic_learning_rate=0.0, output_dir=str(tmp_path / "r")
    )
    t = trainer(cfg, eval_prompts=PROMPTS[:3])
    t.train()
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    evals = {row["step"]: row["reward/eval"] for row in rows if "reward/eval" in row}
    assert set(evals) == {0, 2, 4} and len(set(evals.values())) == 1
    assert (tmp_path / "r" / "best" / "model.safetensors").exists()
    samples = [json.loads(line) for line in (tmp_path / "r" / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in samples} == {0, 2, 4}


def test_prompts_that_are_too_long_are_dropped_and_counted(tmp_path):
    cfg = config(total_steps=1, max_prompt_tokens=14, output_dir=str(tmp_path / "r"))
    t = trainer(cfg, prompts=[*PROMPTS, "moon " * 40])
    assert len(t.prompts) < 7
    assert "longer than max_prompt_tokens = 14" in (tmp_path / "r" / "log.txt").read_text()
    with pytest.raises(UserError, match="every prompt is longer than max_prompt_tokens = 2"):
        trainer(config(max_prompt_tokens=2))


def test_string_prompts_are_a_users_messages_or_tokenised_as_they_are():
    for prompt_format, prompt in (("raw", "the cat sat"), ("auto", "<|user|>the cat sat<|end|><|assistant|>")):
        t = trainer(config(prompt_format=prompt_format), prompts=["the cat sat"])
        assert t.prompts[0][1] == t.tokenizer(prompt)["input_ids"]


def test_pad_equal_to_eos_changes_nothing():
    """Masks come from lengths: the EOS a policy samples is trained on even if it is also the padding token."""
    runs = []
    for pad_is_eos in (False, True):
        t = trainer(tok=tiny.tokenizer(pad_is_eos=pad_is_eos), prompts=[tiny.chat("the<|end|>cat"), tiny.chat("moon")])
        runs.append([s.metrics for s in t])
    assert runs[0] == runs[1]


def test_the_loop_may_belong_to_the_user(tmp_path):
    t = trainer(config(total_steps=2))
    steps = list(t)
    assert [len(s.rollout.responses) for s in steps] == [8, 8] and "reward/mean" in steps[0].metrics
    t.save(tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
    } <= names


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"reward": "no/such/folder"}, "no/such/folder"),
        ({"reward": 3}, "reward"),
        ({"reward": "nomodule_x:fn"}, "nomodule_x"),
        ({"prompts": []}, "prompts|empty|no rows"),
        ({"prompts": [{"promt": "a"}]}, "prompt"),
        ({"policy": "/no/such/model"}, "/no/such/model"),
    ],
)
def test_mistakes_are_found_before_training(inputs, message):
    with pytest.raises(UserError, match=message):
        trainer(**inputs)
