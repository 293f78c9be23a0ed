"""Folders in the layouts of MOSS and MOSS-RLHF: tiny models with random weights, a tokenizer trained on a few lines."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import CodeGenConfig, CodeGenForCausalLM

from tests import tiny

META = "You are an AI assistant whose name is MOSS.\n- MOSS is helpful, honest and harmless.\n"
TEXTS = [*tiny.TEXTS, META, "<|Human|>: 雨伞应该怎么保养？<eoh>\n<|MOSS|>: 用后晾干，再收起来。<eom>\n"] * 3
ENDS = ["<eoc>", "<eoh>", "<eom>", "<eor>", "<eot>"]
FIELDS = {"n_positions": 256, "n_ctx": 256, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}


def moon_model(vocab_size: int) -> CodeGenForCausalLM:
    """fp32 weights under the names and in the shapes of moss-moon-003."""
    torch.manual_seed(0)
    config = CodeGenConfig(vocab_size=vocab_size, initializer_range=0.2, tie_word_embeddings=False, **FIELDS)
    model = CodeGenForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def write_moon(folder: Path, shards: int = 2) -> dict[str, Tensor]:
    """A moss-moon-003-sft folder -> its weights: pickled shards with causal_mask buffers, config, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    size = write_moon_tokenizer(folder)
    model = moon_model(size + 11)  # as the published one is padded
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    mask = torch.ones(1, 1, 256, 256).tril().bool()
    buffers = {f"transformer.h.{i}.attn.causal_mask": mask.clone() for i in range(FIELDS["n_layer"])}
    write_bins(folder, {**weights, **buffers}, shards)
    classes = {"AutoConfig": "configuration_moss.MossConfig", "AutoModelForCausalLM": "modeling_moss.MossForCausalLM"}
    config = {
        **FIELDS, "vocab_size": size + 11, "model_type": "moss", "architectures": ["MossForCausalLM"],
        "activation_function": "gelu_new", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "n_inner": None,
        "layer_norm_epsilon": 1e-5, "bos_token_id": 0, "eos_token_id": size - 3, "tie_word_embeddings": False,
        "wbits": 32, "groupsize": 128, "auto_map": classes, "tokenizer_class": "GPT2Tokenizer",
    }  # fmt: skip
    write_json(folder / "config.json", config)
    (folder / "modeling_moss.py").write_text("raise SystemExit('code of the model ran')\n")
    return weights


def write_moon_tokenizer(folder: Path) -> int:
    """MOSS's files of a byte-level BPE -> its size with the added tokens."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXTS, 400, min_frequency=1, special_tokens=["<|endoftext|>"], show_progress=False)
    bpe.save_model(str(folder))
    size = bpe.get_vocab_size()
    write_json(folder / "added_tokens.json", {token: size + i for i, token in enumerate(ENDS)})
    named = {"bos_token": "<|endoftext|>", "eos_token": "<eom>", "unk_token": "<|endoftext|>"}
    write_json(folder / "special_tokens_map.json", named)
    code = {"AutoTokenizer": ["tokenization_moss.MossTokenizer", None]}
    write_json(
        folder / "tokenizer_config.json",
        {**named, "tokenizer_class": "MossTokenizer", "auto_map": code, "add_prefix_space": False},
    )
    return size + len(ENDS)


def write_bins(folder: Path, weights: dict[str, Tensor], shards: int = 1) -> None:
    """pytorch_model.bin, or shards of it and their index."""
    if shards == 1:
        torch.save(weights, folder / "pytorch_model.bin")
        return
    names, weight_map = list(weights), {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        part = {name: weights[name] for name in names[i::shards]}
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    write_json(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": weight_map})


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def write_llama(folder: Path, *, seed: int = 0, **changes: object) -> dict[str, Tensor]:
    """A pickled LLaMA folder with the tiny tokenizer -> its weights."""
    model = tiny.llama(seed=seed, tie_word_embeddings=False, **changes)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    write_bins(folder, weights)
    return weights


def tuned(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What fine-tuning makes of weights: all of them moved by a little."""
    torch.manual_seed(1)
    return {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in weights.items()}


def write_difference(folder: Path, base: dict[str, Tensor], whole: dict[str, Tensor], *, reward: bool = False) -> None:
    """MOSS-RLHF's difference of `whole` to `base`: tensors of layers alone, and their old rotary buffers."""
    write_llama(folder)
    diff = {name: tensor - base[name] if "layers" in name else tensor for name, tensor in whole.items()}
    diff |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for i in range(2)}
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["LlamaRewardModel" if reward else "Llama"]
    write_json(folder / "config.json", config)
    write_bins(folder, diff)
