"""Logits to log-probs and entropies, their gradient, and the PPO loss from logits: each logit is read once or twice.

A program sweeps some rows; few rows are split into parts of the vocabulary, whose sums a second kernel combines.
Kept for the backward are the maximum of the raw logits and the sum of exponentials: differences of logits are
taken before they are divided by the temperature, so that a large common offset costs no precision.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .losses import LossOptions
from .triton_combine import combine, split_degrees
from .triton_launch import launch
from .triton_terms import (
    KL_ESTIMATORS,
    LOG2E,
    absorb,
    clipped_terms,
    entropy_of,
    finite,
    inverse_temperature,
    kl_of,
    log_prob_of,
    merge,
    softmax_gradient,
)
from .tuning import chip_of, row_splits, row_tile


@triton.jit
def row_starts(rows, inner, stride_outer, stride_inner):
    """Offsets of rows of logits [outer, inner, V]."""
    return (rows // inner) * stride_outer + (rows % inner) * stride_inner


@triton.jit
def sweep(start, stride, live, first, last, scale, ENTROPY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns first..last of some rows -> (maximum, sum, weighted sum), see `absorb`."""
    top = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    weighted = tl.zeros((ROWS, COLUMNS), tl.float32)
    for low in range(first, last, COLUMNS):
        column = low + tl.arange(0, COLUMNS)
        valid = live[:, None] & (column < last)[None, :]
        x = tl.load(start[:, None] + column.to(tl.int64)[None, :] * stride, mask=valid, other=float("-inf"))
        top, total, weighted = absorb(x.to(tl.float32), scale[:, None], top, total, weighted, ENTROPY)
    return merge(top, total, weighted, scale[:, None], ENTROPY)


@triton.jit
def logit_at(start, stride, label, columns, live):
    """The logits of the labels; NaN for a label outside [0, columns)."""
    inside = live & (label >= 0) & (label < columns)
    return tl.load(start + label * stride, mask=inside, other=float("nan")).to(tl.float32)


