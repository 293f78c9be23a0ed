"""`fastrlhf plan` against real runs: the same counter of live tensors, with weights and without.

    python -m bench.plan [--json FILE] [CELL ...]        small models on this machine's CPU, a second or two a cell
    python -m bench.plan --shape smollm2 ...             the shape of SmolLM2-135M with random weights, 8 GiB, minutes
    python -m bench.plan --seconds ...                   instead: how long a step takes, beside what the plan computes

A cell is a stage and how it is run. Each trains two steps on rows of the greatest length; the second, whose optimizer
has its moments, is compared phase by phase with the plan made of the model's config.json. Bytes of tensors: what a
kernel takes inside and gives back is in neither.

Seconds are medians of three steps behind a first; the plan's are those of `fastrlhf plan --calibrate` in the same run.
They leave out what Python does between operators, so the ratio says how much of a step the plan knows.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from bench.kernels import machine
from fastrlhf import PPOTrainer, RewardTrainer, SFTTrainer
from fastrlhf.config.base import StageConfig
from fastrlhf.config.stages import CONFIGS
from fastrlhf.plan.counter import LiveBytes
from fastrlhf.plan.models import WORD, stand_in_tokenizer
from fastrlhf.plan.phases import Measured, Measurer, Target
from fastrlhf.plan.speed import Profile, calibrated, shares

LIMIT = 0.05
SHAPE = {
    "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 0,
    "pad_token_id": 0,
}  # fmt: skip
SMOLLM2 = {
    **SHAPE, "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
SHAPES = {"tiny": SHAPE, "smollm2": SMOLLM2}
STEPS = 4  # of --seconds; the first is no part of the median
COMMON = {"total_steps": 2, "mini_batch_size": 8, "micro_batch_tokens": 512, "eval_every": 0, "dtype": "fp32"}
SUPERVISED = {**COMMON, "max_tokens": 128, "prompt_format": "raw"}
PPO = {
    **COMMON, "rollout_batch_size": 16, "max_prompt_tokens": 96, "max_new_tokens": 32, "ppo_epochs": 1,
    "prompt_format": "raw",
}  # fmt: skip
FORMS: dict[str, dict[str, dict[str, Any]]] = {
    "sft": {"plain": {}, "checkpointing": {"gradient_checkpointing": True}, "packing": {"packing": True},
            "lora": {"lora": 8}},
    "reward": {"plain": {}, "checkpointing": {"gradient_checkpointing": True}, "lora": {"lora": 8}},
    "ppo": {"separate": {}, "shared_trunk": {"critic": "shared_trunk"}, "lora": {"lora": 8},
            "packing": {"packing": True}, "checkpointing": {"gradient_checkpointing": True},
            "rollout_dtype": {"rollout_dtype": "bf16"}},
}  # fmt: skip
CELLS = [f"{stage}/{form}" for stage, forms in FORMS.items() for form in forms]


def config_of(cell: str) -> StageConfig:
    stage, form = cell.split("/")
    fields = PPO if stage == "ppo" else SUPERVISED
    if stage == "sft":
        fields = {**fields, "format": "text"}
    if stage == "reward":
        fields = {**fields, "eval_fraction": 0.0}
    return CONFIGS[stage](**{**fields, **FORMS[stage][form]})


def length_reward(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(r)) for r in responses]


def words(count: int) -> str:
    return " ".join([WORD] * count)


def trainer_of(config: StageConfig, folder: str) -> Any:
    """A real trainer with random weights, on rows of the greatest length."""
    torch.manual_seed(0)
    shape = LlamaConfig.from_pretrained(folder, num_labels=1, trust_remote_code=False)
    auto = AutoModelForSequenceClassification if config.stage == "reward" else AutoModelForCausalLM
    model = auto.from_config(shape, attn_implementation="sdpa")
    rows = 16
    tokenizer = stand_in_tokenizer(rows)
    if config.stage == "sft":
        data = [{"text": words(config.max_tokens - 1)}] * rows
        return SFTTrainer(config, model=model, tokenizer=tokenizer, data=data)
    if config.stage == "reward":
        half = config.max_tokens // 2
        pair = {"prompt": words(half), "chosen": words(half - 1), "rejected": words(half - 2)}
        return RewardTrainer(config, model=model, tokenizer=tokenizer, data=[pair] * rows)
    prompts = [f"w{i} {words(config.max_prompt_tokens - 1)}" for i in range(rows)]
    return PPOTrainer(config, policy=model, tokenizer=tokenizer, reward=length_reward, prompts=prompts)


def real_peaks(config: StageConfig, folder: str) -> dict[str, int]:
    """The peak of each phase of the second step."""
    peaks: dict[str, int] = {}
    with LiveBytes() as live:
        trainer = trainer_of(config, folder)
        whole = trainer.tracker.phase

        @contextmanager
        def phase(name: str) -> Iterator[None]:
            with live.phase(), whole(name):
                yield
            peaks[name] = live.peak

        trainer.tracker.phase = phase
        for _ in range(2):
            trainer.step()
    return peaks


def planned(config: StageConfig, folder: str) -> Measured:
    """The plan, for this machine's CPU."""
    role = "policy" if config.stage == "ppo" else "model"
    return Measurer(config.stage, {role: folder, "reward": "module:length_reward"}, Target())(config)


