"""Hidden states to the PPO loss in Triton: dtypes, options, chunks, and rows that could not be left out."""

from __future__ import annotations

import pytest
import torch

import fastrlhf_kernels as kernels
from fastrlhf_kernels import reference, triton_linear_ppo_loss
from fastrlhf_kernels.losses import LossOptions
from fastrlhf_kernels.triton_linear_log_probs import Head

OPTIONS = {
    "plain": {},
    "bias": {"bias": True, "logit_scale": 1.3},
    "softcap": {"logit_softcap": 3.0, "temperature": 0.7},
    "lora": {"lora": True},
    "kl_and_entropy": {"kl_coef": 0.2, "entropy_coef": 0.05},
    "everything": {"bias": True, "logit_scale": 0.8, "logit_softcap": 4.0, "lora": True, "kl_coef": 0.1,
                   "entropy_coef": 0.02, "dual_clip": 3.0, "temperature": 1.2},
}  # fmt: skip


def problem(device, dtype, n=37, vocabulary=300, width=24, **options):
    torch.manual_seed(0)
    make = lambda *shape: torch.randn(*shape, device=device)  # noqa: E731
    leaves = [make(n, width).to(dtype), (make(vocabulary, width) / 2).to(dtype)]
    if options.pop("bias", False):
        leaves.append(make(vocabulary).to(dtype))
        options["bias"] = len(leaves) - 1
    if options.pop("lora", False):
        leaves += [(make(5, width) / 4).to(dtype), (make(vocabulary, 5) / 4).to(dtype)]
        options["lora"] = len(leaves) - 2
    labels = torch.randint(0, vocabulary, (n,), device=device)
    current = kernels.linear_log_probs(leaves[0].double(), leaves[1].double(), labels, backend="torch").float()
    per_token = [current + make(n) / 4, make(n), torch.rand(n, device=device) < 0.8]
    if "kl_coef" in options:
        options["ref_log_probs"] = current + make(n) / 4
    return leaves, labels, per_token, options


def run(function, leaves, labels, per_token, options, wide):
    leaves = [wide(t).requires_grad_() for t in leaves]
    options = {k: wide(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    if "bias" in options:
        options["bias"] = leaves[options["bias"]]
    if "lora" in options:
        options["lora"] = (leaves[options["lora"]], leaves[options["lora"] + 1], 0.3)
    old, advantages, mask = per_token
    loss, stats = function(leaves[0], leaves[1], labels, wide(old), wide(advantages), mask, **options)
    return loss, stats, torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("chunk", [10_000, 16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 1.2e-2), (torch.float16, 2e-3)])
def test_loss_statistics_and_gradients(device, monkeypatch, options, dtype, limit, chunk):
    """The loss is as exact as in fp32; gradients are rounded to the dtype (by the interpreter towards zero)."""
    monkeypatch.setattr(triton_linear_ppo_loss, "chunk_rows", lambda n, vocabulary: min(n, chunk))
    arguments = problem(device, dtype, **options)
    triton = lambda *a, **k: kernels.linear_ppo_loss(*a, backend="triton", **k)  # noqa: E731
    loss, stats, grads = run(triton, *arguments, lambda t: t.detach().clone())
    want, want_stats, want_grads = run(reference.linear_ppo_loss, *arguments, lambda t: t.detach().double())
    assert abs(float(loss) - float(want)) <= 1e-5 * max(1.0, abs(float(want)))
    assert stats.keys() == want_stats.keys()
    for name, value in want_stats.items():
        assert float((stats[name].double() - value).abs().max()) <= 5e-5, name
    for ours, theirs in zip(grads, want_grads, strict=True):
        assert float((ours.double() - theirs).norm()) <= limit * float(theirs.norm())


def test_rows_that_could_not_be_left_out_count_nothing(device):
    """As under capture of a CUDA graph: masked rows are computed, on zeros, with labels that may be anything."""
    leaves, labels, (old, advantages, mask), _ = problem(device, torch.float32)
    hidden, weight = leaves
    options, count = LossOptions(0.2, 0.2, None, entropy_coef=0.1), mask.sum().float()
    results = []
    for rows, kept in ((mask.nonzero()[:, 0], None), (None, mask)):
        pick = (lambda t, rows=rows: t[rows]) if rows is not None else (lambda t: torch.where(mask, t, 0))
        x = hidden if rows is not None else torch.where(mask[:, None], hidden, 0)
        y = labels[rows] if rows is not None else torch.where(mask, labels, -7)
        head = Head.build(x, weight, rows, None, 1.0, 1.0, None, None, None, 1.0)
        loss, _, entropy, grads = triton_linear_ppo_loss.linear_ppo(
            head, y, kept, pick(old), pick(advantages), None, None, count, options, [True, True, False, False]
        )
        results.append((loss.sum(), entropy.sum(), grads[1], grads[0].sum(0)))
    for a, b in zip(*results, strict=True):
        assert torch.isfinite(b).all() and torch.allclose(a, b, atol=1e-5, rtol=1e-5)


def test_a_chunk_keeps_within_its_workspace():
    for vocabulary in (1, 1000, 49152, 151936, 256000):
        for n in (1, 100, 8192, 70_000):
            rows = triton_linear_ppo_loss.chunk_rows(n, vocabulary)
            assert 1 <= rows <= n and rows * vocabulary * 4 <= max(1 << 30, 128 * 4 * vocabulary)
