"""LoRA: one frozen base, a low-rank adapter for each role that is trained, on the layers of the model itself.

Hu et al. 2021 (LoRA): a layer computes x W^T + (alpha / r) x A^T B^T; W is frozen, B starts at 0. The role whose
adapter is active is the model; without one the base is the reference policy (ref_refresh_every: with a frozen adapter).
Where the run starts from an adapter (SFT with LoRA), that one stays under every role, so that the reference is the SFT
policy and not the bare base. Generation, scoring and training all read the same layers: nothing is merged and nothing
is copied. Left out: merging for rollouts. It would be faster, and lossy (the sampler would not be the trained policy)
until undone to the bit.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrlhf.config.errors import UserError
from fastrlhf.models import quantization
from fastrlhf.models.adapter_folder import AdapterFolder, LowRank, linear_layer, write_adapter
from fastrlhf.models.quantization import QuantizedLinear, is_transposed, quantized_layers
from fastrlhf.parallel import sharding
from fastrlhf.runtime import distributed
from fastrlhf.runtime.hardware import bitsandbytes, installed
from fastrlhf.runtime.optim import Optimizer, TrainedRole

POLICY, VALUE, REWARD = "policy", "value", "reward"  # the roles
REFERENCE = "reference"  # a role that never trains, where the reference moves
Tensors = dict[str, Tensor]
BASE_ADAPTER = "sft"  # the adapter that the run starts from


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
        base_adapter: AdapterFolder | None,
        report: Callable[[str], None],
    ) -> None:
        """options: of `lora_options`. A starts at random from `seed` and B at 0, so each role is the base at first.
        base_adapter: stays frozen under every role.

        Raises UserError where peft is missing, the model has adapters already, or no layer is named as target_modules.
        """
        if not installed("peft"):
            raise UserError("lora: needs `pip install peft` (extra 'lora'), or use lora=none")
        if installed("bitsandbytes"):
            bitsandbytes("lora:", "uninstall it")  # peft imports it too, and not offline
        from peft.tuners.tuners_utils import BaseTunerLayer

        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise UserError("lora: the model has adapters already; merge them (merge_and_unload) before training")
        self.model, self.roles = model, tuple(roles)
        self.report = report
        self.fixed: dict[str, tuple[str, ...]] = {}  # adapters that never train -> what is active with them
        model.requires_grad_(False)
        names = target_layers(model, options["target_modules"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for role in self.roles:
                self._inject(role, r=options["r"], lora_alpha=options["alpha"], target_modules=names)
        self.base_adapter = () if base_adapter is None else (BASE_ADAPTER,)
        if base_adapter is not None:
            self.add(BASE_ADAPTER, base_adapter)
        if REFERENCE in self.roles:
            self.fixed[REFERENCE] = (*self.base_adapter, REFERENCE)
        self._activate(self.roles[0])

    # ------------------------------------------------------------------------------------------ what the model holds

    def _inject(self, role: str, **settings: Any) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are the point
            warnings.filterwarnings("ignore", "fan_in_fan_out")  # peft sees for itself that Conv1D is transposed
            inject_adapter_in_model(LoraConfig(**settings, lora_dropout=0.0), self.model, adapter_name=role)
        self.layers = {name: m for name, m in self.model.named_modules() if isinstance(m, BaseTunerLayer)}
        for layer in self.layers.values():
            if role in layer.lora_A and isinstance(layer.get_base_layer(), QuantizedLinear):  # no dtype to take over
                layer.lora_A[role].to(self.model.dtype)
                layer.lora_B[role].to(self.model.dtype)

    @torch.no_grad()
    def add(self, role: str, folder: AdapterFolder) -> None:
        """The adapter of a folder as a frozen role on the bare base. UserError where it does not fit the model."""
        plain = {name: layer.get_base_layer() for name, layer in self.layers.items()}
        modules = dict(self.model.named_modules()) | plain
        for name, low in folder.layers.items():
            linear_layer(modules, name, low, str(folder.path))
        ranks = {name: low.down.shape[0] for name, low in folder.layers.items()}
        with torch.random.fork_rng(devices=[]):  # peft draws values that are overwritten
            self._inject(role, r=max(ranks.values()), rank_pattern=ranks, target_modules=list(ranks))
        self.fixed[role] = (role,)
        for name, low in folder.layers.items():
            layer = self.layers[name]
            layer.lora_A[role].weight.copy_(low.down)
            layer.lora_B[role].weight.copy_(low.up)
            layer.scaling[role] = low.scale
        self._activate(self.roles[0])

    def parameters(self, role: str) -> dict[str, Tensor]:
        """The adapter of a role by name: what its optimizer trains and a checkpoint holds."""
        return {name: p for name, p in self.model.named_parameters() if "lora_" in name and f".{role}." in name}

    # ----------------------------------------------------------------------------------------- which role the model is

    @contextmanager
    def using(self, role: str | None) -> Iterator[PreTrainedModel]:
        """The model is that of `role` in this context (None: what the run started from). A backward with activation
        checkpointing belongs in it too: it computes the layers again."""
        self._activate(role)
        try:
            yield self.model
        finally:
            self._activate(self.roles[0])

    def active(self, role: str | None) -> tuple[str, ...]:
        """The adapters that make the model of `role`, in the order they are added."""
        return self.fixed.get(role) or self.base_adapter + (() if role is None else (role,))

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
        shapes, others = ({name: low.down.shape for name, low in layers.items()} for layers in (mine, its))
        if self.active(role) != (role,) or shapes != others:
            return False
        for name, low in its.items():
            mine[name].down.copy_(low.down)
            mine[name].up.copy_(low.up * (low.scale / mine[name].scale))
        return True

    # ------------------------------------------------------------------------------------------------ what is saved

    def trained(
        self,
        role: str,
        optimizer: Optimizer,
        parts: Tensors | None = None,
        head: Tensors | None = None,
        shown: Callable[[Tensor], Tensor] | None = None,
    ) -> TrainedRole:
        """A role as a run checkpoints it (parts; None: the adapter) and exports it; head: of a reward model; shown:
        what an adapter folder holds of each of its tensors; None: itself."""
        parts = parts or self.parameters(role)
        return TrainedRole(
            self.model, optimizer, parts, partial(self.merged, role), partial(self.writer, role, head, shown)
        )

    def low_rank(self, names: Sequence[str], *, whole: bool = False) -> dict[str, LowRank]:
        """By layer, the sum that the adapters of these names add to its weight; of a sharded model those that are
        gathered now. whole: of all, gathered to the lead by all ranks together."""
        parts: dict[str, list[LowRank]] = {}
        for (name, layer), adapter in product(self.layers.items(), names):
            if adapter in layer.lora_A and (whole or _is_here(layer)):
                down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                if whole:
                    down, up = sharding.whole_tensor(down), sharding.whole_tensor(up)
                    if not distributed.is_lead():
                        continue
                parts.setdefault(name, []).append(LowRank(down, up, layer.scaling[adapter]))
        return {name: LowRank.joined(adapters) for name, adapters in parts.items()}

    @torch.no_grad()
    def merged(self, role: str) -> dict[str, Tensor]:
        """State dict of the plain model with what is active with `role` added to its weights; the model is not changed.

        The sum is taken in fp32 and rounded to the dtype of the model once. A quantised base is dequantised: the merged
        weights are not rounded to its grid again. What that costs goes to `report`. Of a sharded model what is gathered
        is there.
        """
        deltas = self.low_rank(self.active(role))
        layers = {name: layer.get_base_layer() for name, layer in self.layers.items()}
        layers |= {n: layer for n, layer in quantized_layers(self.model).items() if not n.endswith(".base_layer")}
        merged, lost, total = {}, 0.0, 0.0
        for name, layer in layers.items():
            if not _is_here(layer):
                continue
            weight = quantization.dense_weight(layer)
            if name in deltas:
                weight = weight + deltas[name].delta()
            weight = weight.t() if is_transposed(layer) else weight
            merged[f"{name}.weight"] = weight.to(sharding.dtype_of(self.model)).contiguous()
            if layer.bias is not None:
                merged[f"{name}.bias"] = layer.bias
            if isinstance(layer, QuantizedLinear):
                lost += float((merged[f"{name}.weight"].float() - weight).square().sum())
                total += float(weight.square().sum())
        for name, tensor in sharding.state_dict(self.model).items():
            if name.rpartition(".")[0] not in layers and ".base_layer." not in name and ".lora_" not in name:
                merged[name] = tensor
        if total:
            self.report(_merging_note(self.model, math.sqrt(lost / total)))
        return merged

    def writer(
        self, role: str, head: Tensors | None = None, shown: Callable[[Tensor], Tensor] | None = None
    ) -> Callable[[Path], None]:
        """What writes what is active with `role` as an adapter folder over the model that this one was loaded from;
        head, shown: see `trained`. All ranks call it, and the lead's writes."""
        transposed = any(is_transposed(layer.get_base_layer()) for layer in self.layers.values())
        layers = self.low_rank(self.active(role), whole=True)
        if head is not None:
            head = {name: sharding.whole_tensor(tensor) for name, tensor in head.items()}
        if head is not None and shown is not None and distributed.is_lead():
            head = {name: shown(tensor) for name, tensor in head.items()}
        return partial(write_adapter, layers=layers, base=_base_name(self.model), head=head, transposed=transposed)

    def notes(self) -> list[str]:
        """Sentences for the run's log: what the base holds and what lies under the roles."""
        quantized = [quantization.quantization_note(self.model)] if quantized_layers(self.model) else []
        under = ["lora: the adapter the run starts from stays under every role"] if self.base_adapter else []
        return quantized + under


