"""The head on rows of hidden states: its operands, and the block of logits that every kernel behind it starts from."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tuning
from .backend import INTERPRET


@triton.jit
def _operand(start, rows, depth, low, stride, row_live, width, WIDE: tl.constexpr, DEPTH: tl.constexpr):
    """A [rows, DEPTH] block of a matrix whose last dimension is dense."""
    place = low + depth
    values = tl.load(start + rows[:, None] * stride + place[None, :], mask=row_live[:, None] & (place < width)[None, :],
                     other=0.0)  # fmt: skip
    return values.to(tl.float32) if WIDE else values


@triton.jit
def near(label, low, COLUMNS: tl.constexpr):
    """Where labels lie in a block that starts at column `low`, in 32 bits; -1 for those outside."""
    return tl.where((label >= low) & (label < low + COLUMNS), label - low, -1).to(tl.int32)


@triton.jit
def head_logits(
    x, w, bias, v, lora_b, rows, columns, row_live, column_live, x_stride, w_stride, width, rank, logit_scale, softcap,
    first_row, first_column, DESCRIPTORS: tl.constexpr, BIAS: tl.constexpr, LORA: tl.constexpr, SOFTCAP: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, LORA_PRECISION: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """z of a block [ROWS, COLUMNS] in fp32, before the temperature, and dz / d accumulator.

    DESCRIPTORS: x and w are tensor descriptors of such blocks, which start at first_row and first_column.
    """
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    depth = tl.arange(0, DEPTH)
    for low in range(0, width, DEPTH):
        if DESCRIPTORS:
            a = x.load([first_row, low])
            b = w.load([first_column, low])
            if WIDE:
                a, b = a.to(tl.float32), b.to(tl.float32)
        else:
            a = _operand(x, rows, depth, low, x_stride, row_live, width, WIDE, DEPTH)
            b = _operand(w, columns, depth, low, w_stride, column_live, width, WIDE, DEPTH)
        sums = tl.dot(a, tl.trans(b), sums, input_precision=PRECISION)
    if LORA:  # v = scale * x A^T and B in fp32: the adapter is as exact as the rest
        narrow = tl.arange(0, 16)
        for low in range(0, rank, 16):
            a = _operand(v, rows, narrow, low, rank, row_live, rank, True, 16)
            b = _operand(lora_b, columns, narrow, low, rank, column_live, rank, True, 16)
            sums = tl.dot(a, tl.trans(b), sums, input_precision=LORA_PRECISION)
    if BIAS:
        sums += tl.load(bias + columns, mask=column_live, other=0.0).to(tl.float32)[None, :]
    z = sums * logit_scale
    slope = tl.zeros((ROWS, COLUMNS), tl.float32) + logit_scale
    if SOFTCAP:
        bent = 1.0 - 2.0 / (tl.exp(z * (2.0 / softcap)) + 1.0)  # tanh
        z = bent * softcap
        slope = slope * (1.0 - bent * bent)
    return z, slope


class Head(NamedTuple):
    """The operands of the head on the rows that count, and its scalars."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    v: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    lora_scale: float
    temperature: Tensor | float
    logit_scale: float
    softcap: float | None

    @classmethod
    def build(cls, hidden, weight, rows, bias, temperature, logit_scale, softcap, lora_a, lora_b, lora_scale) -> Head:
        """rows: the indices that count, or None for all."""
        x = hidden if rows is None else hidden.index_select(0, rows)
        if isinstance(temperature, Tensor) and rows is not None:
            temperature = temperature.index_select(0, rows)
        x, weight = (t if t.stride(-1) == 1 or t.numel() == 0 else t.contiguous() for t in (x, weight))
        a, b = (None if t is None else t.float().contiguous() for t in (lora_a, lora_b))
        v = None if a is None else (lora_scale * (x.float() @ a.T)).contiguous()
        bias = None if bias is None else bias.contiguous()
        return cls(x, weight, bias, v, a, b, lora_scale, temperature, float(logit_scale), softcap)

    def operands(self, described: tuning.Tile | None = None) -> tuple[object, ...]:
        """Tensors; x and the weight as descriptors of `described` blocks, for the chip's unit that copies tensors."""
        x, weight = self.x, self.weight
        rest = (x if t is None else t for t in (self.bias, self.v, self.lora_b))
        if described is not None:
            rows, columns, depth = described.rows, described.columns, described.depth
            x, weight = (TensorDescriptor.from_tensor(t, [size, depth]) for t, size in ((x, rows), (weight, columns)))
        return x, weight, *rest

    def rows(self, cut: slice) -> Head:
        """The same head on some of the rows, without an adapter."""
        degrees = self.temperature[cut] if isinstance(self.temperature, Tensor) else self.temperature
        return self._replace(x=self.x[cut], temperature=degrees)

    def aligned(self) -> bool:
        """Whether descriptors can be made of x and the weight: half precision, rows that start at 16 bytes."""
        given = (self.x, self.weight)
        return self.half and all(t.numel() and t.data_ptr() % 16 == 0 and t.stride(0) % 8 == 0 for t in given)

    def sizes(self) -> tuple[int, ...]:
        rank = 0 if self.v is None else self.v.shape[1]
        return len(self.x), *self.weight.shape, rank, self.x.stride(0), self.weight.stride(0)

    @property
    def half(self) -> bool:
        """Whether both operands have one half-precision dtype: products in tensor cores, exact in fp32."""
        return self.x.dtype == self.weight.dtype != torch.float32

    def flags(self) -> dict[str, object]:
        """Constants of the kernels: options, and how exact a product is."""
        tf32 = not INTERPRET and not self.half and torch.backends.cuda.matmul.allow_tf32
        return {
            "BIAS": self.bias is not None,
            "LORA": self.v is not None,
            "SOFTCAP": self.softcap is not None,
            "WIDE": not self.half or INTERPRET,  # the interpreter multiplies the bits of bf16 numbers
            "PRECISION": "tf32" if tf32 else "ieee",
            "LORA_PRECISION": "ieee" if INTERPRET or tuning.chip_of(self.x.device).name.startswith("gfx") else "tf32x3",
        }

    def scalars(self, temperature: float) -> tuple[float, float, float]:
        return temperature, self.logit_scale, float(self.softcap or 1.0)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of one dtype (or mixed: in fp32) -> fp32, summed in fp32."""
    if a.dtype == b.dtype and a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def add_product(sums: Tensor, a: Tensor, b: Tensor) -> None:
    """sums (fp32) += a @ b."""
    if a.dtype == b.dtype and a.is_cuda and a.dtype != torch.float32:
        torch.addmm(sums, a, b, out_dtype=torch.float32, out=sums)
    else:
        sums.addmm_(a.float(), b.float())
