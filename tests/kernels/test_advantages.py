"""kl_estimate, shape_rewards, gae and masked_whiten: identities, holes, edges, and the reference."""

from __future__ import annotations

import pytest
import torch

import fastrlhf_kernels as kernels
from fastrlhf_kernels import reference

NEAR = {"atol": 1e-11, "rtol": 1e-10}


def rows(length: int, batch: int = 4):
    torch.manual_seed(length)
    rewards, values = torch.randn(2, batch, length, dtype=torch.float64)
    return rewards, values, torch.rand(batch, length) > 0.3, torch.randn(batch, dtype=torch.float64)


@pytest.mark.parametrize("length", [1, 2, 3, 8, 33, 100])
@pytest.mark.parametrize("settings", [{}, {"gamma": 0.9, "gae_lambda": 0.7}, {"gamma": 0.0}, {"gae_lambda": 0.0}])
@pytest.mark.parametrize("bootstrap", [False, True])
def test_gae_agrees_with_the_loop(length, settings, bootstrap):
    rewards, values, mask, last = rows(length)
    settings = settings | ({"bootstrap_values": last} if bootstrap else {})
    ours = kernels.gae(rewards, values, mask, **settings)
    for a, b in zip(ours, reference.gae(rewards, values, mask, **settings), strict=True):
        torch.testing.assert_close(a, b, **NEAR)


def test_gae_in_fp32_over_a_long_row():
    rewards, values, mask, _ = rows(2000)
    ours, _ = kernels.gae(rewards.float(), values.float(), mask, gamma=0.999)
    exact, _ = reference.gae(rewards, values, mask, gamma=0.999)
    assert ours.dtype == torch.float32
    assert float((ours - exact).abs().max() / exact.abs().max()) < 2e-6


def test_lambda_one_is_the_reward_to_go():
    rewards, values, mask, _ = rows(20)
    mask[:, 5:] = False
    advantages, returns = kernels.gae(rewards, values, mask, gamma=1.0, gae_lambda=1.0)
    kept = torch.where(mask, rewards, 0)
    to_go = kept.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(advantages, torch.where(mask, to_go - values, 0), **NEAR)
    torch.testing.assert_close(returns, torch.where(mask, to_go, 0), **NEAR)


def test_holes_are_skipped_and_not_discounted():
    """k masked tokens between two turns leave the advantages of the others unchanged."""
    rewards, values, _, last = rows(9)
    settings = {"gamma": 0.9, "gae_lambda": 0.8, "bootstrap_values": last}
    plain, _ = kernels.gae(rewards, values, torch.ones(4, 9).bool(), **settings)
    for gap in (1, 7):
        poison = torch.full((4, gap), torch.nan, dtype=torch.float64)
        wide = [torch.cat([t[:, :5], poison, t[:, 5:]], 1) for t in (rewards, values)]
        mask = torch.ones(4, 9 + gap, dtype=torch.int32)
        mask[:, 5 : 5 + gap] = 0
        advantages, returns = kernels.gae(*wide, mask, **settings)
        torch.testing.assert_close(advantages[mask.bool()].view(4, 9), plain, **NEAR)
        assert (advantages[:, 5 : 5 + gap] == 0).all() and (returns[:, 5 : 5 + gap] == 0).all()


def test_padding_changes_no_bit():
    rewards, values, mask, _ = rows(11)
    base = kernels.gae(rewards.float(), values.float(), mask)
    padded = [torch.cat([t.float(), torch.full((4, 30), torch.inf)], 1) for t in (rewards, values)]
    more = kernels.gae(*padded, torch.cat([mask, torch.zeros(4, 30).bool()], 1))
    for a, b in zip(base, more, strict=True):
        assert torch.equal(a, b[:, :11])


