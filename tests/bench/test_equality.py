"""bench.equality: what it compares, and that it sees a difference wherever one is planted."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from bench import equality

STEP = {"policy/loss": 1e-4, "value/loss": 2.0, "policy/grad_norm": 3.0, "reward/mean": 7.0, "ptx/loss": math.nan}


def run() -> tuple[list[dict], dict[str, torch.Tensor]]:
    steps = [{"tokens": [[1, 2], [3]], "metrics": dict(STEP)} for _ in range(equality.STEPS)]
    return steps, {"policy.a": torch.full((4,), 2.0), "value.b": torch.full((3, 3), -1.0)}


def compared(many: list[dict], weights: dict[str, torch.Tensor]) -> dict:
    steps, moved = run()
    row = {"form": "separate", "parallel": "zero", "ranks": 2}
    return row | equality.differences(steps, many, moved, weights)


def test_equal_runs_differ_in_nothing():
    row = compared(*run())
    assert row["tokens"] and [row[name] for name in equality.BARS] == [0.0, 0.0, 0.0]
    assert equality.failures([row]) == []


@pytest.mark.parametrize(
    ("metric", "value", "named"),
    [
        ("policy/loss", 1e-4 + 6e-6, "losses differ by 1.2e-05"),  # relative to 0.5: it is about 0
        ("value/loss", 2.0 + 4e-5, "losses differ by 2.0e-05"),
        ("policy/grad_norm", 3.0 - 6e-5, "gradient norms differ by 2.0e-05"),
        ("policy/grad_norm", math.nan, "gradient norms differ by inf"),
        ("ptx/loss", 1.0, "losses differ by inf"),
    ],
)
def test_a_planted_difference_of_a_figure_is_named(metric, value, named):
    steps, weights = run()
    steps[3]["metrics"][metric] = value
    (said,) = equality.failures([compared(steps, weights)])
    assert said.startswith(f"separate, zero, 2 ranks: {named}, more than 1e-05")
    steps[3]["metrics"][metric] = STEP[metric] + 1e-6
    assert equality.failures([compared(steps, weights)]) == []


def test_other_tokens_fewer_steps_and_other_weights_are_named():
    steps, weights = run()
    other = copy.deepcopy(steps)
    other[4]["tokens"][1] = [4]
    assert equality.failures([compared(other, weights)]) == ["separate, zero, 2 ranks: other tokens than one process"]
    assert "4 steps were made" in equality.failures([compared(steps[:4], weights)])[0]
    weights["value.b"] = weights["value.b"] * 1.004
    (said,) = equality.failures([compared(steps, weights)])
    assert "weights differ by 2.4e-03, more than 1e-03" in said
    still = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    assert equality.differences(steps, steps, still, still)["weights"] == math.inf  # nothing was trained
