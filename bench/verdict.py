"""The quickstart's verdict for the recipes of the papers: PPO-max, GRPO and RLOO on its task, held to its bars.

    python -m bench.verdict [--recipes ppo-max grpo rloo best-of-8] [--seeds 0 1 2]
                            [--json bench/results/verdict_cpu.json]
    python -m bench.verdict --short     # one seed, few steps, a minute or two: the rule rate must rise clearly over SFT
    python -m bench.verdict --critics [--seeds 0] [--ppo-seeds 0 1 2] [--json bench/results/critics_cpu.json]
                                        # instead: PPO with critic=separate and critic=shared_trunk (bench/critics.py)
    python -m bench.verdict --kinds [--seeds 0 1 2] [--json bench/results/kinds_cpu.json]
                                        # instead: reward models from each kind of feedback alone (bench/kinds.py)
    ... --jobs 8                        # as many runs at once, each in a process of its own with one thread

SFT and reward model of a seed are made once, by the quickstart's own stages, and kept in --work. Each recipe then
trains that SFT model as it stands in fastrlhf/recipes, but for the sizes in SIZES below, and answers the held-out
prompts. best-of-8 trains nothing: of 8 replies of the SFT model to each prompt the reward model chooses one, and its KL
is the bound log 8 - 7/8. One JSON line a run and a table; exit code 1 when a recipe misses a bar, or a run failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from bench import critics, kinds
from bench.kernels import machine
from bench.processes import positive, side_by_side, write_row
from fastrlhf.config.recipe import load_recipe
from fastrlhf.config.stages import PPOConfig
from fastrlhf.ppo import PPOTrainer
from fastrlhf.quickstart import verdict
from fastrlhf.quickstart.content import DATA_DIR, shipped
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
        "total_steps": 24,  # at 30 and 40 the replies of one seed in three vary less than the bar asks
        "rollout_batch_size": 64,
        "mini_batch_size": 64,
        "samples_per_prompt": 8,
        "learning_rate": 2e-4,
    },
    "rloo": {
        "total_steps": 30,
        "rollout_batch_size": 64,
        "mini_batch_size": 64,
        "learning_rate": 2e-4,
    },
}
TASK = ("max_prompt_tokens", "max_new_tokens", "temperature", "dtype")  # the quickstart's own, for every recipe
SHORT_MODELS = ["sft.total_steps=540", "reward.total_steps=150", "reward.epochs=1", "reward.eval_every=0"]
SHORT = {"total_steps": 10, "rollout_batch_size": 32, "mini_batch_size": 16}
SHORT_RISE = 0.1  # of the rule rate, in 288 replies: about 3 standard errors of a difference

BEST_OF, MODELS = f"best-of-{verdict.BEST_OF}", "models"  # runs beside those of recipes and critics
MADE = ("sft", "reward")  # the stages of a seed's models
FINAL = tuple(f"{stage}/final" for stage in MADE)  # what PPO needs of them; a recipe is compared with the base too


def make_models(folder: Path, seed: int, *, short: bool = False, stages: Sequence[str] = MADE) -> Settings:
    """The quickstart's SFT and reward model of a seed in folder (what is there is kept) -> its settings."""
    resume = ["resume=true"] if (folder / "run.json").exists() else []
    fresh = [] if resume else [f"seed={seed}", *(SHORT_MODELS if short else [])]
    settings = load_settings([f"output_dir={folder}", *fresh, *resume])
    if make(settings, stages):
        raise SystemExit("interrupted")
    return settings


def kept(folder: Path) -> Settings:
    """The settings of models made before, wherever their folder lies now."""
    return load_settings([f"output_dir={folder}", "resume=true"])


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


def run_best_of(models: Settings, before: verdict.Before) -> dict[str, Any]:
    """The baseline that needs no training, in the same form; `kl_sequence_mean` is its bound."""
    began = time.monotonic()
    best = verdict.best_of(before, models.stages["ppo"])
    seconds = time.monotonic() - began
    figures = verdict.measure(before.base, before.sft, best, verdict.BEST_OF_KL, before.accuracy, models.seed)
    return {"recipe": BEST_OF, "steps": 0, "seconds": round(seconds, 1)} | figures


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


def place(options: argparse.Namespace, seed: int) -> Path:
    return options.work / f"{'short' if options.short else 'seed'}-{seed}"


@lru_cache(1)  # the runs of a seed follow each other
def _before(models: Path) -> tuple[Settings, verdict.Before]:
    settings = kept(models)
    return settings, verdict.Before.of(models, settings.stages["ppo"])


@lru_cache(1)
def _sft(models: Path) -> tuple[Settings, verdict.Replies]:
    settings = kept(models)
    rows = shipped("heldout_prompts")
    return settings, verdict.reply(models / "sft/final", rows, settings.stages["ppo"], "SFT model")


def planned(options: argparse.Namespace, seeds: Sequence[int]) -> list[str]:
    """The names of the runs: RECIPE:SEED, with --kinds KIND:SEED, or with --critics FORM:SEED:PPO SEED."""
    if options.kinds:
        return [f"{kind}:{seed}" for seed in seeds for kind in kinds.KINDS]
    if options.critics:
        return [f"{form}:{seed}:{ppo}" for seed in seeds for ppo in options.ppo_seeds for form in critics.FORMS]
    return [f"{recipe}:{seed}" for seed in seeds for recipe in options.recipes]


