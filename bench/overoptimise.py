"""Reward-model over-optimisation at small scale: vanilla PPO without KL beside PPO-max, from the same models.

    python -m bench.overoptimise [--seeds 0 1 2] [--steps 50] [--every 5] [--jobs 6]
                                 [--json bench/results/overoptimisation_cpu.json]
    python -m bench.overoptimise --draw FILE.json      # only the figure, from figures measured before

Figures 4 and 9 of Zheng et al. 2023 (arXiv:2307.04964) on the quickstart's task. Both runs of a seed have the sizes of
bench.verdict; "vanilla" is the ppo-max recipe with VANILLA below: everything that holds PPO-max back is off. At every
evaluation the held-out prompts are answered: reward-model score, distinct-2 and length as the run records them in
metrics.jsonl, and what the run cannot know, the share of replies that keep the hidden rule and the KL to the SFT model.
Writes the figure docs/overoptimisation.svg, of the first seed, and in each run's folder its report. Exit code 1 when
the vanilla run of a seed does not over-optimise, or one of PPO-max does.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench.kernels import machine
from bench.processes import positive, side_by_side, write_row
from bench.verdict import MODELS, kept, make_missing, settings_of
from fastrlhf.checkpoint.records import read_records
from fastrlhf.ppo import PPOTrainer
from fastrlhf.quickstart import verdict
from fastrlhf.quickstart.content import shipped
from fastrlhf.quickstart.judge import rule
from fastrlhf.quickstart.run import few_threads
from fastrlhf.quickstart.settings import Settings
from fastrlhf.report import build_report
from fastrlhf.report.figures import Panel, Scale, Series, curve_panel
from fastrlhf.report.page import render
from fastrlhf.report.verdict import DIVERSITY_KEPT

VANILLA = {
    "kl_coef": 0,
    "reward_scaling": "none",
    "reward_clip": "none",
    "critic_warmup_steps": 0,
    "critic_pretrain_epochs": 0,
    "ptx_coef": 0,
    "clip_range_value": "none",
    "whiten_advantages": False,
}
RUNS: dict[str, dict[str, Any]] = {"vanilla": VANILLA, "ppo-max": {}}
TITLES = {"vanilla": "Vanilla PPO, no KL", "ppo-max": "PPO-max"}
FIGURE = Path("docs/overoptimisation.svg")
RECORDED = {"reward": "reward/eval", "distinct2": "distinct2/eval", "length": "length/eval"}
RULE_LOST = 0.1  # of the rule rate, from its best: about 3 standard errors in 288 replies


def train(name: str, models: Settings, folder: Path, steps: int, every: int) -> list[dict[str, float]]:
    """One run -> a row an evaluation: step, reward, rule, distinct2, length, kl. Its report is written too."""
    changes = RUNS[name] | {"total_steps": steps, "eval_every": every}
    named, config = settings_of("ppo-max", models, folder, changes)
    trainer = PPOTrainer(config, **named)
    prompts, seen = shipped("heldout_prompts"), {}

    def look(step: int) -> None:
        replies = verdict.answer(trainer.policy, trainer.tokenizer, prompts, config)
        kl = verdict.sequence_kl(replies, models.output_dir / "sft/final", config)
        seen[step] = {"rule": replies.share(rule), "kl": kl}
        print(json.dumps({"run": name, "step": step, **seen[step]}), flush=True)

    look(0)
    for _ in trainer:
        if trainer.steps_done % every == 0 or trainer.steps_done == steps:
            look(trainer.steps_done)
    trainer.tracker.close()
    print(build_report(folder))
    rows = read_records(folder / "metrics.jsonl", [], {"step": int, "reward/eval": float})
    recorded = {row["step"]: row for row in rows}
    return [
        {"step": step, **{short: recorded[step][long] for short, long in RECORDED.items()}, **figures}
        for step, figures in seen.items()
    ]


def over_optimised(rows: list[dict[str, float]]) -> bool:
    """The reward ends above its start, and distinct-2 far below its start or the rule rate below its best."""
    first, last, best = rows[0], rows[-1], max(row["rule"] for row in rows)
    worse = last["distinct2"] < DIVERSITY_KEPT * first["distinct2"] or last["rule"] < best - RULE_LOST
    return last["reward"] > first["reward"] and worse


LINES = (  # a row of the figure: its unit and span, and its curves: key, label, colour
    ("reward-model score", (), (("reward", "reward-model score", "#2a6fd0"),)),
    (
        "share",
        (0, 1),
        (("rule", "replies that keep the rule", "#17764a"), ("kept", "distinct-2 against SFT's", "#d9601f")),
    ),
    ("nats a reply", (), (("kl", "KL to the SFT model", "#7a4fb5"),)),
    ("tokens", (), (("length", "reply length", "#6c707a"),)),
)


def draw(figures: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Reward, rule rate with distinct-2, and KL with length against steps: a column a run, the same axes in a row."""
    runs = {
        name: [row | {"kept": row["distinct2"] / run[0]["distinct2"]} for row in run] for name, run in figures.items()
    }
    panels, texts, column, row_height = [], [], 430, 170
    for i, (name, rows) in enumerate(runs.items()):
        left = 54 + i * column
        x = Scale.around([row["step"] for row in rows], left, left + column - 70)
        texts.append((left + (column - 70) / 2, 20, TITLES[name], "ink"))
        for j, (unit, span, curves) in enumerate(LINES):
            top = 55 + j * row_height
            series = [Series(label, [(row["step"], row[key]) for row in rows], True, c) for key, label, c in curves]
            shared = [*span, *(row[key] for run in runs.values() for row in run for key, *_ in curves)]
            x_label = "PPO step" if j == len(LINES) - 1 else ""
            panel = curve_panel(Panel(unit, series, shared), len(panels), x, top, top + row_height - 45, x_label)
            panels.append(panel | {"legend": i == 0})
    panels[0]["texts"] = texts
    size = {"width": len(runs) * column, "height": 65 + len(LINES) * row_height}
    figure = {"id": "fig", "title": "Over-optimisation", "panels": panels} | size
    path.write_text(render("standalone.svg", figure=figure), encoding="utf-8")


