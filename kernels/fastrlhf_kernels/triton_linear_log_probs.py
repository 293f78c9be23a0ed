"""Hidden states to log-probs: one matrix product whose fp32 accumulators go straight into the online softmax.

Forward: a program takes a block of rows and a part of the vocabulary; logits live in registers, and what leaves the
kernel are three sums a row and part. Backward: the logits of a slice of the vocabulary are computed anew, their
gradient is stored once in the weight's dtype, and dW of the slice is one product over all rows: no fp32 [V, H] sum.
The products of bf16 or fp16 numbers are exact in fp32, so this is an fp32 head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .triton_combine import combine, split_degrees
from .triton_head import Head, add_product, head_logits, near, product
from .triton_launch import launch
from .triton_terms import FLOOR, LOG2E, finite, inverse_temperature, softmax_gradient

SLICE_BYTES = 1 << 28  # of the logits' gradient, see `_slice_columns`


@triton.jit
def _absorb(z, low, last, label, scale, top, total, weighted, target, ENTROPY: tl.constexpr, COLUMNS: tl.constexpr):
    """The logits of columns low, low + 1 ... into the running sums of their rows."""
    column = tl.arange(0, COLUMNS)
    target += tl.sum(tl.where(column[None, :] == (label - low)[:, None], z, 0.0), 1)
    z = tl.where((column < last - low)[None, :], z, float("-inf"))
    new = tl.maximum(top, tl.max(z, 1))
    base = finite(new)
    distance = (z - base[:, None]) * scale[:, None]
    e = tl.exp2(distance)
    shift = tl.maximum((top - base) * scale, FLOOR)
    decay = tl.exp2(shift)
    if ENTROPY:
        weighted = decay * (weighted + total * shift) + tl.sum(tl.where(e > 0, e * distance, 0.0), 1)
    return new, decay * total + tl.sum(e, 1), weighted, target


@triton.jit(do_not_specialize=["n"])
def _linear_forward(
    x, w, bias, v, lora_b, labels, temperatures, targets, tops, totals, weighteds,
    n, vocabulary, width, rank, x_stride, w_stride, temperature, logit_scale, softcap, blocks, splits, part_columns,
    PER_TOKEN: tl.constexpr, ENTROPY: tl.constexpr, DESCRIPTORS: tl.constexpr, HALVES: tl.constexpr,
    BIAS: tl.constexpr, LORA: tl.constexpr, SOFTCAP: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    LORA_PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    part = program // blocks  # programs that run together share a part of W
    first_row = (program % blocks) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    live = rows < n
    label = tl.load(labels + rows, mask=live, other=-1).to(tl.int64)
    label = tl.where((label >= 0) & (label < vocabulary), label, -1).to(tl.int32)
    scale = inverse_temperature(temperatures, temperature, rows, live, PER_TOKEN) * LOG2E
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS,), tl.float32)
    target = tl.zeros((ROWS,), tl.float32)
    first = part.to(tl.int32) * part_columns
    last = tl.minimum(first + part_columns, vocabulary)
    for low in range(first, last, COLUMNS):
        columns = low + tl.arange(0, COLUMNS).to(tl.int64)
        z, _ = head_logits(x, w, bias, v, lora_b, rows, columns, live, columns < last, x_stride, w_stride, width, rank,
                           logit_scale, softcap, first_row.to(tl.int32), low, DESCRIPTORS, BIAS, LORA,
                           SOFTCAP, WIDE, PRECISION, LORA_PRECISION, ROWS, COLUMNS, DEPTH)  # fmt: skip
        if HALVES:  # one after the other: the softmax of a whole wide block does not fit the registers
            left, right = tl.split(tl.permute(tl.reshape(z, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
            top, total, weighted, target = _absorb(left, low, last, label, scale, top, total, weighted, target,
                                                   ENTROPY, COLUMNS // 2)  # fmt: skip
            low += COLUMNS // 2
            top, total, weighted, target = _absorb(right, low, last, label, scale, top, total, weighted, target,
                                                   ENTROPY, COLUMNS // 2)  # fmt: skip
        else:
            top, total, weighted, target = _absorb(z, low, last, label, scale, top, total, weighted, target, ENTROPY,
                                                   COLUMNS)  # fmt: skip
    place = rows * splits + part
    tl.store(tops + place, top, mask=live)
    tl.store(totals + place, total, mask=live)
    tl.store(weighteds + place, weighted, mask=live)
    tl.store(targets + rows, target, mask=live & (label >= first) & (label < last))


@triton.jit(do_not_specialize=["n", "first"])
def _linear_backward(
    x, w, bias, v, lora_b, labels, temperatures, out, gain, grads, entropy_grads, entropies, tops, totals,
    n, vocabulary, width, rank, x_stride, w_stride, temperature, logit_scale, softcap, blocks, first, last,
    PER_TOKEN: tl.constexpr, PLAIN: tl.constexpr, ENTROPY: tl.constexpr, DESCRIPTORS: tl.constexpr, BIAS: tl.constexpr,
    LORA: tl.constexpr, SOFTCAP: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    LORA_PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    first_row, first_column = (program % blocks) * ROWS, first + (program // blocks) * COLUMNS
    rows, columns = first_row + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
    live = rows < n
    column_live = columns < last
    z, slope = head_logits(x, w, bias, v, lora_b, rows, columns, live, column_live, x_stride, w_stride, width, rank,
                           logit_scale, softcap, first_row.to(tl.int32), first_column.to(tl.int32), DESCRIPTORS, BIAS,
                           LORA, SOFTCAP, WIDE, PRECISION, LORA_PRECISION, ROWS, COLUMNS, DEPTH)  # fmt: skip
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
    column = tl.arange(0, COLUMNS)
    dz = (
        (dz + tl.where(column[None, :] == near(label, first_column, COLUMNS)[:, None], g[:, None], 0.0))
        * inverse[:, None]
        * slope
    )
    dz = dz * tl.load(gain)
    start = out + rows * (last - first) + (first_column - first)
    tl.store(start[:, None] + column[None, :], dz.to(out.dtype.element_ty), mask=live[:, None] & column_live[None, :])


def linear_forward(head: Head, labels: Tensor, *, entropy: bool, batch_invariant: bool):
    """log-prob, entropy (or an empty tensor), maximum and sum of exponentials, each [n] fp32."""
    n, vocabulary, *_ = head.sizes()
    device = head.x.device
    log_probs = torch.full((n,), torch.nan, dtype=torch.float32, device=device)
    top, total = torch.empty_like(log_probs), torch.empty_like(log_probs)
    entropies = log_probs.new_empty(n if entropy else 0)
    degrees, number, per_token = split_degrees(head.temperature, log_probs)
    chip = tuning.chip_of(device)
    described = chip.descriptors and not batch_invariant and head.aligned()  # alignment may differ from call to call
    tile = tuning.product_tile(
        chip, n, head.half, adapter=head.v is not None, batch_invariant=batch_invariant, described=described
    )
    blocks = -(-n // tile.rows)
    splits, columns = tuning.product_splits(chip, blocks, vocabulary, tile, batch_invariant=batch_invariant)
    parts = [log_probs.new_empty(n, splits) for _ in range(3)]
    labels = labels.contiguous()
    launch(
        _linear_forward, blocks * splits, device, *head.operands(tile if described else None), labels, degrees,
        log_probs, *parts, *head.sizes(), *head.scalars(number), blocks, splits, columns, PER_TOKEN=per_token,
        ENTROPY=entropy, DESCRIPTORS=described, HALVES=tile.columns > 128 and described, **head.flags(),
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
    chip = tuning.chip_of(device)
    described = chip.descriptors and head.aligned()
    tile = tuning.product_tile(chip, n, head.half, adapter=head.v is not None, backward=True, described=described)
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
            _linear_backward, blocks * -(-(last - first) // tile.columns), device,
            *head.operands(tile if described else None), labels, degrees, dz, gain,
            *(top if t is None else t for t in (g, ge, entropy)), top, total, *head.sizes(), *head.scalars(number),
            blocks, first, last, PER_TOKEN=per_token, PLAIN=g is not None, ENTROPY=ge is not None,
            DESCRIPTORS=described, **head.flags(), **tile.constants(), warps=tile.warps, stages=tile.stages,
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
