"""Runs beside each other: what each wrote in the order asked for, a failure named, the others kept."""

from __future__ import annotations

import argparse
import json
import os
import re

import pytest

from bench import kinds, overoptimise, quickstart, verdict
from bench.processes import positive, side_by_side
from fastrlhf.quickstart.settings import load_settings

RUN = """
import json, os, sys, time
from pathlib import Path

verb, *rest = sys.argv[1 : sys.argv.index("--row")]
row = Path(sys.argv[-1])
if verb == "fail":
    sys.exit("first line\\n\\nno room left\\n")
if verb == "meet":  # leave a file, and wait for the other run's
    Path(rest[0]).touch()
    end = time.monotonic() + 60
    while not Path(rest[1]).exists() and time.monotonic() < end:
        time.sleep(0.01)
if verb != "nothing":
    found = {"met": Path(rest[1]).exists()} if verb == "meet" else {"said": rest[0]}
    row.write_text(json.dumps(found | {"threads": os.environ["OMP_NUM_THREADS"]}))
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A run that needs no torch, as a module of its own."""
    (tmp_path / "a_run.py").write_text(RUN)
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    return "a_run"


def test_two_jobs_run_at_once_with_one_thread_each(module, tmp_path):
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    rows, failed = side_by_side(module, {"x:1": ["meet", a, b], "y:1": ["meet", b, a]}, 2, tmp_path / "runs")
    assert rows == {name: {"met": True, "threads": "1"} for name in ("x:1", "y:1")} and not failed


def test_a_failed_run_is_named_with_its_last_words_and_the_others_are_kept(module, tmp_path, capsys):
    runs = {"b": ["say", "B"], "lost:0": ["fail"], "empty:0": ["nothing"], "a": ["say", "A"]}
    kept = []
    rows, failed = side_by_side(module, runs, 2, tmp_path / "runs", lambda known: kept.append(list(known)))
    assert [row["said"] for row in rows.values()] == ["B", "A"] and list(rows) == ["b", "a"]
    assert list(failed) == ["lost:0", "empty:0"] or list(failed) == ["empty:0", "lost:0"]
    assert failed["lost:0"] == f"exit code 1, no room left ({tmp_path / 'runs/lost-0.log'})"
    assert failed["empty:0"].startswith("exit code 0, nothing printed")
    assert kept[-1] == ["b", "a"] and len(kept) == 2
    assert "lost:0 failed: exit code 1, no room left" in capsys.readouterr().err


def test_a_row_of_an_earlier_run_does_not_stand_for_a_failed_one(module, tmp_path):
    (tmp_path / "lost.json").write_text('{"said": "old"}')
    rows, failed = side_by_side(module, {"lost": ["fail"]}, 1, tmp_path)
    assert not rows and list(failed) == ["lost"]


@pytest.fixture
def made(tmp_path):
    """A folder where the models of seeds 0 and 1 seem to be."""
    for seed in (0, 1):
        for folder in verdict.FINAL:
            (tmp_path / f"seed-{seed}" / folder).mkdir(parents=True)
    return tmp_path


def stand_in(monkeypatch, module, rows):
    """Instead of processes: the arguments that each would get, and a row of a run that ended (None: it failed)."""
    asked = {}

    def beside(module, runs, jobs, folder, keep=lambda known: None):
        asked.update(runs)
        found = {name: row for name in runs if (row := rows(name)) is not None}
        for n in range(len(found)):
            keep(dict(list(found.items())[: n + 1]))
        return found, {name: "exit code 1" for name in runs if name not in found}

    monkeypatch.setattr(module, "side_by_side", beside)
    return asked


FIGURES = {
    "rate_sft": 0.4, "rate_ppo": 0.9, "rate_ppo_shuffled": 0.02, "kl_sequence_mean": 4.0, "distinct2_ppo": 0.1,
    "distinct2_sft": 0.14, "length_ppo": 30.0, "length_sft": 30.0, "rm_pair_accuracy": 0.95,
}  # fmt: skip


def recipe_row(name):
    recipe, seed = name.split(":")
    return {"recipe": recipe, "seed": int(seed), "passed": recipe != verdict.BEST_OF} | FIGURES


