"""decode_attention against float64: grouped heads, softcap, window, head sizes, ragged lengths, dirty caches."""

from __future__ import annotations

import pytest
import torch

import fastrlhf_kernels as kernels
from fastrlhf_kernels import backend, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not backend.INTERPRET else "cpu")


def problem(batch, heads, groups, size, positions, dtype=torch.float32):
    torch.manual_seed(size + positions)
    make = lambda *shape: torch.randn(*shape, device=DEVICE).to(dtype)  # noqa: E731
    q, k, v = make(batch, heads, size), make(batch, positions, groups, size), make(batch, positions, groups, size)
    lengths = torch.randint(1, positions + 1, (batch,), device=DEVICE)
    lengths[0], lengths[-1] = 1, positions
    return q, k, v, lengths


def exact(q, k, v, lengths, **options):
    return reference.decode_attention(*(t.double().cpu() for t in (q, k, v)), lengths.cpu(), **options)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (34, 2)])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"window": 5}, {"softcap": 2.0, "window": 150}], ids=str)
@pytest.mark.parametrize(("size", "positions"), [(64, 1), (16, 70), (80, 300)])
def test_agrees_with_float64(heads, groups, options, size, positions):
    q, k, v, lengths = problem(3, heads, groups, size, positions)
    ours = kernels.decode_attention(q, k, v, lengths, scale=size**-0.5, **options)
    theirs = exact(q, k, v, lengths, scale=size**-0.5, **options)
    assert ours.shape == q.shape and ours.dtype == q.dtype
    torch.testing.assert_close(ours.cpu().double(), theirs, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
def test_half_precision_is_within_two_bf16_ulp(dtype, size):
    q, k, v, lengths = problem(4, 4, 2, size, 260, dtype)
    q = q * 3  # peaked rows too
    ours = kernels.decode_attention(q, k, v, lengths.int(), scale=size**-0.5).cpu().double()
    theirs = exact(q, k, v, lengths, scale=size**-0.5)
    largest = torch.stack([v[i, :n].abs().amax().double().cpu() for i, n in enumerate(lengths.tolist())])
    ulp = 2.0 ** (torch.floor(torch.log2(largest)) - 7)
    assert bool(((ours - theirs).abs().amax((1, 2)) <= 2 * ulp).all())


def test_what_is_behind_the_length_is_not_seen():
    q, k, v, lengths = problem(5, 6, 3, 32, 200)
    lengths[2] = 0
    clean = kernels.decode_attention(q, k, v, lengths, scale=0.2, window=60)
    triton = backend.choose_backend("auto", q).name == "triton"
    for row, length in enumerate(lengths.tolist()):
        for cache in (k, v):
            cache[row, length:] = torch.nan if triton else 1e30
            cache[row, : max(0, length - 60)] = torch.nan if triton else 1e30
    assert torch.equal(kernels.decode_attention(q, k, v, lengths, scale=0.2, window=60), clean)
    assert bool((clean[2] == 0).all()) and bool(clean.isfinite().all())


def test_a_row_does_not_depend_on_the_others_and_strides_do_not_matter():
    q, k, v, lengths = problem(6, 4, 2, 64, 90)
    together = kernels.decode_attention(q, k, v, lengths, scale=0.1)
    alone = torch.cat(
        [kernels.decode_attention(*(t[i : i + 1] for t in (q, k, v, lengths)), scale=0.1) for i in range(6)]
    )
    torch.testing.assert_close(together, alone, atol=2e-6, rtol=2e-6)
    slab = torch.stack([k, v], 2)  # [B, T, 2, Hkv, D]
    by_head = q.transpose(0, 1).contiguous().transpose(0, 1)
    again = kernels.decode_attention(by_head, slab[:, :, 0], slab[:, :, 1], lengths, scale=0.1)
    torch.testing.assert_close(together, again)
    assert kernels.decode_attention(q[:0], k[:0], v[:0], lengths[:0], scale=0.1).shape == (0, 4, 64)


def test_compiles_and_passes_opcheck():
    q, k, v, lengths = problem(2, 4, 2, 16, 20)
    run = torch.compile(lambda *a: kernels.decode_attention(*a, scale=0.1), fullgraph=True, backend="eager")
    torch.testing.assert_close(run(q, k, v, lengths), kernels.decode_attention(q, k, v, lengths, scale=0.1))
    triton = backend.choose_backend("auto", q).name == "triton"
    torch.library.opcheck(torch.ops.fastrlhf.decode_attention.default, (q, k, v, lengths, 0.1, None, 4, triton))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 8)}, "q has 3 heads; expected a multiple of the 2 heads of k"),
        ({"q": torch.zeros(2, 8)}, "q has shape (2, 8)"),
        ({"k": torch.zeros(2, 5, 2, 4)}, "k has shape (2, 5, 2, 4); expected [2, T, Hkv, 8] to fit q"),
        ({"v": torch.zeros(2, 6, 2, 8)}, "v has shape (2, 6, 2, 8); expected (2, 5, 2, 8), the shape of k"),
        ({"v": torch.zeros(2, 5, 2, 8).half()}, "v is torch.float16 but q is torch.float32; use v.to(q.dtype)"),
        ({"lengths": torch.tensor([1, 6])}, "lengths holds 6, outside [0, 5], the positions of k"),
        ({"lengths": torch.tensor([1.0, 2.0])}, "lengths must be int32 or int64"),
        ({"window": 0}, "window must be an int >= 1 or None, got 0"),
        ({"softcap": 0.0}, "softcap must be > 0, got 0.0"),
        ({"scale": float("nan")}, "scale must be finite"),
    ],
)
def test_bad_arguments(change, message):
    cache = torch.zeros(2, 5, 2, 8)
    arguments = {
        "q": torch.zeros(2, 4, 8),
        "k": cache,
        "v": cache,
        "lengths": torch.tensor([1, 5]),
        "scale": 1.0,
    } | change
    q, k, v, lengths = (arguments.pop(name) for name in ("q", "k", "v", "lengths"))
    with pytest.raises(ValueError) as error:
        kernels.decode_attention(q, k, v, lengths, **arguments)
    assert message in str(error.value)
