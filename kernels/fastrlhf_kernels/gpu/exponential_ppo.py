"""The PPO loss from hidden states without a softmax pass: the first product's epilogue stores exponentials.

PPO knows where a token's log-sum-exp was when it was sampled: at its logit minus its old log-prob. With that as the
exponent's offset, E = exp(z - offset) in bf16 (which has the range of fp32) and its exact fp32 sum s come out of the
first product; s is the inverse of the ratio. The gradient of the logits is a factor a row times (E - s at the label),
so dx and dW are plain products with E: no pass over [tokens, vocabulary] reads logits again, and no fp32 logits are
stored. A row whose policy moved by more than 2 ** 60 is computed again with its own maximum.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operands import LossOptions, Need, Tokens
from . import tuning
from .head import DenseHead, add_product, bend, halves, head_logits, known_labels, product
from .launch import launch
from .log_probs import Terms, store_terms
from .terms import LN2, LOG2E, Clip, finite, inverse_temperature, kl_index, token_terms

FURTHEST = tl.constexpr(1.152921504606847e18)  # 2 ** 60: sums up to it, and down to its inverse, are taken as they are


class Exponentials(NamedTuple):
    """What the first kernel leaves of the rows of a chunk; offsets are what it starts from."""

    offsets: Tensor  # [n]: the exponent of 2 that is taken off
    targets: Tensor  # [n]: the label's logit
    totals: Tensor  # [n, parts]
    weighteds: Tensor  # [n, parts]
    out: Tensor  # [n, V] bf16


@triton.jit
def _keep(
    z, slope, low, last, start, label, live, inside, scale, offset, total, weighted, target, COLUMNS: tl.constexpr
):
    """Store the exponentials of columns low, low + 1 ..., times d z / d accumulator; their sums are returned."""
    column = tl.arange(0, COLUMNS)
    target += tl.sum(tl.where(column[None, :] == (label - low)[:, None], z, 0.0), 1)
    distance = z * scale[:, None] - offset[:, None]
    e = tl.where(live[:, None] & (column < last - low)[None, :], tl.exp2(distance), 0.0)
    weighted += tl.sum(tl.where(e > 0, e * distance, 0.0), 1)
    stored = tl.where(live[:, None], e * slope, 0.0).to(start.dtype.element_ty)
    tl.store((start + low)[:, None] + column[None, :], stored, mask=inside[:, None] & (column < last - low)[None, :])
    return total + tl.sum(e, 1), weighted, target


@triton.jit(do_not_specialize=["n"])
def _exponentials(
    x,
    w,
    head,
    mask,
    kept,
    n,
    blocks,
    splits,
    part_columns,
    DESCRIPTORS: tl.constexpr,
    HALVES: tl.constexpr,
    PRECISION: tl.constexpr,
    LORA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    part = program // blocks
    first_row = (program % blocks) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    inside = rows < n
    live = inside & (tl.load(mask + rows, mask=inside, other=0) != 0)
    label = known_labels(head, rows, live)
    scale = inverse_temperature(head.temperature, rows, live) * LOG2E
    offset = tl.load(kept.offsets + rows, mask=live, other=0.0)
    total = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS,), tl.float32)
    target = tl.zeros((ROWS,), tl.float32)
    first = part.to(tl.int32) * part_columns
    last = tl.minimum(first + part_columns, head.vocabulary)
    start = kept.out + rows * head.vocabulary
    for low in range(first, last, COLUMNS):
        z, slope = head_logits(x, w, head, n, last, first_row, low, DESCRIPTORS, PRECISION, LORA, ROWS, COLUMNS, DEPTH)
        if HALVES:  # one after the other: registers
            HALF: tl.constexpr = COLUMNS // 2
            left, right = halves(z, ROWS, COLUMNS)
            left_slope, right_slope = halves(slope, ROWS, COLUMNS)
            total, weighted, target = _keep(
                left, left_slope, low, last, start, label, live, inside, scale, offset, total, weighted, target, HALF
            )
            low += HALF
            total, weighted, target = _keep(
                right, right_slope, low, last, start, label, live, inside, scale, offset, total, weighted, target, HALF
            )
        else:
            total, weighted, target = _keep(
                z, slope, low, last, start, label, live, inside, scale, offset, total, weighted, target, COLUMNS
            )
    place = rows * splits + part
    tl.store(kept.totals + place, total, mask=inside)
    tl.store(kept.weighteds + place, weighted, mask=inside)
    tl.store(kept.targets + rows, target, mask=live & (label >= first) & (label < last))


@triton.jit
def _row_logits(x, w, head, row, low, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """z and dz / d accumulator of one row and COLUMNS columns, in fp32 by plain sums."""
    column = low + tl.arange(0, COLUMNS).to(tl.int64)
    inside = column < head.vocabulary
    depth = tl.arange(0, DEPTH)
    z = tl.zeros((COLUMNS,), tl.float32)
    for step in range(0, head.width, DEPTH):
        here = step + depth < head.width
        a = tl.load(x + row * head.x_stride + step + depth, mask=here, other=0.0).to(tl.float32)
        place = column[:, None] * head.w_stride + (step + depth)[None, :]
        b = tl.load(w + place, mask=inside[:, None] & here[None, :], other=0.0).to(tl.float32)
        z += tl.sum(a[None, :] * b, 1)
    if head.bias is not None:
        z += tl.load(head.bias + column, mask=inside, other=0.0).to(tl.float32)
    z, slope = bend(z, head)
    return tl.where(inside, z, float("-inf")), slope


@triton.jit
def _exponential_terms(
    x,
    w,
    head,
    tokens,
    clip,
    count,
    kept,
    terms,
    factors,
    splits,
    KL: tl.constexpr,
    SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    live = tl.load(tokens.mask + row) != 0
    inverse = tl.sum(inverse_temperature(head.temperature, row + tl.zeros((1,), tl.int64), live), 0)
    scale = inverse * LOG2E
    part = tl.arange(0, SPLITS)
    total = tl.sum(tl.load(kept.totals + row * splits + part, mask=part < splits, other=0.0), 0)
    weighted = tl.sum(tl.load(kept.weighteds + row * splits + part, mask=part < splits, other=0.0), 0)
    offset = tl.load(kept.offsets + row)
    start = kept.out + row * head.vocabulary
    good = (total > 1 / FURTHEST) & (total < FURTHEST)
    if live & (good == 0):
        top = tl.full((COLUMNS,), float("-inf"), tl.float32)
        for low in range(0, head.vocabulary, COLUMNS):
            z, _ = _row_logits(x, w, head, row, low, COLUMNS, DEPTH)
            top = tl.where((z > top) | (z != z), z, top)
        offset = finite(tl.max(top, 0)) * scale
        sums = tl.zeros((COLUMNS,), tl.float32)
        moments = tl.zeros((COLUMNS,), tl.float32)
        for low in range(0, head.vocabulary, COLUMNS):
            z, slope = _row_logits(x, w, head, row, low, COLUMNS, DEPTH)
            distance = z * scale - offset
            e = tl.exp2(distance)
            sums += e
            moments += tl.where(e > 0, e * distance, 0.0)
            column = low + tl.arange(0, COLUMNS)
            stored = tl.where(e > 0, e * slope, e).to(kept.out.dtype.element_ty)
            tl.store(start + column, stored, mask=column < head.vocabulary)
        total = tl.sum(sums, 0)
        weighted = tl.sum(moments, 0)
        tl.debug_barrier()  # the label's entry is written once more, by another thread
    z = tl.load(kept.targets + row)
    log_prob = LN2 * (z * scale - offset - tl.log2(total))
    entropy = LN2 * (tl.log2(total) - weighted / total)
    loss, g = token_terms(log_prob, tokens, clip, row, live, KL)
    store_terms(terms, row, live, row >= 0, loss, log_prob, entropy)
    tl.store(factors + row, tl.where(live, -g / tl.load(count) / total * inverse, 0.0))
    slope = 1.0 * head.logit_scale
    if head.softcap is not None:
        slope = slope * (1.0 - (z / head.softcap) * (z / head.softcap))
    label = tl.load(head.labels + row).to(tl.int64)
    entry = (tl.exp2(z * scale - offset) - total) * slope
    known = live & (label >= 0) & (label < head.vocabulary)
    tl.store(start + label, entry.to(kept.out.dtype.element_ty), mask=known)


def possible(head: DenseHead, options: LossOptions) -> bool:
    """bf16 operands (fp16 has not the range), no adapter on the head, no entropy bonus (it needs log E)."""
    return head.half and head.x.dtype == torch.bfloat16 and head.v is None and options.entropy_coef == 0


def _offsets(head: DenseHead, rows: slice, old: Tensor) -> Tensor:
    """Where each token's log-sum-exp was, as a power of two: its logit minus its old log-prob."""
    y = head.labels[rows].clamp(0, len(head.weight) - 1)
    z = (head.x[rows].float() * head.weight[y].float()).sum(1)
    z = z if head.bias is None else z + head.bias[y].float()
    z = z * head.logit_scale
    z = z if head.softcap is None else torch.tanh(z / head.softcap) * head.softcap
    each, number = head.temperature
    return (z / (number if each is None else each[rows]) - old) * LOG2E.value


