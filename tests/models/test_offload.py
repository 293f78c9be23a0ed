"""Frozen models wait in host memory, come to the device for their phase, and go back without a copy."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from fastrlhf import PPOConfig, PPOTrainer
from fastrlhf.models import heads, loading, saving
from fastrlhf.models.offload import Offload
from tests import tiny
from tests.runs import read
from tests.stage_runs import differing

PROMPTS = [tiny.chat(p) for p in tiny.PROMPTS]
CPU = torch.device("cpu")


class SecondDevice(TorchFunctionMode):
    """`tensor.to(device, non_blocking=True)`, the way to the device, makes a copy, as it does where there is a GPU. Ids
    and places, which are int64, go that way too, and the number by which AdamW clips, which is there already; weights
    are none."""

    def __init__(self) -> None:
        self.copies: list[torch.Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        moved = function is torch.Tensor.to and (kwargs or {}).get("non_blocking")
        if moved and args[0].dtype != torch.int64 and args[0].dim() > 0:
            result = result.clone()
            self.copies.append(result)
        return result


def addresses(model) -> list[int]:
    return [t.data_ptr() for t in (*model.parameters(), *model.buffers())]


def trainer(**fields: object) -> PPOTrainer:
    base = {"total_steps": 2, "rollout_batch_size": 8, "mini_batch_size": 4, "max_new_tokens": 10, "eval_every": 1,
            "learning_rate": 1e-3, "critic_learning_rate": 1e-3, "micro_batch_tokens": 60}  # fmt: skip
    return PPOTrainer(
        PPOConfig(**{**base, **fields}), policy=tiny.llama(), tokenizer=tiny.tokenizer(), prompts=PROMPTS,
        reward=loading.scalar_model(tiny.llama(seed=5), tiny.tokenizer(), seed=1), eval_prompts=PROMPTS[:2],
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_and_go_with_dtype_and_bytes(dtype):
    model = loading.freeze(tiny.llama(tie_word_embeddings=True).to(dtype))
    model.register_buffer("mask", torch.ones(3, dtype=torch.bool))
    before, ids = {k: v.clone() for k, v in model.state_dict().items()}, torch.arange(5)[None]
    want = heads.hidden_states(model, ids)
    offload, homes = Offload(CPU), addresses(model)
    offload.park(model)
    assert addresses(model) == homes  # it was in host memory already
    with SecondDevice() as device, offload.here(model) as found:
        assert found is model and not set(addresses(model)) & set(homes)
        assert len(device.copies) == len(homes)  # a tied weight once
        assert torch.equal(heads.hidden_states(model, ids), want)
        with offload.here(model):  # here already
            assert len(device.copies) == len(homes)
        assert not set(addresses(model)) & set(homes)
    assert addresses(model) == homes and model.lm_head.weight is model.model.embed_tokens.weight
    after = model.state_dict()
    assert all(torch.equal(before[k], v) and v.dtype == before[k].dtype for k, v in after.items())
    assert after["model.norm.weight"].dtype == dtype and after["mask"].dtype == torch.bool


def test_it_goes_home_after_an_error_and_what_is_not_parked_stays():
    model, other = loading.freeze(tiny.llama()), tiny.llama(seed=1)
    offload, homes = Offload(CPU), addresses(model)
    offload.park(model)
    with SecondDevice() as device:
        for _ in range(2):
            with pytest.raises(KeyError), offload.here(model):
                raise KeyError
            assert addresses(model) == homes
        assert len(device.copies) == 2 * len(homes)
        with offload.here(other) as same, offload.here(None) as nothing:
            assert same is other and nothing is None and len(device.copies) == 2 * len(homes)


@pytest.mark.parametrize("form", [{}, {"critic": "shared_trunk"}, {"lora": 4}])
def test_a_run_has_the_same_bytes_and_moves_each_model_once_a_phase(tmp_path, form):
    plain = trainer(**form, output_dir=str(tmp_path / "plain"))
    plain.train()
    ours = trainer(**form, offload=True, output_dir=str(tmp_path / "ours"))
    frozen = [ours.scorer.model] + ([] if ours.ref_policy is None else [ours.ref_policy])
    homes = [addresses(model) for model in frozen]
    assert (ours.ref_policy is None) == ("lora" in form)  # the reference is the policy's base then
    places: dict[str, set[bool]] = {"score": set(), "update": set(), "reference": set()}

    def watch(name: str, running, model, home: list[int]) -> None:
        def hook(*_: object) -> None:
            if name != "update" or torch.is_grad_enabled():
                places[name].add(addresses(model) == home)

        running.base_model.register_forward_hook(hook)

    for name, model, home in zip(("score", "reference"), frozen, homes, strict=False):
        watch(name, model, model, home)
        watch("update", ours.policy, model, home)
    with SecondDevice() as device:
        ours.train()
    assert places["score"] == {False} and places["update"] == {True}  # at work on the device, at home in the update
    assert places["reference"] == (set() if "lora" in form else {False})
    evaluations, steps, baseline = 3, 2, 1  # the SFT model's replies to the held-out prompts, before step 1
    moves = len(homes[0]) * (steps + evaluations + baseline)
    moves += 0 if "lora" in form else len(homes[1]) * (steps + baseline)
    assert len(device.copies) == moves
    assert differing(plain, ours) == [] and [addresses(model) for model in frozen] == homes
    assert read(tmp_path / "plain" / "metrics.jsonl") == read(tmp_path / "ours" / "metrics.jsonl")


class Side:
    """Stands for the stream of its own: copies are begun, and are there once they are waited for."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def begin(self, copies):
        self.said.append("begin")
        return copies

    def join(self, there) -> None:
        self.said.append("join")
        there()


