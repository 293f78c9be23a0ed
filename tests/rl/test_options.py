"""Options of PPO against formulas written out by hand, and the recipes that combine them."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from fastrlhf import PPOConfig, PPOTrainer, UserError
from fastrlhf.config.recipe import RECIPES, load_recipe
from fastrlhf.models.token_batch import TokenRows, target_log_probs
from fastrlhf.rl.advantages import KLController, RunningMoments, shape_scores
from fastrlhf.rl.learner import POLICY_STATS
from fastrlhf.rl.scorers import Scores
from fastrlhf.runtime.optim import Optimizer
from tests import tiny
from tests.runs import PROMPTS, TEXTS, experience_of, gradients_of, letters, ppo_trainer

PAPERS = ["ppo-max", "moss-released-en", "moss-released-zh", "instructgpt", "n-plus-details", "grpo", "dapo", "rloo"]
RISING = Scores([float(i) for i in range(8)], None)
trainer = partial(ppo_trainer, mini_batch_size=8, learning_rate=1e-3, critic_learning_rate=1e-3)


def test_penalties_of_length():
    """DAPO eq. 13 with max_new_tokens 10 and a buffer of 4: 0 up to 6 tokens, then a quarter more a token."""
    config = PPOConfig(max_new_tokens=10, overlong_penalty=4, length_penalty=0.5)
    lengths = torch.tensor([1.0, 6.0, 7.0, 9.0, 10.0])
    got = shape_scores(torch.zeros(5), torch.ones(5).bool(), config, RunningMoments(), lengths)
    assert got.tolist() == [-0.5, -3.0, -3.75, -5.25, -6.0]


def test_the_adaptive_controller():
    """Ziegler et al. 2019: proportional, clipped to 20%, in units of responses; its state survives."""
    config = PPOConfig(kl_controller="adaptive", kl_coef=0.1, kl_target=6.0, kl_horizon=1000, rollout_batch_size=100)
    controller = KLController(config)
    controller.update(6.6)
    assert controller.coef == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    for kl, sign in ((600.0, 1), (0.0, -1)):
        before = controller.coef
        controller.update(kl)
        assert controller.coef == pytest.approx(before * (1 + sign * 0.2 * 0.1))
    again = KLController(config)
    again.load_state(controller.state())
    assert again.coef == controller.coef
    fixed = KLController(PPOConfig(kl_coef=0.1))
    fixed.update(100.0)
    assert fixed.coef == 0.1


def test_the_adaptive_coefficient_is_what_the_rewards_use():
    t = trainer(kl_controller="adaptive", kl_target=0.01, kl_horizon=8, total_steps=4, learning_rate=1e-2)
    coefs = [step.metrics["kl/coef"] for step in t]
    assert coefs[0] == 0.05 and coefs[1] == pytest.approx(0.05 * 0.8) and coefs[3] > coefs[2]
    rollout, advantages = t.rollout([t.prompts[0]] * 4, 1, purpose="rollout"), []
    for coef in (0.0, 5.0):
        t.kl_controller.load_state({"coef": coef})
        experience, _, metrics = experience_of(t, rollout, Scores([0.0] * 4, None))
        assert metrics["kl/coef"] == coef
        advantages.append(experience.advantages)
    assert not torch.allclose(*advantages)


def test_the_kl_budget_ends_the_run():
    t = trainer(kl_budget=0.5, total_steps=50, learning_rate=3e-2, kl_coef=0.0, ppo_epochs=4)
    seen = [step.metrics["kl/ref"] for step in t]
    assert 1 < len(seen) < 50 and seen[-1] > 0.5 and max(seen[:-1]) <= 0.5


def test_a_run_that_its_kl_budget_ended_stays_ended(tmp_path):
    fields = {"kl_budget": 0.5, "total_steps": 50, "learning_rate": 3e-2, "kl_coef": 0.0, "ppo_epochs": 4}
    fields |= {"output_dir": str(tmp_path / "run"), "save_every": 1}
    first = trainer(**fields)
    first.train()
    again = trainer(**fields, resume=True)
    assert again.steps_done == again.total_steps == first.steps_done < 50 and list(again) == []


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
def test_dr_grpo_is_summed_over_the_longest_length_and_measured_as_every_estimator(aggregation):
    """Liu et al. 2025: its own sum in place of the token mean, divided by its constant once; ratio: a token mean."""
    grads = {}
    for advantage, asked in (("dr_grpo", aggregation), ("rloo", aggregation), ("rloo", "constant")):
        t = trainer(advantage=advantage, samples_per_prompt=4, loss_aggregation=asked, max_grad_norm=1e9)
        rollout = t.rollout(t.prompts[:2], 4, purpose="rollout")
        experience, epochs, _ = experience_of(t, rollout, RISING)
        experience = replace(experience, advantages=experience.token_mask.float())
        sums = t.learner.accumulate(rollout.rows, experience, epochs[0][0], policy=True, critic=False)
        assert float(sums.policy[1 + POLICY_STATS.index("ratio")]) == pytest.approx(1.0)
        grads[advantage, asked] = torch.cat([p.grad.flatten() for p in t.policy.parameters()])
    want = grads["rloo", "constant" if aggregation == "token_mean" else aggregation]
    torch.testing.assert_close(grads["dr_grpo", aggregation], want)


def shortened(rollout):
    """The same rollout with responses of 3, 4, 5 ... tokens."""
    per_token = {name: getattr(rollout, name) for name in ("log_probs", "policy_log_probs", "values")}
    cut = {name: [row[: 3 + i] for i, row in enumerate(rows)] for name, rows in per_token.items()}
    responses = [ids[: 3 + i] for i, ids in enumerate(rollout.response_ids)]
    return replace(rollout, rows=TokenRows(rollout.prompt_ids, responses), **cut)


@pytest.mark.parametrize("micro", [1, 10_000])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
def test_the_policy_loss_is_what_the_papers_write(level, aggregation, micro):
    """Row by row, in plain torch: clip of a token's or a response's ratio, mean over tokens or responses, or a sum."""
    t = trainer(
        ratio_level=level, loss_aggregation=aggregation, micro_batch_tokens=micro, critic="shared_trunk", vf_coef=0.0,
        importance_cap=None, max_grad_norm=1e9, entropy_coef=0.01,
    )  # fmt: skip
    rollout = shortened(t.rollout([t.prompts[i % 6] for i in range(8)], 1, purpose="rollout"))
    scores = Scores([None if i == 2 else float(i) for i in range(8)], None)  # row 2 counts nowhere
    experience, epochs, _ = experience_of(t, rollout, scores)
    noise = torch.randn(experience.token_mask.shape, generator=torch.Generator().manual_seed(0)) * 0.3
    moved = experience.old_log_probs + noise * experience.token_mask
    experience = replace(experience, old_log_probs=moved)
    terms, entropies, tokens = [], [], 0
    for i in range(8):
        if i == 2:
            continue
        length = len(rollout.response_ids[i])
        batch = rollout.rows.batch([i], t.device)
        log_probs = target_log_probs(t.policy, batch, 1.0)
        old, gain = experience.old_log_probs[i, :length], experience.advantages[i, :length]
        ratio = (log_probs - old).exp() if level == "token" else (log_probs - old).mean().exp().expand(length)
        terms.append(torch.maximum(-gain * ratio, -gain * ratio.clamp(0.8, 1.2)))
        table = t.policy(batch.input_ids).logits[0].log_softmax(-1)[len(rollout.prompt_ids[i]) - 1 : -1]
        entropies.append(-(table.exp() * table).sum(-1))
        tokens += length
    loss = {
        "token_mean": sum(x.sum() for x in terms) / tokens,
        "sequence_mean": sum(x.mean() for x in terms) / 7,
        "constant": sum(x.sum() for x in terms) / (8 * 10),
    }[aggregation] - 0.01 * torch.cat(entropies).sum() / tokens
    loss.backward()
    want = [p.grad.clone() for p in t.policy.parameters()]
    t.policy.zero_grad()
    got = gradients_of(t, lambda: t.learner.update(rollout.rows, experience, epochs, 0))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6 + 1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_the_kl_in_a_loss_of_sequence_ratios_is_that_of_token_ratios(estimator):
    """At ratio 1 both clips give the same gradient, so the KL's and the entropy's must agree too."""
    grads = []
    for level in ("token", "sequence"):
        t = trainer(ratio_level=level, kl_in="loss", kl_estimator=estimator, kl_coef=0.3, critic="shared_trunk",
                    vf_coef=0.0, whiten_advantages=False, gae_lambda=1.0, max_grad_norm=1e9)  # fmt: skip
        rollout = t.rollout([t.prompts[i % 6] for i in range(8)], 1, purpose="rollout")
        experience, epochs, _ = experience_of(t, rollout, RISING)
        experience = replace(experience, ref_log_probs=experience.ref_log_probs - 0.5 * experience.token_mask)
        grads.append(gradients_of(t, partial(t.learner.update, rollout.rows, experience, epochs, 0)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_the_optimizer_gets_its_settings():
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = Optimizer({"w": weight}, name="adamw", learning_rate=0.1, max_grad_norm=1e9, betas=(0.5, 0.75), eps=0.1,
                          weight_decay=0.2)  # fmt: skip
    weight.grad = torch.tensor([3.0])
    optimizer.step(0.1)
    first, second = 0.5 * 3 / (1 - 0.5), 0.25 * 9 / (1 - 0.75)
    assert float(weight) == pytest.approx(2.0 * (1 - 0.1 * 0.2) - 0.1 * first / (second**0.5 + 0.1), rel=1e-6)
    t = trainer(adam_betas=(0.5, 0.6), adam_eps=1e-3, weight_decay=0.3)
    for each in (t.learner.policy_optimizer, t.learner.value_optimizer):
        group = each.inner.param_groups[0]
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.5, 0.6), 1e-3, 0.3)


@pytest.mark.parametrize("fields, message", [
    ({"adam_betas": (0.9, 1.0)}, "adam_betas = 0.9,1: both must be"),
    ({"kl_controller": "adaptive", "kl_coef": 0.0}, "kl_controller = adaptive"),
    ({"overlong_penalty": 300}, "overlong_penalty = 300: above max_new_tokens = 256"),
])  # fmt: skip
def test_contradictions_are_sentences(fields, message):
    with pytest.raises(UserError, match=message):
        PPOConfig(**fields)


@pytest.mark.parametrize("name", PAPERS)
def test_a_recipe_runs_shortened(name, tmp_path):
    """With the sizes cut down, and nothing else."""
    inputs = ["policy=a/b", "reward=a/b", "prompts=p.jsonl", "ptx_data=t.jsonl", f"output_dir={tmp_path / 'run'}"]
    _, full = load_recipe("ppo", name, inputs)
    written = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    assert all(name in PPOConfig.model_fields for name in written)
    short = {"total_steps": 2, "rollout_batch_size": 8, "mini_batch_size": 4, "max_new_tokens": 6,
             "max_prompt_tokens": 60, "critic_warmup_steps": min(full.critic_warmup_steps, 1), "eval_every": 0,
             "samples_per_prompt": min(full.samples_per_prompt, 4), "output_dir": None, "save_every": 0}  # fmt: skip
    if full.overlong_penalty is not None:
        short["overlong_penalty"] = 2
    policy = tiny.llama()
    before = policy.lm_head.weight.detach().clone()
    ptx = TEXTS if full.ptx_coef else None
    tokenizer, cfg = tiny.tokenizer(), full.replace(**short)
    t = PPOTrainer(cfg, policy=policy, tokenizer=tokenizer, reward=letters, prompts=PROMPTS, ptx_data=ptx)
    steps = [step.metrics for step in t]
    assert len(steps) == 2 and steps[1]["update/skipped"] == 0
    assert ("ptx/loss" in steps[1]) == (name in ("ppo-max", "instructgpt"))
    assert ("value/pretrain_loss" in steps[0]) == (name == "ppo-max")
    assert (t.learner.average is not None) == (name == "instructgpt")
    assert not torch.equal(before, policy.lm_head.weight)


STEERING = """total_steps rollout_batch_size samples_per_prompt ppo_epochs mini_batch_size seed
max_prompt_tokens max_new_tokens chat_template skip_bad_rows save_every
eval_every output_dir overwrite resume"""


def test_every_option_that_changes_the_numbers_has_a_line():
    """docs/options.md: formula and source of each; not of what steers a run."""
    text = (Path(__file__).parents[2] / "docs" / "options.md").read_text(encoding="utf-8")
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert named == set(PPOConfig.model_fields) - set(STEERING.split())
