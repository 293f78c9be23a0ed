"""Checkpoints: exact round trips, every kind of damage found, nothing lost at any moment of a save."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
)
from transformers.utils import logging

from fastrlhf.checkpoint.quiet import quiet_loading
from fastrlhf.checkpoint.state import load_optimizer_tensors, optimizer_tensors, restore_rng, rng_tensors
from fastrlhf.checkpoint.store import CheckpointStore, manifest_text
from fastrlhf.config.errors import UserError
from tests.checkpoints import CONFIG, OPTIMIZERS, equal, save, store_with, tiny, train


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


def test_state_comes_back_in_the_order_of_the_parameters(tmp_path: Path) -> None:
    """In the file 10 stands before 2; an optimizer's own steps would have met 2 first."""
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in range(12)]
    optimizer, other = (torch.optim.SGD(parameters, lr=1, momentum=0.9) for _ in range(2))
    for index, parameter in enumerate(parameters):
        optimizer.state[parameter]["momentum_buffer"] = torch.full((1,), float(index))
    tensors, data = optimizer_tensors(optimizer, "p")
    store = CheckpointStore(tmp_path)
    store.save(1, models={}, tensors={"optimizer": tensors}, state=data)
    load_optimizer_tensors(other, store.latest().tensors("optimizer"), store.latest().state)
    assert [float(entry["momentum_buffer"]) for entry in other.state.values()] == list(range(12))


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
    path.write_text(manifest_text({**manifest, "format_version": 99}))
    with pytest.raises(UserError, match="checkpoint format 99, this version of fastrlhf reads format 1"):
        CheckpointStore(tmp_path).latest()


def test_other_library_versions_are_noted(tmp_path: Path) -> None:
    path = store_with(tmp_path, tiny()).latest().path / "MANIFEST.json"
    manifest = json.loads(path.read_text())
    path.write_text(manifest_text({**manifest, "versions": {**manifest["versions"], "torch": "1.0"}}))
    store = CheckpointStore(tmp_path)
    assert store.latest().step == 1
    assert len(store.notes) == 1 and "torch 1.0 -> " in store.notes[0]


def test_the_progress_bars_are_hidden_and_come_back_even_after_an_error() -> None:
    for shown in (logging.enable_progress_bar, logging.disable_progress_bar):
        shown()
        before = logging.is_progress_bar_enabled()
        with pytest.raises(OSError), quiet_loading():
            assert not logging.is_progress_bar_enabled()
            raise OSError
        assert logging.is_progress_bar_enabled() == before


def test_an_empty_run_has_no_checkpoint(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "none").latest() is None
    assert not (tmp_path / "none").exists()
