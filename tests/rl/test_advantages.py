"""Score shaping and advantage estimators against hand computations in float64."""

from __future__ import annotations

import pytest
import torch

from fastrlhf.config.stages import PPOConfig
from fastrlhf.rl import advantages
from fastrlhf.rl.advantages import RunningMoments, shape_scores


def config(**fields: object) -> PPOConfig:
    return PPOConfig(**{"rollout_batch_size": 4, "mini_batch_size": 4, **fields})


def test_running_moments_equal_the_moments_of_everything_seen():
    draws = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 100
    moments = RunningMoments()
    for batch in draws:
        moments.update(batch)
    assert moments.mean == pytest.approx(float(draws.mean()), rel=1e-12)
    assert moments.std == pytest.approx(float(draws.flatten().std()), rel=1e-12)
    again = RunningMoments()
    again.load_state(moments.state())
    again.update(draws[0])
    moments.update(draws[0])
    assert again.state() == moments.state()


def test_a_first_batch_of_one_score_keeps_its_value():
    scores = shape_scores(
        torch.tensor([3.0]), torch.tensor([True]), config(reward_scaling="running_std"), RunningMoments(), torch.ones(1)
    )
    assert scores.tolist() == [3.0]


def test_scores_are_scaled_then_clipped_then_penalised():
    moments = RunningMoments()
    raw, finished = torch.tensor([0.0, 4.0, 8.0, float("nan")]), torch.tensor([True, False, True, True])
    got = shape_scores(
        raw,
        finished,
        config(reward_scaling="running_norm", reward_clip=0.5, missing_eos_penalty=2.0),
        moments,
        torch.ones(4),
    )
    assert moments.count == 3 and moments.mean == 4.0 and moments.std == 4.0  # the unscorable one counts nowhere
    assert got[:3].tolist() == [-0.5, -2.0, 0.5] and got[3].isnan()
    only_std = shape_scores(raw, finished, config(reward_scaling="running_std"), RunningMoments(), torch.ones(4))
    assert only_std[:3].tolist() == [0.0, 1.0, 2.0]


@pytest.fixture
def batch():
    draw = torch.Generator().manual_seed(1)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool()
    log_probs, ref = -torch.rand(4, 3, generator=draw), -torch.rand(4, 3, generator=draw)
    values = torch.randn(4, 3, generator=draw)
    return torch.tensor([1.0, 2.0, 4.0, 0.0]), log_probs * mask, ref * mask, values * mask, mask


def by_hand(scores, log_probs, ref, mask, kl_coef):
    return [float(s - kl_coef * (a - r)[m].sum()) for s, a, r, m in zip(scores, log_probs, ref, mask)]


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_group_estimators(batch, kind):
    scores, log_probs, ref, _, mask = batch
    cfg = config(advantage=kind, samples_per_prompt=2, kl_coef=0.3)
    got, _ = advantages.estimate_advantages(scores, log_probs, ref, None, mask, cfg)
    total = by_hand(scores, log_probs, ref, mask, 0.3)
    for a in (0, 2):
        pair = total[a], total[a + 1]
        mean = sum(pair) / 2
        std = abs(pair[0] - pair[1]) / 2**0.5
        for row, own in zip((a, a + 1), pair):
            other = sum(pair) - own
            want = {"grpo": (own - mean) / (std + 1e-4), "dr_grpo": own - mean, "rloo": own - other}[kind]
            assert got[row][mask[row]].tolist() == pytest.approx([want] * int(mask[row].sum()), rel=1e-5)
            assert got[row][~mask[row]].abs().sum() == 0


def test_an_unscorable_response_is_in_no_group_statistic(batch):
    scores, log_probs, ref, _, mask = batch
    mask, scores = mask.clone(), scores.clone()
    mask[0], scores[0] = False, float("nan")
    cfg = config(rollout_batch_size=4, samples_per_prompt=4, advantage="dr_grpo", kl_coef=0.0)
    got, _ = advantages.estimate_advantages(scores, log_probs, ref, None, mask, cfg)
    assert got[0].abs().sum() == 0
    assert [float(got[i, 0]) for i in (1, 2, 3)] == pytest.approx([0.0, 2.0, -2.0], abs=1e-6)


def test_equal_scores_in_a_group_give_zero_not_noise(batch):
    _, log_probs, _, _, mask = batch
    cfg = config(advantage="grpo", samples_per_prompt=2, kl_coef=0.0)
    got, _ = advantages.estimate_advantages(torch.full((4,), 3.0), log_probs, log_probs, None, mask, cfg)
    assert got.abs().sum() == 0


