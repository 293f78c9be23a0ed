"""A LoRA adapter as peft writes it: `adapter_config.json` beside `adapter_model.safetensors`.

It is read here without peft: names of layers, A and B of each, its scale alpha / r, the head of a reward model. The
format is the one that peft documents for its checkpoints. An adapter that changes the model in another way too (DoRA,
trained biases, further modules) is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastrlhf.config.errors import UserError, shown
from fastrlhf.config.inputs import MAX_NUMBER
from fastrlhf.config.limits import time_limit
from fastrlhf.parallel.mapped import change

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
HEADS = {"score", "classifier"}  # what peft lists under modules_to_save of a sequence classifier
PATTERN_SECONDS = 1.0
REFUSED = {"use_dora": False, "bias": "none", "lora_bias": False, "trainable_token_indices": None}


class LowRank(NamedTuple):
    """A summand of a layer's weight [out, in]: scale * up [out, r] @ down [r, in]."""

    down: Tensor
    up: Tensor
    scale: float

    def delta(self) -> Tensor:
        """The summand itself, [out, in] fp32."""
        return self.up.float() @ self.down.float() * self.scale

    @classmethod
    def joined(cls, parts: Sequence[LowRank]) -> LowRank:
        """Several as one: A = [A1; A2] and B = [s1 B1, s2 B2] with scale 1 are their sum exactly."""
        if len(parts) == 1:
            return parts[0]
        return cls(torch.cat([p.down for p in parts]), torch.cat([p.up * p.scale for p in parts], 1), 1.0)


@dataclass(frozen=True)
class AdapterFolder:
    """layers: by the layer's full name in the model. head: parameters of `score`, of a reward model; else empty."""

    path: Path
    base: str
    layers: dict[str, LowRank]
    head: dict[str, Tensor]


def is_adapter(source: object) -> bool:
    return isinstance(source, (str, Path)) and (Path(source) / CONFIG).is_file()


def adapter_config(source: str | Path, role: str) -> dict[str, Any]:
    """UserError for what is no LoRA adapter, names no base model, or holds more than low-rank matrices."""
    path = Path(source) / CONFIG
    where = f"{role}: {path}"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: damaged ({error})") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise UserError(f"{where}: peft_type is {kind!r}; only LORA adapters can be read")
    if not isinstance(config.get("base_model_name_or_path"), str) or not config["base_model_name_or_path"]:
        raise UserError(f"{where}: names no base_model_name_or_path; write the folder or hub id of its model in")
    for name, harmless in REFUSED.items():
        if config.get(name) not in (harmless, None):
            raise UserError(f"{where}: {name} = {config[name]!r} cannot be read; merge the adapter with peft")
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or any(str(name) not in HEADS for name in saved):
        raise UserError(f"{where}: modules_to_save = {shown(saved)} cannot be read; merge the adapter with peft")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{where}: alpha_pattern is {shown(patterns)}, where a mapping belongs")
    for name, alpha in {"lora_alpha": config.get("lora_alpha"), **patterns}.items():
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) <= MAX_NUMBER:
            raise UserError(f"{where}: {name} is {shown(alpha)}, where a number belongs")
    return config


def base_of(source: str | Path, role: str) -> str:
    """The folder, hub id or file of the adapter's model, as its config names it."""
    base = named = adapter_config(source, role)["base_model_name_or_path"]
    seen = {Path(source).resolve()}
    while is_adapter(named):
        if Path(named).resolve() in seen:
            raise UserError(
                f"{role}: {Path(source) / CONFIG}: base_model_name_or_path leads back to {named!r}, an adapter; "
                "write the folder or hub id of its model in"
            )
        seen.add(Path(named).resolve())
        named = adapter_config(named, role)["base_model_name_or_path"]
    return base


def is_reward_adapter(source: str | Path, role: str) -> bool:
    return adapter_config(source, role).get("task_type") == "SEQ_CLS"


