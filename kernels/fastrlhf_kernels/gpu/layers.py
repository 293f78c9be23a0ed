"""`fastrlhf_kernels.layers` in Triton: a launch each. They take strides, so that no view is copied before them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

ELEMENTS = 1024  # of a program of an elementwise kernel


class Heads(NamedTuple):
    """Heads [B, H, T, D] of tokens, with the strides of the first three."""

    data: Tensor
    batch: int
    head: int
    token: int

    @classmethod
    def of(cls, t: Tensor) -> Heads:
        return cls(t, *t.stride()[:3])


class Store(NamedTuple):
    """Keys or values of a cache [slots, positions, H, D], and a token of each row [B, H, D], with their strides."""

    data: Tensor
    slot: int
    position: int
    head: int
    new: Tensor
    new_row: int
    new_head: int


def _dense(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


@triton.jit(do_not_specialize=["eps"])
def _rms_norm(x, weight, out, size, eps, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < size
    values = tl.load(x + row * size + column, mask=inside, other=0.0)
    wide = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    normed = (wide * scale).to(values.dtype).to(tl.float32)
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + column, (gain * normed).to(values.dtype), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.contiguous()
    out, size = torch.empty_like(x), x.shape[-1]
    columns = max(16, triton.next_power_of_2(size))
    warps = max(1, min(16, columns // 256))
    launch(
        _rms_norm,
        out.numel() // max(1, size),
        x.device,
        x,
        _dense(weight),
        out,
        size,
        eps,
        COLUMNS=columns,
        warps=warps,
    )
    return out


@triton.jit  # n specialised: a multiple of 16 makes accesses of 16 bytes
def _silu_mul(gate, up, out, n, TILE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = place < n
    x = tl.load(gate + place, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(x.dtype).to(tl.float32)
    y = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, (silu * y).to(x.dtype), mask=inside)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out, n = torch.empty_like(gate), gate.numel()
    launch(_silu_mul, -(-n // ELEMENTS), gate.device, gate, up, out, n, TILE=ELEMENTS, warps=4)
    return out


@triton.jit
def _turn(source, target, heads, b, t, cosine, sine, half, HEADS: tl.constexpr, HALF: tl.constexpr):
    """One token of each head: (x1 cos1 - x2 sin1, x2 cos2 + x1 sin2)."""
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < half)
    there = column < half
    place = source.data + b * source.batch + t * source.token + head * source.head + column
    one, two = tl.load(place, mask=inside, other=0.0), tl.load(place + half, mask=inside, other=0.0)
    kind = one.dtype
    x, y = one.to(tl.float32), two.to(tl.float32)
    cos_x = tl.load(cosine + column, mask=there, other=0.0).to(tl.float32)
    cos_y = tl.load(cosine + half + column, mask=there, other=0.0).to(tl.float32)
    sin_x = tl.load(sine + column, mask=there, other=0.0).to(tl.float32)
    sin_y = tl.load(sine + half + column, mask=there, other=0.0).to(tl.float32)
    first = (x * cos_x).to(kind).to(tl.float32) + (-y * sin_x).to(kind).to(tl.float32)
    second = (y * cos_y).to(kind).to(tl.float32) + (x * sin_y).to(kind).to(tl.float32)
    place = target.data + b * target.batch + t * target.token + head * target.head + column
    tl.store(place, first.to(kind), mask=inside)
    tl.store(place + half, second.to(kind), mask=inside)


@triton.jit(do_not_specialize=["length"])
def _rotate(
    q,
    k,
    new_q,
    new_k,
    cosine,
    sine,
    cos_batch,
    cos_token,
    sin_batch,
    sin_token,
    q_heads,
    k_heads,
    length,
    half,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """A program a token and tensor."""
    program = tl.program_id(0).to(tl.int64)
    token = program // 2
    b, t = token // length, token % length
    cosine, sine = cosine + b * cos_batch + t * cos_token, sine + b * sin_batch + t * sin_token
    if program % 2 == 0:
        _turn(q, new_q, q_heads, b, t, cosine, sine, half, HEADS, HALF)
    else:
        _turn(k, new_k, k_heads, b, t, cosine, sine, half, HEADS, HALF)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q, k, cos, sin = (_dense(t) for t in (q, k, cos, sin))
    batch, q_heads, length, size = q.shape
    new_q, new_k = (t.new_empty(batch, length, t.shape[1], size).transpose(1, 2) for t in (q, k))
    strides = [stride for t in (cos, sin) for stride in ((0 if len(t) == 1 else t.stride(0)), t.stride(1))]
    most = max(q_heads, k.shape[1])
    constants = {"HEADS": triton.next_power_of_2(most), "HALF": max(16, triton.next_power_of_2(size // 2))}
    warps = max(1, min(8, constants["HEADS"] * constants["HALF"] // 512))
    arguments = (
        *(Heads.of(t) for t in (q, k, new_q, new_k)),
        cos,
        sin,
        *strides,
        q_heads,
        k.shape[1],
        length,
        size // 2,
    )
    launch(_rotate, 2 * batch * length, q.device, *arguments, **constants, warps=warps)
    return new_q, new_k


@triton.jit
def _store_tokens(k, v, slots, lengths, heads, size, HEADS: tl.constexpr, DEPTH: tl.constexpr):
    """A program a row."""
    row = tl.program_id(0).to(tl.int64)
    slot, position = tl.load(slots + row).to(tl.int64), tl.load(lengths + row).to(tl.int64)
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, DEPTH)[None, :]
    inside = (head < heads) & (column < size)
    for store in tl.static_range(2):
        each = k if store == 0 else v
        new = tl.load(each.new + row * each.new_row + head * each.new_head + column, mask=inside)
        place = each.data + slot * each.slot + position * each.position + head * each.head + column
        tl.store(place, new, mask=inside)


def store_tokens(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor, lengths: Tensor) -> None:
    rows, heads, size = k.shape
    k, v = _dense(k), _dense(v)
    stores = (Store(store, *store.stride()[:3], new, *new.stride()[:2]) for store, new in ((keys, k), (values, v)))
    constants = {"HEADS": triton.next_power_of_2(heads), "DEPTH": triton.next_power_of_2(size)}
    warps = max(1, min(8, constants["HEADS"] * constants["DEPTH"] // 512))
    launch(
        _store_tokens,
        rows,
        k.device,
        *stores,
        slots.contiguous(),
        lengths.contiguous(),
        heads,
        size,
        **constants,
        warps=warps,
    )