def test_the_runs_of_recipes_are_gathered_in_the_order_of_the_seeds(made, monkeypatch, capsys):
    for seed in (0, 1):
        (made / f"seed-{seed}/base").mkdir()
    asked = stand_in(monkeypatch, verdict, recipe_row)
    arguments = ["--seeds", "1", "0", "--jobs", "4", "--work", str(made), "--json", str(made / "all.json")]
    changed = ["--recipes", "rloo", "ppo-max", "best-of-8", "--set", "rloo.kl_coef=0.1"]
    assert verdict.main([*arguments, *changed]) == 0  # the baseline is held to no bar
    written = json.loads((made / "all.json").read_text())
    order = [f"{row['recipe']}:{row['seed']}" for row in written["runs"]]
    assert order == [f"{recipe}:{seed}" for seed in (1, 0) for recipe in ("rloo", "ppo-max", "best-of-8")]
    assert list(asked)[:2] == ["ppo-max:1", "ppo-max:0"]  # the longest start first
    assert asked["rloo:0"] == ["--work", str(made), "--set", "rloo.kl_coef=0.1", "--only", "rloo:0"]
    assert written["machine"]["jobs"] == 4 and "failed" not in written
    assert "| rloo, seed 1 | ppo-max, seed 1 | best-of-8, seed 1 | rloo, seed 0 |" in capsys.readouterr().out


def test_only_missing_models_are_made_and_a_seed_without_them_is_left_out(made, monkeypatch):
    asked = stand_in(monkeypatch, verdict, lambda name: None if name == "models:2" else recipe_row(name))
    arguments = ["--recipes", "grpo", "--seeds", "0", "2", "--jobs", "2", "--work", str(made)]
    assert verdict.main([*arguments, "--json", str(made / "all.json")]) == 1
    assert list(asked) == ["models:0", "models:2", "grpo:0"]  # seed 0 lacks the base model, which recipes need
    written = json.loads((made / "all.json").read_text())
    assert [row["seed"] for row in written["runs"]] == [0] and written["failed"] == {"models:2": "exit code 1"}


def critic_row(name):
    if name == "shared_trunk:1:0":
        return None
    form, model, ppo = name.split(":")
    figures = {"reward_last_5": 3.0, "kl_sequence_mean": 4.0, "seconds": 60.0, "explained_var_last_5": 0.5}
    return {
        "critic": form,
        "model_seed": int(model),
        "ppo_seed": int(ppo),
        "rule": "1101" * 72,
        "rate_ppo": 0.75,
    } | figures


def test_a_pair_of_critics_that_lost_a_half_is_left_out_of_the_difference(made, monkeypatch):
    asked = stand_in(monkeypatch, verdict, critic_row)
    arguments = ["--critics", "--seeds", "0", "1", "--ppo-seeds", "0", "--jobs", "9", "--work", str(made)]
    assert verdict.main([*arguments, "--json", str(made / "all.json")]) == 1
    written = json.loads((made / "all.json").read_text())
    assert len(written["runs"]) == 3 and written["difference"]["runs"] == 1 and written["difference"]["passed"]
    assert list(written["failed"]) == ["shared_trunk:1:0"] and not [name for name in asked if "models" in name]


def kind_row(name):
    kind, seed = name.split(":")
    faults = {"rude": 1.0, "vague": 0.5}
    return {
        "kind": kind,
        "seed": int(seed),
        "rows": 9,
        "pairs_right": 0.7 + int(seed) / 10,
        "pairs_right_by_fault": faults,
    }


def test_reward_models_of_each_kind_of_feedback_need_an_sft_model_alone(made, monkeypatch, capsys):
    (made / "seed-1/reward/final").rmdir()
    asked = stand_in(monkeypatch, verdict, kind_row)
    arguments = ["--kinds", "--seeds", "0", "1", "--jobs", "2", "--work", str(made), "--json", str(made / "all.json")]
    assert verdict.main(arguments) == 0
    assert set(asked) == {f"{kind}:{seed}" for kind in kinds.KINDS for seed in (0, 1)}
    assert "| score | 9 | 0.750 (0.700, 0.800) | 1.00 | 0.50 |" in capsys.readouterr().out
    assert len(json.loads((made / "all.json").read_text())["runs"]) == 10


