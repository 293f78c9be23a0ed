"""Hidden states to the PPO loss in Triton: dtypes, options, chunks, and rows that could not be left out."""

from __future__ import annotations

import json

import pytest
import torch

import fastrlhf_kernels as kernels
from fastrlhf_kernels import reference
from fastrlhf_kernels.gpu import autotune, exponential_ppo, linear_ppo_loss, tuning
from fastrlhf_kernels.gpu.head import DenseHead
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


def in_chunks(monkeypatch, rows: int) -> None:
    """Have the launcher cut its rows, as it does where the workspace is small beside the vocabulary."""
    monkeypatch.setattr(linear_ppo_loss, "chunk_rows", lambda n, vocabulary, size=4: min(n, rows))


@pytest.mark.parametrize("chunk", [10_000, 16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 1.2e-2), (torch.float16, 2e-3)])
def test_loss_statistics_and_gradients(device, monkeypatch, options, dtype, limit, chunk):
    """The loss is as exact as in fp32; gradients are rounded to the dtype (by the interpreter towards zero)."""
    in_chunks(monkeypatch, chunk)
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


EXPONENTIAL_OPTIONS = {
    "plain": {},
    "bias": {"bias": True, "logit_scale": 1.3},
    "everything": {
        **{"bias": True, "logit_scale": 0.8, "logit_softcap": 4.0},
        **{"kl_coef": 0.1, "dual_clip": 3.0, "temperature": 1.2},
    },
}


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("options", EXPONENTIAL_OPTIONS.values(), ids=EXPONENTIAL_OPTIONS.keys())
def test_the_plan_without_a_softmax_pass(device, monkeypatch, options, descriptors):
    """Against float64, with old log-probs near and so far that rows must be computed again; no other plan runs."""
    chip = tuning.chip_of(device)._replace(softmax_from=1000)
    in_chunks(monkeypatch, 32)
    leaves, labels, (old, advantages, mask), used = problem(device, torch.bfloat16, **options)
    old[3], old[4], old[5] = old[3] - 200, old[4] + 90, old[5] - 60
    mask[2:6] = True
    arguments = (leaves, labels, (old, advantages, mask), used)
    triton = lambda *a, **k: kernels.linear_ppo_loss(*a, backend="triton", **k)  # noqa: E731
    advantages[3] = abs(advantages[3])  # clipped: a ratio of e^200 has no finite loss otherwise
    described = chip._replace(descriptors=descriptors) if chip.name == "interpreter" else chip
    with tuning.pretend(described), recorded(start=True) as launches:
        loss, stats, grads = run(triton, *arguments, lambda t: t.detach().clone())
    assert {launch.kernel.fn.__name__ for launch in launches} == {"_exponentials", "_exponential_terms"}
    want, want_stats, want_grads = run(reference.linear_ppo_loss, *arguments, lambda t: t.detach().double())
    assert abs(float(loss) - float(want)) <= 1e-5 * max(1.0, abs(float(want)))
    for name in ("log_probs", "entropy", "clip_frac"):
        assert float((stats[name].double() - want_stats[name]).abs().max()) <= 5e-5, name
    for ours, theirs in zip(grads, want_grads, strict=True):
        assert float((ours.double() - theirs).norm()) <= 1.2e-2 * float(theirs.norm())


def test_rows_of_the_plan_without_a_softmax_pass_that_are_out_of_range(device, monkeypatch):
    """Old log-probs of -inf, a suppressed label, a row without a finite logit: as the other plan has them."""
    leaves, labels, (old, advantages, mask), _ = problem(device, torch.bfloat16, n=8, vocabulary=70, bias=True)
    hidden, weight, bias = leaves
    bias[labels[1]] = -torch.inf
    old[2], old[3], mask[:], mask[7] = -torch.inf, old[3] + 300, True, False
    labels[7] = -5
    options, count = LossOptions(0.2, 0.2, 3.0), mask.sum().float()
    hidden = torch.where(mask[:, None], hidden, 0)
    head = DenseHead(Head(hidden, weight, labels, bias, None, 1.0, 1.0, None, None, None, 1.0))
    tokens = Tokens(old, advantages, mask, None, None)
    given = (head, tokens, count, options, Need(True, False, False, False), 8)
    ours = exponential_ppo.exponential_ppo(*given)
    theirs = linear_ppo_loss.softmax_ppo(*given)
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        assert torch.allclose(a, b, atol=2e-5, rtol=1e-5, equal_nan=True)
    rows = [0, 3, 4, 5, 6, 7]
    assert torch.allclose(ours[3][0][rows], theirs[3][0][rows], atol=1e-3, rtol=2e-2)


def test_the_faster_plan_is_measured_once_where_that_is_asked_for(device, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTRLHF_AUTOTUNE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    autotune.answers.clear()
    leaves, labels, per_token, options = problem(device, torch.bfloat16, n=4, vocabulary=40, width=16)
    arguments = (leaves[0].requires_grad_(), leaves[1], labels, *per_token)

    def softmax_passes() -> int:
        with recorded(start=True) as launches:
            kernels.linear_ppo_loss(*arguments, backend="triton")
        return sum(launch.kernel.fn.__name__ == "_ppo" for launch in launches)

    assert softmax_passes() >= autotune.REPETITIONS
    (answer,) = json.loads(autotune.cache_file().read_text()).values()
    assert answer in ("softmax", "exponentials")
    autotune.answers.clear()  # another process reads the file
    assert softmax_passes() == (answer == "softmax")


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
            rows = linear_ppo_loss.chunk_rows(n, vocabulary)
            assert 1 <= rows <= n and rows * vocabulary * 4 <= max(1 << 30, 128 * 4 * vocabulary)
            twice = linear_ppo_loss.chunk_rows(n, vocabulary, 2)
            assert rows <= twice <= n and twice * vocabulary * 2 <= max(1 << 30, 128 * 2 * vocabulary)
