"""Checkpoints: exact round trips, every kind of damage found, nothing lost at any moment of a save."""

from __future__ import annotations

import json
import math
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

import numpy
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from fastrlhf.checkpoint import (
    CheckpointError,
    CheckpointStore,
    StopSignal,
    _manifest_text,
    load_optimizer_tensors,
    optimizer_tensors,
    replace_folder,
    restore_rng,
    rng_tensors,
)
from fastrlhf.config import UserError

CONFIG = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def tiny(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**CONFIG, "tie_word_embeddings": True, **changes})).to(dtype)


def train(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """A few steps that draw from every generator, so that a lost one changes the weights."""
    for _ in range(steps):
        ids = torch.randint(48, (2, 6)) + (random.randrange(48) + int(numpy.random.randint(48)))
        scale = random.gauss(1, 0.1) * float(numpy.random.normal(1, 0.1))
        (model(input_ids=ids % 48, labels=ids % 48).loss * scale).backward()
        optimizer.step()
        optimizer.zero_grad()


def save(store: CheckpointStore, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    tensors, data = optimizer_tensors(optimizer, "policy")
    return store.save(
        step,
        models={"policy": model},
        tensors={"optimizer": tensors, "rng": rng_tensors()},
        state={"optimizer": data, "step": step},
    )


class Blockwise(torch.optim.Optimizer):
    """Momentum kept as bitsandbytes keeps it: uint8 codes, fp32 block maxima, a code map that parameters share."""

    def __init__(self, params: object, lr: float = 0.1):
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})
        self.map = torch.linspace(-1, 1, 256)

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state.update(step=0, state1=torch.full(parameter.shape, 127, dtype=torch.uint8), qmap1=self.map)
                state["quantized"] = {"absmax1": torch.ones(1)}
            state["step"] += 1
            old = state["qmap1"][state["state1"].long()] * state["quantized"]["absmax1"]
            new = 0.9 * old + parameter.grad.float()
            state["quantized"]["absmax1"] = new.abs().max().reshape(1)
            codes = (new / state["quantized"]["absmax1"] + 1) * 127.5
            state["state1"] = codes.round().to(torch.uint8)
            parameter.sub_(self.param_groups[0]["lr"] / state["step"] * new)


def eight_bit(params: object) -> torch.optim.Optimizer:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    return bitsandbytes.optim.AdamW8bit(params, lr=1e-2, min_8bit_size=1)


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True, amsgrad=True),
    "tensor_lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "blockwise": Blockwise,
    "8bit": eight_bit,
}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_run_goes_on_bit_for_bit(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    build = OPTIMIZERS[name]
    model = tiny(dtype=dtype)
    optimizer = build(model.parameters())
    random.seed(1), numpy.random.seed(2), torch.manual_seed(3)
    train(model, optimizer, 3)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] * 0.7
    save(CheckpointStore(tmp_path), 3, model, optimizer)
    train(model, optimizer, 3)

    checkpoint = CheckpointStore(tmp_path).latest()
    fresh = tiny(seed=9, dtype=dtype)
    checkpoint.load_model("policy", fresh)
    other = build(fresh.parameters())
    load_optimizer_tensors(other, checkpoint.tensors("optimizer"), checkpoint.state["optimizer"])
    restore_rng(checkpoint.tensors("rng"))
    train(fresh, other, 3)

    assert equal(model.state_dict(), fresh.state_dict())
    expected, got = optimizer_tensors(optimizer, "p"), optimizer_tensors(other, "p")
    assert equal(expected[0], got[0]) and expected[1] == got[1]


@pytest.mark.parametrize("lost", ["python", "numpy", "torch"])
def test_each_generator_matters_to_the_round_trip(lost: str) -> None:
    """The test above must notice a generator that is not restored: here each one is dropped in turn."""
    random.gauss(0, 1), numpy.random.normal()  # both now hold a second, cached draw
    before = rng_tensors()

    def draws() -> dict[str, list[float]]:
        return {
            "python": [random.gauss(0, 1), random.random()],
            "numpy": [numpy.random.normal(), numpy.random.random()],
            "torch": torch.rand(2).tolist(),
        }

    first = draws()
    restore_rng(before)
    assert draws() == first
    now = rng_tensors()
    restore_rng({key: now[key] if key.startswith(lost) else value for key, value in before.items()})
    assert [key for key, value in draws().items() if value != first[key]] == [lost]


def test_fp32_moments_of_bf16_parameters_are_not_rounded() -> None:
    parameter = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer, other = (torch.optim.SGD([parameter], lr=1, momentum=0.9) for _ in range(2))
    optimizer.state[parameter]["momentum_buffer"] = torch.full((4,), 1 / 3)
    load_optimizer_tensors(other, *optimizer_tensors(optimizer, "p"))
    assert other.state[parameter]["momentum_buffer"].dtype == torch.float32
    assert torch.equal(other.state[parameter]["momentum_buffer"], torch.full((4,), 1 / 3))


