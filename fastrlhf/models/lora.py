"""LoRA: one frozen base, a low-rank adapter for each role that is trained, on the layers of the model itself.

Hu et al. 2021 (LoRA): a layer computes x W^T + (alpha / r) x A^T B^T; W is frozen, B starts at 0. The role whose
adapter is active is the model; without one the base is the reference policy (ref_refresh_every: with a frozen adapter).
Where the run starts from an adapter (SFT with LoRA), that one stays under every role, so that the reference is the SFT
policy and not the bare base. Generation, scoring and training all read the same layers: nothing is merged and nothing
is copied. Left out: merging for rollouts. It would be faster, and lossy (the sampler would not be the trained policy)
until undone to the bit.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastrlhf.config.errors import UserError
from fastrlhf.models.adapter_folder import CONFIG, HEADS, PREFIX, WEIGHTS, AdapterFolder, LowRank, linear_layer
from fastrlhf.models.quantization import QuantizedLinear, quantization_note, quantized_layers
from fastrlhf.runtime.hardware import bitsandbytes, installed
from fastrlhf.runtime.optim import Optimizer, TrainedRole

POLICY, VALUE, REWARD = "policy", "value", "reward"  # the roles
REFERENCE = "reference"  # a role that never trains, where the reference moves
UNDER = "sft"  # the adapter that the run starts from
ADAPTED = (nn.Linear, Conv1D)


class Adapters:
    """Adapters named by role inside `model`, which stays the transformers model it was; `roles[0]` is active.

    report(sentence) is told what merging into a quantised base costs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        options: dict[str, Any],
        roles: Sequence[str],
        seed: int,
        under: AdapterFolder | None = None,
    ) -> None:
        """options: of `lora_options`. A starts at random from `seed` and B at 0, so each role is the base at first.
        under: an adapter that stays frozen under every role.

        Raises UserError where peft is missing, the model has adapters already, or no layer is named as target_modules.
        """
        if not installed("peft"):
            raise UserError("lora: needs `pip install peft` (extra 'lora'), or use lora=none")
        if installed("bitsandbytes"):
            bitsandbytes("lora:", "uninstall it")  # peft imports it too, and not offline
        from peft import LoraConfig
        from peft.tuners.tuners_utils import BaseTunerLayer

        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise UserError("lora: the model has adapters already; merge them (merge_and_unload) before training")
        self.model, self.roles = model, tuple(roles)
        self.report: Callable[[str], None] = lambda sentence: None
        self.fixed: dict[str, tuple[str, ...]] = {}  # adapters that never train -> what is active with them
        model.requires_grad_(False)
        names = _targets(model, options["target_modules"])
        config = LoraConfig(r=options["r"], lora_alpha=options["alpha"], lora_dropout=0.0, target_modules=names)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for role in self.roles:
                self._inject(config, role)
        self.under: tuple[str, ...] = ()
        if under is not None:
            self.add(UNDER, under)
            self.under = (UNDER,)
        if REFERENCE in self.roles:
            self.fixed[REFERENCE] = (*self.under, REFERENCE)
        self._activate(self.roles[0])

    def _inject(self, config: Any, role: str) -> None:
        from peft import inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are the point
            warnings.filterwarnings("ignore", "fan_in_fan_out")  # peft sees for itself that Conv1D is transposed
            inject_adapter_in_model(config, self.model, adapter_name=role)
        self.layers = {name: m for name, m in self.model.named_modules() if isinstance(m, BaseTunerLayer)}
        for layer in self.layers.values():
            if role in layer.lora_A and isinstance(layer.get_base_layer(), QuantizedLinear):  # no dtype to take over
                for part in (layer.lora_A[role], layer.lora_B[role]):
                    part.to(self.model.dtype)

    @torch.no_grad()
    def add(self, role: str, folder: AdapterFolder) -> None:
        """The adapter of a folder as a frozen role on the bare base. UserError where it does not fit the model."""
        from peft import LoraConfig

        plain = {name: layer.get_base_layer() for name, layer in self.layers.items()}
        modules = dict(self.model.named_modules()) | plain
        for name, low in folder.layers.items():
            linear_layer(modules, name, low, str(folder.path))
        ranks = {name: low.down.shape[0] for name, low in folder.layers.items()}
        with torch.random.fork_rng(devices=[]):  # peft draws values that are overwritten
            config = LoraConfig(r=max(ranks.values()), rank_pattern=ranks, target_modules=list(ranks))
            self._inject(config, role)
        self.fixed[role] = (role,)
        for name, low in folder.layers.items():
            layer = self.layers[name]
            layer.lora_A[role].weight.copy_(low.down)
            layer.lora_B[role].weight.copy_(low.up)
            layer.scaling[role] = low.scale
        self._activate(self.roles[0])

    def trained(
        self,
        role: str,
        optimizer: Optimizer,
        parts: dict[str, Tensor] | None = None,
        head: dict[str, Tensor] | None = None,
    ) -> TrainedRole:
        """What a run checkpoints (parts; None: the adapter) and exports of a role; head: of a reward model."""
        parts = self.parameters(role) if parts is None else parts
        write = partial(self.write, role=role, head=head)
        return TrainedRole(self.model, optimizer, parts, partial(self.merged, role), write)

    def notes(self, report: Callable[[str], None]) -> list[str]:
        """Sentences for the run's log: what the base holds and what lies under the roles. report: of the class."""
        self.report = report
        quantized = [quantization_note(self.model)] if quantized_layers(self.model) else []
        under = ["lora: the adapter the run starts from stays under every role"] if self.under else []
        shared = ["reward: an adapter on the policy's base"] if REWARD in self.fixed else []
        return quantized + under + shared

    def parameters(self, role: str) -> dict[str, Tensor]:
        """The adapter of a role by name: what its optimizer trains and a checkpoint holds."""
        return {name: p for name, p in self.model.named_parameters() if "lora_" in name and f".{role}." in name}

    @contextmanager
    def using(self, role: str | None) -> Iterator[PreTrainedModel]:
        """Inside, the model is that of `role` (None: what the run started from). A backward with activation
        checkpointing must run inside too, it computes the layers again."""
        self._activate(role)
        try:
            yield self.model
        finally:
            self._activate(self.roles[0])

    def active(self, role: str | None) -> tuple[str, ...]:
        """The adapters that make the model of `role`, in the order they are added."""
        return self.fixed.get(role) or self.under + (() if role is None else (role,))

    def _activate(self, role: str | None) -> None:
        active = self.active(role)
        for layer in self.layers.values():
            layer.enable_adapters(bool(active))
            if active:
                layer.set_adapter(list(active))
            for name, part in (*layer.lora_A.items(), *layer.lora_B.items()):
                part.requires_grad_(name not in self.fixed)  # peft's switch would freeze the roles that wait

    @torch.no_grad()
    def start_from(self, role: str, other: str) -> bool:
        """Copy the adapter `other` into `role`, to compute the same; False, and nothing changed, where the two differ
        in layers or ranks, or another adapter lies under `role`."""
        mine, its = self.low_rank((role,)), self.low_rank((other,))
        if self.active(role) != (role,) or {n: m.down.shape for n, m in mine.items()} != {
            n: m.down.shape for n, m in its.items()
        }:
            return False
        for name, low in its.items():
            mine[name].down.copy_(low.down)
            mine[name].up.copy_(low.up * (low.scale / mine[name].scale))
        return True

    def low_rank(self, names: Sequence[str]) -> dict[str, LowRank]:
        """By layer, what the adapters of these names add to its weight, as one: with several, A = [A1; A2] and
        B = [s1 B1, s2 B2] with scale 1, which is their sum exactly."""
        found = {}
        for name, layer in self.layers.items():
            parts = [
                LowRank(layer.lora_A[n].weight, layer.lora_B[n].weight, layer.scaling[n])
                for n in names
                if n in layer.lora_A
            ]
            if len(parts) == 1:
                found[name] = parts[0]
            elif parts:
                ups = torch.cat([part.up * part.scale for part in parts], 1)
                found[name] = LowRank(torch.cat([part.down for part in parts]), ups, 1.0)
        return found

    @torch.no_grad()
    def merged(self, role: str) -> dict[str, Tensor]:
        """State dict of the plain model with what is active with `role` added to its weights; the model is not changed.

        The sum is taken in fp32 and rounded to the dtype of the model once. A quantised base is dequantised: the merged
        weights are not rounded to its grid again. What that costs goes to `report`.
        """
        deltas, merged, lost, total = self.low_rank(self.active(role)), {}, 0.0, 0.0
        for name, module in self.model.named_modules():
            base = self.layers[name].get_base_layer() if name in self.layers else module
            quantized = isinstance(base, QuantizedLinear)
            if name not in self.layers and not (quantized and not name.endswith(".base_layer")):
                continue
            exact = base.dense(torch.float32) if quantized else base.weight.float()
            transposed = isinstance(base, Conv1D) or (quantized and base.transposed)
            exact = exact.t() if quantized and transposed else exact
            if name in deltas:
                low = deltas[name]
                delta = low.up.float() @ low.down.float() * low.scale
                exact = exact + (delta.t() if transposed else delta)
            merged[f"{name}.weight"] = exact.to(self.model.dtype).contiguous()
            if base.bias is not None:
                merged[f"{name}.bias"] = base.bias
            if quantized:
                lost += float((merged[f"{name}.weight"].float() - exact).square().sum())
                total += float(exact.square().sum())
        done = {name.rpartition(".")[0] for name in merged}
        for name, tensor in self.model.state_dict().items():
            if name.rpartition(".")[0] not in done and ".base_layer." not in name and ".lora_" not in name:
                merged[name] = tensor
        if total:
            self.report(self._loss(math.sqrt(lost / total)))
        return merged

    def _loss(self, rounding: float) -> str:
        dtype = str(self.model.dtype).removeprefix("torch.")
        return (
            f"merged into the dequantised base: rounding to {dtype} changes these weights by {rounding:.2g} of their "
            f"Frobenius norm; the base they were trained on differs from the one given by "
            f"{self.model.base_model.quantization_error:.2%}, which stays in them"
        )

    def write(self, folder: str | Path, role: str, head: Mapping[str, Tensor] | None = None) -> None:
        """What is active with `role` as a folder that peft's `PeftModel.from_pretrained` loads over the model that this
        one was loaded from. head: parameters of `score`, of a reward model."""
        folder, layers = Path(folder), self.low_rank(self.active(role))
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{PREFIX}score.{name}": tensor.detach().clone() for name, tensor in (head or {}).items()}
        for name, low in layers.items():
            tensors[f"{PREFIX}{name}.lora_A.weight"] = low.down.detach().contiguous()
            tensors[f"{PREFIX}{name}.lora_B.weight"] = low.up.detach().contiguous()
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        config = self._config(layers, base_name(self.model), None if head is None else sorted(HEADS))
        (folder / CONFIG).write_text(json.dumps(config, indent=1, default=str) + "\n", encoding="utf-8")

    def _config(self, layers: dict[str, LowRank], base: str, saved: list[str] | None) -> dict[str, Any]:
        """Ranks and alphas by layer, where one rank is not enough: adapters of two runs may have been joined."""
        from peft import LoraConfig

        ranks = {name: low.down.shape[0] for name, low in layers.items()}
        alphas = {name: low.scale * ranks[name] for name, low in layers.items()}
        rank, alpha = max(ranks.values()), max(alphas.values())
        config = LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=sorted(layers), modules_to_save=saved,
            rank_pattern={} if set(ranks.values()) == {rank} else ranks,
            alpha_pattern={} if set(alphas.values()) == {alpha} else alphas,
            task_type="CAUSAL_LM" if saved is None else "SEQ_CLS", base_model_name_or_path=base, inference_mode=True,
            fan_in_fan_out=any(_is_transposed(layer.get_base_layer()) for layer in self.layers.values()),
        )  # fmt: skip
        return {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}


