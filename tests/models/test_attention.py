"""The attention that was asked for is the one that runs, in every forward of training."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MambaForCausalLM,
    PreTrainedModel,
)

from fastrlhf import PPOTrainer, UserError
from fastrlhf.models import loading, saving
from fastrlhf.models.attention import attention_for
from tests import tiny
from tests.runs import ppo_trainer

LAYERS = 2
SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "max_position_embeddings", "eos_token_id", "pad_token_id")  # fmt: skip


def trainer(policy: object, **fields: object) -> PPOTrainer:
    sizes = {"total_steps": 1, "rollout_batch_size": 4, "max_new_tokens": 8}
    return ppo_trainer(policy=policy, **{**sizes, "learning_rate": 1e-3, "critic_learning_rate": 1e-3, **fields})


class Stopped(BaseException):
    """Where transformers would load weights; no error, so nobody words it anew."""


@pytest.fixture
def calls(monkeypatch) -> Iterator[dict[str, int]]:
    """Calls of each attention function that transformers may choose from, by name."""
    counts: dict[str, int] = {}

    def counting(name: str, function: Callable) -> Callable:
        def attention(*args: object, **kwargs: object) -> object:
            counts[name] = counts.get(name, 0) + 1
            return function(*args, **kwargs)

        return attention

    known = dict(AttentionInterface._global_mapping)
    from transformers.models.llama.modeling_llama import eager_attention_forward

    for name, function in {**known, "eager": eager_attention_forward}.items():
        monkeypatch.setitem(AttentionInterface._global_mapping, name, counting(name, function))
    return counts


@pytest.mark.parametrize("attention", ["sdpa", "eager", "auto"])
@pytest.mark.parametrize("packing", [False, True])
def test_what_the_config_asks_for_runs_and_nothing_else(tmp_path, calls, attention, packing):
    tiny.llama().save_pretrained(tmp_path / "m")
    t = trainer(str(tmp_path / "m"), attention=attention, packing=packing)
    want = "sdpa" if attention == "auto" else attention
    assert {model.config._attn_implementation for model in (t.policy, t.ref_policy, t.value_model)} == {want}
    calls.clear()
    next(iter(t))
    # old log-probs, values, reference; critic's and policy's update: one micro-batch each
    assert calls.pop(want) == 5 * LAYERS
    assert set(calls) == {"fastrlhf"}  # the decoding's own
    assert {model.config._attn_implementation for model in (t.policy, t.ref_policy, t.value_model)} == {want}


def varlen(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: object,
    *, scaling: float, position_ids: torch.Tensor, **kwargs: object,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """What flash attention does with a packed row: each sequence alone, found by where positions restart."""
    assert len(query) == 1 and attention_mask is None
    starts = [*(position_ids[0] == 0).nonzero()[:, 0].tolist(), query.shape[2]]
    parts = [
        F.scaled_dot_product_attention(
            *(t[:, :, a:b] for t in (query, key, value)), is_causal=True, scale=scaling, enable_gqa=True
        )
        for a, b in zip(starts, starts[1:], strict=False)
    ]
    return torch.cat(parts, 2).transpose(1, 2), None


def test_with_flash_attention_rows_are_packed_and_the_update_is_that_of_padded_sdpa(monkeypatch, calls):
    """A stand-in under flash attention's name, in plain torch; no GPU here to run the real one."""
    for name in dir(PreTrainedModel):
        if name.startswith("_flash_attn") and name.endswith("can_dispatch"):
            monkeypatch.setattr(PreTrainedModel, name, lambda self, *args, **kwargs: True)
    monkeypatch.setattr(
        "transformers.modeling_utils.lazy_import_flash_attention", lambda *args, **kwargs: None, raising=False
    )
    shapes = []

    def flash(module: torch.nn.Module, query: torch.Tensor, *args: object, **kwargs: object) -> object:
        shapes.append(tuple(query.shape))
        return varlen(module, query, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", flash)
    flashing = tiny.llama()
    flashing.config._attn_implementation = "flash_attention_2"
    ours, plain = trainer(flashing), trainer(tiny.llama())
    assert ours.joined and not plain.joined
    shapes.clear(), calls.clear()
    a = next(iter(ours))
    assert "sdpa" not in calls and ours.policy.config._attn_implementation == "flash_attention_2"
    tokens = sum(map(len, a.rollout.prompt_ids + a.rollout.response_ids))
    assert shapes == [(1, 4, tokens, 8)] * 5 * LAYERS  # no padding anywhere
    b = next(iter(plain))
    assert a.rollout.response_ids == b.rollout.response_ids
    assert a.metrics == pytest.approx(b.metrics, rel=1e-4, abs=1e-6) and a.metrics["policy/ratio"] == 1.0


@pytest.mark.parametrize(
    ("asked", "loaded"), [("auto", "flash_attention_2"), ("flash_attention_2",) * 2, ("sdpa",) * 2]
)
@pytest.mark.parametrize("role", ["policy", "reward"])
def test_an_installed_flash_attention_is_what_a_model_is_loaded_with(tmp_path, monkeypatch, asked, loaded, role):
    """As on an A100 with flash-attn: stopped where transformers would load the weights."""
    policy = tiny.llama()
    saving.write_model(tmp_path / "policy", policy, tiny.tokenizer(), [1])
    saving.write_model(tmp_path / "reward", loading.scalar_model(policy, tiny.tokenizer(), 0), tiny.tokenizer(), [1])
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: name if name == "flash_attn" else find(name, *a))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)

    def stop(where: str, **kwargs: object) -> None:
        raise Stopped(kwargs["attn_implementation"], kwargs["dtype"])

    auto = AutoModelForCausalLM if role == "policy" else AutoModelForSequenceClassification
    load = loading.load_policy if role == "policy" else loading.load_reward_model
    monkeypatch.setattr(auto, "from_pretrained", stop)
    with pytest.raises(Stopped) as stopped:
        load(str(tmp_path / role), "auto", asked)
    assert stopped.value.args == (loaded, torch.bfloat16)


