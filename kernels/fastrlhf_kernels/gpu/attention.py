"""Decode attention in Triton: the positions of a sequence are split over programs (flash-decoding), then combined.

A program serves up to 16 query heads that share a key head, so that keys and values are read once. Which positions it
takes follows from the length on the device: the grid depends on shapes alone, and a CUDA graph holds for all lengths.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import INTERPRET
from . import tuning
from .launch import launch
from .terms import FLOOR, LOG2E, finite

HEADS = 16  # the least that a tensor core takes


class Strided(NamedTuple):
    """A tensor with a dense last dimension and its other strides; queries have no positions."""

    data: Tensor
    batch: int
    position: int | None
    head: int


class Parts(NamedTuple):
    """What each part of the positions of a head leaves: [rows, parts, size], [rows, parts], [rows, parts]."""

    sums: Tensor
    tops: Tensor
    totals: Tensor


@triton.jit
def _decode(
    q,
    k,
    v,
    lengths,
    parts,
    out,
    groups,
    group,
    head_blocks,
    splits,
    scale,
    softcap,
    window,
    size,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    program = tl.program_id(0)  # divided in 32 bits: a division in 64 is a call
    split, program = program % splits, program // splits
    head_block, program = program % head_blocks, program // head_blocks
    batch, key_head = (program // groups).to(tl.int64), (program % groups).to(tl.int64)
    member = head_block * ROWS + tl.arange(0, ROWS)
    head = key_head * group + member
    dimension = tl.arange(0, DEPTH)
    in_head = dimension < size
    here = (member < group)[:, None] & in_head[None, :]
    place = batch * q.batch + head[:, None] * q.head + dimension[None, :]
    query = tl.load(q.data + place, mask=here, other=0.0)
    length = tl.load(lengths + batch).to(tl.int32)
    first = length * 0
    if window is not None:
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
        position = (low + tl.arange(0, COLUMNS)).to(tl.int64)
        live = (position < last)[:, None] & in_head[None, :]
        k_place = batch * k.batch + position[:, None] * k.position + key_head * k.head + dimension[None, :]
        v_place = batch * v.batch + position[:, None] * v.position + key_head * v.head + dimension[None, :]
        keys = tl.load(k.data + k_place, mask=live, other=0.0)
        values = tl.load(v.data + v_place, mask=live, other=0.0)
        if WIDE:
            keys, values = keys.to(tl.float32), values.to(tl.float32)
        score = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        if softcap is not None:
            score = softcap * (1.0 - 2.0 / (tl.exp(score * (2.0 / softcap)) + 1.0))
        score = tl.where((position < last)[None, :], score, float("-inf"))
        new = tl.maximum(top, tl.max(score, 1))
        base = finite(new)
        p = tl.exp2((score - base[:, None]) * LOG2E)
        decay = tl.exp2(tl.maximum((top - base) * LOG2E, FLOOR))
        total = total * decay + tl.sum(p, 1)
        result = tl.dot(p.to(values.dtype), values, result * decay[:, None], input_precision="ieee")
        top = new
    row = batch * groups * group + head
    if parts is not None:
        place = row * splits + split
        tl.store(parts.sums + place[:, None] * size + dimension[None, :], result, mask=here)
        tl.store(parts.tops + place, top, mask=member < group)
        tl.store(parts.totals + place, total, mask=member < group)
    else:
        result = (result / tl.where(total == 0.0, 1.0, total)[:, None]).to(out.dtype.element_ty)
        tl.store(out + row[:, None] * size + dimension[None, :], result, mask=here)


@triton.jit
def _combine_splits(parts, out, splits, size, SPLITS: tl.constexpr, DEPTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    split, dimension = tl.arange(0, SPLITS), tl.arange(0, DEPTH)
    there, in_head = split < splits, dimension < size
    place = row * splits + split
    top = tl.load(parts.tops + place, mask=there, other=float("-inf"))
    decay = tl.exp2(tl.maximum((top - finite(tl.max(top, 0))) * LOG2E, FLOOR))
    total = tl.sum(decay * tl.load(parts.totals + place, mask=there, other=0.0), 0)
    place = place[:, None] * size + dimension[None, :]
    sums = tl.load(parts.sums + place, mask=there[:, None] & in_head[None, :], other=0.0)
    result = tl.sum(decay[:, None] * sums, 0)
    result = result / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * size + dimension, result.to(out.dtype.element_ty), mask=in_head)


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
    parts = None
    if splits > 1:
        make = partial(torch.empty, dtype=torch.float32, device=device)
        parts = Parts(make(batch * heads, splits, size), make(batch * heads, splits), make(batch * heads, splits))
    queries = Strided(q, q.stride(0), None, q.stride(1))
    keys, values = (Strided(t, *t.stride()[:3]) for t in (k, v))
    cap = None if softcap is None else float(softcap)
    grid = (groups, group, head_blocks, splits)
    arguments = (queries, keys, values, lengths.contiguous(), parts, out, *grid, float(scale), cap, window, size)
    constants = {"WIDE": INTERPRET} | tile.constants()
    programs = batch * groups * head_blocks * splits
    launch(_decode, programs, device, *arguments, **constants, warps=tile.warps, stages=tile.stages)
    if splits > 1:
        constants = {"SPLITS": triton.next_power_of_2(splits), "DEPTH": tile.depth}
        launch(_combine_splits, batch * heads, device, parts, out, splits, size, **constants, warps=4)
    return out
