"""--dry-run says what will run: read off the outline and compared with what the trainer then builds and counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastrlhf import PPOConfig, PPOTrainer, cli
from fastrlhf.models import loading, saving
from fastrlhf.preflight import outline
from tests import tiny

RULES = "def length(prompts, responses):\n    return [float(len(r)) for r in responses]\n"
INPUTS = {"policy": "base", "reward": "rm", "prompts": "prompts.jsonl", "output_dir": "out"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """Models without weights: a dry run that opened them would fail."""
    root = tmp_path_factory.mktemp("dry")
    other = tiny.tokenizer()
    other.add_tokens(["moonlight"])
    for name, tok in (("rm", tiny.tokenizer()), ("other_rm", other)):
        saving.write_model(root / name, loading.scalar_model(tiny.llama(vocab_size=len(tok)), tok, seed=0), tok, [1])
    tiny.llama().save_pretrained(root / "base")
    tiny.tokenizer().save_pretrained(root / "base")
    weights = list(root.rglob("*.safetensors"))
    assert len(weights) == 3
    for file in weights:
        file.unlink()
    for name, rows in (("prompts", [{"prompt": p} for p in tiny.PROMPTS]), ("texts", [{"text": "the cat"}])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    (root / "rules.py").write_text(RULES)
    (root / "plain.yaml").write_text("rollout_batch_size: 8\nmini_batch_size: 4\nmax_new_tokens: 6\n")
    return root


@pytest.fixture
def dry(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)

    def lines(recipe: str = "plain.yaml", **fields: object) -> dict[str, str]:
        """The outline by its first words; None leaves an input out."""
        given = [f"{k}={v}" for k, v in {**INPUTS, **fields}.items() if v is not None]
        code = cli.main(["ppo", recipe, *given, "--dry-run"])
        out, err = capsys.readouterr()
        assert code == 0, err
        said = [line[2:] for line in out.splitlines() if line.startswith("# ")]
        return dict(line.split(": ", 1) for line in said if " rows read, " not in line)

    return lines


def test_the_plain_run(dry):
    assert dry() == {
        "policy": "base, all weights trained",
        "reference": "a frozen copy of the policy",
        "critic": "a model of its own, initialised from the reward model rm",
        "reward": "model rm",
        "a step": "8 responses (8 prompts x 1) of up to 6 tokens, then 2 x 2 mini-batches of 4 = 4 optimizer steps",
        "in all": "1000 steps, 8000 responses, 4000 optimizer steps of the policy, 4000 of the critic",
        "advantages": "gae, gamma 1, lambda 0.95, whitened over the step",
        "KL to the reference": "0.05 * k1 off the reward of each token",
        "policy loss": "token ratio clipped to 0.8 .. 1.2, token_mean",
        "evaluation": "every 100 steps, samples only (no eval_prompts)",
    }


@pytest.mark.parametrize(
    ("fields", "line", "text"),
    [
        ({"lora": 8}, "policy", "base, adapters of rank 8 trained on its frozen weights"),
        ({"lora": 8}, "reference", "the policy's weights without adapters"),
        ({"lora": 8}, "critic", "an adapter of its own on the policy's weights, with a head that starts at 0"),
        ({"ref_refresh_every": 50}, "reference",
         "a frozen copy of the policy; after every 50 steps the policy of then takes its place"),
        ({"ref_policy": "base"}, "reference", "base"),
        ({"critic": "shared_trunk"}, "critic", "on the policy's trunk, with a head that starts at 0"),
        ({"value_model": "other_rm"}, "critic", "a model of its own, initialised from value_model other_rm"),
        ({"reward": "rules.py:length"}, "critic",
         "a model of its own, initialised from the policy, with a head that starts at 0 (the reward is no model)"),
        ({"reward": "other_rm"}, "critic",
         "a model of its own, initialised from the policy, with a head that starts at 0 (the reward model reads other "
         "tokens)"),
        ({"reward": "rules.py:length"}, "reward", "function rules.py:length"),
        ({"reward": "[[a, 0.5, rules.py:length], [b, 2, rules.py:length]]"}, "reward", "0.5 * a + 2 * b"),
        ({"advantage": "rloo", "samples_per_prompt": 4}, "critic", "none (rloo does without)"),
        ({"advantage": "rloo", "samples_per_prompt": 4}, "in all",
         "1000 steps, 8000 responses, 4000 optimizer steps of the policy"),
        ({"critic_warmup_steps": 10, "critic_pretrain_epochs": 2}, "critic warm-up",
         "the first 10 steps, the policy is frozen; then 2 passes over their 80 responses, 40 optimizer steps"),
        ({"critic_warmup_steps": 10, "critic_pretrain_epochs": 2}, "in all",
         "1000 steps, 8000 responses, 3960 optimizer steps of the policy, 4040 of the critic"),
        ({"ptx_coef": 2, "ptx_data": "texts.jsonl"}, "ptx",
         "+ 2 * language-model loss of 4 rows of texts.jsonl in each of its optimizer steps"),
        ({"ema_decay": 0.99}, "average of the policy's weights", "decay 0.99 an update; evaluated and saved"),
        ({"kl_in": "loss", "kl_estimator": "k3"}, "KL to the reference", "0.05 * k3 added to the loss"),
        ({"kl_coef": 0}, "KL to the reference", "measured, no part of the objective"),
        ({"kl_controller": "adaptive"}, "KL to the reference",
         "0.05 * k1 off the reward of each token, adapted towards 6 nats a response"),
        ({"reward_scaling": "running_norm", "reward_clip": 3, "whiten_advantages": "false"}, "advantages",
         "gae, gamma 1, lambda 0.95, of scores scaled by running_norm, scores clipped to +-3"),
        ({"clip_range_high": 0.28, "entropy_coef": 0.01, "ratio_level": "sequence"}, "policy loss",
         "sequence ratio clipped to 0.8 .. 1.28, token_mean, - 0.01 * entropy"),
        ({"eval_prompts": "prompts.jsonl"}, "evaluation", "every 100 steps, on prompts.jsonl"),
        ({"eval_every": 0}, "evaluation", "none (eval_every = 0)"),
    ],
)  # fmt: skip
def test_each_option_is_said(dry, fields, line, text):
    assert dry(**fields)[line] == text


def test_what_is_said_of_the_counts_is_what_a_run_counts():
    config = PPOConfig(total_steps=3, rollout_batch_size=6, mini_batch_size=4, ppo_epochs=2, critic_warmup_steps=1,
                       critic_pretrain_epochs=3, max_new_tokens=4, eval_every=0)  # fmt: skip
    said = outline({"policy": "p", "reward": "f.py:x", "prompts": "d"}, config)
    assert "in all: 3 steps, 18 responses, 8 optimizer steps of the policy, 18 of the critic" in said
    t = PPOTrainer(config, policy=tiny.llama(), tokenizer=tiny.tokenizer(), prompts=tiny.PROMPTS,
                   reward=lambda prompts, responses: [1.0] * len(prompts))  # fmt: skip
    t.train()
    assert (t.learner.critic_updates, t.learner.policy_updates) == (18, 8)


@pytest.mark.parametrize("recipe", ["ppo-max", "instructgpt"])
def test_a_recipe_with_ptx_asks_for_its_data(recipe, workplace, monkeypatch, capsys, dry):
    monkeypatch.chdir(workplace)
    assert cli.main(["ppo", recipe, *(f"{k}={v}" for k, v in INPUTS.items()), "--dry-run"]) == 2
    assert "ptx_data: ptx_coef = " in capsys.readouterr().err
    assert "texts.jsonl" in dry(recipe, ptx_data="texts.jsonl")["ptx"]


@pytest.mark.parametrize("recipe", ["moss-released-en", "moss-released-zh", "n-plus-details", "grpo", "dapo", "rloo"])
def test_the_other_recipes_need_no_more_than_their_three_inputs(recipe, dry):
    lines = dry(recipe)
    assert lines["policy"] == "base, all weights trained" and "in all" in lines and "ptx" not in lines