def test_a_fresh_optimizer_round_trips_and_old_state_is_dropped() -> None:
    model = tiny()
    optimizer, other = (torch.optim.AdamW(model.parameters()) for _ in range(2))
    train(model, other, 1)
    tensors, data = optimizer_tensors(optimizer, "p")
    assert tensors == {}
    load_optimizer_tensors(other, tensors, data)
    assert not other.state


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda m: torch.optim.SGD(m.parameters(), lr=1), "AdamW, this run built SGD"),
        (lambda m: torch.optim.AdamW([next(m.parameters())]), "parameters by group, this run has [1]"),
        (lambda m: torch.optim.AdamW(tiny(hidden_size=32).parameters()), "policy.0.exp_avg has shape [48, 16]"),
    ],
)
def test_an_optimizer_that_does_not_fit_is_refused_whole(build: Callable, words: str) -> None:
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 1)
    other = build(model)
    with pytest.raises(UserError, match=words.replace("[", r"\[").replace("]", r"\]")):
        load_optimizer_tensors(other, *optimizer_tensors(optimizer, "policy"))
    assert not other.state


# --- models ---


def store_with(tmp_path: Path, model: torch.nn.Module) -> CheckpointStore:
    store = CheckpointStore(tmp_path)
    store.save(1, models={"policy": model}, tensors={}, state={})
    return store


def test_weights_are_loaded_into_the_same_storages_and_stay_tied(tmp_path: Path) -> None:
    checkpoint = store_with(tmp_path, tiny(dtype=torch.bfloat16)).latest()
    model = tiny(seed=5, dtype=torch.bfloat16)
    pointers = {key: value.data_ptr() for key, value in model.state_dict().items()}
    checkpoint.load_model("policy", model)
    assert {key: value.data_ptr() for key, value in model.state_dict().items()} == pointers
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert equal(model.state_dict(), tiny(dtype=torch.bfloat16).state_dict())


def test_a_model_folder_runs_in_stock_transformers(tmp_path: Path) -> None:
    model = tiny().eval()
    folder = store_with(tmp_path, model).latest().path / "policy"
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(6)[None]
    assert torch.equal(stock(ids).logits, model(ids).logits)


def test_architectures_renamed_on_disk_are_loaded(tmp_path: Path) -> None:
    names = {key: value for key, value in CONFIG.items() if key != "num_key_value_heads"}
    first, second = (GPTNeoXForCausalLM(GPTNeoXConfig(**names)) for _ in range(2))
    checkpoint = store_with(tmp_path, first).latest()
    drawn = torch.get_rng_state()
    checkpoint.load_model("policy", second)
    assert equal(first.state_dict(), second.state_dict())
    assert torch.equal(drawn, torch.get_rng_state()), "loading must not move the generator"


@pytest.mark.parametrize(
    ("saved", "live", "words"),
    [
        (tiny, lambda: tiny(num_hidden_layers=2), "weight model.layers.1.*is not in the checkpoint"),
        (lambda: tiny(num_hidden_layers=2), tiny, "model.layers.1"),
        (tiny, lambda: tiny(intermediate_size=32), r"is torch.float32 \[16, 24\] in the checkpoint"),
        (tiny, lambda: tiny(dtype=torch.bfloat16), "same model and dtype"),
        (tiny, lambda: tiny(tie_word_embeddings=False), "weight lm_head.weight of this run's model"),
        (lambda: tiny(tie_word_embeddings=False), tiny, "are one tensor in this run's model and two"),
        (tiny, lambda: LlamaForSequenceClassification(LlamaConfig(**CONFIG, num_labels=1)), "score.weight"),
    ],
)
def test_another_model_is_refused_by_the_first_weight(
    tmp_path: Path, saved: Callable, live: Callable, words: str
) -> None:
    checkpoint, model = store_with(tmp_path, saved()).latest(), live()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match=words):
        checkpoint.load_model("policy", model)
    assert equal(before, model.state_dict())


def test_missing_parts_are_named(tmp_path: Path) -> None:
    checkpoint = store_with(tmp_path, tiny()).latest()
    with pytest.raises(UserError, match="no model called 'value'"):
        checkpoint.load_model("value", tiny())
    with pytest.raises(UserError, match="no tensors called 'ema'"):
        checkpoint.tensors("ema")


