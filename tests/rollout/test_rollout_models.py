"""Generation with unmodified transformers models: the tokens each prompt alone gives, and the trainer's log-probs."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from fastrlhf.rollout.engine import RolloutEngine
from fastrlhf.rollout.sampling import SamplingParams
from tests import tiny

EOS = 1
SHAPE = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
    "initializer_range": 0.2,
}
OTHER = {"vocab_size": 200, "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": EOS}
MODELS = {
    "Llama": SHAPE | {"tie_word_embeddings": True},
    "Qwen2": SHAPE | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "Qwen3": SHAPE | {"head_dim": 16},
    "Mistral": SHAPE | {"sliding_window": 5, "num_key_value_heads": 1},
    "Gemma2": SHAPE | {"head_dim": 16, "sliding_window": 6, "final_logit_softcapping": 4.0,
                       "attn_logit_softcapping": 2.0},
    "Gemma3": SHAPE | {"head_dim": 16, "sliding_window": 6, "sliding_window_pattern": 2, "text": True},
    "Phi3": SHAPE | {"num_key_value_heads": 4, "sliding_window": 7},
    "Olmo2": SHAPE,
    "Qwen3Moe": SHAPE | {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "GPT2": OTHER | {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 96, "initializer_range": 0.2},
    "CodeGen": OTHER | {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 96, "n_ctx": 96, "rotary_dim": 4,
                        "initializer_range": 0.2},
    "GPTJ": OTHER | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96, "rotary_dim": 4,
                     "initializer_range": 0.2},
    "OPT": OTHER | {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
                    "max_position_embeddings": 96, "word_embed_proj_dim": 32, "init_std": 0.2},
}  # fmt: skip
PROMPTS = [[7], [9, 40, 130, 12, 5, 77, 8, 130, 21, 6, 44, 60, 3, 18], [150, 3], [11, EOS, 60, EOS, 90], [30] * 7]


def make(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    settings = dict(MODELS[name])
    suffix = "TextConfig" if settings.pop("text", False) else "Config"
    config = getattr(transformers, f"{name}{suffix}")(**settings)
    model = transformers.GPT2LMHeadModel if name == "GPT2" else getattr(transformers, f"{name}ForCausalLM")
    return model(config).eval()


def alone(model: PreTrainedModel, prompt: list[int], count: int, stops: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": count, "eos_token_id": stops or None, "pad_token_id": EOS}
    with torch.no_grad():
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_and_sampled_log_probs(name):
    """Ragged prompts, pad == eos, two stop ids; all at once, and two at a time with others waiting for a place."""
    model = make(name)
    free = [alone(model, prompt, 16, []) for prompt in PROMPTS]
    stops = sorted({free[0][5], free[2][9]})
    expected = [alone(model, prompt, 16, stops) for prompt in PROMPTS]
    assert len(set(map(len, expected))) > 1
    for budget in (None, 2 * 30):
        engine = RolloutEngine(model, max_batch_tokens=budget)
        out = engine.generate(PROMPTS, SamplingParams(16, temperature=0, stop_token_ids=stops))
        assert out.response_ids == expected
    out = engine.generate(PROMPTS, SamplingParams(10, n=2, temperature=0.8, stop_token_ids=stops, seed=4))
    for i, reply in enumerate(out.response_ids):
        prompt = PROMPTS[i // 2]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
        table = torch.log_softmax(logits.double() / 0.8, -1)
        chosen = table.gather(1, torch.tensor(reply)[:, None])[:, 0]
        torch.testing.assert_close(out.policy_log_probs[i].double(), chosen, atol=1e-4, rtol=0)


def bloom() -> PreTrainedModel:
    """It has no positions to be told: its attention biases come from a mask it is not given."""
    config = transformers.BloomConfig(**OTHER, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2)
    return transformers.BloomForCausalLM(config).eval()


def test_a_model_that_skips_the_interface_and_goes_wrong_is_refused():
    with pytest.raises(RuntimeError, match="BloomForCausalLM does not use .* generation does not support it"):
        RolloutEngine(bloom()).generate(PROMPTS, SamplingParams(4))


def test_layers_that_are_no_attention_are_refused_before_any_forward():
    model = tiny.llama()
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(RuntimeError, match="does not support LlamaForCausalLM: it has linear_attention"):
        RolloutEngine(model).generate(PROMPTS, SamplingParams(4))


def test_a_model_that_does_not_call_its_attention_is_refused(monkeypatch):
    model = tiny.llama()
    layer = model.model.layers[1]
    monkeypatch.setattr(layer, "forward", lambda hidden_states, *args, **kwargs: hidden_states)
    with pytest.raises(RuntimeError, match="called its attention 1 times for 2 layers"):
        RolloutEngine(model).generate(PROMPTS, SamplingParams(4))
    assert model.config._attn_implementation != "fastrlhf"