def fetching(monkeypatch, *, room: int) -> tuple[Offload, Side]:
    """room: bytes that are free beside the eighth that is spared."""
    monkeypatch.setattr("fastrlhf.models.offload.free_bytes", lambda device: 100 + room)
    monkeypatch.setattr("fastrlhf.models.offload.total_bytes", lambda device: 800)
    side = Side()
    return Offload(CPU, side), side


def test_a_model_is_fetched_beside_the_phase_before_its_own(monkeypatch):
    model, ids = loading.freeze(tiny.llama(tie_word_embeddings=True)), torch.arange(5)[None]
    want, homes = heads.hidden_states(model, ids), addresses(model)
    offload, side = fetching(monkeypatch, room=1 << 30)
    assert not offload.fetch(model) and not offload.fetch(None)  # not parked
    offload.park(model)
    with SecondDevice() as device:
        for _ in range(2):
            assert offload.fetch(model) and offload.fetch(model)
            assert addresses(model) == homes  # until its phase
            with offload.here(model):
                assert not set(addresses(model)) & set(homes)
                assert torch.equal(heads.hidden_states(model, ids), want)
                assert not offload.fetch(model)  # here already
            assert addresses(model) == homes
        with offload.here(model):
            pass
    assert side.said == ["begin", "join"] * 2 and len(device.copies) == len(homes)  # the last time only


def test_no_model_is_fetched_without_room_nor_after_memory_was_short(monkeypatch):
    model = loading.freeze(tiny.llama())
    size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    for room, fits in ((size, True), (size - 1, False)):
        offload, side = fetching(monkeypatch, room=room)
        offload.park(model)
        assert offload.fetch(model) is fits and side.said == ["begin"] * fits
        assert offload.give_back() is fits and side.said == ["begin", "join"] * fits
        assert not offload.give_back()
    offload, side = fetching(monkeypatch, room=size)
    offload.park(model)
    offload.fetch(model)
    offload.forget(model)
    assert side.said == ["begin", "join"] and not offload.give_back()


@pytest.mark.parametrize("room", [0, 1 << 30])
def test_a_run_that_fetches_early_has_the_same_bytes(monkeypatch, tmp_path, room):
    """The reward model while the rollout runs, the reference while it is scored."""
    plain = trainer(total_steps=1, eval_every=0, output_dir=str(tmp_path / "plain"))
    plain.train()
    ours = trainer(total_steps=1, eval_every=0, output_dir=str(tmp_path / "ours"), offload=True)
    _, side = fetching(monkeypatch, room=room)
    ours.roles.offload.side = side
    ours.train()
    assert side.said == (["begin", "begin", "join", "join"] if room else [])
    assert differing(plain, ours) == []


def test_nothing_holds_the_copies_on_the_device():
    ours = trainer(offload=True, eval_every=0, total_steps=1)
    with SecondDevice() as device:
        ours.train()
    memory = [StorageWeakRef(t.untyped_storage()) for t in device.copies]
    assert memory and not any(m.expired() for m in memory)
    device.copies.clear()
    assert all(m.expired() for m in memory)


def test_without_offload_nothing_is_parked():
    t = trainer(total_steps=1)
    with SecondDevice() as device:
        t.train()
    assert device.copies == []


def test_frozen_models_run_in_inference_mode_and_in_the_compute_dtype(tmp_path):
    """What they give may still enter autograd: kl_in=loss differentiates beside the reference's log-probs."""
    saving.write_model(tmp_path / "policy", tiny.llama(), tiny.tokenizer(), [1])
    reward = loading.scalar_model(tiny.llama(seed=5), tiny.tokenizer(), seed=1)
    saving.write_model(tmp_path / "reward", reward, tiny.tokenizer(), [1])
    cfg = PPOConfig(
        total_steps=1, rollout_batch_size=4, mini_batch_size=4, max_new_tokens=6, eval_every=0, dtype="bf16",
        kl_in="loss", learning_rate=1e-3,
    )  # fmt: skip
    t = PPOTrainer(cfg, policy=str(tmp_path / "policy"), reward=str(tmp_path / "reward"), prompts=PROMPTS)
    modes = []
    for model in (t.ref_policy, t.scorer.model):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        model.base_model.register_forward_hook(lambda *_: modes.append(torch.is_inference_mode_enabled()))
    step = next(iter(t))
    assert modes == [True, True] and step.metrics["policy/grad_norm"] > 0
