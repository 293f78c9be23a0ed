"""The PPO loss from hidden states without a softmax pass: the first product's epilogue stores exponentials.

PPO knows where a token's log-sum-exp was when it was sampled: at its logit minus its old log-prob. With that as the
exponent's offset, E = exp(z - offset) in bf16 (which has the range of fp32) and its exact fp32 sum s come out of the
first product; s is the inverse of the ratio. The gradient of the logits is a factor a row times (E - s at the label),
so dx and dW are plain products with E: no pass over [tokens, vocabulary] reads logits again, and no fp32 logits are
stored. A row whose policy moved by more than 2 ** 60 is computed again with its own maximum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .losses import LossOptions
from .triton_combine import split_degrees
from .triton_head import Head, add_product, head_logits, product
from .triton_launch import launch
from .triton_terms import KL_ESTIMATORS, LN2, LOG2E, clipped_terms, finite, inverse_temperature, kl_of

FURTHEST = tl.constexpr(1.152921504606847e18)  # 2 ** 60: sums up to it, and down to its inverse, are taken as they are


@triton.jit
def _keep(z, slope, low, last, start, label, live, inside, scale, offset, total, weighted, target,
          COLUMNS: tl.constexpr):  # fmt: skip
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
    x, w, bias, v, lora_b, labels, temperatures, mask, offsets, targets, totals, weighteds, out,
    n, vocabulary, width, rank, x_stride, w_stride, temperature, logit_scale, softcap, blocks, splits, part_columns,
    PER_TOKEN: tl.constexpr, DESCRIPTORS: tl.constexpr, HALVES: tl.constexpr, BIAS: tl.constexpr, LORA: tl.constexpr,
    SOFTCAP: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, LORA_PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    part = program // blocks
    first_row = (program % blocks) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    inside = rows < n
    live = inside & (tl.load(mask + rows, mask=inside, other=0) != 0)
    label = tl.load(labels + rows, mask=live, other=-1).to(tl.int64)
    label = tl.where((label >= 0) & (label < vocabulary), label, -1).to(tl.int32)
    scale = inverse_temperature(temperatures, temperature, rows, live, PER_TOKEN) * LOG2E
    offset = tl.load(offsets + rows, mask=live, other=0.0)
    total = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS,), tl.float32)
    target = tl.zeros((ROWS,), tl.float32)
    first = part.to(tl.int32) * part_columns
    last = tl.minimum(first + part_columns, vocabulary)
    for low in range(first, last, COLUMNS):
        columns = low + tl.arange(0, COLUMNS).to(tl.int64)
        z, slope = head_logits(x, w, bias, v, lora_b, rows, columns, inside, columns < last, x_stride, w_stride, width,
                               rank, logit_scale, softcap, first_row.to(tl.int32), low, DESCRIPTORS, BIAS, LORA,
                               SOFTCAP, WIDE, PRECISION, LORA_PRECISION, ROWS, COLUMNS, DEPTH)  # fmt: skip
        start = out + rows * vocabulary
        if HALVES:  # one after the other: registers
            left, right = tl.split(tl.permute(tl.reshape(z, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
            left_slope, right_slope = tl.split(tl.permute(tl.reshape(slope, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
            total, weighted, target = _keep(left, left_slope, low, last, start, label, live, inside, scale, offset,
                                            total, weighted, target, COLUMNS // 2)  # fmt: skip
            low += COLUMNS // 2
            total, weighted, target = _keep(right, right_slope, low, last, start, label, live, inside, scale, offset,
                                            total, weighted, target, COLUMNS // 2)  # fmt: skip
        else:
            total, weighted, target = _keep(
                z, slope, low, last, start, label, live, inside, scale, offset, total, weighted, target, COLUMNS
            )
    place = rows * splits + part
    tl.store(totals + place, total, mask=inside)
    tl.store(weighteds + place, weighted, mask=inside)
    tl.store(targets + rows, target, mask=live & (label >= first) & (label < last))


@triton.jit
def _row_logits(x, w, bias, row, low, x_stride, w_stride, vocabulary, width, logit_scale, softcap,
                BIAS: tl.constexpr, SOFTCAP: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):  # fmt: skip
    """z and dz / d accumulator of one row and COLUMNS columns, in fp32 by plain sums."""
    column = low + tl.arange(0, COLUMNS).to(tl.int64)
    inside = column < vocabulary
    depth = tl.arange(0, DEPTH)
    z = tl.zeros((COLUMNS,), tl.float32)
    for step in range(0, width, DEPTH):
        here = step + depth < width
        a = tl.load(x + row * x_stride + step + depth, mask=here, other=0.0).to(tl.float32)
        b = tl.load(w + column[:, None] * w_stride + (step + depth)[None, :], mask=inside[:, None] & here[None, :],
                    other=0.0).to(tl.float32)  # fmt: skip
        z += tl.sum(a[None, :] * b, 1)
    if BIAS:
        z += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    z = z * logit_scale
    slope = tl.zeros((COLUMNS,), tl.float32) + logit_scale
    if SOFTCAP:
        bent = 1.0 - 2.0 / (tl.exp(z * (2.0 / softcap)) + 1.0)
        z = bent * softcap
        slope = slope * (1.0 - bent * bent)
    return tl.where(inside, z, float("-inf")), slope


@triton.jit
def _exponential_terms(
    x, w, bias, labels, temperatures, mask, offsets, targets, totals, weighteds, out, olds, advantages, weights, refs,
    count, losses, log_probs, entropies, factors,
    vocabulary, width, x_stride, w_stride, temperature, logit_scale, softcap, splits, low_clip, high_clip, dual_clip,
    kl_coef, PER_TOKEN: tl.constexpr, WEIGHTS: tl.constexpr, DUAL: tl.constexpr, KL: tl.constexpr, BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    live = tl.load(mask + row) != 0
    inverse = inverse_temperature(temperatures, temperature, row + tl.zeros((1,), tl.int64), live, PER_TOKEN)
    inverse = tl.sum(inverse, 0)
    scale = inverse * LOG2E
    part = tl.arange(0, SPLITS)
    total = tl.sum(tl.load(totals + row * splits + part, mask=part < splits, other=0.0), 0)
    weighted = tl.sum(tl.load(weighteds + row * splits + part, mask=part < splits, other=0.0), 0)
    offset = tl.load(offsets + row)
    good = (total > 1 / FURTHEST) & (total < FURTHEST)
    if live & (good == 0):
        top = tl.full((COLUMNS,), float("-inf"), tl.float32)
        for low in range(0, vocabulary, COLUMNS):
            z, _ = _row_logits(x, w, bias, row, low, x_stride, w_stride, vocabulary, width, logit_scale, softcap,
                               BIAS, SOFTCAP, COLUMNS, DEPTH)  # fmt: skip
            top = tl.where((z > top) | (z != z), z, top)
        offset = finite(tl.max(top, 0)) * scale
        sums = tl.zeros((COLUMNS,), tl.float32)
        moments = tl.zeros((COLUMNS,), tl.float32)
        for low in range(0, vocabulary, COLUMNS):
            z, slope = _row_logits(x, w, bias, row, low, x_stride, w_stride, vocabulary, width, logit_scale, softcap,
                                   BIAS, SOFTCAP, COLUMNS, DEPTH)  # fmt: skip
            distance = z * scale - offset
            e = tl.exp2(distance)
            sums += e
            moments += tl.where(e > 0, e * distance, 0.0)
            column = low + tl.arange(0, COLUMNS)
            tl.store(out + row * vocabulary + column, tl.where(e > 0, e * slope, e).to(out.dtype.element_ty),
                     mask=column < vocabulary)  # fmt: skip
        total = tl.sum(sums, 0)
        weighted = tl.sum(moments, 0)
        tl.debug_barrier()  # the label's entry is written once more, by another thread
    z = tl.load(targets + row)
    log_prob = LN2 * (z * scale - offset - tl.log2(total))
    entropy = LN2 * (tl.log2(total) - weighted / total)
    old = tl.load(olds + row).to(tl.float32)
    advantage = tl.load(advantages + row).to(tl.float32)
    loss, g, _, _, _ = clipped_terms(log_prob, old, advantage, low_clip, high_clip, dual_clip, DUAL)
    if WEIGHTS:
        weight = tl.load(weights + row).to(tl.float32)
        loss, g = loss * weight, g * weight
    if KL >= 0:
        kl, kl_slope = kl_of(log_prob - tl.load(refs + row).to(tl.float32), KL)
        loss, g = loss + kl_coef * kl, g + kl_coef * kl_slope
    tl.store(losses + row, tl.where(live, loss, 0.0))
    tl.store(log_probs + row, tl.where(live, log_prob, 0.0))
    tl.store(entropies + row, tl.where(live, entropy, 0.0))
    tl.store(factors + row, tl.where(live, -g / tl.load(count) / total * inverse, 0.0))
    slope = 1.0 * logit_scale
    if SOFTCAP:
        slope = slope * (1.0 - (z / softcap) * (z / softcap))
    label = tl.load(labels + row).to(tl.int64)
    entry = (tl.exp2(z * scale - offset) - total) * slope
    tl.store(out + row * vocabulary + label, entry.to(out.dtype.element_ty),
             mask=live & (label >= 0) & (label < vocabulary))  # fmt: skip


def possible(head: Head, options: LossOptions) -> bool:
    """bf16 operands (fp16 has not the range), no adapter on the head, no entropy bonus (it needs log E)."""
    return head.half and head.x.dtype == torch.bfloat16 and head.v is None and options.entropy_coef == 0


def _offsets(head: Head, rows: slice, labels: Tensor, old: Tensor, degrees: Tensor | float) -> Tensor:
    """Where each token's log-sum-exp was, as a power of two: its logit minus its old log-prob."""
    y = labels.clamp(0, len(head.weight) - 1)
    z = (head.x[rows].float() * head.weight[y].float()).sum(1)
    z = z if head.bias is None else z + head.bias[y].float()
    z = z * head.logit_scale
    z = z if head.softcap is None else torch.tanh(z / head.softcap) * head.softcap
    return (z / degrees - old) * LOG2E.value


