"""The 8-bit optimizers of bitsandbytes on the CPU: they train, their state is small and comes back to the byte."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bench.optimizers import state_bytes
from fastrlhf.checkpoint.state import load_optimizer_tensors, optimizer_tensors
from fastrlhf.runtime.optim import Optimizer
from tests.runs import train_keeping
from tests.stage_runs import build, differing, everything

NAMES = pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw8bit"])
pytestmark = [
    pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # the paged ones say on a CPU that they are not paged there
]


def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512, bias=False), nn.Tanh(), nn.Linear(512, 64)).to(dtype)
    return model, Optimizer(model, name=name, learning_rate=1e-2, max_grad_norm=1.0)


def steps(model: nn.Module, optimizer: Optimizer, count: int, seed: int = 0) -> list[float]:
    torch.manual_seed(seed)
    dtype, losses = next(model.parameters()).dtype, []
    x, y = torch.randn(32, 256), torch.randn(32, 64)
    for _ in range(count):
        loss = (model(x.to(dtype)).float() - y).square().mean()
        loss.backward()
        optimizer.step(1e-2)
        losses.append(float(loss.detach()))
    return losses


@NAMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_train_almost_as_adamw_does(name, dtype):
    model, optimizer = made(name, dtype)
    plain, reference = made("adamw", dtype)
    start = [p.detach().clone() for p in reference.masters]
    losses, wanted = steps(model, optimizer, 20), steps(plain, reference, 20)
    assert losses[-1] < 0.5 * losses[0] and losses[-1] == pytest.approx(wanted[-1], rel=0.2, abs=0.02)
    off = sum(float((a - b).detach().square().sum()) for a, b in zip(optimizer.masters, reference.masters))
    way = sum(float((a - b).detach().square().sum()) for a, b in zip(reference.masters, start))
    assert 0 < off < 0.15**2 * way


@NAMES
def test_large_tensors_take_two_bytes_a_parameter(name):
    """Two moments of 8 bits, and for each 256 of them an fp32 scale: 2 (1 + 4 / 256) = 2.03."""
    model = nn.Linear(1024, 512, bias=False)
    optimizer = Optimizer(model, name=name, learning_rate=1e-3, max_grad_norm=1.0)
    model(torch.randn(2, 1024)).sum().backward()
    optimizer.step(1e-3)
    state = next(iter(optimizer.inner.state.values()))
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    assert 2.03 <= state_bytes(optimizer) / (1024 * 512) < 2.05
    plain = Optimizer(nn.Linear(1024, 512, bias=False), name="adamw", learning_rate=1e-3, max_grad_norm=1.0)
    plain.masters[0].grad = torch.ones_like(plain.masters[0])
    plain.step(1e-3)
    assert state_bytes(plain) == 8 * 1024 * 512


@NAMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_comes_back_to_the_byte(name, dtype, tmp_path: Path):
    model, optimizer = made(name, dtype)
    steps(model, optimizer, 3)
    tensors, data = optimizer_tensors(optimizer.inner, "o")
    assert {t.dtype for t in tensors.values()} >= {torch.uint8, torch.float32}
    save_file({k: v.clone() for k, v in (tensors | optimizer.master_tensors()).items()}, tmp_path / "o.safetensors")
    other, again = made(name, dtype)
    other.load_state_dict(model.state_dict())
    saved = load_file(tmp_path / "o.safetensors")
    again.load_masters(saved)
    load_optimizer_tensors(again.inner, {k: v for k, v in saved.items() if k.startswith("o.")}, data)
    back, _ = optimizer_tensors(again.inner, "o")
    assert back.keys() == tensors.keys() and all(torch.equal(back[k], tensors[k]) for k in back)
    assert steps(model, optimizer, 3, seed=1) == steps(other, again, 3, seed=1)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert all(map(torch.equal, optimizer.masters, again.masters))


@pytest.mark.parametrize(
    ("stage", "fields"),
    [
        ("sft", {"optimizer": "adamw8bit"}),
        ("reward", {"optimizer": "paged_adamw8bit"}),
        ("reward", {"optimizer": "adamw8bit", "lora": 8}),
        ("ppo", {"optimizer": "adamw8bit"}),
        ("ppo", {"optimizer": "paged_adamw8bit", "lora": 8}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_a_resumed_run_ends_with_the_same_bytes(stage, fields, tmp_path):
    through = build(stage, **fields, output_dir=str(tmp_path / "through"))
    train_keeping(through, 2, tmp_path / "resumed")
    again = build(stage, **fields, output_dir=str(tmp_path / "resumed"), resume=True)
    assert again.steps_done == 2
    again.train()
    assert differing(through, again) == []
    kept = [t for n, t in everything(through).items() if ".optimizer." in n and t.dtype == torch.uint8]
    assert kept or fields.get("lora")  # an adapter of this tiny model is below 4096 elements: its state stays fp32
    assert (tmp_path / "through/metrics.jsonl").read_bytes() == (tmp_path / "resumed/metrics.jsonl").read_bytes()


def test_an_update_that_is_not_finite_leaves_the_quantised_state():
    model, optimizer = made("adamw8bit")
    steps(model, optimizer, 2)
    before = {k: v.clone() for k, v in optimizer_tensors(optimizer.inner, "o")[0].items()}
    model(torch.randn(1, 256)).sum().backward()
    optimizer.masters[0].grad.view(-1)[0] = float("nan")
    assert optimizer.step(1e-2).applied is False
    after = optimizer_tensors(optimizer.inner, "o")[0]
    assert all(torch.equal(before[k], after[k]) for k in before)
