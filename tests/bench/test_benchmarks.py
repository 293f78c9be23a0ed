"""`pytest bench --benchmark-only` times every public kernel, and both sides compute the same."""

from __future__ import annotations

import inspect

import pytest
import torch

import fastrlhf_kernels as kernels
from bench import test_kernels as benchmarks
from fastrlhf_kernels import layers


def test_every_public_function_is_timed():
    functions = {name for name in kernels.__all__ if inspect.isfunction(getattr(kernels, name))}
    of_layers = {name for name, f in vars(layers).items() if inspect.isfunction(f) and f.__module__ == layers.__name__}
    assert set(benchmarks.CASES) == functions | {name for name in of_layers if not name.startswith("_")}
    assert {name for name, who in benchmarks.pairs() if who == "liger"} == {"linear_ppo_loss"}


@pytest.mark.parametrize("name", ["linear_ppo_loss", "linear_loss", "token_ppo_loss", "entropy_from_logits", "gae"])
def test_both_sides_compute_the_same(name):
    ours, theirs = (benchmarks.call_of(name, who)() for who in ("ours", "torch"))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