def one(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of the run of this name, in this process; "models:SEED" makes what the runs of a seed need."""
    what, *seeds = name.split(":")
    folder = place(options, int(seeds[0]))
    if what == MODELS:
        return {"seed": make_models(folder, int(seeds[0]), short=options.short).seed}
    if what in kinds.KINDS:
        return kinds.run(what, kept(folder))
    if what in critics.FORMS:
        models, sft = _sft(folder)
        return critics.run(what, models, sft, int(seeds[1]))
    models, before = _before(folder)
    changes = dict(SHORT) if options.short else {}
    changes |= {field: value for recipe, field, value in options.set if recipe == what}
    row = run_best_of(models, before) if what == BEST_OF else run(what, models, before, changes)
    return row | {"passed": all(met for *_, met in bars(row, short=options.short))}


def make_missing(options: argparse.Namespace, seeds: Sequence[int], needed: Sequence[str] = FINAL) -> dict[str, str]:
    """Make the SFT and reward models that are not there -> why those of a seed, "models:SEED", are missing still."""
    missing = [seed for seed in seeds if not all((place(options, seed) / folder).is_dir() for folder in needed)]
    names = [f"{MODELS}:{seed}" for seed in missing]
    if options.jobs == 1:
        for name in names:
            one(name, options)
        return {}
    return _beside(names, options)[1]


def measure(options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """-> (the figures of all runs that ended, in the order of `planned`; why each of the others has none)."""
    seeds = options.seeds[:1] if options.short else options.seeds
    needed = FINAL[:1] if options.kinds else FINAL if options.critics else ("base", *FINAL)
    failed = make_missing(options, seeds, needed)
    rows: dict[str, Any] = {}

    def keep(known: dict[str, Any]) -> None:
        new = next(name for name in known if name not in rows)
        rows[new] = known[new]
        print(json.dumps({k: v for k, v in known[new].items() if k != "rule"}), flush=True)
        write(options, list(known.values()))

    if options.jobs == 1:
        for name in planned(options, seeds):
            keep(rows | {name: one(name, options)})
        return list(rows.values()), {}
    names = planned(options, [seed for seed in seeds if f"{MODELS}:{seed}" not in failed])
    found, more = _beside(sorted(names, key=_slowest_first), options, keep)
    return [found[name] for name in names if name in found], failed | more


def _beside(names: list[str], options: argparse.Namespace, *keep: Any) -> tuple[dict[str, Any], dict[str, str]]:
    common = ["--work", str(options.work), *(["--short"] if options.short else [])]
    if options.set:
        common += ["--set", *(f"{recipe}.{field}={value}" for recipe, field, value in options.set)]
    runs = {name: [*common, "--only", name] for name in names}
    return side_by_side("bench.verdict", runs, options.jobs, options.work / "runs", *keep)


def _slowest_first(name: str) -> int:
    order = ("ppo-max", "separate")
    return order.index(name.split(":")[0]) if name.split(":")[0] in order else len(order)


def write(options: argparse.Namespace, rows: list[dict[str, Any]], **more: Any) -> None:
    """--json, where it is asked for."""
    if options.json:
        about = {"forms": critics.FORMS} if options.critics else {} if options.kinds else {"sizes": SIZES}
        about |= {"machine": machine() | {"jobs": options.jobs}}
        options.json.write_text(json.dumps(about | more | {"runs": rows}, indent=1) + "\n", encoding="utf-8")


def judged(options: argparse.Namespace, rows: list[dict[str, Any]], failed: dict[str, str]) -> int:
    """Print the table and write the figures -> exit code."""
    more: dict[str, Any] = {"failed": failed} if failed else {}
    if options.critics:
        difference = critics.compare(rows)
        print(critics.table(rows, difference))
        write(options, rows, difference=difference, **more)
        return 0 if difference["passed"] and not failed else 1
    if options.kinds:
        print(kinds.table(rows))
        write(options, rows, **more)
        return 1 if failed else 0
    print(table(rows, short=options.short))
    write(options, rows, **more)
    return 0 if all(row["passed"] for row in rows if row["recipe"] != BEST_OF) and not failed else 1


def _override(text: str) -> tuple[str, str, str]:
    recipe, dot, rest = text.partition(".")
    field, equals, value = rest.partition("=")
    if recipe not in SIZES or not dot or not equals:
        raise argparse.ArgumentTypeError(f"{text}: expected RECIPE.FIELD=VALUE")
    return recipe, field, value


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.verdict", description=__doc__.split("\n")[0])
    choices = [*SIZES, BEST_OF]
    parser.add_argument("--recipes", nargs="+", choices=choices, default=choices)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--short", action="store_true", help="few steps of every stage, the first seed only")
    parser.add_argument("--critics", action="store_true", help="compare the forms of the critic instead of recipes")
    parser.add_argument("--kinds", action="store_true", help="reward models of each kind of feedback, no recipes")
    parser.add_argument("--ppo-seeds", nargs="+", type=int, default=[0, 1, 2], help="with --critics: of PPO alone")
    parser.add_argument("--set", nargs="+", type=_override, default=[], help="RECIPE.FIELD=VALUE, to try sizes")
    parser.add_argument("--work", type=Path, default=Path("runs/verdict"), help="where models are made and kept")
    parser.add_argument("--jobs", type=positive, default=1, help="runs at once, each in a process with one thread")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # of `processes`: the run of this name, its figures to --row
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    with few_threads():
        if options.only:
            write_row(options.row, one(options.only, options))
            return 0
        rows, failed = measure(options)
    if not rows:
        print("no run ended; nothing is written", file=sys.stderr)
        return 1
    return judged(options, rows, failed)


if __name__ == "__main__":
    sys.exit(main())
