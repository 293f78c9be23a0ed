"""Gradients times the gradient of their loss: in place, in another dtype, and not at all where it is 1."""

from __future__ import annotations

import pytest
import torch

import fastrlhf_kernels as kernels
from fastrlhf_kernels.gpu.launch import recorded
from fastrlhf_kernels.gpu.scaling import TILE, scaled


@pytest.mark.parametrize("count", [1, TILE, 2 * TILE + 5])
@pytest.mark.parametrize("gain", [0.5, 1.0, 0.0, float("nan")])
def test_in_place_and_in_another_dtype(device, count, gain):
    x, factor = torch.randn(count, device=device), torch.tensor(gain, device=device)
    expected = x * factor
    half = scaled(x, factor, torch.bfloat16)
    torch.testing.assert_close(half.float(), expected, atol=0, rtol=2**-7, equal_nan=True)
    ours = scaled(x, factor, torch.float32)
    assert ours.data_ptr() == x.data_ptr()
    torch.testing.assert_close(ours, expected, atol=0, rtol=1e-6, equal_nan=True)


def test_a_gain_of_one_writes_nothing(device):
    """Bits that no multiplication leaves as they are: a signalling NaN."""
    x = torch.full((5,), 0x7F800001, dtype=torch.int32, device=device)
    scaled(x.view(torch.float32), torch.ones((), device=device), torch.float32)
    assert x.tolist() == [0x7F800001] * 5


def test_the_backward_of_a_fused_loss_scales_by_what_stands_behind_it(device):
    def gradient(factor: float) -> torch.Tensor:
        logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
        row, ones = torch.zeros(3, device=device), torch.ones(3, device=device)
        labels = torch.arange(3, device=device)
        loss = kernels.token_ppo_loss(logits, labels, row - 4, ones, ones.bool(), clip_range=0.9, backend="triton").loss
        with recorded(start=True) as records:
            (loss * factor).backward()
        assert [record.kernel.__name__ for record in records] == ["_scale"]
        return logits.grad

    plain = gradient(1.0)
    assert bool(plain.abs().max() > 0)
    torch.testing.assert_close(gradient(-3.0), -3.0 * plain)
