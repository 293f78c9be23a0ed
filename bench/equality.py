"""Whether several ranks compute what one process computes, in every form that shards: five steps in fp32, compared.

    python -m bench.equality [--json FILE] [--ranks 2 3] [--parallel zero fsdp] [--forms separate ...]

Each form runs once in one process, and for each number of ranks (gloo, one thread each) with each `parallel`. Batches
divide by no number of ranks here, and a mini-batch takes several micro-batches. Compared are the sampled tokens, every
loss and every gradient norm of every step, and the change of all trained weights over the run. Exit code 1 where a
token differs or a difference is above its bar.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.gpu_kernels import about
from bench.models import classifier_of, policy_of, prompts_of, tokenizer_of
from bench.processes import torchrun
from fastrlhf import PPOConfig, PPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from fastrlhf.parallel import sharding
from fastrlhf.runtime import distributed
from fastrlhf.trainer import Trainer

STEPS = 5
BARS = {"losses": 1e-5, "gradient norms": 1e-5, "weights": 1e-3}
FLOOR = 0.5  # differences are relative to the number, or to this where the number is less: a loss may be 0
COMMON = {"total_steps": STEPS, "eval_every": 0, "save_every": 0}
PPO = {
    **COMMON, "rollout_batch_size": 10, "samples_per_prompt": 2, "mini_batch_size": 5, "max_new_tokens": 12,
    "learning_rate": 1e-4, "critic_learning_rate": 1e-4, "micro_batch_tokens": 60,
}  # fmt: skip
SUPERVISED = {**COMMON, "mini_batch_size": 7, "learning_rate": 1e-4, "micro_batch_tokens": 60}
FORMS: dict[str, dict[str, Any]] = {
    "separate": {},
    "shared_trunk": {"critic": "shared_trunk"},
    "lora": {"lora": 8, "learning_rate": 1e-3, "critic_learning_rate": 1e-3},
    "sft": {},
    "reward": {},
}


def trainer_of(form: str, parallel: str) -> Trainer:
    policy = policy_of("tiny", torch.device("cpu"), torch.float32)
    vocabulary = policy.config.vocab_size - 1  # the padding id behind it has an embedding too
    tokenizer, prompts = tokenizer_of(vocabulary), prompts_of(vocabulary, 20, 16)
    if form == "sft":
        config = SFTConfig(**SUPERVISED, parallel=parallel)
        rows = [{"prompt": p, "response": " ".join(q.split()[: 3 + i % 7])} for i, (p, q) in pairs(prompts)]
        return SFTTrainer(config, model=policy, tokenizer=tokenizer, data=rows)
    if form == "reward":
        config = RewardConfig(**SUPERVISED, parallel=parallel)
        rows = [
            {"prompt": p, "chosen": " ".join(q.split()[: 3 + i % 7]), "rejected": " ".join(q.split()[2 : 4 + i % 5])}
            for i, (p, q) in pairs(prompts)
        ]
        return RewardTrainer(config, model=policy, tokenizer=tokenizer, data=rows)
    config = PPOConfig(**{**PPO, **FORMS[form]}, parallel=parallel)
    return PPOTrainer(config, policy=policy, tokenizer=tokenizer, reward=classifier_of(policy, 1), prompts=prompts)


def pairs(prompts: list[str]) -> enumerate[tuple[str, str]]:
    """Each prompt with the next one, of whose words replies are made."""
    return enumerate(zip(prompts, prompts[1:] + prompts[:1], strict=True))


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    """Everything that is trained, whole in the lead, by role and name."""
    found = {}
    for role, part in trainer.trained().items():
        named = part.parts or dict(part.model.named_parameters())
        for name, tensor in named.items():
            found[f"{role}.{name}"] = sharding.whole_tensor(tensor).clone()
    return found


def run_rank(runs: list[str], folder: Path) -> None:
    """runs: FORM:PARALLEL of each. The lead writes FORM-PARALLEL-RANKS.json and .safetensors."""
    torch.set_num_threads(1)
    for run in runs:
        form, _, parallel = run.partition(":")
        trainer = trainer_of(form, parallel)
        before, steps = weights_of(trainer), []
        for step in trainer:
            rollout = getattr(step, "rollout", None)
            steps.append({"tokens": rollout and rollout.response_ids, "metrics": step.metrics})
        after = weights_of(trainer)
        if distributed.is_lead():
            stem = folder / f"{form}-{parallel}-{distributed.size()}"
            stem.with_suffix(".json").write_text(json.dumps(steps))
            save_file({name: after[name] - before[name] for name in after}, stem.with_suffix(".safetensors"))
    distributed.wait_for_all()


def differences(
    one: list[dict[str, Any]], many: list[dict[str, Any]], moved: dict[str, Tensor], other: dict[str, Tensor]
) -> dict[str, Any]:
    """Of the steps of two runs and what they added to their weights: whether they sampled the same tokens, and by how
    much they differ at most. weights: the 2-norm of the difference over that of what was added."""
    found: dict[str, Any] = {
        "steps": min(len(one), len(many)),
        "tokens": [step["tokens"] for step in one] == [step["tokens"] for step in many],
    }
    for what, part in (("losses", "loss"), ("gradient norms", "grad_norm")):
        names = [name for name in one[0]["metrics"] if part in name]
        found[what] = max(
            (_apart(a["metrics"][name], b["metrics"][name]) for a, b in zip(one, many) for name in names),
            default=math.inf,  # nothing was compared
        )
    gap = sum(float((moved[name] - other[name]).double().square().sum()) for name in moved)
    size = sum(float(tensor.double().square().sum()) for tensor in moved.values())
    found["weights"] = math.sqrt(gap / size) if size else math.inf
    return found


def _apart(a: float, b: float) -> float:
    if math.isnan(a) and math.isnan(b):  # a figure that neither run has
        return 0.0
    return abs(a - b) / max(FLOOR, abs(a)) if math.isfinite(a) and math.isfinite(b) else math.inf


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """What is not as promised, a sentence each."""
    said = []
    for row in rows:
        where = f"{row['form']}, {row['parallel']}, {row['ranks']} ranks"
        if row["steps"] != STEPS:
            said.append(f"{where}: {row['steps']} steps were made")
        if not row["tokens"]:
            said.append(f"{where}: other tokens than one process")
        for name, bar in BARS.items():
            if not row[name] <= bar:
                said.append(f"{where}: {name} differ by {row[name]:.1e}, more than {bar:.0e}")
    return said


def worst(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {name: max(row[name] for row in rows) for name in BARS}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.equality", description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--parallel", nargs="+", choices=["ddp", "zero", "fsdp"], default=["zero", "fsdp"])
    parser.add_argument("--forms", nargs="+", choices=[*FORMS], default=[*FORMS])
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)  # of a rank: beside it the runs are written
    parser.add_argument("--runs", nargs="+", default=[], help=argparse.SUPPRESS)  # of a rank
    options = parser.parse_args()
    if options.row is not None:
        run_rank(options.runs, options.row.parent)
        if distributed.is_lead():
            options.row.write_text("{}")
        return 0
    machine = about(torch.device("cpu")) | {"cores": os.cpu_count()}
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        torchrun(1, "bench.equality", ["--runs", *(f"{form}:ddp" for form in options.forms)], folder / "row.json")
        for ranks in options.ranks:
            runs = [f"{form}:{parallel}" for parallel in options.parallel for form in options.forms]
            torchrun(ranks, "bench.equality", ["--runs", *runs], folder / "row.json")
            for form, _, parallel in (run.partition(":") for run in runs):
                stems = (folder / f"{form}-ddp-1", folder / f"{form}-{parallel}-{ranks}")
                steps = [json.loads(stem.with_suffix(".json").read_text()) for stem in stems]
                moved = [load_file(stem.with_suffix(".safetensors")) for stem in stems]
                rows.append({"form": form, "parallel": parallel, "ranks": ranks} | differences(*steps, *moved))
                print(rows[-1], flush=True)
    said = failures(rows)
    print(*said, f"worst: {worst(rows)}", sep="\n")
    if options.json:
        figures = {"machine": machine, "steps": STEPS, "bars": BARS, "worst": worst(rows)}
        figures |= {"worst in a million": {name: 1e6 * value for name, value in worst(rows).items()}, "rows": rows}
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
