"""What wrong labels cost a reward model, and what preference strength wins back (Wang et al. 2024, Secrets of RLHF II).

    python -m bench.denoise RUN [--seeds 0 1 2] [--json bench/results/denoise_cpu.json]
    python -m bench.denoise --print bench/results/denoise_cpu.json    # the table again

A fifth of the quickstart's feedback, drawn anew by each seed, is turned round: pairs, edits and rankings of all kinds,
scores mirrored. From the SFT model of a seed, in RUN/seed-N/sft/final (`python -m bench.verdict --work RUN` makes
them), a reward model is trained at equal steps on the feedback as it is (clean), on the turned one (noisy), and on the
turned one after denoising (denoised). Denoising knows nothing of what was turned: `fastrlhf reward --cross-fit` gives
each judgement its strength by an ensemble that has learnt the other half, and `fastrlhf reward` does with the weakest
what RECIPE says. Accuracy: of clean held-out pairs on prompts that nothing was trained on. The share won back is
(denoised - noisy) / (clean - noisy) of the means over seeds; its 90 % interval is that of resampled held-out prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

from bench.kernels import machine
from bench.processes import begun, write_row
from bench.quickstart_data.generate import FAULTS, Cell, good_reply, spoil
from fastrlhf.config.stages import RewardConfig
from fastrlhf.data.feedback import Feedback, parse_feedback
from fastrlhf.eval.cross_fit import cross_fitted
from fastrlhf.inference import write_rows
from fastrlhf.quickstart.content import shipped
from fastrlhf.quickstart.judge import parse_prompt
from fastrlhf.quickstart.run import few_threads
from fastrlhf.reward.strength import row_of, turned, weakest_first
from fastrlhf.reward_model import RewardTrainer

ARMS = ("clean", "noisy", "denoised")
SHARE = 0.2  # of the judgements that are turned round
PROMPTS = 192  # held out; a pair for each of the seven faults
RANGE = (1.0, 5.0)
STEPS, STRENGTH_STEPS, FOLDS, HEADS = 300, 1000, 2, 5
# About a third of the weakest fifth are turned (a trial with seed 3): to flip them would make more wrong labels than it
# mends, to leave them out costs records that these steps do not reach anyway.
RECIPE = {"weakest": "drop", "weakest_share": 0.2}
RESAMPLES, LEVEL = 2000, 0.9
ENOUGH = 0.5  # bar: of the cost, won back


def judgements(seed: int) -> tuple[list[Feedback], list[Feedback], list[bool]]:
    """The quickstart's feedback as it is, and with SHARE of it turned round; which were."""
    random = Random(f"bench.denoise {seed}")
    rows = [row for row in shipped("feedback") if row.get("edited") is None or row["edited"] != row["response"]]
    clean = [parse_feedback(row, f"feedback:{number}", RANGE) for number, row in enumerate(rows, 1)]
    wrong = [random.random() < SHARE for _ in clean]
    return clean, [opposite(feedback) if turn else feedback for feedback, turn in zip(clean, wrong)], wrong


def opposite(feedback: Feedback) -> Feedback:
    """The judgement turned round; a score of one reply is mirrored in the middle of the scale."""
    if feedback.scores is not None and len(feedback.scores) == 1:
        return parse_feedback(
            {**row_of(feedback, RANGE), "scores": [sum(RANGE) - row_of(feedback, RANGE)["scores"][0]]}, feedback.where
        )
    return turned(feedback)


def held_out(prompts: int) -> list[dict[str, Any]]:
    """Clean pairs on the quickstart's held-out prompts, seven to a prompt: one for each fault that a reply can have."""
    random, rows = Random("bench.denoise held out"), []
    chosen = [row["prompt"] for row in shipped("heldout_prompts")]
    random.shuffle(chosen)
    for prompt in chosen[:prompts]:
        cell = Cell(*parse_prompt(prompt[-1]["content"]))
        for fault in FAULTS:
            better, worse = good_reply(cell, random), spoil(good_reply(cell, random), cell, fault, random)
            rows.append({"prompt": prompt, "chosen": better.text, "rejected": worse.text})
    return rows