@triton.jit(do_not_specialize=["n", "inner"])
def _forward(
    logits, labels, temperatures, log_probs, entropies, tops, totals, weighteds,
    n, columns, inner, stride_outer, stride_inner, stride, temperature, ignore_index, splits, width,
    PER_TOKEN: tl.constexpr, ENTROPY: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    part = program % splits
    rows = (program // splits) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    label = tl.load(labels + rows, mask=inside, other=0).to(tl.int64)
    live = inside & (label != ignore_index)
    scale = inverse_temperature(temperatures, temperature, rows, live, PER_TOKEN) * LOG2E
    start = logits + row_starts(rows, inner, stride_outer, stride_inner)
    first = part * width
    last = tl.minimum(first + width, columns)
    top, total, weighted = sweep(start, stride, live, first, last, scale, ENTROPY, ROWS, COLUMNS)
    if SPLIT:
        place = rows * splits + part
        tl.store(tops + place, top, mask=live)
        tl.store(totals + place, total, mask=live)
        tl.store(weighteds + place, weighted, mask=live)
        target = logit_at(start, stride, label, columns, live)
        tl.store(log_probs + rows, target, mask=live & (rows * 0 + part == 0))  # for `combine`
    else:
        log_prob = log_prob_of(logit_at(start, stride, label, columns, live), top, total, scale)
        tl.store(log_probs + rows, tl.where(live, log_prob, 0.0), mask=inside)
        tl.store(tops + rows, tl.where(live, top, 0.0), mask=inside)
        tl.store(totals + rows, tl.where(live, total, 0.0), mask=inside)
        if ENTROPY:
            tl.store(entropies + rows, tl.where(live, entropy_of(total, weighted), 0.0), mask=inside)


@triton.jit(do_not_specialize=["n", "inner"])
def _backward(
    logits, labels, temperatures, out, grads, entropy_grads, entropies, tops, totals,
    n, columns, inner, stride_outer, stride_inner, stride, temperature, ignore_index, splits, width,
    PER_TOKEN: tl.constexpr, PLAIN: tl.constexpr, ENTROPY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    part = program % splits
    rows = (program // splits) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    label = tl.load(labels + rows, mask=inside, other=0).to(tl.int64)
    live = inside & (label != ignore_index)
    inverse = inverse_temperature(temperatures, temperature, rows, live, PER_TOKEN)
    start = logits + row_starts(rows, inner, stride_outer, stride_inner)
    base = finite(tl.load(tops + rows, mask=live, other=0.0))
    total = tl.load(totals + rows, mask=live, other=1.0)
    zero = tl.zeros((ROWS,), tl.float32)
    g = tl.load(grads + rows, mask=live, other=0.0).to(tl.float32) if PLAIN else zero
    ge = tl.load(entropy_grads + rows, mask=live, other=0.0).to(tl.float32) if ENTROPY else zero
    entropy = tl.load(entropies + rows, mask=live, other=0.0) if ENTROPY else zero
    for low in range(part * width, tl.minimum(part * width + width, columns), COLUMNS):
        column = low + tl.arange(0, COLUMNS)
        valid = live[:, None] & (column < columns)[None, :]
        x = tl.load(start[:, None] + column.to(tl.int64)[None, :] * stride, mask=valid, other=0.0).to(tl.float32)
        scale, whole = (inverse * LOG2E)[:, None], total[:, None]
        dz = softmax_gradient(x, base[:, None], scale, whole, g[:, None], ge[:, None], entropy[:, None], ENTROPY)
        dz = (dz + tl.where(column[None, :] == label[:, None], g[:, None], 0.0)) * inverse[:, None]
        dz = tl.where(live[:, None], dz, 0.0)
        place = rows[:, None] * columns + column[None, :]
        tl.store(out + place, dz.to(out.dtype.element_ty), mask=inside[:, None] & (column < columns)[None, :])


@triton.jit(do_not_specialize=["n", "inner"])
def _ppo(
    logits, labels, temperatures, out, mask, olds, advantages, weights, refs, count, losses, log_probs, entropies,
    n, columns, inner, stride_outer, stride_inner, stride, out_stride, temperature,
    low_clip, high_clip, dual_clip, kl_coef, entropy_coef, logit_scale, softcap,
    PER_TOKEN: tl.constexpr, WEIGHTS: tl.constexpr, DUAL: tl.constexpr, KL: tl.constexpr, BONUS: tl.constexpr,
    GRADIENT: tl.constexpr, SOFTCAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    live = inside & (tl.load(mask + rows, mask=inside, other=0) != 0)
    label = tl.load(labels + rows, mask=live, other=0).to(tl.int64)
    inverse = inverse_temperature(temperatures, temperature, rows, live, PER_TOKEN)
    scale = inverse * LOG2E
    start = logits + row_starts(rows, inner, stride_outer, stride_inner)
    top, total, weighted = sweep(start, stride, live, 0, columns, scale, True, ROWS, COLUMNS)
    base = finite(top)
    log_prob = log_prob_of(logit_at(start, stride, label, columns, live), top, total, scale)
    entropy = entropy_of(total, weighted)
    old = tl.load(olds + rows, mask=live, other=0.0).to(tl.float32)
    advantage = tl.load(advantages + rows, mask=live, other=0.0).to(tl.float32)
    loss, g, _, _, _ = clipped_terms(log_prob, old, advantage, low_clip, high_clip, dual_clip, DUAL)
    if WEIGHTS:
        weight = tl.load(weights + rows, mask=live, other=0.0).to(tl.float32)
        loss, g = loss * weight, g * weight
    if KL >= 0:
        kl, slope = kl_of(log_prob - tl.load(refs + rows, mask=live, other=0.0).to(tl.float32), KL)
        loss, g = loss + kl_coef * kl, g + kl_coef * slope
    tl.store(losses + rows, tl.where(live, loss, 0.0), mask=inside)
    tl.store(log_probs + rows, tl.where(live, log_prob, 0.0), mask=inside)
    tl.store(entropies + rows, tl.where(live, entropy, 0.0), mask=inside)
    if GRADIENT:
        divisor = tl.load(count)
        g = g / divisor
        ge = tl.zeros((ROWS,), tl.float32) - entropy_coef / divisor
        for low in range(0, columns, COLUMNS):
            column = low + tl.arange(0, COLUMNS)
            valid = live[:, None] & (column < columns)[None, :]
            x = tl.load(start[:, None] + column.to(tl.int64)[None, :] * stride, mask=valid, other=0.0).to(tl.float32)
            whole = total[:, None]
            dz = softmax_gradient(x, base[:, None], scale[:, None], whole, g[:, None], ge[:, None], entropy[:, None],
                                  BONUS)  # fmt: skip
            dz = (dz + tl.where(column[None, :] == label[:, None], g[:, None], 0.0)) * inverse[:, None]
            dz = dz * logit_scale
            if SOFTCAP:  # z = softcap * tanh(u / softcap): dz / du = 1 - tanh ** 2
                dz = dz * (1.0 - (x / softcap) * (x / softcap))
            dz = tl.where(live[:, None], dz, 0.0)
            tl.debug_barrier()  # a narrower gradient may lie over logits of this row that another warp has yet to read
            place = rows[:, None] * out_stride + column[None, :]
            tl.store(out + place, dz.to(out.dtype.element_ty), mask=inside[:, None] & (column < columns)[None, :])


def _rows(logits: Tensor) -> Tensor:
    """logits [..., V] as a view [outer, inner, V]; only strides that allow no such view cost a copy."""
    columns = logits.shape[-1]
    if logits.ndim <= 2:
        return logits.reshape(1, -1, columns) if logits.ndim == 1 else logits[None]
    if logits.ndim == 3:
        return logits
    try:
        return logits.view(-1, logits.shape[-2], columns)
    except RuntimeError:
        return logits.reshape(1, -1, columns)


def _width(columns: int, splits: int, tile_columns: int) -> int:
    """Columns of a part: whole tiles."""
    return -(-columns // (splits * tile_columns)) * tile_columns


def rows_forward(logits: Tensor, labels: Tensor, temperature: Tensor | float, ignore_index: int, entropy: bool):
    """token_log_probs: (log-prob, entropy or an empty tensor, maximum, sum of exponentials), in the labels' shape."""
    shape, n, device = labels.shape, labels.numel(), logits.device
    rows, labels = _rows(logits), labels.reshape(-1).contiguous()
    columns = rows.shape[-1]
    make = lambda *size: torch.empty(size, dtype=torch.float32, device=device)  # noqa: E731
    log_probs, top, total = make(n), make(n), make(n)
    entropies = make(n if entropy else 0)
    degrees, number, per_token = split_degrees(temperature, log_probs)
    chip = chip_of(device)
    tile = row_tile(chip, columns)
    blocks = -(-n // tile.rows)
    splits = row_splits(chip, blocks, columns, tile)
    size = (n, columns, max(1, rows.shape[1]), *rows.stride(), number, ignore_index, splits)
    parts = (top, total, total) if splits == 1 else [make(n, splits) for _ in range(3)]
    launch(
        _forward, blocks * splits, device, rows, labels, degrees, log_probs, entropies, *parts, *size,
        _width(columns, splits, tile.columns), PER_TOKEN=per_token, ENTROPY=entropy, SPLIT=splits > 1, ROWS=tile.rows,
        COLUMNS=tile.columns, warps=tile.warps,
    )  # fmt: skip
    if splits > 1:
        combine(parts, labels, degrees, number, per_token, ignore_index, log_probs, entropies, top, total)
    return log_probs.view(shape), entropies.view(shape) if entropy else entropies, top.view(shape), total.view(shape)


def rows_backward(logits, labels, temperature, ignore_index, g, ge, entropy, top, total) -> Tensor:
    """The gradient of the logits, contiguous: dz = 1[y] g - p (g + ge (log p + entropy)), over the temperature."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    rows, labels, n = _rows(logits), labels.reshape(-1).contiguous(), labels.numel()
    columns = rows.shape[-1]
    g, ge, entropy = (None if t is None else t.reshape(-1).contiguous() for t in (g, ge, entropy))
    degrees, number, per_token = split_degrees(temperature, top)
    chip = chip_of(logits.device)
    tile = row_tile(chip, columns)
    blocks = -(-n // tile.rows)
    splits = row_splits(chip, blocks, columns, tile)
    launch(
        _backward, blocks * splits, logits.device, rows, labels, degrees, out, top if g is None else g,
        top if ge is None else ge, top if ge is None else entropy, top.reshape(-1), total.reshape(-1), n, columns,
        max(1, rows.shape[1]), *rows.stride(), number, ignore_index, splits, _width(columns, splits, tile.columns),
        PER_TOKEN=per_token, PLAIN=g is not None, ENTROPY=ge is not None, ROWS=tile.rows, COLUMNS=tile.columns,
        warps=tile.warps,
    )  # fmt: skip
    return out


def rows_ppo(
    logits, labels, temperature, mask, old, advantages, weights, ref, count, options: LossOptions, out,
    logit_scale: float = 1.0, softcap: float | None = None,
):  # fmt: skip
    """Log-prob -> clipped loss -> gradient of the logits: (loss terms, log-probs, entropies), each [n] fp32.

    logits [..., V]; the others [n] or the shape of the labels. `out` [n, V]: where the gradient goes, in its dtype, or
    None for none; it may be the logits themselves, or a view of a narrower dtype over their rows. With logit_scale and
    softcap the gradient is that of u, for logits = softcap * tanh(logit_scale * u / softcap).
    """
    n, device, rows = labels.numel(), logits.device, _rows(logits)
    columns = rows.shape[-1]
    labels, mask, old, advantages, weights, ref = (
        None if t is None else t.reshape(-1).contiguous() for t in (labels, mask, old, advantages, weights, ref)
    )
    loss, log_probs, entropy = (torch.empty(n, dtype=torch.float32, device=device) for _ in range(3))
    degrees, number, per_token = split_degrees(temperature, loss)
    tile = row_tile(chip_of(device), columns)
    launch(
        _ppo, -(-n // tile.rows), device, rows, labels, degrees, loss if out is None else out, mask, old, advantages,
        old if weights is None else weights, old if ref is None else ref, count, loss, log_probs, entropy, n, columns,
        max(1, rows.shape[1]), *rows.stride(), 0 if out is None else out.stride(0), number, options.clip_low,
        options.clip_high, options.dual_clip or 0.0, options.kl_coef, options.entropy_coef, float(logit_scale),
        float(softcap or 1.0), PER_TOKEN=per_token,
        WEIGHTS=weights is not None, DUAL=options.dual_clip is not None,
        KL=KL_ESTIMATORS.index(options.kl_estimator) if options.kl_coef != 0 else -1, BONUS=options.entropy_coef != 0,
        GRADIENT=out is not None, SOFTCAP=softcap is not None, ROWS=tile.rows, COLUMNS=tile.columns, warps=tile.warps,
    )  # fmt: skip
    return loss, log_probs, entropy
