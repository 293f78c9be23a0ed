"""sample_tokens: the random words, the distribution, the filters, and independence from the batch."""

from __future__ import annotations

import pytest
import torch

import fastrlhf_kernels as kernels
from fastrlhf_kernels import backend, reference
from fastrlhf_kernels.eager import inverse_cdf

# Known answers of philox4x32-10 published with Random123 (file kat_vectors): counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def signed(low: int, high: int) -> int:
    word = high << 32 | low
    return word - (1 << 64) if word >> 63 else word


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, words):
    assert reference.philox_4x32(counter, key) == words
    stream, offset = (torch.tensor([signed(*counter[i : i + 2])]) for i in (0, 2))
    first, second = inverse_cdf.philox_words(signed(*key), stream, offset)
    assert (int(first), int(second)) == words[:2]


def test_uniform_numbers_agree_with_the_reference_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    stream = torch.randint(0, 2**63 - 1, (50,), generator=generator)
    offset = torch.randint(0, 2**40, (50,), generator=generator)
    for seed in (0, 7, 2**40 + 1, -1):
        ours = inverse_cdf.uniforms(seed, stream, offset)
        theirs = [reference.uniform(seed % 2**64, s, o) for s, o in zip(stream.tolist(), offset.tolist(), strict=True)]
        assert ours.tolist() == theirs
    many = inverse_cdf.uniforms(3, torch.arange(20_000), torch.zeros(20_000, dtype=torch.int64))
    assert float(many.min()) >= 0 and float(many.max()) < 1 and abs(float(many.mean()) - 0.5) < 0.01


SETTINGS = [
    {},
    {"temperature": 0.7},
    {"temperature": 3.0},
    {"top_k": 5},
    {"top_k": 1},
    {"top_k": 10**6},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"top_k": 20, "top_p": 0.5, "temperature": 1.5},
    {"temperature": 0.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 2, 65, 300, 700])
def test_tokens_agree_with_the_reference(vocabulary, settings):
    torch.manual_seed(vocabulary)
    n = 3 if backend.INTERPRET else 24
    logits = torch.randn(n, vocabulary) * torch.tensor([0.1, 1.0, 6.0]).repeat(n // 3)[:, None]
    place = {"seed": 11, "offset": torch.arange(n) * 3, "stream": torch.arange(n) * 1000}
    ours = kernels.sample_tokens(logits, **settings, **place)
    tokens, log_probs, policy = reference.sample_tokens(logits.double(), **settings, **place)
    assert ours.tokens.dtype == torch.int64
    assert torch.equal(ours.tokens, tokens)
    torch.testing.assert_close(ours.log_probs, log_probs.float(), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(ours.policy_log_probs, policy.float(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.9), (0, 0.999), (0, 0.2), (50, 1.0), (50, 0.8), (400, 0.95)])
def test_the_support_is_the_reference_set(top_k, top_p, scale):
    """Peaked and flat rows, so that both ways to find the top-p threshold run."""
    torch.manual_seed(0)
    z = torch.randn(4, 2000) * scale
    z[2] = z[2].round(decimals=1)  # many ties
    z[3, ::3] = -torch.inf
    p = torch.softmax(z, 1)
    kept = z >= inverse_cdf.threshold(z, p, top_k, top_p)
    for row in range(4):
        wanted = reference.sample_support(z[row].double(), top_k, top_p)
        different = (kept[row] != wanted).sum()
        assert different <= (1 if top_p < 1 else 0), int(different)  # at the edge, mass differs in the 7th digit
        assert kept[row].sum() > 0


def test_ties_at_a_threshold_are_kept():
    logits = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0, 0.0]]).expand(400, 6)
    for settings, support in (
        ({"top_k": 2}, {0, 1, 2, 3}),
        ({"top_p": 0.55}, {0, 1, 2, 3}),
        ({"top_p": 0.4}, {0}),
        ({"top_k": 5, "top_p": 0.999}, {0, 1, 2, 3, 4}),
        ({"top_k": 6}, {0, 1, 2, 3, 4, 5}),
    ):
        seen = kernels.sample_tokens(logits, seed=5, backend="torch", **settings).tokens
        assert set(seen.tolist()) == support, settings


@pytest.mark.parametrize("settings", [{}, {"top_k": 7, "temperature": 1.3}, {"top_p": 0.7}], ids=str)
def test_the_distribution(settings):
    """Chi-square over 20000 streams: within 4 standard deviations of its mean, which is its degrees of freedom."""
    torch.manual_seed(3)
    z = torch.randn(30)
    draws = kernels.sample_tokens(z.expand(20_000, 30), seed=12, backend="torch", **settings).tokens
    scaled = z.double() / settings.get("temperature", 1.0)
    keep = reference.sample_support(scaled, settings.get("top_k", 0), settings.get("top_p", 1.0))
    p = torch.softmax(torch.where(keep, scaled, -torch.inf), 0)
    counts = torch.bincount(draws, minlength=30).double()
    assert (counts[~keep] == 0).all()
    expected = 20_000 * p[keep]
    chi_square, freedom = float(((counts[keep] - expected) ** 2 / expected).sum()), int(keep.sum()) - 1
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5
    by_offset = kernels.sample_tokens(z.expand(4000, 30), seed=12, offset=9, backend="torch", **settings).tokens
    assert not torch.equal(by_offset, draws[:4000])