def test_state_and_tensors_come_back_exactly(tmp_path: Path) -> None:
    state = {"kl": 0.1 + 0.2, "tiny": 5e-324, "big": -math.inf, "n": 2**60, "名": ["好", None, True]}
    shared = torch.arange(6.0).reshape(2, 3)
    tensors = {
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "codes": torch.arange(256, dtype=torch.uint8),
        "nan": torch.tensor([math.nan, math.inf]),
        "shared": shared,
        "view": shared[0],
        "transposed": shared.T,
    }
    store = CheckpointStore(tmp_path)
    store.save(7, models={}, tensors={"all": tensors, "none": {}}, state=state)
    checkpoint = store.latest()
    assert checkpoint.step == 7 and checkpoint.state == state and checkpoint.tensors("none") == {}
    back = checkpoint.tensors("all")
    assert torch.equal(back.pop("nan").view(torch.int32), tensors.pop("nan").view(torch.int32))
    assert equal(back, tensors)


@pytest.mark.parametrize("name", ["../up", "a/b", "", "policy"])
def test_part_names_cannot_leave_the_folder_or_collide(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a part"):
        CheckpointStore(tmp_path).save(1, models={"policy": tiny()}, tensors={name: {}}, state={})


# --- the folder ---


def test_rotation_keeps_two_and_refuses_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2, 10, 1_000_000):
        store.save(step, models={}, tensors={}, state={})
    assert store.steps() == [10, 1_000_000]
    with pytest.raises(ValueError, match="at least 2"):
        CheckpointStore(tmp_path, keep=1)


def test_damaged_checkpoints_are_rotated_out_before_sound_ones(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (10, 20):
        store.save(step, models={}, tensors={}, state={"step": step})
    (store.folder / "step-000020" / "state.json").write_text("{}")
    store = CheckpointStore(tmp_path)
    with pytest.warns(UserWarning, match="step-000020 is damaged"):
        assert store.latest().step == 10
    store.save(15, models={}, tensors={}, state={})
    assert store.steps() == [10, 15]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for value in (1, 2):
        store.save(5, models={}, tensors={}, state={"value": value})
    assert store.latest().state == {"value": 2}
    assert sorted(path.name for path in store.folder.iterdir()) == ["step-000005"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_file_modes_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    previous = os.umask(umask)
    try:
        folder = store_with(tmp_path, tiny()).latest().path
    finally:
        os.umask(previous)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {mode}
    assert {path.suffix for path in files} <= {".json", ".safetensors"}


def test_leftovers_are_cleaned_when_the_folder_is_opened(tmp_path: Path) -> None:
    store_with(tmp_path, tiny())
    (tmp_path / "checkpoints" / ".tmp-step-000002-77").mkdir()
    (tmp_path / ".tmp-best-77" / "deep").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000001").rename(tmp_path / "checkpoints" / ".old-step-000001")
    (tmp_path / ".old-best").mkdir()
    store = CheckpointStore(tmp_path)
    assert store.latest().step == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "checkpoints"]
    assert [path.name for path in store.folder.iterdir()] == ["step-000001"]


def test_another_format_version_is_refused_by_name(tmp_path: Path) -> None:
    path = store_with(tmp_path, tiny()).latest().path / "MANIFEST.json"
    manifest = json.loads(path.read_text())
    path.write_text(_manifest_text({**manifest, "format_version": 99}))
    with pytest.raises(UserError, match="checkpoint format 99, this version of fastrlhf reads format 1"):
        CheckpointStore(tmp_path).latest()


def test_other_library_versions_are_noted(tmp_path: Path) -> None:
    path = store_with(tmp_path, tiny()).latest().path / "MANIFEST.json"
    manifest = json.loads(path.read_text())
    path.write_text(_manifest_text({**manifest, "versions": {**manifest["versions"], "torch": "1.0"}}))
    store = CheckpointStore(tmp_path)
    assert store.latest().step == 1
    assert len(store.notes) == 1 and "torch 1.0 -> " in store.notes[0]


def test_an_empty_run_has_no_checkpoint(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "none").latest() is None
    assert not (tmp_path / "none").exists()


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
        keep = (newest / name).read_bytes()
        damage(newest / name, kind, rng)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = CheckpointStore(tmp_path).latest()
        assert found is not None and found.step == 1, (kind, name)
        assert len(caught) == 1 and name in str(caught[0].message) and "step-000002" in str(caught[0].message)
        (newest / name).write_bytes(keep)
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
            found = opened.latest()
        steps.add((found.step, found.state["try"]))
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_only_sets_the_flag(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested and stop.name == number.name
    assert signal.getsignal(number) is before


def test_a_second_interrupt_stops_at_once() -> None:
    with StopSignal():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_outside_the_main_thread_nothing_is_installed() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def run() -> None:
        with StopSignal() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
