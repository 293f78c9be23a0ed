"""`python -m bench.verdict --critics`: its difference and interval, from runs as they are kept in bench/results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import critics
from fastrlhf.quickstart.settings import load_settings

ROOT = Path(__file__).parents[2]
SHIPPED = json.loads((ROOT / "bench/results/critics_cpu.json").read_text(encoding="utf-8"))


def row(critic: str, seed: int, rule: str, **changes: float) -> dict:
    figures = {"reward_last_5": 3.0, "kl_sequence_mean": 4.0, "seconds": 60.0, "explained_var_last_5": 0.5}
    rate = rule.count("1") / len(rule)
    return {"critic": critic, "model_seed": 0, "ppo_seed": seed, "rule": rule, "rate_ppo": rate} | figures | changes


def test_the_kept_difference_is_that_of_the_kept_runs():
    found, kept = critics.compare(SHIPPED["runs"]), SHIPPED["difference"]
    for name in kept:  # Python 3.12 sums to the last bit, 3.11 does not
        assert found[name] == pytest.approx(kept[name], rel=1e-12), name
    assert found.keys() == kept.keys() and SHIPPED["forms"] == critics.FORMS
    assert SHIPPED["difference"]["passed"] and SHIPPED["difference"]["prompts"] == 288
    table = critics.table(SHIPPED["runs"], SHIPPED["difference"])
    assert "9 runs of 288 prompts: rule rate -0.005 (90 % interval -0.024 .. +0.014)" in table
    assert table in (ROOT / "docs/options.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "separate 0.963 / 0.887" in table
    said = "rule\nrate -0.005 (90 % interval -0.024 .. +0.014), KL 1.01x, over 9 runs"
    assert said in readme


def test_the_interval_is_the_bootstrap_s():
    assert critics.interval(torch.full((3, 50), 0.25).double()) == (0.25, 0.25, 0.25)
    halves = torch.tensor([[1.0, 0.0] * 100]).double()  # a run: mean 0.5, a draw's standard error 0.5 / sqrt(200)
    mean, low, high = critics.interval(halves)
    assert mean == 0.5 and low == pytest.approx(0.5 - 1.645 * 0.0354, abs=0.006)
    assert high == pytest.approx(0.5 + 1.645 * 0.0354, abs=0.006)


@pytest.mark.parametrize(
    ("changes", "passed"),
    [({}, True), ({"rule": "0" * 40}, False), ({"reward_last_5": 2.6}, False), ({"kl_sequence_mean": 4.9}, False)],
)
def test_each_bar_can_be_missed(changes, passed):
    ones = "1" * 40
    rows = [row("separate", seed, ones) for seed in (0, 1)]
    rows += [row("shared_trunk", seed, changes.get("rule", ones), **_without_rule(changes)) for seed in (0, 1)]
    assert critics.compare(rows)["passed"] is passed


def _without_rule(changes: dict) -> dict:
    return {name: value for name, value in changes.items() if name != "rule"}


def test_the_forms_differ_in_the_critic_alone(tmp_path):
    models = load_settings([f"output_dir={tmp_path}", "seed=5"])
    (_, one), (_, other) = (critics.settings_of(form, models, tmp_path / "x", 7) for form in critics.FORMS)
    changed = {name for name in type(one).model_fields if getattr(one, name) != getattr(other, name)}
    assert changed == {"critic", "critic_learning_rate", "gae_lambda"} and one.seed == other.seed == 7
    assert (other.critic_learning_rate, other.gae_lambda) == (5e-3, 1.0)
    assert (one.critic_learning_rate, one.learning_rate) == (5e-4, other.learning_rate) == (5e-4, 2e-4)
