"""Nothing of the head waits for the GPU: no value is read on the host, no shape depends on one."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastrlhf_kernels as kernels
from fastrlhf_kernels import loss_ops, ops
from fastrlhf_kernels.gpu.launch import recorded
from tests.operators import waits_for_the_gpu


class Waits(TorchDispatchMode):
    """Operations that on a GPU wait for it, inside our operators too; and matrix products, by their size."""

    def __init__(self):
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.multiplied = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if func.namespace == "fastrlhf":  # run its body under this mode; calling it would hide the body
            with self:
                return getattr(ops if hasattr(ops, name) else loss_ops, name).run(*args)
        waits = waits_for_the_gpu(func, args, kwargs)
        if waits:
            self.waits[waits] += 1
        if name in ("mm", "addmm", "addmm_"):
            self.multiplied += args[-2].numel() * args[-1].shape[1]
        return func(*args, **(kwargs or {}))


def problem(device, n=20):
    torch.manual_seed(0)
    hidden, weight = torch.randn(n, 16, device=device), torch.randn(300, 16, device=device)
    labels = torch.randint(0, 300, (n,), device=device)
    labels[::3] = -100
    hidden[::3] = torch.nan
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def losses(hidden, weight, labels):
    """One of each function of the head; the sum of what they give."""
    given, plain = (hidden, weight, labels), {"backend": "triton", "validate": False}
    row, mask = torch.ones(len(labels), device=labels.device), labels != -100
    log_probs, entropy = kernels.linear_log_probs(*given, return_entropy=True, **plain)
    total = log_probs.sum() + entropy.sum() + kernels.linear_ppo_loss(*given, row, row, mask, **plain).loss
    options = {"entropy_coef": 0.1, "normalizer": row.sum()}
    total = total + kernels.linear_ppo_loss(*given, row, row, mask, **options, **plain).loss
    several = torch.stack([labels, labels], 1)
    for wanted, workspace in ((labels, None), (labels, 4 * 320 * 4), (several, 4 * 320 * 4)):
        given = (hidden, weight, wanted, lambda lp: lp.exp().mean())
        total = total + kernels.linear_loss(*given, workspace=workspace, **plain).loss
    return total


def test_no_function_of_the_head_waits_for_the_gpu(device):
    given = problem(device)
    with Waits() as seen:
        total = losses(*given)
        total.backward()
    assert seen.waits == Counter()
    hidden, weight, labels = given
    assert torch.isfinite(weight.grad).all() and (hidden.grad[::3] == 0).all() and torch.isfinite(total)


def test_the_counter_counts(device):
    hidden, weight, labels = problem(device)
    with Waits() as seen:
        bool((labels != -100).all()), hidden[labels != -100], (labels == -100).nonzero()
    assert seen.waits["_local_scalar_dense"] == 1 and seen.waits["boolean index"] + seen.waits["nonzero"] >= 2


def test_ignored_rows_give_what_leaving_them_out_gives(device):
    hidden, weight, labels = problem(device)
    keep = labels != -100
    with torch.no_grad():
        some = kernels.linear_log_probs(hidden[keep], weight, labels[keep], backend="triton")
        log_probs = kernels.linear_log_probs(hidden, weight, labels, backend="triton")
    torch.testing.assert_close(log_probs[keep], some, atol=2e-6, rtol=1e-6)
    assert (log_probs[~keep] == 0).all()


@pytest.mark.parametrize(("rows", "products", "slices"), [(64, 3, 1), (32, 3.5, 1), (1, 4 - 1 / 64, 4)])
def test_linear_loss_takes_three_products_where_its_logits_are_kept(device, rows, products, slices):
    """The smaller the workspace, the narrower the slices of the vocabulary whose gradient is in memory."""
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 16, device=device).requires_grad_() for n in (64, 512))
    labels = torch.randint(0, 512, (64,), device=device)
    with Waits() as seen, recorded(start=True) as launches:
        given = (hidden, weight, labels, torch.mean)
        kernels.linear_loss(*given, workspace=rows * 512 * 4, backend="triton", validate=False).loss.backward()
    started = Counter(launch.kernel.fn.__name__ for launch in launches)
    again = rows < 64
    assert started["_linear_backward"] == again * slices and started["_from_logits"] == slices
    assert started["_linear_forward"] == 0
    fused = (64 - rows) * 16 * 512 * again  # in the kernel that makes the gradient of rows that are not kept
    assert seen.multiplied + fused == products * 64 * 16 * 512
