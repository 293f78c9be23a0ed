"""The quickstart itself: base model -> SFT -> reward model -> PPO -> verdict, each stage by its public trainer."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fastrlhf.checkpoint.atomic import replace_folder
from fastrlhf.checkpoint.run_folder import prepare_folder, write_run_json
from fastrlhf.config.errors import UserError
from fastrlhf.ppo import PPOTrainer
from fastrlhf.quickstart import verdict
from fastrlhf.quickstart.content import DATA_DIR, shipped, texts_of
from fastrlhf.quickstart.model import make_base
from fastrlhf.quickstart.settings import Settings, load_settings
from fastrlhf.report import build_report
from fastrlhf.reward_model import RewardTrainer
from fastrlhf.runtime import distributed
from fastrlhf.runtime.console import clean, duration
from fastrlhf.sft import SFTTrainer
from fastrlhf.trainer import run_stage

TRAINERS = {"sft": SFTTrainer, "reward": RewardTrainer, "ppo": PPOTrainer}
THREADS = 2  # more only get into each other's way with matrices this small
SHOWN = 4


def run(overrides: list[str], started: float) -> int:
    """Everything `fastrlhf quickstart` does -> 0 passed, 1 not passed, 75 interrupted. started: time.monotonic()."""
    settings = load_settings(overrides)
    if distributed.size() > 1:
        raise UserError("quickstart: runs in one process; start it without torchrun")
    out = settings.output_dir
    with few_threads():
        code = make(settings, TRAINERS)
        if code:
            return code
        replace_folder(lambda folder: shutil.copytree(out / "ppo/final", folder, dirs_exist_ok=True), out / "final")
        return _verdict(settings, started)


def make(settings: Settings, stages: Iterable[str]) -> int:
    """The base model, then these stages in order; what is there is kept -> 0, or 75 when one was interrupted."""
    out = settings.output_dir
    _open(settings)
    rows = shipped("sft")
    texts = [text for row in rows for text in texts_of(row)]
    if not (out / "base").is_dir():
        replace_folder(lambda folder: make_base(folder, texts, seed=settings.seed), out / "base")
    return next((code for code in (_stage(stage, settings) for stage in stages) if code), 0)


@contextmanager
def few_threads() -> Iterator[None]:
    """No more threads than matrices this small can use."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _open(settings: Settings) -> None:
    """The run folder: refused or emptied like a stage's, described by run.json and config.yaml."""
    out = settings.output_dir
    prepare_folder(out, overwrite=settings.overwrite, resume=settings.resume)
    if not (out / "run.json").exists():
        write_run_json(out, verb="quickstart", seed=settings.seed)
        (out / "config.yaml").write_text(settings.yaml(), encoding="utf-8")


def inputs(stage: str, out: Path) -> dict[str, str]:
    """The arguments of a stage's trainer: the data of the package, the models of the stages before."""
    data = {name: str(DATA_DIR / f"{name}.jsonl") for name in ("sft", "feedback", "ppo_prompts", "heldout_prompts")}
    return {
        "sft": {"model": str(out / "base"), "data": data["sft"]},
        "reward": {"model": str(out / "sft/final"), "data": data["feedback"]},
        "ppo": {
            "policy": str(out / "sft/final"),
            "reward": str(out / "reward/final"),
            "prompts": data["ppo_prompts"],
            "eval_prompts": data["heldout_prompts"],
        },
    }[stage]


def _stage(stage: str, settings: Settings) -> int:
    """Run one stage, or what is left of it; a finished one is not touched."""
    folder = settings.output_dir / stage
    if (folder / "final").is_dir():
        print(f"{stage}: done before, kept")
        return 0
    print(f"--- {stage} -> {folder}", flush=True)
    config = settings.stages[stage].replace(resume=(folder / "run.json").exists(), overwrite=False)
    return run_stage(TRAINERS[stage], inputs(stage, settings.output_dir), config)


def _verdict(settings: Settings, started: float) -> int:
    """Measure, write verdict.json, heldout.jsonl and report.html, print -> exit code."""
    out, config = settings.output_dir, settings.stages["ppo"]
    print(f"--- verdict -> {out / 'verdict.json'}", flush=True)
    before = verdict.Before.of(out, config)
    figures, answers = verdict.compare(before, out / "final", config)
    figures |= verdict.best_of_figures(verdict.best_of(before, config))
    figures |= verdict.new_topic_figures(out, config)
    bars = verdict.judge(figures) + verdict.judge_parts(figures)
    passed = all(met for *_, met in bars)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answers)
    (out / "heldout.jsonl").write_text(lines, encoding="utf-8")
    figures |= {"seconds": round(time.monotonic() - started, 1), "passed": passed}
    (out / "verdict.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    report = build_report(out)
    _print(answers, figures, bars)
    print(f"model: {out / 'final'}   report: {report}")
    return 0 if passed else 1


def _print(answers: list[dict], figures: dict, bars: list[tuple[str, float, str, bool]]) -> None:
    """A few replies before and after, at even distances through the held-out prompts, then the bars."""
    print(f"\nheld-out prompts, {SHOWN} of {len(answers)}")
    for row in answers[:: len(answers) // SHOWN][:SHOWN]:
        print(f"  prompt {clean(row['prompt'])}\n     SFT {clean(row['response_sft'])}")
        print(f"     PPO {clean(row['response_ppo'])}")
    print(f"\nverdict, seed {figures['seed']}: {len(answers)} held-out prompts, {duration(figures['seconds'])}")
    for what, measured, bar, met in bars:
        print(f"  {'ok  ' if met else 'FAIL'} {what:58} {measured:7.3f}   {bar}")
    for what, measured, aim, _ in verdict.aims(figures):
        print(f"  aim  {what:58} {measured:7.3f}   {aim}")
    for what, measured, other in verdict.beside(figures):
        print(f"  also {what:58} {measured:7.3f}   {other}")
    print("PASSED" if figures["passed"] else "NOT PASSED", flush=True)