def test_monte_carlo_identity(batch):
    """lambda = gamma = 1 and V = 0: every action's advantage is the score less the KL penalty still to come."""
    scores, log_probs, ref, _, mask = batch
    cfg = config(whiten_advantages=False, gae_lambda=1.0, kl_coef=0.2)
    got, returns = advantages.estimate_advantages(scores, log_probs, ref, torch.zeros(4, 3), mask, cfg)
    for row in range(4):
        size = int(mask[row].sum())
        for t in range(size):
            ahead = float((log_probs - ref)[row, t:size].sum())
            assert float(got[row, t]) == pytest.approx(float(scores[row]) - 0.2 * ahead, abs=1e-6)
    assert torch.equal(got, returns)


def test_gae_is_whitened_then_clipped(batch):
    scores, log_probs, ref, values, mask = batch
    got, returns = advantages.estimate_advantages(scores, log_probs, ref, values, mask, config())
    assert float(got[mask].mean()) == pytest.approx(0, abs=1e-6)
    assert float(got[mask].var(correction=0)) == pytest.approx(1, rel=1e-5)
    plain, same = advantages.estimate_advantages(scores, log_probs, ref, values, mask, config(whiten_advantages=False))
    assert torch.equal(returns, same) and torch.allclose(returns[mask], (plain + values)[mask], atol=1e-6)
    clipped, _ = advantages.estimate_advantages(scores, log_probs, ref, values, mask, config(advantage_clip=0.1))
    assert float(clipped.abs().max()) == pytest.approx(0.1)


def test_reinforce_plus_plus_is_the_whitened_reward_to_go(batch):
    scores, log_probs, ref, values, mask = batch
    cfg = config(advantage="reinforce++", kl_coef=0.2)
    got, _ = advantages.estimate_advantages(scores, log_probs, ref, None, mask, cfg)
    zero = torch.zeros_like(values)
    mc, _ = advantages.estimate_advantages(scores, log_probs, ref, zero, mask, config(gae_lambda=1.0, kl_coef=0.2))
    assert torch.allclose(got, mc)


def test_kl_in_loss_leaves_the_rewards_alone(batch):
    scores, log_probs, ref, values, mask = batch
    a, _ = advantages.estimate_advantages(scores, log_probs, ref, values, mask, config(kl_in="loss", kl_coef=5.0))
    b, _ = advantages.estimate_advantages(scores, log_probs, ref, values, mask, config(kl_coef=0.0))
    assert torch.equal(a, b)


@pytest.mark.parametrize("advantage", ["gae", "reinforce++"])
def test_whitening_by_group(batch, advantage):
    """Each prompt's two rows have mean 0 and biased variance 1 over their own tokens; a group of one token gives 0."""
    scores, log_probs, ref, values, mask = (x.double() if x.is_floating_point() else x for x in batch)
    mask = mask.clone()
    fields = {"samples_per_prompt": 2, "advantage": advantage, "kl_coef": 0.2}
    plain, _ = advantages.estimate_advantages(
        scores, log_probs, ref, values, mask, config(whiten_advantages=False, **fields)
    )
    cfg = config(whiten_advantages="group", **fields)
    got, _ = advantages.estimate_advantages(scores, log_probs, ref, values, mask, cfg)
    for a in (0, 2):
        own = plain[a : a + 2][mask[a : a + 2]]
        want = (own - own.mean()) / (own.square().mean() - own.mean() ** 2 + 1e-8).sqrt()
        torch.testing.assert_close(got[a : a + 2][mask[a : a + 2]], want, rtol=1e-9, atol=1e-9)
    mask[3] = False
    alone, _ = advantages.estimate_advantages(scores, log_probs, ref, values, mask, cfg)
    assert alone[2:].abs().sum() == 0 and torch.equal(alone[:2], got[:2])


