"""rollout_dtype: a copy in bf16 decodes for an fp32 policy and follows its weights; what it rounds is measured."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastrlhf import PPOConfig, RolloutEngine, SamplingParams, UserError
from fastrlhf.models.heads import ValueHead
from tests import tiny
from tests.runs import bytes_of, ppo_trainer, read, resumed_equals_whole, weights

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
PARAMS = SamplingParams(max_new_tokens=8, n=2, seed=3, stop_token_ids=[2])


def drawn(engine: RolloutEngine) -> list[list[int]]:
    return engine.generate(PROMPTS, PARAMS).response_ids


def test_the_copy_is_what_from_pretrained_makes_in_that_dtype(tmp_path):
    model = tiny.llama()
    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    engine = RolloutEngine(model, dtype=torch.bfloat16)
    ours, theirs = engine.generate(PROMPTS, PARAMS), RolloutEngine(stock).generate(PROMPTS, PARAMS)
    assert ours.response_ids == theirs.response_ids
    assert all(torch.equal(a, b) for a, b in zip(ours.log_probs, theirs.log_probs, strict=True))
    for name, buffer in stock.named_buffers():
        assert engine.model.get_buffer(name).dtype == buffer.dtype == torch.float32, name
    assert engine.model.dtype == torch.bfloat16 and model.dtype == torch.float32
    assert all(p.requires_grad for p in model.parameters()) and not any(
        p.requires_grad for p in engine.model.parameters()
    )


def test_the_copy_follows_the_weights_in_its_own_places():
    model, other = tiny.llama(), tiny.llama(seed=1)
    engine = RolloutEngine(model, dtype=torch.bfloat16)
    first, places = drawn(engine), [p.data_ptr() for p in engine.model.parameters()]
    model.load_state_dict(other.state_dict())
    assert drawn(engine) == drawn(RolloutEngine(other, dtype=torch.bfloat16)) != first
    assert [p.data_ptr() for p in engine.model.parameters()] == places


def test_tied_weights_stay_tied_and_the_models_own_dtype_needs_no_copy():
    model = tiny.gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    twin = RolloutEngine(model, dtype=torch.bfloat16).model
    assert twin.lm_head.weight is twin.transformer.wte.weight and len(weights(twin)) == len(weights(model))
    assert RolloutEngine(model, dtype=torch.float32).model is model
    with pytest.raises(UserError, match="whose states no value_head has learnt"):
        RolloutEngine(model, dtype=torch.bfloat16, value_head=ValueHead(32, seed=0))


@pytest.mark.parametrize("fields", [{}, {"lora": 2}, {"advantage": "grpo", "samples_per_prompt": 2}])
def test_ppo_learns_with_it_and_measures_what_it_rounds(tmp_path, fields):
    """Old log-probs are the fp32 policy's, so the first ratio is exactly 1; sampling differs by what bf16 rounds."""
    t = ppo_trainer(total_steps=3, rollout_dtype="bf16", output_dir=str(tmp_path / "run"), save_every=0, **fields)
    before = [w.clone() for w in weights(t.policy)]
    steps = [step.metrics for step in t]
    assert all(1e-6 < step["rollout/mismatch"] < 0.05 for step in steps)
    assert t.policy.dtype == torch.float32 and t.engine.model.dtype == torch.bfloat16
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(t.policy), strict=True))
    exact = ppo_trainer(total_steps=1, **fields)
    assert next(iter(exact)).metrics["rollout/mismatch"] < 1e-5  # what the bar of fp32 is for
    assert [e for e in read(tmp_path / "run/events.jsonl") if "mismatch" in json.dumps(e)] == []
    decoded = [w.clone() for w in weights(t.engine.model)]
    t.evaluate()  # with the weights of now, not those that the last rollout had
    assert any(not torch.equal(a, b) for a, b in zip(decoded, weights(t.engine.model), strict=True))


def test_resume_is_exact(tmp_path):
    whole = resumed_equals_whole(tmp_path, 1, rollout_dtype="bf16")
    plain = ppo_trainer(output_dir=str(tmp_path / "plain"), save_every=1)
    plain.train()
    assert bytes_of(tmp_path / "plain") != whole


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"old_log_probs": "rollout"}, "takes its log-probs for the policy's; use recompute"),
        ({"critic": "shared_trunk"}, "takes its values from decoding; use critic = separate"),
        ({"quantize": "int8", "lora": 2}, "quantize = int8 holds the weights in blocks"),
        ({"parallel": "fsdp"}, "gathers the policy itself for a rollout; use parallel = zero"),
        ({"dtype": "bf16"}, "dtype = bf16 is that of the policy already; use dtype = fp32"),
    ],
)
def test_what_a_copy_cannot_do_is_refused(fields, why):
    with pytest.raises(UserError, match=f"rollout_dtype = bf16: .*{why}"):
        PPOConfig(rollout_dtype="bf16", **fields)
    assert PPOConfig(rollout_dtype="bf16", advantage="grpo", samples_per_prompt=8).rollout_dtype == "bf16"


def test_a_policy_in_bf16_is_refused_before_anything_is_loaded():
    with pytest.raises(UserError, match=r"^rollout_dtype = bf16: the policy is in bf16 already; use a policy in fp32"):
        ppo_trainer(rollout_dtype="bf16", policy=tiny.llama().to(torch.bfloat16), reward="no such file")
