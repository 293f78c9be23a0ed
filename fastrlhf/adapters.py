"""LoRA adapters (Hu et al. 2021) of several roles over one frozen base, through peft.

The reference policy is the base with every adapter off (ref_refresh_every: with a frozen adapter), so no second copy of
the weights exists. Generation and training run the adapters unmerged: merging rounds the base, and unmerging would not
give its bits back.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastrlhf.config import UserError
from fastrlhf.hardware import installed

POLICY, VALUE, REFERENCE = "policy", "value", "reference"  # the roles; a reference is never trained
ADAPTED = (nn.Linear, Conv1D)  # the quantised layers of bitsandbytes are nn.Linear too


class Adapters:
    """Adapters named by role inside `model`, which stays the transformers model it was; `roles[0]` is active."""

    def __init__(self, model: PreTrainedModel, options: dict[str, Any], roles: Sequence[str], seed: int) -> None:
        """options: of `lora_options`. A starts at random from `seed` and B at 0, so each role is the base at first.

        Raises UserError where peft is missing, the model has adapters already, or no layer is named as target_modules.
        """
        if not installed("peft"):
            raise UserError("lora: needs `pip install peft` (extra 'lora'), or use lora=none")
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise UserError("lora: the model has adapters already; merge them (merge_and_unload) before training")
        self.model, self.roles = model, tuple(roles)
        model.requires_grad_(False)
        names = _targets(model, options["target_modules"])
        self.config = LoraConfig(
            r=options["r"], lora_alpha=options["alpha"], lora_dropout=0.0, target_modules=names, task_type="CAUSAL_LM"
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are the point
            warnings.filterwarnings("ignore", "fan_in_fan_out")  # peft sees for itself that Conv1D is transposed
            torch.manual_seed(seed)
            for role in self.roles:
                inject_adapter_in_model(self.config, model, adapter_name=role)
        self.layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        self._activate(self.roles[0])

    def parameters(self, role: str) -> dict[str, Tensor]:
        """The adapter of a role by name: what its optimizer trains and a checkpoint holds."""
        return {name: p for name, p in self.model.named_parameters() if "lora_" in name and f".{role}." in name}

    @contextmanager
    def using(self, role: str | None) -> Iterator[PreTrainedModel]:
        """Inside, the model is that of `role` (None: the base alone). A backward with activation checkpointing must
        run inside too, it computes the layers again."""
        self._activate(role)
        try:
            yield self.model
        finally:
            self._activate(self.roles[0])

    def _activate(self, role: str | None) -> None:
        for layer in self.layers:
            layer.enable_adapters(role is not None)
            if role is not None:
                layer.set_adapter(role)
            for name in self.roles:  # peft freezes what is not active; a role's optimizer keeps its parameters
                for part in (layer.lora_A[name], layer.lora_B[name]):
                    part.requires_grad_(name != REFERENCE)

    @torch.no_grad()
    def merged(self, role: str) -> dict[str, Tensor]:
        """State dict of the plain model with the adapter of `role` added to its weights; the model is not changed.

        A quantised base is dequantised: the merged weights are not rounded to its grid again.
        """
        deltas = {id(layer): layer.get_delta_weight(role) for layer in self.layers}
        merged = {}
        for name, module in self.model.named_modules():
            if id(module) in deltas:
                base = module.get_base_layer()
                weight = _dense(base)
                merged[f"{name}.weight"] = weight.add(deltas[id(module)].to(weight))
                if base.bias is not None:
                    merged[f"{name}.bias"] = base.bias
        for name, tensor in self.model.state_dict().items():
            if ".base_layer." not in name and ".lora_" not in name:
                merged[name] = tensor
        return merged

    def write(self, folder: str | Path, role: str, base: str) -> None:
        """The adapter of `role` as a folder that peft's `PeftModel.from_pretrained` loads. base: name of its model."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            "base_model.model." + name.replace(f".{role}.", "."): tensor.detach().contiguous()
            for name, tensor in self.parameters(role).items()
        }
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = self.config.to_dict() | {"base_model_name_or_path": base, "inference_mode": True}
        plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
        (folder / "adapter_config.json").write_text(json.dumps(plain, indent=1, default=str) + "\n", encoding="utf-8")


def _targets(model: PreTrainedModel, wanted: Sequence[str] | None) -> list[str]:
    """Full names of the trunk's linear layers, or of those that end in one of `wanted`."""
    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if isinstance(module, ADAPTED) and module is not head]
    if wanted is None:
        return linear
    for name in wanted:
        if not any(full == name or full.endswith(f".{name}") for full in linear):
            known = ", ".join(sorted({full.rpartition(".")[2] for full in linear}))
            raise UserError(f"lora: target_modules: no linear layer is called {name!r}; the model has {known}")
    return [full for full in linear if any(full == name or full.endswith(f".{name}") for name in wanted)]


def _dense(layer: nn.Module) -> Tensor:
    """A layer's weight, dequantised where bitsandbytes holds it."""
    if hasattr(layer.weight, "quant_state") or hasattr(layer.weight, "SCB"):
        from peft.utils.integrations import dequantize_module_weight

        return dequantize_module_weight(layer)
    return layer.weight
