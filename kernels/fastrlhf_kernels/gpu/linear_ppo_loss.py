"""Hidden states to the PPO loss and its gradients: three matrix products and one sweep over the logits between them.

PPO knows where a token's log-sum-exp was when it was sampled: at its logit minus its old log-prob. With that as the
exponent's offset one sweep over the fp32 logits gives E = exp(z - offset) and its exact sum s, the inverse of the
ratio; E lies in the operands' dtype over the logits' own memory. The gradient of the logits is a factor a row times
(E - s at the label), so dx and dW are plain products with E and nothing reads the logits twice: 4 bytes written and 4
read a logit by the product and the sweep, 2 written by the sweep (half precision), where a softmax needs 4 more.
A row whose policy moved by more than the dtype's range is computed again, from hidden states, with its own maximum.

The entropy bonus needs log E as well, which the dtype no longer has: there `log_probs.rows_ppo` sweeps twice.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operands import Head, LossOptions, Need, Rows, Tokens
from ..workspace import chunk_rows
from .head import DenseHead, add_product, bend, padded, product
from .launch import launch
from .log_probs import Terms, rows_ppo, store_terms
from .terms import LN2, LOG2E, Clip, finite, inverse_temperature, kl_index, token_terms


class Range(NamedTuple):
    """What a dtype holds of exponentials: 2 ** shift is stored for 1, sums of least to most are taken as they are."""

    shift: float
    least: float
    most: float


RANGES = {
    torch.float32: Range(0.0, 2.0**-60, 2.0**60),
    torch.bfloat16: Range(0.0, 2.0**-60, 2.0**60),
    torch.float16: Range(8.0, 4.0, 2.0**15),  # it ends at 65,504 and at 6e-8
}


class Chunk(NamedTuple):
    """The logits of some rows, and what the sweep puts in their place."""

    logits: Tensor  # [n, V] fp32, of rows that start at multiples of 64
    out: Tensor  # [n, V]: E, and E - s at the label; over the logits' memory
    logits_stride: int
    out_stride: int
    factors: Tensor  # [n]: dL / dz = factor * out * 2 ** -shift
    far: Tensor  # [n] int8: rows that must be computed again
    range: Range


class Losses(NamedTuple):
    """What a row's sums become its loss with."""

    tokens: Tokens
    clip: Clip
    count: Tensor  # 0-d fp32, what factors are divided by
    terms: Terms


@triton.jit
def _finish(chunk, losses, head, row, live, label, z, scale, inverse, offset, total, weighted, KL: tl.constexpr):
    """A row's sums -> its log-prob, entropy, loss and factor, and what stands at its label."""
    log_prob = LN2 * (z * scale - offset - tl.log2(total))
    entropy = LN2 * (tl.log2(total) - weighted / total)
    loss, g = token_terms(log_prob, losses.tokens, losses.clip, row, live, KL)
    store_terms(losses.terms, row, live, row >= 0, loss, log_prob, entropy)
    factor = -g / tl.load(losses.count) / (total * tl.exp2(-chunk.range.shift)) * inverse * head.logit_scale
    tl.store(chunk.factors + row, tl.where(live, factor, 0.0))
    entry = tl.exp2(z * scale - offset) - total
    if head.softcap is not None:  # z = softcap * tanh(u / softcap): dz / du = 1 - tanh ** 2
        entry = entry * (1.0 - (z / head.softcap) * (z / head.softcap))
    known = live & (label >= 0) & (label < head.vocabulary)
    place = chunk.out + row * chunk.out_stride + label
    tl.store(place, entry.to(chunk.out.dtype.element_ty), mask=known)


