"""Hidden states to the PPO loss in Triton: dtypes, options, chunks, and rows that could not be left out."""

from __future__ import annotations

import pytest
import torch

import fastrlhf_kernels as kernels
from fastrlhf_kernels import reference
from fastrlhf_kernels.gpu import linear_ppo_loss
from fastrlhf_kernels.gpu.launch import recorded
from fastrlhf_kernels.operands import Head, LossOptions, Need, Tokens

OPTIONS = {
    "plain": {},
    "bias": {"bias": True, "logit_scale": 1.3},
    "softcap": {"logit_softcap": 3.0, "temperature": 0.7},
    "lora": {"lora": True},
    "kl_and_entropy": {"kl_coef": 0.2, "entropy_coef": 0.05},
    "everything": {
        **{"bias": True, "logit_scale": 0.8, "logit_softcap": 4.0, "lora": True},
        **{"kl_coef": 0.1, "entropy_coef": 0.02, "dual_clip": 3.0, "temperature": 1.2},
    },
}


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


def triton_ppo_loss(*arguments, **options):
    return kernels.linear_ppo_loss(*arguments, backend="triton", **options)


def in_chunks(monkeypatch, rows: int) -> None:
    """Have the launcher cut its rows, as it does where the workspace is small beside the vocabulary."""
    monkeypatch.setattr(linear_ppo_loss, "chunk_rows", lambda n, vocabulary, workspace: min(n, rows))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(
    ("dtype", "limit", "chunk"),
    [
        (torch.float32, 1e-5, 10_000),
        (torch.float32, 1e-5, 16),
        (torch.bfloat16, 1.2e-2, 16),
        (torch.float16, 2e-3, 10_000),
    ],
)
def test_loss_statistics_and_gradients(device, monkeypatch, options, dtype, limit, chunk):
    """The loss is as exact as in fp32; gradients are rounded to the dtype (by the interpreter towards zero)."""
    in_chunks(monkeypatch, chunk)
    arguments = problem(device, dtype, **options)
    loss, stats, grads = run(triton_ppo_loss, *arguments, lambda t: t.detach().clone())
    want, want_stats, want_grads = run(reference.linear_ppo_loss, *arguments, lambda t: t.detach().double())
    assert abs(float(loss) - float(want)) <= 1e-5 * max(1.0, abs(float(want)))
    assert stats.keys() == want_stats.keys()
    for name, value in want_stats.items():
        assert float((stats[name].double() - value).abs().max()) <= 5e-5, name
    for ours, theirs in zip(grads, want_grads, strict=True):
        assert float((ours.double() - theirs).norm()) <= limit * float(theirs.norm())


