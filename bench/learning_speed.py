"""Seconds of CPU to a given reward: PPO of fastrlhf beside TRL 1.12's PPOTrainer, on the quickstart's task.

    python -m bench.learning_speed RUN [--seeds 0 1 2] [--json bench/results/learning_speed_cpu.json]
    python -m bench.learning_speed --print bench/results/learning_speed_cpu.json    # the table again

From the SFT and reward model of a seed (RUN/seed-N/sft/final and reward/final: `python -m bench.verdict --work RUN`
makes them) every side trains the same policy on the same prompts, a process of its own with one thread, the sides in
the opposite order every second seed: STEPS steps of 64 replies of at most 64 tokens, two epochs of two mini-batches,
temperature, KL weight, clip ranges, rates and the penalty for an open end as in the quickstart (TASK below), the value
model begun from the reward model. `separate` is that; `shared_trunk` has that form's own critic instead. TRL has one
rate for policy and critic, so `separate` takes the policy's for both; TRL does not clip gradients.

Every EVERY steps the policy is saved, outside of the clock, which is the process's CPU time from the first step on.
Afterwards one judge asks every saved policy the same held-out prompts, with the same random numbers, and the reward
model scores the replies: the mean score against the seconds until that step. The given reward of a seed is the lowest
of what the sides end with (the mean of their last LAST points). A side has reached it at the first step at which the
mean of the LAST points is that high, so every side reaches it.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from bench.kernels import machine
from bench.peers import environment
from bench.ppo_step import PEER, PEER_PACKAGES, ChildFailed, Run, child
from bench.processes import begun, write_row
from fastrlhf import PPOConfig
from fastrlhf.quickstart import verdict
from fastrlhf.quickstart.content import DATA_DIR, shipped
from fastrlhf.quickstart.run import few_threads

SIDES = (PEER, "separate", "shared_trunk")
STEPS, EVERY, LAST = 26, 2, 3
PROMPTS = 144  # held out, every second of them
TASK = {  # names of fastrlhf's; what TRL calls them stands in learning_speed_trl.py
    "rollout_batch_size": 64,
    "mini_batch_size": 32,
    "ppo_epochs": 2,
    "max_prompt_tokens": 48,
    "max_new_tokens": 64,
    "temperature": 0.7,
    "kl_coef": 0.25,
    "gamma": 1.0,
    "gae_lambda": 0.95,
    "clip_range": 0.2,
    "clip_range_value": 0.2,
    "learning_rate": 2e-4,
    "critic_learning_rate": 2e-4,
    "vf_coef": 1.0,
    "missing_eos_penalty": 2.0,
}


def judged(folder: Path, reward: Path, reference: Path) -> dict[str, float]:
    """A saved policy's replies to the held-out prompts -> mean score, KL from the SFT model in nats a reply, tokens."""
    config = PPOConfig(temperature=TASK["temperature"], max_new_tokens=TASK["max_new_tokens"], seed=0)
    said = verdict.reply(folder, shipped("heldout_prompts")[::2], config, f"policy {folder.name}")
    return {
        "reward": scored(reward, [p + r for p, r in zip(said.prompt_ids, said.response_ids, strict=True)]),
        "kl": verdict.sequence_kl(said, reference, config),
        "length": said.length,
    }


@torch.no_grad()
def scored(reward: Path, rows: Sequence[Sequence[int]]) -> float:
    """The mean output of a reward model for token rows, by transformers alone."""
    how = {"trust_remote_code": False, "dtype": torch.float32}
    model = AutoModelForSequenceClassification.from_pretrained(reward, **how).eval()
    total = 0.0
    for start in range(0, len(rows), 32):
        batch = [torch.tensor(row) for row in rows[start : start + 32]]
        ids = torch.nn.utils.rnn.pad_sequence(batch, True, model.config.pad_token_id)
        lengths = torch.tensor([len(row) for row in batch])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        total += float(model(ids, attention_mask=mask.long()).logits.double().sum())
    return total / len(rows)