def read_adapter(source: str | Path, role: str) -> AdapterFolder:
    """The whole folder, its tensors on the CPU. UserError names the file or tensor that is wrong."""
    config, path = adapter_config(source, role), Path(source)
    where = f"{role}: {path / WEIGHTS}"
    try:
        tensors = load_file(path / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{role}: cannot read {path / WEIGHTS}: {error}") from error
    sides: dict[str, dict[str, Tensor]] = {}
    head = {}
    for key, tensor in tensors.items():
        part = re.fullmatch(re.escape(PREFIX) + r"(?:(.+)\.lora_(A|B)\.weight|score\.(weight|bias))", key)
        if part is None:
            raise UserError(f"{where}: cannot read {key!r}; merge the adapter with peft")
        if part[3]:
            head[part[3]] = tensor
        else:
            sides.setdefault(part[1], {})[part[2]] = tensor
    layers = {}
    for name, pair in sides.items():
        if pair.keys() != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise UserError(f"{where}: lora_A and lora_B of {name!r} do not fit each other")
        layers[name] = LowRank(pair["A"], pair["B"], _scale(config, name, pair["A"].shape[0]))
    if config.get("task_type") == "SEQ_CLS" and "weight" not in head:
        raise UserError(f"{where}: the adapter of a reward model, but without the weights of its head")
    return AdapterFolder(path, config["base_model_name_or_path"], layers, head)


def _scale(config: dict[str, Any], name: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) of rank-stabilised LoRA (Kalajdzievski 2023)."""
    patterns = config.get("alpha_pattern") or {}
    with time_limit(PATTERN_SECONDS, f"{CONFIG}: alpha_pattern takes more than {PATTERN_SECONDS:g} s for one layer"):
        try:
            given = (alpha for key, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", name))
            alpha = next(given, config["lora_alpha"])
        except re.error as error:
            raise UserError(f"{CONFIG}: alpha_pattern holds a pattern that is none ({error})") from error
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def write_adapter(
    folder: Path, layers: Mapping[str, LowRank], base: str, head: Mapping[str, Tensor] | None, *, transposed: bool
) -> None:
    """Write a folder that peft's `PeftModel.from_pretrained` loads over the model `base`.

    head: parameters of `score`, of a reward model. transposed: some of the layers hold W^T (GPT-2's Conv1D). Ranks and
    alphas are named by layer where one is not enough: adapters of two runs may have been joined.
    """
    from peft import LoraConfig

    tensors = {f"{PREFIX}score.{name}": tensor.detach().clone() for name, tensor in (head or {}).items()}
    for name, low in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = low.down.detach().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = low.up.detach().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    ranks = {name: low.down.shape[0] for name, low in layers.items()}
    alphas = {name: low.scale * ranks[name] for name, low in layers.items()}
    config = LoraConfig(target_modules=sorted(layers), base_model_name_or_path=base, inference_mode=True)
    config.task_type, config.fan_in_fan_out = "CAUSAL_LM", transposed
    config.r, config.lora_alpha = max(ranks.values()), max(alphas.values())
    if len({*ranks.values()}) > 1:
        config.rank_pattern = ranks
    if len({*alphas.values()}) > 1:
        config.alpha_pattern = alphas
    if head is not None:
        config.task_type, config.modules_to_save = "SEQ_CLS", sorted(HEADS)
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    (folder / CONFIG).write_text(json.dumps(plain, indent=1, default=str) + "\n", encoding="utf-8")


def linear_layer(modules: Mapping[str, nn.Module], name: str, low: LowRank, where: str) -> nn.Linear | Conv1D:
    """The layer an adapter belongs to. UserError where the model, by name of its modules, has none of that size."""
    module = modules.get(name)
    if not isinstance(module, (nn.Linear, Conv1D)):
        raise UserError(f"{where}: the model has no linear layer {name!r}; is it the adapter's own model?")
    # Conv1D holds [in, out]; the weight of a linear layer may be packed.
    shape = [module.out_features, module.in_features] if isinstance(module, nn.Linear) else [*module.weight.shape[::-1]]
    wanted = [low.up.shape[0], low.down.shape[1]]
    if wanted != shape:
        raise UserError(
            f"{where}: the adapter of {name!r} is for a layer {wanted}, the model's is {shape}; is it the adapter's "
            "own model?"
        )
    return module


@torch.no_grad()
def merge_into(model: PreTrainedModel, folder: AdapterFolder) -> PreTrainedModel:
    """Add the adapter to the weights, in place, of a model that waits when they are taken (parallel/mapped.py); summed
    in fp32, rounded to the dtype of the model once."""
    modules = dict(model.named_modules())
    for name, low in folder.layers.items():
        module = linear_layer(modules, name, low, str(folder.path))
        change(module.weight, partial(_sum, low, isinstance(module, Conv1D)))
    return model


def _sum(low: LowRank, transposed: bool, weight: Tensor) -> Tensor:
    delta = low.delta().to(weight.device)
    return (weight.float() + (delta.t() if transposed else delta)).to(weight.dtype)


def take_generation_config(model: PreTrainedModel, folder: Path) -> None:
    """Stop tokens and the like from beside the adapter, where they are."""
    path = folder / "generation_config.json"
    if path.is_file():
        model.generation_config = GenerationConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
