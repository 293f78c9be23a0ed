"""The run folder can be written, and the disk has room for what a run writes: said with both numbers."""

from __future__ import annotations

import os
import shutil
from types import SimpleNamespace

import pytest

from fastrlhf import PPOConfig, SFTConfig
from fastrlhf.config.errors import UserError
from fastrlhf.preflight.disk import check_room, trained_bytes
from tests import runs, tiny


def folder_bytes(folder) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("fields", [{}, {"lora": 4}, {"dtype": "bf16"}, {"ema_decay": 0.9}], ids=str)
def test_the_estimate_is_what_a_checkpoint_takes(fields, tmp_path):
    model = tiny.llama()
    if fields.pop("dtype", None):
        model.bfloat16()
    t = runs.ppo_trainer(
        policy=model, advantage="rloo", samples_per_prompt=2, output_dir=str(tmp_path / "run"), save_every=1, **fields
    )
    config = PPOConfig(**fields)
    estimate = trained_bytes(tiny.llama().to(model.dtype), config, average="ema_decay" in fields)
    t.train()
    checkpoint = max((tmp_path / "run" / "checkpoints").iterdir())
    others = folder_bytes(checkpoint) - sum(p.stat().st_size for p in checkpoint.rglob("*.safetensors"))
    written = folder_bytes(checkpoint) - others
    assert estimate.saved <= written < 1.3 * estimate.saved + 100_000


def test_a_full_disk_is_told_with_both_numbers_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000, total=1))
    with pytest.raises(
        UserError, match=r"this run writes about 1\.1 MB \(2 checkpoints at once, .* and 1\.0 MB are free"
    ):
        runs.sft_trainer(model=tiny.llama(), output_dir=str(tmp_path / "run"), save_every=1, mini_batch_size=6)
    assert not (tmp_path / "run").exists()
    runs.sft_trainer(model=tiny.llama())  # nothing is written


def test_an_older_run_makes_room(tmp_path, monkeypatch):
    config = SFTConfig(output_dir=str(tmp_path), eval_every=0, save_every=0)
    roles = [trained_bytes(tiny.llama(), config)]
    needed = roles[0].saved + roles[0].exported
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1000, total=1))
    with pytest.raises(UserError, match="make room"):
        check_room(config, roles, saves=1)
    (tmp_path / "old").write_bytes(bytes(1000))
    assert "are free" in check_room(config, roles, saves=1)


def test_a_folder_that_cannot_be_written_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path))
    with pytest.raises(UserError, match=rf"output_dir: .*the folder '{tmp_path}' is read-only; name another"):
        runs.sft_trainer(data="no-such-file.jsonl", output_dir=str(tmp_path / "a" / "run"))