@triton.jit
def _relative(chunk, losses, head, KL: tl.constexpr, COLUMNS: tl.constexpr):
    """The sweep: a program a row."""
    row = tl.program_id(0).to(tl.int64)
    live = tl.load(losses.tokens.mask + row) != 0
    inverse = tl.sum(inverse_temperature(head.temperature, row + tl.zeros((1,), tl.int64), live), 0)
    scale = inverse * LOG2E
    label = tl.load(head.labels + row).to(tl.int64)
    known = live & (label >= 0) & (label < head.vocabulary)
    source, out = chunk.logits + row * chunk.logits_stride, chunk.out + row * chunk.out_stride
    z = tl.load(source + label, mask=known, other=float("nan"))
    old = tl.load(losses.tokens.old_log_probs + row).to(tl.float32)
    offset = z * scale - old * LOG2E - chunk.range.shift
    sums = tl.zeros((COLUMNS,), tl.float32)
    moments = tl.zeros((COLUMNS,), tl.float32)
    for low in range(0, chunk.logits_stride, COLUMNS):
        column = low + tl.arange(0, COLUMNS)
        inside = column < chunk.logits_stride  # rows end at a multiple of 64: loads and stores of 16 bytes
        x = tl.load(source + column, mask=inside, other=float("-inf"))
        x = tl.where(column < head.vocabulary, x, float("-inf"))
        distance = x * scale - offset
        e = tl.exp2(distance)
        sums += e
        moments += tl.where(e > 0, e * distance, 0.0)
        if head.softcap is not None:
            e = tl.where(e > 0, e * (1.0 - (x / head.softcap) * (x / head.softcap)), e)
        tl.debug_barrier()  # E lies over logits of this row that another warp has yet to read
        tl.store(out + column, tl.where(live, e, 0.0).to(chunk.out.dtype.element_ty), mask=inside)
    total, weighted = tl.sum(sums, 0), tl.sum(moments, 0)
    good = (total > chunk.range.least) & (total < chunk.range.most)
    tl.store(chunk.far + row, (live & (good == 0)).to(tl.int8))
    tl.debug_barrier()  # the label's entry is written once more, by another thread
    _finish(chunk, losses, head, row, live & good, label, z, scale, inverse, offset, total, weighted, KL)