def config(seed: int, steps: int, **fields: Any) -> RewardConfig:
    """The quickstart's settings of a reward model, at so many steps."""
    sizes = {"total_steps": steps, "mini_batch_size": 8, "max_tokens": 128, "micro_batch_tokens": 4096}
    rates = {"learning_rate": 3e-4, "warmup_steps": min(20, steps), "dtype": "fp32"}
    return RewardConfig(**sizes, **rates, eval_every=0, eval_fraction=0.0, seed=seed, **fields)


def learnt(model: Path, records: Sequence[Feedback], seed: int, steps: int, prompts: int, **fields: Any) -> list[int]:
    """Train on these judgements -> of each held-out prompt, how many of its pairs are in the right order."""
    rows = [row_of(feedback, RANGE) for feedback in records]
    trainer = RewardTrainer(config(seed, steps, **fields), model=str(model), data=rows, eval_data=held_out(prompts))
    trainer.train()
    right = [bool(better > worse) for better, worse in trainer._held_out_scores().split(2)]
    return [sum(right[i : i + len(FAULTS)]) for i in range(0, len(right), len(FAULTS))]


def found(records: Sequence[Feedback], wrong: dict[str, bool]) -> dict[str, float]:
    """How well strengths tell what was turned: of the weakest share, and of all below 0, the part that was turned; the
    part of all turned ones among the weakest."""
    known = [feedback for feedback in weakest_first(records) if feedback.strength is not None]
    marks = [wrong[key(feedback)] for feedback in known]
    weakest = marks[: max(1, round(RECIPE["weakest_share"] * len(marks)))]
    twentieths = [marks[len(marks) * i // 20 : len(marks) * (i + 1) // 20] for i in range(20)]
    below = [mark for feedback, mark in zip(known, marks) if feedback.strength < 0]
    return {
        "with_strength": len(known),
        "turned_of_weakest": fmean(weakest),
        "turned_of_below_0": fmean(below) if below else 0.0,
        "turned_found": sum(weakest) / max(1, sum(marks)),
        "turned_by_twentieth": [fmean(part) for part in twentieths if part],
    }


def key(feedback: Feedback) -> str:
    """What tells a judgement from others, whichever way round it is."""
    return repr((feedback.prompt, sorted(feedback.responses)))


def strengths(
    model: Path, records: Sequence[Feedback], seed: int, steps: int, kept: Path | None, say: Any
) -> list[Feedback]:
    """The judgements with cross-fitted strengths; kept: the folder where they are read again."""
    file = None if kept is None else kept / f"seed-{seed}-{steps}.jsonl"
    if file is not None and file.exists():
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return [parse_feedback(row, f"{file}:{number}", RANGE) for number, row in enumerate(rows, 1)]
    measured = weakest_first(cross_fitted(records, FOLDS, config(seed, steps, ensemble=HEADS), say, model=str(model)))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_rows(str(file), [row_of(feedback, RANGE) for feedback in measured])
    return measured


def run(
    model: Path, seed: int, arm: str, *, steps: int, strength_steps: int, prompts: int, kept: Path | None, say: Any
) -> dict[str, Any]:
    """One of ARMS of a seed: pairs in the right order by held-out prompt, what strengths found, seconds."""
    began, fields, strength = time.monotonic(), {}, {}
    clean, records, wrong = judgements(seed)
    if arm == "clean":
        records = clean
    if arm == "denoised":
        marks = {key(feedback): turn for feedback, turn in zip(records, wrong)}
        records, fields = strengths(model, records, seed, strength_steps, kept, say), RECIPE
        strength = {"strength": found(records, marks)}
    right = learnt(model, records, seed, steps, prompts, **fields)
    about = {"seed": seed, "arm": arm, "turned": 0 if arm == "clean" else sum(wrong), "of": len(wrong)}
    return {**about, **strength, "right": right, "seconds": round(time.monotonic() - began, 1)}


def accuracies(runs: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """By arm, of each seed."""
    return {arm: [sum(r["right"]) / (len(FAULTS) * len(r["right"])) for r in runs if r["arm"] == arm] for arm in ARMS}


def won_back(runs: Sequence[dict[str, Any]]) -> dict[str, tuple[float, float, float]]:
    """cost: clean less noisy, gain: denoised less noisy, share: gain / cost, each (mean, low, high): means over seeds
    and pairs, and the interval of LEVEL over resampled held-out prompts, the same ones for all seeds and arms."""
    prompts, seeds = len(runs[0]["right"]), len({r["seed"] for r in runs})
    totals = {arm: [sum(r["right"][i] for r in runs if r["arm"] == arm) for i in range(prompts)] for arm in ARMS}
    random, pairs = Random("bench.denoise resamples"), seeds * len(FAULTS) * prompts

    def figures(drawn: Sequence[int]) -> tuple[float, float, float]:
        clean, noisy, denoised = (sum(totals[arm][i] for i in drawn) / pairs for arm in ARMS)
        cost, gain = clean - noisy, denoised - noisy
        return cost, gain, gain / cost if cost else 0.0

    drawn = [figures(random.choices(range(prompts), k=prompts)) for _ in range(RESAMPLES)]
    at = round((1 - LEVEL) / 2 * RESAMPLES)
    return {
        name: (mean, sorted(values)[at], sorted(values)[-1 - at])
        for name, mean, values in zip(("cost", "gain", "share"), figures(range(prompts)), zip(*drawn))
    }


def table(runs: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: accuracies in the order of the seeds, what strengths found, and what the bar says."""
    found = accuracies(runs)
    lines = ["| labels | accuracy, by seed | mean |", "|---|---|---|"]
    lines += [f"| {arm} | {' / '.join(f'{x:.3f}' for x in found[arm])} | {fmean(found[arm]):.3f} |" for arm in ARMS]
    for name, text in (
        ("turned_of_weakest", "turned, of the weakest fifth"),
        ("turned_found", "found there of all turned"),
    ):
        lines.append(f"\n{text}: " + " / ".join(f"{r['strength'][name]:.2f}" for r in runs if "strength" in r))
    (cost, *cost_in), (gain, *gain_in), (share, *share_in) = won_back(runs).values()
    lines.append(
        f"\n20 % turned labels cost {cost:.3f} ({cost_in[0]:.3f} to {cost_in[1]:.3f}); denoising gains {gain:+.3f} "
        f"({gain_in[0]:+.3f} to {gain_in[1]:+.3f}), {share:.0%} of it ({share_in[0]:.0%} to {share_in[1]:.0%}; bar "
        f"{ENOUGH:.0%})"
    )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command above -> its exit code, 1 where less than ENOUGH of the cost is won back."""
    parser = argparse.ArgumentParser(prog="python -m bench.denoise", description=__doc__.split("\n")[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of each of the three models")
    parser.add_argument("--strength-steps", type=int, default=STRENGTH_STEPS, help="of each ensemble of --cross-fit")
    parser.add_argument("--kept", type=Path, metavar="FOLDER", help="keep strengths here, and read them again")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="held-out prompts, seven pairs each")
    options, runs = begun(parser, arguments, table)
    if runs is None:
        return 0
    sizes = {"steps": options.steps, "strength_steps": options.strength_steps, "prompts": options.prompts}
    report = {**sizes, "folds": FOLDS, "heads": HEADS, "recipe": RECIPE, "machine": machine(), "runs": runs}
    with few_threads():
        for seed, arm in product(options.seeds, options.arms):
            if (seed, arm) not in {(r["seed"], r["arm"]) for r in runs}:
                runs.append(
                    run(options.folder / f"seed-{seed}/sft/final", seed, arm, **sizes, kept=options.kept, say=print)
                )
                if options.json is not None:
                    write_row(options.json, report)
    if {(r["seed"], r["arm"]) for r in runs} != set(product({r["seed"] for r in runs}, ARMS)):
        print("not all arms of all seeds are there yet")
        return 1
    print(table(runs))
    return 0 if won_back(runs)["share"][0] >= ENOUGH else 1


if __name__ == "__main__":
    sys.exit(main())