def table(runs: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """A Markdown table: both runs of each seed at the start, at the best rule rate before the end, and at the end."""
    names = ("reward", "rule", "distinct2", "length", "kl")
    lines = ["| run | seed | step | " + " | ".join(names) + " |", "|---|---|---|" + "---|" * len(names)]
    for name in RUNS:
        for seed, figures in runs.items():
            rows = figures[name]
            for row in (rows[0], max(rows[:-1], key=lambda row: row["rule"]), rows[-1]):
                cells = " | ".join(f"{row[n]:.3g}" for n in names)
                lines.append(f"| {name} | {seed} | {row['step']} | {cells} |")
    return "\n".join(lines)


def in_words(runs: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """A Markdown list, a line a seed: where vanilla PPO is at its best, and how both runs end."""
    lines = []
    for seed, figures in runs.items():
        first, best = figures["vanilla"][0], max(figures["vanilla"][:-1], key=lambda row: row["rule"])
        ends = {name: rows[-1] for name, rows in figures.items()}
        said = {
            name: f"at {row['rule']:.0%} with reward {row['reward']:.2f}, {row['kl']:.1f} nats from the SFT model, "
            f"with {row['distinct2'] / first['distinct2']:.2f} of its distinct-2"
            for name, row in ends.items()
        }
        lines.append(
            f"- seed {seed}: at its best, at step {best['step']}, {best['rule']:.0%} of vanilla PPO's replies keep the "
            f"rule; it ends {said['vanilla']}; PPO-max ends {said['ppo-max']}."
        )
    return "\n".join(lines)


def one(name: str, options: argparse.Namespace) -> Any:
    """What the run RUN:SEED measures, in this process; its models are there."""
    run, seed = name.split(":")
    folder = options.work / f"seed-{seed}"
    return train(run, kept(folder), folder / f"over-{run}", options.steps, options.every)


def measure(options: argparse.Namespace) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """-> (by seed, the rows of both runs, for the seeds whose two runs ended; why each of the other runs has none)."""
    failed = make_missing(options, options.seeds)
    seeds = [seed for seed in options.seeds if f"{MODELS}:{seed}" not in failed]
    names = [f"{run}:{seed}" for seed in seeds for run in RUNS]
    if options.jobs == 1:
        found: dict[str, Any] = {}
        for name in names:
            found[name] = one(name, options)
            write(options, _by_seed(found))
        return _by_seed(found), failed
    sizes = ["--work", str(options.work), "--steps", str(options.steps), "--every", str(options.every)]
    runs = {name: [*sizes, "--only", name] for name in names}

    def keep(found: dict[str, Any]) -> None:
        write(options, _by_seed(found))

    found, more = side_by_side("bench.overoptimise", runs, options.jobs, options.work / "runs", keep)
    return _by_seed(found), failed | more


def _by_seed(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of RUN:SEED by seed and run; seeds that lack a run are left out."""
    seeds = list(dict.fromkeys(name.split(":")[1] for name in found))
    both = {seed: {run: found.get(f"{run}:{seed}") for run in RUNS} for seed in seeds}
    return {seed: runs for seed, runs in both.items() if None not in runs.values()}


def write(options: argparse.Namespace, runs: dict[str, dict[str, Any]], **more: Any) -> None:
    """--json, where it is asked for."""
    if options.json:
        about = {"steps": options.steps, "vanilla": VANILLA, "machine": machine() | {"jobs": options.jobs}}
        options.json.write_text(json.dumps(about | more | {"runs": runs}, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.overoptimise", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--every", type=int, default=5, help="steps between evaluations")
    parser.add_argument("--work", type=Path, default=Path("runs/verdict"), help="where models are made and kept")
    parser.add_argument("--jobs", type=positive, default=1, help="runs at once, each in a process with one thread")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--draw", type=Path, help="draw the figure of such a file, and train nothing")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # of `processes`: the run of this name, its figures to --row
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.short, options.set = False, []
    failed: dict[str, str] = {}
    if options.draw:
        runs = json.loads(options.draw.read_text(encoding="utf-8"))["runs"]
    else:
        with few_threads():
            if options.only:
                write_row(options.row, one(options.only, options))
                return 0
            runs, failed = measure(options)
    if not runs:
        print("no seed has both of its runs; nothing is written", file=sys.stderr)
        return 1
    if not options.draw:
        write(options, runs, **({"failed": failed} if failed else {}))
    draw(next(iter(runs.values())), FIGURE)
    print(table(runs))
    found = {seed: {name: over_optimised(rows) for name, rows in figures.items()} for seed, figures in runs.items()}
    print(f"over-optimised, by seed: {found}")
    return 0 if not failed and all(seen == {"vanilla": True, "ppo-max": False} for seen in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
