"""What checkpoints survive: damaged files, kills and failures at any moment of a save, signals."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastrlhf.checkpoint.atomic import CheckpointError, replace_folder
from fastrlhf.checkpoint.state import rng_tensors
from fastrlhf.checkpoint.store import CheckpointStore
from fastrlhf.runtime.guards import StopNow, StopSignal
from tests.checkpoints import save, store_with, tiny, train

# --- damage ---


def damage(path: Path, kind: str, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if kind == "delete":
        path.unlink()
    elif kind == "truncate":
        path.write_bytes(data[: rng.randrange(len(data))])
    elif kind == "grow":
        path.write_bytes(data + b" ")
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)


def test_every_damage_is_found_and_the_previous_checkpoint_is_used(tmp_path: Path) -> None:
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    store = CheckpointStore(tmp_path)
    train(model, optimizer, 1)
    for step in (1, 2):
        save(store, step, model, optimizer)
    newest = store.folder / "step-000002"
    names = sorted(str(p.relative_to(newest)) for p in newest.rglob("*") if p.is_file())
    assert len(names) == 7
    rng = random.Random(0)
    kinds = ["flip"] * 8 + ["truncate"] * 4 + ["grow", "delete"]
    for kind, name in [(kind, name) for name in names for kind in kinds]:
        original = (newest / name).read_bytes()
        damage(newest / name, kind, rng)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            latest = CheckpointStore(tmp_path).latest()
        assert latest is not None and latest.step == 1, (kind, name)
        assert len(caught) == 1 and name in str(caught[0].message) and "step-000002" in str(caught[0].message)
        (newest / name).write_bytes(original)
    assert CheckpointStore(tmp_path).latest().step == 2


def test_a_renamed_checkpoint_is_not_trusted(tmp_path: Path) -> None:
    store = store_with(tmp_path, tiny())
    (store.folder / "step-000001").rename(store.folder / "step-000009")
    with pytest.warns(UserWarning, match="written for step 1"):
        assert store.latest() is None


# --- failures while saving ---

CALLS = ("rename", "fsync", "mkdir", "chmod", "unlink", "rmdir")


def in_child(action: Callable[[], None]) -> int:
    """Run `action` in a forked process -> its wait status; whatever it raises becomes exit code 1."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def killed_at(call: int, action: Callable[[], None]) -> bool:
    """Run `action` in a child that dies by SIGKILL just before its `call`-th change of the file system."""

    def run() -> None:
        count = 0

        def guarded(function: Callable) -> Callable:
            def wrapped(*args: object, **kwargs: object) -> object:
                nonlocal count
                count += 1
                if count == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return wrapped

        for name in CALLS:
            setattr(os, name, guarded(getattr(os, name)))
        action()

    status = in_child(run)
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


@pytest.mark.parametrize("again", [False, True], ids=["next step", "same step again"])
def test_no_moment_of_a_save_loses_the_run(tmp_path: Path, again: bool) -> None:
    origin = tmp_path / "origin"
    store = CheckpointStore(origin)
    model = tiny()
    for step in (1, 2):
        store.save(step, models={"policy": model}, tensors={"rng": rng_tensors()}, state={"try": 1})
    target = 2 if again else 3
    call, steps = 0, set()
    while True:
        call += 1
        run = tmp_path / f"run{call}"
        shutil.copytree(origin, run)
        killed = killed_at(
            call,
            lambda run=run: CheckpointStore(run).save(
                target, models={"policy": model}, tensors={"rng": rng_tensors()}, state={"try": 2}
            ),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a half-written or half-removed folder must not even be seen
            opened = CheckpointStore(run)
            latest = opened.latest()
        steps.add((latest.step, latest.state["try"]))
        assert len(opened.steps()) >= 2 and not list(run.rglob(".*"))
        shutil.rmtree(run)
        if not killed:
            break
    assert call > 20 and steps == {(2, 1), (target, 2)}


def test_no_moment_of_replacing_a_folder_shows_a_mixture(tmp_path: Path) -> None:
    target = tmp_path / "best"

    def write(value: str) -> Callable[[Path], None]:
        def fill(folder: Path) -> None:
            for name in ("a", "b"):
                (folder / name).write_text(value)

        return fill

    call, seen, killed = 0, set(), True
    while killed:
        call += 1
        replace_folder(write("old"), target)
        killed = killed_at(call, lambda: replace_folder(write("new"), target))
        CheckpointStore(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["best"]
        seen.add((target / "a").read_text() + (target / "b").read_text())
    assert call > 6 and seen == {"oldold", "newnew"}


@pytest.mark.parametrize("limit", [0, 1, 100, 1000, 4096, 10_000, 15_000, 20_000])
def test_a_full_disk_leaves_nothing_behind_and_the_last_checkpoint_whole(tmp_path: Path, limit: int) -> None:
    model = tiny()
    store = store_with(tmp_path, model)

    def action() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        with pytest.raises(CheckpointError, match="step-000002 was not written"):
            store.save(2, models={"policy": model}, tensors={"big": {"x": torch.ones(9000)}}, state={})

    assert in_child(action) == 0
    assert sorted(path.name for path in store.folder.iterdir()) == ["step-000001"]
    assert CheckpointStore(tmp_path).latest().step == 1


def test_too_little_space_is_said_in_bytes_and_the_third_failure_is_fatal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_with(tmp_path, tiny())
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        for fatal in (False, False, True):
            with pytest.raises(CheckpointError, match=r"11,000 bytes are missing") as caught:
                store.save(2, models={}, tensors={"x": {"x": torch.ones(2500)}}, state={})
            assert caught.value.fatal is fatal
    store.save(3, models={}, tensors={"x": {"x": torch.ones(2500)}}, state={})
    assert store.failures == 0 and store.steps() == [1, 3]


def test_a_failing_export_keeps_the_folder_that_was_there(tmp_path: Path) -> None:
    target = tmp_path / "best"
    replace_folder(lambda folder: (folder / "a").write_text("old"), target)

    def fail(folder: Path) -> None:
        (folder / "a").write_text("new")
        raise OSError("disk on fire")

    with pytest.raises(CheckpointError, match="could not write .*best: disk on fire"):
        replace_folder(fail, target)
    assert (target / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_state_that_json_cannot_hold_is_a_bug_and_leaves_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    with pytest.raises(TypeError):
        store.save(1, models={}, tensors={}, state={"tensor": torch.ones(1)})
    assert list(store.folder.iterdir()) == []


# --- signals ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_only_sets_the_flag(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested and stop.name == number.name
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_one_ends_at_once(first: int, second: int, capfd: pytest.CaptureFixture) -> None:
    """A warning of the scheduler before it is not the first."""
    with StopSignal(lambda now: "the step is ended") as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), first)
        assert not stop.insisted
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), second)
        assert stop.insisted
    assert capfd.readouterr().err == "SIGUSR1: the step is ended; once more ends at once\n"


def test_work_that_can_be_dropped_is_left_at_once_until_it_holds() -> None:
    with StopSignal() as stop, pytest.raises(StopNow), stop.at_once():
        os.kill(os.getpid(), signal.SIGHUP)
        pytest.fail("not at once")
    with StopSignal() as stop, stop.at_once():
        stop.hold()
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.requested


def test_a_run_under_nohup_goes_on_when_the_terminal_is_gone() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_the_main_thread_nothing_is_installed() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def run() -> None:
        with StopSignal() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
