"""One token a row in Triton: block sums, top-k and top-p thresholds without a sort, inverse CDF from one uniform.

1. `_sums`: maximum and sum of exponentials of every block of the vocabulary, one read of the logits.
2. `_narrow`, only with top-k or top-p: 8 thresholds at a time on the logits' bits, read as ordered integers, down to
   the last bit: at most 11 reads, which stay in the L2 cache.
3. `_draw`: the block in which the uniform number falls, and the token in it. Sums over blocks run in float64.
The random words are those of `reference.philox_4x32`, and no kernel waits for the host.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .launch import launch
from .terms import FLOOR, LN2, LOG2E, finite

PASSES = 11  # of 3 bits: 2 ** 32 keys become one
LOWEST = -(2**31)  # the key below all others: nothing is filtered


class Source(NamedTuple):
    """Logits [B, V] with their row stride; temperature: 1 where the choice is greedy."""

    logits: Tensor
    stride: int
    vocabulary: int
    temperature: float


class Blocks(NamedTuple):
    """The maximum and the sum of exponentials of every block of a row, [B, blocks]."""

    tops: Tensor
    totals: Tensor


class Search(NamedTuple):
    """Where the search for a threshold stands: bounds [B, 2], the measure that is wanted [B], and the sums at or above
    8 thresholds of each part of a row, [B, parts, 8].
    """

    bounds: Tensor
    wants: Tensor
    sums: Tensor


@triton.jit
def ordered(x):
    """The bits of a float32 as an int32 that sorts as the numbers do; a NaN lies beyond the infinity of its sign."""
    x = tl.where(x == 0.0, 0.0, x)  # -0 is 0
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def uniform(seed, stream, offset):
    """53 random bits of (seed, stream, offset) as a float64 in [0, 1): words 0 and 1 of Philox4x32-10."""
    first, second, _, _ = tl.philox(
        seed, stream.to(tl.uint32), (stream >> 32).to(tl.uint32), offset.to(tl.uint32), (offset >> 32).to(tl.uint32)
    )
    number = (first.to(tl.uint64) << 21) | (second.to(tl.uint64) >> 11)
    return number.to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def pick(weights, places, point):
    """Of weights >= 0 in float64: the first place whose running sum is above `point`, and the sum before it.

    The last place with any weight stands in where rounding leaves none. NaN: place 0.
    """
    running = tl.cumsum(weights, 0)
    last = tl.max(tl.where(weights > 0, places, 0), 0)
    place = tl.minimum(tl.sum((running <= point).to(tl.int32), 0), last)
    return place, tl.sum(tl.where(places < place, weights, 0.0), 0)


@triton.jit
def inverse(source):
    """What differences of logits are multiplied by, as exponents of 2."""
    return LOG2E / (tl.full((), 1.0, tl.float32) * source.temperature)


@triton.jit
def _sums(source, floors, out, blocks, groups, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """ROWS blocks of COLUMNS logits of one row."""
    program = tl.program_id(0)  # divided in 32 bits: a division in 64 is a call
    row, block = (program // groups).to(tl.int64), (program % groups) * ROWS + tl.arange(0, ROWS)
    column = block[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    live = column < source.vocabulary
    x = tl.load(source.logits + row * source.stride + column, mask=live, other=float("-inf")).to(tl.float32)
    top = tl.max(x, 1)
    if floors is not None:
        x = tl.where(ordered(x) >= tl.load(floors + row), x, float("-inf"))
    e = tl.exp2((x - finite(top)[:, None]) * inverse(source))
    place = row * blocks + block
    tl.store(out.tops + place, top, mask=block < blocks)
    tl.store(out.totals + place, tl.sum(e, 1), mask=block < blocks)


@triton.jit
def _narrowed(search, row, top_p, splits, COUNT: tl.constexpr, SPLITS: tl.constexpr):
    """The eighth of [low, high) that the last pass leaves, and the measure that is wanted at or above its low end."""
    low, high = tl.load(search.bounds + row * 2), tl.load(search.bounds + row * 2 + 1)
    wanted = tl.load(search.wants + row)
    part, threshold = tl.arange(0, SPLITS), tl.arange(0, 8)
    place = (row * splits + part[:, None]) * 8 + threshold[None, :]
    above = tl.sum(tl.load(search.sums + place, mask=(part < splits)[:, None], other=0.0), 0)
    if not COUNT:  # the first pass of top-p only sees how much mass there is
        all_of_it = tl.sum(tl.where(threshold == 0, above, 0.0), 0)
        wanted = tl.where(wanted < 0, all_of_it * top_p, wanted)
    step = (high - low + 7) // 8
    kept = (above >= wanted) & (low + threshold * step < high)
    chosen = tl.max(tl.where(kept, threshold, 0), 0)
    new_low = low + chosen * step
    new_high = tl.minimum(new_low + step, high)
    if COUNT:  # one logit is left: a threshold between it and the next one is as good
        sign = tl.where(threshold == chosen, 1.0, tl.where(threshold == chosen + 1, -1.0, 0.0))
        new_high = tl.where((tl.sum(above * sign, 0) == 1.0) & (chosen < 7), new_low + 1, new_high)
    return new_low, new_high, wanted


@triton.jit
def _narrow(
    source,
    tops,
    floors,
    old,
    new,
    blocks,
    splits,
    chunks,
    top_k,
    top_p,
    COUNT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Of one part of one row: how many logits (COUNT), or how much of the mass, is at or above each of 8 thresholds.

    Kept are the logits at or above the largest threshold that has `wanted` at or above it: top_k logits, or top_p of
    the mass at or above `floors` (the result of top-k). Each pass first reads where the one before it arrived: the
    first has no `old`, and the last no `new`: it only writes the result.
    """
    program = tl.program_id(0)
    row, part = (program // splits).to(tl.int64), program % splits
    if old is None:
        low = tl.load(floors + row).to(tl.int64)
        high = tl.full((), 2147483648, tl.int64)
        wanted = tl.full((), 1.0, tl.float64) * top_k
        if not COUNT:
            wanted = wanted * 0.0 - 1.0
    else:
        low, high, wanted = _narrowed(old, row, top_p, splits, COUNT, SPLITS)
    if new is None:
        tl.store(floors + row, low.to(tl.int32), mask=part == 0)
    else:
        tl.store(new.bounds + row * 2, low, mask=part == 0)
        tl.store(new.bounds + row * 2 + 1, high, mask=part == 0)
        tl.store(new.wants + row, wanted, mask=part == 0)
        if high - low > 1:  # where nothing is left to find, no later pass looks at the sums
            threshold = tl.arange(0, 8)
            limit = low + threshold * ((high - low + 7) // 8)
            above = tl.zeros((8,), tl.float64)
            block = tl.arange(0, BLOCKS)
            top = tl.max(tl.load(tops + row * blocks + block, mask=block < blocks, other=float("-inf")), 0)
            for chunk in range(0, chunks):
                column = (part * chunks + chunk) * COLUMNS + tl.arange(0, COLUMNS)
                live = column < source.vocabulary
                place = row * source.stride + column
                x = tl.load(source.logits + place, mask=live, other=float("-inf")).to(tl.float32)
                if COUNT:
                    amount = live.to(tl.float32)
                else:
                    amount = tl.exp2((x - finite(top)) * inverse(source))
                counted = (ordered(x).to(tl.int64)[None, :] >= limit[:, None]) & live[None, :]
                above += tl.sum(tl.where(counted, amount[None, :], 0.0), 1).to(tl.float64)
            tl.store(new.sums + (row * splits + part) * 8 + threshold, above)


@triton.jit
def _choose_block(sums, row, u, blocks, scale, GREEDY: tl.constexpr, BLOCKS: tl.constexpr):
    """(block, fraction of its mass at which the point lies, maximum of the row, sum of exponentials of the row)."""
    block = tl.arange(0, BLOCKS)
    top = tl.load(sums.tops + row * blocks + block, mask=block < blocks, other=float("-inf"))
    total = tl.load(sums.totals + row * blocks + block, mask=block < blocks, other=0.0)
    highest = tl.max(top, 0)
    weights = total.to(tl.float64) * tl.exp2(tl.maximum((top - finite(highest)) * scale, FLOOR)).to(tl.float64)
    mass = tl.sum(weights, 0)
    if GREEDY:
        chosen = tl.min(tl.where(top == highest, block, BLOCKS - 1), 0)
        fraction = tl.zeros((), tl.float64)
    else:
        point = u * mass
        chosen, before = pick(weights, block, point)
        fraction = (point - before) / tl.sum(tl.where(block == chosen, weights, 0.0), 0)
    return tl.minimum(chosen, blocks - 1), fraction, highest, mass


@triton.jit(do_not_specialize=["seed"])
def _draw(
    source,
    floors,
    kept,
    plain,
    streams,
    offsets,
    tokens,
    log_probs,
    policy_log_probs,
    blocks,
    seed,
    GREEDY: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """`plain` are the sums of all logits, `kept` those of the logits that the filters leave."""
    row = tl.program_id(0).to(tl.int64)
    scale = inverse(source)
    u = uniform(seed.to(tl.uint64), tl.load(streams + row), tl.load(offsets + row))
    chosen, fraction, highest, mass = _choose_block(kept, row, u, blocks, scale, GREEDY, BLOCKS)
    plain_mass = mass
    if floors is not None:
        _, _, _, plain_mass = _choose_block(plain, row, u, blocks, scale, GREEDY, BLOCKS)
    place = tl.arange(0, COLUMNS)
    column = chosen.to(tl.int64) * COLUMNS + place
    inside = column < source.vocabulary
    x = tl.load(source.logits + row * source.stride + column, mask=inside, other=float("-inf")).to(tl.float32)
    if floors is not None:
        x = tl.where(ordered(x) >= tl.load(floors + row), x, float("-inf"))
    best = tl.max(tl.where(inside, x, float("-inf")), 0)
    if GREEDY:
        index = tl.min(tl.where((x == best) & inside, place, COLUMNS - 1), 0)
    else:
        e = tl.where(inside, tl.exp2((x - finite(best)) * scale).to(tl.float64), 0.0)
        index, _ = pick(e, place, fraction * tl.sum(e, 0))
    index = tl.minimum(index, tl.max(tl.where(inside, place, 0), 0))
    distance = (tl.sum(tl.where(place == index, x, 0.0), 0) - finite(highest)) * scale
    policy = LN2 * (distance - tl.log2(plain_mass.to(tl.float32)))
    drawn = LN2 * (distance - tl.log2(mass.to(tl.float32)))
    if GREEDY:
        drawn = policy * 0.0
    tl.store(tokens + row, tl.min(column, 0) + index)
    tl.store(log_probs + row, drawn)
    tl.store(policy_log_probs + row, policy)


def draw(logits: Tensor, temperature: float, top_k: int, top_p: float, seed: int, offset: Tensor, stream: Tensor):
    """As `inverse_cdf.draw`: tokens [B] int64, log_probs [B] and policy_log_probs [B] in fp32."""
    (n, vocabulary), device = logits.shape, logits.device
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    source = Source(logits, logits.stride(0), vocabulary, float(temperature or 1.0))
    tile = tuning.row_tile(tuning.chip_of(device), vocabulary)
    columns = min(1024, tile.columns)
    blocks, per_program = -(-vocabulary // columns), max(1, tile.rows * tile.columns // columns)
    groups = -(-blocks // per_program)
    make = partial(torch.empty, dtype=torch.float32, device=device)

    def sums(floors: Tensor | None, totals: Tensor) -> Blocks:
        out = Blocks(tops, totals)
        arguments = (source, floors, out, blocks, groups)
        launch(_sums, n * groups, device, *arguments, ROWS=per_program, COLUMNS=columns, warps=tile.warps)
        return out

    tops, floors = make(n, blocks), None
    kept = plain = sums(None, make(n, blocks))
    if temperature != 0 and (0 < top_k < vocabulary or top_p < 1):
        floors = torch.full((n,), LOWEST, dtype=torch.int32, device=device)
        if 0 < top_k < vocabulary:
            threshold(source, tops, floors, top_k, 1.0)
        if top_p < 1:
            threshold(source, tops, floors, 0, top_p)
        kept = sums(floors, make(n, blocks))
    results = (torch.empty(n, dtype=torch.int64, device=device), make(n), make(n))
    arguments = (source, floors, kept, plain, stream, offset, *results, blocks, seed)
    constants = {"GREEDY": temperature == 0, "COLUMNS": columns, "BLOCKS": triton.next_power_of_2(blocks)}
    launch(_draw, n, device, *arguments, **constants, warps=8)
    return results


def threshold(source: Source, tops: Tensor, floors: Tensor, top_k: int, top_p: float) -> None:
    """Write into `floors` the key of the lowest logit that is kept: of the top-k, or of the top-p above `floors`."""
    n, blocks = tops.shape
    device, vocabulary = tops.device, source.vocabulary
    columns = min(512, 1 << max(4, (vocabulary - 1).bit_length()))
    chunks = -(-vocabulary // columns)
    splits = max(1, min(64, chunks, -(-4 * tuning.chip_of(device).multiprocessors // max(1, n))))
    chunks = -(-chunks // splits)
    make = partial(torch.empty, dtype=torch.float64, device=device)
    passes = [Search(make(n, 2, dtype=torch.int64), make(n), make(n, splits, 8)) for _ in range(2)]
    constants = {"COUNT": top_k > 0, "COLUMNS": columns, "SPLITS": triton.next_power_of_2(splits)}
    constants["BLOCKS"] = triton.next_power_of_2(blocks)
    for step in range(PASSES + 1):
        old = None if step == 0 else passes[step % 2]
        new = None if step == PASSES else passes[1 - step % 2]
        arguments = (source, tops, floors, old, new, blocks, splits, chunks, float(top_k), float(top_p))
        launch(_narrow, n * splits, device, *arguments, **constants, warps=4)
