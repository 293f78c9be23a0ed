"""Options of PPO against formulas written out by hand, and the recipes that combine them."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from fastrlhf import PPOConfig, PPOTrainer, RewardConfig, UserError
from fastrlhf.config.recipe import RECIPES, load_recipe
from fastrlhf.models.token_batch import TokenRows, target_log_probs
from fastrlhf.ppo import PPOStep
from fastrlhf.rl.advantages import KLController, RunningMoments, shape_scores
from fastrlhf.rl.learner import POLICY_STATS
from fastrlhf.rl.scorers import Scores
from fastrlhf.runtime.optim import Optimizer
from tests import tiny
from tests.runs import PROMPTS, TEXTS, experience_of, gradients_of, letters, ppo_trainer

PAPERS = [
    "ppo-max",
    "moss-released-en",
    "moss-released-zh",
    "instructgpt",
    "n-plus-details",
    "grpo",
    "dapo",
    "rloo",
    "gspo",
    "cispo",
]
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
    config = PPOConfig(
        kl_controller="adaptive", kl_coef=0.1, kl_controller_target=6.0, kl_horizon=1000, rollout_batch_size=100
    )
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
    t = trainer(kl_controller="adaptive", kl_controller_target=0.01, kl_horizon=8, total_steps=4, learning_rate=1e-2)
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


@pytest.mark.parametrize("aggregation", [None, "token_mean", "sequence_mean", "constant"])
def test_dr_grpo_is_summed_over_the_longest_length_and_measured_as_every_estimator(aggregation):
    """Liu et al. 2025: its own sum where none is given, divided by its constant once; ratio: a token mean."""
    grads = []
    for advantage, asked in (("dr_grpo", aggregation), ("rloo", aggregation or "constant")):
        t = trainer(advantage=advantage, samples_per_prompt=4, loss_aggregation=asked, max_grad_norm=1e9)
        rollout = t.rollout(t.prompts[:2], 4, purpose="rollout")
        experience, epochs, _ = experience_of(t, rollout, RISING)
        experience = replace(experience, advantages=experience.token_mask.float())
        sums = t.learner.accumulate(rollout.rows, experience, epochs[0][0], policy=True, critic=False)
        assert float(sums.policy[1 + POLICY_STATS.index("ratio")]) == pytest.approx(1.0)
        grads.append(torch.cat([p.grad.flatten() for p in t.policy.parameters()]))
    torch.testing.assert_close(*grads)


def shortened(rollout):
    """The same rollout with responses of 3, 4, 5 ... tokens."""
    per_token = {name: getattr(rollout, name) for name in ("log_probs", "policy_log_probs", "values")}
    cut = {name: [row[: 3 + i] for i, row in enumerate(rows)] for name, rows in per_token.items()}
    responses = [ids[: 3 + i] for i, ids in enumerate(rollout.response_ids)]
    return replace(rollout, rows=TokenRows(rollout.prompt_ids, responses), **cut)


@pytest.mark.parametrize(("micro", "clips"), [(1, (0.2, None, None)), (10_000, (0.05, 0.1, 1.05))])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
def test_the_policy_loss_is_what_the_papers_write(level, aggregation, micro, clips):
    """Row by row, in plain torch: clip of a token's or a response's ratio, mean over tokens or responses, or a sum.

    clips: clip_range, clip_range_high, dual_clip, the last two as DAPO's higher side and Ye et al. 2020.
    """
    low, high, dual = clips
    t = trainer(
        ratio_level=level, loss_aggregation=aggregation, micro_batch_tokens=micro, critic="shared_trunk", vf_coef=0.0,
        importance_cap=None, max_grad_norm=1e9, entropy_coef=0.01, clip_range=low, clip_range_high=high,
        dual_clip=dual,
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
        term = torch.maximum(-gain * ratio, -gain * ratio.clamp(1 - low, 1 + (high or low)))
        terms.append(torch.where(gain < 0, term.clamp(max=-gain * dual), term) if dual else term)
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
    optimizer = Optimizer(
        {"w": weight}, name="adamw", learning_rate=0.1, max_grad_norm=1e9, betas=(0.5, 0.75), eps=0.1, weight_decay=0.2
    )
    weight.grad = torch.tensor([3.0])
    optimizer.step(0.1)
    first, second = 0.5 * 3 / (1 - 0.5), 0.25 * 9 / (1 - 0.75)
    assert float(weight) == pytest.approx(2.0 * (1 - 0.1 * 0.2) - 0.1 * first / (second**0.5 + 0.1), rel=1e-6)
    t = trainer(adam_betas=(0.5, 0.6), adam_eps=1e-3, weight_decay=0.3)
    for each in (t.learner.policy_optimizer, t.learner.value_optimizer):
        group = each.inner.param_groups[0]
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.5, 0.6), 1e-3, 0.3)


# ---------------------------------------------------------------------------- one step of the trainer, by hand
#
# The critic's head starts at 0 and the policy is its own reference, so that in step 1 every value and every KL is 0:
# returns and advantages are the shaped scores, discounted back from the last token.


def first_step(**fields: object) -> tuple[PPOTrainer, PPOStep]:
    t = trainer(**fields)
    return t, next(iter(t))


def discounted(step: PPOStep, shaped: list[float], discount: float) -> torch.Tensor:
    """Returns of all response tokens, one row behind the other."""
    lengths = [len(ids) for ids in step.rollout.response_ids]
    rows = [[s * discount ** (n - 1 - i) for i in range(n)] for s, n in zip(shaped, lengths, strict=True)]
    return torch.tensor([x for row in rows for x in row], dtype=torch.float64)


def shaped(step: PPOStep, fields: dict[str, float]) -> list[float]:
    """docs/options.md, "Rewards", in its order, for the first batch of scores."""
    scores = torch.tensor(step.rollout.scores, dtype=torch.float64)
    if "reward_scaling" in fields:
        centre = scores.mean() if fields["reward_scaling"] == "running_norm" else 0.0
        scores = (scores - centre) / scores.std()
    scores = scores.clamp(-fields.get("reward_clip", torch.inf), fields.get("reward_clip", torch.inf))
    unfinished = torch.tensor([0.0 if done else 1.0 for done in step.rollout.finished], dtype=torch.float64)
    lengths = torch.tensor([float(len(ids)) for ids in step.rollout.response_ids], dtype=torch.float64)
    scores = scores - fields.get("missing_eos_penalty", 0.0) * unfinished - fields.get("length_penalty", 0.0) * lengths
    if "overlong_penalty" in fields:
        last = fields["overlong_penalty"]
        scores = scores - ((lengths - (10 - last)) / last).clamp(0, 1)
    return scores.tolist()


SHAPING = [
    {},
    {"gamma": 0.5, "gae_lambda": 1.0},
    {"gae_lambda": 0.5},
    {"gamma": 0.9, "gae_lambda": 0.0},
    {"reward_scaling": "running_std"},
    {"reward_scaling": "running_norm", "reward_clip": 0.5},
    {"reward_clip": 0.3},
    {"missing_eos_penalty": 2.0},
    {"length_penalty": 0.25},
    {"overlong_penalty": 4},
]


@pytest.mark.parametrize("fields", SHAPING, ids=str)
def test_the_critic_learns_the_shaped_scores_discounted(fields):
    """value/loss of values 0 is half the mean square of the returns."""
    _, step = first_step(**fields)
    discount = fields.get("gamma", 1.0) * fields.get("gae_lambda", 0.95)
    returns = discounted(step, shaped(step, fields), discount)
    assert step.metrics["value/loss"] == pytest.approx(float(returns.square().mean()) / 2, rel=1e-5)


@pytest.mark.parametrize("clip", [None, 0.4])
@pytest.mark.parametrize("whiten", [False, True])
def test_the_policy_is_trained_on_advantages_whitened_then_clipped(whiten, clip):
    """At ratio 1 the policy loss is minus the mean of the advantages."""
    _, step = first_step(whiten_advantages=whiten, advantage_clip=clip)
    advantages = discounted(step, step.rollout.scores, 0.95)
    if whiten:
        advantages = (advantages - advantages.mean()) / advantages.std(correction=0)
    if clip is not None:
        advantages = advantages.clamp(-clip, clip)
    assert step.metrics["policy/loss"] == pytest.approx(-float(advantages.mean()), rel=1e-4, abs=1e-5)


def test_entropy_bonus_and_kl_are_terms_of_the_loss():
    """Each changes the loss of the first update by its coefficient times what the step measures of it."""
    plain, entropy, kl = (
        first_step(ref_policy=tiny.llama(seed=1), kl_in="loss", kl_coef=coef, entropy_coef=bonus)[1].metrics
        for coef, bonus in ((1e-9, 0.0), (1e-9, 0.5), (0.5, 0.0))
    )
    assert plain["policy/loss"] - entropy["policy/loss"] == pytest.approx(0.5 * entropy["policy/entropy"], rel=1e-4)
    nats_a_token = kl["kl/ref"] / kl["length/mean"]
    assert kl["policy/loss"] - plain["policy/loss"] == pytest.approx(0.5 * nats_a_token, rel=1e-4)


def test_the_value_loss_is_weighted_and_clipped_around_the_old_values():
    half, whole = (first_step(vf_coef=weight)[1].metrics for weight in (0.5, 1.0))
    assert whole["value/grad_norm"] == pytest.approx(2 * half["value/grad_norm"], rel=1e-5)
    assert whole["value/loss"] == half["value/loss"]
    many = {"ppo_epochs": 4, "critic_learning_rate": 1e-2}
    assert first_step(**many, clip_range_value=None)[1].metrics["value/clip_frac"] == 0.0
    assert first_step(**many, clip_range_value=1e-3)[1].metrics["value/clip_frac"] > 0.5


def test_the_temperature_is_that_of_sampling_and_of_every_log_prob():
    """One that sampling alone knew would show as a mismatch between decoding and the training forward."""
    cold, warm = (first_step(temperature=degree)[1].metrics for degree in (0.5, 1.0))
    assert cold["policy/entropy"] < warm["policy/entropy"] - 0.3
    assert max(cold["rollout/mismatch_max"], warm["rollout/mismatch_max"]) < 1e-4


def test_the_learning_rate_follows_its_schedule():
    """Two steps of warm-up, then half a cosine over the other four: 1/2, 1, 1, 0.854, 1/2, 0.146 of the peak."""
    t = trainer(total_steps=6, lr_schedule="cosine", warmup_steps=2)
    rates = [t.learner.policy_optimizer.inner.param_groups[0]["lr"] for _ in t]
    assert rates == pytest.approx([1e-3 * x for x in (0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447)], rel=1e-5)


def test_gradients_are_scaled_down_to_max_grad_norm():
    """With an eps far above the gradient AdamW's first step is learning_rate / eps times what was clipped."""
    t = trainer(max_grad_norm=1e-3, adam_eps=1.0)
    before = torch.cat([p.detach().flatten().clone() for p in t.policy.parameters()])
    step = next(iter(t))
    after = torch.cat([p.detach().flatten() for p in t.policy.parameters()])
    assert step.metrics["policy/grad_norm"] > 0.1  # as it was before
    assert float((after - before).norm()) == pytest.approx(1e-3 * 1e-3, rel=1e-2)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"adam_betas": (0.9, 1.0)}, "adam_betas = 0.9,1: both must be"),
        ({"overlong_penalty": 300}, "overlong_penalty = 300: above max_new_tokens = 256"),
    ],
)
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
    short = {
        "total_steps": 2,
        "rollout_batch_size": 8,
        "mini_batch_size": 4,
        "max_new_tokens": 6,
        "max_prompt_tokens": 60,
        "critic_warmup_steps": min(full.critic_warmup_steps, 1),
        "eval_every": 0,
        "samples_per_prompt": min(full.samples_per_prompt, 4),
        "output_dir": None,
        "save_every": 0,
    }
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
max_prompt_tokens max_new_tokens chat_template prompt_format columns ignore_columns skip_bad_rows save_every
eval_every output_dir overwrite resume accept_changed"""


def test_every_option_that_changes_the_numbers_has_a_line():
    """docs/options.md: formula and source of each; not of what steers a run."""
    text = (Path(__file__).parents[2] / "docs" / "options.md").read_text(encoding="utf-8")
    tables = [table for table in text.split("\n\n") if table.startswith("| option")]
    cells = [line.split("|")[1] for table in tables for line in table.splitlines() if line.startswith("| `")]
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    of_ppo, of_reward = (set(cls.model_fields) - set(STEERING.split()) for cls in (PPOConfig, RewardConfig))
    assert of_ppo | {"readout", "readout_layer"} <= named <= of_ppo | of_reward
