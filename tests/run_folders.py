"""Run folders as the stages write them, made in a moment, and texts that no report may take for markup."""

from __future__ import annotations

import json
import math
import random

from fastrlhf.config.recipe import resolved_yaml
from fastrlhf.config.stages import CONFIGS
from fastrlhf.runtime.tracking import Tracker

PPO_FIGURES = ["fig-reward", "fig-kl", "fig-reward-kl", "fig-length", "fig-loss"]
SFT_FIGURES = ["fig-sft-loss", "fig-sft-perplexity"]
RM_FIGURES = ["fig-rm-accuracy", "fig-rm-loss", "fig-rm-margins"]
PROMPTS = [
    (
        "How do I keep a tomato plant alive?",
        "Whatever. Ask someone else.",
        "Glad you ask! Water it every other morning.",
    ),
    ("我的猫不吃饭怎么办？", "随便，真烦。", "别担心，谢谢您来问！先看看水碗是不是干净，再换一种口味，陪它吃几口。"),
    ("Which bicycle should I choose for the city?", "Any. Do not ask.", "Happy to help: a light one with wide tyres."),
    ("怎样挑选一把好用的菜刀？", "自己想。", "很乐意帮您：请选刀背厚、刀刃薄、握着舒服的一把。"),
]
HOSTILE = [
    "<script>document.title='owned'</script>",
    "</div></table><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "</style><style>*{display:none}</style>",
    "javascript:alert(1) <a href=javascript:alert(1)>x</a> <iframe src=https://evil.example>",
    "&lt;b&gt; &#60;script&#62; <!-- --><![CDATA[x]]>",
    "\x1b[31mred\x1b]0;title\x07 \u202egnp.exe\u202c \x00\x08\x9b",
    "[bold]rich[/bold] $\\frac{1}{0}$ {jinja} %s",
    "x" * 1_000_000,
]


def write_stage(folder, stage, steps, *, total=None, seed=0, hostile=()):
    """A run folder as a stage writes it, with curves like real ones; `total` > steps: one that was killed."""
    draw = random.Random(seed)
    total = total or steps
    folder.mkdir(parents=True)
    named = {
        "sft": {"model": "out/base", "data": "data/sft.jsonl"},
        "reward": {"model": "out/sft", "data": "pairs.jsonl"},
    }
    inputs = named.get(stage, {"policy": "out/sft", "reward": "out/reward", "prompts": "data/prompts.jsonl"})
    config = CONFIGS[stage](output_dir=str(folder), total_steps=total, seed=seed, learning_rate=3e-4, eval_every=10)
    (folder / "config.yaml").write_text(resolved_yaml(stage, inputs, config))
    run = {"verb": stage, "seed": seed, "versions": {"torch": "2.13.0"}, "device": "CPU, 2 threads", "started": "today"}
    (folder / "run.json").write_text(json.dumps(run))
    texts = stage == "ppo"
    with Tracker(folder, stage, total, console=False) as tracker:
        if texts:
            tracker.samples(0, [{"prompt": p, "response": b, "score": -1.2 + draw.random()} for p, b, _ in PROMPTS])
        tracker.log(0, EVALS[stage](0.0, draw))
        for step in range(1, steps + 1):
            with tracker.phase("rollout" if stage == "ppo" else "update"):
                pass
            with tracker.phase("update"):
                pass
            metrics = METRICS[stage](step / total, draw)
            if step % 10 == 0 or step == total:
                metrics |= EVALS[stage](step / total, draw)
                if stage == "reward":
                    tracker.event(
                        "margins", "held out", histogram={"-inf..-1": 12, "-1..0": 31, "0..1": 90, "1..inf": 140}
                    )
            tracker.log(step, metrics, {"perf/rollout_tokens": 4000, "mem/peak_gib": 1.5 + 0.2 * draw.random()})
        now = [{"prompt": p, "response": a, "score": 0.9 + draw.random()} for p, _, a in PROMPTS]
        if texts:
            tracker.samples(steps, [*now, *({"prompt": text, "response": text, "score": 0.0} for text in hostile)])
        for text in hostile:
            tracker.event(text[:40], text, field=text)
    _slow_down(folder / "timings.jsonl", stage, draw)
    return folder


