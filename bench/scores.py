"""Scores, pairs and both mixed as data of a reward model, at equal records and steps: which ranks held-out pairs best?

    python -m bench.scores RUN [--seeds 0 1 2] [--json bench/results/scores_cpu.json]
    python -m bench.scores --print bench/results/scores_cpu.json    # the table again
    python -m bench.scores RUN --weights 0.1 0.2 0.3 0.5 1 [--seeds 3] [--json bench/results/score_weight_cpu.json]

Simulated annotators of the quickstart (`bench/quickstart_data`) judge two replies to each of its feedback's prompts:
which is better; or what the first is worth from 1 to 5; or what both are; or the first two in turns (mixed). `pairs of
mixed` are those alone, twice in as many steps, and once in half of them. From the SFT model of a seed, in
RUN/seed-N/sft/final (`python -m bench.verdict --work RUN` makes them), a reward model is trained on each, in two forms:
`raw`, as it was (squared error of the raw output to scores in [-1, 1], a head of N(0, 1/(H+1))), and `link`, as it is
(fastrlhf/reward). Accuracy: of clean pairs of a good reply and one with a fault, as the quickstart's held-out ones are
made, each fault once for each of PROMPTS held-out prompts. Intervals: 90 %, bootstrap over seeds and prompts.

--weights: of the squared error of a score, on mixed records, beside the pairs alone; DRAWS draws of the records for a
seed, on seed 3, which the table above does not have. SCORE_WEIGHT (fastrlhf/reward/losses.py) lies between the best of
it and what the quickstart asks for.
"""

from __future__ import annotations

import argparse
import functools
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

from bench.critics import interval
from bench.kernels import machine
from bench.processes import begun, write_row
from bench.quickstart_data.generate import ANNOTATORS, FAULTS, Cell, Reply, as_score, good_reply, spoil
from fastrlhf.config.stages import RewardConfig
from fastrlhf.data.feedback import Feedback
from fastrlhf.quickstart.content import shipped
from fastrlhf.quickstart.judge import parse_prompt
from fastrlhf.quickstart.run import few_threads
from fastrlhf.reward.link import ScoreLink
from fastrlhf.reward.losses import SCORE_WEIGHT, preference_loss
from fastrlhf.reward_model import RewardTrainer

KINDS = {  # what is asked of the records, in turns; None: nothing, the record is left out
    "pairs": ("pairs",),
    "scores": ("scores",),
    "both scored": ("both scored",),
    "mixed": ("pairs", "scores"),
    "pairs of mixed": ("pairs", None),
    "pairs of mixed, once": ("pairs", None),
}
ONCE = "pairs of mixed, once"  # in half the steps
FORMS = ("raw", "link")
STEPS, ROWS = 120, 8  # optimizer steps, and records of one
RUNS = [("link", kind) for kind in KINDS] + [("raw", kind) for kind in ("pairs", "scores", "mixed")]  # of a seed
RECORDS = STEPS * ROWS
DRAWS = 3  # of the records of a seed, for --weights
PROMPTS = 192  # held out, of 288
BARS = {  # what is compared with what, and the bar of the difference
    ("scores", "pairs"): -0.03,
    ("both scored", "pairs"): -0.03,
    ("mixed", ONCE): 0.0,
    ("mixed", "pairs of mixed"): 0.0,
    ("mixed", "scores"): 0.0,
}


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
        part = parts[i % len(parts)]
        if part is not None:
            rows.append(row | asked[part])
    return rows


@functools.cache
def held_out() -> list[dict[str, Any]]:
    """Clean pairs with new replies, the same in every run."""
    random, rows = Random("bench.scores held out"), []
    prompts = [row["prompt"] for row in shipped("heldout_prompts")]
    for prompt in random.sample(prompts, PROMPTS):
        cell = Cell(*parse_prompt(prompt[-1]["content"]))
        for fault in FAULTS:
            better, worse = good_reply(cell, random), spoil(good_reply(cell, random), cell, fault, random)
            rows.append({"prompt": prompt, "chosen": better.text, "rejected": worse.text, "fault": fault})
    return rows


def two_replies(cell: Cell, random: Random) -> list[Reply]:
    """A good reply and one with a fault, in either order."""
    fault = random.choices(list(FAULTS), list(FAULTS.values()))[0]
    replies = [good_reply(cell, random), spoil(good_reply(cell, random), cell, fault, random)]
    random.shuffle(replies)
    return replies


