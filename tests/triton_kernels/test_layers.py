"""Norm, rotation, gate and cache of a decoder layer: the same numbers as torch, whatever the strides."""

from __future__ import annotations

import pytest
import torch

from fastrlhf_kernels import layers
from fastrlhf_kernels.gpu.launch import recorded

DTYPES = [torch.float32, torch.bfloat16]
ULP = {torch.float32: 1e-6, torch.bfloat16: 2**-6}  # of a number near 1; the interpreter cuts where a GPU rounds


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Within the roundings of the dtype: sums are taken in another order."""
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours.float(), theirs.float(), atol=ULP[theirs.dtype], rtol=ULP[theirs.dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 1, 896), (2, 5, 7), (1, 1, 4096), (0, 1, 64)])
def test_rms_norm(device, dtype, shape):
    x, weight = torch.randn(shape, device=device).to(dtype), torch.rand(shape[-1], device=device).to(dtype)
    close(layers.rms_norm(x, weight, 1e-6, backend="triton"), layers.rms_norm(x, weight, 1e-6, backend="torch"))
    wide = x[..., : shape[-1] - 1]  # rows that do not stand behind one another
    ours = layers.rms_norm(wide, weight[:-1], 0.1, backend="triton")
    close(ours, layers.rms_norm(wide, weight[:-1], 0.1, backend="torch"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(device, dtype):
    both = (torch.randn(3, 2, 2 * 701, device=device) * 4).to(dtype)
    gate, up = both.chunk(2, -1)
    close(layers.silu_mul(gate, up, backend="triton"), layers.silu_mul(gate, up, backend="torch"))
    extremes = torch.tensor([-200.0, -0.0, 0.0, 200.0, float("nan"), float("inf")], device=device).to(dtype)
    ours = layers.silu_mul(extremes, torch.ones_like(extremes), backend="triton")
    torch.testing.assert_close(ours, torch.nn.functional.silu(extremes), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "heads, size, length, shared", [((14, 2), 64, 1, False), ((3, 3), 48, 5, True), ((1, 1), 2, 2, False)]
)
def test_rotate(device, dtype, heads, size, length, shared):
    q, k = (torch.randn(2, length, h, size, device=device).to(dtype).transpose(1, 2) for h in heads)
    angles = torch.rand(1 if shared else 2, length, size // 2, device=device) * 9
    angles = torch.cat([angles, angles], -1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    ours = layers.rotate(q, k, cos, sin, backend="triton")
    for mine, theirs in zip(ours, layers.rotate(q, k, cos, sin, backend="torch"), strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_store_tokens(device, dtype):
    slots, lengths = torch.tensor([2, 0, 3], device=device), torch.tensor([4, 0, 1], device=device)
    k, v = torch.randn(3, 2, 2, 24, device=device).to(dtype).unbind(2)
    stores = {}
    for backend in ("triton", "torch"):
        keys, values = torch.zeros(2, 5, 6, 2, 24, device=device, dtype=dtype)[:, 1:].unbind(0)
        layers.store_tokens(k, v, keys, values, slots, lengths, backend=backend)
        stores[backend] = torch.stack([keys, values])
    assert torch.equal(stores["triton"], stores["torch"]) and bool(stores["torch"][0, 2, 4].any())


def test_each_is_one_launch(device):
    x = torch.randn(2, 4, 3, 8, device=device)
    turn, pool = torch.ones(2, 3, 8, device=device), torch.zeros(2, 2, 5, 4, 8, device=device)
    place = torch.zeros(2, dtype=torch.int64, device=device)
    with recorded(start=True) as records:
        layers.rms_norm(x, x[0, 0, 0], 1e-6, backend="triton")
        layers.silu_mul(x, x, backend="triton")
        layers.rotate(x, x, turn, turn, backend="triton")
        layers.store_tokens(x[:, :, 0], x[:, :, 1], *pool, place, place, backend="triton")
    assert [record.kernel.__name__ for record in records] == ["_rms_norm", "_silu_mul", "_rotate", "_store_tokens"]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: layers.rms_norm(x, x[0, 0, 0, :-1], 1e-6), "weight"),
        (lambda x: layers.rms_norm(x, x[0, 0, 0].bfloat16(), 1e-6), "use weight.to"),
        (lambda x: layers.silu_mul(x, x[:1]), "up"),
        (lambda x: layers.rotate(x, x[:, :, :1], x[:, 0], x[:, 0]), "k has shape"),
        (lambda x: layers.rotate(x, x, x[:, 0, :1], x[:, 0]), "cos has shape"),
        (lambda x: layers.rotate(x[..., :7], x[..., :7], x[:, 0, :, :7], x[:, 0, :, :7]), "even"),
        (lambda x: layers.store_tokens(x, x, x, x, x.long(), x.long()), "k is"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 4, 3, 8))
