"""Logits to log-probs and to the PPO loss in Triton, against float64 and against what plain torch loses in fp32."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastrlhf_kernels as kernels
from fastrlhf_kernels import reference
from fastrlhf_kernels.gpu import log_probs
from fastrlhf_kernels.gpu.launch import recorded
from fastrlhf_kernels.operands import LossOptions, Rows, Tokens

QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def both(logits: torch.Tensor, labels: torch.Tensor, **options):
    """((log-prob, entropy, gradient) by Triton, the same by float64, the same by plain torch in fp32)."""
    results = []
    grads_out = torch.linspace(-1, 1, 2 * labels.numel()).view(2, *labels.shape).to(logits.device)
    for compute, x in (
        (lambda *a, **k: kernels.token_log_probs(*a, backend="triton", **k), logits),
        (reference.token_log_probs, logits.double()),
        (reference.token_log_probs, logits.float()),
    ):
        x = x.detach().requires_grad_()
        log_probs, entropy = compute(x, labels, return_entropy=True, **options)
        total = (log_probs * grads_out[0]).sum() + (entropy * grads_out[1]).sum()
        results.append((log_probs, entropy, torch.autograd.grad(total, x)[0]))
    return results


def hold(ours, exact, plain, gradient: float = 5e-6) -> None:
    """At most the stated error, and never more than 1.5 times that of plain torch in fp32 where that is larger."""
    for a, b, c, limit in zip(ours, exact, plain, (2e-5, 5e-5, None), strict=True):
        if limit is None:
            scale = float(b.norm())
            error, torch_error = float((a.double() - b).norm()) / (scale or 1), float((c - b).norm()) / (scale or 1)
            limit = gradient
        else:
            error, torch_error = (float((x.double() - b).abs().max()) if b.numel() else 0.0 for x in (a, c))
        assert error <= max(limit, 1.5 * torch_error), (error, torch_error)


@pytest.mark.parametrize("vocabulary", [1, 2, 127, 129, 1000, 1536, 2500, 4099])
@pytest.mark.parametrize("n", [1, 2, 33])
def test_sizes(device, n, vocabulary):
    torch.manual_seed(vocabulary)
    logits = 4 * torch.randn(n, vocabulary, device=device)
    hold(*both(logits, torch.randint(0, vocabulary, (n,), device=device)))


@QUICK
@given(
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    vocabulary=st.integers(1, 300),
    spare=st.integers(0, 5),
    order=st.booleans(),
    temperature=st.sampled_from([1.0, 0.05, 5.0, None]),
    labels_dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_any_shape_and_strides(device, shape, vocabulary, spare, order, temperature, labels_dtype):
    torch.manual_seed(0)
    wide = torch.randn(*shape, vocabulary + spare, device=device)
    logits = wide[..., spare:]
    if order and shape:  # the vocabulary is not the fastest dimension
        logits = logits.transpose(0, -1).contiguous().transpose(0, -1)
    labels = torch.randint(0, vocabulary, shape, device=device).to(labels_dtype)
    temperature = torch.rand(shape, device=device) + 0.5 if temperature is None else temperature
    hold(*both(logits, labels, temperature=temperature))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits(device, dtype):
    torch.manual_seed(0)
    logits = (3 * torch.randn(5, 1300, device=device)).to(dtype)
    ours, exact, plain = both(logits, torch.arange(5, device=device))
    hold(ours, exact, plain, gradient=8e-3)  # the interpreter rounds to bf16 towards zero: twice a GPU's error
    assert ours[0].dtype == torch.float32 and ours[2].dtype == dtype


LARGE = {
    "offset": lambda z: z + 1e4,
    "very_negative": lambda z: z - 300,
    "huge": lambda z: z * 1e4,
    "one_hot": lambda z: z.index_fill(-1, torch.tensor([7], device=z.device), 1e30),
    "equal": lambda z: z * 0 + 3,
    "whole_part_suppressed": lambda z: z.index_fill(-1, torch.arange(1100, 2500, device=z.device), -math.inf),
    "first_part_suppressed": lambda z: z.index_fill(-1, torch.arange(0, 2048, device=z.device), -math.inf),
}


@pytest.mark.parametrize("change", LARGE.values(), ids=LARGE.keys())
def test_adversarial_logits(device, change):
    torch.manual_seed(0)
    labels = torch.tensor([2100, 2400, 2499], device=device)
    logits = change(torch.randn(3, 2500, device=device))
    logits[torch.arange(3), labels] = torch.where(logits.isneginf().any(1), 1.0, logits[torch.arange(3), labels])
    ours, exact, plain = both(logits, labels)
    hold(ours, exact, plain)
    assert (ours[2][logits.isneginf()] == 0).all()


def test_rows_that_torch_calls_nan_are_nan_and_stay_alone(device):
    logits = torch.randn(6, 1500, device=device)
    logits[1] = -math.inf
    logits[2, 3] = math.inf
    logits[3, 4] = math.nan
    logits[4, 5] = -math.inf
    labels = torch.tensor([0, 1, 2, 3, 5, 9], device=device)
    log_probs, entropy = kernels.token_log_probs(logits, labels, return_entropy=True, backend="triton")
    assert log_probs[1:4].isnan().all() and log_probs[4] == -math.inf and torch.isfinite(log_probs[[0, 5]]).all()
    assert torch.isfinite(entropy[[0, 4, 5]]).all()


def test_ignored_rows_are_not_read(device):
    logits = torch.randn(4, 1100, device=device)
    logits[1] = math.nan
    leaf = logits.requires_grad_()
    labels = torch.tensor([3, -100, 1099, 0], device=device)
    log_probs, entropy = kernels.token_log_probs(leaf, labels, return_entropy=True, backend="triton")
    (log_probs + entropy).sum().backward()
    assert log_probs[1] == 0 and entropy[1] == 0 and (leaf.grad[1] == 0).all() and torch.isfinite(leaf.grad).all()


def test_the_same_bits_alone_and_in_a_batch_and_every_time(device):
    """Of rows in one program; how a row is split depends on the number of rows, so the counts are of one class."""
    logits, labels = torch.randn(160, 900, device=device), torch.randint(0, 900, (160,), device=device)
    whole = kernels.token_log_probs(logits, labels, backend="triton")
    assert torch.equal(whole, kernels.token_log_probs(logits, labels, backend="triton"))
    assert torch.equal(whole[16:], kernels.token_log_probs(logits[16:], labels[16:], backend="triton"))


def test_double_precision_is_refused_and_the_argument_reaches_the_kernels(device):
    logits, labels = (
        torch.randn(2, 50, device=device).requires_grad_(),
        torch.zeros(2, dtype=torch.int64, device=device),
    )
    with recorded(start=True) as launches:
        kernels.token_log_probs(logits, labels, backend="triton").sum().backward()
        assert [launch.kernel.fn.__name__ for launch in launches] == ["_forward", "_backward"]
        kernels.token_log_probs(logits, labels, backend="torch").sum().backward()
        assert len(launches) == 2
    with pytest.raises(ValueError, match="float64 runs in torch only"):
        kernels.token_log_probs(logits.double(), labels, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_narrow_gradient_may_lie_over_the_logits(device, dtype):
    """fp32 logits, and their gradient in another dtype in the first half of each row: how the chunked loss saves it."""
    torch.manual_seed(0)
    n, vocabulary = 5, 2600
    logits = torch.randn(n, vocabulary, device=device)
    old, advantages = torch.full((n,), -8.0, device=device), torch.randn(n, device=device)
    labels, mask = torch.arange(n, device=device), torch.arange(n, device=device) != 3
    options, count = LossOptions(0.2, 0.2, None, entropy_coef=0.1), torch.tensor(4.0, device=device)
    arguments = (Tokens(old, advantages, mask, None, None), count, options)
    apart, over = torch.full_like(logits, math.nan), logits.clone()
    expected = log_probs.rows_ppo(Rows(logits, labels, None, 0.9), *arguments, apart)
    out = over.view(dtype)[:, :vocabulary]
    found = log_probs.rows_ppo(Rows(over, labels, None, 0.9), *arguments, out)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    limit = 0 if dtype == torch.float32 else 2.0**-7
    assert ((out.float() - apart).abs() <= limit * apart.abs()).all() and (out[3] == 0).all()
