"""Sampling in Triton: the random bits, the keys that sort as floats do, and the same tokens as torch."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastrlhf_kernels as kernels
from fastrlhf_kernels import reference
from fastrlhf_kernels.gpu import sampling
from fastrlhf_kernels.gpu.launch import recorded
from fastrlhf_kernels.gpu.sampling import LOWEST, ordered, uniform

QUICK = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@triton.jit(do_not_specialize=["seed"])
def _uniforms(streams, offsets, out, seed):
    row = tl.program_id(0)
    u = uniform(seed.to(tl.uint64), tl.load(streams + row), tl.load(offsets + row))
    tl.store(out + row, u)


@triton.jit
def _keys(x, out, COLUMNS: tl.constexpr):
    place = tl.arange(0, COLUMNS)
    tl.store(out + place, ordered(tl.load(x + place)))


@pytest.mark.parametrize("seed", [0, 7, -1, 2**40 + 1, -(2**63)])
def test_random_bits_are_those_of_the_reference(device, seed):
    generator = torch.Generator().manual_seed(1)
    stream = torch.randint(-(2**63), 2**63 - 1, (16,), generator=generator)
    offset = torch.randint(0, 2**40, (16,), generator=generator)
    out = torch.empty(16, dtype=torch.float64, device=device)
    _uniforms[(16,)](stream.to(device), offset.to(device), out, seed)
    theirs = [reference.uniform(seed % 2**64, s, o) for s, o in zip(stream.tolist(), offset.tolist(), strict=True)]
    assert out.tolist() == theirs


def test_keys_sort_as_the_numbers_do(device):
    torch.manual_seed(0)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-45, -1e-45, 3e38, -3e38])
    x = torch.cat([torch.randn(120) * 10 ** torch.randint(-30, 30, (120,)).float(), special]).to(device)
    keys = torch.empty(128, dtype=torch.int32, device=device)
    _keys[(1,)](x, keys, COLUMNS=128)
    by_key = x[keys.long().argsort()]
    assert torch.equal(by_key, x.sort().values)
    assert int(keys[120]) == int(keys[121])  # 0 and -0
    assert int(keys.min()) > LOWEST.value


@QUICK
@given(
    n=st.integers(1, 4),
    vocabulary=st.integers(1, 2600),
    scale=st.sampled_from([0.05, 1.0, 6.0]),
    top_k=st.sampled_from([0, 1, 3, 50]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 1e-4]),
    temperature=st.sampled_from([1.0, 0.6, 0.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    padding=st.integers(0, 3),
)
def test_same_tokens_as_torch(device, n, vocabulary, scale, top_k, top_p, temperature, dtype, padding):
    torch.manual_seed(n * vocabulary)
    logits = (torch.randn(n, vocabulary + padding, device=device) * scale).to(dtype)[:, :vocabulary]
    options = {"seed": 5, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    ours = kernels.sample_tokens(logits, backend="triton", **options)
    theirs = kernels.sample_tokens(logits, backend="torch", **options)
    assert torch.equal(ours.tokens, theirs.tokens)
    torch.testing.assert_close(ours.policy_log_probs, theirs.policy_log_probs, atol=3e-6, rtol=1e-5)
    torch.testing.assert_close(ours.log_probs, theirs.log_probs, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "options", [{"top_k": 1}, {"top_k": 60}, {"top_k": 700, "top_p": 0.6}, {"top_p": 0.95}], ids=str
)
@pytest.mark.parametrize(("limit", "kernel"), [(8192, "_candidates"), (2048, "_candidates"), (32, "_histogram")])
def test_thresholds_of_candidates_and_of_histograms(device, monkeypatch, options, limit, kernel):
    """Rows of many ties (whole blocks at the bound), of suppressed stretches and of one value; more than a few choices.

    The smaller a program's share, the smaller the blocks; where top-k does not fit one program it is found by passes.
    """
    monkeypatch.setattr(sampling, "CANDIDATES", limit)
    torch.manual_seed(0)
    logits = torch.randn(6, 1100, device=device) * 2
    logits[1], logits[2], logits[3, 100:1000] = logits[1].round(), logits[2].bfloat16().float(), -torch.inf
    logits[4], logits[5] = 1.5, (logits[5] > 2).float()
    expected = "_histogram" if "top_k" not in options or (limit == 32 and options["top_k"] > 1) else kernel
    with recorded(start=True) as launches:
        ours = kernels.sample_tokens(logits, seed=5, backend="triton", **options)
    assert (launches[1].kernel.fn.__name__ == expected) or (limit == 32 and options.get("top_k") == 1)
    theirs = kernels.sample_tokens(logits, seed=5, backend="torch", **options)
    assert torch.equal(ours.tokens, theirs.tokens)
    torch.testing.assert_close(ours.log_probs, theirs.log_probs, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("edge", [0x40570000, 0x40400000, 0x40580400])
def test_neighbours_across_the_edge_of_a_pass_s_range_count_once(device, monkeypatch, edge):
    """16 numbers that follow each other, 8 on either side of an edge; so nearly equal that k of them are k / 16."""
    monkeypatch.setattr(sampling, "CANDIDATES", 32)
    numbers = torch.arange(edge - 8, edge + 8, dtype=torch.int32, device=device).view(torch.float32)
    logits = torch.full((3, 300), -40.0, device=device)
    logits[:, 100:116] = numbers
    for options, kept in [({"top_k": k}, k) for k in (7, 8, 9, 15)] + [
        ({"top_p": p}, 16 * p) for p in (7 / 16, 9 / 16)
    ]:
        with recorded(start=True) as launches:
            drawn = kernels.sample_tokens(logits, seed=5, backend="triton", **options)
        assert "_histogram" in {launch.kernel.fn.__name__ for launch in launches}
        shares = (drawn.policy_log_probs - drawn.log_probs).exp() * 16
        assert float((shares - kept).abs().max()) < (0.01 if "top_k" in options else 1.01), options


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.7}, {"temperature": 0.0}], ids=str)
def test_suppressed_vocabulary(device, options):
    """Whole blocks of -inf at both ends; ties; a row with one choice; a row with none."""
    logits = torch.full((4, 3000), -torch.inf, device=device)
    logits[0, 1500:1504] = torch.tensor([2.0, 2.0, 2.0, 1.0], device=device)
    logits[1, 2999] = -1000.0
    logits[2, 5] = 3e38
    logits[2, 6] = -3e38
    drawn = kernels.sample_tokens(logits, seed=3, backend="triton", **options)
    assert 1500 <= int(drawn.tokens[0]) < 1504
    assert drawn.tokens[1:3].tolist() == [2999, 5]
    assert drawn.log_probs[1:3].tolist() == [0.0, 0.0] and drawn.policy_log_probs[1:3].tolist() == [0.0, 0.0]
    assert 0 <= int(drawn.tokens[3]) < 3000 and bool(drawn.policy_log_probs[3].isnan())
    theirs = kernels.sample_tokens(logits, seed=3, backend="torch", **options)
    assert torch.equal(drawn.tokens[:3], theirs.tokens[:3])


def test_a_poisoned_row_stays_alone(device):
    torch.manual_seed(0)
    logits = torch.randn(3, 1200, device=device)
    clean = kernels.sample_tokens(logits, seed=8, top_k=20, top_p=0.9, backend="triton")
    logits[1, 700] = torch.nan
    drawn = kernels.sample_tokens(logits, seed=8, top_k=20, top_p=0.9, backend="triton")
    assert drawn.tokens[[0, 2]].tolist() == clean.tokens[[0, 2]].tolist()
    assert 0 <= int(drawn.tokens[1]) < 1200 and bool(drawn.log_probs[1].isnan())
