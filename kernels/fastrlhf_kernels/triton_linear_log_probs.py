"""Hidden states to log-probs: one matrix product whose fp32 accumulators go straight into the online softmax.

Forward: a program takes a block of rows and a part of the vocabulary; logits live in registers, and what leaves the
kernel are three sums a row and part. Backward: the logits of a slice of the vocabulary are computed anew, their
gradient is stored once in the weight's dtype, and dW of the slice is one product over all rows: no fp32 [V, H] sum.
The products of bf16 or fp16 numbers are exact in fp32, so this is an fp32 head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .backend import INTERPRET
from .triton_combine import combine, split_degrees
from .triton_launch import launch
from .triton_terms import FLOOR, LOG2E, finite, inverse_temperature, softmax_gradient

SLICE_BYTES = 1 << 28  # of the logits' gradient, see `_slice_columns`


@triton.jit
def _operand(start, rows, depth, low, stride, row_live, width, WIDE: tl.constexpr, DEPTH: tl.constexpr):
    """A [rows, DEPTH] block of a matrix whose last dimension is dense."""
    place = low + depth
    values = tl.load(start + rows[:, None] * stride + place[None, :], mask=row_live[:, None] & (place < width)[None, :],
                     other=0.0)  # fmt: skip
    return values.to(tl.float32) if WIDE else values


@triton.jit
def head_logits(
    x, w, bias, v, lora_b, rows, columns, row_live, column_live, x_stride, w_stride, width, rank, logit_scale, softcap,
    BIAS: tl.constexpr, LORA: tl.constexpr, SOFTCAP: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    LORA_PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """z of a block [ROWS, COLUMNS] in fp32, before the temperature, and dz / d accumulator."""
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    depth = tl.arange(0, DEPTH)
    for low in range(0, width, DEPTH):
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


@triton.jit(do_not_specialize=["n"])
def _linear_forward(
    x, w, bias, v, lora_b, labels, temperatures, targets, tops, totals, weighteds,
    n, vocabulary, width, rank, x_stride, w_stride, temperature, logit_scale, softcap, blocks, splits, part_columns,
    PER_TOKEN: tl.constexpr, ENTROPY: tl.constexpr, BIAS: tl.constexpr, LORA: tl.constexpr, SOFTCAP: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, LORA_PRECISION: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    part = program // blocks  # programs that run together share a part of W
    rows = (program % blocks) * ROWS + tl.arange(0, ROWS)
    live = rows < n
    label = tl.load(labels + rows, mask=live, other=-1).to(tl.int64)
    scale = inverse_temperature(temperatures, temperature, rows, live, PER_TOKEN) * LOG2E
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS,), tl.float32)
    target = tl.zeros((ROWS,), tl.float32)
    first = part * part_columns
    last = tl.minimum(first + part_columns, vocabulary)
    for low in range(first, last, COLUMNS):
        columns = low + tl.arange(0, COLUMNS).to(tl.int64)
        column_live = columns < last
        z, _ = head_logits(x, w, bias, v, lora_b, rows, columns, live, column_live, x_stride, w_stride, width, rank,
                           logit_scale, softcap, BIAS, LORA, SOFTCAP, WIDE, PRECISION, LORA_PRECISION, ROWS, COLUMNS,
                           DEPTH)  # fmt: skip
        target += tl.sum(tl.where(columns[None, :] == label[:, None], z, 0.0), 1)
        z = tl.where(column_live[None, :], z, float("-inf"))
        new = tl.maximum(top, tl.max(z, 1))
        base = finite(new)
        distance = (z - base[:, None]) * scale[:, None]
        e = tl.exp2(distance)
        shift = tl.maximum((top - base) * scale, FLOOR)
        decay = tl.exp2(shift)
        if ENTROPY:
            weighted = decay * (weighted + total * shift) + tl.sum(tl.where(e > 0, e * distance, 0.0), 1)
        total = decay * total + tl.sum(e, 1)
        top = new
    place = rows * splits + part
    tl.store(tops + place, top, mask=live)
    tl.store(totals + place, total, mask=live)
    tl.store(weighteds + place, weighted, mask=live)
    tl.store(targets + rows, target, mask=live & (label >= first) & (label < last))


@triton.jit(do_not_specialize=["n", "first"])
def _linear_backward(
    x, w, bias, v, lora_b, labels, temperatures, out, gain, grads, entropy_grads, entropies, tops, totals,
    n, vocabulary, width, rank, x_stride, w_stride, temperature, logit_scale, softcap, blocks, first, last,
    PER_TOKEN: tl.constexpr, PLAIN: tl.constexpr, ENTROPY: tl.constexpr, BIAS: tl.constexpr, LORA: tl.constexpr,
    SOFTCAP: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, LORA_PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    rows = (program % blocks) * ROWS + tl.arange(0, ROWS)
    columns = first + (program // blocks) * COLUMNS + tl.arange(0, COLUMNS)
    live = rows < n
    column_live = columns < last
    z, slope = head_logits(x, w, bias, v, lora_b, rows, columns, live, column_live, x_stride, w_stride, width, rank,
                           logit_scale, softcap, BIAS, LORA, SOFTCAP, WIDE, PRECISION, LORA_PRECISION, ROWS, COLUMNS,
                           DEPTH)  # fmt: skip
    label = tl.load(labels + rows, mask=live, other=-1).to(tl.int64)
    inverse = inverse_temperature(temperatures, temperature, rows, live, PER_TOKEN)
    base = finite(tl.load(tops + rows, mask=live, other=0.0))
    total = tl.load(totals + rows, mask=live, other=1.0)
    zero = tl.zeros((ROWS,), tl.float32)
    g = tl.load(grads + rows, mask=live, other=0.0) if PLAIN else zero
    ge = tl.load(entropy_grads + rows, mask=live, other=0.0) if ENTROPY else zero
    entropy = tl.load(entropies + rows, mask=live, other=0.0) if ENTROPY else zero
    dz = softmax_gradient(z, base[:, None], (inverse * LOG2E)[:, None], total[:, None], g[:, None], ge[:, None],
                          entropy[:, None], ENTROPY)  # fmt: skip
    dz = (dz + tl.where(columns[None, :] == label[:, None], g[:, None], 0.0)) * inverse[:, None] * slope
    dz = dz * tl.load(gain)
    place = rows[:, None] * (last - first) + (columns - first)[None, :]
    tl.store(out + place, dz.to(out.dtype.element_ty), mask=live[:, None] & column_live[None, :])


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

    def operands(self) -> tuple[Tensor, ...]:
        x = self.x
        return x, self.weight, *(x if t is None else t for t in (self.bias, self.v, self.lora_b))

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


def linear_forward(head: Head, labels: Tensor, *, entropy: bool, batch_invariant: bool):
    """log-prob, entropy (or an empty tensor), maximum and sum of exponentials, each [n] fp32."""
    n, vocabulary, *_ = head.sizes()
    device = head.x.device
    log_probs = torch.full((n,), torch.nan, dtype=torch.float32, device=device)
    top, total = torch.empty_like(log_probs), torch.empty_like(log_probs)
    entropies = log_probs.new_empty(n if entropy else 0)
    degrees, number, per_token = split_degrees(head.temperature, log_probs)
    chip = tuning.chip_of(device)
    tile = tuning.product_tile(chip, n, head.half, adapter=head.v is not None, batch_invariant=batch_invariant)
    blocks = -(-n // tile.rows)
    splits, columns = tuning.product_splits(chip, blocks, vocabulary, tile, batch_invariant=batch_invariant)
    parts = [log_probs.new_empty(n, splits) for _ in range(3)]
    labels = labels.contiguous()
    launch(
        _linear_forward, blocks * splits, device, *head.operands(), labels, degrees, log_probs, *parts, *head.sizes(),
        *head.scalars(number), blocks, splits, columns, PER_TOKEN=per_token, ENTROPY=entropy, **head.flags(),
        **tile.constants(), warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    none_ignored = -(1 << 62)  # the rows that count were picked before
    combine(parts, labels, degrees, number, per_token, none_ignored, log_probs, entropies, top, total)
    return log_probs, entropies, top, total


def linear_backward(head: Head, labels: Tensor, g, ge, entropy, top, total, need: list[bool]):
    """(dx, dW, dbias, dA, dB) for dL/dlogp = g and dL/dentropy = ge, each [n] fp32 or None; None where not needed.

    need: x, weight, bias, lora. dx, dA and dB are fp32 sums; dW and dbias are in the dtype of the weight and fp32.
    """
    n, vocabulary, _, _, _, _ = head.sizes()
    x, weight, device = head.x, head.weight, head.x.device
    need_x, need_w, need_bias, need_lora = need
    degrees, number, per_token = split_degrees(head.temperature, top)
    tile = tuning.product_tile(tuning.chip_of(device), n, head.half, adapter=head.v is not None, backward=True)
    blocks, slice_columns = -(-n // tile.rows), _slice_columns(n, vocabulary)
    dtype = torch.promote_types(x.dtype, weight.dtype)
    gain = _gain(dtype, g, ge, top)
    dx = torch.zeros(x.shape, dtype=torch.float32, device=device) if need_x else None
    dw = torch.empty_like(weight) if need_w else None
    dbias = torch.zeros(vocabulary, dtype=torch.float32, device=device) if need_bias else None
    dlora_b = torch.zeros_like(head.lora_b) if need_lora else None
    dv = torch.zeros_like(head.v) if head.v is not None and (need_x or need_lora) else None
    for first in range(0, vocabulary, slice_columns):
        last = min(vocabulary, first + slice_columns)
        dz = torch.empty(n, last - first, dtype=dtype, device=device)
        launch(
            _linear_backward, blocks * -(-(last - first) // tile.columns), device, *head.operands(), labels, degrees,
            dz, gain, *(top if t is None else t for t in (g, ge, entropy)), top, total, *head.sizes(),
            *head.scalars(number), blocks, first, last, PER_TOKEN=per_token, PLAIN=g is not None,
            ENTROPY=ge is not None, **head.flags(), **tile.constants(), warps=tile.warps, stages=tile.stages,
        )  # fmt: skip
        if dx is not None:
            add_product(dx, dz, weight[first:last])
        if dw is not None:
            dw[first:last] = product(dz.T, x).div_(gain)
        if dbias is not None:
            dbias[first:last] = dz.sum(0, dtype=torch.float32).div_(gain)
        if dlora_b is not None:
            dlora_b[first:last] = (dz.float().T @ head.v).div_(gain)
        if dv is not None:
            dv += dz.float() @ head.lora_b[first:last]
    if dv is not None:
        dv.div_(gain)
    da = head.lora_scale * (dv.T @ x.float()) if need_lora else None
    if dx is not None:
        dx.div_(gain)
        if dv is not None:
            dx.addmm_(dv, head.lora_a, alpha=head.lora_scale)
    return dx, dw, dbias, da, dlora_b


def _slice_columns(n: int, vocabulary: int) -> int:
    """Columns of a slice: 16,384; fewer where its gradient [n, columns] would pass SLICE_BYTES or max(2048, n / 4) rows
    of the vocabulary. At least 128.
    """
    n = max(1, n)
    most = min(16384, SLICE_BYTES // 2 // n, max(2048, n // 4) * vocabulary // n)
    return min(vocabulary, max(128, most // 128 * 128))


def _gain(dtype: torch.dtype, g: Tensor | None, ge: Tensor | None, like: Tensor) -> Tensor:
    """What the stored gradient is multiplied by: 1, but in fp16, which ends at 6e-8, what makes the largest 1024."""
    gain = torch.ones((), dtype=torch.float32, device=like.device)
    if dtype != torch.float16 or not len(like):
        return gain
    largest = torch.stack([t.abs().amax() for t in (g, ge) if t is not None]).amax()
    return torch.where((largest > 0) & torch.isfinite(largest), 1024 / largest, gain)


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
