"""Which folder a run may write to, and what it leaves alone."""

from __future__ import annotations

import json

import pytest

from fastrlhf import UserError
from fastrlhf.checkpoint.run_folder import prepare_folder
from tests.stage_runs import build, read


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"output_dir: '.*' is not empty; .*--overwrite"):
        build("sft", output_dir=str(tmp_path))
    with pytest.raises(UserError, match="holds files that no run wrote; empty it by hand"):
        build("sft", output_dir=str(tmp_path), overwrite=True)
    with pytest.raises(UserError, match="holds files that no run wrote; there is nothing to resume"):
        build("sft", output_dir=str(tmp_path), resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_overwrite_empties_the_folder_of_a_run(tmp_path):
    run = tmp_path / "run"
    build("sft", output_dir=str(run), total_steps=2).train()
    (run / "left_over").write_text("")
    with pytest.raises(UserError, match="is not empty"):
        build("sft", output_dir=str(run))
    t = build("sft", output_dir=str(run), total_steps=1, save_every=0, overwrite=True)
    assert not (run / "left_over").exists() and not (run / "checkpoints").exists() and t.steps_done == 0
    t.train()
    assert [row["step"] for row in read(run / "metrics.jsonl")] == [0, 1]


def test_a_missing_folder_a_file_and_an_empty_folder(tmp_path):
    with pytest.raises(UserError, match="output_dir: .* does not exist, so there is nothing to resume"):
        build("sft", output_dir=str(tmp_path / "gone"), resume=True)
    assert not (tmp_path / "gone").exists()
    (tmp_path / "file").write_text("")
    for resume in (False, True):
        with pytest.raises(UserError, match="output_dir: .* is a file; name a folder"):
            build("sft", output_dir=str(tmp_path / "file"), resume=resume)
    (tmp_path / "empty").mkdir()
    assert build("sft", output_dir=str(tmp_path / "empty")).folder == tmp_path / "empty"


def test_a_run_killed_while_it_described_itself_can_be_resumed(tmp_path):
    """config.yaml is there, run.json not yet."""
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    t = build("sft", output_dir=str(tmp_path), resume=True, total_steps=1)
    t.train()
    assert json.loads((tmp_path / "run.json").read_text())["verb"] == "sft"
    assert "learning_rate: 0.001" in (tmp_path / "config.yaml").read_text()


def test_the_run_of_another_stage_is_not_resumed(tmp_path):
    build("sft", output_dir=str(tmp_path))
    with pytest.raises(UserError, match="holds a sft run, which reward cannot go on with"):
        build("reward", output_dir=str(tmp_path), resume=True)
    prepare_folder(tmp_path, overwrite=False, resume=True)  # a caller that does not say what it is


def test_without_an_output_dir_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build("sft", total_steps=2).train()
    assert list(tmp_path.iterdir()) == []
