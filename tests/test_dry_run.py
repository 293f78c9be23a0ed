"""--dry-run says what will run: read off the outline and compared with what the trainer then builds and counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastrlhf import PPOConfig, PPOTrainer, cli
from fastrlhf.models import loading, saving
from fastrlhf.models.reward_folder import HeldOut
from fastrlhf.preflight.outline import sizes
from tests import tiny

RULES = "def length(prompts, responses):\n    return [float(len(r)) for r in responses]\n"
LONG = {"max_position_embeddings": 32768}  # for the prompts and replies of every recipe
INPUTS = {"policy": "base", "reward": "rm", "prompts": "prompts.jsonl", "output_dir": "out"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """Models without weights: a dry run that opened them would fail."""
    root = tmp_path_factory.mktemp("dry")
    other = tiny.tokenizer()
    other.add_tokens(["moonlight"])
    for name, tok in (("rm", tiny.tokenizer()), ("other_rm", other)):
        saving.write_model(
            root / name, loading.scalar_model(tiny.llama(vocab_size=len(tok), **LONG), tok, seed=0), tok, [1]
        )
    tiny.llama(**LONG).save_pretrained(root / "base")
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
        about_rows = ("prompts: ", "ptx_data: ", "output_dir: ", "memory: ")
        return dict(line.split(": ", 1) for line in said if not line.startswith(about_rows))

    return lines


def test_the_plain_run(dry):
    assert dry() == {
        "reference": "a frozen copy of the policy",
        "critic": "a model of its own, initialised from the reward model rm",
        "reward": "model rm",
        "a step": "8 responses (8 prompts x 1) of up to 6 tokens, then 2 x 2 mini-batches of 4",
        "in all": "1000 steps, 8000 responses, 4000 optimizer steps of the policy, 4000 of the critic, "
        "up to 48k new tokens",
    }


RLOO = {"advantage": "rloo", "samples_per_prompt": 4}
WARMUP = {"critic_warmup_steps": 10, "critic_pretrain_epochs": 2}
WEIGHTED = "[[a, 0.5, rules.py:length], [b, 2, rules.py:length]]"
MIXED = "[[a, 0.5, rules.py:length], {name: b, weight: 2, model: rm}]"
FROM_POLICY = "a model of its own, initialised from the policy, with a new head"
SAID = [
    ({"lora": 8}, "reference", "the policy's base without adapters"),
    ({"lora": 8}, "critic", "a new adapter on the policy's base, with a new head"),
    ({"ref_policy": "base"}, "reference", "base"),
    ({"critic": "shared_trunk"}, "critic", "a new head on the policy's trunk"),
    ({"value_model": "rm"}, "critic", "a model of its own, initialised from value_model rm"),
    ({"reward": "rules.py:length"}, "critic", f"{FROM_POLICY} (the reward is no model)"),
    ({"reward": "other_rm"}, "critic", f"{FROM_POLICY} (the reward model reads other tokens)"),
    ({"reward": "rules.py:length"}, "reward", "function rules.py:length"),
    ({"reward": WEIGHTED}, "reward", "0.5 * a + 2 * b"),
    ({"reward": MIXED}, "reward", "0.5 * a + 2 * b"),
    (RLOO, "critic", "none (rloo does without)"),
    (RLOO, "a step", "8 responses (2 prompts x 4) of up to 6 tokens, then 2 x 2 mini-batches of 4"),
    (RLOO, "in all", "1000 steps, 8000 responses, 4000 optimizer steps of the policy, up to 48k new tokens"),
    (
        WARMUP,
        "critic warm-up",
        "10 steps with a frozen policy, then 2 passes over their 80 responses, 40 optimizer steps",
    ),
    (
        WARMUP,
        "in all",
        "1000 steps, 8000 responses, 3960 optimizer steps of the policy, 4040 of the critic, up to 48k new tokens",
    ),
]


@pytest.mark.parametrize(("fields", "line", "text"), SAID)
def test_roles_and_sizes_are_said(dry, fields, line, text):
    assert dry(**fields)[line] == text


def test_adapters_on_one_base_are_said(dry, workplace):
    """An adapter as the policy is part of the reference; a reward adapter on the policy's base shares it."""
    for name, kind in (("policy_adapter", "CAUSAL_LM"), ("reward_adapter", "SEQ_CLS")):
        (workplace / name).mkdir()
        fields = {"peft_type": "LORA", "base_model_name_or_path": "base", "task_type": kind, "r": 4, "lora_alpha": 8}
        (workplace / name / "adapter_config.json").write_text(json.dumps(fields))
    lines = dry(lora=4, policy="policy_adapter", reward="reward_adapter")
    assert lines["reference"] == "the policy's base with the adapter it starts from"
    assert lines["reward"] == "reward_adapter, an adapter on the policy's base"
    assert lines["critic"].endswith("with a new head (or the reward model's, where layers and ranks agree)")


def test_a_reward_model_that_ranks_by_chance_is_said(dry, workplace):
    record = workplace / "rm" / "held_out.json"
    record.write_text(HeldOut(9, 1, 8, accuracy=0.5).text())
    assert dry()["alarm"].startswith("the reward model 'rm' ranks 50.0% of 8 held-out pairs")
    record.unlink()


def test_the_rows_read_used_and_dropped_of_each_input_are_said(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    (workplace / "bad.jsonl").write_text('{"prompt": "good"}\n{"promt": "bad"}\n')
    given = [f"{k}={v}" for k, v in {**INPUTS, "prompts": "bad.jsonl", "eval_prompts": "prompts.jsonl"}.items()]
    assert cli.main(["ppo", "plain.yaml", *given, "--skip-bad-rows", "--dry-run"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if " rows read, " in line]
    assert said[0].startswith("# prompts: 2 rows read, 1 used, dropped: 1 malformed; first malformed: bad.jsonl:2")
    assert said[1].startswith(f"# eval_prompts: {len(tiny.PROMPTS)} rows read, {len(tiny.PROMPTS)} used")


def test_what_is_said_of_the_counts_is_what_a_run_counts():
    config = PPOConfig(
        total_steps=3,
        rollout_batch_size=6,
        mini_batch_size=4,
        ppo_epochs=2,
        critic_warmup_steps=1,
        critic_pretrain_epochs=3,
        max_new_tokens=4,
        eval_every=0,
    )
    said = "\n".join(sizes(config))
    assert "in all: 3 steps, 18 responses, 8 optimizer steps of the policy, 18 of the critic" in said
    inputs = {"policy": tiny.llama(), "tokenizer": tiny.tokenizer(), "prompts": tiny.PROMPTS}
    t = PPOTrainer(config, reward=lambda prompts, responses: [1.0] * len(prompts), **inputs)
    t.train()
    assert (t.learner.critic_updates, t.learner.policy_updates) == (18, 8)


@pytest.mark.parametrize("recipe", ["ppo-max", "instructgpt"])
def test_a_recipe_with_ptx_asks_for_its_data(recipe, workplace, monkeypatch, capsys, dry):
    monkeypatch.chdir(workplace)
    assert cli.main(["ppo", recipe, *(f"{k}={v}" for k, v in INPUTS.items()), "--dry-run"]) == 2
    assert "ptx_data: ptx_coef = " in capsys.readouterr().err
    assert "in all" in dry(recipe, ptx_data="texts.jsonl")


@pytest.mark.parametrize("recipe", ["moss-released-en", "moss-released-zh", "n-plus-details", "grpo", "dapo", "rloo"])
def test_the_other_recipes_need_no_more_than_their_three_inputs(recipe, dry):
    assert "in all" in dry(recipe)
