"""ppo_losses is ppo_policy_loss and ppo_value_loss, on every backend."""

from __future__ import annotations

import pytest
import torch

import fastrlhf_kernels as kernels
from fastrlhf_kernels import reference

OPTIONS = {
    "plain": {},
    "clips": {"clip_range": 0.1, "clip_range_high": 0.4, "dual_clip": 2.0, "clip_range_value": 0.05},
    "no_value_clip": {"clip_range_value": None},
    "weights": {"weights": True, "normalizer": 50.0},
}


@pytest.mark.parametrize("shape", [(3, 7), (5, 700)])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_losses_statistics_and_gradients(options, shape):
    """(3,500 tokens are several blocks.) Gradients arrive separately: the losses may be weighted by the caller."""
    torch.manual_seed(0)
    old, advantages, old_values, returns = torch.randn(4, *shape)
    log_probs, values = old + 0.3 * torch.randn(shape), old_values + 0.3 * torch.randn(shape)
    mask = torch.rand(shape) < 0.7
    for t in (old, advantages, old_values, returns, log_probs, values):
        t[~mask] = torch.nan
    options = {k: torch.rand(shape) if k == "weights" else v for k, v in options.items()}
    leaves = [log_probs.requires_grad_(), values.requires_grad_()]
    policy, value = kernels.ppo_losses(log_probs, old, advantages, values, old_values, returns, mask, **options)
    grads = torch.autograd.grad(3 * policy.loss + 0.5 * value.loss, leaves)
    exact = [torch.nan_to_num(t.detach()).double().requires_grad_() for t in leaves]
    value_clip = options.pop("clip_range_value", 0.2)
    options = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    clean = [torch.nan_to_num(t).double() for t in (old, advantages, old_values, returns)]
    want_policy = reference.ppo_policy_loss(exact[0], *clean[:2], mask, **options)
    shared = {k: v for k, v in options.items() if k in ("weights", "normalizer")}
    want_value = reference.ppo_value_loss(exact[1], *clean[2:], mask, clip_range=value_clip, **shared)
    want = torch.autograd.grad(3 * want_policy[0] + 0.5 * want_value[0], exact)
    for ours, theirs in ((policy, want_policy), (value, want_value)):
        assert abs(float(ours.loss) - float(theirs[0])) <= 1e-5 * max(1, abs(float(theirs[0])))
        assert ours.stats.keys() == theirs[1].keys()
        for name, number in theirs[1].items():
            assert abs(float(ours.stats[name]) - float(number)) <= 1e-5 * max(1, abs(float(number))), name
            assert not ours.stats[name].requires_grad
    for a, b in zip(grads, want, strict=True):
        assert float((a.double() - b).abs().max()) <= 1e-6 and (a[~mask] == 0).all()


def test_nothing_and_refusals():
    empty, mask = torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool)
    policy, value = kernels.ppo_losses(*[empty] * 6, mask)
    assert float(policy.loss) == 0 and float(value.loss) == 0 and float(value.stats["count"]) == 0
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="returns has shape"):
        kernels.ppo_losses(x, x, x, x, x, x[:1], mask)
    with pytest.raises(ValueError, match="dual_clip must be"):
        kernels.ppo_losses(*[x] * 6, mask, dual_clip=0.5)