def test_a_kind_s_rows_are_those_of_its_form(tmp_path):
    config = kinds.config_of("pair", load_settings([f"output_dir={tmp_path}", "seed=7"]))
    assert (config.total_steps, config.epochs, config.seed) == (kinds.STEPS, 1, 7)
    by = {kind: kinds.rows_of(kind) for kind in kinds.KINDS}
    assert len(by["all"]) == sum(len(by[kind]) for kind in kinds.KINDS[1:])
    for row in by["score"]:
        assert row.keys() == {"prompt", "response", "score"}


def test_seeds_of_the_quickstart_are_gathered_and_a_missed_bar_is_marked(tmp_path, monkeypatch, capsys):
    figures = {**FIGURES, "rate_before_sft": 0.0, "rate_ppo_familiar": 0.97, "rate_ppo_new": 0.83, "on_topic_sft": 0.9}
    figures |= {"on_topic_ppo": 0.95, "rm_pair_accuracy_by_fault": {"rude": 0.9}, "best_of": 8, "rate_best_of": 0.9}
    figures |= {"on_topic_best_of": 0.95, "kl_best_of": 1.2, "considerate_sft": 0.5, "considerate_ppo": 0.99}
    figures |= {f"{name}_new_topic": 0.25 for name in ("rate_sft", "rate_ppo", "considerate_sft", "considerate_ppo")}

    def row(name):
        return figures | {"seed": int(name), "passed": name == "2", "greeting": ["你好。"]}

    stand_in(monkeypatch, quickstart, row)
    arguments = ["--seeds", "1", "2", "--jobs", "2", "--work", str(tmp_path), "--json", str(tmp_path / "all.json")]
    assert quickstart.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "| rule holds after PPO, wording that no training prompt has | >= 0.84 | 0.830 missed |" in printed
    assert "| rule holds, a topic that no training prompt has |  | 0.250 (SFT 0.250) | 0.250 (SFT 0.250) |" in printed
    assert f"seed 2: {quickstart.GREETING} -> 你好。" in printed
    written = json.loads((tmp_path / "all.json").read_text(encoding="utf-8"))
    assert [run["seed"] for run in written["runs"]] == [1, 2] and written["heldout_prompts"] == 288
    chinese = quickstart.table(written["runs"], quickstart.IN_CHINESE)
    first = [line.split("|")[1].strip() for line in chinese.splitlines()]
    assert all(text == "---" or re.search("[\u4e00-\u9fff]", text) for text in first), first


def test_the_child_writes_the_figures_of_its_run_alone(made, monkeypatch):
    monkeypatch.setattr(verdict, "one", lambda name, options: {"name": name, "work": str(options.work)})
    assert verdict.main(["--work", str(made), "--only", "grpo:1", "--row", str(made / "row.json")]) == 0
    assert json.loads((made / "row.json").read_text()) == {"name": "grpo:1", "work": str(made)}
    assert not [path for path in made.iterdir() if path.name.startswith(".tmp")]


def test_a_seed_that_lost_one_of_its_runs_has_no_place_in_the_overoptimisation(made, monkeypatch):
    asked = stand_in(monkeypatch, overoptimise, lambda name: None if name == "ppo-max:1" else [name])
    options = argparse.Namespace(
        seeds=[0, 1], jobs=4, work=made, steps=7, every=2, json=made / "all.json", short=False, set=[]
    )
    runs, failed = overoptimise.measure(options)
    assert runs == {"0": {"vanilla": ["vanilla:0"], "ppo-max": ["ppo-max:0"]}} and list(failed) == ["ppo-max:1"]
    assert asked["vanilla:1"] == ["--work", str(made), "--steps", "7", "--every", "2", "--only", "vanilla:1"]
    assert json.loads((made / "all.json").read_text())["runs"] == runs


@pytest.mark.parametrize("text", ["0", "-1", "2.5", "two"])
def test_jobs_are_a_whole_number(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"{text}: expected a whole number of at least 1"):
        positive(text)
