"""Hidden states to log-probs: one matrix product whose fp32 accumulators go straight into the online softmax.

Forward: a program takes a block of rows and a part of the vocabulary; logits live in registers, and what leaves the
kernel are three sums a row and part. Backward: the logits of a slice of the vocabulary are computed anew, their
gradient is stored once in the weight's dtype, and dW of the slice is one product over all rows: no fp32 [V, H] sum.
The products of bf16 or fp16 numbers are exact in fp32, so this is an fp32 head.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operands import Head, Need
from . import tuning
from .head import DenseHead, HeadArgs, add_product, block_gradient, halves, head_logits, known_labels, padded, product
from .kept_logits import from_logits, logits_forward
from .labels import LabelArgs, add_labels
from .launch import launch
from .terms import FLOOR, LOG2E, NONE_IGNORED, Incoming, Results, Sums, combine, finite, inverse_temperature, store_sums

SLICE_BYTES = 1 << 28  # of the logits' gradient, see `columns_at_once`


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


@triton.jit(do_not_specialize=["n", "blocks", "splits"])
def _linear_forward(
    x,
    w,
    head,
    targets,
    sums,
    n,
    blocks,
    splits,
    part_columns,
    ENTROPY: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    HALVES: tl.constexpr,
    PRECISION: tl.constexpr,
    LORA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    part = program // blocks  # programs that run together share a part of W
    first_row = (program % blocks) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    live = rows < n
    label = known_labels(head, rows, live)
    scale = inverse_temperature(head.temperature, rows, live) * LOG2E
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS,), tl.float32)
    target = tl.zeros((ROWS,), tl.float32)
    first = part.to(tl.int32) * part_columns
    last = tl.minimum(first + part_columns, head.vocabulary)
    for low in range(first, last, COLUMNS):
        z, _ = head_logits(x, w, head, n, last, first_row, low, DESCRIPTORS, PRECISION, LORA, ROWS, COLUMNS, DEPTH)
        if HALVES:  # one after the other: the softmax of a whole wide block does not fit the registers
            HALF: tl.constexpr = COLUMNS // 2
            left, right = halves(z, ROWS, COLUMNS)
            top, total, weighted, target = _absorb(
                left, low, last, label, scale, top, total, weighted, target, ENTROPY, HALF
            )
            top, total, weighted, target = _absorb(
                right, low + HALF, last, label, scale, top, total, weighted, target, ENTROPY, HALF
            )
        else:
            top, total, weighted, target = _absorb(
                z, low, last, label, scale, top, total, weighted, target, ENTROPY, COLUMNS
            )
    store_sums(sums, rows * splits + part, live, top, total, weighted)
    tl.store(targets + rows, target, mask=live & (label >= first) & (label < last))


@triton.jit(do_not_specialize=["n", "blocks", "last"])
def _linear_backward(
    x,
    w,
    head,
    out,
    out_stride,
    gain,
    incoming,
    n,
    blocks,
    first,
    last,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    LORA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    first_row, shift = (program % blocks) * ROWS, (program // blocks).to(tl.int32) * COLUMNS
    rows, column = first_row + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    live, low = rows < n, first + shift
    z, slope = head_logits(x, w, head, n, last, first_row, low, DESCRIPTORS, PRECISION, LORA, ROWS, COLUMNS, DEPTH)
    dz = block_gradient(z, slope, head, incoming, gain, rows, live, low, ROWS, COLUMNS)
    # Up to the stride, a multiple of 64, not to `last`: what lies between is read by nobody, and stores stay wide.
    there = live[:, None] & (shift + column < out_stride)[None, :]
    tl.store((out + rows * out_stride + shift)[:, None] + column[None, :], dz.to(out.dtype.element_ty), mask=there)


def linear_forward(head: Head, *, entropy: bool, batch_invariant: bool = False, kept: Tensor | None = None) -> Results:
    """log-prob, entropy (or None), maximum and sum of exponentials, each [n] fp32.

    kept [k, V] fp32: where the logits of the first k rows stay. With it, and with labels [n, K] (log-probs [n, K]), the
    logits pass through memory, see `logits_forward`.
    """
    workspace, head = head.workspace, DenseHead(head)
    if kept is not None or head.labels.ndim == 2:
        return logits_forward(head, entropy, kept, workspace)
    n, device = len(head), head.x.device
    make = partial(torch.empty, dtype=torch.float32, device=device)
    results = Results(make(n).fill_(torch.nan), make(n) if entropy else None, make(n), make(n))
    chip = tuning.chip_of(device)
    described = chip.descriptors and not batch_invariant and head.aligned  # alignment may differ from call to call
    options = {"adapter": head.v is not None, "batch_invariant": batch_invariant, "described": described}
    tile = tuning.product_tile(chip, n, head.half, **options)
    blocks = -(-n // tile.rows)
    splits, columns = tuning.product_splits(chip, blocks, len(head.weight), tile, batch_invariant=batch_invariant)
    sums = Sums(make(n, splits), make(n, splits), make(n, splits))
    constants = {"ENTROPY": entropy, "DESCRIPTORS": described, "HALVES": tile.halves and described}
    constants |= head.precisions() | tile.constants()
    arguments = (*head.operands(tile, described), head.args(), results.log_probs, sums, n, blocks, splits, columns)
    launch(_linear_forward, blocks * splits, device, *arguments, **constants, warps=tile.warps, stages=tile.stages)
    combine(sums, results, head.labels, head.temperature, NONE_IGNORED)
    return results


def linear_backward(
    head: Head,
    g: Tensor | None,
    ge: Tensor | None,
    entropy: Tensor | None,
    top: Tensor,
    total: Tensor,
    need: Need,
    kept: Tensor | None = None,
    log_probs: Tensor | None = None,
):
    """The HEAD_GRADIENTS for dL/dlogp = g and dL/dentropy = ge, each [n] or None; None where not needed.

    dx, dA and dB are fp32 sums; dW and dbias are in the dtype of the weight and fp32. kept [k, V]: the logits of the
    first k rows, which are not computed anew. With labels [n, K], g and log_probs (which only they need) are [n, K].
    """
    workspace, head = head.workspace, DenseHead(head)
    n, (vocabulary, width) = len(head), head.weight.shape
    weight, device = head.weight, head.x.device
    dtype = torch.promote_types(head.x.dtype, weight.dtype)
    slices = GradientSlices(head, g, ge, entropy, top, total, kept, log_probs)
    columns_of_slice, gain = columns_at_once(n, vocabulary, workspace), slices.gain
    dx = torch.zeros(n, width, dtype=torch.float32, device=device) if need.hidden else None
    dw = torch.empty_like(weight) if need.weight else None
    dbias = torch.zeros(vocabulary, dtype=torch.float32, device=device) if need.bias else None
    dlora_b = torch.zeros_like(head.lora_b) if need.lora else None
    dv = torch.zeros_like(head.v) if head.v is not None and (need.hidden or need.lora) else None
    for first in range(0, vocabulary, columns_of_slice):
        last = min(vocabulary, first + columns_of_slice)
        dz = padded(n, last - first, dtype, device)
        slices.fill(dz, first, last)
        if dx is not None:
            add_product(dz, weight[first:last], out=dx)
        if dw is not None:
            dw[first:last] = product(dz.T, head.x).div_(gain)
        if dbias is not None:
            dbias[first:last] = dz.sum(0, dtype=torch.float32).div_(gain)
        if dlora_b is not None:
            dlora_b[first:last] = (dz.float().T @ head.v).div_(gain)
        if dv is not None:
            dv += dz.float() @ head.lora_b[first:last]
    if dv is not None:
        dv.div_(gain)
    da = head.lora_scale * (dv.T @ head.x.float()) if need.lora else None
    if dx is not None:
        dx.div_(gain)
        if dv is not None:
            dx.addmm_(dv, head.lora_a, alpha=head.lora_scale)
    return dx, dw, dbias, da, dlora_b


class GradientSlices:
    """The gradient of the accumulators, a slice of the vocabulary at a time: from kept logits, or by a product."""

    def __init__(self, head: DenseHead, g, ge, entropy, top, total, kept: Tensor | None, log_probs: Tensor | None):
        whole = g if g is None or g.ndim == 1 else g.sum(1)
        tensors = (whole, ge, entropy, top, total)
        self.incoming = Incoming(*(None if t is None else t.float().contiguous() for t in tensors))
        self.head, self.kept, self.border = head, kept, 0 if kept is None else len(kept)
        self.several = None if head.labels.ndim == 1 or g is None else (log_probs.contiguous(), g.float().contiguous())
        given = [t for t in (g if g is None or g.ndim == 1 else g.abs().sum(1), ge) if t is not None]
        self.gain = _gain(torch.promote_types(head.x.dtype, head.weight.dtype), given, top)
        chip = tuning.chip_of(head.x.device)
        self.described = chip.descriptors and head.aligned
        options = {"adapter": head.v is not None, "backward": True, "described": self.described}
        self.tile = tuning.product_tile(chip, len(head) - self.border, head.half, **options)

    def fill(self, dz: Tensor, first: int, last: int) -> None:
        """Columns first..last into `dz` [n, last - first]."""
        n, border, device = len(dz), self.border, dz.device
        if border:
            args, incoming = self.rows(slice(0, border))
            from_logits(self.kept, args, dz[:border], self.gain, incoming, first, last)
        if border < n:
            cut = slice(border, n)
            args, incoming = self.rows(cut)
            tile, blocks = self.tile, -(-(n - border) // self.tile.rows)
            programs = blocks * -(-(last - first) // tile.columns)
            out = (dz[cut], dz.stride(0), self.gain, incoming)
            operands = self.head.operands(tile, self.described, cut)
            constants = {"DESCRIPTORS": self.described} | self.head.precisions() | tile.constants()
            arguments = (*operands, args, *out, n - border, blocks, first, last)
            launch(_linear_backward, programs, device, *arguments, **constants, warps=tile.warps, stages=tile.stages)
        if self.several is not None:
            head = self.head
            source = LabelArgs(head.labels, head.logit_scale, head.softcap, head.temperature)
            add_labels(source, *self.several, dz, self.gain, self.incoming, first, last)

    def rows(self, cut: slice) -> tuple[HeadArgs, Incoming]:
        """What the kernels take of some rows; several labels a row, whose entries are written later, are left out."""
        args = self.head.args(cut)
        if args.labels.ndim == 2:
            args = args._replace(labels=args.labels.new_full((len(args.labels),), -1))
        return args, Incoming(*(None if t is None else t[cut] for t in self.incoming))


def columns_at_once(n: int, vocabulary: int, workspace: int) -> int:
    """Columns of a slice: 16,384; fewer where its gradient [n, columns] would pass SLICE_BYTES, the workspace or
    max(2048, n / 4) rows of the vocabulary. At least 128.
    """
    n = max(1, n)
    most = min(16384, min(SLICE_BYTES, workspace) // 2 // n, max(2048, n // 4) * vocabulary // n)
    return min(vocabulary, max(128, most // 128 * 128))


def _gain(dtype: torch.dtype, given: list[Tensor], like: Tensor) -> Tensor:
    """What the stored gradient is multiplied by: 1, but in fp16, which ends at 6e-8, what makes the largest 1024."""
    gain = torch.ones((), dtype=torch.float32, device=like.device)
    if dtype != torch.float16 or not len(like):
        return gain
    largest = torch.stack([t.float().abs().amax() for t in given]).amax()
    return torch.where((largest > 0) & torch.isfinite(largest), 1024 / largest, gain)
