"""token_ppo_loss against linear_ppo_loss's reference on the identity head."""

from __future__ import annotations

import pytest
import torch

import fastrlhf_kernels as kernels
from fastrlhf_kernels import reference

OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "per_token_temperature": {"temperature": "per token"},
    "clips": {"clip_range": 0.1, "clip_range_high": 0.3, "dual_clip": 2.0},
    "weights": {"weights": "per token", "normalizer": 7.0},
    "kl_k1": {"kl_coef": 0.3, "kl_estimator": "k1"},
    "kl_k2": {"kl_coef": 0.3, "kl_estimator": "k2"},
    "kl_k3": {"kl_coef": 0.3},
    "kl_abs": {"kl_coef": 0.3, "kl_estimator": "abs"},
    "entropy": {"entropy_coef": 0.1},
    "everything": {"temperature": "per token", "dual_clip": 3.0, "kl_coef": 0.1, "entropy_coef": 0.05},
}


def problem(dtype=torch.float32, shape=(3, 7), vocabulary=130, **options):
    torch.manual_seed(0)
    logits = (2 * torch.randn(*shape, vocabulary)).to(dtype)
    labels = torch.randint(0, vocabulary, shape)
    current = torch.log_softmax(logits.double(), -1).gather(-1, labels[..., None])[..., 0].float()
    old, advantages = current + 0.3 * torch.randn(shape), torch.randn(shape)
    mask = torch.rand(shape) < 0.8
    options = {name: torch.rand(shape) + 0.5 if value == "per token" else value for name, value in options.items()}
    if "kl_coef" in options:
        options["ref_log_probs"] = current + 0.2 * torch.randn(shape)
    return logits, (labels, old, advantages, mask), options


def expected(logits, arguments, options):
    """The reference: logits = x @ identity."""
    x = logits.detach().double().requires_grad_()
    identity = torch.eye(logits.shape[-1], dtype=torch.float64)
    labels, old, advantages, mask = arguments
    options = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    out = reference.linear_ppo_loss(x, identity, labels, old.double(), advantages.double(), mask, **options)
    (grad,) = torch.autograd.grad(out[0], x)
    return out, grad


def close(ours, theirs, tolerance):
    assert float((ours.detach().double() - theirs.detach().double()).abs().max()) <= tolerance * max(
        1e-3, float(theirs.detach().abs().max())
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_loss_statistics_and_gradient(options):
    logits, arguments, options = problem(**options)
    logits[~arguments[-1]] = torch.nan  # rows outside the mask are never looked at
    want, want_grad = expected(torch.nan_to_num(logits), arguments, options)
    leaf = logits.clone().requires_grad_()
    result = kernels.token_ppo_loss(leaf, *arguments, **options)
    close(result.loss, want[0], 2e-6)
    assert result.stats.keys() == want[1].keys()
    for name, value in want[1].items():
        close(result.stats[name], value, 1e-5)
    (2 * result.loss).backward()
    close(leaf.grad, 2 * want_grad, 5e-6)
    assert (leaf.grad[~arguments[-1]] == 0).all()
    assert torch.equal(leaf[arguments[-1]], logits[arguments[-1]])  # the logits are as they were


def test_half_precision_logits_round_the_gradient_only():
    for dtype, tolerance in ((torch.bfloat16, 8e-3), (torch.float16, 2e-3)):
        logits, arguments, _ = problem(dtype)
        leaf = logits.requires_grad_()
        result = kernels.token_ppo_loss(leaf, *arguments)
        want, want_grad = expected(leaf, arguments, {})
        close(result.loss, want[0], 2e-6)
        result.loss.backward()
        close(leaf.grad, want_grad, tolerance)
        assert leaf.grad.dtype == dtype and result.loss.dtype == torch.float32


def test_backward_twice_and_what_is_refused():
    logits, arguments, _ = problem()
    leaf = logits.clone().requires_grad_()
    loss = kernels.token_ppo_loss(leaf, *arguments).loss
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(first, second) and first.abs().sum() > 0
    with pytest.raises(ValueError, match="ref_log_probs is not given"):
        kernels.token_ppo_loss(logits, *arguments, kl_coef=0.1)
    with pytest.raises(ValueError, match=r"labels holds \d+, outside \[0, 130\)"):
        kernels.token_ppo_loss(logits, arguments[0] + 130, *arguments[1:])


def test_strided_logits_and_suppressed_tokens():
    """[:, :-1] of [B, T, V], as every trainer slices; and tokens with logit -inf get exactly 0."""
    logits, arguments, _ = problem(shape=(4, 6))
    full = torch.cat([logits, torch.full((4, 1, 130), torch.nan)], 1).requires_grad_()
    with torch.no_grad():
        full[..., 100:] = -torch.inf
    labels = arguments[0] % 100
    loss = kernels.token_ppo_loss(full[:, :-1], labels, *arguments[1:], entropy_coef=0.1).loss
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(full.grad).all() and (full.grad[..., 100:] == 0).all()
    leaf = full.detach()[:, :-1].contiguous().requires_grad_()
    kernels.token_ppo_loss(leaf, labels, *arguments[1:], entropy_coef=0.1).loss.backward()
    assert torch.equal(leaf.grad, full.grad[:, :-1])


def test_no_tokens():
    empty = torch.zeros(0)
    result = kernels.token_ppo_loss(torch.zeros(0, 5), empty.long(), empty, empty, empty.bool())
    assert float(result.loss) == 0 and result.stats["log_probs"].shape == (0,)
