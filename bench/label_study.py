"""What a number of judgements by hand changes, with simulated people: label -> reward -> ppo in the quickstart's world.

    python -m bench.label_study [--seeds 0 1 2] [--judgements 150 600] [--json bench/results/label_study.json]

Of each seed the quickstart's own SFT model answers prompts of the shipped feedback, four replies each, sampled as
`fastrlhf label --policy` does. Six simulated people (bench/quickstart_data/people.py) judge them at a workbench, a
judgement a prompt, into one file. A reward model is trained on its first 150 judgements (600, ...), then PPO
runs, both with the quickstart's settings. Measured on the 288 held-out prompts: the
share of replies that keep the hidden rule, which no person and no reward model sees. "blind" is the control: people who
never look.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers

from bench.gpu_kernels import about
from bench.ppo_step import machine
from bench.quickstart_data.people import PEOPLE, judge_all
from bench.verdict import make_models
from fastrlhf.checkpoint.atomic import replace_folder
from fastrlhf.checkpoint.records import json_line
from fastrlhf.data.dataset import load_feedback, load_prompts
from fastrlhf.data.feedback import Feedback
from fastrlhf.label.sampling import sampled_items
from fastrlhf.label.workbench import Workbench
from fastrlhf.ppo import PPOTrainer
from fastrlhf.quickstart import verdict
from fastrlhf.quickstart.content import DATA_DIR, shipped
from fastrlhf.quickstart.judge import about_what_was_asked, rule
from fastrlhf.quickstart.run import few_threads, inputs
from fastrlhf.quickstart.settings import Settings
from fastrlhf.reward_model import RewardTrainer
from fastrlhf.runtime.batching import derive_seed
from fastrlhf.runtime.metrics import distinct_2
from fastrlhf.trainer import run_stage

SAMPLES = 4
CROWDS = {"people": PEOPLE, "blind": {name: replace(person, lapse=1.0) for name, person in PEOPLE.items()}}
NOTHING = {"eval_every": 0, "save_every": 0, "overwrite": True}
COLUMNS = {
    "judgements": "judgements",
    "agreement": "people's pairs as the rule",
    "rule": "keep the rule",
    "on_topic": "on topic",
    "kl": "KL, nats",
    "distinct2": "distinct-2",
    "length": "tokens",
    "pairs_right": "clean pairs ranked right",
}


def label(models: Settings, crowd: str, count: int, folder: Path) -> None:
    """Let a crowd judge replies of the SFT model, into folder/feedback.jsonl as `fastrlhf label` leaves it."""
    config = models.stages["ppo"]
    prompts, output = folder / "prompts.jsonl", folder / "feedback.jsonl"
    asked = load_prompts(DATA_DIR / "feedback.jsonl")[0][:count]
    prompts.write_text("".join(json_line({"prompt": row.prompt}) for row in asked), encoding="utf-8")
    how = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature, "top_p": 1.0, "top_k": 0}
    seed = derive_seed(models.seed, "label study")
    items = sampled_items(
        str(prompts), str(models.output_dir / "sft/final"), output, _say, n=SAMPLES, seed=seed, raw=False, **how
    )
    bench = Workbench(items, list(CROWDS[crowd]), output, _say)
    judge_all(bench, CROWDS[crowd], Random(seed), count)
    bench.close()


def align(models: Settings, feedback: Path, count: int, name: str) -> Path:
    """Reward model on the first judgements of a file, then PPO -> the folder with reward/final and ppo/final."""
    out, folder = models.output_dir, models.output_dir / name
    reward = models.stages["reward"].replace(
        max_samples=count, output_dir=str(folder / "reward"), resume=False, **NOTHING
    )
    data = {"model": str(out / "sft/final"), "data": str(feedback)}
    ppo = models.stages["ppo"].replace(output_dir=str(folder / "ppo"), resume=False, **NOTHING)
    given = inputs("ppo", out) | {"reward": str(folder / "reward/final")}
    del given["eval_prompts"]
    if run_stage(RewardTrainer, data, reward) or run_stage(PPOTrainer, given, ppo):
        raise SystemExit("interrupted")
    return folder


def figures_of(replies: verdict.Replies) -> dict[str, float]:
    return {
        "rule": replies.share(rule),
        "on_topic": replies.share(about_what_was_asked),
        "distinct2": distinct_2(replies.texts),
        "length": replies.length,
    }


def study(models: Settings, arms: dict[str, list[int]]) -> Iterator[dict[str, Any]]:
    """A row for the SFT model as it is, and one for each number of judgements of each crowd. What a folder holds
    already is read, not made again."""
    config, rows, pairs = models.stages["ppo"], shipped("heldout_prompts"), shipped("heldout_pairs")
    out, sft = models.output_dir, models.output_dir / "sft/final"

    def before() -> dict[str, Any]:
        replies = verdict.reply(sft, rows, config, "SFT model")
        return {"seed": models.seed, "who": "nobody", "judgements": 0, "kl": 0.0} | figures_of(replies)

    def after(crowd: str, count: int) -> dict[str, Any]:
        feedback = out / f"label-{crowd}" / "feedback.jsonl"
        if not feedback.exists():
            replace_folder(partial(label, models, crowd, max(arms[crowd])), feedback.parent)
        began, given = time.monotonic(), load_feedback(feedback, max_samples=count)[0]
        folder = align(models, feedback, count, f"{crowd}-{count}")
        replies = verdict.reply(folder / "ppo/final", rows, config, "PPO model")
        right = verdict.pair_accuracy(folder / "reward/final", pairs)
        return {
            "seed": models.seed,
            "who": crowd,
            "judgements": count,
            "kinds": dict(Counter(one.kind for one in given)),
            "agreement": agreement(given),
            "kl": verdict.sequence_kl(replies, sft, config),
            "pairs_right": right.pop("all"),
            "pairs_right_by_fault": right,
            "seconds": round(time.monotonic() - began, 1),
        } | figures_of(replies)

    yield _kept(out / "nobody.json", before)
    for crowd, counts in arms.items():
        for count in counts:
            yield _kept(out / f"{crowd}-{count}.json", partial(after, crowd, count))


def _kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row from its file, or made and written there."""
    if not path.exists():
        path.write_text(json.dumps(make(), indent=1) + "\n")
    return json.loads(path.read_text())