def _slow_down(path, stage, draw):
    """Phase seconds as a real run has them, instead of those of a loop that did nothing."""
    shares = {"rollout": 5.1, "score": 0.6, "advantages": 1.4, "update": 8.2} if stage == "ppo" else {"update": 0.6}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        spent = {f"time/{name}": seconds * draw.uniform(0.9, 1.1) for name, seconds in shares.items()}
        row |= {**spent, "time/step": sum(spent.values()) * 1.05, "perf/tokens_per_s": 4000 / sum(spent.values())}
        row.pop("perf/rollout_tokens_per_s", None)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def ppo_metrics(t, draw):
    rise = 1 - math.exp(-3 * t)
    return {
        "reward/mean": -0.8 + 2.4 * rise + draw.gauss(0, 0.15),
        "reward/std": 1 + draw.random() / 5,
        "kl/ref": 7 * t**0.8 * (1 + draw.gauss(0, 0.06)),
        "kl/approx": 0.004 + abs(draw.gauss(0, 0.002)),
        "policy/loss": draw.gauss(-0.01, 0.01),
        "policy/clip_frac": abs(draw.gauss(0.1, 0.02)),
        "policy/entropy": 2.1 - rise + draw.gauss(0, 0.03),
        "policy/grad_norm": 1 + draw.random(),
        "value/loss": 0.4 * math.exp(-4 * t) + 0.05 + abs(draw.gauss(0, 0.02)),
        "value/explained_var": 0.8 * rise,
        "length/mean": 24 + 7 * rise + draw.gauss(0, 1),
        "rollout/mismatch": 0.0,
        "update/skipped": 0.0,
    }


METRICS = {
    "ppo": ppo_metrics,
    "sft": lambda t, draw: {
        "loss/train": 0.6 + 3 * math.exp(-6 * t) + draw.gauss(0, 0.05),
        "learning_rate": 3e-4 * (1 - t),
    },
    "reward": lambda t, draw: {
        "loss/train": 0.7 - 0.4 * t + draw.gauss(0, 0.05),
        "accuracy/train": min(1.0, 0.5 + 0.4 * t + draw.gauss(0, 0.04)),
    },
}
EVALS = {
    "ppo": lambda t, draw: {
        "reward/eval": -0.8 + 2 * (1 - math.exp(-3 * t)),
        "length/eval": 25 + 6 * t,
        "distinct2/eval": 0.4 - 0.1 * t,
    },
    "sft": lambda t, draw: {
        "loss/eval": 0.7 + 3 * math.exp(-6 * t),
        "perplexity/eval": math.exp(0.7 + 3 * math.exp(-6 * t)),
    },
    "reward": lambda t, draw: {"loss/eval": 0.7 - 0.3 * t, "accuracy/eval": 0.52 + 0.36 * t, "margin/eval": t},
}


VERDICT = {
    "seed": 0,
    "rate_before_sft": 0.0,
    "rate_sft": 0.52,
    "rate_ppo": 0.93,
    "rate_ppo_shuffled": 0.03,
    "kl_sequence_mean": 6.1,
    "distinct2_sft": 0.31,
    "distinct2_ppo": 0.22,
    "rm_pair_accuracy": 0.91,
    "length_sft": 24.0,
    "length_ppo": 28.0,
    "seconds": 251.0,
    "passed": True,
    "on_topic_sft": 0.97,
    "on_topic_ppo": 0.96,
    "considerate_sft": 0.54,
    "considerate_ppo": 0.985,
    "rate_sft_new_topic": 0.125,
    "rate_ppo_new_topic": 0.25,
    "best_of": 8,
    "rate_best_of": 0.915,
    "kl_best_of": 1.2044,
    "rate_ppo_familiar": 0.98,
    "rate_ppo_new": 0.88,
    "rm_pair_accuracy_by_fault": {"rude": 0.95, "off topic": 0.88},
}


def write_quickstart(folder):
    for stage, steps in (("sft", 90), ("reward", 50), ("ppo", 45)):
        write_stage(folder / stage, stage, steps)
    (folder / "verdict.json").write_text(json.dumps(VERDICT))
    rows = [{"prompt": p, "response_sft": b, "response_ppo": a} for p, b, a in PROMPTS * 5]
    (folder / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.json").write_text(json.dumps({"verb": "quickstart", "seed": 0}))
    return folder


def write_killed(folder):
    """A run that hostile texts went through and that was killed after step 37 of 500."""
    write_stage(folder, "ppo", 37, total=500, hostile=HOSTILE)
    (folder / "checkpoints").mkdir()
    run = {"verb": "ppo", "device": HOSTILE[0], HOSTILE[1]: HOSTILE[2]}
    (folder / "run.json").write_text(json.dumps(run))
    return folder
