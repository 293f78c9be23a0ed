"""Learning rates, and optimizer steps that neither bf16 nor a bad gradient can spoil."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from fastrlhf.config.errors import UserError
from fastrlhf.runtime.optim import Optimizer, lr_at
from tests import tiny

# ------------------------------------------------------------------------------------------------------ learning rates


def rates(schedule: str, warmup_steps: int, total_steps: int) -> list[float]:
    options = {"base": 2.0, "schedule": schedule, "warmup_steps": warmup_steps, "total_steps": total_steps}
    return [lr_at(step, **options) for step in range(total_steps + 2)]


@pytest.mark.parametrize(
    ("schedule", "after"),
    [
        ("constant", [2.0, 2.0, 2.0, 2.0, 2.0, 2.0]),
        ("linear", [2.0, 1.5, 1.0, 0.5, 0.0, 0.0]),
        ("cosine", [2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5), 0.0, 0.0]),
        ("inverse_sqrt", [2.0 * math.sqrt(4 / step) for step in (5, 6, 7, 8, 9, 10)]),
    ],
)
def test_every_schedule_after_warm_up(schedule, after):
    assert rates(schedule, 4, 8) == pytest.approx([0.5, 1.0, 1.5, 2.0, *after])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "inverse_sqrt"])
def test_schedules_without_warm_up_start_at_the_base_and_never_rise(schedule):
    values = rates(schedule, 0, 10)
    assert values[0] == 2.0
    assert values == sorted(values, reverse=True) and min(values) >= 0
    assert lr_at(0, base=2.0, schedule=schedule, warmup_steps=0, total_steps=0) == 2.0


def test_warm_up_longer_than_the_run_only_rises():
    assert rates("cosine", 8, 4) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.25, 1.5])


# --------------------------------------------------------------------------------------------------- optimizer steps


def test_the_norm_of_a_large_gradient_is_exact_to_fp32():
    """torch's own, over all of it at once, is off by 3e-5 on a CPU."""
    weight = nn.Parameter(torch.zeros(2000, 1000))
    optimizer = Optimizer({"weight": weight}, name="adamw", learning_rate=1e-3, max_grad_norm=1.0)
    weight.grad = torch.randn(1000, 2000, generator=torch.Generator().manual_seed(0)).t()
    exact = float(weight.grad.double().square().sum().sqrt())
    assert optimizer.gradient_norm() == pytest.approx(exact, rel=1e-6)


def net(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)
    model[0].bias.requires_grad_(False)
    return model


def optimizer(model: nn.Module, **changes: object) -> Optimizer:
    return Optimizer(model, **{"name": "adamw", "learning_rate": 1e-2, "max_grad_norm": 1.0, **changes})


def backward(model: nn.Sequential, seed: int, scale: float = 1.0) -> None:
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(seed)).to(model[0].weight.dtype)
    (model(x).float().square().sum() * scale).backward()