def _is_here(layer: torch.nn.Module) -> bool:
    """Whether no weight of it is a share."""
    return not any(map(sharding.is_share, layer.parameters()))


def _merging_note(model: PreTrainedModel, rounding: float) -> str:
    dtype = str(model.dtype).removeprefix("torch.")
    return (
        f"merged into the dequantised base: rounding to {dtype} changes these weights by {rounding:.2g} of their "
        f"Frobenius norm; the base they were trained on differs from the one given by "
        f"{model.base_model.quantization_error:.2%}, which stays in them"
    )


def _base_name(model: PreTrainedModel) -> str:
    """The name of its model in an adapter folder: a folder by its whole path, else the hub id or file as given."""
    name = str(model.config._name_or_path)
    return str(Path(name).resolve()) if name and Path(name).exists() else name


def target_layers(model: PreTrainedModel, wanted: Sequence[str] | None) -> list[str]:
    """Full names of the trunk's linear layers, or of those that end in one of `wanted`."""
    linear = quantization.linear_layers(model)
    for name, module in linear.items():
        if not (isinstance(module, QuantizedLinear) or module.weight.is_floating_point()):
            raise UserError(f"lora: the layer {name!r} is quantised already; load it in bf16 and use quantize=nf4")
    if wanted is None:
        return list(linear)
    chosen = {name: [full for full in linear if f".{full}".endswith(f".{name}")] for name in wanted}
    for name, layers in chosen.items():
        if not layers:
            known = ", ".join(sorted({full.rpartition(".")[2] for full in linear}))
            raise UserError(f"lora: target_modules: no linear layer is called {name!r}; the model has {known}")
    return [full for full in linear if any(full in layers for layers in chosen.values())]
