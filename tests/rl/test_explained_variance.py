"""value/explained_var: how much of the returns' variance the critic explains, and what it is where there is none."""

from __future__ import annotations

import numpy
import pytest
import torch

from fastrlhf.rl.experience import ValueExperience
from fastrlhf.runtime.metrics import explained_variance
from tests.runs import experience_of, ppo_trainer


def test_it_is_one_less_the_share_of_the_variance_that_is_left():
    draw = numpy.random.default_rng(0)
    returns = draw.normal(3.0, 2.0, size=50)
    values = returns + draw.normal(0.5, 1.0, size=50)
    got = explained_variance(((values - returns) ** 2).sum(), returns.sum(), (returns**2).sum(), 50)
    assert got == pytest.approx(1 - ((values - returns) ** 2).mean() / returns.var(), rel=1e-9)


@pytest.mark.parametrize("value", [0.0, 2.0, -0.5])
@pytest.mark.parametrize("error", [0.0, 3.0])
def test_of_returns_that_do_not_vary_it_is_zero(value, error):
    assert explained_variance(error, 8 * value, 8 * value**2, 8) == 0.0
    assert explained_variance(error, 0.0, 0.0, 0.0) == 0.0  # no token at all


def test_an_update_on_constant_returns_reports_zero():
    """Through the critic's update: every return is 2, whatever the critic says."""
    t = ppo_trainer()
    rollout = t.rollout([t.prompts[i % 6] for i in range(8)], 1, purpose="rollout")
    made, epochs, _ = experience_of(t, rollout)
    constant = torch.full_like(made.returns, 2.0) * made.token_mask
    for returns, zero in ((constant, True), (made.returns, False)):
        experience = ValueExperience(made.token_mask, made.response_mask, made.values, returns)
        metrics = t.learner.update_critic(rollout.rows, experience, epochs[0])
        assert (metrics["value/explained_var"] == 0.0) == zero and metrics["value/loss"] > 0
