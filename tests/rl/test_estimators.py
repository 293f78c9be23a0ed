"""CISPO, masked importance weights, VAPO's lambdas, REINFORCE++-baseline, GRPO's published KL: by hand in float64."""

from __future__ import annotations

import math

import pytest
import torch

from fastrlhf import PPOConfig, UserError
from fastrlhf.rl.advantages import RunningMoments, equal_groups, estimate_advantages, policy_lambda, shape_scores
from fastrlhf.rl.critic_warmup import token_rewards
from fastrlhf.rl.experience import Experience, TokenExperience, importance_weights
from fastrlhf.rl.losses import aggregation_weights, loss_of_log_probs, token_weights
from fastrlhf_kernels import gae
from tests.runs import letters, ppo_trainer

GROUPS = {"advantage": "grpo", "samples_per_prompt": 2}


def config(**fields: object) -> PPOConfig:
    return PPOConfig(rollout_batch_size=4, mini_batch_size=4, **fields)


def tokens_of(rows: list[int], **tensors: torch.Tensor | None) -> TokenExperience:
    """Experience of tokens in rows of these lengths; what is not given is 0, all tokens count."""
    row_mask = torch.arange(max(rows)) < torch.tensor(rows)[:, None]
    zero = torch.zeros(sum(rows))
    names = ("old_log_probs", "ref_log_probs", "advantages")
    given = {name: tensors.get(name, zero) for name in names}
    return TokenExperience(
        row_mask, tensors.get("response_mask", zero == 0), *given.values(), tensors.get("weights"), tensors.get("kl")
    )


# --------------------------------------------------------------------------------------------------------------- CISPO


def test_cispo_by_hand():
    """Ratios 1, e, 1/e, e^3; cap 5: weights 1, e, 1/e, 5; every token has a gradient, the one beyond the cap too."""
    d = torch.tensor([0.0, 1.0, -1.0, 3.0, 7.0])
    old, advantages = torch.full((5,), -2.0), torch.tensor([1.0, -2.0, 0.5, 3.0, 9.0])
    counts = torch.tensor([True, True, True, True, False])
    log_probs = (old + d).requires_grad_()
    tokens = tokens_of([3, 2], old_log_probs=old, advantages=advantages, response_mask=counts)
    cfg = config(policy_loss="cispo", clip_range=1.0, clip_range_high=4.0)
    loss, stats = loss_of_log_probs(log_probs, torch.zeros(5), tokens, cfg, normalizer=4.0)
    loss.backward()
    scale = [1.0 * 1.0, math.e * -2.0, 1 / math.e * 0.5, 5.0 * 3.0]
    assert log_probs.grad.tolist() == pytest.approx([*(-s / 4 for s in scale), 0.0], rel=1e-6)
    want = -sum(s * (-2.0 + x) for s, x in zip(scale, (0.0, 1.0, -1.0, 3.0))) / 4
    assert float(loss.detach()) == pytest.approx(want, rel=1e-6)
    assert float(stats["clip_frac"]) == pytest.approx(0.25)
    assert float(stats["ratio"]) == pytest.approx((1 + math.e + 1 / math.e + math.e**3) / 4, rel=1e-6)


def test_cispo_has_a_lower_bound_where_asked_and_importance_weights_multiply():
    old, log_probs = torch.zeros(2), torch.tensor([-3.0, 0.0], requires_grad=True)
    tokens = tokens_of([2], old_log_probs=old, advantages=torch.ones(2), weights=torch.tensor([0.5, 2.0]))
    cfg = config(policy_loss="cispo", clip_range=0.2)
    loss_of_log_probs(log_probs, torch.zeros(2), tokens, cfg, normalizer=1.0).loss.backward()
    assert log_probs.grad.tolist() == pytest.approx([-0.5 * 0.8, -2.0], rel=1e-6)


def test_cispo_moves_a_token_where_the_clip_has_given_up():
    """The seam itself: one trainer, two losses, the gradient of a second update of the same rollout."""
    grown = {}
    for kind in ("clip", "cispo"):
        cfg = config(policy_loss=kind, clip_range=0.2)
        log_probs = torch.tensor([1.0], requires_grad=True)
        tokens = tokens_of([1], old_log_probs=torch.zeros(1), advantages=torch.ones(1))
        loss_of_log_probs(log_probs, torch.zeros(1), tokens, cfg, normalizer=1.0).loss.backward()
        grown[kind] = float(log_probs.grad)
    assert grown == {"clip": 0.0, "cispo": pytest.approx(-1.2)}


