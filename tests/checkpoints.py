"""A tiny model under every kind of optimizer, and a store to save it in."""

from __future__ import annotations

import random
from pathlib import Path

import numpy
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastrlhf.checkpoint.state import optimizer_tensors, rng_tensors
from fastrlhf.checkpoint.store import CheckpointStore

CONFIG = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def tiny(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**CONFIG, "tie_word_embeddings": True, **changes})).to(dtype)


def train(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """A few steps that draw from every generator, so that a lost one changes the weights."""
    for _ in range(steps):
        ids = torch.randint(48, (2, 6)) + (random.randrange(48) + int(numpy.random.randint(48)))
        scale = random.gauss(1, 0.1) * float(numpy.random.normal(1, 0.1))
        (model(input_ids=ids % 48, labels=ids % 48).loss * scale).backward()
        optimizer.step()
        optimizer.zero_grad()


def save(store: CheckpointStore, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    tensors, data = optimizer_tensors(optimizer, "policy")
    return store.save(
        step,
        models={"policy": model},
        tensors={"optimizer": tensors, "rng": rng_tensors()},
        state={"optimizer": data, "step": step},
    )


class Blockwise(torch.optim.Optimizer):
    """Momentum kept as bitsandbytes keeps it: uint8 codes, fp32 block maxima, a code map that parameters share."""

    def __init__(self, params: object, lr: float = 0.1):
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})
        self.map = torch.linspace(-1, 1, 256)

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state.update(step=0, state1=torch.full(parameter.shape, 127, dtype=torch.uint8), qmap1=self.map)
                state["quantized"] = {"absmax1": torch.ones(1)}
            state["step"] += 1
            old = state["qmap1"][state["state1"].long()] * state["quantized"]["absmax1"]
            new = 0.9 * old + parameter.grad.float()
            state["quantized"]["absmax1"] = new.abs().max().reshape(1)
            codes = (new / state["quantized"]["absmax1"] + 1) * 127.5
            state["state1"] = codes.round().to(torch.uint8)
            parameter.sub_(self.param_groups[0]["lr"] / state["step"] * new)


def eight_bit(params: object) -> torch.optim.Optimizer:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    return bitsandbytes.optim.AdamW8bit(params, lr=1e-2, min_8bit_size=1)


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True, amsgrad=True),
    "tensor_lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "blockwise": Blockwise,
    "8bit": eight_bit,
}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def store_with(tmp_path: Path, model: torch.nn.Module) -> CheckpointStore:
    store = CheckpointStore(tmp_path)
    store.save(1, models={"policy": model}, tensors={}, state={})
    return store