def test_bootstrap_is_the_value_after_the_last_token():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    rewards, values = torch.zeros(2, 3), torch.tensor([[1.0, 2.0, torch.nan], [1.0, 2.0, 3.0]])
    advantages, _ = kernels.gae(
        rewards, values, mask, gamma=1.0, gae_lambda=0.0, bootstrap_values=torch.tensor([5.0, 0.0])
    )
    assert advantages.tolist() == [[1.0, 3.0, 0.0], [1.0, 1.0, -3.0]]


def test_rows_without_tokens():
    for shape in ((2, 4), (0, 4), (2, 0)):
        nothing, x = torch.zeros(shape).bool(), torch.full(shape, torch.nan)
        scores = torch.full(shape[:1], torch.nan)
        results = [*kernels.gae(x, x, nothing), kernels.masked_whiten(x, nothing)]
        results.append(kernels.shape_rewards(scores, x, x, nothing, kl_coef=0.1))
        assert all(t.shape == shape and (t == 0).all() for t in results)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_shape_rewards_agrees_with_the_reference(estimator):
    log_probs, ref, mask, scores = rows(12)
    mask[1] = False  # the score of a row without response tokens is dropped
    scores[1] = torch.nan
    ours = kernels.shape_rewards(scores, log_probs, ref, mask, kl_coef=0.3, estimator=estimator)
    theirs = reference.shape_rewards(scores, log_probs, ref, mask, kl_coef=0.3, estimator=estimator)
    torch.testing.assert_close(ours, theirs, **NEAR)
    total = scores - 0.3 * torch.where(mask, reference.kl_estimate(log_probs, ref, estimator), 0).sum(1)
    torch.testing.assert_close(ours.sum(1)[[0, 2, 3]], total[[0, 2, 3]], **NEAR)


def test_the_score_lands_on_the_last_token_and_the_advantage_counts_it():
    """lambda = gamma = 1 and V = 0: the advantage of every action is the score minus the KL still to come."""
    log_probs, ref, mask, scores = rows(10)
    mask[:, 0] = True
    mask[2, -1], mask[3] = True, True
    rewards = kernels.shape_rewards(scores, log_probs, ref, mask, kl_coef=0.2)
    advantages, _ = kernels.gae(rewards, torch.zeros_like(rewards), mask, gae_lambda=1.0)
    kl = torch.where(mask, log_probs - ref, 0)
    expected = scores[:, None] - 0.2 * kl.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(advantages, torch.where(mask, expected, 0), **NEAR)


def test_no_kl_means_no_kl_even_when_it_is_infinite():
    log_probs = torch.tensor([[0.0, -torch.inf]])
    rewards = kernels.shape_rewards(torch.ones(1), log_probs, torch.zeros(1, 2), torch.ones(1, 2).int(), kl_coef=0.0)
    assert rewards.tolist() == [[0.0, 1.0]]


def test_kl_estimates_against_the_exact_kl_of_five_tokens():
    """Means over samples of the policy: k1 and k3 are unbiased, and the gradients are those of the formulas."""
    torch.manual_seed(0)
    policy, ref = torch.log_softmax(torch.randn(2, 5, dtype=torch.float64), -1)
    exact = float((policy.exp() * (policy - ref)).sum())
    tokens = torch.multinomial(policy.exp(), 200_000, replacement=True)
    for estimator in ("k1", "k3"):
        sample = kernels.kl_estimate(policy[tokens], ref[tokens], estimator)
        error = float(sample.std() / len(tokens) ** 0.5)
        assert abs(float(sample.mean()) - exact) < 4 * error
    assert (kernels.kl_estimate(policy, ref, "k3") >= 0).all()
    d = (policy - ref).detach()
    wanted = {"k1": torch.ones(5), "k2": d, "k3": 1 - torch.exp(-d), "abs": d.sign()}
    for estimator, grad in wanted.items():
        leaf = policy.detach().requires_grad_()
        value = kernels.kl_estimate(leaf, ref, estimator)
        torch.testing.assert_close(value.detach(), reference.kl_estimate(policy, ref, estimator), **NEAR)
        torch.testing.assert_close(torch.autograd.grad(value.sum(), leaf)[0], grad.double(), **NEAR)


