"""The engine against transformers' continuous batching, against a second engine, and against garbage in its memory."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

from fastrlhf.rollout.engine import RolloutEngine
from fastrlhf.rollout.sampling import SamplingParams
from tests import tiny
from tests.rollout.decoding import before_forwards, cache_in, decode, replayed
from tests.rollout.test_rollout_models import make

RAGGED = [[5], [6, 7, 8], [9, 11] * 7, [10, 11], [12, 13, 14, 15] * 5]


@pytest.fixture(scope="module")
def llama():
    return tiny.llama()


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma2", "Phi3", "Olmo2"])
def test_greedy_tokens_are_those_of_continuous_batching(name, caplog):
    if not hasattr(transformers, "ContinuousBatchingConfig"):
        pytest.skip("this transformers sizes its cache by the memory of the machine only")
    model = make(name)
    settings = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    small = transformers.ContinuousBatchingConfig(num_blocks=64, block_size=32, max_batch_tokens=128)
    with caplog.at_level(logging.CRITICAL, logger="ContinuousBatchingLogger"):
        peer = copy.deepcopy(model).generate_batch(
            inputs=RAGGED, generation_config=settings, continuous_batching_config=small
        )
    answers = [peer[f"req_{i}"].generated_tokens for i in range(len(RAGGED))]
    ours = RolloutEngine(model).generate(RAGGED, SamplingParams(8, temperature=0.0, stop_token_ids=[]))
    assert ours.response_ids == answers


@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", [(4, 1), (4, 2), (4, 4)])
def test_head_sizes_and_groups(size, heads):
    """Multi-query, grouped and full attention, tied and untied heads."""
    model = tiny.llama(
        head_dim=size, num_attention_heads=heads[0], num_key_value_heads=heads[1], tie_word_embeddings=heads[1] == 2
    )
    out = RolloutEngine(model).generate(RAGGED, SamplingParams(6, stop_token_ids=[], seed=1))
    for prompt, reply, log_probs in zip(RAGGED, out.response_ids, out.policy_log_probs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1].double()
        want = logits.log_softmax(-1).gather(1, torch.tensor(reply)[:, None])[:, 0]
        torch.testing.assert_close(log_probs.double(), want, atol=5e-5, rtol=0)


def test_the_copies_of_a_prompt_hold_the_same_bits(llama):
    stores = []

    def look(**inputs: object) -> None:
        cache = cache_in(inputs)
        if cache.packed is None and not stores:  # the first decoding step
            stores.extend(store.clone() for layer in cache.layers for store in (layer.keys, layer.values))

    with before_forwards(llama, look):
        RolloutEngine(llama).generate([[5, 6, 7, 8]], SamplingParams(4, n=3, stop_token_ids=[]))
    assert len(stores) == 4
    for store in stores:
        assert store[0, :4].abs().sum() > 0
        assert torch.equal(store[0, :4], store[1, :4]) and torch.equal(store[0, :4], store[2, :4])


def test_what_lies_in_unused_slots_never_changes_a_row(llama):
    """Rows that only fill a bucket hold NaN; unused positions of used slots hold large garbage."""
    params = SamplingParams(9, stop_token_ids=[], seed=4)
    clean = RolloutEngine(llama).generate(RAGGED, params)
    used, buckets = len(RAGGED), []

    def poison(**inputs: object) -> None:
        cache = cache_in(inputs)
        if cache.packed is not None:
            return
        buckets.append(len(cache.lengths))
        for store in (store for layer in cache.layers for store in (layer.keys, layer.values)):
            store[used:] = float("nan")
            for slot, length in enumerate(cache.lengths[:used].tolist()):
                store[slot, length + 1 :] = 1e4

    with before_forwards(llama, poison):
        dirty = decode(llama, RAGGED, params, 8, capture=replayed)
    assert buckets[:4] == [8, 4, 2, 1] and set(buckets[4:]) == {8}  # recorded; then five rows in a bucket of eight
    assert dirty.response_ids == clean.response_ids
    for a, b in zip(dirty.policy_log_probs, clean.policy_log_probs, strict=True):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=0)


def test_after_an_update_it_is_a_fresh_engine_on_the_new_weights():
    """Also where the parameters were bound to new memory; the engine allocates no parameter."""
    model = tiny.llama()
    engine, params = RolloutEngine(model), SamplingParams(8, n=2, stop_token_ids=[], seed=2)
    engine.generate(RAGGED, params)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for rebind in (False, True):
        model(torch.tensor(RAGGED[2:3])).logits.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if rebind:
            for p in model.parameters():
                p.data = p.data.clone()
        places = [p.data_ptr() for p in model.parameters()]
        ours = engine.generate(RAGGED, params)
        fresh = RolloutEngine(copy.deepcopy(model)).generate(RAGGED, params)
        assert [p.data_ptr() for p in model.parameters()] == places
        assert ours.response_ids == fresh.response_ids
        for a, b in zip(ours.policy_log_probs, fresh.policy_log_probs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


class Largest(TorchDispatchMode):
    """The most elements any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_no_logits_of_all_tokens_are_ever_made():
    model = tiny.llama(vocab_size=4000, hidden_size=16)
    with Largest() as seen:
        RolloutEngine(model).generate([[5] * 30] * 4 + [[6] * 30], SamplingParams(20, stop_token_ids=[]))
    weights = max(p.numel() for p in model.parameters())
    assert seen.elements <= max(weights, 5 * 4000)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_positions_that_turn_another_way_later_are_refused(kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    model = tiny.llama(rope_parameters=rope)
    engine = RolloutEngine(model)
    out = engine.generate([[5, 6, 7]], SamplingParams(8, temperature=0.0, stop_token_ids=[]))
    ids = torch.tensor([[5, 6, 7]])
    want = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    assert out.response_ids == [want[0, 3:].tolist()]
    with pytest.raises(ValueError, match=f"turns all positions another way .rope_type '{kind}'"):
        engine.generate([[5, 6, 7]], SamplingParams(30))
