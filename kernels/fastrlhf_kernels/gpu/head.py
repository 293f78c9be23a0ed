"""The head on rows of hidden states: its operands, and the block of logits that every kernel behind it starts from."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..backend import INTERPRET
from ..operands import Head
from . import tuning
from .terms import LOG2E, Temperature, inverse_temperature, load_incoming, softmax_gradient


@triton.jit
def _operand(start, rows, depth, low, stride, row_live, width, WIDE: tl.constexpr, DEPTH: tl.constexpr):
    """A [rows, DEPTH] block of a matrix whose last dimension is dense."""
    place = low + depth
    live = row_live[:, None] & (place < width)[None, :]
    values = tl.load(start + rows[:, None] * stride + place[None, :], mask=live, other=0.0)
    return values.to(tl.float32) if WIDE else values


@triton.jit
def near(label, low, COLUMNS: tl.constexpr):
    """Where labels lie in a block that starts at column `low`, in 32 bits; -1 for those outside."""
    return tl.where((label >= low) & (label < low + COLUMNS), label - low, -1).to(tl.int32)


@triton.jit
def known_labels(head, rows, live):
    """The labels of rows in 32 bits; -1 outside the vocabulary."""
    label = tl.load(head.labels + rows, mask=live, other=-1).to(tl.int64)
    return tl.where((label >= 0) & (label < head.vocabulary), label, -1).to(tl.int32)


@triton.jit
def bend(z, head):
    """Scale and softcap of logits -> z and dz / d accumulator."""
    z = z * head.logit_scale
    slope = tl.zeros(z.shape, tl.float32) + head.logit_scale
    if head.softcap is not None:
        bent = 1.0 - 2.0 / (tl.exp(z * (2.0 / head.softcap)) + 1.0)  # tanh
        z = bent * head.softcap
        slope = slope * (1.0 - bent * bent)
    return z, slope


@triton.jit
def halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a block."""
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def head_logits(
    x,
    w,
    head,
    n,
    last,
    first_row,
    first_column,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    LORA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """z of a block [ROWS, COLUMNS] in fp32, before the temperature, and dz / d accumulator.

    The block starts at first_row and first_column and ends before n and `last`. DESCRIPTORS: x and w are tensor
    descriptors of such blocks. PRECISION: "half" (operands as they are), or that of products of fp32 numbers.
    """
    rows = first_row + tl.arange(0, ROWS)
    columns = first_column + tl.arange(0, COLUMNS).to(tl.int64)
    row_live, column_live = rows < n, columns < last
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    depth = tl.arange(0, DEPTH)
    for low in range(0, head.width, DEPTH):
        if DESCRIPTORS:
            a = x.load([first_row.to(tl.int32), low])
            b = w.load([first_column, low])
            if PRECISION != "half":
                a, b = a.to(tl.float32), b.to(tl.float32)
        else:
            a = _operand(x, rows, depth, low, head.x_stride, row_live, head.width, PRECISION != "half", DEPTH)
            b = _operand(w, columns, depth, low, head.w_stride, column_live, head.width, PRECISION != "half", DEPTH)
        sums = tl.dot(a, tl.trans(b), sums, input_precision="tf32" if PRECISION == "tf32" else "ieee")
    if head.v is not None:  # v = scale * x A^T and B in fp32: the adapter is as exact as the rest
        narrow = tl.arange(0, 16)
        for low in range(0, head.rank, 16):
            a = _operand(head.v, rows, narrow, low, head.rank, row_live, head.rank, True, 16)
            b = _operand(head.lora_b, columns, narrow, low, head.rank, column_live, head.rank, True, 16)
            sums = tl.dot(a, tl.trans(b), sums, input_precision=LORA)
    if head.bias is not None:
        sums += tl.load(head.bias + columns, mask=column_live, other=0.0).to(tl.float32)[None, :]
    return bend(sums, head)


@triton.jit
def block_gradient(z, slope, head, incoming, gain, rows, live, low, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The gradient of the accumulators of a block of logits z that starts at column `low`; slope: dz / d accumulator,
    which counts where there is a softcap.
    """
    label = tl.load(head.labels + rows, mask=live, other=-1).to(tl.int64)
    inverse = inverse_temperature(head.temperature, rows, live)
    g, ge, entropy, base, total = load_incoming(incoming, rows, live, ROWS)
    scale, factor = (inverse * LOG2E)[:, None], inverse * tl.load(gain)
    factor = factor if head.softcap is not None else factor * head.logit_scale
    g, ge = (g * factor)[:, None], (ge * factor)[:, None]  # what is the same in a row is multiplied once a row
    if incoming.entropy is not None:
        dz = softmax_gradient(z, base[:, None], scale, total[:, None], g, ge, entropy[:, None], True)
    else:
        dz = -tl.exp2((z - base[:, None]) * scale) * (g / total[:, None])
    dz += tl.where(tl.arange(0, COLUMNS)[None, :] == near(label, low, COLUMNS)[:, None], g, 0.0)
    return dz * slope if head.softcap is not None else dz


class HeadArgs(NamedTuple):
    """What kernels read of the head beside x and the weight, which may be tensor descriptors."""

    labels: Tensor
    bias: Tensor | None
    v: Tensor | None
    lora_b: Tensor | None
    vocabulary: int
    width: int
    rank: int
    x_stride: int
    w_stride: int
    logit_scale: float
    softcap: float | None
    temperature: Temperature


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.numel() == 0 else tensor.contiguous()


def _rows_at_16_bytes(tensor: Tensor) -> bool:
    starts = tensor.data_ptr() % 16 == 0 and tensor.stride(0) % 8 == 0
    return tensor.numel() > 0 and starts and tensor.stride(0) >= tensor.shape[1]


class DenseHead:
    """The operands of a Head with dense last dimensions, and v = lora_scale * x A^T of its adapter, in fp32."""

    def __init__(self, head: Head) -> None:
        self.x, self.weight = _dense(head.hidden), _dense(head.weight)
        self.labels = head.labels.contiguous()
        self.bias = None if head.bias is None else head.bias.contiguous()
        self.lora_a, self.lora_b = (None if t is None else t.float().contiguous() for t in (head.lora_a, head.lora_b))
        self.lora_scale = head.lora_scale
        adapted = self.lora_a is not None
        self.v = (head.lora_scale * (self.x.float() @ self.lora_a.T)).contiguous() if adapted else None
        self.temperature = Temperature.of(head.temperatures, head.temperature)
        self.logit_scale = float(head.logit_scale)
        self.softcap = None if head.logit_softcap is None else float(head.logit_softcap)

    def __len__(self) -> int:
        return len(self.x)

    def args(self, rows: slice = slice(None)) -> HeadArgs:
        """For kernels on some of the rows."""
        each, number = self.temperature
        temperature = Temperature(None if each is None else each[rows], number)
        v, strides = None if self.v is None else self.v[rows], (self.x.stride(0), self.weight.stride(0))
        sizes = (*self.weight.shape, 0 if v is None else v.shape[1], *strides)
        tensors = (self.labels[rows], self.bias, v, self.lora_b)
        return HeadArgs(*tensors, *sizes, self.logit_scale, self.softcap, temperature)

    def operands(self, tile: tuning.Tile, described: bool, rows: slice = slice(None)) -> tuple[object, object]:
        """x and the weight; `described`: as descriptors of blocks, for the chip's unit that copies tensors."""
        x = self.x[rows]
        if not described:
            return x, self.weight
        x = TensorDescriptor.from_tensor(x, [tile.rows, tile.depth])
        return x, TensorDescriptor.from_tensor(self.weight, [tile.columns, tile.depth])

    def logits(self, rows: slice, out: Tensor) -> Tensor:
        """z of some rows before the temperature, in fp32, written into `out`."""
        x, weight = self.x[rows], self.weight
        if self.half and x.is_cuda:
            torch.mm(x, weight.T, out_dtype=torch.float32, out=out)
        else:
            torch.mm(x.float(), weight.T.float(), out=out)
        if self.v is not None:
            out.addmm_(self.v[rows], self.lora_b.T)
        if self.bias is not None:
            out.add_(self.bias)
        if self.logit_scale != 1:
            out.mul_(self.logit_scale)
        return out if self.softcap is None else out.div_(self.softcap).tanh_().mul_(self.softcap)

    @property
    def aligned(self) -> bool:
        """Whether descriptors can be made of x and the weight: half precision, rows that start at 16 bytes.

        Not of an expanded row: the driver refuses stride 0.
        """
        return self.half and _rows_at_16_bytes(self.x) and _rows_at_16_bytes(self.weight)

    @property
    def half(self) -> bool:
        """Whether both operands have one half-precision dtype: products in tensor cores, exact in fp32."""
        return self.x.dtype == self.weight.dtype != torch.float32

    def precisions(self) -> dict[str, str]:
        """Constants of the kernels: how exact a product is."""
        if INTERPRET:  # it multiplies the bits of bf16 numbers
            return {"PRECISION": "ieee", "LORA": "ieee"}
        precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
        amd = tuning.chip_of(self.x.device).name.startswith("gfx")
        return {"PRECISION": "half" if self.half else precision, "LORA": "ieee" if amd else "tf32x3"}


def padded(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty [rows, columns] whose rows start at multiples of 64 numbers.

    With rows of an odd vocabulary (50,257) neither cuBLAS nor Triton could move 16 bytes at once.
    """
    return torch.empty(rows, -(-columns // 64) * 64, dtype=dtype, device=device)[:, :columns]


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b of one dtype (or mixed: in fp32) -> fp32, summed in fp32."""
    if a.dtype == b.dtype and a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)


def add_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out (fp32) += a @ b."""
    if a.dtype == b.dtype and a.is_cuda and a.dtype != torch.float32:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        out.addmm_(a.float(), b.float())
