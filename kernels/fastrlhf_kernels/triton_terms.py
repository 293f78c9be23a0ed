"""Device functions that several kernels share: the online softmax, and the loss of one token with its derivative."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FLOOR = tl.constexpr(-1.0e4)  # stands in for -inf in differences: exp2() of it is 0, and 0 * FLOOR is 0, not NaN
KL_ESTIMATORS = ("k1", "k2", "k3", "abs")  # the kernels take the index


@triton.jit
def inverse_temperature(temperatures, temperature, rows, live, PER_TOKEN: tl.constexpr):
    if PER_TOKEN:
        return 1.0 / tl.load(temperatures + rows, mask=live, other=1.0).to(tl.float32)
    return tl.full(rows.shape, 1.0, tl.float32) / temperature


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
    """One block of logits into the running sums: top = max x, total = sum e, weighted = sum e * log2 e
    with e = 2 ** ((x - top) * scale). Element by element: the lanes meet once, in `merge`.
    """
    new = tl.maximum(top, x)
    base = finite(new)
    distance = (x - base) * scale
    e = tl.exp2(distance)
    shift = decayed(top, base, scale)
    decay = tl.exp2(shift)
    if ENTROPY:
        weighted = decay * (weighted + total * shift) + tl.where(e > 0, e * distance, 0.0)
    return new, decay * total + e, weighted


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
def clipped_terms(log_prob, old, advantage, low, high, dual, DUAL: tl.constexpr):
    """(loss, derivative, clipped?, ratio, d) of the clipped policy loss of each token.

    Where the branches are equal the whole gradient goes to the unclipped one; NaN is passed on.
    """
    d = log_prob - old
    ratio = tl.exp(d)
    plain = -advantage * ratio
    bounded = tl.where(ratio > 1.0 + high, 1.0 + high, tl.where(ratio < 1.0 - low, 1.0 - low, ratio))
    clipped = -advantage * bounded
    wins = plain >= clipped
    loss = tl.where(wins, plain, clipped)
    gradient = tl.where(wins, plain, clipped * 0.0)
    if DUAL:
        most = -advantage * dual
        capped = (advantage < 0) & (loss > most)
        loss = tl.where(capped, most, loss)
        gradient = tl.where(capped, 0.0, gradient)
    return loss, gradient, clipped > plain, ratio, d