@pytest.mark.parametrize("limit", [1.0, 1e9])
def test_fp32_is_plain_torch_adamw_bit_for_bit(limit):
    """But for the last bit of a gradient that is clipped: AdamW divides where torch's clipping multiplies."""
    ours, theirs = net(), net()
    opt = optimizer(ours, max_grad_norm=limit)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    plain = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0, fused=True)
    for step in range(5):
        lr = lr_at(step, base=1e-2, schedule="linear", warmup_steps=2, total_steps=5)
        for part in (0, 1):
            backward(ours, 2 * step + part)
            backward(theirs, 2 * step + part)
        result = opt.step(lr)
        norm = nn.utils.clip_grad_norm_(trained, limit)
        plain.param_groups[0]["lr"] = lr
        plain.step()
        plain.zero_grad()
        assert result.applied and result.grad_norm == pytest.approx(float(norm), rel=1e-5) and 1.0 < norm < 1e9
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if limit == 1.0 else 0, atol=1e-7 if limit == 1.0 else 0)
    assert not torch.equal(ours[2].weight, net()[2].weight)
    assert torch.equal(ours[0].bias, net()[0].bias)  # frozen
    assert opt.master_tensors() == {} and opt.masters[0] is opt.params[0]


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_clipping_is_torchs_and_zero_is_none(scale, max_grad_norm):
    ours, theirs = net(), net()
    backward(ours, 1, scale)
    backward(theirs, 1, scale)
    norm = nn.utils.clip_grad_norm_(theirs.parameters(), max_grad_norm or math.inf)
    opt = optimizer(ours, max_grad_norm=max_grad_norm)
    seen = []
    opt.inner.register_step_post_hook(lambda *_: seen.extend(p.grad.clone() for p in opt.masters))
    assert opt.step(1e-3).grad_norm == float(norm)
    for a, b in zip(seen, [p.grad for p in theirs.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_a_step_clears_the_gradients():
    model = net()
    opt = optimizer(model)
    backward(model, 0)
    opt.step(1e-3)
    assert all(p.grad is None for p in model.parameters())
    before = copy.deepcopy(model.state_dict())
    assert opt.step(1e-3) == (0.0, True)  # nothing arrived, nothing moves
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# -------------------------------------------------------------------------------------------------------------- bf16


def test_small_updates_of_a_bf16_model_add_up():
    """AdamW with a constant gradient moves a weight by the learning rate a step; 1e-4 of 1.0 is lost in bf16."""
    model = nn.Linear(4, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    opt = optimizer(model, learning_rate=1e-4)
    for step in range(1, 101):
        model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        opt.step(1e-4)
        assert opt.masters[0].detach().sub(1 - step * 1e-4).abs().max() < 2e-6
        assert torch.equal(model.weight, opt.masters[0].to(torch.bfloat16))
    assert model.weight.dtype == torch.bfloat16 and opt.masters[0].dtype == torch.float32
    assert (model.weight < 1).all()


def test_bf16_gradients_of_micro_batches_add_in_fp32():
    """256 + 1 + 1 + 1 + 1 is 256 in bf16, however often a 1 is added."""
    model = nn.Linear(2, 1, bias=False).to(torch.bfloat16)
    opt = optimizer(model, max_grad_norm=0.0)
    for value in (256.0, 1.0, 1.0, 1.0, 1.0):
        model(torch.full((1, 2), value, dtype=torch.bfloat16)).sum().backward()
        assert model.weight.grad is None  # memory: no second gradient stays
    assert opt.masters[0].grad.tolist() == [[260.0, 260.0]]
    assert opt.step(0.0).grad_norm == pytest.approx(260 * math.sqrt(2))


def test_a_tied_weight_has_one_master():
    model = tiny.llama(tie_word_embeddings=True).bfloat16()
    opt = optimizer(model)
    names = [name for name, _ in model.named_parameters()]
    assert len(opt.masters) == len(names) and "lm_head.weight" not in names
    model(torch.tensor([[5, 6, 7]])).logits.float().square().sum().backward()
    opt.step(1e-2)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, opt.masters[0].bfloat16())


def test_masters_survive_a_checkpoint():
    first, second = net(torch.bfloat16), net(torch.bfloat16, seed=1)
    one, two = optimizer(first), optimizer(second)
    for step in range(3):
        backward(first, step)
        one.step(1e-4)
    second.load_state_dict(first.state_dict())
    two.inner.load_state_dict(copy.deepcopy(one.inner.state_dict()))  # or they share the moments
    two.load_masters({name: tensor.clone() for name, tensor in one.master_tensors().items()})
    assert len(one.master_tensors()) == 3
    for model, opt in ((first, one), (second, two)):
        backward(model, 9)
        opt.step(1e-4)
    assert all(map(torch.equal, one.masters, two.masters))
    assert all(map(torch.equal, first.parameters(), second.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_optimizer_of_the_same_model_takes_over(dtype):
    """SFT and then PPO on one loaded model."""
    model = net(dtype)
    earlier = optimizer(model)
    backward(model, 0)
    earlier.step(1e-3)
    later = optimizer(model)
    before = [p.detach().clone() for p in later.params]
    backward(model, 1)
    assert dtype == torch.float32 or all(master.grad is None for master in earlier.masters)
    assert later.step(1e-1).grad_norm > 0
    assert not any(map(torch.equal, before, later.params))


# ------------------------------------------------------------------------------------------------- bad gradients


def snapshot(model: nn.Module, opt: Optimizer) -> list[torch.Tensor]:
    state = [value for entry in opt.inner.state.values() for value in entry.values()]
    return [tensor.detach().clone() for tensor in (*model.parameters(), *opt.masters, *state)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(dtype, bad):
    model = net(dtype)
    opt = optimizer(model)
    for step in range(2):
        backward(model, step)
        opt.step(1e-2)
    before = snapshot(model, opt)
    backward(model, 2)
    opt.masters[1].grad.view(-1)[0] = bad
    result = opt.step(1e-2)
    assert not math.isfinite(result.grad_norm) and result.applied is False
    assert all(map(torch.equal, snapshot(model, opt), before))
    assert all(p.grad is None for p in (*opt.params, *opt.masters))
    backward(model, 3)  # and the next one counts
    assert opt.step(1e-2).applied is True
    assert not torch.equal(model[2].weight, before[2])


# ------------------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw8bit"])
def test_eight_bit_without_its_package_names_the_extra(name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(UserError, match=f"optimizer: '{name}' needs .*bitsandbytes.*extra '8bit'.* use 'adamw'"):
        optimizer(net(), name=name)
