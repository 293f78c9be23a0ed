"""Scores, pairs and both mixed as data of a reward model, at equal records and steps: which ranks held-out pairs best?

    python -m bench.scores RUN [--seeds 0 1 2] [--json bench/results/scores_cpu.json]
    python -m bench.scores --print bench/results/scores_cpu.json    # the table again

Simulated annotators of the quickstart (`bench/quickstart_data`) judge two replies to each of its feedback's prompts:
which is better, or what the first is worth from 1 to 5, or what both are, or the first two in turns (mixed). From the
SFT model of a seed, in RUN/seed-N/sft/final (`python -m bench.verdict --work RUN` makes them), a reward model is
trained on each kind of data, in two forms: `raw`, as it was (squared error of the raw output to scores in [-1, 1], a
head of N(0, 1/(H+1))), and `link`, as it is (fastrlhf/reward). Accuracy: of every second one of the quickstart's clean
held-out pairs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from bench.kernels import machine
from bench.processes import write_row
from bench.quickstart_data.generate import ANNOTATORS, FAULTS, Cell, Reply, as_score, good_reply, spoil
from fastrlhf.config.stages import RewardConfig
from fastrlhf.data.feedback import Feedback
from fastrlhf.quickstart.content import shipped
from fastrlhf.quickstart.judge import parse_prompt
from fastrlhf.quickstart.run import few_threads
from fastrlhf.reward.link import ScoreLink
from fastrlhf.reward.losses import preference_loss
from fastrlhf.reward_model import RewardTrainer

KINDS = {  # what is asked of the records, in turns
    "pairs": ("pairs",),
    "scores": ("scores",),
    "both scored": ("both scored",),
    "mixed": ("pairs", "scores"),
}
FORMS = ("raw", "link")
STEPS, ROWS = 120, 8  # optimizer steps, and records of one
RUNS = [(form, kind) for form in FORMS for kind in KINDS if (form, kind) != ("raw", "both scored")]  # of a seed
RECORDS = STEPS * ROWS
TO_BEST_PART, TO_PAIRS = 0.0, -0.03  # bars: mixed less the better of pairs and scores; scores less pairs


class Raw(ScoreLink):
    """Scores as they were learnt before: in [-1, 1], by the raw output itself, one by one."""

    def loss(self, scores: Tensor, feedback: Feedback) -> Tensor:
        if feedback.scores is None:
            return preference_loss(scores, feedback.ranking, feedback.margin)
        return (scores - scores.new_tensor(feedback.scores)).square().mean()


def judged(kind: str, number: int) -> list[dict[str, Any]]:
    """The records of one of KINDS for a seed's number. The prompts, replies and people of a seed are the same in all
    kinds; so are what people think of them, but for what each kind asks."""
    random, rows = Random(f"bench.scores {number}"), []
    prompts = [row["prompt"] for row in shipped("feedback")]
    random.shuffle(prompts)
    parts = KINDS[kind]
    for i, prompt in enumerate(prompts[:RECORDS]):
        question = parse_prompt(prompt[-1]["content"])
        replies = two_replies(Cell(*question), random)
        person = random.randrange(len(ANNOTATORS))
        opinions = [ANNOTATORS[person].judge(reply, random) for reply in replies]
        texts, given = [reply.text for reply in replies], [as_score(opinion) for opinion in opinions]
        row = {"prompt": prompt, "annotator": f"person {person}"}
        best = opinions.index(max(opinions))
        asked: dict[str, dict[str, Any]] = {
            "pairs": {"chosen": texts[best], "rejected": texts[1 - best]},
            "scores": {"response": texts[0], "score": given[0]},
            "both scored": {"responses": texts, "scores": given},
        }
        rows.append(row | asked[parts[i % len(parts)]])
    return rows


def two_replies(cell: Cell, random: Random) -> list[Reply]:
    """A good reply and one with a fault, in either order."""
    fault = random.choices(list(FAULTS), list(FAULTS.values()))[0]
    replies = [good_reply(cell, random), spoil(good_reply(cell, random), cell, fault, random)]
    random.shuffle(replies)
    return replies


def run(model: Path, form: str, kind: str, seed: int) -> dict[str, Any]:
    """Train on one kind of data -> accuracy of held-out pairs, all and by fault, first losses, scale, seconds."""
    began = time.monotonic()
    sizes = {"total_steps": STEPS, "mini_batch_size": ROWS, "max_tokens": 128, "micro_batch_tokens": 4096}
    rates = {"learning_rate": 3e-4, "warmup_steps": 20, "dtype": "fp32", "eval_every": 0, "eval_fraction": 0.0}
    held_out = shipped("heldout_pairs")[::2]
    config = RewardConfig(**sizes, **rates, seed=seed)
    trainer = RewardTrainer(config, model=str(model), data=judged(kind, seed), eval_data=held_out)
    if form == "raw":
        head, draw = trainer.model.score.weight, torch.Generator().manual_seed(seed)
        with torch.no_grad():
            head.copy_(torch.randn(head.shape, generator=draw) * (head.shape[1] + 1) ** -0.5)
        trainer.link = Raw(trainer.link.raters, config.score_range)
    losses = [step.metrics["loss/train"] for step in trainer]
    parts = trainer._held_out_scores().split(2)
    right = [bool(better > worse) for better, worse in parts]
    faults = {fault: fmean(r for r, row in zip(right, held_out) if row["fault"] == fault) for fault in FAULTS}
    return {
        "form": form,
        "data": kind,
        "seed": seed,
        "accuracy": fmean(right),
        "by_fault": faults,
        "first_losses": fmean(losses[:5]),
        "scale": trainer.link.scale,
        "seconds": round(time.monotonic() - began, 1),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, accuracies in the order of the seeds and their mean, and what the bars say."""
    kinds = [kind for kind in KINDS if any(row["data"] == kind for row in rows)]
    lines = ["| form | " + " | ".join(kinds) + " |", "|---|" + "---|" * len(kinds)]
    for form in FORMS:
        cells = []
        for kind in kinds:
            found = [row["accuracy"] for row in rows if (row["form"], row["data"]) == (form, kind)]
            if not found:
                cells.append("not run")
                continue
            cells.append(f"{' / '.join(f'{x:.3f}' for x in found)}, mean {fmean(found):.3f}")
        lines.append(f"| {form} | " + " | ".join(cells) + " |")
    for form in FORMS:
        found = differences(rows, form)
        lines.append(
            f"\n{form}: mixed less its best part {found['mixed']:+.3f} (bar {TO_BEST_PART:+.3f}), scores of one reply "
            f"less pairs {found['scores']:+.3f} (bar {TO_PAIRS:+.3f})"
            + (f", scores of both less pairs {found['both scored']:+.3f}" if "both scored" in found else "")
        )
    return "\n".join(lines)


