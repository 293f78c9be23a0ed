"""The quickstart's verdict for the recipes of the papers: PPO-max, GRPO and RLOO on its task, held to its bars.

    python -m bench.verdict [--recipes ppo-max grpo rloo] [--seeds 0 1 2] [--json bench/results/verdict_cpu.json]
    python -m bench.verdict --short     # one seed, few steps, about a minute: the rule rate must rise clearly over SFT
    python -m bench.verdict --critics [--seeds 0] [--ppo-seeds 0 1 2] [--json bench/results/critics_cpu.json]
                                        # instead: PPO with critic=separate and critic=shared_trunk (bench/critics.py)

SFT and reward model of a seed are made once, by the quickstart's own stages, and kept in --work. Each recipe then
trains that SFT model as it stands in fastrlhf/recipes, but for the sizes in SIZES below, and answers the held-out
prompts. One JSON line a run and a table; exit code 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import critics
from fastrlhf.config.recipe import load_recipe
from fastrlhf.config.stages import PPOConfig
from fastrlhf.ppo import PPOTrainer
from fastrlhf.quickstart import verdict
from fastrlhf.quickstart.content import DATA_DIR
from fastrlhf.quickstart.run import few_threads, inputs, make
from fastrlhf.quickstart.settings import Settings, load_settings
from fastrlhf.trainer import run_stage

# The one table of what a run changes in a packaged recipe, and why nothing else: the recipes are written for models of
# 1B parameters and more, batches of 128 to 1024 and 1000 steps; this one has 1M and seconds. Learning rates
# grow as they do from a 7B model to a 1M one. Steps of a warm-up shrink with the run. The weight of ptx is another.
SIZES: dict[str, dict[str, Any]] = {
    "ppo-max": {
        "total_steps": 40,
        "rollout_batch_size": 64,
        "mini_batch_size": 16,
        "learning_rate": 4e-4,
        "critic_learning_rate": 1e-3,
        "critic_warmup_steps": 3,
        "ptx_coef": 0.02,  # these SFT replies are faulty on purpose, 6 in 10: a policy held to them cannot pass
    },
    "grpo": {
        "total_steps": 30,
        "rollout_batch_size": 64,
        "mini_batch_size": 64,
        "samples_per_prompt": 8,
        "learning_rate": 2e-4,
    },
    "rloo": {
        "total_steps": 40,
        "rollout_batch_size": 64,
        "mini_batch_size": 64,
        "learning_rate": 2e-4,
    },
}
TASK = ("max_prompt_tokens", "max_new_tokens", "temperature", "dtype")  # the quickstart's own, for every recipe
SHORT_MODELS = ["sft.total_steps=300", "reward.total_steps=150", "reward.epochs=1"]
SHORT = {"total_steps": 8, "rollout_batch_size": 32, "mini_batch_size": 16}
SHORT_RISE = 0.1  # of the rule rate, in 288 replies: about 3 standard errors of a difference


def make_models(folder: Path, seed: int, *, short: bool = False, stages: Sequence[str] = ("sft", "reward")) -> Settings:
    """The quickstart's SFT and reward model of a seed in folder (what is there is kept) -> its settings."""
    resume = ["resume=true"] if (folder / "run.json").exists() else []
    fresh = [] if resume else [f"seed={seed}", *(SHORT_MODELS if short else [])]
    settings = load_settings([f"output_dir={folder}", *fresh, *resume])
    if make(settings, stages):
        raise SystemExit("interrupted")
    return settings


def settings_of(recipe: str, models: Settings, folder: Path, changes: dict[str, Any]) -> tuple[dict, PPOConfig]:
    """(inputs, config) of a packaged recipe on the quickstart's task."""
    task = models.stages["ppo"]
    fields = {name: getattr(task, name) for name in TASK} | SIZES[recipe] | {"save_every": 0, "eval_every": 0} | changes
    fields |= {"seed": models.seed, "output_dir": folder, "overwrite": True}
    given = [f"{name}={value}" for name, value in (inputs("ppo", models.output_dir) | fields).items()]
    named, config = load_recipe("ppo", recipe, given)
    if config.ptx_coef > 0:
        named["ptx_data"] = str(DATA_DIR / "sft.jsonl")
    return named, config


