"""The recipes of the papers align the quickstart's model: the short form of `python -m bench.verdict`, one seed.

The bars of the verdict itself need the whole budget; a run this short shows that a recipe teaches the hidden rule, here
PPO-max; `python -m bench.verdict --short` does so for all three.
"""

from __future__ import annotations

import json
import re

import pytest

from bench import verdict
from bench.quickstart import GREETING, continuations
from fastrlhf.config.recipe import find_recipe, read_recipe
from fastrlhf.config.stages import CONFIGS
from fastrlhf.quickstart.content import shipped
from fastrlhf.quickstart.settings import load_settings

RECIPES, SHOWN = list(verdict.SIZES), "ppo-max"


@pytest.fixture(scope="module")
def short_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verdict")
    command = ["--short", "--recipes", SHOWN, "--seeds", "0", "--work", str(folder)]
    with pytest.MonkeyPatch.context() as patch:  # no bar of a short run is about the pairs that a reward model ranks
        every = {"heldout_pairs": 21}
        patch.setattr(verdict.verdict, "shipped", lambda name: shipped(name)[:: every.get(name, 1)])
        code = verdict.main([*command, "--json", str(folder / "figures.json")])
    rows = json.loads((folder / "figures.json").read_text())["runs"]
    return code, {row["recipe"]: row for row in rows}, folder


@pytest.mark.slow
def test_a_short_run_teaches_the_rule(short_runs):
    row = short_runs[1][SHOWN]
    assert row["rate_before_sft"] == 0 and 0 < row["rate_sft"] < 0.65
    assert row["rate_ppo"] >= row["rate_sft"] + verdict.SHORT_RISE
    assert row["rate_ppo_shuffled"] <= 0.1  # it is about the prompt, not a reply that suits all
    assert 0.1 < row["kl_sequence_mean"] < 10 and row["passed"]


def test_the_model_goes_on_with_a_greeting_that_no_row_of_its_data_holds(short_runs):
    """The first lines that a reader tries: the stock pipeline on raw text, before and after PPO."""
    folder = short_runs[2] / "short-0"
    for model in (folder / "sft/final", folder / SHOWN / "final"):
        chinese = continuations(model, GREETING, 6)
        assert all(re.fullmatch(r"[\u3400-\u9fff，。！？、]{4,}", text) and text[-1] in "。！？" for text in chinese), (
            chinese
        )
        english = continuations(model, "Hello, world!", 6)
        assert all(re.fullmatch(r"[ A-Za-z,.!?']{8,}", text) for text in english), english


def test_the_command_passes_when_all_bars_are_met(short_runs):
    code, rows, _ = short_runs
    assert list(rows) == [SHOWN] and code == 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_sizes_change_no_algorithm(recipe, tmp_path):
    """What stands in a packaged recipe stays, but for the fields that are a size, a rate or the weight of ptx."""
    sizes = {
        "total_steps", "rollout_batch_size", "mini_batch_size", "samples_per_prompt", "learning_rate", "warmup_steps",
        "critic_learning_rate", "critic_warmup_steps", "max_prompt_tokens", "max_new_tokens", "temperature", "dtype",
        "ptx_coef",
    }  # fmt: skip
    models = load_settings([f"output_dir={tmp_path}", "seed=5"])
    _, config = verdict.settings_of(recipe, models, tmp_path / recipe, {})
    written = read_recipe(find_recipe(recipe))[0]
    packaged = CONFIGS["ppo"](**written)
    place = {"seed", "output_dir", "overwrite", "save_every", "eval_every"}
    changed = {name for name in type(config).model_fields if getattr(config, name) != getattr(packaged, name)}
    assert changed <= sizes | place and config.seed == 5


def test_a_missed_bar_is_marked_and_fails():
    good = {
        "recipe": "grpo", "seed": 0, "rate_sft": 0.4, "rate_ppo": 0.9, "rate_ppo_shuffled": 0.02,
        "kl_sequence_mean": 4.0, "distinct2_ppo": 0.1, "distinct2_sft": 0.14, "length_ppo": 30.0, "length_sft": 30.0,
        "rm_pair_accuracy": 0.95,
    }  # fmt: skip
    far = good | {"seed": 1, "kl_sequence_mean": 12.0}
    text = verdict.table([good, far], short=False)
    assert "| grpo, seed 0 | grpo, seed 1 |" in text and "| 4.000 | 12.000 missed |" in text
    assert text.count("missed") == 1
    flat = good | {"rate_ppo": 0.45}
    assert [met for *_, met in verdict.bars(flat, short=True)] == [False, True, True, True, True]
