"""The attention that was asked for is the one that runs, in every forward of training."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from fastrlhf import PPOTrainer
from fastrlhf.models import loading, saving
from tests import tiny
from tests.runs import ppo_trainer

LAYERS = 2


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