@pytest.mark.parametrize(
    ("options", "dtype", "limit"),
    [
        *((name, torch.float32, 1e-5) for name in ("plain", "bias", "softcap", "lora", "everything")),
        *((name, torch.bfloat16, 1.2e-2) for name in ("plain", "everything")),
        ("everything", torch.float16, 3e-3),
    ],
)
def test_rows_far_from_their_old_log_probs_are_computed_again(device, monkeypatch, options, dtype, limit):
    """Against float64; the ratio is e^200 and its inverse: neither fits the exponentials relative to the old ones."""
    in_chunks(monkeypatch, 16)
    given = {k: v for k, v in OPTIONS[options].items() if k != "entropy_coef"}
    leaves, labels, (old, advantages, mask), used = problem(device, dtype, **given)
    old[3], old[4], old[5] = old[3] - 200, old[4] + 90, old[5] - 60
    mask[2:6], advantages[3], advantages[5] = True, abs(advantages[3]), abs(advantages[5])  # clipped: a finite loss
    arguments = (leaves, labels, (old, advantages, mask), used)
    loss, stats, grads = run(triton_ppo_loss, *arguments, lambda t: t.detach().clone())
    want, want_stats, want_grads = run(reference.linear_ppo_loss, *arguments, lambda t: t.detach().double())
    assert abs(float(loss) - float(want)) <= 1e-5 * max(1.0, abs(float(want)))
    for name in ("log_probs", "entropy", "clip_frac"):
        assert float((stats[name].double() - want_stats[name]).abs().max()) <= 5e-5, name
    for ours, theirs in zip(grads, want_grads, strict=True):
        assert float((ours.double() - theirs).norm()) <= limit * float(theirs.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_have_no_place_to_start_from(device, dtype):
    """Old log-probs of -inf, a suppressed label, masked rows with labels that may be anything: as torch has them."""
    leaves, labels, (old, advantages, mask), _ = problem(device, dtype, n=8, vocabulary=70, bias=True)
    hidden, weight, bias = leaves
    bias[labels[1]] = -torch.inf
    old[2], old[3], mask[:], mask[7] = -torch.inf, old[3] + 300, True, False
    labels[7] = -5
    results = []
    for backend in ("triton", "torch"):
        rows = hidden.clone().requires_grad_()
        given = (rows, weight, labels, old, advantages, mask)
        loss, stats = kernels.linear_ppo_loss(*given, bias=bias, dual_clip=3.0, backend=backend, validate=False)
        loss.backward()
        results.append((stats["log_probs"], rows.grad.float()))
    for ours, theirs in zip(*results, strict=True):
        ours, theirs = (t[[0, 3, 4, 5, 6, 7]] for t in (ours, theirs))
        assert torch.allclose(ours, theirs, atol=2e-3 if dtype != torch.float32 else 2e-5, rtol=3e-2)
    ours, theirs = (result[0] for result in results)
    assert torch.allclose(ours, theirs, atol=2e-5, rtol=1e-5, equal_nan=True)


def test_at_step_zero_the_ratio_is_one_but_for_the_rounding_of_a_sum(device):
    leaves, labels, (_, advantages, mask), _ = problem(device, torch.bfloat16)
    old = kernels.linear_log_probs(*leaves, labels, backend="triton")
    _, stats = triton_ppo_loss(*leaves, labels, old, advantages, mask)
    assert abs(float(stats["ratio"]) - 1) <= 1e-6 and float(stats["approx_kl"]) <= 1e-12 and stats["clip_frac"] == 0


@pytest.mark.parametrize("options", ["plain", "kl_and_entropy"])
def test_a_chunk_takes_one_sweep(device, options):
    """Without the entropy bonus: one read of the logits, and a look at every row whether it must be computed again."""
    arguments = problem(device, torch.bfloat16, **OPTIONS[options])
    with recorded(start=True) as launches:
        run(triton_ppo_loss, *arguments, lambda t: t.detach().clone())
    started = [launch.kernel.fn.__name__ for launch in launches]
    assert [name for name in started if name != "_scale"] == (
        ["_ppo"] if options == "kl_and_entropy" else ["_relative", "_again"]
    )


def test_rows_that_could_not_be_left_out_count_nothing(device):
    """As under capture of a CUDA graph: masked rows are computed, on zeros, with labels that may be anything."""
    leaves, labels, (old, advantages, mask), _ = problem(device, torch.float32)
    hidden, weight = leaves
    options, count = LossOptions(0.2, 0.2, None, entropy_coef=0.1), mask.sum().float()
    results = []
    for rows, kept in ((mask.nonzero()[:, 0], mask[mask]), (None, mask)):
        pick = (lambda t, rows=rows: t[rows]) if rows is not None else (lambda t: torch.where(mask, t, 0))
        x = hidden if rows is not None else torch.where(mask[:, None], hidden, 0)
        y = labels[rows] if rows is not None else torch.where(mask, labels, -7)
        x = x if rows is None else x[rows]
        head = Head(x, weight, y, None, None, 1.0, 1.0, None, None, None, 1.0)
        tokens = Tokens(pick(old), pick(advantages), kept, None, None)
        need = Need(True, True, False, False)
        loss, _, entropy, grads = linear_ppo_loss.linear_ppo(head, tokens, count, options, need)
        results.append((loss.sum(), entropy.sum(), grads[1], grads[0].sum(0)))
    for a, b in zip(*results, strict=True):
        assert torch.isfinite(b).all() and torch.allclose(a, b, atol=1e-5, rtol=1e-5)


def test_a_chunk_keeps_within_its_workspace():
    for vocabulary in (1, 1000, 49152, 151936, 256000):
        for n in (1, 100, 8192, 70_000):
            rows = linear_ppo_loss.chunk_rows(n, vocabulary, 1 << 30)
            assert 1 <= rows <= min(n, max(4096, n // 4)) and rows * vocabulary * 4 <= 1 << 30
