"""The reference that follows the policy: equal to it bit for bit after each refresh, whatever form it has."""

from __future__ import annotations

import pytest
import torch

from fastrlhf import UserError
from fastrlhf.models import heads
from tests import tiny
from tests.runs import copies, ppo_trainer, read, resumed_equals_whole, same, storages

FORMS = {
    "separate": {},
    "shared trunk": {"critic": "shared_trunk"},
    "lora": {"lora": 4},
    "lora, shared trunk": {"lora": 4, "critic": "shared_trunk"},
}


def reference_states(t) -> torch.Tensor:
    with torch.no_grad(), t.roles.reference() as model:
        return heads.hidden_states(model, torch.arange(3, 12)[None])


@pytest.mark.parametrize("form", FORMS)
def test_the_kl_is_exactly_zero_in_the_step_after_a_refresh(form, tmp_path):
    fields = {**FORMS[form], "ref_refresh_every": 2, "total_steps": 4, "output_dir": str(tmp_path / "run")}
    t = ppo_trainer(**fields)
    kls, moved, last = [], [], reference_states(t)
    for step in t:
        kls.append(step.metrics["kl/ref"])
        now = reference_states(t)
        moved.append(not torch.equal(now, last))
        last = now
        if len(kls) % 2 == 0:
            with torch.no_grad():
                assert torch.equal(now, heads.hidden_states(t.policy, torch.arange(3, 12)[None]))
    assert [kl == 0.0 for kl in kls] == [True, False] * 2  # steps 1 and 3 begin at the reference
    assert moved == [False, True] * 2
    said = [e["message"] for e in read(tmp_path / "run" / "events.jsonl") if e["kind"] == "ref_refresh"]
    assert said == [f"the policy after step {n} is the reference now, and its optimizer starts anew" for n in (2, 4)]


def test_the_policy_s_optimizer_starts_anew_at_a_refresh_and_the_critic_s_goes_on():
    t = ppo_trainer(ref_refresh_every=2, total_steps=3)
    policy, critic = (optimizer.inner.state for optimizer in t.learner.optimizers())
    counts = [({int(s["step"]) for s in policy.values()}, {int(s["step"]) for s in critic.values()}) for _ in t]
    assert counts == [({2}, {2}), (set(), {4}), ({2}, {6})]


def test_without_it_the_kl_only_starts_at_zero():
    kls = [step.metrics["kl/ref"] for step in ppo_trainer(total_steps=4)]
    assert kls[0] == 0.0 and all(kls[1:])


def test_the_adapter_of_the_reference_is_frozen_and_the_base_at_first():
    plain, t = ppo_trainer(lora=4), ppo_trainer(lora=4, ref_refresh_every=3)
    assert same([reference_states(t)], [reference_states(plain)])
    frozen = t.roles.adapters.parameters("reference")
    assert len(frozen) == 28 and not any(p.requires_grad for p in frozen.values())
    trained = [id(p) for o in (t.learner.policy_optimizer, t.learner.value_optimizer) for p in o.params]
    assert not {id(p) for p in frozen.values()} & set(trained)
    before, other = copies(frozen.values()), [step.metrics for step in plain]
    assert [next(iter(t)).metrics["policy/loss"]] == [other[0]["policy/loss"]]
    assert same(before, copies(frozen.values()))


def test_with_lora_no_second_model_is_held():
    base = sum(p.numel() * 4 for p in {id(p): p for p in tiny.llama(hidden_size=64).parameters()}.values())
    t = ppo_trainer(policy=tiny.llama(hidden_size=64), lora=1, ref_refresh_every=1)
    t.train()
    assert storages(t) < 1.2 * base


@pytest.mark.parametrize("form", ["separate", "lora"])
def test_a_reference_that_was_given_is_replaced(form):
    t = ppo_trainer(**FORMS[form], ref_policy=tiny.llama(seed=5), ref_refresh_every=2, total_steps=3)
    kls = [step.metrics["kl/ref"] for step in t]
    assert kls[0] != 0.0 and kls[1] != 0.0 and kls[2] == 0.0


def test_a_reference_of_another_shape_is_refused():
    with pytest.raises(UserError, match="ref_refresh_every = 2: the policy does not fit into ref_policy"):
        ppo_trainer(ref_policy=tiny.llama(intermediate_size=48), ref_refresh_every=2)


@pytest.mark.parametrize(("form", "leave_after"), [("separate", 1), ("separate", 2), ("lora", 2), ("given", 1)])
def test_a_resumed_run_ends_with_the_same_bytes(form, leave_after, tmp_path):
    """Left before the first refresh, and right behind it."""
    fields = {"lora": 2, "ref_policy": tiny.llama(seed=5)} if form == "given" else FORMS[form]
    files = resumed_equals_whole(tmp_path, leave_after, **fields, ref_refresh_every=2, total_steps=4)
    assert "reference.safetensors" in files
