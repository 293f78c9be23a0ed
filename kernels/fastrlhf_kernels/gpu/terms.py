"""Device functions that several kernels share: the online softmax, and the loss of one token with its derivative.

Arguments travel to kernels as named tuples where several belong together. A member that is None is a constant in
there: `if tokens.weights is not None` costs nothing, and no flag says it a second time.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..operands import LossOptions
from .launch import launch

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FLOOR = tl.constexpr(-1.0e4)  # stands in for -inf in differences: exp2() of it is 0, and 0 * FLOOR is 0, not NaN
NONE_IGNORED = -(1 << 62)  # no label: the rows that count were picked before
KL_ESTIMATORS = ("k1", "k2", "k3", "abs")  # the kernels take the index


class Temperature(NamedTuple):
    """A number, or a number a row: `each` [n] counts where it is given."""

    each: Tensor | None
    number: float

    @classmethod
    def of(cls, each: Tensor | None, number: float) -> Temperature:
        return cls(None if each is None else each.reshape(-1).contiguous(), float(number))


class Clip(NamedTuple):
    """The numbers of a policy loss; the KL estimator is a constant of the kernel."""

    low: float
    high: float
    dual: float | None
    kl_coef: float
    entropy_coef: float

    @classmethod
    def of(cls, options: LossOptions) -> Clip:
        dual = None if options.dual_clip is None else float(options.dual_clip)
        numbers = (options.clip_low, options.clip_high, options.kl_coef, options.entropy_coef)
        low, high, kl_coef, entropy_coef = map(float, numbers)
        return cls(low, high, dual, kl_coef, entropy_coef)


def kl_index(kl_coef: float, estimator: str) -> int:
    """Place in KL_ESTIMATORS; -1: no KL at all."""
    return KL_ESTIMATORS.index(estimator) if kl_coef != 0 else -1


@triton.jit
def inverse_temperature(temperature, rows, live):
    if temperature.each is not None:
        return 1.0 / tl.load(temperature.each + rows, mask=live, other=1.0).to(tl.float32)
    return tl.full(rows.shape, 1.0, tl.float32) / temperature.number


@triton.jit
def finite(top):
    """A running maximum that can be subtracted: 0 where nothing but -inf was seen."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def decayed(top, base, scale):
    """The exponent (base 2) by which sums relative to `top` shrink when they become relative to `base` >= top."""
    return tl.maximum((top - base) * scale, FLOOR)


@triton.jit
def absorb(x, scale, top, total, weighted, ENTROPY: tl.constexpr):
    """One block of logits x [R, G, K] into the running sums [R, G]: top = max x, total = sum e, weighted = sum e log2 e
    with e = 2 ** ((x - top) * scale), scale [R, 1]. K logits share a maximum and a decay; the lanes meet in `merge`.
    """
    new = tl.maximum(top, tl.max(x, 2))
    base = finite(new)
    distance = (x - base[:, :, None]) * scale[:, :, None]
    e = tl.exp2(distance)
    shift = decayed(top, base, scale)
    decay = tl.exp2(shift)
    if ENTROPY:
        weighted = decay * (weighted + total * shift) + tl.sum(tl.where(e > 0, e * distance, 0.0), 2)
    return new, decay * total + tl.sum(e, 2), weighted


@triton.jit
def merge(top, total, weighted, scale, ENTROPY: tl.constexpr):
    """The sums of the lanes [R, C] as sums of the rows [R]."""
    highest = tl.max(top, 1)
    base = finite(highest)
    shift = decayed(top, base[:, None], scale)
    decay = tl.exp2(shift)
    if ENTROPY:
        weighted = decay * (weighted + total * shift)
    return highest, tl.sum(decay * total, 1), tl.sum(weighted, 1)


@triton.jit
def log_prob_of(logit, top, total, scale):
    """log softmax in nats of a logit, from the sums of `absorb`."""
    return LN2 * ((logit - finite(top)) * scale - tl.log2(total))


