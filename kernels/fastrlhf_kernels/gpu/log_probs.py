"""Logits to log-probs and entropies, their gradient, and the PPO loss from logits: each logit is read once or twice.

A program sweeps some rows; few rows are split into parts of the vocabulary, whose sums a second kernel combines.
Kept for the backward are the maximum of the raw logits and the sum of exponentials: differences of logits are
taken before they are divided by the temperature, so that a large common offset costs no precision.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operands import LossOptions, Rows, Tokens
from .labels import LabelArgs, add_labels, several_log_probs
from .launch import launch
from .terms import (
    LOG2E,
    NONE_IGNORED,
    Clip,
    Incoming,
    Results,
    Sums,
    Temperature,
    absorb,
    combine,
    entropy_of,
    finite,
    inverse_temperature,
    kl_index,
    load_incoming,
    log_prob_of,
    merge,
    softmax_gradient,
    store_results,
    store_sums,
    token_terms,
)
from .tuning import chip_of, row_splits, row_tile

NO_LABEL = -1  # no column of any vocabulary


class RowArgs(NamedTuple):
    """Logits [outer, inner, V] with their strides, and labels and temperature of each row."""

    logits: Tensor
    labels: Tensor
    temperature: Temperature
    columns: int
    stride_outer: int
    stride_inner: int
    stride: int


@triton.jit
def row_starts(source, rows, inner):
    """Where rows of logits begin."""
    return source.logits + ((rows // inner) * source.stride_outer + (rows % inner) * source.stride_inner)


@triton.jit
def load_block(start, stride, column, valid, other):
    """A block of logits in fp32."""
    return tl.load(start[:, None] + column.to(tl.int64)[None, :] * stride, mask=valid, other=other).to(tl.float32)


@triton.jit
def sweep(start, stride, live, first, last, scale, ENTROPY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns first..last of some rows -> (maximum, sum, weighted sum), see `absorb`.

    The logits that a thread loads at once share a maximum: one exponential a logit, not two, and fewer registers.
    """
    GROUP: tl.constexpr = 128 // start.dtype.scalar.element_ty.primitive_bitwidth
    GROUPS: tl.constexpr = COLUMNS // GROUP
    top = tl.full((ROWS, GROUPS), float("-inf"), tl.float32)
    total = tl.zeros((ROWS, GROUPS), tl.float32)
    weighted = tl.zeros((ROWS, GROUPS), tl.float32)
    for low in range(first, last, COLUMNS):
        column = low + tl.arange(0, COLUMNS)
        valid = live[:, None] & (column < last)[None, :]
        x = tl.reshape(load_block(start, stride, column, valid, float("-inf")), (ROWS, GROUPS, GROUP))
        top, total, weighted = absorb(x, scale[:, None], top, total, weighted, ENTROPY)
    return merge(top, total, weighted, scale[:, None], ENTROPY)


@triton.jit
def logit_at(start, source, label, live):
    """The logits of the labels; NaN for a label outside [0, V)."""
    inside = live & (label >= 0) & (label < source.columns)
    return tl.load(start + label * source.stride, mask=inside, other=float("nan")).to(tl.float32)


@triton.jit
def dz_block(x, column, label, base, scale, total, g, ge, entropy, inverse, ENTROPY: tl.constexpr):
    """The gradient of a block of logits."""
    total, g, ge, entropy = total[:, None], g[:, None], ge[:, None], entropy[:, None]
    dz = softmax_gradient(x, base[:, None], scale[:, None], total, g, ge, entropy, ENTROPY)
    return (dz + tl.where(column[None, :] == label[:, None], g, 0.0)) * inverse[:, None]


