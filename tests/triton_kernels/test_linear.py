"""Hidden states to log-probs in Triton: dtypes, tiles, parts of the vocabulary, slices, rows left out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastrlhf_kernels as kernels
from fastrlhf_kernels import reference
from fastrlhf_kernels.gpu import linear_log_probs, tuning
from fastrlhf_kernels.gpu.launch import recorded
from fastrlhf_kernels.operands import Head

QUICK = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "temperature": {"temperature": 0.7, "logit_scale": 1.3},
    "softcap": {"logit_softcap": 3.0},
    "lora": {"lora": True},
    "everything": {"bias": True, "temperature": 1.3, "logit_scale": 0.8, "logit_softcap": 4.0, "lora": True},
}


def problem(device, n=37, vocabulary=700, width=40, dtype=torch.float32, **options):
    torch.manual_seed(0)
    hidden, weight = torch.randn(n, width, device=device), torch.randn(vocabulary, width, device=device) / 2
    labels = torch.randint(0, vocabulary, (n,), device=device)
    if options.get("bias"):
        options["bias"] = torch.randn(vocabulary, device=device).to(dtype)
    if options.get("lora"):
        a, b = torch.randn(5, width, device=device) / 4, torch.randn(vocabulary, 5, device=device) / 4
        options["lora"] = (a.to(dtype), b.to(dtype), 0.3)
    return hidden.to(dtype), weight.to(dtype), labels, options


def plain_head(hidden, weight, labels) -> Head:
    return Head(hidden, weight, labels, None, None, 1.0, 1.0, None, None, None, 1.0)


def compare(hidden, weight, labels, options, *, log_prob=2e-5, entropy=5e-5, gradient=5e-6) -> None:
    """Against float64 on the same rounded inputs: log-prob and entropy absolutely, gradients by norm."""
    results = []
    for exact in (False, True):
        wide = (lambda t: t.detach().double()) if exact else (lambda t: t.detach())
        leaves = [wide(hidden), wide(weight)]
        used = dict(options)
        if "bias" in used:
            leaves.append(wide(used["bias"]))
            used["bias"] = leaves[-1]
        if "lora" in used:
            leaves += [wide(used["lora"][0]), wide(used["lora"][1])]
            used["lora"] = (*leaves[-2:], used["lora"][2])
        leaves = [t.requires_grad_() for t in leaves]
        function = reference.linear_log_probs if exact else kernels.linear_log_probs
        more = {} if exact else {"backend": "triton"}
        outputs = function(*leaves[:2], labels, return_entropy=True, **used, **more)
        total = sum((out * torch.linspace(-1, 1, out.numel(), device=out.device)).sum() for out in outputs)
        results.append((outputs, torch.autograd.grad(total, leaves)))
    (ours, our_grads), (theirs, their_grads) = results
    for a, b, limit in zip(ours, theirs, (log_prob, entropy), strict=True):
        assert a.dtype == torch.float32
        assert float((a.double() - b).abs().max()) <= limit
    for a, b in zip(our_grads, their_grads, strict=True):
        assert float((a.double() - b).norm()) <= gradient * float(b.norm())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(("dtype", "gradient"), [(torch.float32, 5e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_every_option_in_every_dtype(device, options, dtype, gradient):
    """Log-probs are as exact as in fp32. (8e-3, not 4e-3, as the interpreter rounds to bf16 towards zero.)"""
    hidden, weight, labels, options = problem(device, dtype=dtype, **options)
    compare(hidden, weight, labels, options, gradient=gradient)


@QUICK
@given(
    n=st.integers(1, 70),
    vocabulary=st.integers(1, 900),
    width=st.integers(1, 130),
    spare=st.integers(0, 3),
    transposed=st.booleans(),
)
def test_any_shape_and_strides(device, n, vocabulary, width, spare, transposed):
    torch.manual_seed(0)
    hidden = torch.randn(n, width + spare, device=device)[:, spare:]
    weight = (torch.randn(vocabulary, width + spare, device=device) / 2)[:, spare:]
    if transposed:
        weight = weight.T.contiguous().T
    compare(hidden, weight, torch.randint(0, vocabulary, (n,), device=device), {})


def test_a_long_vocabulary_in_parts_and_a_large_offset(device):
    hidden, weight, labels, _ = problem(device, n=3, vocabulary=9000, width=16)
    compare(hidden, weight, labels, {})
    compare(hidden, weight, labels, {"bias": torch.full((9000,), -200.0, device=device)}, log_prob=1e-4)


@pytest.mark.parametrize("options", ["plain", "everything"])
@pytest.mark.parametrize("n", [13, 70])
def test_tensor_descriptors(device, n, options):
    """Chips that have them; ends of rows, columns and depth inside a block. The same in the interpreter."""
    sizes = {"n": n, "vocabulary": 700, "width": 40, "dtype": torch.bfloat16}
    hidden, weight, labels, used = problem(device, **sizes, **OPTIONS[options])
    chip = tuning.chip_of(device)
    chip = chip._replace(descriptors=True) if chip.name == "interpreter" else chip
    with tuning.pretend(chip):
        compare(hidden, weight, labels, used, gradient=8e-3)


def test_descriptors_are_used_where_rows_start_at_16_bytes():
    chip = tuning.CHIPS["sm_90"]
    make = lambda width: torch.empty(64, width, dtype=torch.bfloat16, device="meta")  # noqa: E731
    labels = torch.empty(64, dtype=torch.int64, device="meta")
    for width, dtype, expected in ((40, torch.bfloat16, True), (44, torch.bfloat16, False), (40, torch.float32, False)):
        head = plain_head(make(width).to(dtype), make(width).to(dtype), labels)
        with tuning.pretend(chip), recorded() as launches:
            linear_log_probs.linear_forward(head, entropy=False)
        assert launches[0].constants["DESCRIPTORS"] is expected


def test_mixed_dtypes_are_summed_in_fp32(device):
    hidden, weight, labels, _ = problem(device)
    compare(hidden.bfloat16(), weight, labels, {}, gradient=8e-3)
    compare(hidden, weight.bfloat16(), labels, {}, gradient=8e-3)


def test_slices_of_the_backward_do_not_change_the_gradient(device, monkeypatch):
    hidden, weight, labels, options = problem(device, bias=True, lora=True)
    monkeypatch.setattr(linear_log_probs, "columns_at_once", lambda n, vocabulary, workspace: 256)
    compare(hidden, weight, labels, options)


def test_a_slice_never_holds_more_than_the_contract_allows():
    for n in (1, 300, 2048, 8192, 70_000, 300_000):
        for vocabulary in (1, 1000, 49152, 151936, 256000):
            columns = linear_log_probs.columns_at_once(n, vocabulary, 1 << 31)
            assert 1 <= columns <= vocabulary
            assert n * columns <= max(max(2048, n // 4) * vocabulary, 128 * n)
            assert n * columns * 2 <= max(1 << 30, 128 * 2 * n)


@pytest.mark.parametrize("kept", ["some", "none"])
def test_rows_left_out_may_hold_nan_and_cost_nothing(device, kept):
    hidden, weight, labels, _ = problem(device, n=20)
    labels[:] = torch.where((torch.arange(20, device=device) % 3 == 0) & (kept == "some"), labels, -100)
    hidden[labels == -100] = math.nan
    hidden.requires_grad_(), weight.requires_grad_()
    log_probs, entropy = kernels.linear_log_probs(hidden, weight, labels, return_entropy=True, backend="triton")
    (log_probs.sum() + entropy.sum()).backward()
    assert (log_probs[labels == -100] == 0).all() and (entropy[labels == -100] == 0).all()
    assert torch.isfinite(weight.grad).all() and torch.isfinite(hidden.grad).all()
    assert (hidden.grad[labels == -100] == 0).all()


def test_gradients_nobody_needs_are_not_computed(device, monkeypatch):
    products = []
    original = linear_log_probs.product
    monkeypatch.setattr(linear_log_probs, "product", lambda *a: products.append(1) or original(*a))
    hidden, weight, labels, _ = problem(device)
    kernels.linear_log_probs(hidden.requires_grad_(), weight, labels, backend="triton").sum().backward()
    assert not products and hidden.grad is not None and weight.grad is None


def test_batch_invariant_launches_do_not_depend_on_the_batch():
    """The same tile and the same parts of the vocabulary for every number of rows; without it they differ."""
    for chip in tuning.CHIPS.values():
        for invariant in (True, False):
            found = set()
            for n in (1, 16, 17, 300, 8192):
                tile = tuning.product_tile(chip, n, True, batch_invariant=invariant)
                splits = tuning.product_splits(chip, -(-n // tile.rows), 151936, tile, batch_invariant=invariant)
                found.add((tile, splits))
            assert (len(found) == 1) == invariant
