"""A run that was killed, stopped or left by its loop ends with the bytes of one that ran through (on the CPU)."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy
import pytest
import torch

import fastrlhf.ppo
from fastrlhf import PPOConfig, PPOTrainer, SFTConfig, SFTTrainer
from fastrlhf.checkpoint.store import CheckpointStore
from fastrlhf.config.errors import UserError
from fastrlhf.models import heads, token_batch
from fastrlhf.rl import losses
from fastrlhf.runtime.batching import ReplyLengths
from tests import tiny
from tests.stage_runs import differing

ROOT = Path(__file__).parents[1]
KILLS = 1


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The promise is for the same thread count; models this small are fastest with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def experiments() -> dict[str, dict]:
    """A kill, a SIGTERM and a control a stage, in a process of their own: forking pytest would not be safe."""
    command = [sys.executable, "-m", "bench.kill_resume", "--kills", str(KILLS), "--seed", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.stdout, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    failed = [json.dumps(row, indent=1) for row in rows if not row["passed"]]
    assert done.returncode == 0, "\n".join([*failed, done.stderr[-3000:]])
    return {row["stage"]: row for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_killed_run_ends_with_the_same_bytes(experiments: dict[str, dict], stage: str) -> None:
    row = experiments[stage]
    assert len(row["kills"]) == KILLS and row["files"] > 25
    assert row["different"]["killed0"] == []


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_sigterm_exits_75_with_a_checkpoint_to_go_on_from(experiments: dict[str, dict], stage: str) -> None:
    row = experiments[stage]
    assert row["preempted"][0] == 75 and row["preempted"][1] > 0
    assert row["different"]["preempted"] == []
    assert row["control_differs_in"] > 5, "another seed must give other bytes, or the comparison sees nothing"


def noisy_reward(prompts: list[str], responses: list[str]) -> list[float]:
    """Draws from every global generator, as a user's function may."""
    return [len(r) + random.random() + float(numpy.random.rand()) + float(torch.rand(())) for r in responses]


def ppo(run: Path, *, resume: bool = False, **changes: object) -> PPOTrainer:
    fields = {
        "output_dir": str(run),
        "resume": resume,
        "total_steps": 4,
        "rollout_batch_size": 4,
        "mini_batch_size": 4,
        "max_new_tokens": 6,
        "learning_rate": 1e-3,
        "save_every": 1,
        "eval_every": 2,
        "reward_scaling": "running_std",
    }
    config = PPOConfig(**{**fields, **changes})
    return PPOTrainer(
        config,
        policy=tiny.llama(),
        tokenizer=tiny.tokenizer(),
        reward=noisy_reward,
        prompts=tiny.PROMPTS,
        eval_prompts=tiny.PROMPTS[:2],
    )


def sft(run: Path, *, resume: bool = False, **changes: object) -> SFTTrainer:
    data = [{"prompt": p, "response": r} for p in tiny.PROMPTS for r in ("yes the moon", "谢谢", "no")]
    fields = {
        "output_dir": str(run),
        "resume": resume,
        "total_steps": 4,
        "mini_batch_size": 4,
        "learning_rate": 1e-3,
        "save_every": 1,
    }
    model = tiny.llama().to(torch.bfloat16)
    return SFTTrainer(SFTConfig(**{**fields, **changes}), model=model, tokenizer=tiny.tokenizer(), data=data)


class Whole(NamedTuple):
    """A run that nothing interrupted, and its folder as it was after each step: what a kill there leaves."""

    folder: Path
    trainer: PPOTrainer | SFTTrainer
    after: dict[int, Path]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[Callable, Whole]:
    """Such runs, by builder."""
    runs = {}
    for build in (sft, ppo):
        place = tmp_path_factory.mktemp("whole")
        run = runs[build] = Whole(place / "run", build(place / "run"), {})
        run.after[0] = shutil.copytree(run.folder, place / "after-0")
        for step, _ in enumerate(run.trainer, 1):
            run.after[step] = shutil.copytree(run.folder, place / f"after-{step}")
    return runs


@pytest.mark.parametrize("build", [sft, ppo])
@pytest.mark.parametrize("left_after", [0, 1, 2, 3, 4])
def test_a_loop_left_after_any_step_goes_on_exactly(
    tmp_path: Path, whole: dict, build: Callable, left_after: int
) -> None:
    """In Python, with loaded models: bf16 weights over fp32 masters (SFT); a reward that draws random numbers (PPO)."""
    folder, uninterrupted, after = whole[build]
    shutil.copytree(after[left_after], tmp_path / "run")
    random.seed(99), numpy.random.seed(99), torch.manual_seed(99)
    resumed = build(tmp_path / "run", resume=True)
    resumed.train()
    assert resumed.steps_done == 4
    assert differing(uninterrupted, resumed) == []
    last = "checkpoints/step-000004/state.json"
    for name in ("metrics.jsonl", "samples.jsonl", last):
        assert (tmp_path / "run" / name).read_bytes() == (folder / name).read_bytes()