@triton.jit
def entropy_of(total, weighted):
    """-sum p log p in nats, from the sums of `absorb`."""
    return LN2 * (tl.log2(total) - weighted / total)


@triton.jit
def softmax_gradient(x, base, scale, total, g, ge, entropy, ENTROPY: tl.constexpr):
    """-p * (g + ge * (log p + entropy)), the part of dz that every column has."""
    distance = (x - base) * scale
    p = tl.exp2(distance) / total
    if ENTROPY:
        log_p = LN2 * (tl.maximum(distance, FLOOR) - tl.log2(total))
        return -p * (g + ge * (log_p + entropy))
    return -p * g


@triton.jit
def expm1_minus(x):
    """exp(x) - 1 - x without cancellation near 0: the series to x ** 9 where |x| < 1/2."""
    series = 1.0 + x * (1.0 / 9)
    series = 1.0 + x * (1.0 / 8) * series
    series = 1.0 + x * (1.0 / 7) * series
    series = 1.0 + x * (1.0 / 6) * series
    series = 1.0 + x * (1.0 / 5) * series
    series = 1.0 + x * (1.0 / 4) * series
    series = 1.0 + x * (1.0 / 3) * series
    return tl.where(tl.abs(x) < 0.5, 0.5 * x * x * series, tl.exp(x) - 1.0 - x)


@triton.jit
def kl_of(d, ESTIMATOR: tl.constexpr):
    """The per-token estimate of KL(policy || reference) from d = log_probs - ref_log_probs, and its derivative."""
    if ESTIMATOR == 0:
        return d, d * 0.0 + 1.0
    elif ESTIMATOR == 1:
        return 0.5 * d * d, d
    elif ESTIMATOR == 2:
        kl = expm1_minus(-d)
        return kl, d - kl
    else:
        return tl.abs(d), tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))


@triton.jit
def clipped_terms(log_prob, old, advantage, clip):
    """(loss, derivative, clipped?, ratio, d) of the clipped policy loss of each token.

    Where the branches are equal the whole gradient goes to the unclipped one; NaN is passed on.
    """
    d = log_prob - old
    ratio = tl.exp(d)
    plain = -advantage * ratio
    low, high = 1.0 - clip.low, 1.0 + clip.high
    bounded = tl.where(ratio > high, high, tl.where(ratio < low, low, ratio))
    clipped = -advantage * bounded
    wins = plain >= clipped
    loss = tl.where(wins, plain, clipped)
    gradient = tl.where(wins, plain, clipped * 0.0)
    if clip.dual is not None:
        most = -advantage * clip.dual
        capped = (advantage < 0) & (loss > most)
        loss = tl.where(capped, most, loss)
        gradient = tl.where(capped, 0.0, gradient)
    return loss, gradient, clipped > plain, ratio, d


@triton.jit
def token_terms(log_prob, tokens, clip, place, live, KL: tl.constexpr):
    """(loss, derivative) of tokens at `place`: the clipped loss, its weights and the KL in the loss."""
    old = tl.load(tokens.old_log_probs + place, mask=live, other=0.0).to(tl.float32)
    advantage = tl.load(tokens.advantages + place, mask=live, other=0.0).to(tl.float32)
    loss, g, _, _, _ = clipped_terms(log_prob, old, advantage, clip)
    if tokens.weights is not None:
        weight = tl.load(tokens.weights + place, mask=live, other=0.0).to(tl.float32)
        loss, g = loss * weight, g * weight
    if KL >= 0:
        ref = tl.load(tokens.ref_log_probs + place, mask=live, other=0.0).to(tl.float32)
        kl, slope = kl_of(log_prob - ref, KL)
        loss, g = loss + clip.kl_coef * kl, g + clip.kl_coef * slope
    return loss, g


