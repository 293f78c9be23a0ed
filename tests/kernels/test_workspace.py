"""The bytes that the fused head may take: what they are by default, what they cut, and that they are enough."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastrlhf_kernels as kernels
from fastrlhf_kernels import reference, workspace
from fastrlhf_kernels.eager import chunked
from fastrlhf_kernels.operands import Head, LossOptions, Need, Tokens

V, H, N = 3000, 24, 50
ROW = workspace.row_bytes(V, 4)


def problem():
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, H).requires_grad_(), (torch.randn(V, H) / 3).requires_grad_()
    labels, mask = torch.randint(0, V, (N,)), torch.arange(N) % 7 != 3
    return hidden, weight, labels, torch.randn(N) / 9 - 8, torch.randn(N), mask


def log_prob_sum(hidden, weight, labels, old, advantages, mask, **options):
    return (kernels.linear_log_probs(hidden, weight, labels, **options) * advantages).sum()


def ppo(*given, **options):
    return kernels.linear_ppo_loss(*given, **options).loss


def any_loss(hidden, weight, labels, old, advantages, mask, **options):
    return kernels.linear_loss(hidden, weight, labels, lambda lp: (lp * advantages).sum(), **options).loss


EXACT = {
    log_prob_sum: lambda h, w, y, old, a, mask: (reference.linear_log_probs(h, w, y) * a).sum(),
    ppo: lambda *given: reference.linear_ppo_loss(*given)[0],
}
EXACT[any_loss] = EXACT[log_prob_sum]


def test_the_default_is_a_share_of_all_memory_of_a_gpu(monkeypatch):
    """Of all of it: what is free differs from call to call."""
    card = SimpleNamespace(total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    assert workspace.default_workspace(torch.device("cuda", 0)) == 80 * 2**30 // 32
    assert workspace.default_workspace(torch.device("cpu")) == 128 << 20


def test_a_chunk_keeps_within_the_workspace_and_the_contract():
    for vocabulary in (1, 1000, 49152, 151936, 256000):
        for n in (1, 100, 8192, 70_000):
            for limit in (workspace.row_bytes(vocabulary, 4), 100 << 20, 4 << 30):
                rows = workspace.chunk_rows(n, vocabulary, limit)
                assert 1 <= rows <= min(n, max(4096, n // 4)) and rows * vocabulary * 4 <= limit
                assert rows == n or rows < 128 or rows % 128 == 0 or rows == n // 4


@pytest.mark.parametrize("function", EXACT, ids=lambda function: function.__name__)
@pytest.mark.parametrize("rows", [1, 16, 1000])
def test_any_workspace_gives_the_same_results_but_for_rounding_and_the_same_one_the_same_bits(function, rows):
    given, results = problem(), []
    for limit in (rows * ROW, rows * ROW, None):
        loss = function(*given, workspace=limit, backend="torch")
        results.append([loss.detach(), *torch.autograd.grad(loss, given[:2])])
    wide = [t.detach().double().requires_grad_() for t in given[:2]]
    exact = EXACT[function](*wide, given[2], *(t.double() for t in given[3:5]), given[5])
    exact = [exact.detach(), *torch.autograd.grad(exact, wide)]
    assert all(map(torch.equal, *results[:2]))
    for ours, theirs in zip(results[0] + results[2], exact * 2, strict=True):
        assert float((ours.double() - theirs).norm()) <= 2e-6 * max(1.0, float(theirs.norm()))


def test_the_workspace_decides_in_which_order_is_added():
    """So a run keeps its own: the last bits of dW are those of its chunks."""
    given = problem()
    one, other = (torch.autograd.grad(ppo(*given, workspace=rows * ROW), given[1])[0] for rows in (16, 17))
    assert not torch.equal(one, other) and torch.allclose(one, other, atol=1e-6)


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that an operation gives."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple) else (out,):
            self.numbers = max(self.numbers, t.numel() if isinstance(t, torch.Tensor) else 0)
        return out


def test_no_larger_tensor_of_logits_is_made():
    hidden, weight, labels, old, advantages, mask = problem()
    limit = 30 * ROW  # more than the weight has
    head = Head(hidden.detach(), weight.detach(), labels, None, None, 1.0, 1.0, None, None, None, 1.0, limit)
    tokens, options = Tokens(old, advantages, mask, None, None), LossOptions(0.2, 0.2, None)
    with Largest() as seen:
        chunked.linear_ppo(head, tokens, torch.tensor(9.0), options, Need(True, True, False, False))
    assert V * 25 < seen.numbers <= limit // 4
    with Largest() as whole:
        chunked.linear_ppo(
            head._replace(workspace=1 << 30), tokens, torch.tensor(9.0), options, Need(True, True, False, False)
        )
    assert whole.numbers == N * V


@pytest.mark.parametrize("function", EXACT, ids=lambda function: function.__name__)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            ROW - 1,
            f"workspace is {ROW - 1} bytes, less than one row of logits, {ROW} bytes for a vocabulary of {V}; pass",
        ),
        (0, "workspace is 0 bytes, less than one row of logits"),
        (2.0**30, "workspace must be a number of bytes, got float"),
        (True, "workspace must be a number of bytes, got bool"),
    ],
)
def test_a_workspace_that_is_none_is_refused_in_a_sentence(function, value, message):
    with pytest.raises(ValueError) as refused:
        function(*problem(), workspace=value)
    assert message in str(refused.value)
