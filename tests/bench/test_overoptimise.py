"""Over-optimisation: when it is called so, and that the page in docs says what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.overoptimise import VANILLA, draw, in_words, over_optimised, table
from bench.verdict import BEST_OF, SIZES
from bench.verdict import table as verdict_table
from fastrlhf.report.page import figure_of
from fastrlhf.report.verdict import OVER_OPTIMISED

ROOT = Path(__file__).parents[2]
RECORDED = json.loads((ROOT / "bench/results/overoptimisation_cpu.json").read_text())
MEASURED = RECORDED["runs"]
PAGE = (ROOT / "docs/overoptimisation.md").read_text(encoding="utf-8")
RUNS = (*SIZES, BEST_OF)


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
    assert table(MEASURED) in PAGE


def test_a_line_a_seed_says_where_vanilla_is_best_and_how_both_end():
    runs = {
        "vanilla": rows((-1, 2, 4), (0.4, 0.9, 0.5), (0.2, 0.15, 0.05)),
        "ppo-max": rows((-1, 2, 3), (0.4, 0.8, 0.9), (0.2, 0.2, 0.1)),
    }
    one, two = in_words({"0": runs, "7": runs}).splitlines()
    assert one == (
        "- seed 0: at its best, at step 5, 90% of vanilla PPO's replies keep the rule; it ends at 50% with reward "
        "4.00, 4.0 nats from the SFT model, with 0.25 of its distinct-2; PPO-max ends at 90% with reward 3.00, 4.0 "
        "nats from the SFT model, with 0.50 of its distinct-2."
    )
    assert two == one.replace("seed 0", "seed 7")


def test_the_page_quotes_the_report_s_own_sentence():
    first, last = MEASURED["0"]["vanilla"][0], MEASURED["0"]["vanilla"][-1]
    before, after = (figure_of(row["distinct2"]) for row in (first, last))
    assert OVER_OPTIMISED.format(before=before, after=after).strip() in " ".join(PAGE.split())


def test_the_verdict_s_figures_are_of_the_sizes_that_are_shipped():
    assert RECORDED["vanilla"] == VANILLA
    verdicts = json.loads((ROOT / "bench/results/verdict_cpu.json").read_text())
    assert verdicts["sizes"] == SIZES and "failed" not in verdicts
    assert {(run["recipe"], run["seed"]) for run in verdicts["runs"]} == {(r, s) for r in RUNS for s in (0, 1, 2)}
    assert verdict_table(verdicts["runs"], short=False) in PAGE
    assert all(run["passed"] for run in verdicts["runs"] if run["recipe"] != BEST_OF)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rates = {run["recipe"] == BEST_OF: [] for run in verdicts["runs"]}
    for run in verdicts["runs"]:
        rates[run["recipe"] == BEST_OF].append(run["rate_ppo"])
    assert f"rule rate {min(rates[False]):.2f} to {max(rates[False]):.2f}; the best of" in readme
    assert f"without training, has {' / '.join(f'{rate:.3f}' for rate in rates[True])} at less KL" in readme


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