def planned_peaks(config: StageConfig, folder: str) -> dict[str, int]:
    """As `real_peaks` has them, of the plan."""
    phases = planned(config, folder).phases
    peaks = {"advantages" if name == "experience" else name: phase.peak for name, phase in phases.items()}
    updates = [name for name in peaks if name.startswith("update")]
    return {**{n: p for n, p in peaks.items() if n not in updates}, "update": max(peaks[name] for name in updates)}


def compared(cell: str, folder: str) -> dict[str, Any]:
    """-> planned and real bytes by phase, and how far the plan of the whole step is off."""
    config = config_of(cell)
    real, planned = real_peaks(config, folder), planned_peaks(config, folder)
    off = {name: planned[name] / real[name] - 1 for name in real}
    whole = max(planned.values()) / max(real.values()) - 1
    return {"real": real, "planned": planned, "off": off, "off_of_the_peak": whole}


def timed(cell: str, folder: str, profile: Profile) -> dict[str, Any]:
    """-> seconds of a real step, those that the plan computes for this machine, and their ratio."""
    config = config_of(cell).model_copy(update={"total_steps": STEPS})
    parts = shares(planned(config, folder), "fp32", profile)
    trainer, took = trainer_of(config, folder), []
    for _ in range(STEPS):
        began = time.perf_counter()
        trainer.step()
        took.append(time.perf_counter() - began)
    computed, real = sum(part.seconds for part in parts.values()), median(took[1:])
    launches = {name: part.launches for name, part in parts.items()}
    return {"real": real, "computed": computed, "known": computed / real, "launches": launches}


def model_folder(folder: str, shape: str = "tiny") -> str:
    LlamaConfig(**SHAPES[shape], architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return folder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cells", metavar="CELL", nargs="*", default=[], help=", ".join(CELLS))
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--seconds", action="store_true", help="how long a step takes, not what it holds")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    about = {"machine": machine(), "shape": SHAPES[args.shape]}
    if args.seconds:
        return seconds(args, about)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = model_folder(temporary, args.shape)
        print(f"{'cell':20} {'phase':12} {'planned MiB':>12} {'real MiB':>12} {'off':>8}")
        for cell in args.cells or CELLS:
            results[cell] = compared(cell, folder)
            for name, real in results[cell]["real"].items():
                row = (results[cell]["planned"][name] / 2**20, real / 2**20, results[cell]["off"][name])
                print(f"{cell:20} {name:12} {row[0]:12.2f} {row[1]:12.2f} {row[2]:+8.1%}", flush=True)
    worst = max(abs(result["off_of_the_peak"]) for result in results.values())
    print(f"worst of the peaks of {len(results)} cells: {worst:.1%} (limit {LIMIT:.0%})")
    if args.json:
        whole = {**about, "worst": worst, "cells": results}
        args.json.write_text(json.dumps(whole, indent=1) + "\n")
    return 0 if worst <= LIMIT else 1


def seconds(args: argparse.Namespace, about: dict[str, Any]) -> int:
    """Print and write what --seconds asks for -> exit code."""
    profile, results = calibrated(), {}
    print(f"{profile.name}: {profile.flops['fp32'] / 1e9:.3g} GFLOP/s, {profile.bandwidth / 1e9:.3g} GB/s")
    with tempfile.TemporaryDirectory() as temporary:
        folder = model_folder(temporary, args.shape)
        for cell in args.cells or CELLS:
            results[cell] = row = timed(cell, folder, profile)
            print(f"{cell:20} {row['real']:8.3f} s, computed {row['computed']:8.3f} s: {row['known']:.0%}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({**about, "profile": profile._asdict(), "cells": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
