"""The average of the policy's weights against float64, and where it is used."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastrlhf.rl.extras import WeightAverage
from fastrlhf.runtime.optim import Optimizer
from tests import tiny
from tests.runs import PROMPTS, copies, ppo_trainer, resumed_equals_whole, same

FORMS = {"whole": {}, "lora": {"lora": 4}, "shared trunk": {"critic": "shared_trunk"}}


@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_exponential_average_of_every_applied_update(form):
    """float64, from the weights at the start; a skipped update does not count."""
    t = ppo_trainer(**FORMS[form], ema_decay=0.9, total_steps=2, ppo_epochs=2)
    optimizer, applied = t.learner.policy_optimizer, []
    want = [p.detach().double() for p in optimizer.params]
    assert same(t.learner.average.weights, copies(optimizer.params))

    def follow(*_):  # behind every update that is applied
        applied.append(t.learner.policy_updates)
        want[:] = [0.9 * e + 0.1 * p.detach().double() for e, p in zip(want, optimizer.params, strict=True)]

    optimizer.inner.register_step_post_hook(follow)
    optimizer.params[0].register_hook(lambda grad: grad * (torch.nan if t.learner.policy_updates == 3 else 1.0))
    t.train()
    assert applied == [0, 1, 2, 4, 5, 6, 7] and t.learner.policy_updates == 8
    for got, expected in zip(t.learner.average.weights, want, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-7)
    assert not same(t.learner.average.weights, copies(optimizer.params))


def test_of_a_bf16_model_the_fp32_masters_are_averaged_and_its_bytes_come_back():
    model = torch.nn.Linear(8, 8).bfloat16()
    options = {"name": "adamw", "learning_rate": 1e-3, "max_grad_norm": 1.0}
    optimizer = Optimizer(model, **options)
    average = WeightAverage(optimizer, 0.5)
    want = [m.detach().double() for m in optimizer.masters]
    for _ in range(5):
        model(torch.ones(2, 8, dtype=torch.bfloat16)).float().square().sum().backward()
        optimizer.step(1e-3)
        average.update()
        want = [0.5 * e + 0.5 * m.detach().double() for e, m in zip(want, optimizer.masters, strict=True)]
    for got, expected in zip(average.weights, want, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-8)
    live, averages = copies(model.parameters()), copies(average.weights)
    with average.applied():
        assert same(copies(model.parameters()), [w.bfloat16() for w in averages])
        assert not same(copies(model.parameters()), live)
    assert same(copies(model.parameters()), live) and same(average.weights, averages)


def test_inside_the_model_is_the_average_and_behind_it_the_very_bytes_come_back():
    t = ppo_trainer(ema_decay=0.9)
    t.train()
    live, averages = copies(t.policy.parameters()), copies(t.learner.average.weights)
    places = [p.data_ptr() for p in t.policy.parameters()]
    with pytest.raises(InterruptedError), t.averaged():
        with t.averaged():  # evaluation may save
            assert same(copies(t.policy.parameters()), averages)
        assert same(copies(t.policy.parameters()), averages)
        assert [p.data_ptr() for p in t.policy.parameters()] == places  # decoding graphs hold addresses
        raise InterruptedError
    assert same(copies(t.policy.parameters()), live) and same(t.learner.average.weights, averages)


@pytest.mark.parametrize("form", FORMS)
def test_evaluation_and_every_export_use_the_average_and_nothing_else_does(form, tmp_path):
    """A decay near 1: the average stays where training started, while the live weights move."""
    fields = {**FORMS[form], "eval_every": 2, "total_steps": 4, "eval_prompts": PROMPTS[:3]}
    live = ppo_trainer(**fields)
    live_steps = [step.metrics for step in live]
    t = ppo_trainer(**fields, ema_decay=1 - 1e-7, output_dir=str(tmp_path / "run"))
    first = t.evaluate()
    steps = [step.metrics for step in t]
    assert steps[-1]["reward/eval"] == first["reward/eval"] and live_steps[-1]["reward/eval"] != first["reward/eval"]
    assert [m["reward/mean"] for m in steps] == [m["reward/mean"] for m in live_steps]
    assert same(copies(t.policy.parameters()), copies(live.policy.parameters()))
    t.save(tmp_path / "final")
    start = tiny.llama().state_dict()
    for folder in (tmp_path / "final", tmp_path / "run" / "best"):
        saved = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for name, tensor in start.items():
            torch.testing.assert_close(saved[name], tensor, rtol=0, atol=1e-5)
    assert not same(copies(t.policy.parameters()), copies(ppo_trainer(**FORMS[form]).policy.parameters()))


def test_the_adapter_alone_is_saved_averaged_too(tmp_path):
    from safetensors.torch import load_file

    t = ppo_trainer(lora=4, ema_decay=0.5)
    t.train()
    t.save(tmp_path / "adapter", adapter=True)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    names = [f"base_model.model.{n.replace('.policy.', '.')}" for n in t.roles.adapters.parameters("policy")]
    assert same([saved[name] for name in names], t.learner.average.weights)


@pytest.mark.parametrize("form", ["whole", "lora"])
def test_a_resumed_run_ends_with_the_same_bytes(form, tmp_path):
    files = resumed_equals_whole(tmp_path, 2, **FORMS[form], ema_decay=0.9, total_steps=3, eval_every=1,
                                 eval_prompts=PROMPTS[:2])  # fmt: skip
    assert "ema.safetensors" in files