def run(model: Path, form: str, kind: str, seed: int, weight: float = SCORE_WEIGHT) -> dict[str, Any]:
    """Train on one kind of data -> accuracy of held-out pairs, all and by fault, first losses, scale, seconds."""
    began = time.monotonic()
    steps = STEPS // 2 if kind == ONCE else STEPS
    sizes = {"total_steps": steps, "mini_batch_size": ROWS, "max_tokens": 128, "micro_batch_tokens": 4096}
    rates = {"learning_rate": 3e-4, "warmup_steps": 20, "dtype": "fp32", "eval_every": 0, "eval_fraction": 0.0}
    config = RewardConfig(**sizes, **rates, seed=seed)
    trainer = RewardTrainer(config, model=str(model), data=judged(kind, seed), eval_data=held_out())
    if form == "raw":
        head, draw = trainer.model.score.weight, torch.Generator().manual_seed(seed)
        with torch.no_grad():
            head.copy_(torch.randn(head.shape, generator=draw) * (head.shape[1] + 1) ** -0.5)
        trainer.link = Raw(trainer.link.raters, config.score_range)
    trainer.link.weight = weight
    losses = [step.metrics["loss/train"] for step in trainer]
    parts = trainer._held_out_scores().split(2)
    right = [bool(better > worse) for better, worse in parts]
    faults = {fault: fmean(r for r, row in zip(right, held_out()) if row["fault"] == fault) for fault in FAULTS}
    return {
        "form": form,
        "data": kind,
        "seed": seed,
        "accuracy": fmean(right),
        "by_fault": faults,
        "first_losses": fmean(losses[:5]),
        "scale": trainer.link.scale,
        "seconds": round(time.monotonic() - began, 1),
        "right": "".join(str(int(r)) for r in right),  # 0 or 1 a held-out pair
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
    lines.append("")
    for form in FORMS:
        for (kind, other), bar in BARS.items():
            found = difference(rows, (form, kind), (form, other))
            if found is not None:
                verdict = "met" if found[0] >= bar else "missed"
                lines.append(f"{form}: {kind} less {other} {said(found)}; bar {bar:+.2f}: {verdict}")
    for kind in kinds:
        found = difference(rows, ("link", kind), ("raw", kind))
        if found is not None:
            lines.append(f"link less raw, {kind}: {said(found)}")
    return "\n".join(lines)


def said(found: tuple[float, float, float]) -> str:
    """A difference and its interval."""
    return f"{found[0]:+.3f} ({found[1]:+.3f} to {found[2]:+.3f})"


def difference(
    rows: Sequence[dict[str, Any]], one: tuple[str, str], other: tuple[str, str]
) -> tuple[float, float, float] | None:
    """Of the accuracies of two (form, kind), over the seeds that have both: mean and the ends of its interval; None: no
    seed has."""
    by = {(row["form"], row["data"], row["seed"]): torch.tensor(list(map(float, row["right"]))) for row in rows}
    seeds = [seed for *run, seed in by if tuple(run) == one and (*other, seed) in by]
    if not seeds:
        return None
    of_pairs = torch.stack([by[(*one, seed)] - by[(*other, seed)] for seed in seeds]).double()
    return interval(of_pairs.unflatten(1, (-1, len(FAULTS))).mean(2))  # a prompt's pairs belong together


def passed(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether `link` is within the bars."""
    found = [(difference(rows, ("link", kind), ("link", other)), bar) for (kind, other), bar in BARS.items()]
    return all(some is not None and some[0] >= bar for some, bar in found)


def weights(options: argparse.Namespace, rows: list[dict[str, Any]]) -> int:
    """--weights -> its exit code."""
    kinds = [("mixed", weight) for weight in options.weights]
    kinds += [(kind, SCORE_WEIGHT) for kind in ("pairs of mixed", ONCE)]  # which have no scores
    made = {(row["seed"], row["draw"], row["data"], row["weight"]) for row in rows}
    with few_threads():
        for seed in options.seeds:
            for draw in range(seed, seed + DRAWS):
                for kind, weight in kinds:
                    if (seed, draw, kind, weight) in made:
                        continue
                    found = run(options.folder / f"seed-{seed}/sft/final", "link", kind, draw, weight)
                    kept = {name: found[name] for name in ("data", "accuracy", "by_fault", "scale", "seconds")}
                    rows.append({"seed": seed, "draw": draw, "weight": weight} | kept)
                    if options.json is not None:
                        report = {"steps": STEPS, "records": RECORDS, "pairs": PROMPTS * len(FAULTS)}
                        report |= {"machine": machine(), "runs": rows, "printed": weights_table(rows).splitlines()}
                        write_row(options.json, report)
    print(weights_table(rows))
    return 0


def weights_table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: a line a weight, accuracies in the order of the draws and their mean."""
    lines = ["| data | weight of the squared error | accuracy | mean |", "|---|---|---|---|"]
    for kind, weight in dict.fromkeys((row["data"], row["weight"]) for row in rows):
        found = [row["accuracy"] for row in rows if (row["data"], row["weight"]) == (kind, weight)]
        said = f"{weight:g}" if kind == "mixed" else "no scores"
        lines.append(f"| {kind} | {said} | {' / '.join(f'{x:.3f}' for x in found)} | {fmean(found):.3f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command above -> its exit code, 1 where `link` misses a bar."""
    parser = argparse.ArgumentParser(prog="python -m bench.scores", description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=float, nargs="+", help="try these weights of the squared error instead")
    options, rows = begun(parser, arguments, lambda rows: (weights_table if "weight" in rows[0] else table)(rows))
    if rows is None:
        return 0
    if options.weights:
        return weights(options, rows)
    made = {(row["seed"], row["form"], row["data"]) for row in rows}
    report = {"steps": STEPS, "records": RECORDS, "pairs": PROMPTS * len(FAULTS), "machine": machine(), "runs": rows}
    with few_threads():
        for seed in options.seeds:
            for form, kind in RUNS:
                if (seed, form, kind) in made:
                    continue
                rows.append(run(options.folder / f"seed-{seed}/sft/final", form, kind, seed))
                print(json.dumps(rows[-1]), flush=True)
                if options.json is not None:
                    write_row(options.json, report | {"printed": table(rows).splitlines()})
    print(table(rows))
    return 0 if passed(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
