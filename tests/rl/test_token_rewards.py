"""Reward functions that judge every token: what they may return, how they are added up, and where they act."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from fastrlhf import PPOConfig, UserError
from fastrlhf.models.token_batch import TokenRows
from fastrlhf.rl import advantages
from fastrlhf.rl.scorers import FunctionScorer, split_rewards
from fastrlhf.rollout.result import Texts
from tests.runs import experience_of, ppo_trainer

IDS = [[5, 6, 1], [7], [8, 9, 9, 1]]


def scored(*functions, **columns: list) -> list:
    texts = ["a", "b", "c"]
    scorer = FunctionScorer([(f"f{i}", weight, fn) for i, (weight, fn) in enumerate(functions)])
    return scorer.judge(Texts(texts, texts, texts, columns), TokenRows([[3]] * 3, IDS))


def tenths(prompts, responses, response_ids):
    return [[token / 10 for token in ids] for ids in response_ids]


def test_a_list_has_a_number_for_each_token_and_a_number_is_the_last_tokens():
    assert scored((1.0, tenths)) == [[0.5, 0.6, 0.1], [0.7], [0.8, 0.9, 0.9, 0.1]]
    tensors = scored((1.0, lambda p, r, response_ids: [torch.tensor(ids) for ids in response_ids]))
    assert tensors == [[float(t) for t in ids] for ids in IDS]
    mixed = scored((1.0, lambda p, r, *, response_ids: [2.0, None, [0, 1, 2, 3]]))
    assert mixed == [[0.0, 0.0, 2.0], None, [0.0, 1.0, 2.0, 3.0]]


def test_weighted_sums_mix_both_kinds():
    got = scored((2.0, tenths), (-1.0, lambda p, r, worth: worth), worth=[1.0, None, 3.0])
    assert got[1] is None
    assert got[0] == pytest.approx([1.0, 1.2, 0.2 - 1.0]) and got[2] == pytest.approx([1.6, 1.8, 1.8, 0.2 - 3.0])
    scores, tokens = split_rewards(got, IDS)[:2]
    assert scores == [pytest.approx(1.4), None, pytest.approx(2.4)]
    assert [len(t) for t in tokens] == [3, 1, 4] and tokens[1].tolist() == [0.0]
    assert [float(t.sum()) for t in tokens] == pytest.approx([1.4, 0.0, 2.4])


@pytest.mark.parametrize("returned, message", [
    ([[1, 2, 3], [1], [1, 2, 3]], "reward function f0, sample 2: returned 3 token rewards for 4 response tokens"),
    ([[1, 2, 3], [], 0], "reward function f0, sample 1: returned 0 token rewards for 1 response tokens"),
    ([[1, math.nan, 3], 0, 0], "reward function f0, sample 0, token 1: returned nan"),
    ([0, [None], 0], "reward function f0, sample 1, token 0: None is not a number"),
    ([0, 0], "reward function f0, sample 2: returned 2 scores for 3 responses"),
])  # fmt: skip
def test_mistakes_name_the_function_and_the_sample(returned, message):
    with pytest.raises(UserError, match=message):
        scored((1.0, lambda p, r, response_ids: returned))


def test_a_function_that_does_not_see_the_tokens_returns_no_lists():
    with pytest.raises(UserError, match=r"reward function f0, sample 0: \[1, 2, 3\] is not a number"):
        scored((1.0, lambda p, r: [[1, 2, 3], 0, 0]))


# ---------------------------------------------------------------------------------------------------- in the advantages


@pytest.fixture
def batch():
    """Rows with a hole, one that does not count, one of one token; float64 throughout."""
    draw = torch.Generator().manual_seed(4)
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    arrays = [torch.randn(4, 5, generator=draw, dtype=torch.float64) for _ in range(4)]
    return torch.tensor([1.5, -2.0, math.nan, 0.7], dtype=torch.float64), mask, *arrays


def by_hand(scores, mask, log_probs, ref, values, tokens, *, gamma, lam, kl_coef, bootstrap=None):
    """GAE over the tokens that count, in plain Python: each gets its own reward, the last what is left of the score."""
    found = torch.zeros_like(values)
    for row in range(len(mask)):
        places = mask[row].nonzero().flatten().tolist()
        rewards = [float(tokens[row, t]) for t in places[:-1]]
        rewards.append(float(scores[row]) - sum(rewards))
        after, gain = 0.0 if bootstrap is None else float(bootstrap[row]), 0.0
        for t, reward in reversed(list(zip(places, rewards))):
            reward -= kl_coef * float(log_probs[row, t] - ref[row, t])
            gain = reward + gamma * after - float(values[row, t]) + gamma * lam * gain
            after, found[row, t] = float(values[row, t]), gain
    return found


@pytest.mark.parametrize("advantage", ["gae", "reinforce++"])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_token_rewards_act_where_they_fall(batch, advantage, gamma):
    scores, mask, log_probs, ref, values, tokens = batch
    lam = 0.7 if advantage == "gae" else 1.0
    config = PPOConfig(advantage=advantage, gamma=gamma, gae_lambda=lam, kl_coef=0.3, whiten_advantages=False)
    got, returns = advantages.estimate_advantages(scores, log_probs, ref, values, mask, config, token_rewards=tokens)
    critic = values if advantage == "gae" else torch.zeros_like(values)
    want = by_hand(scores, mask, log_probs, ref, critic, tokens, gamma=gamma, lam=lam, kl_coef=0.3)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(returns, (want + critic) * mask, rtol=1e-12, atol=1e-12)
    plain, _ = advantages.estimate_advantages(scores, log_probs, ref, values, mask, config)
    assert not torch.allclose(plain, got)


def test_group_estimators_use_the_sum(batch):
    scores, mask, log_probs, ref, _, tokens = batch
    config = PPOConfig(advantage="rloo", samples_per_prompt=2, rollout_batch_size=4, mini_batch_size=4)
    plain = advantages.estimate_advantages(scores, log_probs, ref, None, mask, config)
    got = advantages.estimate_advantages(scores, log_probs, ref, None, mask, config, token_rewards=tokens)
    assert torch.equal(plain[0], got[0])


SIZES = {"total_steps": 1, "rollout_batch_size": 6, "mini_batch_size": 6, "max_new_tokens": 8}
trainer = partial(ppo_trainer, **SIZES, whiten_advantages=False, gae_lambda=1.0, kl_coef=0.0)


def test_a_run_optimises_what_is_still_to_come():
    """gamma = lambda = 1 and a critic of 0: an advantage is the sum of the scaled rewards from the token on; clipping
    and penalties fall on the last token."""
    seen = []

    def reward(prompts, responses, response_ids):
        seen.append(response_ids)
        return [[token / 100 for token in ids] for ids in response_ids]

    t = trainer(reward=reward, reward_scaling="running_std", reward_clip=1.0, length_penalty=0.125)
    rollout = t.rollout(t.prompts, 1, purpose="rollout")
    scores = t.scorer(rollout)
    assert seen == [rollout.response_ids]
    assert scores.values == pytest.approx([sum(ids) / 100 for ids in rollout.response_ids])
    experience, _, metrics = experience_of(t, rollout, scores)
    scale = torch.tensor(scores.values, dtype=torch.float64).std()
    assert metrics["reward/mean"] == pytest.approx(sum(scores.values) / 6, rel=1e-6)
    for row, ids in enumerate(rollout.response_ids):
        scaled = torch.tensor(ids, dtype=torch.float64) / 100 / scale
        shaped = scaled.sum().clamp(-1, 1) - 0.125 * len(ids)
        want = shaped - torch.cat([torch.zeros(1), scaled[:-1].cumsum(0)])
        torch.testing.assert_close(experience.advantages[row, : len(ids)].double(), want, rtol=1e-4, atol=1e-5)


def test_numbers_on_the_last_token_are_the_scores_of_ever():
    """The same step from a number, and from a list that is 0 up to the last token."""
    runs = []
    for per_token in (False, True):

        def plain(prompts, responses):
            return [len(r) / 10 for r in responses]

        def listed(prompts, responses, response_ids):
            return [[0] * (len(i) - 1) + [len(r) / 10] for r, i in zip(responses, response_ids)]

        runs.append(next(iter(trainer(reward=listed if per_token else plain, kl_coef=0.1))).metrics)
    assert runs[0] == runs[1]