@triton.jit
def _row_logits(x, w, head, row, low, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """z of one row and COLUMNS columns, in fp32 by plain sums."""
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
    if head.v is not None:
        for step in range(0, head.rank, DEPTH):
            here = step + depth < head.rank
            a = tl.load(head.v + row * head.rank + step + depth, mask=here, other=0.0)
            place = column[:, None] * head.rank + (step + depth)[None, :]
            b = tl.load(head.lora_b + place, mask=inside[:, None] & here[None, :], other=0.0)
            z += tl.sum(a[None, :] * b, 1)
    if head.bias is not None:
        z += tl.load(head.bias + column, mask=inside, other=0.0).to(tl.float32)
    z, slope = bend(z, head)
    return tl.where(inside, z, float("-inf")), slope / head.logit_scale


@triton.jit
def _again(x, w, chunk, losses, head, KL: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """The rows that are far from where their old log-probs put them: relative to their own maximum."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(chunk.far + row) != 0:
        live = row >= 0
        inverse = tl.sum(inverse_temperature(head.temperature, row + tl.zeros((1,), tl.int64), live), 0)
        scale = inverse * LOG2E
        label = tl.load(head.labels + row).to(tl.int64)
        top = tl.full((COLUMNS,), float("-inf"), tl.float32)
        target = tl.zeros((COLUMNS,), tl.float32)
        for low in range(0, head.vocabulary, COLUMNS):
            z, _ = _row_logits(x, w, head, row, low, COLUMNS, DEPTH)
            top = tl.where((z > top) | (z != z), z, top)
            target += tl.where(low + tl.arange(0, COLUMNS) == label, z, 0.0)
        known = (label >= 0) & (label < head.vocabulary)
        at_label = tl.where(known, tl.sum(target, 0), float("nan"))
        offset = finite(tl.max(top, 0)) * scale - chunk.range.shift
        sums = tl.zeros((COLUMNS,), tl.float32)
        moments = tl.zeros((COLUMNS,), tl.float32)
        for low in range(0, head.vocabulary, COLUMNS):
            z, slope = _row_logits(x, w, head, row, low, COLUMNS, DEPTH)
            distance = z * scale - offset
            e = tl.exp2(distance)
            sums += e
            moments += tl.where(e > 0, e * distance, 0.0)
            column = low + tl.arange(0, COLUMNS)
            stored = tl.where(e > 0, e * slope, e).to(chunk.out.dtype.element_ty)
            tl.store(chunk.out + row * chunk.out_stride + column, stored, mask=column < head.vocabulary)
        tl.debug_barrier()  # as in the sweep
        total, weighted = tl.sum(sums, 0), tl.sum(moments, 0)
        _finish(chunk, losses, head, row, live, label, at_label, scale, inverse, offset, total, weighted, KL)


def _exponentials(head: DenseHead, cut: slice, z: Tensor, out: Tensor, losses: Losses, kl: int) -> Tensor:
    """The sweep over the logits z of some rows, and once more over those that are far -> the factors [n, 1]."""
    n, width = z.shape
    factors = torch.zeros(n, dtype=torch.float32, device=z.device)
    far = torch.empty(n, dtype=torch.int8, device=z.device)
    chunk = Chunk(z, out, z.stride(0), out.stride(0), factors, far, RANGES[out.dtype])
    args = head.args(cut)
    columns = min(4096, triton.next_power_of_2(width))
    warps = max(1, min(8, columns // 512))
    launch(_relative, n, z.device, chunk, losses, args, KL=kl, COLUMNS=columns, warps=warps)
    launch(_again, n, z.device, head.x[cut], head.weight, chunk, losses, args, KL=kl, COLUMNS=64, DEPTH=32, warps=8)
    return factors[:, None]


def linear_ppo(head: Head, tokens: Tokens, count: Tensor, options: LossOptions, need: Need):
    """(loss terms, log-probs, entropies) of the tokens, each [n] fp32, and the HEAD_GRADIENTS in fp32.

    count: 0-d fp32, what gradients are divided by.
    """
    workspace, n, vocabulary = head.workspace, len(tokens.mask), len(head.weight)
    head = DenseHead(head)
    dtype, device = head.x.dtype if head.half else torch.float32, head.x.device
    late = dtype == torch.float16  # its smallest number is 6e-8: divide the sums, not the terms
    divisor, shift = torch.ones_like(count) if late else count, RANGES[dtype].shift
    clip, kl = Clip.of(options), kl_index(options.kl_coef, options.kl_estimator)
    make = partial(torch.empty if n else torch.zeros, dtype=torch.float32, device=device)
    terms = Terms(make(n), make(n), make(n))
    dx = make(*head.x.shape) if need.hidden else None
    dw = make(*head.weight.shape) if need.weight else None
    dbias = make(vocabulary) if need.bias else None
    dlora_b = make(*head.lora_b.shape) if need.lora else None
    dv = make(*head.v.shape) if head.v is not None and (need.hidden or need.lora) else None
    rows = chunk_rows(n, vocabulary, workspace)
    buffer = padded(rows, vocabulary, torch.float32, device)
    for first in range(0, n, rows):
        cut = slice(first, min(n, first + rows))
        z = head.logits(cut, buffer[: cut.stop - cut.start])
        e = z.view(dtype)[:, :vocabulary]
        some = tokens.map(lambda t, cut=cut: t[cut])
        if options.entropy_coef == 0:
            losses = Losses(some, clip, divisor, Terms(*(t[cut] for t in terms)))
            factors = _exponentials(head, cut, z, e, losses, kl)
        else:
            each, number = head.temperature
            part = Rows(z, head.labels[cut], None if each is None else each[cut], number)
            results = rows_ppo(part, some, divisor, options, e, head.logit_scale, head.softcap)
            for mine, result in zip(terms, results):
                mine[cut] = result
            factors, shift = torch.ones(len(z), 1, device=device), 0.0
        into = product if first == 0 else add_product  # the first chunk's sums are nobody's zeros
        if dx is not None:
            torch.mul(product(e, head.weight), factors, out=dx[cut])
        if dw is not None:
            into(e.T, (head.x[cut].float() * factors).to(dtype), out=dw)
        if dbias is not None:
            into(e.T, factors.to(dtype), out=dbias[:, None])
        if dlora_b is not None:
            into(e.T, head.v[cut] * factors, out=dlora_b)
        if dv is not None:
            torch.mul(product(e, head.lora_b), factors, out=dv[cut])
    da = head.lora_scale * (dv.T @ head.x.float()) if need.lora else None
    if dx is not None and dv is not None:
        dx.addmm_(dv, head.lora_a, alpha=head.lora_scale)
    grads = (dx, dw, dbias, da, dlora_b)
    if late:
        grads = tuple(None if t is None else t.div_(count * 2.0**shift) for t in grads)
    return *terms, grads