def run(recipe: str, models: Settings, before: verdict.Before, changes: dict[str, Any]) -> dict[str, Any]:
    """Train in a folder beside the models and measure -> the figures of verdict.json, recipe, steps and seconds."""
    folder = models.output_dir / recipe
    named, config = settings_of(recipe, models, folder, changes)
    began = time.monotonic()
    if run_stage(PPOTrainer, named, config):
        raise SystemExit("interrupted")
    seconds = time.monotonic() - began
    figures, _ = verdict.compare(before, folder / "final", config)
    return {"recipe": recipe, "steps": config.total_steps, "seconds": round(seconds, 1)} | figures


def bars(figures: dict[str, Any], *, short: bool) -> list[tuple[str, float, str, bool]]:
    """The quickstart's bars, or what a short run can show, in the same form."""
    if not short:
        return verdict.judge(figures)
    rise = figures["rate_ppo"] - figures["rate_sft"]
    return [
        ("rule rate, PPO above SFT", rise, f">= {SHORT_RISE}", rise >= SHORT_RISE),
        *(bar for bar in verdict.judge(figures) if bar[0].startswith(("...", "KL", "distinct", "mean length"))),
    ]


def table(rows: list[dict[str, Any]], *, short: bool) -> str:
    """A Markdown table: a line a bar, a column a run."""
    judged = [bars(row, short=short) for row in rows]
    lines = ["| measured | bar | " + " | ".join(f"{r['recipe']}, seed {r['seed']}" for r in rows) + " |"]
    lines.append("|---|---|" + "---|" * len(rows))
    for i, (what, _, bar, _) in enumerate(judged[0]):
        cells = [f"{run[i][1]:.3f}{'' if run[i][3] else ' missed'}" for run in judged]
        lines.append(f"| {what} | {bar} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    kind = "short" if options.short else "seed"
    for seed in options.seeds[:1] if options.short else options.seeds:
        models = make_models(options.work / f"{kind}-{seed}", seed, short=options.short)
        before = verdict.Before.of(models.output_dir, models.stages["ppo"])
        for recipe in options.recipes:
            changes = dict(SHORT) if options.short else {}
            changes |= {k: v for r, k, v in options.set if r == recipe}
            row = run(recipe, models, before, changes)
            row["passed"] = all(met for *_, met in bars(row, short=options.short))
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def measure_critics(options: argparse.Namespace) -> int:
    """Both forms of the critic, for each seed of models and of PPO -> exit code."""
    rows = []
    for seed in options.seeds:
        models = make_models(options.work / f"seed-{seed}", seed)
        before = verdict.Before.of(models.output_dir, models.stages["ppo"])
        for ppo_seed in options.ppo_seeds:
            for form in critics.FORMS:
                rows.append(critics.run(form, models, before, ppo_seed))
                print(json.dumps({k: v for k, v in rows[-1].items() if k != "rule"}), flush=True)
    difference = critics.compare(rows)
    print(critics.table(rows, difference))
    if options.json:
        result = {"forms": critics.FORMS, "difference": difference, "runs": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if difference["passed"] else 1


def _override(text: str) -> tuple[str, str, str]:
    recipe, dot, rest = text.partition(".")
    field, equals, value = rest.partition("=")
    if recipe not in SIZES or not dot or not equals:
        raise argparse.ArgumentTypeError(f"{text}: expected RECIPE.FIELD=VALUE")
    return recipe, field, value


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.verdict", description=__doc__.split("\n")[0])
    parser.add_argument("--recipes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--short", action="store_true", help="few steps of every stage, the first seed only")
    parser.add_argument("--critics", action="store_true", help="compare the forms of the critic instead of recipes")
    parser.add_argument("--ppo-seeds", nargs="+", type=int, default=[0, 1, 2], help="with --critics: of PPO alone")
    parser.add_argument("--set", nargs="+", type=_override, default=[], help="RECIPE.FIELD=VALUE, to try sizes")
    parser.add_argument("--work", type=Path, default=Path("runs/verdict"), help="where models are made and kept")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args(arguments)
    if options.critics:
        with few_threads():
            return measure_critics(options)
    with few_threads():
        rows = measure(options)
    print(table(rows, short=options.short))
    if options.json:
        options.json.write_text(json.dumps({"sizes": SIZES, "runs": rows}, indent=1) + "\n")
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