def exponential_ppo(head: DenseHead, tokens: Tokens, count: Tensor, options: LossOptions, need: Need, rows: int):
    """`linear_ppo_loss.linear_ppo`, `rows` tokens at a time. Memory: 2 bytes a token of a chunk and column."""
    n, (vocabulary, width) = len(head), head.weight.shape
    device, chip = head.x.device, tuning.chip_of(head.x.device)
    make = partial(torch.zeros, dtype=torch.float32, device=device)
    results = Terms(make(n), make(n), make(n))
    dx = make(n, width) if need.hidden else None
    dw = make(vocabulary, width) if need.weight else None
    dbias = make(vocabulary) if need.bias else None
    described = chip.descriptors and head.aligned
    wide = described and head.softcap is None  # storing beside summing costs registers
    tile = tuning.product_tile(chip, rows, True, adapter=not wide, backward=True, described=described)
    constants = {"DESCRIPTORS": described, "HALVES": tile.columns > 64 and described}
    constants |= head.precisions() | tile.constants()
    kl = kl_index(options.kl_coef, options.kl_estimator)
    buffer = torch.empty(min(n, rows), vocabulary, dtype=torch.bfloat16, device=device)
    for first in range(0, n, rows):
        cut = slice(first, min(n, first + rows))
        some, args = tokens.map(lambda t, cut=cut: t[cut]), head.args(cut)
        size = len(some.mask)
        blocks = -(-size // tile.rows)
        splits, columns = tuning.product_splits(chip, blocks, vocabulary, tile)
        targets, factors, e = torch.full((size,), torch.nan, device=device), make(size), buffer[:size]
        sums = (make(size, splits), make(size, splits))
        kept = Exponentials(_offsets(head, cut, some.old_log_probs), targets, *sums, e)
        arguments = (*head.operands(tile, described, cut), args, some.mask, kept, size, blocks, splits, columns)
        launch(_exponentials, blocks * splits, device, *arguments, **constants, warps=tile.warps, stages=tile.stages)
        terms = Terms(*(t[cut] for t in results))
        plain = (*head.operands(tile, False, cut), args)
        arguments = (*plain, some, Clip.of(options), count, kept, terms, factors, splits)
        width_of_sums = triton.next_power_of_2(splits)
        launch(_exponential_terms, size, device, *arguments, KL=kl, SPLITS=width_of_sums, COLUMNS=64, DEPTH=32, warps=8)
        if dx is not None:
            torch.mul(product(e, head.weight), factors[:, None], out=dx[cut])
        if dw is not None:
            add_product(dw, e.T, (head.x[cut].float() * factors[:, None]).to(e.dtype))
        if dbias is not None:
            dbias += product(e.T, factors[:, None].to(e.dtype))[:, 0]
    return *results, (dx, dw, dbias, None, None)
