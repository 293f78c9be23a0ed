"""One token a row in Triton: block sums, top-k and top-p thresholds without a sort, inverse CDF from one uniform.

1. `_sums`: maximum and sum of exponentials of every block of the vocabulary, one read of the logits; with top-k also
   the maxima of smaller blocks.
2. `_candidates`, with top-k: the k-th largest of those maxima is at most the k-th largest logit, so fewer than k blocks
   hold all logits above it. One program a row finds both thresholds among them.
   `_histogram`, with top-p alone (or a k too large for one program): three passes over the logits, which stay in the L2
   cache, sum the mass of 2048 ranges of keys each (the logits' bits, read as ordered integers) and leave one range.
3. `_sums` of what is kept, and `_draw`: the block in which the uniform number falls, and the token in it. Sums over
   blocks run in float64.
The random words are those of `reference.philox_4x32`, and no kernel waits for the host. Histograms are sums of
integers: in whatever order programs add to them, they hold the same.
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

# Of the 32 bits of a key: a pass looks at all that the one before it left, and at none that it counted.
SHIFTS = (22, 11, 0)
BINS = 2048
UNIT = tl.constexpr(2.0**42)  # of mass, of which the largest logit has 1: sums of 2 ** 20 such fit 63 bits
CANDIDATES = 8192  # logits, or maxima of blocks, that one program holds; half of it on AMD, where more spills
LOWEST = tl.constexpr(-(2**31))  # the key below all others


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
    """Where the search for a threshold stands: the lowest key of the range that is left, what lies above the range, and
    what is wanted [B]; and the sums of its parts [B, BINS].
    """

    lows: Tensor
    aboves: Tensor
    wants: Tensor
    sums: Tensor


@triton.jit
def ordered(x):
    """The bits of a float32 as an int32 that sorts as the numbers do; a NaN lies beyond the infinity of its sign."""
    x = tl.where(x == 0.0, 0.0, x)  # -0 is 0
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def number_of(key):
    """The float32 of a key."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


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
def _sums(source, floors, out, maxima, blocks, groups, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """ROWS blocks of COLUMNS logits of one row; maxima: the largest key of every WIDTH logits."""
    program = tl.program_id(0)  # divided in 32 bits: a division in 64 is a call
    row, block = (program // groups).to(tl.int64), (program % groups) * ROWS + tl.arange(0, ROWS)
    column = block[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    live = column < source.vocabulary
    x = tl.load(source.logits + row * source.stride + column, mask=live, other=float("-inf")).to(tl.float32)
    top = tl.max(x, 1)
    if maxima is not None:
        PARTS: tl.constexpr = COLUMNS // WIDTH
        parts = tl.cdiv(source.vocabulary, WIDTH)
        largest = tl.max(tl.reshape(ordered(x), (ROWS, PARTS, WIDTH)), 2)
        part = block[:, None] * PARTS + tl.arange(0, PARTS)[None, :]
        tl.store(maxima + row * parts + part, largest, mask=part < parts)
    if floors is not None:
        x = tl.where(ordered(x) >= tl.load(floors + row), x, float("-inf"))
    e = tl.exp2((x - finite(top)[:, None]) * inverse(source))
    place = row * blocks + block
    tl.store(out.tops + place, top, mask=block < blocks)
    tl.store(out.totals + place, tl.sum(e, 1), mask=block < blocks)


@triton.jit
def _largest(keys, low, count):
    """The largest key above `low` that `count` of the keys reach, or `low`; both as int64."""
    high = tl.full((), 2147483648, tl.int64)
    for _ in range(0, 32):
        middle = low + (high - low) // 2
        enough = (middle > low) & (tl.sum((keys >= middle.to(tl.int32)).to(tl.int32), 0) >= count)
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    return low


@triton.jit
def _block_logits(source, ids, row, begin, found, SLOTS: tl.constexpr, WIDTH: tl.constexpr):
    """(logits, keys) of the blocks in `ids` from `begin` on; the lowest key where there is none."""
    slot = begin + tl.arange(0, SLOTS)
    block = tl.load(ids + slot, mask=slot < found, other=0).to(tl.int64)
    column = block[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    live = (slot < found)[:, None] & (column < source.vocabulary)
    x = tl.load(source.logits + row * source.stride + column, mask=live, other=float("-inf")).to(tl.float32)
    return x, tl.where(live, ordered(x), LOWEST)


@triton.jit
def _mass(amounts, keys, low):
    """The sum of the amounts of keys >= low, in float64 over the blocks."""
    return tl.sum(tl.sum(tl.where(keys >= low.to(tl.int32), amounts, 0.0), 1).to(tl.float64), 0)


@triton.jit(do_not_specialize=["top_k"])
def _candidates(
    source,
    tops,
    maxima,
    ids,
    floors,
    blocks,
    top_k,
    top_p,
    NUCLEUS: tl.constexpr,
    BLOCKS: tl.constexpr,
    MAXIMA: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The key of the lowest logit of a row that is kept: of its top_k, and (NUCLEUS) of the top_p of their mass.

    The k-th largest maximum of a block is a bound from below: k logits reach it. Fewer than k blocks have a larger one,
    and what lies above the bound lies in them. Logits at the bound may be anywhere, in blocks whose maximum it is.
    """
    row = tl.program_id(0).to(tl.int64)
    parts = tl.cdiv(source.vocabulary, WIDTH)
    place = tl.arange(0, MAXIMA)
    largest = tl.load(maxima + row * parts + place, mask=place < parts, other=LOWEST)
    bound = _largest(largest, tl.full((), LOWEST, tl.int64), top_k)
    above, at = largest > bound.to(tl.int32), largest == bound.to(tl.int32)
    higher = tl.sum(above.to(tl.int32), 0)
    slot = tl.where(above, tl.cumsum(above.to(tl.int32), 0), higher + tl.cumsum(at.to(tl.int32), 0)) - 1
    found = higher + tl.sum(at.to(tl.int32), 0)
    mine = ids + row * parts
    tl.store(mine + slot, place, mask=above | at)
    tl.debug_barrier()  # other threads read what was just written
    x, keys = _block_logits(source, mine, row, 0, found, SLOTS, WIDTH)
    floor = _largest(tl.reshape(keys, (SLOTS * WIDTH,)), bound, top_k)
    if NUCLEUS:
        block = tl.arange(0, BLOCKS)
        top = finite(tl.max(tl.load(tops + row * blocks + block, mask=block < blocks, other=float("-inf")), 0))
        amounts = tl.exp2((x - top) * inverse(source))
        mass = _mass(amounts, keys, tl.maximum(floor, bound + 1))
        if floor == bound:
            ties = tl.zeros((), tl.int32)
            for begin in range(0, found, SLOTS):
                _, others = _block_logits(source, mine, row, begin, found, SLOTS, WIDTH)
                ties += tl.sum(tl.sum((others == bound.to(tl.int32)).to(tl.int32), 1), 0)
            amount = tl.exp2((number_of(bound.to(tl.int32)) - top) * inverse(source))
            mass += ties.to(tl.float64) * amount.to(tl.float64)
        wanted = mass * top_p
        high = tl.full((), 2147483648, tl.int64)
        for _ in range(0, 32):
            middle = floor + (high - floor) // 2
            enough = (middle > floor) & (_mass(amounts, keys, middle) >= wanted)
            floor, high = tl.where(enough, middle, floor), tl.where(enough, high, middle)
    tl.store(floors + row, floor.to(tl.int32))


@triton.jit
def _range_left(search, row, shift, BINS: tl.constexpr):
    """(lowest key, what is above, what is wanted) of the one of BINS ranges in which the wanted sum is reached."""
    place = tl.arange(0, BINS)
    sums = tl.load(search.sums + row * BINS + place)
    above, wanted = tl.load(search.aboves + row), tl.load(search.wants + row)
    reached = (above + tl.cumsum(sums, 0, reverse=True)).to(tl.float64) >= wanted
    chosen = tl.max(tl.where(reached, place, 0), 0)
    low = tl.load(search.lows + row) + (chosen.to(tl.int64) << shift)
    return low, above + tl.sum(tl.where(place > chosen, sums, 0), 0), wanted


@triton.jit(do_not_specialize=["splits", "chunks", "shift", "old_shift"])
def _histogram(
    source,
    floors,
    kept,
    old,
    new,
    blocks,
    splits,
    chunks,
    top_k,
    top_p,
    shift,
    old_shift,
    COUNT: tl.constexpr,
    BINS: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Of one part of one row: how many logits (COUNT), or how much of the mass of those at or above `floors` (whose
    sums `kept` are), lie in each of BINS ranges of keys. A pass first reads where the one before it arrived.
    """
    program = tl.program_id(0)
    row, part = (program // splits).to(tl.int64), program % splits
    block = tl.arange(0, BLOCKS)
    tops = tl.load(kept.tops + row * blocks + block, mask=block < blocks, other=float("-inf"))
    top = finite(tl.max(tops, 0))
    least = tl.zeros((), tl.float32)
    if old is None:
        low, above = tl.full((), LOWEST, tl.int64), tl.zeros((), tl.int64)
        wanted = tl.full((), 1.0, tl.float64) * top_k
    else:
        low, above, wanted = _range_left(old, row, old_shift, BINS)
    if not COUNT:
        totals = tl.load(kept.totals + row * blocks + block, mask=block < blocks, other=0.0).to(tl.float64)
        decay = tl.exp2(tl.maximum((finite(tops) - top) * inverse(source), FLOOR))
        total = tl.sum(totals * tl.where(tops == float("-inf"), 0.0, decay).to(tl.float64), 0)
        # so small that all of them together do not reach what may be left out
        least = (total * (1.0 - top_p) * 0.5 / source.vocabulary).to(tl.float32)
        if old is None:
            wanted = total * top_p * UNIT
    tl.store(new.lows + row, low, mask=part == 0)
    tl.store(new.aboves + row, above, mask=part == 0)
    tl.store(new.wants + row, wanted, mask=part == 0)
    for chunk in range(0, chunks):
        column = (part * chunks + chunk) * COLUMNS + tl.arange(0, COLUMNS)
        live = column < source.vocabulary
        x = tl.load(source.logits + row * source.stride + column, mask=live, other=float("-inf")).to(tl.float32)
        key = ordered(x)
        if floors is not None:
            live = live & (key >= tl.load(floors + row))
        if COUNT:
            amount = live.to(tl.int64)
        else:
            e = tl.exp2((x - top) * inverse(source))
            live = live & (e > least)
            amount = (tl.where(live, e, 0.0).to(tl.float64) * UNIT).to(tl.int64)
        distance = key.to(tl.int64) - low
        bin = distance >> shift
        tl.atomic_add(new.sums + row * BINS + bin, amount, mask=live & (distance >= 0) & (bin < BINS), sem="relaxed")


@triton.jit
def _settle(search, floors, BINS: tl.constexpr):
    """The one key that the last pass leaves."""
    row = tl.program_id(0).to(tl.int64)
    low, _, _ = _range_left(search, row, 0, BINS)
    tl.store(floors + row, low.to(tl.int32))


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

    filtered = temperature != 0 and (0 < top_k < vocabulary or top_p < 1)
    top_k = top_k if filtered and top_k < vocabulary else 0
    share = CANDIDATES * 32 // tuning.chip_of(device).warp
    width = block_width(vocabulary, top_k, columns, share)
    maxima = make(n, -(-vocabulary // width), dtype=torch.int32) if width else None
    tops = make(n, blocks)

    def sums(floors: Tensor | None, maxima: Tensor | None = None) -> Blocks:
        out = Blocks(tops, make(n, blocks))
        constants = {"ROWS": per_program, "COLUMNS": columns, "WIDTH": 1 if maxima is None else width}
        arguments = (source, floors, out, maxima, blocks, groups)
        launch(_sums, n * groups, device, *arguments, **constants, warps=tile.warps)
        return out

    floors, kept = None, sums(None, maxima)
    plain = kept
    if maxima is not None:
        floors = of_candidates(source, tops, maxima, width, top_k, top_p)
    elif top_k:
        floors = of_histograms(source, kept, None, top_k, 1.0)
    if filtered and top_p < 1 and maxima is None:
        kept = kept if floors is None else sums(floors)
        floors = of_histograms(source, kept, floors, 0, top_p)
    kept = kept if floors is None else sums(floors)
    results = (torch.empty(n, dtype=torch.int64, device=device), make(n), make(n))
    arguments = (source, floors, kept, plain, stream, offset, *results, blocks, seed)
    constants = {"GREEDY": temperature == 0, "COLUMNS": columns, "BLOCKS": triton.next_power_of_2(blocks)}
    launch(_draw, n, device, *arguments, **constants, warps=8)
    return results


def block_width(vocabulary: int, top_k: int, most: int, share: int) -> int:
    """Logits of the blocks whose maxima bound the top_k: as many as leave top_k blocks, and as one program holds the
    logits of top_k of them and all maxima (`share` of each). 0: there is no such number, or no top_k.
    """
    width, slots = min(64, most), triton.next_power_of_2(max(1, top_k))
    while width and top_k and (-(-vocabulary // width) < top_k or slots * width > share):
        width //= 2
    return width if top_k and width and -(-vocabulary // width) <= share else 0


def of_candidates(source: Source, tops: Tensor, maxima: Tensor, width: int, top_k: int, top_p: float) -> Tensor:
    """The key of the lowest logit that is kept [B], found by one program a row."""
    n, parts = maxima.shape
    ids, floors = torch.empty_like(maxima), torch.empty(n, dtype=torch.int32, device=maxima.device)
    slots, most = triton.next_power_of_2(top_k), triton.next_power_of_2(parts)
    constants = {"NUCLEUS": top_p < 1, "BLOCKS": triton.next_power_of_2(tops.shape[1])}
    constants |= {"MAXIMA": most, "SLOTS": slots, "WIDTH": width}
    arguments = (source, tops, maxima, ids, floors, tops.shape[1], top_k, float(top_p))
    threads = max(32, min(512, max(most, slots * width) // 16))
    warps = max(1, threads // tuning.chip_of(maxima.device).warp)
    launch(_candidates, n, maxima.device, *arguments, **constants, warps=warps)
    return floors


def of_histograms(source: Source, kept: Blocks, floors: Tensor | None, top_k: int, top_p: float) -> Tensor:
    """The key of the lowest logit that is kept [B]: of the top_k, or of the top_p of the mass at or above `floors`."""
    n, blocks = kept.tops.shape
    device, vocabulary = kept.tops.device, source.vocabulary
    columns = min(512, 1 << max(4, (vocabulary - 1).bit_length()))
    chunks = -(-vocabulary // columns)
    splits = max(1, min(64, chunks, -(-4 * tuning.chip_of(device).multiprocessors // max(1, n))))
    chunks = -(-chunks // splits)
    make = partial(torch.empty, device=device)
    sums = torch.zeros(len(SHIFTS), n, BINS, dtype=torch.int64, device=device)
    constants = {"COUNT": top_k > 0, "COLUMNS": columns, "BINS": BINS, "BLOCKS": triton.next_power_of_2(blocks)}
    old, old_shift = None, 0
    for shift, of_pass in zip(SHIFTS, sums):
        lows, aboves = make(n, dtype=torch.int64), make(n, dtype=torch.int64)
        new = Search(lows, aboves, make(n, dtype=torch.float64), of_pass)
        arguments = (source, floors, kept, old, new, blocks, splits, chunks, float(top_k), float(top_p))
        launch(_histogram, n * splits, device, *arguments, shift, old_shift, **constants, warps=4)
        old, old_shift = new, shift
    found = make(n, dtype=torch.int32)
    launch(_settle, n, device, old, found, BINS=BINS, warps=4)
    return found
