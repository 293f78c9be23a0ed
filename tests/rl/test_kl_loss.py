"""The KL in the loss: on a vocabulary of 5 tokens every expectation over the policy is a sum, so nothing is sampled.

The policy loss is taken for each token alone, weighted by the policy's probability of it, and compared with the exact
gradient that autograd finds in float64.
"""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from fastrlhf import PPOConfig
from fastrlhf.models.heads import lm_head
from fastrlhf.models.token_batch import TargetRow, TokenBatch
from fastrlhf.rl.experience import TokenExperience
from fastrlhf.rl.losses import policy_loss
from fastrlhf_kernels import kl_estimate
from tests import tiny

COEF, TEMPERATURE = 0.7, 0.8
DIVERGENCES = {  # of the policy's and the reference's log-probs [5]
    "kl(pi, ref)": lambda p, q: (p.exp() * (p - q)).sum(),
    "kl(ref, pi)": lambda p, q: (q.exp() * (q - p)).sum(),
    "mean |d|": lambda p, q: (p.exp() * (p - q).abs()).sum(),
}
VALUES = {  # of a token, d = log pi - log ref: Schulman 2020
    "k1": lambda d: d,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: (-d).exp() - 1 + d,
    "abs": lambda d: d.abs(),
}


def config(**fields: object) -> PPOConfig:
    base = {"rollout_batch_size": 2, "mini_batch_size": 2, "samples_per_prompt": 2, "advantage": "rloo"}
    return PPOConfig(**base, kl_in="loss", kl_coef=COEF, temperature=TEMPERATURE, **fields)


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny.llama(vocab_size=5, pad_token_id=None)


def loss_of(model, cfg: PPOConfig, hidden: torch.Tensor, tokens: list[int], experience, normalizer: float):
    """The policy loss of responses of one token each, from the hidden states [N, H] that predict them."""
    batch = TokenBatch.build([[TargetRow([1, token], [1])] for token in tokens], model.device)
    head = lm_head(model)
    return policy_loss(hidden, batch, experience, cfg, head=head, normalizer=torch.tensor(normalizer)).loss


@pytest.fixture
def case() -> tuple[torch.Tensor, torch.Tensor]:
    """A hidden state [1, H] and the reference's log-probs [5], all different from the policy's."""
    draw = torch.Generator().manual_seed(3)
    return torch.randn(1, 32, generator=draw), torch.randn(5, generator=draw).mul(1.5).log_softmax(-1)


def exact(model, hidden: torch.Tensor, ref: torch.Tensor, divergence) -> torch.Tensor:
    """Gradient in the output weights [5, H] of COEF * divergence, float64."""
    weight = model.lm_head.weight.detach().double().requires_grad_()
    policy = (hidden.double() @ weight.T / TEMPERATURE).log_softmax(-1)[0]
    (COEF * divergence(policy, ref.double())).backward()
    return weight.grad


def expected(model, cfg: PPOConfig, hidden: torch.Tensor, ref: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Mean over the policy of the gradient and of the value of the policy loss, by the sum over its 5 tokens."""
    weight = model.lm_head.weight
    policy = (hidden @ weight.T / TEMPERATURE).log_softmax(-1)[0].detach()
    gradient, value = torch.zeros(5, 32, dtype=torch.float64), 0.0
    for token in range(5):
        one, zero = torch.ones(1).bool(), torch.zeros(1)
        experience = TokenExperience(one.view(1, 1), one, policy[token].view(1), ref[token].view(1), zero, None)
        weight.grad = None
        loss = loss_of(model, cfg, hidden, [token], experience, 1.0)
        loss.backward()
        gradient += policy[token].exp().double() * weight.grad.double()
        value += float(policy[token].exp()) * float(loss.detach())
    return gradient, value


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_the_expected_gradient_is_that_of_what_is_estimated(model, case, estimator, level):
    gradient, value = expected(model, config(kl_estimator=estimator, ratio_level=level), *case)
    target = "mean |d|" if estimator == "abs" else "kl(pi, ref)"
    want = {name: exact(model, *case, divergence) for name, divergence in DIVERGENCES.items()}
    torch.testing.assert_close(gradient, want[target], rtol=1e-5, atol=1e-6)
    for name, other in want.items():  # the case tells them apart
        assert name == target or float((other - want[target]).norm() / want[target].norm()) > 0.1
    hidden, ref = case
    policy = (hidden.double() @ model.lm_head.weight.detach().double().T / TEMPERATURE).log_softmax(-1)[0]
    assert value == pytest.approx(float(COEF * (policy.exp() * VALUES[estimator](policy - ref)).sum()), rel=1e-5)


def test_what_the_estimators_estimate(model, case):
    """The means of k1 and k3 are the KL; that of k2 is another divergence."""
    hidden, ref = case
    policy = (hidden @ model.lm_head.weight.T / TEMPERATURE).log_softmax(-1)[0].detach().double()
    means = {name: float((policy.exp() * kl_estimate(policy, ref.double(), name)).sum()) for name in VALUES}
    kl = float(DIVERGENCES["kl(pi, ref)"](policy, ref.double()))
    assert means["k1"] == pytest.approx(kl) and means["k3"] == pytest.approx(kl)
    assert abs(means["k2"] / kl - 1) > 0.02


@pytest.mark.parametrize("estimator", ["k1", "k3", "abs"])
def test_tokens_that_do_not_count_and_the_normalizer(model, case, estimator):
    """Two tokens, one of a response without a score: the other alone, over the normalizer."""
    hidden, ref = case
    refs, zero = torch.tensor([float(ref[2]), float("nan")]), torch.zeros(2)
    experience = TokenExperience(torch.ones(2, 1).bool(), torch.tensor([True, False]), zero, refs, zero, None)
    loss = loss_of(model, config(kl_estimator=estimator), hidden.expand(2, -1), [2, 4], experience, 4.0)
    policy = (hidden @ model.lm_head.weight.T / TEMPERATURE).log_softmax(-1)[0]
    want = COEF * float(VALUES[estimator](policy[2] - ref[2]).detach()) / 4
    assert float(loss.detach()) == pytest.approx(want, rel=1e-5)
