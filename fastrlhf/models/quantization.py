"""`quantize`: the frozen weights of a trunk's linear layers in 4 or 8 bits, in the formats of bitsandbytes.

nf4: Dettmers et al. 2023 (QLoRA), sec. 3: blocks of 64 weights, each scaled by its largest magnitude (fp32) to 16
levels: 0.5625 bytes a weight. int8: Dettmers et al. 2022 (LLM.int8()): a row is scaled by its largest magnitude to
-127..127: 1 byte a weight and 4 a row.

bitsandbytes' own layers are left out on purpose. They round differently in training and in evaluation (int8: quantised
activations; on a CPU: repacked weights), and PPO's first ratio must be exactly 1. Here a weight is always
dequantised, and multiplied in the dtype of the model; the backward pass dequantises it again, nothing of it is kept.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastrlhf.config.errors import UserError
from fastrlhf.runtime.hardware import bitsandbytes

BLOCK = 64  # weights that share a scale in nf4


class QuantizedLinear(nn.Linear):
    """y = x W^T + b with W [out, in] held in nf4 or int8. Frozen: no gradient of W, that of x is exact.

    transposed: the layer it stands for holds W^T (GPT-2's Conv1D).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, kind: str, *, transposed: bool = False) -> None:
        """weight [out, in] in fp32, bf16 or fp16; quantised on the device it is on."""
        nn.Module.__init__(self)  # nn.Linear's own would allocate the dense weight
        self.out_features, self.in_features = weight.shape
        self.kind, self.transposed = kind, transposed
        functions = _bitsandbytes_functions(kind)
        if kind == "nf4":
            packed, state = functions.quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
            scale = state.absmax
        else:
            packed, scale, _ = functions.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        self.weight: Any = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("scale", scale.float())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W [out, in], dequantised."""
        functions = _bitsandbytes_functions(self.kind)
        if self.kind == "int8":
            return functions.int8_vectorwise_dequant(self.weight, self.scale).to(dtype)
        shape = torch.Size((self.out_features, self.in_features))
        how = {"shape": shape, "dtype": dtype, "blocksize": BLOCK, "quant_type": "nf4"}
        return functions.dequantize_4bit(self.weight, functions.QuantState(self.scale, **how))

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kind}"


def _bitsandbytes_functions(kind: str) -> ModuleType:
    return bitsandbytes(f"quantize: {kind!r}", "use quantize=none").functional


class _Product(torch.autograd.Function):
    """F.linear that keeps the layer for its backward pass, not the dense weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dense(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.dense(grad.dtype), None


@torch.no_grad()
def quantize_trunk(model: PreTrainedModel, kind: str, device: torch.device) -> None:
    """Replace the linear layers of the trunk, in place, one after the other on `device`; heads, embeddings and norms
    stay. Sets `quantization_error` of the trunk: |W_q - W| / |W| over all of them (Frobenius norms).

    Raises UserError where bitsandbytes is missing or the model has no linear layer in its trunk.
    """
    layers = linear_layers(model)
    if not layers:
        raise UserError(f"quantize: {type(model).__name__} has no linear layers in its trunk; leave quantize out")
    off = total = 0.0
    for name, layer in layers.items():
        if isinstance(layer, QuantizedLinear):
            continue
        if not layer.weight.is_floating_point():
            raise UserError("quantize: the model is quantised already; load it in bf16 or fp32, it is quantised here")
        weight = layer.weight.detach().to(device)
        weight = weight.t() if is_transposed(layer) else weight
        bias = None if layer.bias is None else layer.bias.detach().to(device)
        quantized = QuantizedLinear(weight, bias, kind, transposed=is_transposed(layer))
        quantized.train(layer.training)
        off += float((quantized.dense(torch.float32) - weight.float()).square().sum())
        total += float(weight.float().square().sum())
        model.set_submodule(name, quantized)
    if total:
        model.base_model.quantization_error = math.sqrt(off / total)


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear | Conv1D]:
    """The linear layers of the trunk by their full names; the output head is none, wherever the model holds it."""
    trunk, head = {id(module) for module in model.base_model.modules()}, model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module) in trunk and module is not head
    }


def is_transposed(layer: nn.Module) -> bool:
    """Whether the layer holds W^T [in, out], or stands for one that does."""
    return isinstance(layer, Conv1D) or (isinstance(layer, QuantizedLinear) and layer.transposed)


def dense_weight(layer: nn.Linear | Conv1D) -> Tensor:
    """W [out, in] in fp32, dequantised where it must be."""
    if isinstance(layer, QuantizedLinear):
        return layer.dense(torch.float32)
    return layer.weight.float().t() if is_transposed(layer) else layer.weight.float()


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def quantization_note(model: PreTrainedModel) -> str:
    """A sentence for the run's log."""
    layers = quantized_layers(model).values()
    size = sum(layer.weight.nbytes + layer.scale.nbytes for layer in layers)
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    return (
        f"quantize: {len(layers)} linear layers in {next(iter(layers)).kind}, {size / weights:.3g} bytes a weight; "
        f"they differ from the given ones by {model.base_model.quantization_error:.2%} (Frobenius norm)"
    )