def test_a_run_with_cispo_and_every_other_new_option_trains():
    t = ppo_trainer(
        **GROUPS, policy_loss="cispo", clip_range=1.0, clip_range_high=4.0, drop_equal_groups=True, ppo_epochs=2,
        importance_mask=(0.5, 5.0), importance_cap=None, kl_in="loss", kl_estimator="k3", kl_gradient="published",
        loss_aggregation="sequence_mean", mini_batch_size=8,
    )  # fmt: skip
    before = t.policy.lm_head.weight.detach().clone()
    steps = [step.metrics for step in t]
    assert not torch.equal(before, t.policy.lm_head.weight)
    assert all(m["rollout/masked"] == 0.0 and 0.0 <= m["reward/equal_groups"] <= 1.0 for m in steps)
    assert steps[0]["policy/ratio"] == pytest.approx(1.0, abs=0.5) and math.isfinite(steps[1]["policy/loss"])


# -------------------------------------------------------------------------------------------------- importance weights


def test_tokens_outside_the_mask_weigh_nothing():
    """IcePop: w inside [0.5, 5], else 0. With the cap beside it min(w, 2). w = 1, 0.4, 0.5+, 3, 6."""
    ratio = torch.tensor([[1.0, 0.4, 0.51, 3.0, 6.0]])
    old, sampled = ratio.log(), torch.zeros(1, 5)
    popped = importance_weights(old, sampled, config(importance_mask=(0.5, 5.0), importance_cap=None))
    assert popped[0].tolist() == pytest.approx([1.0, 0.0, 0.51, 3.0, 0.0], rel=1e-6)
    both = importance_weights(old, sampled, config(importance_mask=(0.5, 5.0)))
    assert both[0].tolist() == pytest.approx([1.0, 0.0, 0.51, 2.0, 0.0], rel=1e-6)
    capped = importance_weights(old, sampled, config())
    assert capped[0].tolist() == pytest.approx([1.0, 0.4, 0.51, 2.0, 2.0], rel=1e-6)
    assert importance_weights(old, sampled, config(importance_cap=None)) is None


# ------------------------------------------------------------------------------------------------------ VAPO's lambdas

VALUES = torch.tensor([[0.5, -1.0, 2.0, 0.0], [1.0, 3.0, 0.0, 0.0]])
MASK = torch.tensor([[True, True, True, True], [True, True, False, False]])
SCORES = torch.tensor([2.0, -1.0])


def advantages_of(**fields: object) -> tuple[torch.Tensor, torch.Tensor]:
    zero = torch.zeros(2, 4)
    cfg = config(gamma=0.9, kl_coef=0.0, whiten_advantages=False, **fields)
    return estimate_advantages(SCORES, zero, zero, VALUES, MASK, cfg)


def by_hand(lambdas: list[float]) -> torch.Tensor:
    """A_t = delta_t + gamma lambda A_{t+1}, row by row."""
    result = torch.zeros(2, 4, dtype=torch.float64)
    for row, (lam, length) in enumerate(zip(lambdas, (4, 2))):
        following, after = 0.0, 0.0
        for t in reversed(range(length)):
            reward = float(SCORES[row]) if t == length - 1 else 0.0
            delta = reward + 0.9 * after - float(VALUES[row, t])
            following = delta + 0.9 * lam * following
            result[row, t], after = following, float(VALUES[row, t])
    return result


def test_policy_and_critic_have_a_lambda_each():
    got, returns = advantages_of(gae_lambda=0.8, critic_gae_lambda=1.0)
    torch.testing.assert_close(got.double(), by_hand([0.8, 0.8]), rtol=1e-6, atol=1e-6)
    want = (by_hand([1.0, 1.0]) + VALUES) * MASK
    torch.testing.assert_close(returns.double(), want, rtol=1e-6, atol=1e-6)
    plain, own = advantages_of(gae_lambda=0.8)
    assert torch.equal(plain, got) and float((own - returns).abs().max()) > 0.1


