"""What only a GPU shows: grids of more than 65,535 rows, tensors of more than 2 ** 31 elements, CUDA graphs, memcheck.

    pytest tests/gpu tests/triton_kernels tests/kernels

Skipped without a GPU. Against plain torch in float64 on rows picked from the large tensor.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch

import fastrlhf_kernels as kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = torch.device("cuda")


def exact(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.double(), -1).gather(1, labels[:, None])[:, 0].float()


def some_rows(n: int) -> torch.Tensor:
    return torch.tensor([0, 1, n // 2, n - 2, n - 1], device=DEVICE)


def needs(gibibytes: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gibibytes:
        pytest.skip(f"needs {gibibytes} GiB of GPU memory, {free:.0f} are free")


def test_more_rows_than_an_axis_of_a_grid_has():
    n = 70_001
    logits = torch.randn(n, 257, device=DEVICE, requires_grad=True)
    labels = torch.randint(0, 257, (n,), device=DEVICE)
    log_probs = kernels.token_log_probs(logits, labels, backend="triton")
    torch.testing.assert_close(log_probs, exact(logits.detach(), labels), atol=2e-6, rtol=1e-6)
    (grad,) = torch.autograd.grad(log_probs.sum(), logits)
    expected = torch.nn.functional.one_hot(labels, 257) - torch.softmax(logits.detach(), 1)
    torch.testing.assert_close(grad, expected.float(), atol=2e-6, rtol=1e-5)
    drawn = kernels.sample_tokens(logits.detach(), seed=1, top_k=9, backend="triton")
    assert torch.equal(drawn.tokens, kernels.sample_tokens(logits.detach(), seed=1, top_k=9, backend="torch").tokens)


def test_logits_of_more_than_two_to_the_31_elements():
    n, vocabulary = 16_384, 151_936
    needs(24)  # the logits, their gradient and what autograd copies
    logits = torch.randn(n, vocabulary, device=DEVICE, dtype=torch.bfloat16)
    labels = torch.randint(0, vocabulary, (n,), device=DEVICE)
    assert logits.numel() > 2**31
    rows = some_rows(n)
    expected = exact(logits[rows], labels[rows])
    log_probs = kernels.token_log_probs(logits, labels, backend="triton")
    torch.testing.assert_close(log_probs[rows], expected, atol=5e-6, rtol=1e-6)
    ones = torch.ones(n, device=DEVICE)
    leaf = logits.requires_grad_()
    arguments = (leaf, labels, log_probs.detach(), ones, ones.bool())
    result = kernels.token_ppo_loss(*arguments, normalizer=1.0, backend="triton")
    result.loss.backward()
    torch.testing.assert_close(result.stats["log_probs"][rows], expected, atol=5e-6, rtol=1e-6)
    assert bool(leaf.grad[rows].float().sum(1).abs().max() < 2e-2)


def test_a_head_of_more_than_two_to_the_31_logits():
    n, width, vocabulary = 65_600, 256, 49_152
    needs(8)
    hidden = torch.randn(n, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(vocabulary, width, device=DEVICE) * width**-0.5).bfloat16().requires_grad_()
    labels = torch.randint(0, vocabulary, (n,), device=DEVICE)
    log_probs = kernels.linear_log_probs(hidden, weight, labels, backend="triton")
    rows = some_rows(n)
    z = hidden.detach()[rows].double() @ weight.detach().double().T
    torch.testing.assert_close(log_probs[rows], exact(z, labels[rows]), atol=5e-6, rtol=1e-6)
    log_probs.sum().backward()
    one_hot = torch.nn.functional.one_hot(labels[rows], vocabulary).double()
    expected = (one_hot - torch.softmax(z, 1)) @ weight.detach().double()
    assert float((hidden.grad[rows].double() - expected).norm() / expected.norm()) < 8e-3
    per_token = (labels, log_probs.detach(), torch.ones(n, device=DEVICE), torch.ones_like(labels))
    fused = kernels.linear_ppo_loss(hidden, weight, *per_token, backend="triton")
    torch.testing.assert_close(fused.stats["ratio"], torch.ones((), device=DEVICE), atol=1e-4, rtol=0)


def test_a_decode_step_in_a_cuda_graph_follows_lengths_and_offsets():
    batch, positions = 8, 640
    q = torch.randn(batch, 8, 64, device=DEVICE, dtype=torch.bfloat16)
    k, v = (torch.randn(batch, positions, 2, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    weight = torch.randn(5000, 512, device=DEVICE, dtype=torch.bfloat16) * 0.05
    lengths = torch.full((batch,), 3, device=DEVICE, dtype=torch.int32)
    offsets, streams = torch.zeros(batch, dtype=torch.int64, device=DEVICE), torch.arange(batch, device=DEVICE)

    def step():
        out = kernels.decode_attention(q, k, v, lengths, scale=0.125, backend="triton", validate=False)
        logits = out.reshape(batch, -1) @ weight.T
        places = {"offset": offsets, "stream": streams}
        drawn = kernels.sample_tokens(logits, seed=3, top_k=40, top_p=0.9, backend="triton", **places)
        return out, drawn.tokens

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, tokens = step()
    for length in (1, 127, 128, 129, 640):
        lengths.fill_(length)
        offsets.fill_(length)
        graph.replay()
        expected = step()
        assert torch.equal(out, expected[0]) and torch.equal(tokens, expected[1])


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-x"]
    chosen = ["tests/triton_kernels/test_gae.py", "tests/kernels/test_decode_attention.py", "-k", "agree or row"]
    done = subprocess.run([*command, *chosen], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