def base_name(model: PreTrainedModel) -> str:
    """What an adapter folder names as its model: a folder by its whole path, else the hub id or file as given."""
    name = str(model.config._name_or_path)
    return str(Path(name).resolve()) if name and Path(name).exists() else name


def _is_transposed(layer: nn.Module) -> bool:
    return isinstance(layer, Conv1D) or (isinstance(layer, QuantizedLinear) and layer.transposed)


def _targets(model: PreTrainedModel, wanted: Sequence[str] | None) -> list[str]:
    """Full names of the trunk's linear layers, or of those that end in one of `wanted`."""
    trunk, head = {id(module) for module in model.base_model.modules()}, model.get_output_embeddings()
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ADAPTED) and id(module) in trunk and module is not head
    }
    for name, module in linear.items():
        if not (isinstance(module, QuantizedLinear) or module.weight.is_floating_point()):
            raise UserError(f"lora: the layer {name!r} is quantised already; load it in bf16 and use quantize=nf4")
    if wanted is None:
        return list(linear)
    for name in wanted:
        if not any(full == name or full.endswith(f".{name}") for full in linear):
            known = ", ".join(sorted({full.rpartition(".")[2] for full in linear}))
            raise UserError(f"lora: target_modules: no linear layer is called {name!r}; the model has {known}")
    return [full for full in linear if any(full == name or full.endswith(f".{name}") for name in wanted)]