def test_lambda_by_the_length_of_the_response():
    """alpha 0.3: 1 - 1 / (0.3 * 4) = 1/6 and, of two tokens, 1 - 1 / 0.6 < 0: 0."""
    cfg = config(length_adaptive_lambda=0.3)
    assert policy_lambda(MASK, cfg).tolist() == pytest.approx([1 / 6, 0.0], rel=1e-6)
    got, returns = advantages_of(length_adaptive_lambda=0.3, critic_gae_lambda=1.0)
    torch.testing.assert_close(got.double(), by_hand([1 / 6, 0.0]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(returns.double(), (by_hand([1.0, 1.0]) + VALUES) * MASK, rtol=1e-6, atol=1e-6)
    long = torch.ones(1, 400).bool()
    assert float(policy_lambda(long, config(length_adaptive_lambda=0.05))[0]) == pytest.approx(0.95)


def test_a_lambda_for_each_row_in_the_kernels():
    rows = torch.tensor([0.8, 0.3])
    rewards = torch.zeros(2, 4)
    each = [gae(rewards, VALUES, MASK, gamma=0.9, gae_lambda=float(lam))[0] for lam in rows]
    both, _ = gae(rewards, VALUES, MASK, gamma=0.9, gae_lambda=rows)
    torch.testing.assert_close(both, torch.stack([each[0][0], each[1][1]]), rtol=1e-6, atol=1e-6)
    for wrong, said in ((torch.tensor([0.5, 1.5]), "in every row"), (torch.tensor([0.5]), "gae_lambda has shape")):
        with pytest.raises(ValueError, match=said):
            gae(rewards, VALUES, MASK, gae_lambda=wrong)
    with pytest.raises(ValueError, match="Triton kernel does not read"):
        gae(rewards, VALUES, MASK, gae_lambda=rows, backend="triton")


def test_the_warm_up_finds_the_rewards_again_under_a_lambda_of_the_critic():
    _, returns = advantages_of(gae_lambda=0.8, critic_gae_lambda=0.6)
    zero = torch.zeros(2, 4)
    experience = Experience(MASK, MASK, VALUES, returns, zero, zero, zero, None)
    rewards = token_rewards(experience, config(gamma=0.9, gae_lambda=0.8, critic_gae_lambda=0.6))
    want = torch.tensor([[0.0, 0.0, 0.0, 2.0], [0.0, -1.0, 0.0, 0.0]])
    torch.testing.assert_close(rewards, want, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------- groups and single scores


def test_reinforce_plus_plus_with_the_baseline_of_the_group():
    """Scores less the mean of their group, reward to go, one whitening of the whole step: no deviation of a group."""
    scores = torch.tensor([1.0, 3.0, 10.0, 20.0])
    mask, zero = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1]]).bool(), torch.zeros(4, 2)
    fields = {"advantage": "reinforce++-baseline", "samples_per_prompt": 2, "kl_coef": 0.5, "kl_estimator": "k1"}
    log_probs = torch.tensor([[0.2, 0.4], [0.1, 0.0], [0.0, 0.0], [0.0, 0.0]])
    plain, _ = estimate_advantages(scores, log_probs, zero, None, mask, config(**fields, whiten_advantages=False))
    want = [[-1.0 - 0.3, -1.0 - 0.2], [1.0 - 0.05, 0.0], [-5.0, -5.0], [5.0, 5.0]]
    torch.testing.assert_close(plain, torch.tensor(want), rtol=1e-6, atol=1e-6)
    got, _ = estimate_advantages(scores, log_probs, zero, None, mask, config(**fields))
    flat = plain[mask].double()
    white = (flat - flat.mean()) / (flat.var(correction=0) + 1e-8).sqrt()
    torch.testing.assert_close(got[mask].double(), white, rtol=1e-5, atol=1e-6)
    assert float(got[2, 0].abs()) > 3 * float(got[0, 0].abs())  # a group's own deviation would make them alike


def test_groups_that_teach_nothing_are_found():
    nan = float("nan")
    scores = torch.tensor([1.0, 1.0, 1.0, 2.0, nan, 3.0, nan, nan, 1e6, 1e6 + 0.1])
    assert equal_groups(scores, 2).tolist() == [True, False, True, True, True]


def test_a_dropped_group_counts_in_no_mean():
    """Every second prompt's two replies score alike: with the option the mean is over the others' tokens alone."""

    def reward(prompts, responses):
        return [float(i % 2) if i % 4 < 2 else 7.0 for i in range(len(responses))]

    fields = {**GROUPS, "reward": reward, "mini_batch_size": 8, "max_grad_norm": 1e9, "kl_coef": 0.0, "total_steps": 1}
    norms = {}
    for drop in (False, True):
        metrics = next(iter(ppo_trainer(**fields, drop_equal_groups=drop))).metrics
        assert metrics["reward/equal_groups"] == 0.5
        norms[drop] = metrics["policy/grad_norm"]
    assert norms[True] == pytest.approx(2 * norms[False], rel=0.2)  # half of the tokens divide the same sum


def test_a_step_of_equal_groups_alone_changes_no_weight():
    fields = {**GROUPS, "reward": lambda p, r: [1.0] * len(r), "kl_in": "loss", "total_steps": 1, "weight_decay": 0.5}
    t = ppo_trainer(**fields, drop_equal_groups=True)
    before = t.policy.lm_head.weight.detach().clone()
    metrics = next(iter(t)).metrics
    assert torch.equal(before, t.policy.lm_head.weight) and metrics["reward/equal_groups"] == 1.0
    assert t.learner.policy_updates == 0 and "policy/loss" not in metrics