def test_kl_of_bf16_log_probs_is_fp32():
    d = torch.tensor([1e-3], dtype=torch.bfloat16)
    assert kernels.kl_estimate(d, torch.zeros_like(d), "k3").dtype == torch.float32
    tiny = kernels.kl_estimate(torch.tensor([1e-5]), torch.zeros(1), "k3")
    torch.testing.assert_close(tiny, torch.tensor([5e-11]), atol=0, rtol=1e-1)  # exp(-d) - 1 + d itself would be 0


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening(shift_mean):
    x, _, mask, _ = rows(40)
    ours = kernels.masked_whiten(x * 3 + 100, mask, shift_mean=shift_mean)
    torch.testing.assert_close(ours, reference.masked_whiten(x * 3 + 100, mask, shift_mean=shift_mean), **NEAR)
    kept = ours[mask]
    mean = 0.0 if shift_mean else float((x * 3 + 100)[mask].mean())
    assert abs(float(kept.mean()) - mean) < 1e-9 and abs(float(kept.var(unbiased=False)) - 1) < 1e-9
    assert (ours[~mask] == 0).all()
    poisoned = torch.where(mask, x * 3 + 100, torch.nan)
    assert torch.equal(kernels.masked_whiten(poisoned, mask, shift_mean=shift_mean), ours)


@pytest.mark.parametrize("value", [0.1, 1e6 + 0.1, -3.0])
def test_whitening_equal_values_gives_exactly_zero(value):
    x, mask = torch.full((3, 33), value), torch.rand(3, 33) > 0.4
    assert (kernels.masked_whiten(x, mask) == 0).all()
    one = torch.zeros(3, 33).bool()
    one[1, 7] = True
    assert (kernels.masked_whiten(x, one) == 0).all()
    torch.testing.assert_close(kernels.masked_whiten(x, one, shift_mean=False)[1, 7], torch.tensor(value))


def test_nothing_here_carries_a_gradient():
    x = torch.randn(2, 3, requires_grad=True)
    mask = torch.ones(2, 3).bool()
    results = (
        *kernels.gae(x, x, mask),
        kernels.masked_whiten(x, mask),
        kernels.shape_rewards(x[:, 0], x, x, mask, kl_coef=1.0),
    )
    assert not any(t.requires_grad for t in results)


@pytest.mark.parametrize("whiten", [True, False])
def test_shape_and_gae_is_the_three_functions_in_a_row(whiten):
    torch.manual_seed(0)
    scores, mask = torch.randn(4), torch.rand(4, 9) < 0.7
    log_probs, refs, values = torch.randn(3, 4, 9)
    found = kernels.shape_and_gae(
        scores, log_probs, refs, values, mask, kl_coef=0.1, gamma=0.9, estimator="k3", whiten=whiten, backend="torch"
    )
    rewards = kernels.shape_rewards(scores, log_probs, refs, mask, kl_coef=0.1, estimator="k3", backend="torch")
    advantages, returns = kernels.gae(rewards, values, mask, gamma=0.9, backend="torch")
    advantages = kernels.masked_whiten(advantages, mask, backend="torch") if whiten else advantages
    for a, b in zip(found, (rewards, advantages, returns), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="gae_lambda must be in"):
        kernels.shape_and_gae(scores, log_probs, refs, values, mask, kl_coef=0.1, gae_lambda=1.5)
    with pytest.raises(ValueError, match="scores has shape"):
        kernels.shape_and_gae(scores[:2], log_probs, refs, values, mask, kl_coef=0.1)