@pytest.mark.parametrize("whiten", [True, "group", False])
@pytest.mark.parametrize(
    "fields",
    [
        {"advantage": "gae", "gamma": 0.9, "gae_lambda": 0.8},
        {"advantage": "reinforce++", "gamma": 0.9},
        {"advantage": "rloo"},
    ],
)
def test_holes_change_no_advantage(batch, fields, whiten):
    """Masked tokens put between those of a response, as a tool's would be: every other token keeps its advantage."""
    scores, log_probs, ref, values, mask = batch
    whitening = {} if fields["advantage"] == "rloo" else {"whiten_advantages": whiten}
    cfg = config(**fields, **whitening, samples_per_prompt=2)
    places = torch.tensor([0, 3, 4])  # of the three columns, among five
    draw = torch.Generator().manual_seed(9)

    def spread(tensor):
        wide = torch.randn(4, 5, generator=draw) if tensor.is_floating_point() else torch.zeros(4, 5).bool()
        wide[:, places] = tensor
        return wide

    tokens = torch.randn(4, 3, generator=draw)
    near = advantages.estimate_advantages(scores, log_probs, ref, values, mask, cfg, token_rewards=tokens)
    far = advantages.estimate_advantages(
        scores, *(spread(x) for x in (log_probs, ref, values, mask)), cfg, token_rewards=spread(tokens)
    )
    for a, b in zip(near, far, strict=True):
        torch.testing.assert_close(b[:, places], a, rtol=1e-6, atol=1e-6)
        assert b[:, 1:3].abs().sum() == 0


ALL = sorted(advantages.ESTIMATORS)


@pytest.mark.parametrize("kind", ALL)
def test_clipped_advantages_keep_their_sign(batch, kind):
    scores, log_probs, ref, values, mask = batch
    fields = {"advantage": kind, "samples_per_prompt": 2}
    plain, _ = advantages.estimate_advantages(scores, log_probs, ref, values, mask, config(**fields))
    limit = round(min(float(plain.max()), -float(plain.min())) / 2, 3)  # so that both ends are at work
    assert limit > 0.1
    got, _ = advantages.estimate_advantages(
        scores, log_probs, ref, values, mask, config(**fields, advantage_clip=limit)
    )
    want = [[max(-limit, min(limit, value)) for value in row] for row in plain.tolist()]
    torch.testing.assert_close(got, torch.tensor(want), rtol=1e-6, atol=0)


@pytest.mark.parametrize("whiten", [False, True, "group"])
@pytest.mark.parametrize("kind", ALL)
def test_a_mask_of_exactly_one_token(batch, kind, whiten):
    """In float64 by hand: reward less KL less value, unless it is compared with others, of which there are none."""
    scores, log_probs, ref, values, _ = (x.double() for x in batch)
    mask = torch.zeros(4, 3).bool()
    mask[1, 2] = True  # behind two tokens that do not count
    fields = {"advantage": kind, "samples_per_prompt": 2, "kl_coef": 0.3}
    if kind in ("gae", "reinforce++", "reinforce++-baseline"):
        fields |= {"gamma": 0.9, "whiten_advantages": whiten}
    scores = torch.where(mask.any(1), scores, torch.nan)
    got, returns = advantages.estimate_advantages(scores, log_probs, ref, values, mask, config(**fields))
    reward = float(scores[1] - 0.3 * (log_probs - ref)[1, 2])
    value = {"gae": float(values[1, 2]), "reinforce++": 0.0}.get(kind)
    alone = 0.0 if value is None or whiten else reward - value
    want, wanted = torch.zeros(4, 3).double(), torch.zeros(4, 3).double()
    want[1, 2], wanted[1, 2] = alone, 0.0 if value is None else reward
    torch.testing.assert_close(got.double(), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(returns.double(), wanted, rtol=1e-12, atol=1e-12)
    assert value is None or whiten or abs(alone) > 0.1  # there is a number to get right


@pytest.mark.parametrize("kind", ALL)
def test_responses_of_one_token_each(batch, kind):
    """In float64 by hand; two prompts of two responses."""
    scores, log_probs, ref, values, _ = (x.double() for x in batch)
    log_probs, ref, values = log_probs[:, :1], ref[:, :1], values[:, :1]
    fields = {"advantage": kind, "samples_per_prompt": 2, "kl_coef": 0.3, "whiten_advantages": False}
    mask = torch.ones(4, 1).bool()
    got, _ = advantages.estimate_advantages(scores, log_probs, ref, values, mask, config(**fields))
    rewards = [float(scores[i] - 0.3 * (log_probs - ref)[i, 0]) for i in range(4)]
    for i, reward in enumerate(rewards):
        other = rewards[i ^ 1]
        deviation = abs(reward - other) / 2**0.5
        want = {
            "gae": reward - float(values[i, 0]),
            "reinforce++": reward,
            "reinforce++-baseline": reward - float(scores[i] + scores[i ^ 1]) / 2,  # the KL is of each token alone
            "rloo": reward - other,
            "dr_grpo": (reward - other) / 2,
            "grpo": (reward - other) / 2 / (deviation + 1e-4),
        }[kind]
        assert float(got[i, 0]) == pytest.approx(want, rel=1e-12)
