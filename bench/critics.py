"""The two forms of PPO's critic on the quickstart's task, beside each other: does the cheaper one learn as well?

From one SFT and reward model the quickstart's own PPO is run with `critic = separate`, as it ships, and with
`critic = shared_trunk` at that form's own defaults, for each PPO seed. Both answer the same held-out prompts.

The interval of a difference is that of 10,000 bootstrap draws of runs (pairs of one seed) and, in each, of prompts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from fastrlhf.checkpoint.records import read_records
from fastrlhf.config.recipe import load_recipe
from fastrlhf.config.stages import PPOConfig
from fastrlhf.ppo import PPOTrainer
from fastrlhf.quickstart import verdict
from fastrlhf.quickstart.content import WORDINGS, shipped
from fastrlhf.quickstart.judge import about_what_was_asked, rule
from fastrlhf.quickstart.run import inputs
from fastrlhf.quickstart.settings import Settings
from fastrlhf.trainer import run_stage

FORMS: dict[str, dict[str, Any]] = {
    "separate": {},
    "shared_trunk": {"critic": "shared_trunk", "critic_learning_rate": "auto", "gae_lambda": "auto"},
}
DRAWS = 10_000
WORST_RULE, MOST_REWARD, MOST_KL = -0.05, 0.3, 1.2  # bars of the difference to the separate critic


def settings_of(form: str, models: Settings, folder: Path, seed: int) -> tuple[dict, PPOConfig]:
    """(inputs, config) of the quickstart's PPO with this critic and seed; nothing else of it is changed."""
    task = models.stages["ppo"]
    fields = {name: getattr(task, name) for name in task.model_fields_set} | FORMS[form]
    fields |= {"seed": seed, "output_dir": folder, "overwrite": True, "resume": False, "save_every": 0, "eval_every": 0}
    given = [f"{name}={value}" for name, value in (inputs("ppo", models.output_dir) | fields).items()]
    return load_recipe("ppo", None, given)


def run(form: str, models: Settings, sft: verdict.Replies, seed: int) -> dict[str, Any]:
    """Train and answer -> figures of verdict.json, `rule` for each prompt, reward of the last 5 steps, seconds."""
    folder = models.output_dir / f"critic-{form}-{seed}"
    named, config = settings_of(form, models, folder, seed)
    began = time.monotonic()
    if run_stage(PPOTrainer, named, config):
        raise SystemExit("interrupted")
    seconds = time.monotonic() - began
    after = verdict.reply(folder / "final", shipped("heldout_prompts"), config, "PPO model")
    kl = verdict.sequence_kl(after, models.output_dir / "sft/final", config)
    problems: list[str] = []
    last = [step for step in read_records(folder / "metrics.jsonl", problems) if "reward/mean" in step][-5:]
    if problems:
        raise SystemExit("\n".join(problems))
    return {
        "critic": form,
        "model_seed": models.seed,
        "ppo_seed": seed,
        "seconds": round(seconds, 1),
        "reward_last_5": sum(step["reward/mean"] for step in last) / len(last),
        "explained_var_last_5": sum(step["value/explained_var"] for step in last) / len(last),
        "rate_ppo": after.share(rule),
        "rate_sft": sft.share(rule),
        "kl_sequence_mean": kl,
        "on_topic_ppo": after.share(about_what_was_asked),
        "length_ppo": after.length,
        "rule": "".join(str(int(rule(*said))) for said in zip(after.prompts, after.texts)),  # 0 or 1 a prompt
    }


def interval(differences: Tensor, seed: int = 0) -> tuple[float, float, float]:
    """From differences [runs, prompts] -> their mean, and the 5 % and 95 % points of its bootstrap draws."""
    draw = torch.Generator().manual_seed(seed)
    runs, prompts = differences.shape
    chosen = torch.randint(runs, (DRAWS, runs), generator=draw)
    asked = torch.randint(prompts, (DRAWS, prompts), generator=draw)
    drawn = [  # how often each run and each prompt is in a draw
        torch.zeros(DRAWS, count, dtype=differences.dtype).scatter_add_(
            1, of, torch.ones_like(of, dtype=differences.dtype)
        )
        for count, of in ((runs, chosen), (prompts, asked))
    ]
    means = ((drawn[0] @ differences) * drawn[1]).sum(1) / (runs * prompts)
    low, high = torch.quantile(means, torch.tensor([0.05, 0.95], dtype=means.dtype)).tolist()  # the middle 90 %
    return float(differences.mean()), low, high