class Incoming(NamedTuple):
    """The gradients of a row's results [n], and what the forward kept of it."""

    log_prob: Tensor | None
    entropy: Tensor | None
    entropies: Tensor | None
    top: Tensor
    total: Tensor


@triton.jit
def load_incoming(incoming, rows, live, ROWS: tl.constexpr):
    """(g, ge, entropy, base, total) of rows; zeros for a gradient that is not there."""
    g, ge, entropy = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    if incoming.log_prob is not None:
        g = tl.load(incoming.log_prob + rows, mask=live, other=0.0).to(tl.float32)
    if incoming.entropy is not None:
        ge = tl.load(incoming.entropy + rows, mask=live, other=0.0).to(tl.float32)
        entropy = tl.load(incoming.entropies + rows, mask=live, other=0.0)
    base = finite(tl.load(incoming.top + rows, mask=live, other=0.0))
    return g, ge, entropy, base, tl.load(incoming.total + rows, mask=live, other=1.0)


class Sums(NamedTuple):
    """The running sums of the rows: largest logit, sum of e, sum of e * log2 e; [n], or [n, parts] of each row."""

    top: Tensor
    total: Tensor
    weighted: Tensor


class Results(NamedTuple):
    """What a sweep leaves of each row [n]: log_probs holds the label's logit until the sums are there."""

    log_probs: Tensor
    entropies: Tensor | None
    top: Tensor
    total: Tensor


@triton.jit
def store_results(results, rows, live, inside, log_prob, top, total, weighted):
    """Rows that do not count get 0."""
    tl.store(results.log_probs + rows, tl.where(live, log_prob, 0.0), mask=inside)
    tl.store(results.top + rows, tl.where(live, top, 0.0), mask=inside)
    tl.store(results.total + rows, tl.where(live, total, 0.0), mask=inside)
    if results.entropies is not None:
        tl.store(results.entropies + rows, tl.where(live, entropy_of(total, weighted), 0.0), mask=inside)


@triton.jit
def store_sums(sums, place, live, top, total, weighted):
    tl.store(sums.top + place, top, mask=live)
    tl.store(sums.total + place, total, mask=live)
    tl.store(sums.weighted + place, weighted, mask=live)


@triton.jit(do_not_specialize=["n", "splits"])
def _combine(sums, results, labels, temperature, n, splits, ignore_index, ROWS: tl.constexpr, SPLITS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    live = inside & (tl.load(labels + rows, mask=inside, other=0).to(tl.int64) != ignore_index)
    scale = inverse_temperature(temperature, rows, live) * LOG2E
    part = tl.arange(0, SPLITS)
    place = rows[:, None] * splits + part[None, :]
    valid = live[:, None] & (part < splits)[None, :]
    top = tl.load(sums.top + place, mask=valid, other=float("-inf"))
    total = tl.load(sums.total + place, mask=valid, other=0.0)
    weighted = tl.load(sums.weighted + place, mask=valid, other=0.0)
    top, total, weighted = merge(top, total, weighted, scale[:, None], results.entropies is not None)
    log_prob = log_prob_of(tl.load(results.log_probs + rows, mask=live, other=0.0), top, total, scale)
    tl.debug_barrier()  # of so few rows each is read by several threads, and written over by one of them
    store_results(results, rows, live, inside, log_prob, top, total, weighted)


def combine(sums: Sums, results: Results, labels: Tensor, temperature: Temperature, ignore_index: int) -> None:
    """Second stage of a sweep over a split vocabulary: the sums of the parts become results, in a fixed order."""
    n, splits = sums.top.shape
    width = max(128, triton.next_power_of_2(splits))  # no kernel of its own for every number of parts
    rows = max(1, min(16, 4096 // width))
    arguments = (sums, results, labels, temperature, n, splits, ignore_index)
    launch(_combine, -(-n // rows), labels.device, *arguments, ROWS=rows, SPLITS=width, warps=4)