def agreement(given: list[Feedback]) -> float:
    """Share of the pairs that scores and rankings order as the hidden rule does, where it tells them apart."""
    right = []
    for one in (one for one in given if one.kind != "edit"):
        kept = [rule(one.prompt[-1]["content"], response) for response in one.responses]
        right += [kept[better] for better, worse in one.ordered_pairs() if kept[better] != kept[worse]]
    return statistics.fmean(right)


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table: a line for each crowd and number of judgements, means over the seeds; of the rule all seeds."""
    seeds = sorted({row["seed"] for row in rows})
    header = [*COLUMNS.values()]
    header[2] += f" (seeds {', '.join(map(str, seeds))})"
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for arm in dict.fromkeys(map(_arm, rows)):
        some, cells = [row for row in rows if _arm(row) == arm], [arm]
        for name in list(COLUMNS)[1:]:
            values = [row[name] for row in some if name in row]
            mean = f"{statistics.fmean(values):.3g}" if values else ""
            cells.append(f"{mean} ({', '.join(f'{v:.3f}' for v in values)})" if name == "rule" else mean)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def fault_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table: how often the reward models rank clean pairs right, by the fault of the worse reply."""
    arms: dict[str, list[dict[str, float]]] = {}
    for row in rows:
        if "pairs_right_by_fault" in row:
            arms.setdefault(_arm(row), []).append(row["pairs_right_by_fault"])
    faults = list(next(iter(arms.values()))[0])
    lines = ["| judgements | " + " | ".join(faults) + " |", "|---" * (len(faults) + 1) + "|"]
    for arm, shares in arms.items():
        means = (statistics.fmean(share[fault] for share in shares) for fault in faults)
        lines.append(f"| {arm} | " + " | ".join(f"{mean:.2f}" for mean in means) + " |")
    return "\n".join(lines)


def _arm(row: dict[str, Any]) -> str:
    return f"{row['judgements']}{', blind' if row['who'] == 'blind' else ''}"


def _say(line: str) -> None:
    print(line, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.label_study", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--judgements", nargs="+", type=int, default=[150, 600])
    parser.add_argument("--blind", nargs="*", type=int, default=[150], help="judgements of the control; nothing: none")
    parser.add_argument("--work", type=Path, default=Path("runs/label-study"), help="where models are made and kept")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args(arguments)
    versions = {"transformers": transformers.__version__} | about(torch.device("cpu"))
    arms = {crowd: counts for crowd, counts in (("people", options.judgements), ("blind", options.blind)) if counts}
    report: dict[str, Any] = {"machine": machine() | versions, "samples": SAMPLES, "runs": []}
    with few_threads():
        report["machine"]["threads"] = torch.get_num_threads()
        for seed in options.seeds:
            models = make_models(options.work / f"seed-{seed}", seed, stages=("sft",))
            for row in study(models, arms):
                report["runs"].append(row)
                print(json.dumps(row), flush=True)
    print(table(report["runs"]), fault_table(report["runs"]), sep="\n\n")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
