"""Generation with unmodified transformers models: the tokens each prompt alone gives, and the trainer's log-probs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
import transformers
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from fastrlhf.config.errors import UserError
from fastrlhf.rollout.engine import RolloutEngine
from fastrlhf.rollout.parity import known_parity
from fastrlhf.rollout.sampling import Generation, SamplingParams
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
    ends = [next((i + 1 for i, token in enumerate(tokens) if token in stops), 16) for tokens in free]
    expected = [tokens[:end] for tokens, end in zip(free, ends)]
    assert len(set(map(len, expected))) > 1
    for budget in (None, 2 * 30):
        engine = RolloutEngine(model, max_batch_tokens=budget)
        out = engine.generate(PROMPTS, SamplingParams(16, temperature=0, stop_token_ids=stops))
        assert out.response_ids == expected
    out = engine.generate(PROMPTS, SamplingParams(10, n=2, temperature=0.8, stop_token_ids=stops, seed=4))
    assert max(map(max, off_by(model, out, SamplingParams(10, n=2, temperature=0.8)))) < 1e-4


def wide(model: PreTrainedModel) -> PreTrainedModel:
    """Weights so large that whatever is wrong shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model.eval()


def bloom() -> PreTrainedModel:
    """It has no positions to be told: its attention biases come from a mask that the cache does not give."""
    return wide(transformers.BloomForCausalLM(transformers.BloomConfig(**OTHER, hidden_size=32, n_layer=2, n_head=4)))


def gpt_neo(window: int) -> PreTrainedModel:
    """Its local layers count their window from the end of the longest row."""
    config = transformers.GPTNeoConfig(
        **OTHER, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=96, window_size=window,
        attention_types=[[["global", "local"], 1]],
    )  # fmt: skip
    return wide(transformers.GPTNeoForCausalLM(config))


def bart() -> PreTrainedModel:
    """Its decoder takes the positions of all rows from the length of the cache."""
    config = transformers.BartConfig(
        **OTHER,
        d_model=32,
        decoder_layers=2,
        encoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=48,
        max_position_embeddings=96,
    )
    return wide(transformers.BartForCausalLM(config))


def gpt_oss() -> PreTrainedModel:
    """Its attention has sinks."""
    config = transformers.GptOssConfig(**SHAPE | {"head_dim": 8, "num_local_experts": 4, "sliding_window": 6})
    return wide(transformers.GptOssForCausalLM(config))


def mamba() -> PreTrainedModel:
    """It keeps a state, and neither keys nor values."""
    config = transformers.MambaConfig(**OTHER, hidden_size=32, num_hidden_layers=2, state_size=8)
    return wide(transformers.MambaForCausalLM(config))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (bloom, "its decoding fails"),
        (partial(gpt_neo, 6), "its decoding differs from its plain forward by .* nats at position"),
        (bart, "its decoding differs from its plain forward by .* nats at position"),
        (gpt_oss, "attention sinks"),
        (mamba, "it has linear_attention"),
    ],
    ids=["bloom", "gpt_neo", "bart", "gpt_oss", "mamba"],
)
def test_what_the_cache_gets_wrong_is_exact_without_it(build, reason, caplog):
    """Ragged prompts, some longer than the windows; said once, in a line, with the reason."""
    model = build()
    params = SamplingParams(8, n=2, temperature=0.8, stop_token_ids=[], seed=4)
    whole = RolloutEngine(model).generate(PROMPTS, params)
    assert re.search(f"slow: {type(model).__name__} cannot be cached .*{reason}", caplog.text)
    assert max(map(max, off_by(model, whole, params))) < 1e-4
    caplog.clear()
    few = RolloutEngine(model, max_batch_tokens=2 * 22).generate(PROMPTS, params)  # two at a time
    assert few.response_ids == whole.response_ids and not caplog.text


