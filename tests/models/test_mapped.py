"""What waits in files until a rank cuts it (parallel = fsdp) is what an unsharded read gives; only a layer of it comes
to the device at a time. Two ranks: tests/rank_checks.py."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    CodeGenConfig,
    CodeGenForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from fastrlhf.models import adapter_folder, loading
from fastrlhf.parallel import mapped
from fastrlhf.plan.counter import LiveBytes
from tests import tiny

DEEP = {"num_hidden_layers": 12}
DEEPSEEK = {
    "num_key_value_heads": 4, "n_routed_experts": 4, "moe_intermediate_size": 16, "q_lora_rank": 8, "kv_lora_rank": 8,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "n_group": 1, "topk_group": 1,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1,
}  # fmt: skip
CODEGEN = {"n_positions": 128, "n_ctx": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8}
IDS = {"vocab_size": 320, "bos_token_id": None, "eos_token_id": 1}
NEOX = {name: tiny.SHAPE[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}


def codegen() -> PreTrainedModel:
    return CodeGenForCausalLM(CodeGenConfig(**CODEGEN, **IDS))


MODELS = {  # how they are made, and whether transformers makes more than a layer of them in memory
    "llama": (tiny.llama, False),
    "tied": (lambda: tiny.llama(tie_word_embeddings=True), False),
    "gpt2": (tiny.gpt2, False),
    "buffers in the dtype of the model": (lambda: Gemma3ForCausalLM(Gemma3TextConfig(**tiny.SHAPE, head_dim=8)), False),
    "other names in files": (lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**NEOX, **IDS, num_attention_heads=4)), False),
    "codegen": (codegen, False),
    "experts stacked as they are read": (lambda: MixtralForCausalLM(MixtralConfig(**tiny.SHAPE)), True),
    "parts kept in fp32": (lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**{**tiny.SHAPE, **DEEPSEEK})), None),
}


def check_same(read: PreTrainedModel, waiting: PreTrainedModel) -> None:
    """All that a run reads of two models: values, dtypes, flags, buffers, configs, names."""
    ours, theirs = (dict(model.named_parameters()) for model in (waiting, read))
    assert ours.keys() == theirs.keys() and waiting.state_dict().keys() == read.state_dict().keys()
    for name, parameter in ours.items():
        values = mapped.values_of(parameter)
        assert (parameter.dtype, parameter.shape) == (values.dtype, values.shape)
        assert values.dtype == theirs[name].dtype and torch.equal(values, theirs[name]), name
        assert parameter.requires_grad == theirs[name].requires_grad
    ours, theirs = (dict(model.named_buffers()) for model in (waiting, read))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours)
    assert waiting.dtype == read.dtype and waiting.config.to_dict() == read.config.to_dict()
    assert getattr(waiting, "generation_config", 0) == getattr(read, "generation_config", 0)


@pytest.mark.parametrize("name", MODELS)
def test_what_waits_is_what_is_read(tmp_path, caplog, name):
    torch.manual_seed(0)
    make, restacked = MODELS[name]
    asked = [
        (torch.float32, "bf16"),
        *([(torch.bfloat16, "bf16"), (torch.bfloat16, "fp32")] if name == "llama" else []),
    ]
    for written, dtype in asked:
        make().to(written).save_pretrained(tmp_path, max_shard_size="60KB")
        caplog.clear()
        waiting = loading.load_policy(str(tmp_path), dtype, to_cut=True)
        assert all(map(mapped.waits, waiting.parameters()))
        said = [r.getMessage() for r in caplog.records if "made in the host's memory, in each rank" in r.getMessage()]
        assert restacked is None or len(said) == restacked
        check_same(loading.load_policy(str(tmp_path), dtype), waiting)


def test_a_reward_model_and_critics_wait_but_for_their_heads(tmp_path):
    """Also on the trunk of a CodeGen, whose rows of q, k and v are laid out anew."""
    tokenizer = tiny.tokenizer()
    for name, made in (("llama", tiny.llama()), ("codegen", codegen())):
        made.save_pretrained(tmp_path / name)
        waiting = loading.load_policy(str(tmp_path / name), "bf16", to_cut=True)
        critic = loading.scalar_model(mapped.twin(waiting), tokenizer, seed=3, share=True)
        assert {key for key, p in critic.named_parameters() if not mapped.waits(p)} == {"score.weight"}
        read = loading.scalar_model(loading.load_policy(str(tmp_path / name), "bf16"), tokenizer, seed=3)
        check_same(read, critic)
    read.save_pretrained(tmp_path / "reward")
    waiting = loading.load_reward_model(str(tmp_path / "reward"), "fp32", to_cut=True)
    assert {key for key, p in waiting.named_parameters() if not mapped.waits(p)} == {"score.weight"}
    check_same(loading.load_reward_model(str(tmp_path / "reward"), "fp32"), waiting)


def test_an_adapter_is_merged_when_the_weights_are_taken(tmp_path):
    for model, name in ((tiny.llama(), "model.layers.1.mlp.up_proj"), (tiny.gpt2(), "transformer.h.1.mlp.c_fc")):
        base, folder = tmp_path / name / "base", tmp_path / name / "adapter"
        model.save_pretrained(base)
        width, out = model.get_submodule(name).weight.shape[:: 1 if name.startswith("transformer") else -1]
        folder.mkdir()
        config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 4, "lora_alpha": 2}
        (folder / adapter_folder.CONFIG).write_text(json.dumps(config))
        sides = {"A": torch.randn(4, width), "B": torch.randn(out, 4)}
        sides = {f"{adapter_folder.PREFIX}{name}.lora_{side}.weight": tensor for side, tensor in sides.items()}
        save_file(sides, folder / adapter_folder.WEIGHTS)
        waiting = loading.load_policy(str(folder), "bf16", to_cut=True)
        assert all(map(mapped.waits, waiting.parameters()))
        read = loading.load_policy(str(folder), "bf16")
        check_same(read, waiting)
        assert not torch.equal(
            read.get_submodule(name).weight, loading.load_policy(str(base), "bf16").get_submodule(name).weight
        )


def test_the_dtype_of_the_files_counts_and_not_what_config_json_says(tmp_path, caplog):
    tiny.llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    waiting = loading.load_policy(str(tmp_path), "bf16", to_cut=True)
    assert all(mapped.is_mapped(p.waits_for.tensor) for p in waiting.parameters()) and not caplog.records
    check_same(loading.load_policy(str(tmp_path), "bf16"), waiting)


class OnDevice(LiveBytes):
    """What lies on a device that is not the CPU."""

    def _add(self, tensor: torch.Tensor) -> None:
        if tensor.device.type == "meta":
            super()._add(tensor)


def test_a_layer_at_a_time_comes_to_the_device(tmp_path):
    """The device: meta, which only has the sizes of what would be there."""
    tiny.llama(**DEEP).save_pretrained(tmp_path)
    model, device, live = loading.load_policy(str(tmp_path), "fp32", "eager"), torch.device("meta"), OnDevice()
    whole = sum(p.nbytes for p in model.parameters())
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    outside = whole - len(model.model.layers) * layer
    with live, torch.no_grad():
        mapped.wait(model, device)
        assert {p.device for p in (*model.parameters(), *model.buffers())} == {device} and live.now < 4096
        with mapped.running(model):
            ids = torch.zeros(1, 8, dtype=torch.int64, device=device)
            model.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        assert outside + layer < live.peak < outside + 2 * layer < whole / 2
        assert live.now < 4096
    assert all(map(mapped.waits, model.parameters()))


def test_what_waits_is_not_to_be_read_or_written_by_mistake(tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    model = loading.load_policy(str(tmp_path), "fp32", to_cut=True)
    copied = mapped.twin(model)
    pairs = list(zip(model.parameters(), copied.parameters(), strict=True))
    assert all(a is not b and torch.equal(mapped.values_of(a), mapped.values_of(b)) for a, b in pairs)
    for parameter in model.parameters():
        assert parameter.isnan().all()
        with pytest.raises(RuntimeError, match="single memory location"), torch.no_grad():
            parameter.copy_(torch.ones(parameter.shape))


def test_layers_are_the_longest_list_that_lies_in_no_other():
    """Of a mixture whose layers hold more experts, each a module, than there are layers."""

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(6))

    model = torch.nn.Module()
    model.layers, model.towers = torch.nn.ModuleList(Layer() for _ in range(3)), torch.nn.ModuleList([Layer()])
    assert mapped.layers_of(model) == list(model.layers)
    assert mapped.layers_of(torch.nn.Linear(2, 2)) == []