@triton.jit(do_not_specialize=["n", "inner", "splits"])
def _forward(
    source,
    results,
    sums,
    n,
    inner,
    ignore_index,
    splits,
    width,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    part = program % splits
    rows = (program // splits) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    label = tl.load(source.labels + rows, mask=inside, other=0).to(tl.int64)
    live = inside & (label != ignore_index)
    scale = inverse_temperature(source.temperature, rows, live) * LOG2E
    start = row_starts(source, rows, inner)
    first = part * width
    last = tl.minimum(first + width, source.columns)
    ENTROPY: tl.constexpr = results.entropies is not None
    top, total, weighted = sweep(start, source.stride, live, first, last, scale, ENTROPY, ROWS, COLUMNS)
    target = logit_at(start, source, label, live)
    if SPLIT:
        store_sums(sums, rows * splits + part, live, top, total, weighted)
        tl.store(results.log_probs + rows, target, mask=live & (rows * 0 + part == 0))  # for `combine`
    else:
        log_prob = log_prob_of(target, top, total, scale)
        store_results(results, rows, live, inside, log_prob, top, total, weighted)


@triton.jit(do_not_specialize=["n", "inner", "splits"])
def _backward(source, out, incoming, n, inner, ignore_index, splits, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    part = program % splits
    rows = (program // splits) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    label = tl.load(source.labels + rows, mask=inside, other=0).to(tl.int64)
    live = inside & (label != ignore_index)
    inverse = inverse_temperature(source.temperature, rows, live)
    start = row_starts(source, rows, inner)
    g, ge, entropy, base, total = load_incoming(incoming, rows, live, ROWS)
    ENTROPY: tl.constexpr = incoming.entropy is not None
    for low in range(part * width, tl.minimum(part * width + width, source.columns), COLUMNS):
        column = low + tl.arange(0, COLUMNS)
        there = (column < source.columns)[None, :]
        x = load_block(start, source.stride, column, live[:, None] & there, 0.0)
        dz = dz_block(x, column, label, base, inverse * LOG2E, total, g, ge, entropy, inverse, ENTROPY)
        dz = tl.where(live[:, None], dz, 0.0)
        place = rows[:, None] * source.columns + column[None, :]
        tl.store(out + place, dz.to(out.dtype.element_ty), mask=inside[:, None] & there)


class Terms(NamedTuple):
    """What a fused loss leaves of each row [n]."""

    losses: Tensor
    log_probs: Tensor
    entropies: Tensor


@triton.jit
def store_terms(terms, rows, live, inside, loss, log_prob, entropy):
    """Rows that do not count get 0."""
    tl.store(terms.losses + rows, tl.where(live, loss, 0.0), mask=inside)
    tl.store(terms.log_probs + rows, tl.where(live, log_prob, 0.0), mask=inside)
    tl.store(terms.entropies + rows, tl.where(live, entropy, 0.0), mask=inside)


@triton.jit(do_not_specialize=["n", "inner"])
def _ppo(
    source,
    tokens,
    clip,
    count,
    out,
    terms,
    n,
    inner,
    out_stride,
    logit_scale,
    softcap,
    KL: tl.constexpr,
    BONUS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    live = inside & (tl.load(tokens.mask + rows, mask=inside, other=0) != 0)
    label = tl.load(source.labels + rows, mask=live, other=0).to(tl.int64)
    inverse = inverse_temperature(source.temperature, rows, live)
    scale = inverse * LOG2E
    start = row_starts(source, rows, inner)
    top, total, weighted = sweep(start, source.stride, live, 0, source.columns, scale, True, ROWS, COLUMNS)
    base = finite(top)
    log_prob = log_prob_of(logit_at(start, source, label, live), top, total, scale)
    entropy = entropy_of(total, weighted)
    loss, g = token_terms(log_prob, tokens, clip, rows, live, KL)
    store_terms(terms, rows, live, inside, loss, log_prob, entropy)
    if out is not None:
        divisor = tl.load(count)
        g = g / divisor
        ge = tl.zeros((ROWS,), tl.float32) - clip.entropy_coef / divisor
        for low in range(0, source.columns, COLUMNS):
            column = low + tl.arange(0, COLUMNS)
            there = (column < source.columns)[None, :]
            x = load_block(start, source.stride, column, live[:, None] & there, 0.0)
            dz = dz_block(x, column, label, base, scale, total, g, ge, entropy, inverse, BONUS) * logit_scale
            if softcap is not None:  # z = softcap * tanh(u / softcap): dz / du = 1 - tanh ** 2
                dz = dz * (1.0 - (x / softcap) * (x / softcap))
            dz = tl.where(live[:, None], dz, 0.0)
            tl.debug_barrier()  # a narrower gradient may lie over logits of this row that another warp has yet to read
            place = rows[:, None] * out_stride + column[None, :]
            tl.store(out + place, dz.to(out.dtype.element_ty), mask=inside[:, None] & there)


def _row_args(rows: Rows) -> tuple[RowArgs, int]:
    """The kernels' view of the rows, and their number within an outer index.

    Only strides that allow no view [outer, inner, V] cost a copy.
    """
    logits, columns = rows.logits, rows.logits.shape[-1]
    if logits.ndim > 3:
        try:
            logits = logits.view(-1, logits.shape[-2], columns)
        except RuntimeError:
            logits = logits.reshape(-1, columns)
    if logits.ndim < 3:
        logits = logits.reshape(1, -1, columns) if logits.ndim == 1 else logits[None]
    temperature = Temperature.of(rows.temperatures, rows.temperature)
    labels = rows.labels.reshape(-1).contiguous()
    outer, *strides = logits.stride()
    outer = 0 if len(logits) == 1 else outer  # nobody's: no kernel of its own for every number of rows
    return RowArgs(logits, labels, temperature, columns, outer, *strides), max(1, logits.shape[1])


def _grid(n: int, columns: int, device: torch.device):
    """(tile, programs, parts of the vocabulary, columns of a part in whole tiles)."""
    chip = chip_of(device)
    tile = row_tile(chip, columns)
    blocks = -(-n // tile.rows)
    splits = row_splits(chip, blocks, columns, tile)
    return tile, blocks * splits, splits, -(-columns // (splits * tile.columns)) * tile.columns


def rows_forward(rows: Rows, ignore_index: int, entropy: bool):
    """token_log_probs: (log-prob, entropy or an empty tensor, maximum, sum of exponentials), in the labels' shape."""
    shape, n, device = rows.labels.shape, rows.labels.numel(), rows.logits.device
    source, inner = _row_args(rows)
    make = partial(torch.empty, dtype=torch.float32, device=device)
    results = Results(make(n), make(n) if entropy else None, make(n), make(n))
    tile, programs, splits, width = _grid(n, source.columns, device)
    sums = Sums(*(make(n, splits) for _ in range(3))) if splits > 1 else None
    constants = {"SPLIT": splits > 1, "ROWS": tile.rows, "COLUMNS": tile.columns}
    arguments = (source, results, sums, n, inner, ignore_index, splits, width)
    launch(_forward, programs, device, *arguments, **constants, warps=tile.warps)
    if splits > 1:
        combine(sums, results, source.labels, source.temperature, ignore_index)
    return tuple(make(0) if t is None else t.view(shape) for t in results)


def rows_backward(rows: Rows, ignore_index: int, g, ge, entropy: Tensor, top: Tensor, total: Tensor) -> Tensor:
    """The gradient of the logits, contiguous: dz = 1[y] g - p (g + ge (log p + entropy)), over the temperature."""
    out = torch.empty(rows.logits.shape, dtype=rows.logits.dtype, device=rows.logits.device)
    source, inner = _row_args(rows)
    kept = (g, ge, None if ge is None else entropy, top, total)
    incoming = Incoming(*(None if t is None else t.reshape(-1).contiguous() for t in kept))
    n = rows.labels.numel()
    tile, programs, splits, width = _grid(n, source.columns, out.device)
    constants = {"ROWS": tile.rows, "COLUMNS": tile.columns}
    arguments = (source, out, incoming, n, inner, ignore_index, splits, width)
    launch(_backward, programs, out.device, *arguments, **constants, warps=tile.warps)
    return out


def several_forward(rows: Rows, ignore_index: int, entropy: bool):
    """`rows_forward` with labels [..., K]."""
    counted = rows.labels != ignore_index
    one = torch.where(counted.any(-1), 0, NONE_IGNORED)
    _, entropies, top, total = rows_forward(rows._replace(labels=one), NONE_IGNORED, entropy)
    each = rows.temperature if rows.temperatures is None else rows.temperatures[..., None].float()
    log_probs = several_log_probs(rows.logits, torch.where(counted, rows.labels, NO_LABEL), each, top, total)
    return torch.where(counted, log_probs, 0), entropies, top, total


def several_backward(
    rows: Rows, ignore_index: int, g: Tensor | None, ge: Tensor | None, log_probs: Tensor, entropy, top, total
) -> Tensor:
    """`rows_backward` with labels, g and log_probs [..., K]."""
    counted = rows.labels != ignore_index
    g = torch.zeros_like(log_probs) if g is None else torch.where(counted, g, 0)
    one = torch.where(counted.any(-1), NO_LABEL, NONE_IGNORED)
    out = rows_backward(rows._replace(labels=one), NONE_IGNORED, g.sum(-1), ge, entropy, top, total)
    count, vocabulary = rows.labels.shape[-1], rows.logits.shape[-1]
    kept = (g.sum(-1), ge, None if ge is None else entropy, top, total)
    incoming = Incoming(*(None if t is None else t.reshape(-1).contiguous() for t in kept))
    labels = torch.where(counted, rows.labels, NO_LABEL).reshape(-1, count)
    source = LabelArgs(labels, 1.0, None, Temperature.of(rows.temperatures, rows.temperature))
    flat = (log_probs.reshape(-1, count).contiguous(), g.reshape(-1, count).float().contiguous())
    gain = torch.ones((), dtype=torch.float32, device=out.device)
    add_labels(source, *flat, out.view(-1, vocabulary), gain, incoming, 0, vocabulary)
    return out


def rows_ppo(
    rows: Rows, tokens: Tokens, count: Tensor, options: LossOptions, out: Tensor | None, logit_scale=1.0, softcap=None
) -> Terms:
    """Log-prob -> clipped loss -> gradient of the logits: (loss terms, log-probs, entropies), each [n] fp32.

    `out` [n, V]: where the gradient goes, in its dtype, or None for none; it may be the logits themselves, or a view of
    a narrower dtype over their rows. With logit_scale and softcap the gradient is that of u, for
    logits = softcap * tanh(logit_scale * u / softcap).
    """
    n, device = rows.labels.numel(), rows.logits.device
    source, inner = _row_args(rows)
    terms = Terms(*(torch.empty(n, dtype=torch.float32, device=device) for _ in range(3)))
    tile = row_tile(chip_of(device), source.columns)
    tokens = tokens.map(lambda t: t.reshape(-1).contiguous())
    out_stride = 0 if out is None else out.stride(0)
    softcap = None if softcap is None else float(softcap)
    arguments = (source, tokens, Clip.of(options), count, out, terms, n, inner, out_stride, float(logit_scale), softcap)
    constants = {"KL": kl_index(options.kl_coef, options.kl_estimator), "BONUS": options.entropy_coef != 0}
    constants |= {"ROWS": tile.rows, "COLUMNS": tile.columns}
    launch(_ppo, -(-n // tile.rows), device, *arguments, **constants, warps=tile.warps)
    return terms
