"""Over-optimisation: when it is called so, and that the page in docs says what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.overoptimise import VANILLA, draw, over_optimised, table
from bench.verdict import SIZES

ROOT = Path(__file__).parents[2]
RECORDED = json.loads((ROOT / "bench/results/overoptimisation_cpu.json").read_text())
MEASURED = RECORDED["runs"]


def rows(rewards, rules, diversity):
    columns = zip(rewards, rules, diversity, strict=True)
    return [
        {"step": 5 * i, "reward": r, "rule": s, "distinct2": d, "length": 30.0, "kl": 2.0 * i}
        for i, (r, s, d) in enumerate(columns)
    ]


@pytest.mark.parametrize(
    ("rewards", "rules", "diversity", "expected"),
    [
        ((-1, 2, 4), (0.4, 0.9, 0.5), (0.14, 0.13, 0.13), True),  # the rule falls while the reward rises
        ((-1, 2, 4), (0.4, 0.9, 0.9), (0.14, 0.10, 0.05), True),  # replies become copies
        ((-1, 2, 3), (0.4, 0.9, 0.88), (0.14, 0.12, 0.11), False),
        ((-1, -2, -3), (0.4, 0.3, 0.1), (0.14, 0.12, 0.05), False),  # no reward for it
    ],
)
def test_over_optimised_is_reward_up_and_quality_down(rewards, rules, diversity, expected):
    assert over_optimised(rows(rewards, rules, diversity)) is expected


def test_what_was_measured_shows_it_and_stands_in_the_docs():
    for runs in MEASURED.values():
        assert over_optimised(runs["vanilla"]) and not over_optimised(runs["ppo-max"])
    page = (ROOT / "docs/overoptimisation.md").read_text(encoding="utf-8")
    assert table(MEASURED) in page


def test_the_figures_are_of_the_settings_that_are_shipped():
    assert RECORDED["vanilla"] == VANILLA
    verdicts = json.loads((ROOT / "bench/results/verdict_cpu.json").read_text())
    measured = {recipe: dict(sizes) for recipe, sizes in verdicts["sizes"].items()}
    assert measured["ppo-max"].pop("warmup_steps") == 12  # the page says that the recipe had one then
    page = (ROOT / "docs/overoptimisation.md").read_text(encoding="utf-8")
    assert "not measured again yet: `ppo-max` then clipped rewards at 10 standard deviations" in page
    assert measured == SIZES and all(run["passed"] for run in verdicts["runs"])


def test_the_figure_draws_every_curve_of_both_runs(tmp_path):
    drawn = []
    for name in ("a.svg", "b.svg"):
        draw(MEASURED["0"], tmp_path / name)
        drawn.append((tmp_path / name).read_text())
    assert drawn[0] == drawn[1]
    for text in ("Vanilla PPO, no KL", "PPO-max", "reward-model score", "distinct-2", "KL to the SFT model"):
        assert text in drawn[0]
    points = sum(len(run) for run in MEASURED["0"].values())
    assert drawn[0].count("<circle") >= 5 * points  # a mark for each of the five figures of an evaluation
