"""A reward model from each kind of feedback alone, beside one from all of them: what is a record of a kind worth?

From the quickstart's SFT model of a seed, with the quickstart's reward settings but for STEPS: every reward model takes
as many steps of as many records. Measured on the clean held-out pairs, by the fault of the worse reply.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from fastrlhf.config.stages import RewardConfig
from fastrlhf.quickstart import verdict
from fastrlhf.quickstart.content import shipped
from fastrlhf.quickstart.run import inputs
from fastrlhf.quickstart.settings import Settings
from fastrlhf.reward_model import RewardTrainer
from fastrlhf.trainer import run_stage

COLUMN = {"pair": "chosen", "ranking": "ranking", "score": "score", "edit": "edited"}  # that tells a row of the kind
KINDS = ("all", *COLUMN)
STEPS = 300


def rows_of(kind: str) -> list[dict[str, Any]]:
    """The shipped rows of feedback of this kind."""
    return [row for row in shipped("feedback") if kind == "all" or COLUMN[kind] in row]


def config_of(kind: str, models: Settings) -> RewardConfig:
    """What the quickstart trains its reward model with, for STEPS in a folder beside the models."""
    length = {"total_steps": STEPS, "epochs": 1}  # steps alone say how long
    place = {"output_dir": str(models.output_dir / f"reward-{kind}"), "overwrite": True, "save_every": 0}
    return models.stages["reward"].replace(**length, **place, resume=False)


def run(kind: str, models: Settings) -> dict[str, Any]:
    """Train in a folder beside the models and rank the held-out pairs -> figures."""
    config, rows = config_of(kind, models), rows_of(kind)
    folder = Path(config.output_dir)
    named = inputs("reward", models.output_dir) | {"data": rows}
    began = time.monotonic()
    if run_stage(RewardTrainer, named, config):
        raise SystemExit("interrupted")
    seconds = time.monotonic() - began
    right = verdict.pair_accuracy(folder / "final", shipped("heldout_pairs"))
    return {
        "kind": kind,
        "seed": models.seed,
        "rows": len(rows),
        "steps": STEPS,
        "seconds": round(seconds, 1),
        "pairs_right": right.pop("all"),
        "pairs_right_by_fault": right,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: a line a kind, means over the seeds, of all pairs each seed too."""
    seeds, faults = sorted({row["seed"] for row in rows}), list(rows[0]["pairs_right_by_fault"])
    head = ["feedback", "rows", f"clean pairs ranked right (seeds {', '.join(map(str, seeds))})", *faults]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        some = sorted((row for row in rows if row["kind"] == kind), key=lambda row: row["seed"])
        each = ", ".join(f"{row['pairs_right']:.3f}" for row in some)
        cells = [kind, str(some[0]["rows"]), f"{fmean(row['pairs_right'] for row in some):.3f} ({each})"]
        cells += [f"{fmean(row['pairs_right_by_fault'][fault] for row in some):.2f}" for fault in faults]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
