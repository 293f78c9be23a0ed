"""Which folder a run may write to, and what it leaves alone."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from fastrlhf import UserError
from fastrlhf.checkpoint import lock
from fastrlhf.checkpoint.run_folder import prepare_folder
from tests import tiny
from tests.runs import leave_after, read
from tests.stage_runs import build


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
    with pytest.raises(UserError, match="is not empty"):
        build("sft", output_dir=str(run))
    t = build("sft", output_dir=str(run), total_steps=1, save_every=0, overwrite=True)
    assert not (run / "checkpoints").exists() and t.steps_done == 0
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


# ------------------------------------------------------------------------------------------- whose files, whose folder


@pytest.mark.parametrize("where", ["notes.md", "final/notes.md", "checkpoints/notes.md", "mine/a/b", "final/sub/x.csv"])
def test_overwrite_refuses_a_folder_with_a_file_that_no_run_wrote(where, tmp_path):
    run, other = tmp_path / "run", tmp_path / "run" / where
    t = build("sft", output_dir=str(run), total_steps=2)
    t.train()
    t.save(run / "final")
    t.tracker.close()
    other.parent.mkdir(parents=True, exist_ok=True)
    other.write_text("years of work")
    before = files_of(run)
    with pytest.raises(UserError, match=rf"'{other}' was not written by a run, so nothing in '.*' is removed"):
        build("sft", output_dir=str(run), overwrite=True)
    assert files_of(run) == before
    other.unlink()
    shutil.rmtree(run / "mine", ignore_errors=True)
    shutil.rmtree(run / "final" / "sub", ignore_errors=True)
    assert build("sft", output_dir=str(run), overwrite=True, save_every=0).steps_done == 0
    assert not (run / "final").exists() and not (run / "checkpoints").exists()


@pytest.mark.parametrize(
    "where", [".git/config", ".cache/huggingface/token", "tensorboard/mine.txt", "reward/run.json", "sft/metrics.jsonl"]
)
def test_overwrite_takes_no_folder_of_another_tool_or_run_for_its_own(where, tmp_path):
    """A run that somebody put into the folder of another is one of its own; a quickstart's stages are not."""
    run_json, other = tmp_path / "run.json", tmp_path / where
    run_json.write_text('{"verb": "sft"}')
    other.parent.mkdir(parents=True)
    other.write_text('{"verb": "reward"}')
    with pytest.raises(UserError, match=rf"'{other}' was not written by a run"):
        prepare_folder(tmp_path, overwrite=True, resume=False)
    assert other.exists() and run_json.exists()
    if other.parent.name in ("sft", "reward"):
        run_json.write_text('{"verb": "quickstart"}')
        prepare_folder(tmp_path, overwrite=True, resume=False)
        assert list(tmp_path.iterdir()) == []


def test_overwrite_leaves_files_with_the_names_of_ours_beside_a_run_json_of_another_tool(tmp_path):
    """Whatever they are called: in a home or a working folder they may be anybody's."""
    for name, text in {"run.json": '{"task": 7}', "config.yaml": "mine: 1", "log.txt": "mine"}.items():
        (tmp_path / name).write_text(text)
    before = files_of(tmp_path)
    with pytest.raises(UserError, match=r"run.json: not written by a run"):
        prepare_folder(tmp_path, overwrite=True, resume=False)
    assert files_of(tmp_path) == before


def test_overwrite_refuses_a_link_among_the_curves(tmp_path):
    (tmp_path / "run" / "tensorboard").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text('{"verb": "sft"}')
    (tmp_path / "mine").write_text("years of work")
    (tmp_path / "run" / "tensorboard" / "events.out.tfevents.1").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="tfevents.1' was not written by a run"):
        prepare_folder(tmp_path / "run", overwrite=True, resume=False)


