"""Models whose parts are swapped for kernels while they generate: the same numbers, and their own parts afterwards."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.llama import modeling_llama

from fastrlhf import RolloutEngine, SamplingParams
from fastrlhf.models.heads import hidden_states
from fastrlhf.rollout.fused import fused, swaps_of
from fastrlhf.rollout.parity import decoding, make_cache, trunk_over
from fastrlhf_kernels import backend
from fastrlhf_kernels.gpu.launch import recorded
from tests import tiny
from tests.operators import Operators

IDS = torch.tensor([[5, 9, 3, 7, 11]])
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}


@pytest.fixture(autouse=True)
def kernels_run(monkeypatch):
    if backend.INTERPRET:
        monkeypatch.setenv("FASTRLHF_BACKEND", "triton")


def qwen3() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES)).eval()


def names(swaps) -> list[str]:
    return sorted(type(s.owner()).__name__ if s.name == "forward" else s.name for s in swaps)


def test_every_part_of_known_form_is_swapped_and_says_the_same(device):
    for model in (tiny.llama().to(device), qwen3().to(device)):
        swaps, layers = swaps_of(model), model.config.num_hidden_layers
        norms = 4 * layers + 1 if "Qwen3" in type(model).__name__ else 2 * layers + 1
        assert len(swaps) == norms + layers + 1 and "apply_rotary_pos_emb" in names(swaps)
        with torch.no_grad():
            plain = hidden_states(model, IDS.to(device))
            with fused(model), recorded(start=True) as records:
                ours = hidden_states(model, IDS.to(device))
        torch.testing.assert_close(ours, plain, atol=2e-5, rtol=1e-5)
        started = [record.kernel.__name__ for record in records]
        assert {name: started.count(name) for name in set(started)} == {
            "_rms_norm": norms, "_silu_mul": layers, "_rotate": layers,
        }  # fmt: skip


def test_the_model_is_its_own_again_after_an_error(device):
    model, original = tiny.llama(num_hidden_layers=1).to(device), modeling_llama.apply_rotary_pos_emb
    with pytest.raises(RuntimeError, match="interrupted"), fused(model):
        assert modeling_llama.apply_rotary_pos_emb is not original
        raise RuntimeError("interrupted")
    assert modeling_llama.apply_rotary_pos_emb is original
    assert not [m for m in model.modules() if "forward" in vars(m)]


def test_it_may_nest_and_keeps_no_model_alive(device):
    model = tiny.llama(num_hidden_layers=1).to(device)
    with fused(model):
        with fused(model):
            pass
        assert [m for m in model.modules() if "forward" in vars(m)]
    assert not [m for m in model.modules() if "forward" in vars(m)]
    model.model.layers[0].mlp.whole = [model]  # as an adapter's layer may
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_what_computes_otherwise_stays(device):
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, sliding_window=4)).to(device).eval()  # (1 + w) x, gelu
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            torch.nn.init.normal_(module.weight)
    assert names(swaps_of(model)) == ["apply_rotary_pos_emb"]
    mine = tiny.llama(num_hidden_layers=1).to(device)
    mine.model.norm.forward = lambda x: x  # somebody else's
    assert len(swaps_of(mine)) == 2 + 1 + 1


def test_it_takes_nothing_from_the_random_numbers_and_follows_new_weights(device):
    model = tiny.llama(num_hidden_layers=1).to(device)
    before = torch.random.get_rng_state()
    swaps_of(model)
    assert torch.equal(torch.random.get_rng_state(), before)
    with torch.no_grad():
        model.model.norm.weight.mul_(3)
        plain = hidden_states(model, IDS.to(device))
        with fused(model):
            ours = hidden_states(model, IDS.to(device))
    torch.testing.assert_close(ours, plain, atol=5e-5, rtol=1e-5)


def test_generation_goes_through_them(device):
    model = tiny.llama(num_hidden_layers=1).to(device)
    params = SamplingParams(3, temperature=0.0, stop_token_ids=[])
    with recorded(start=True) as records:
        replies = RolloutEngine(model).generate([[5, 9, 3], [7, 4]], params).response_ids
    started = [record.kernel.__name__ for record in records]
    assert {"_rms_norm", "_silu_mul", "_rotate", "_store_tokens"} <= set(started)
    rows = torch.tensor([[5, 9, 3, *replies[0]]], device=device)
    with torch.no_grad():
        assert model(rows[:, :-1]).logits[0, 2:].argmax(-1).tolist() == replies[0]


def test_a_layers_step_is_sixteen_launches(device):
    """Seven products, two sums, two norms, rotation, gate, cache, attention: 40 operators without the kernels."""
    counts = []
    for layers in (1, 3):
        model = tiny.llama(num_hidden_layers=layers).to(device)
        cache, place = make_cache(model, True, 2, 8), torch.zeros(2, dtype=torch.int64, device=device)
        with torch.no_grad(), decoding(model, cache):
            trunk = trunk_over(model, cache)
            trunk.step(place + 5, place + 1, 4)
            with recorded() as launches, Operators() as operators:  # recorded, not started: its inside is not counted
                trunk.step(place + 5, place + 1, 4)
        counts.append((len(launches), operators.names.total()))
    launched, computed = ((more - few) / 2 for few, more in zip(*counts, strict=True))
    assert launched == (6 if torch.cuda.is_available() else 5) and launched + computed <= 16, operators.names