def gemma2() -> PreTrainedModel:
    """Softcaps, which SDPA has not."""
    return Gemma2ForCausalLM(Gemma2Config(**shape(), head_dim=8))


def shape() -> dict[str, int]:
    config = tiny.llama().config.to_dict()
    return {name: config[name] for name in SHAPE}


def gpt_neo() -> PreTrainedModel:
    config = GPTNeoConfig(vocab_size=320, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=128,
                          attention_types=[[["global", "local"], 1]], eos_token_id=1)  # fmt: skip
    return GPTNeoForCausalLM(config)


def bloom() -> PreTrainedModel:
    return BloomForCausalLM(BloomConfig(vocab_size=320, hidden_size=32, n_layer=2, n_head=4, eos_token_id=1))


@pytest.mark.parametrize("build", [gemma2, gpt_neo, bloom])
def test_auto_falls_back_to_eager_where_a_class_has_no_sdpa(tmp_path, build):
    """The policy, the critic made of it, and the classifier when it is loaded again."""
    model = build()
    saving.write_model(tmp_path / "policy", model, tiny.tokenizer(), [1])
    policy = loading.load_policy(str(tmp_path / "policy"))
    assert policy.config._attn_implementation == "eager"
    critic = loading.scalar_model(policy, tiny.tokenizer(), seed=0)
    saving.write_model(tmp_path / "reward", critic, tiny.tokenizer(), [1])
    reward = loading.load_reward_model(str(tmp_path / "reward"))
    assert {m.config._attn_implementation for m in (critic, reward)} == {"eager"}
    name = type(policy).__name__
    with pytest.raises(
        UserError, match=f"attention: transformers has no 'sdpa' for {name}; use attention=eager or auto"
    ):
        loading.load_policy(str(tmp_path / "policy"), "auto", "sdpa")


def test_flash_attention_that_is_installed_is_not_forced_on_a_class_without_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    gpu = torch.device("cuda")
    assert attention_for(LlamaForCausalLM, "auto", gpu, torch.bfloat16) == "flash_attention_2"
    assert attention_for(MambaForCausalLM, "auto", gpu, torch.bfloat16) == "eager"
    with pytest.raises(UserError, match="no 'flash_attention_2' for MambaForCausalLM; use attention=eager or auto"):
        attention_for(MambaForCausalLM, "flash_attention_2", gpu, torch.bfloat16)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize(
    ("named", "told"), [("evil/kernel@main:run", True), ("sdpa", False), ("no_such_attention", True)]
)
def test_the_option_wins_over_config_json_which_can_load_no_code(tmp_path, monkeypatch, caplog, key, named, told):
    """For every role, whatever the folder names."""
    policy = tiny.llama()
    saving.write_model(tmp_path / "policy", policy, tiny.tokenizer(), [1])
    saving.write_model(tmp_path / "reward", loading.scalar_model(policy, tiny.tokenizer(), 0), tiny.tokenizer(), [1])
    for role in ("policy", "reward"):
        path = tmp_path / role / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: named}))

    def load(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"a kernel of the hub is loaded: {args}")

    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", load)
    monkeypatch.setattr("transformers.integrations.hub_kernels.load_and_register_attn_kernel", load)
    for asked, expected in (("auto", "sdpa"), ("eager", "eager")):
        for model in (
            loading.load_policy(str(tmp_path / "policy"), "auto", asked),
            loading.load_reward_model(str(tmp_path / "reward"), "auto", asked),
            loading.load_classifier(str(tmp_path / "reward"), "auto", asked),
        ):
            assert model.config._attn_implementation == expected
    assert (f"asks for the attention {named!r}, which is left out" in caplog.text) is told


@pytest.mark.parametrize("way", [{"critic": "shared_trunk"}, {"advantage": "grpo"}, {"advantage": "rloo"}])
def test_a_model_without_a_classifier_form_is_told_what_runs_and_that_runs(way):
    granite = GraniteForCausalLM(GraniteConfig(**shape()))
    with pytest.raises(UserError) as refused:
        trainer(granite)
    for words in (
        "GraniteForCausalLM has no sequence-classification form",
        "critic=shared_trunk",
        "advantage=grpo or rloo",
    ):
        assert words in str(refused.value)
    samples = {"samples_per_prompt": 2} if "advantage" in way else {}
    metrics = next(iter(trainer(granite, **way, **samples))).metrics
    assert metrics["policy/ratio"] == 1.0 and metrics["rollout/mismatch_max"] < 1e-4


def test_a_classifier_that_reads_another_trunk_is_none_of_the_model():
    """BART's classifier has its encoder too."""
    bart = BartForCausalLM(BartConfig(vocab_size=320, d_model=32, decoder_layers=2, decoder_attention_heads=4,
                                      encoder_layers=2, decoder_ffn_dim=48, max_position_embeddings=128))  # fmt: skip
    with pytest.raises(UserError, match="BartForCausalLM has no sequence-classification form of its own"):
        trainer(bart)