@pytest.mark.parametrize("group_size", [None, 1, 2])
@pytest.mark.parametrize("optional", [(), ("token_rewards",), ("token_rewards", "bootstrap_values")])
def test_shape_and_gae_gives_the_bits_of_its_steps(optional, group_size):
    """As a trainer takes them one by one: rewards of single tokens added, and each group of rows whitened alone."""
    torch.manual_seed(0)
    scores, last, mask = torch.randn(4), torch.randn(4), torch.rand(4, 9) < 0.7
    log_probs, refs, values, early = torch.randn(4, 4, 9)
    early[~mask] = torch.nan
    given = {"token_rewards": early, "bootstrap_values": last}
    options = {name: given[name] for name in optional} | {"backend": "torch"}
    found = kernels.shape_and_gae(
        scores, log_probs, refs, values, mask, kl_coef=0.1, gamma=0.9, group_size=group_size, **options
    )
    rewards = kernels.shape_rewards(scores, log_probs, refs, mask, kl_coef=0.1, backend="torch")
    if "token_rewards" in optional:
        rewards = torch.where(mask, early, 0) + rewards
    options.pop("token_rewards", None)
    advantages, returns = kernels.gae(rewards, values, mask, gamma=0.9, **options)
    parts = zip(advantages.split(group_size or 4), mask.split(group_size or 4), strict=True)
    white = torch.cat([kernels.masked_whiten(rows, kept, backend="torch") for rows, kept in parts])
    assert all(torch.equal(a, b) for a, b in zip(found, (rewards, white, returns), strict=True))


def test_groups_of_rows_are_whitened_alone_on_every_backend():
    torch.manual_seed(0)
    scores, mask = 5 * torch.randn(6), torch.rand(6, 7) < 0.8
    log_probs, refs, values, early = torch.randn(4, 6, 7)
    early[~mask] = torch.nan
    options = {"kl_coef": 0.1, "gamma": 0.9, "estimator": "k3", "group_size": 2}
    ours = kernels.shape_and_gae(scores, log_probs, refs, values, mask, token_rewards=early, **options)
    exact = [t.double() for t in (scores, log_probs, refs, values)]
    theirs = reference.shape_and_gae(*exact, mask, token_rewards=early.double(), **options)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("group_size", [0, 3, 2.0, True])
def test_a_group_size_that_does_not_divide_the_rows_is_refused(group_size):
    x, mask = torch.zeros(4, 2), torch.ones(4, 2).bool()
    with pytest.raises(ValueError, match="group_size must be an int >= 1 that divides the 4 rows of values, got"):
        kernels.shape_and_gae(x[:, 0], x, x, x, mask, kl_coef=0.1, group_size=group_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_values_are_whitened_in_fp32(dtype):
    """Around a mean of 100 a sum of squares in bf16 or fp16 has no digit left."""
    torch.manual_seed(0)
    x, mask = (100 + torch.randn(8, 50)).to(dtype), torch.rand(8, 50) < 0.8
    ours = kernels.masked_whiten(x, mask)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), reference.masked_whiten(x.double(), mask), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("place", [(0, 0), (1, 3), (2, 6)])
def test_a_mask_with_one_token(place):
    """Its reward is the score less its KL, its advantage that less its value, and whitened it is 0."""
    scores, bootstrap, mask = torch.tensor([1.5, -2.0, 0.5]), torch.tensor([0.0, 3.0, -1.0]), torch.zeros(3, 7).bool()
    log_probs, refs, values = torch.randn(3, 3, 7, generator=torch.Generator().manual_seed(0))
    mask[place] = True
    for t in (log_probs, refs, values):
        t[~mask] = torch.nan
    rewards = kernels.shape_rewards(scores, log_probs, refs, mask, kl_coef=0.1)
    advantages, returns = kernels.gae(rewards, values, mask, gamma=0.5, bootstrap_values=bootstrap)
    reward = float(scores[place[0]] - 0.1 * (log_probs[place] - refs[place]))
    assert abs(float(rewards[place]) - reward) < 1e-6
    assert abs(float(returns[place]) - (reward + 0.5 * float(bootstrap[place[0]]))) < 1e-6
    assert abs(float(advantages[place]) - float(returns[place] - values[place])) < 1e-6
    assert (kernels.masked_whiten(advantages, mask) == 0).all()
    for t in (rewards, advantages, returns):
        assert int((t != 0).sum()) == 1