def test_what_a_killed_start_left_beside_the_folder_goes_and_nothing_else(tmp_path):
    beside = tmp_path / ".tmp-run"
    beside.mkdir()
    (beside / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis.txt' was not written by a run; move it away"):
        list(build("sft", output_dir=str(tmp_path / "run"), total_steps=1))
    assert (beside / "thesis.txt").read_text() == "years of work"
    (beside / "thesis.txt").rename(beside / "run.json")
    list(build("sft", output_dir=str(tmp_path / "run"), total_steps=1))
    assert not beside.exists() and (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("beside", [".tmp-run", ".tmp-run/checkpoints"])
def test_a_file_or_a_folder_in_the_place_of_a_start_is_named(beside, tmp_path):
    place = tmp_path / beside
    if place.name == ".tmp-run":
        place.write_text("mine")
    else:
        place.mkdir(parents=True)
    with pytest.raises(UserError, match=rf"{place.name}' was not written by a run; move it away"):
        list(build("sft", output_dir=str(tmp_path / "run"), total_steps=1))
    assert place.exists()


def test_a_damaged_run_and_what_a_kill_left_of_a_save_are_overwritten(tmp_path):
    build("sft", output_dir=str(tmp_path), total_steps=2).train()
    (tmp_path / "checkpoints" / "step-000002" / "MANIFEST.json").write_text("{")
    half = tmp_path / "checkpoints" / ".tmp-step-000004-77"
    half.mkdir()
    (half / "rng.safetensors").write_text("")
    build("sft", output_dir=str(tmp_path), overwrite=True)
    assert not (tmp_path / "checkpoints").exists()


def test_an_export_replaces_an_export_and_nothing_else(tmp_path):
    t, out = build("sft"), tmp_path / "out"
    tiny.llama().save_pretrained(out)  # a model that somebody else wrote
    before = files_of(out)
    with pytest.raises(UserError, match=rf"save: '{out}' is not known to be an export, so nothing is replaced"):
        t.save(out)
    assert files_of(out) == before
    t.save(tmp_path / "ours")
    t.save(tmp_path / "ours")
    (tmp_path / "ours" / "README.md").write_text("years of work")
    with pytest.raises(UserError, match=r"save: '.*ours/README.md' was not written by an export"):
        t.save(tmp_path / "ours")
    assert (tmp_path / "ours" / "README.md").read_text() == "years of work"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="save: '.*file' is a file; name a folder"):
        t.save(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    t.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "empty" / "config.json").exists()


HOLDER = """
import sys, time
from pathlib import Path
from fastrlhf.checkpoint import lock
lock.acquire(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("fields", [{"resume": True}, {"overwrite": True}])
def test_a_run_that_lives_is_left_alone_and_a_dead_one_is_not_locked(fields, tmp_path):
    build("sft", output_dir=str(tmp_path), total_steps=2).train()
    before = files_of(tmp_path)
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "held\n"
            who = rf"is in use by process {other.pid} on {re.escape(socket.gethostname())}; wait for it"
            with pytest.raises(UserError, match=who):
                build("sft", output_dir=str(tmp_path), inputs={"model": "/no/such/model"}, **fields)
            assert {**files_of(tmp_path), ".lock": b""} == {**before, ".lock": b""}
        finally:
            other.kill()
    assert (tmp_path / ".lock").exists()
    build("sft", output_dir=str(tmp_path), total_steps=3, **fields).train()
    assert not (tmp_path / ".lock").exists(), "a run that ended leaves no lock"


def on_this_machine(pid: int, began: str | None = None) -> str:
    began = lock._began(pid) if began is None else began
    return f"{pid} {socket.gethostname()} {began}"


@pytest.mark.parametrize(
    ("text", "free"),
    [
        (lambda: on_this_machine(os.getppid()), False),
        (lambda: f"{os.getppid()} {socket.gethostname()}", False),  # of an older version
        (lambda: on_this_machine(os.getppid(), began="1"), True),  # the number is another process's now
        (lambda: on_this_machine(2**22 + 1, began="1"), True),  # it is gone
        (lambda: "77 another-machine 5", False),
        (lambda: f"{os.getpid()} another-container 5", False),  # where every process has the same few numbers
        (lambda: "", True),
    ],
)
def test_where_the_file_system_knows_no_locks_the_text_of_the_lock_decides(text, free, tmp_path, monkeypatch):
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    (tmp_path / ".lock").write_text(text())
    if free:
        lock.check_free(tmp_path)
        lock.acquire(tmp_path)
        assert (tmp_path / ".lock").read_text().split() == on_this_machine(os.getpid()).split()
        lock.release(tmp_path)
        assert not (tmp_path / ".lock").exists()
        return
    for take in (lock.check_free, lock.acquire):
        with pytest.raises(UserError, match=r"in use by process \d+ on .*; if that process is gone, remove '.*\.lock'"):
            take(tmp_path)


def test_the_folder_is_held_while_the_loop_runs(tmp_path):
    t = build("sft", output_dir=str(tmp_path))
    for _ in t:
        assert (tmp_path / ".lock").read_text().split() == on_this_machine(os.getpid()).split()
        done = subprocess.run([sys.executable, "-c", HOLDER, str(tmp_path)], capture_output=True, text=True)
        assert f"is in use by process {os.getpid()} on" in done.stderr
        break
    assert not (tmp_path / ".lock").exists()


def test_a_start_that_was_killed_with_the_lock_alone_is_no_run(tmp_path):
    (tmp_path / ".lock").write_text("1 elsewhere\n")
    assert build("sft", output_dir=str(tmp_path)).steps_done == 0


# ---------------------------------------------------------------------------------------------- nothing to go on from


@pytest.mark.parametrize("damage", ["a byte", "folder gone", "manifest gone"])
def test_a_run_whose_checkpoints_are_lost_does_not_begin_again_in_silence(damage, tmp_path):
    build("sft", output_dir=str(tmp_path), total_steps=3, save_every=1).train()
    folders = sorted((tmp_path / "checkpoints").iterdir())
    for folder in folders:
        if damage == "a byte":
            (folder / "state.json").write_bytes((folder / "state.json").read_bytes() + b" ")
        elif damage == "manifest gone":
            (folder / "MANIFEST.json").unlink()
    if damage == "folder gone":
        shutil.rmtree(tmp_path / "checkpoints")
    before = files_of(tmp_path)
    with (
        warnings.catch_warnings(),
        pytest.raises(UserError, match="no checkpoint to go on from: .*--overwrite") as caught,
    ):
        warnings.simplefilter("ignore")
        build("sft", output_dir=str(tmp_path), resume=True)
    assert files_of(tmp_path) == before
    named = [folder.name in str(caught.value) for folder in folders]
    assert all(named) or "metrics.jsonl has 3 steps" in str(caught.value)


def test_a_run_killed_before_its_first_checkpoint_begins_again_and_says_so(tmp_path, capsys):
    leave_after(build("sft", output_dir=str(tmp_path)), 1)
    capsys.readouterr()
    assert build("sft", output_dir=str(tmp_path), resume=True).steps_done == 0
    assert "no checkpoint was written in the 1 steps of this run yet" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ folders that cannot be used


def test_a_folder_that_cannot_be_made_is_one_sentence():
    with pytest.raises(UserError, match="output_dir: '/proc/run' cannot be used .*; name a folder that can be"):
        build("sft", output_dir="/proc/run")