def test_log_probs_are_those_of_the_distributions():
    torch.manual_seed(0)
    n = 12 if backend.INTERPRET else 50
    logits = torch.randn(n, 300) * 2
    settings = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}
    drawn = kernels.sample_tokens(logits, seed=1, **settings)
    policy = kernels.token_log_probs(logits, drawn.tokens, temperature=0.8)
    torch.testing.assert_close(drawn.policy_log_probs, policy, atol=2e-6, rtol=1e-5)
    for row in range(n):
        keep = reference.sample_support(logits[row].double() / 0.8, 40, 0.9)
        p = torch.softmax(torch.where(keep, logits[row].double() / 0.8, -torch.inf), 0)
        assert abs(float(p[drawn.tokens[row]].log() - drawn.log_probs[row])) < 1e-5
    plain = kernels.sample_tokens(logits, seed=1)
    assert torch.equal(plain.log_probs, plain.policy_log_probs)


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9}, {"top_k": 30}, {"temperature": 0.0}], ids=str)
@pytest.mark.parametrize("vocabulary", [2048, 5003])
def test_a_token_does_not_depend_on_its_batch(vocabulary, settings):
    torch.manual_seed(0)
    n = 5 if backend.INTERPRET else 40
    logits, stream, offset = torch.randn(n, vocabulary), torch.randperm(n) * 7, torch.arange(n) % 5
    together = kernels.sample_tokens(logits, seed=9, stream=stream, offset=offset, **settings)
    for rows in (slice(0, 1), slice(3, n, 5), torch.randperm(n)):
        alone = kernels.sample_tokens(logits[rows], seed=9, stream=stream[rows], offset=offset[rows], **settings)
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a, b[rows])
    again = kernels.sample_tokens(logits, seed=9, stream=stream, offset=offset, **settings)
    assert torch.equal(again.tokens, together.tokens)


def test_seed_stream_and_offset_each_matter():
    n = 20 if backend.INTERPRET else 200
    logits = torch.zeros(n, 1000)
    base = kernels.sample_tokens(logits, seed=1).tokens
    for other in (
        {"seed": 2},
        {"seed": 1, "offset": 1},
        {"seed": 1, "stream": torch.arange(n) + 1},
        {"seed": 1 + 2**33},
    ):
        assert (kernels.sample_tokens(logits, **other).tokens == base).float().mean() < 0.1
    shifted = kernels.sample_tokens(logits, seed=1, stream=torch.arange(n) + 1).tokens
    assert torch.equal(shifted[:-1], base[1:])


def test_greedy_takes_the_lowest_id_of_the_largest():
    logits = torch.tensor([[1.0, 5.0, 5.0, 2.0], [7.0, 7.0, 7.0, 7.0]])
    drawn = kernels.sample_tokens(logits, temperature=0.0, seed=1, top_k=2, top_p=0.5)
    assert drawn.tokens.tolist() == [1, 0] and drawn.log_probs.tolist() == [0.0, 0.0]
    torch.testing.assert_close(drawn.policy_log_probs, torch.log_softmax(logits, 1)[[0, 1], [1, 0]])


def test_suppressed_tokens_are_never_drawn():
    logits = torch.full((500, 100), -torch.inf)
    logits[:, [3, 98]] = torch.tensor([0.0, -1.0])
    for settings in ({}, {"top_k": 50}, {"top_p": 0.99}):
        drawn = kernels.sample_tokens(logits, seed=4, backend="torch", **settings)
        assert set(drawn.tokens.tolist()) == {3, 98} and torch.isfinite(drawn.log_probs).all()


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.9}, {"temperature": 0.0}], ids=str)
def test_a_bad_row_neither_crashes_nor_harms_its_neighbours(settings):
    torch.manual_seed(0)
    logits = torch.randn(4, 600)
    good = kernels.sample_tokens(logits, seed=2, **settings)
    logits[1], logits[2] = torch.nan, -torch.inf
    drawn = kernels.sample_tokens(logits, seed=2, **settings)
    assert (drawn.tokens >= 0).all() and (drawn.tokens < 600).all()
    assert drawn.policy_log_probs[[1, 2]].isnan().all()
    assert torch.equal(drawn.tokens[[0, 3]], good.tokens[[0, 3]])


def test_dtypes_strides_and_no_rows():
    torch.manual_seed(0)
    logits = torch.randn(6, 200)
    half = kernels.sample_tokens(logits.bfloat16(), seed=3)
    assert half.log_probs.dtype == torch.float32
    assert torch.equal(half.tokens, kernels.sample_tokens(logits.bfloat16().float(), seed=3).tokens)
    strided = kernels.sample_tokens(logits.T.contiguous().T, seed=3)
    assert torch.equal(strided.tokens, kernels.sample_tokens(logits, seed=3).tokens)
    for settings in ({}, {"top_k": 3, "top_p": 0.5}, {"temperature": 0.0}):
        assert kernels.sample_tokens(logits[:0], seed=3, **settings).tokens.shape == (0,)
    before = logits.clone()
    kernels.sample_tokens(logits, seed=3, temperature=0.5, top_p=0.5)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("seed", [2**63, 2**63 + 5, 2**64 - 1, 2**64 + 9, -(2**63)])
def test_seeds_of_64_bits_and_more(seed):
    """The lowest 64 bits count, and on every backend the tokens are those of the reference."""
    torch.manual_seed(0)
    logits = torch.randn(6 if backend.INTERPRET else 20, 50)
    drawn = kernels.sample_tokens(logits, seed=seed)
    tokens, log_probs, _ = reference.sample_tokens(logits.double(), seed=seed % 2**64)
    assert torch.equal(drawn.tokens, tokens)
    torch.testing.assert_close(drawn.log_probs, log_probs.float(), atol=5e-6, rtol=1e-5)
    assert torch.equal(drawn.tokens, kernels.sample_tokens(logits, seed=seed % 2**64).tokens)
    assert not torch.equal(drawn.tokens, kernels.sample_tokens(logits, seed=seed % 2**63 + 1).tokens)