def exponential_ppo(
    head: Head, labels, mask, old, advantages, weights, ref, count: Tensor, options: LossOptions, need: list[bool],
    rows: int,
):  # fmt: skip
    """`triton_linear_ppo_loss.linear_ppo`, `rows` tokens at a time. Memory: 2 bytes a token of a chunk and column."""
    n, vocabulary, width, _, x_stride, w_stride = head.sizes()
    device, chip = head.x.device, tuning.chip_of(head.x.device)
    make = lambda *shape: torch.zeros(shape, dtype=torch.float32, device=device)  # noqa: E731
    loss, log_probs, entropy = make(n), make(n), make(n)
    dx = make(n, width) if need[0] else None
    dw = make(vocabulary, width) if need[1] else None
    dbias = make(vocabulary) if need[2] else None
    described = chip.descriptors and head.aligned()
    wide = described and head.softcap is None  # storing beside summing costs registers
    tile = tuning.product_tile(chip, rows, True, adapter=not wide, backward=True, described=described)
    buffer = torch.empty(min(n, rows), vocabulary, dtype=torch.bfloat16, device=device)
    for first in range(0, n, rows):
        cut = slice(first, min(n, first + rows))
        part, y = head.rows(cut), labels[cut]
        size = len(y)
        degrees, number, per_token = split_degrees(part.temperature, loss)
        offsets = _offsets(head, cut, y, old[cut], degrees if per_token else number)
        blocks = -(-size // tile.rows)
        splits, columns = tuning.product_splits(chip, blocks, vocabulary, tile)
        targets, sums = torch.full((size,), torch.nan, device=device), make(2, size, splits)
        factors, e = make(size), buffer[:size]
        flags, common = part.flags(), (y, degrees, mask[cut], offsets, targets, *sums, e)
        launch(
            _exponentials, blocks * splits, device, *part.operands(tile if described else None), *common,
            *part.sizes(), *part.scalars(number), blocks, splits, columns, PER_TOKEN=per_token, DESCRIPTORS=described,
            HALVES=tile.columns > 64 and described, **flags, **tile.constants(), warps=tile.warps, stages=tile.stages,
        )  # fmt: skip
        launch(
            _exponential_terms, size, device, *part.operands()[:3], *common,
            *(old[cut] if t is None else t[cut] for t in (old, advantages, weights, ref)), count, loss[cut],
            log_probs[cut], entropy[cut], factors, vocabulary, width, x_stride, w_stride, *part.scalars(number), splits,
            options.clip_low, options.clip_high, options.dual_clip or 0.0, options.kl_coef, PER_TOKEN=per_token,
            WEIGHTS=weights is not None, DUAL=options.dual_clip is not None,
            KL=KL_ESTIMATORS.index(options.kl_estimator) if options.kl_coef != 0 else -1, BIAS=flags["BIAS"],
            SOFTCAP=flags["SOFTCAP"], SPLITS=triton.next_power_of_2(splits), COLUMNS=64, DEPTH=32, warps=8,
        )  # fmt: skip
        if dx is not None:
            torch.mul(product(e, head.weight), factors[:, None], out=dx[cut])
        if dw is not None:
            add_product(dw, e.T, (part.x.float() * factors[:, None]).to(e.dtype))
        if dbias is not None:
            dbias += product(e.T, factors[:, None].to(e.dtype))[:, 0]
    return loss, log_probs, entropy, (dx, dw, dbias, None, None)
