"""Training without padding: sequences joined in one row give the gradients, metrics and updates of padded rows."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F
from transformers import AttentionInterface

from fastrlhf import PPOTrainer, UserError
from fastrlhf.models.token_batch import TokenRows, joined, resolve_packing
from fastrlhf.rl.experience import plan_epochs
from tests import tiny
from tests.models.test_attention import varlen
from tests.runs import experience_of, last_layer, ppo_trainer

MODELS = {"llama": tiny.llama, "gpt2": tiny.gpt2}  # rotary and learned positions
FORMS = {"separate": {}, "shared_trunk": {"critic": "shared_trunk"}, "lora": {"lora": 4}}


trainer = partial(ppo_trainer, total_steps=1, mini_batch_size=8, learning_rate=1e-3, critic_learning_rate=1e-3)


def gradients(t: PPOTrainer, tokens: int) -> dict[str, list[torch.Tensor]]:
    """Of the policy's and the critic's loss on a whole rollout, off the first policy: ratios and clips are at work."""
    rollout = t.rollout([t.prompts[i % len(t.prompts)] for i in range(8)], 1, purpose="rollout")
    experience, _, _ = experience_of(t, rollout)
    noise = torch.randn(experience.old_log_probs.shape, generator=torch.Generator().manual_seed(1))
    experience = replace(experience, old_log_probs=experience.old_log_probs + 0.3 * noise)
    t.memory.first_budget = tokens
    joint = t.critic.shares_trunk
    passes = {"policy": (True, joint)} if joint else {"critic": (False, True), "policy": (True, False)}
    found = {}
    for name, (policy, critic) in passes.items():
        t.learner.accumulate(rollout.rows, experience, list(range(8)), policy=policy, critic=critic)
        found[name] = [p.grad.clone() for o in t.learner.optimizers() for p in o.masters if p.grad is not None]
        t.learner.drop_gradients()
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_padded_rows(name, form):
    """fp32, 1e-6 of the largest: joined in one row, in several, padded, and one row at a time."""
    results = {}
    for packing in (False, True):
        for tokens in (1, 60, 10_000):
            t = trainer(policy=MODELS[name](), packing=packing, **FORMS[form])
            torch.nn.init.normal_(last_layer(t).weight, std=0.1, generator=torch.Generator().manual_seed(2))
            results[packing, tokens] = gradients(t, tokens)
    want = results[False, 1]
    for role, grads in want.items():
        largest = max(float(g.abs().max()) for g in grads)
        assert largest > 0.01 and len(grads) > 2
        for key, other in results.items():
            worst = max(float((a - b).abs().max()) for a, b in zip(grads, other[role], strict=True))
            assert worst <= 1e-6 * largest, (role, key)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_the_first_update_has_ratio_exactly_one(name, form):
    t = trainer(policy=MODELS[name](), packing=True, micro_batch_tokens=70, **FORMS[form])
    rows = []
    t.policy.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    step = next(iter(t))
    assert step.metrics["policy/ratio"] == 1.0 and step.metrics["kl/approx"] == 0.0 == step.metrics["kl/ref"]
    lengths = [len(p) + len(r) for p, r in zip(step.rollout.prompt_ids, step.rollout.response_ids, strict=True)]
    groups = step.rollout.rows.micro_batches(plan_epochs(t.config, 8, 0)[0][0], t.memory.tokens)
    trained = [(1, sum(lengths[i] for i in group)) for group in groups]
    assert len(trained) > 1 and rows[-len(trained) :] == trained  # one row each, and not a token of padding


def test_metrics_and_updates_are_those_of_padded_rows():
    runs = []
    for packing in (False, True):
        t = trainer(packing=packing, total_steps=2, mini_batch_size=4, ppo_epochs=2, micro_batch_tokens=60)
        runs.append(([step.metrics for step in t], copy.deepcopy(t.policy.state_dict())))
    for a, b in zip(*(metrics for metrics, _ in runs), strict=True):
        assert a == pytest.approx(b, rel=2e-4, abs=2e-6)
    for a, b in zip(*(state.values() for _, state in runs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_a_packed_batch_by_hand():
    prompts, responses = [[5, 6, 7], [4]], [[8, 9], [3, 2, 1]]
    batch = TokenRows(prompts, responses, joined=True).batch([0, 1], torch.device("cpu"))
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 4, 3, 2, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert batch.index.tolist() == [2, 3, 5, 6, 7] and batch.labels.tolist() == [8, 9, 3, 2, 1]
    assert [t.shape for t in joined([[1], [2]], torch.device("cpu"))] == [(1, 2), (1, 2)]


def test_only_states_of_response_tokens_reach_the_head():
    t = trainer(packing=True)
    rollout = t.rollout(t.prompts[:3], 1, purpose="rollout")
    batch = rollout.rows.batch([2, 0], t.device)
    states = batch.hidden(t.policy)
    assert states.shape == (len(rollout.response_ids[2]) + len(rollout.response_ids[0]), 32)
    assert len(states) < batch.input_ids.numel()


def test_gradient_checkpointing_gives_the_same_gradients():
    for packing in (False, True):
        for form in FORMS.values():
            plain, again = (
                gradients(trainer(packing=packing, gradient_checkpointing=c, **form), 60) for c in (False, True)
            )
            for role in plain:
                for a, b in zip(plain[role], again[role], strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def causal(module, query, key, value, attention_mask, *, scaling, **kwargs):
    """Attention that makes nothing of positions: packed rows see each other."""
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


def test_auto_packs_where_a_flash_attention_keeps_sequences_apart():
    """Stand-ins in plain torch under names of their own, registered with transformers as any attention is."""
    plain, flash, leaking = tiny.llama(), tiny.llama(), tiny.llama()
    for model, name, function in ((flash, "flash_by_hand", varlen), (leaking, "flash_that_leaks", causal)):
        AttentionInterface.register(name, function)
        model.config._attn_implementation = name  # its setter would ask for the package
    assert resolve_packing(None, [flash]) is True and resolve_packing(None, [flash, flash]) is True
    assert resolve_packing(None, [plain]) is False and resolve_packing(None, [flash, plain]) is False
    assert resolve_packing(None, [leaking]) is False and resolve_packing(None, [flash, leaking]) is False
    assert resolve_packing(False, [flash]) is False


def test_packing_that_is_asked_for_is_checked():
    assert resolve_packing(True, [tiny.llama(), tiny.gpt2()]) is True
    leaking = tiny.llama()
    forward = leaking.model.forward
    leaking.model.forward = lambda *args, position_ids=None, **kwargs: forward(*args, **kwargs)
    with pytest.raises(UserError, match="packing: LlamaForCausalLM would let packed .* packing=false"):
        trainer(policy=leaking, packing=True)
