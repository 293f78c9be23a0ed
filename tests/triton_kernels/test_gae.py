"""Shaping, GAE and whitening in Triton: ragged lengths, holes, several tiles, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastrlhf_kernels as kernels
from fastrlhf_kernels import reference

QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def problem(device, batch, length, density=0.8):
    torch.manual_seed(length)
    mask = torch.rand(batch, length, device=device) < density
    values, log_probs, refs = (torch.randn(batch, length, device=device) for _ in range(3))
    for t in (values, log_probs, refs):
        t[~mask] = torch.nan  # what is outside the mask is never looked at
    return torch.randn(batch, device=device), log_probs, refs, values, mask


def expected(scores, log_probs, refs, values, mask, kl_coef, estimator, gamma, lam, bootstrap, whiten):
    exact = [torch.nan_to_num(t.double()) for t in (scores, log_probs, refs, values)]
    rewards = reference.shape_rewards(*exact[:3], mask, kl_coef=kl_coef, estimator=estimator)
    bootstrap = None if bootstrap is None else bootstrap.double()
    options = {"gamma": gamma, "gae_lambda": lam, "bootstrap_values": bootstrap}
    advantages, returns = reference.gae(rewards, exact[3], mask, **options)
    return rewards, reference.masked_whiten(advantages, mask) if whiten else advantages, returns


@QUICK
@given(
    batch=st.integers(1, 5),
    length=st.integers(1, 80),
    density=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    estimator=st.sampled_from(["k1", "k2", "k3", "abs"]),
    kl_coef=st.sampled_from([0.0, 0.2]),
    discounts=st.sampled_from([(1.0, 0.95), (0.9, 0.0), (1.0, 1.0), (0.0, 0.5)]),
    cut_off=st.booleans(),
    whiten=st.booleans(),
)
def test_any_batch(device, batch, length, density, estimator, kl_coef, discounts, cut_off, whiten):
    arguments = problem(device, batch, length, density)
    bootstrap = torch.randn(batch, device=device) if cut_off else None
    gamma, lam = discounts
    options = {"kl_coef": kl_coef, "estimator": estimator, "gamma": gamma, "gae_lambda": lam, "whiten": whiten}
    ours = kernels.shape_and_gae(*arguments, bootstrap_values=bootstrap, backend="triton", **options)
    theirs = expected(*arguments, kl_coef, estimator, gamma, lam, bootstrap, whiten)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32 and (a[~arguments[-1]] == 0).all()
        assert float((a.double() - b).abs().max()) <= 2e-4 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("density", [0.02, 0.7, 1.0])
def test_rows_of_several_tiles(device, density):
    """2,500 tokens are three tiles; with few tokens whole tiles are holes."""
    arguments = problem(device, 2, 2500, density)
    arguments[-1][0, 600:2100] = False
    ours = kernels.shape_and_gae(*arguments, kl_coef=0.1, gamma=0.99, backend="triton")
    for a, b in zip(ours, expected(*arguments, 0.1, "k1", 0.99, 0.95, None, True), strict=True):
        assert float((a.double() - b).abs().max()) <= 2e-5 * max(1.0, float(b.abs().max()))


def test_gae_alone_takes_any_strides_and_dtypes(device):
    rewards = torch.randn(7, 40, device=device).T
    values, mask = torch.randn(40, 9, device=device)[:, 2:], torch.rand(40, 7, device=device) < 0.7
    for dtype in (torch.float32, torch.bfloat16):
        used = (rewards.to(dtype), values.to(dtype))
        ours = kernels.gae(*used, mask.int(), backend="triton")
        for a, b in zip(ours, reference.gae(*(t.double() for t in used), mask), strict=True):
            assert a.dtype == torch.float32 and float((a.double() - b).abs().max()) <= 2e-5


def test_equal_advantages_whiten_to_zero_and_empty_inputs_pass(device):
    zeros = torch.zeros(3, 5, device=device)
    mask = torch.ones(3, 5, device=device, dtype=torch.bool)
    mask[:, 1:] = False
    same = kernels.shape_and_gae(zeros[:, 0] + 0.3, zeros, zeros, zeros, mask, kl_coef=0.1, backend="triton")
    assert (same.advantages == 0).all() and (same.rewards[:, 0] == same.returns[:, 0]).all()
    none = kernels.shape_and_gae(zeros[:, 0], zeros, zeros, zeros, mask & False, kl_coef=0.1, backend="triton")
    assert all((t == 0).all() for t in none)
    for shape in ((0, 4), (2, 0)):
        empty = torch.zeros(shape, device=device)
        scores = torch.zeros(shape[0], device=device)
        found = kernels.shape_and_gae(scores, empty, empty, empty, empty.bool(), kl_coef=0.1, backend="triton")
        assert all(t.shape == shape for t in found)