def test_a_run_killed_after_its_last_save_leaves_no_surplus_checkpoint(
    tmp_path: Path, whole: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kill falls between the commit of the last checkpoint and the removal of the oldest."""
    with monkeypatch.context() as patch:
        # No seam lies between commit and rotation; bench.kill_resume --sweep kills there for real.
        patch.setattr(CheckpointStore, "rotate", lambda store, target: store.steps()[-1] == 4 and leave())
        with pytest.raises(KeyboardInterrupt):
            sft(tmp_path / "run").train()
    assert len(CheckpointStore(tmp_path / "run").steps()) == 4
    sft(tmp_path / "run", resume=True).train()
    assert CheckpointStore(tmp_path / "run").steps() == CheckpointStore(whole[sft].folder).steps() == [3, 4]


def leave() -> None:
    raise KeyboardInterrupt


def test_the_same_seed_gives_the_same_bytes_whatever_ran_before(tmp_path: Path, whole: dict) -> None:
    random.random(), numpy.random.rand(), torch.rand(3)
    ppo(tmp_path / "run").train()
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (whole[ppo].folder / "metrics.jsonl").read_bytes()


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(tmp_path: Path, whole: dict) -> None:
    shutil.copytree(whole[ppo].after[3], tmp_path, dirs_exist_ok=True)
    weights_file = tmp_path / "checkpoints/step-000003/policy/model.safetensors"
    data = bytearray(weights_file.read_bytes())
    data[-1] ^= 1
    weights_file.write_bytes(data)
    with pytest.warns(UserWarning, match="step-000003 is damaged and not used"):
        resumed = ppo(tmp_path, resume=True)
    assert resumed.steps_done == 2
    resumed.train()
    assert (tmp_path / "metrics.jsonl").read_bytes() == (whole[ppo].folder / "metrics.jsonl").read_bytes()


def test_a_changed_field_is_refused_by_name(tmp_path: Path) -> None:
    ppo(tmp_path, total_steps=1).train()
    with pytest.raises(UserError, match="learning_rate: this run was started with 0.001 and would resume with 0.002"):
        ppo(tmp_path, resume=True, learning_rate=2e-3)


def test_a_run_killed_before_its_first_byte_can_be_started_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (tmp_path / ".tmp-run").mkdir()  # where config.yaml and run.json are prepared
    (tmp_path / ".tmp-run" / "run.json").write_text("{")
    ppo(run, total_steps=1).train()
    assert json.loads((run / "run.json").read_text())["verb"] == "ppo" and (run / "config.yaml").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_ranks_go_on_from_what_one_process_left_and_keep_the_lengths_of_replies(tmp_path: Path, monkeypatch) -> None:
    next(iter(ppo(tmp_path / "run")))
    monkeypatch.setattr(fastrlhf.ppo, "distributed", SimpleNamespace(size=lambda: 2))  # and one process all the same
    ranks = ppo(tmp_path / "run", resume=True)
    assert ranks.steps_done == 1 and ranks.lengths.state() == ReplyLengths().state()
    next(iter(ranks))
    kept = ranks.lengths.state()
    assert len(kept["means"]) >= 3 and kept["all"][1] == 4
    assert ppo(tmp_path / "run", resume=True).lengths.state() == kept


@pytest.mark.parametrize("build", [sft, ppo])
def test_a_run_keeps_the_workspace_of_the_machine_that_it_began_on(tmp_path, monkeypatch, build):
    """It decides how the head's gradient is summed: on another card a resumed run adds in the same order."""
    small, large = 4 * 64 * 1024, 1 << 30
    seen: list[int] = []

    def run(limit: int, folder: Path, **more: object) -> Any:
        monkeypatch.setattr(heads, "default_workspace", lambda device: limit)
        trainer = build(folder, **more)
        next(iter(trainer))
        return trainer

    def watch(module: ModuleType, name: str) -> None:
        original = getattr(module, name)

        def call(*arguments: Any, workspace: int | None, **options: Any) -> Any:
            seen.append(workspace)
            return original(*arguments, workspace=workspace, **options)

        monkeypatch.setattr(module, name, call)

    watch(token_batch, "linear_log_probs")
    watch(losses, "linear_ppo_loss")
    run(small, tmp_path / "run")
    resumed = run(large, tmp_path / "run", resume=True)
    assert set(seen) == {small} and resumed.memory.workspace == small
    run(large, tmp_path / "new")
    assert set(seen) == {small, large}