def off_by(model: PreTrainedModel, out: Generation, params: SamplingParams) -> list[list[float]]:
    """Nats between the sampled log-probs and a plain forward of each row alone."""
    rows = []
    for i, reply in enumerate(out.response_ids):
        prompt = PROMPTS[i // params.n]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + reply]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        table = torch.log_softmax(logits.double() / params.temperature, -1)
        plain = table.gather(1, torch.tensor(reply)[:, None])[:, 0]
        rows.append((plain - out.policy_log_probs[i].double()).abs().tolist())
    return rows


def test_a_window_that_no_sequence_reaches_leaves_the_cache_in_use(caplog):
    """And one that later prompts reach is found then."""
    model = gpt_neo(24)
    engine, params = RolloutEngine(model), SamplingParams(8, temperature=0.8, stop_token_ids=[], seed=4)
    engine.generate([[7], [9, 40, 130, 12]], params)
    assert known_parity(model).cached and not caplog.text
    out = engine.generate([[7] * 30, [9] * 27, [5]], params)
    assert not known_parity(model).cached and len(out.response_ids) == 3


def spoilt(model: PreTrainedModel, when: Callable[[dict], bool]) -> PreTrainedModel:
    """A hidden state that is another one where `when` says so of what the trunk is given."""

    def spoil(module: torch.nn.Module, args: tuple, kwargs: dict, output: ModelOutput) -> None:
        if when(kwargs):
            output.last_hidden_state = output.last_hidden_state.flip(-1)

    model.base_model.register_forward_hook(spoil, with_kwargs=True)
    return model


def test_a_model_that_is_wrong_with_a_cache_and_without_is_refused_with_the_numbers():
    """Here: wrong wherever several rows are read together."""
    model = spoilt(tiny.llama(), lambda given: len(given["input_ids"]) > 1)
    with pytest.raises(UserError) as refused:
        RolloutEngine(model).generate(PROMPTS, SamplingParams(4))
    off = r"differs from its plain forward by [\d.]+ nats at position \d+ of \d+"
    pattern = (
        f"policy: LlamaForCausalLM cannot be generated from: its decoding {off}; without a cache, its decoding {off};"
    )
    assert re.fullmatch(f"{pattern} use another model", str(refused.value))


@pytest.mark.parametrize("length", [20, 90])
def test_the_check_goes_as_far_as_the_longest_sequence(length):
    """A fault that begins behind `length` tokens is found if the run gets there."""
    model = spoilt(tiny.llama(), lambda given: not given["use_cache"] and given["input_ids"].shape[1] > length)
    assert RolloutEngine(model).check(length) == ""
    with pytest.raises(UserError, match="nats at position"):
        RolloutEngine(model).check(length + 6)


def test_a_model_is_checked_once_a_process_and_not_again_after_a_resume():
    """The result is the model object's; a checkpoint has it for a model of the same class, config and precision."""
    model = tiny.llama()
    forwards: list[int] = []
    model.base_model.register_forward_hook(lambda *args: forwards.append(1) and None)
    engine = RolloutEngine(model)
    assert engine.check(64) == "" and 0 < len(forwards) < 16
    forwards.clear()
    RolloutEngine(model).check(64), RolloutEngine(model).check(40)
    assert not forwards
    state = json.loads(json.dumps(engine.state()))
    for other, again in (
        (tiny.llama(seed=1), False),
        (tiny.llama(rope_theta=5e3), True),
        (tiny.llama().bfloat16(), True),
    ):
        engine = RolloutEngine(other)
        engine.load_state(state)
        other.base_model.register_forward_hook(lambda *args: forwards.append(1) and None)
        engine.check(64)
        assert bool(forwards) is again
        forwards.clear()


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_bf16_rounds_and_is_not_refused(name):
    assert RolloutEngine(make(name).bfloat16()).check(90) == ""


def test_bf16_does_not_hide_a_wrong_window():
    model = gpt_neo(6).bfloat16()
    assert "cannot be cached" in RolloutEngine(model).check(40)


def test_layers_that_are_no_attention_are_read_anew(caplog):
    model = tiny.llama()
    model.config.layer_types = ["full_attention", "linear_attention"]
    RolloutEngine(model).generate(PROMPTS, SamplingParams(4))
    assert "LlamaForCausalLM cannot be cached (it has linear_attention" in caplog.text


def test_a_model_that_does_not_call_its_attention_is_not_cached(monkeypatch, caplog):
    model = tiny.llama()
    layer = model.model.layers[1]
    monkeypatch.setattr(layer, "forward", lambda hidden_states, *args, **kwargs: hidden_states)
    RolloutEngine(model).generate(PROMPTS, SamplingParams(4))
    assert "called its attention 1 times for 2 layers" in caplog.text
    assert model.config._attn_implementation != "fastrlhf"
