"""Decode attention in Triton: the positions of a sequence are split over programs (flash-decoding), then combined.

A program serves up to 16 query heads that share a key head, so that keys and values are read once. Which positions it
takes follows from the length on the device: the grid depends on shapes alone, and a CUDA graph holds for all lengths.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .backend import INTERPRET
from .triton_launch import launch
from .triton_terms import FLOOR, LOG2E, finite

HEADS = 16  # the least that a tensor core takes


@triton.jit
def _decode(
    q, k, v, lengths, sums, tops, totals, out,
    q_batch, q_head, k_batch, k_place, k_head, v_batch, v_place, v_head, groups, group, head_blocks, splits,
    scale, softcap, window, size,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)  # divided in 32 bits: a division in 64 is a call
    split, program = program % splits, program // splits
    head_block, program = program % head_blocks, program // head_blocks
    batch, key_head = (program // groups).to(tl.int64), (program % groups).to(tl.int64)
    member = head_block * ROWS + tl.arange(0, ROWS)
    head = key_head * group + member
    dimension = tl.arange(0, DEPTH)
    in_head = dimension < size
    query = tl.load(q + batch * q_batch + head[:, None] * q_head + dimension[None, :],
                    mask=(member < group)[:, None] & in_head[None, :], other=0.0)  # fmt: skip
    length = tl.load(lengths + batch).to(tl.int32)
    first = length * 0
    if WINDOW:
        first = tl.maximum(length - window, 0)
    share = ((length - first + splits - 1) // splits + COLUMNS - 1) // COLUMNS * COLUMNS
    first = first + split * share
    last = tl.minimum(first + share, length)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, DEPTH), tl.float32)
    if WIDE:
        query = query.to(tl.float32)
    for low in range(first, last, COLUMNS):
        place = (low + tl.arange(0, COLUMNS)).to(tl.int64)
        live = (place < last)[:, None] & in_head[None, :]
        keys = tl.load(k + batch * k_batch + place[:, None] * k_place + key_head * k_head + dimension[None, :],
                       mask=live, other=0.0)  # fmt: skip
        values = tl.load(v + batch * v_batch + place[:, None] * v_place + key_head * v_head + dimension[None, :],
                         mask=live, other=0.0)  # fmt: skip
        if WIDE:
            keys, values = keys.to(tl.float32), values.to(tl.float32)
        score = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale
        if SOFTCAP:
            score = softcap * (1.0 - 2.0 / (tl.exp(score * (2.0 / softcap)) + 1.0))
        score = tl.where((place < last)[None, :], score, float("-inf"))
        new = tl.maximum(top, tl.max(score, 1))
        base = finite(new)
        p = tl.exp2((score - base[:, None]) * LOG2E)
        decay = tl.exp2(tl.maximum((top - base) * LOG2E, FLOOR))
        total = total * decay + tl.sum(p, 1)
        result = tl.dot(p.to(values.dtype), values, result * decay[:, None], input_precision=PRECISION)
        top = new
    here = member < group
    row = batch * groups * group + head
    if SPLIT:
        tl.store(sums + (row * splits + split)[:, None] * size + dimension[None, :], result,
                 mask=here[:, None] & in_head[None, :])  # fmt: skip
        tl.store(tops + row * splits + split, top, mask=here)
        tl.store(totals + row * splits + split, total, mask=here)
    else:
        result = result / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out + row[:, None] * size + dimension[None, :], result.to(out.dtype.element_ty),
                 mask=here[:, None] & in_head[None, :])  # fmt: skip


@triton.jit
def _combine_splits(
    sums, tops, totals, out, splits, size, SPLITS: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    split, dimension = tl.arange(0, SPLITS), tl.arange(0, DEPTH)
    there = split < splits
    top = tl.load(tops + row * splits + split, mask=there, other=float("-inf"))
    decay = tl.exp2(tl.maximum((top - finite(tl.max(top, 0))) * LOG2E, FLOOR))
    total = tl.sum(decay * tl.load(totals + row * splits + split, mask=there, other=0.0), 0)
    parts = tl.load(sums + (row * splits + split)[:, None] * size + dimension[None, :],
                    mask=there[:, None] & (dimension < size)[None, :], other=0.0)  # fmt: skip
    result = tl.sum(decay[:, None] * parts, 0)
    result = result / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * size + dimension, result.to(out.dtype.element_ty), mask=dimension < size)


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float, softcap, window) -> Tensor:
    """`attention.decode_attention`, arguments as there, checked."""
    batch, heads, size = q.shape
    positions, groups = k.shape[1:3]
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    device = q.device
    chip = tuning.chip_of(device)
    tile = tuning.attention_tile(chip, size, q.element_size())
    group = heads // groups
    head_blocks = -(-group // HEADS)
    splits = tuning.attention_splits(chip, batch * groups * head_blocks, positions)
    out = torch.empty(batch, heads, size, dtype=q.dtype, device=device)
    kept = batch * heads * splits if splits > 1 else 0
    sums = torch.empty(kept * size, dtype=torch.float32, device=device)
    tops, totals = torch.empty(2, kept, dtype=torch.float32, device=device)
    launch(
        _decode, batch * groups * head_blocks * splits, device, q, k, v, lengths.contiguous(), sums, tops, totals, out,
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], groups, group, head_blocks, splits, float(scale),
        float(softcap or 1.0), window or 0, size, SOFTCAP=softcap is not None, WINDOW=window is not None,
        WIDE=INTERPRET, PRECISION="ieee", SPLIT=splits > 1, **tile.constants(), warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    if splits > 1:
        launch(
            _combine_splits, batch * heads, device, sums, tops, totals, out, splits, size,
            SPLITS=triton.next_power_of_2(splits), DEPTH=tile.depth, warps=4,
        )  # fmt: skip
    return out