def compare(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The differences of shared_trunk to separate over all pairs of one seed, and whether they are within the bars.

    A run whose other half is missing is left out. SystemExit where no seed has both.
    """
    by = {(row["critic"], row["model_seed"], row["ppo_seed"]): row for row in rows}
    found = [(by.get(("shared_trunk", *seeds)), row) for (form, *seeds), row in by.items() if form == "separate"]
    pairs = [(shared, separate) for shared, separate in found if shared is not None]
    if not pairs:
        raise SystemExit("no seed has a run of both critics; nothing to compare")
    both = [[[int(held) for held in row["rule"]] for row in pair] for pair in pairs]
    rules = torch.tensor([[a - b for a, b in zip(*pair, strict=True)] for pair in both]).double()
    mean, low, high = interval(rules)
    reward = sum(x["reward_last_5"] - y["reward_last_5"] for x, y in pairs) / len(pairs)
    kl = sum(x["kl_sequence_mean"] for x, _ in pairs) / sum(y["kl_sequence_mean"] for _, y in pairs)
    time_share = sum(x["seconds"] for x, _ in pairs) / sum(y["seconds"] for _, y in pairs)
    return {
        "runs": len(pairs),
        "prompts": rules.shape[1],
        "rule_difference": mean,
        "rule_interval_90": [low, high],
        "reward_difference": reward,
        "kl_ratio": kl,
        "seconds_ratio": time_share,
        "passed": low >= WORST_RULE and abs(min(reward, 0.0)) <= MOST_REWARD and kl <= MOST_KL,
    }


def by_wording(rows: Sequence[dict[str, Any]]) -> str:
    """The mean rule rate of each form in frames that training has and in new wording, in a line."""
    wordings = [prompt["wording"] for prompt in shipped("heldout_prompts")]
    said = []
    for form in dict.fromkeys(row["critic"] for row in rows):
        held = [z for row in rows if row["critic"] == form for z in zip(row["rule"], wordings, strict=True)]
        means = (mean(float(kept) for kept, own in held if own == wording) for wording in WORDINGS)
        said.append(f"{form} " + " / ".join(f"{value:.3f}" for value in means))
    return f"rule rate, {' / '.join(WORDINGS)} wording: {', '.join(said)}"


def table(rows: Sequence[dict[str, Any]], difference: dict[str, Any]) -> str:
    """A Markdown table: a line a form and seed of the models, runs in the order of PPO's seeds."""
    names = {"rate_ppo": "rule rate", "kl_sequence_mean": "KL, nats a reply", "reward_last_5": "reward, last 5 steps"}
    names |= {"explained_var_last_5": "explained variance", "seconds": "seconds"}
    lines = ["| critic | models | " + " | ".join(names.values()) + " |", "|---|---|" + "---|" * len(names)]
    for form, seed in dict.fromkeys((row["critic"], row["model_seed"]) for row in rows):
        runs = [row for row in rows if (row["critic"], row["model_seed"]) == (form, seed)]
        cells = (" / ".join(f"{r[n]:.3g}" for r in runs) for n in names)
        lines.append(f"| {form} | seed {seed} | " + " | ".join(cells) + " |")
    low, high = difference["rule_interval_90"]
    rule_rate, reward = f"{difference['rule_difference']:+.3f}", f"{difference['reward_difference']:+.2f}"
    of = f"{difference['runs']} runs of {difference['prompts']} prompts"
    lines.append(
        f"\nshared_trunk less separate, {of}: rule rate {rule_rate} (90 % interval {low:+.3f} .. {high:+.3f}), "
        f"reward {reward}, KL {difference['kl_ratio']:.2f}x, time {difference['seconds_ratio']:.2f}x"
    )
    lines.append(f"\n{by_wording(rows)}")
    return "\n".join(lines)