def run(side: str, seed: int, models: Path, start: Run) -> dict[str, Any]:
    """Train and judge one side -> its points: step, seconds until then, reward, kl, length. start: runs the process."""
    made = start(side)
    reward, reference = models / "reward/final", models / "sft/final"
    points = [{"step": 0, "seconds": 0.0, **judged(reference, reward, reference)}]
    for step, seconds in made["seconds"].items():
        points.append({"step": int(step), "seconds": seconds, **judged(Path(made["folder"], step), reward, reference)})
    return {"side": side, "seed": seed, "points": points, "versions": made["versions"]}


def means(points: Sequence[dict[str, float]]) -> list[float]:
    """The mean reward of each point and those before it, LAST in all; as many as there are at the beginning."""
    rewards = [point["reward"] for point in points]
    return [fmean(rewards[max(0, i + 1 - LAST) : i + 1]) for i in range(len(rewards))]


def reached(points: Sequence[dict[str, float]], given: float) -> dict[str, float] | None:
    """The first point at which the mean of the last LAST rewards is as high as the one that is given; None: nowhere."""
    return next((point for point, mean in zip(points, means(points), strict=True) if mean >= given), None)


def compared(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each seed that all sides ran: the given reward, and of each side what it took to it."""
    found = []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        by = {row["side"]: row["points"] for row in rows if row["seed"] == seed}
        if set(by) != set(SIDES):
            continue
        given = min(means(points)[-1] for points in by.values())
        found.append({"seed": seed, "given": given, **{side: reached(points, given) for side, points in by.items()}})
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, a line a side and seed, and the medians of the ratios."""
    lines = ["| seed | given reward | side | steps | seconds of CPU | KL, nats a reply | a step, seconds | ends at |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    every = compared(rows)
    for found in every:
        for side in SIDES:
            points = next(row["points"] for row in rows if (row["side"], row["seed"]) == (side, found["seed"]))
            at, last = found[side], points[-1]
            lines.append(
                f"| {found['seed']} | {found['given']:.2f} | {side} | {at['step']} | {at['seconds']:.1f} | "
                f"{at['kl']:.1f} | {last['seconds'] / last['step']:.2f} | {means(points)[-1]:.2f} |"
            )
    for side in SIDES[1:] if every else ():
        shares = [found[side]["seconds"] / found[PEER]["seconds"] for found in every]
        text = " / ".join(f"{share:.2f}" for share in shares)
        lines.append(f"\n{side}: {median(shares):.2f} of TRL's seconds to the same reward (seeds: {text})")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command above -> its exit code: 3 where TRL cannot be installed, 4 where a side fails."""
    parser = argparse.ArgumentParser(prog="python -m bench.learning_speed", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    options, rows = begun(parser, arguments, table)
    if rows is None:
        return 0
    try:
        pythons = {PEER: environment(*PEER_PACKAGES), "ours": Path(sys.executable)}
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 3
    known = {(row["side"], row["seed"]) for row in rows}
    for number, seed in enumerate(options.seeds):
        models = (options.folder / f"seed-{seed}").resolve()
        for side in SIDES if number % 2 == 0 else reversed(SIDES):
            if (side, seed) in known:
                continue
            with tempfile.TemporaryDirectory() as folder, few_threads():
                spec = {"device": "cpu", "task": TASK, "steps": options.steps, "every": EVERY, "seed": seed}
                spec |= {"models": str(models), "folder": folder, "prompts": str(DATA_DIR / "ppo_prompts.jsonl")}
                try:
                    rows.append(run(side, seed, models, child(pythons, spec, "bench.learning_speed")))
                except ChildFailed as error:
                    print(error, file=sys.stderr)
                    return 4
            if options.json is not None:
                report = {"machine": machine(), "task": TASK, "steps": options.steps, "prompts": PROMPTS, "runs": rows}
                write_row(options.json, report | {"compared": compared(rows), "printed": table(rows).splitlines()})
            print(f"{side}, seed {seed}: ends at {means(rows[-1]['points'])[-1]:.2f}", flush=True)
    print(table(rows))
    return 0 if all(math.isfinite(found["given"]) for found in compared(rows)) else 4


if __name__ == "__main__":
    sys.exit(main())