def differences(rows: Sequence[dict[str, Any]], form: str) -> dict[str, float]:
    """What the bars are about, of mean accuracies: mixed less the better of pairs and scores; scores of one reply, and
    of both, less pairs."""
    found = {kind: [r["accuracy"] for r in rows if (r["form"], r["data"]) == (form, kind)] for kind in KINDS}
    mean = {kind: fmean(some) for kind, some in found.items() if some}
    less_pairs = {kind: mean[kind] - mean["pairs"] for kind in ("scores", "both scored") if kind in mean}
    return less_pairs | {"mixed": mean["mixed"] - max(mean["pairs"], mean["scores"])}


def passed(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether `link` is within the bars."""
    found = differences(rows, "link")
    return found["mixed"] >= TO_BEST_PART and found["scores"] >= TO_PAIRS


def main(arguments: list[str] | None = None) -> int:
    """The command above -> its exit code, 1 where `link` misses a bar."""
    parser = argparse.ArgumentParser(prog="python -m bench.scores", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", metavar="RUN")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="where to write each run as it comes; what stands there is kept")
    parser.add_argument("--print", type=Path, metavar="JSON", help="print the table of this file, and train nothing")
    options = parser.parse_args(arguments)
    if options.print is not None:
        print(table(json.loads(options.print.read_text(encoding="utf-8"))["runs"]))
        return 0
    if options.folder is None:
        parser.error("RUN: the folder of the SFT models is needed")
    rows: list[dict[str, Any]] = []
    if options.json is not None and options.json.exists():
        rows += json.loads(options.json.read_text(encoding="utf-8"))["runs"]
    made = {(row["seed"], row["form"], row["data"]) for row in rows}
    report = {"steps": STEPS, "records": RECORDS, "machine": machine(), "runs": rows}
    with few_threads():
        for seed in options.seeds:
            for form, kind in RUNS:
                if (seed, form, kind) in made:
                    continue
                rows.append(run(options.folder / f"seed-{seed}/sft/final", form, kind, seed))
                print(json.dumps(rows[-1]), flush=True)
                if options.json is not None:
                    write_row(options.json, report)
    print(table(rows))
    return 0 if passed(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