def test_a_reply_without_an_end_has_the_score_that_is_asked_for():
    nan = float("nan")
    scores, finished = torch.tensor([5.0, 5.0, nan, -3.0]), torch.tensor([True, False, False, False])
    lengths = torch.tensor([1.0, 2.0, 1.0, 1.0])
    replaced = shape_scores(scores, finished, config(missing_eos_score=-1.0), RunningMoments(), lengths)
    assert replaced.nan_to_num(99.0).tolist() == [5.0, -1.0, 99.0, -1.0]
    lowered = shape_scores(scores, finished, config(missing_eos_penalty=1.0), RunningMoments(), lengths)
    assert lowered.nan_to_num(99.0).tolist() == [5.0, 4.0, 99.0, -4.0]
    both = config(missing_eos_score=-1.0, reward_clip=0.5, length_penalty=0.25)
    assert shape_scores(scores, finished, both, RunningMoments(), lengths)[:2].tolist() == [0.25, -1.5]


# ----------------------------------------------------------------------------------------------------- KL in the loss


def experience(rows: list[int]) -> Experience:
    mask = torch.arange(max(rows)) < torch.tensor(rows)[:, None]
    zero = torch.zeros(mask.shape)
    return Experience(mask, mask, zero, zero, zero, zero, zero, torch.full(mask.shape, 0.5))


def test_grpo_as_published():
    """Two responses, of 1 and 3 tokens: 1/2 sum_i 1/|o_i| sum_t beta (exp(-d) - 1 + d), differentiated as it stands."""
    cfg = config(
        kl_in="loss", kl_estimator="k3", kl_gradient="published", kl_coef=0.04, loss_aggregation="sequence_mean"
    )
    rows, mini = experience([1, 3]), [0, 1]
    d = torch.tensor([0.5, -1.0, 0.2, 2.0])
    log_probs = d.clone().requires_grad_()
    weights, kl = token_weights(rows, mini, cfg), aggregation_weights(rows, mini, cfg)
    torch.testing.assert_close(weights, 0.5 * kl)  # importance weights do not weigh the KL
    tokens = tokens_of([1, 3], weights=weights[rows.token_mask], kl=kl[rows.token_mask])
    loss = loss_of_log_probs(log_probs, torch.zeros(4), tokens, cfg, normalizer=4.0).loss
    loss.backward()
    share = torch.tensor([0.5, 1 / 6, 1 / 6, 1 / 6])
    k3 = (-d).exp() - 1 + d
    assert float(loss.detach()) == pytest.approx(float(0.04 * (share * k3).sum()), rel=1e-5)
    torch.testing.assert_close(log_probs.grad, 0.04 * share * (1 - (-d).exp()), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_published_and_exact_are_one_value_with_two_gradients(estimator, aggregation):
    """Through the trainer, fused and not: what differs is the slope, k'(d) against d (abs: against |d| + sign)."""
    fields = {
        **GROUPS, "kl_in": "loss", "kl_estimator": estimator, "kl_coef": 0.5, "loss_aggregation": aggregation,
        "total_steps": 2, "mini_batch_size": 8, "learning_rate": 3e-2, "reward": letters,
    }  # fmt: skip
    steps = {kind: [s.metrics for s in ppo_trainer(**fields, kl_gradient=kind)] for kind in ("exact", "published")}
    one, other = (steps[kind][1]["policy/grad_norm"] for kind in steps)
    assert steps["exact"][0]["policy/loss"] == pytest.approx(steps["published"][0]["policy/loss"], abs=1e-6)
    assert one == pytest.approx(other, rel=1e-3) if estimator == "k2" else abs(one - other) > 1e-5 * one


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"missing_eos_score": -1, "missing_eos_penalty": 1}, "missing_eos_score = -1: replaces what missing_eos_pena"),
        ({"policy_loss": "cispo", "ratio_level": "sequence"}, "policy_loss = cispo: weighs each token by its own rat"),
        (
            {"ptx_coef": 1, "ptx_reduction": "sequence_sum", "loss_aggregation": "sequence_mean"},
            "ptx_reduction = sequence_sum: with loss_aggregation = sequence_mean no response has a sum",
        ),
        ({"importance_mask": (1.5, 5)}, "importance_mask = 1.5,5: must hold the ratio 1, as in 0.5,5"),
        ({"importance_mask": "0.5"}, "importance_mask = '0.5': expected two numbers low,high"),
        (
            {"gae_lambda": 0.7, "critic_gae_lambda": 1, "length_adaptive_lambda": 0.05},
            "gae_lambda = 0.7: length_adaptive_lambda and critic_gae_lambda replace it",
        ),
        (
            {"advantage": "reinforce++-baseline"},
            "advantage = reinforce\\+\\+-baseline: compares responses; set samples",
        ),
        ({"runaway_entropy": 1.0}, "runaway_entropy = 1.0: expected a number > 1, or none"),
    ],
)
def test_what_cannot_be_is_one_sentence(fields, said):
    with pytest.raises(UserError, match=said) as caught:
        PPOConfig(**fields)
    assert len(str(caught.value).splitlines()) == 1
