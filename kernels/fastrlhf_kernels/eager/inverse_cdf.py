"""Drawing one token a row: counter-based Philox, one uniform number, inverse CDF in two levels.

The uniform number belongs to (seed, stream, offset), so a token depends on its own logits and on nothing else in the
batch. Sums of probability run over blocks of the vocabulary; only the block that holds the drawn point is summed
token by token, in float64. Top-k and top-p need no sort of the vocabulary: `torch.topk` finds the candidates.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..checks import wide

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # Salmon et al., SC 2011; the same words as Random123
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
CANDIDATES = 256  # tokens looked at for top-p before the whole row is
BLOCK = 1 << 21  # logits of flat rows looked at at once


@lru_cache(maxsize=64)
def _schedule(seed: int, device: str) -> tuple[list[Tensor], Tensor]:
    """The ten round keys of a 64-bit seed and the multipliers, as columns in the row order of `philox_words`."""
    words = (seed & WORD, seed >> 32 & WORD)
    keys = []
    for i in range(10):
        pair = [(words[j] + i * PHILOX_WEYL[j]) & WORD for j in (1, 0)]
        keys.append(torch.tensor((pair if i % 2 == 0 else pair[::-1]) * 6, device=device)[: 11 - i, None])
    return keys, torch.tensor(PHILOX_MULTIPLIERS * 6, device=device)[:, None]


def philox_words(seed: int, stream: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Philox4x32-10 words 0 and 1, each [B] int64: key = seed, counter = (stream, offset), two 64-bit halves.

    A round multiplies words 0 and 2, and swaps the two pairs crosswise. The rows of x repeat (word 0, word 2) so that
    a swap is a view that starts one row lower; each round uses one row up. Products of 32-bit words wrap in int64,
    whose bits are the right ones; what they carry above 32 bits is masked off one round later.
    """
    keys, multipliers = _schedule(seed, str(stream.device))
    counter = torch.stack([stream, offset])
    x = (counter & WORD).repeat(6, 1)  # words 0, 2, 0, 2, ...
    y = (counter >> 32).flip(0).repeat(6, 1)[:11]  # words 3, 1, 3, 1, ...
    for i in range(10):
        product = x * multipliers[i % 2 : i % 2 + len(x)]
        x = (product[:-1] >> 32).bitwise_xor_(y).bitwise_xor_(keys[i]).bitwise_and_(WORD)
        y = product[1:-1]
    return x[0], product[-1] & WORD


def uniforms(seed: int, stream: Tensor, offset: Tensor) -> Tensor:
    """[B] numbers in [0, 1): 53 bits in float64 (24 bits in float32 where a device has no float64)."""
    first, second = philox_words(seed, stream, offset)
    if stream.device.type == "mps":
        return (first >> 8).float() * 2.0**-24
    return (first << 21 | second >> 11).double() * 2.0**-53


def inverse_cdf(p: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """p [B, V] not negative, u [B] in [0, 1): the token at u of the mass, and the mass itself [B].

    The block is searched first, then the place in it by the fraction of the block's mass that is left. A product of
    u < 1 and a sum rounds to less than the sum, so that no search runs past the last entry with any mass.
    """
    vocabulary = p.shape[1]
    block = 64 if vocabulary <= 8192 else 256
    whole = vocabulary // block
    sums = p[:, : whole * block].unflatten(1, (whole, block)).sum(2)
    if whole * block < vocabulary:
        sums = torch.cat([sums, p[:, whole * block :].sum(1, keepdim=True)], 1)
    running = torch.nn.functional.pad(sums.cumsum(1, dtype=u.dtype), (1, 0))
    total = running[:, -1]
    point = (u * total)[:, None]
    chosen = (torch.searchsorted(running, point, right=True) - 1).clamp_(max=sums.shape[1] - 1)  # NaN: past the end
    low, high = running.gather(1, chosen), running.gather(1, chosen + 1)
    start = chosen * block
    column = start + torch.arange(block, device=p.device)
    inside = p.gather(1, column.clamp(max=vocabulary - 1))
    if whole * block < vocabulary:
        inside = inside.masked_fill_(column >= vocabulary, 0)
    inner = inside.cumsum(1, dtype=u.dtype)
    index = torch.searchsorted(inner, (point - low) / (high - low) * inner[:, -1:], right=True)
    return (start + index.clamp_(max=block - 1)).clamp_(max=vocabulary - 1)[:, 0], total


def threshold(z: Tensor, p: Tensor, top_k: int, top_p: float) -> Tensor:
    """[B, 1]: the lowest logit that may be drawn; tokens at it are kept, however many there are."""
    vocabulary = z.shape[1]
    k = top_k if 0 < top_k < vocabulary else 0
    values, index = torch.topk(z, k or min(CANDIDATES, vocabulary))
    if top_p >= 1:
        return values[:, -1:]
    rest = torch.where(z >= values[:, -1:], p, 0) if k else p
    wanted = top_p * rest.sum(1, dtype=torch.float64)[:, None]
    lowest, settled = _nucleus(values, p.gather(1, index), wanted)
    if not k and not bool(settled.all()):
        rows = (~settled).nonzero()[:, 0]
        for part in rows.split(max(1, BLOCK // vocabulary)):
            lowest[part] = _flat_nucleus(z[part], p[part], wanted[part])
    return lowest


def _nucleus(values: Tensor, p: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Of sorted candidates [B, C]: the lowest one kept while the mass before it is < wanted, and whether C sufficed."""
    running = p.cumsum(1, dtype=torch.float64)
    kept = 1 + (running[:, :-1] < wanted).sum(1, keepdim=True)
    return values.gather(1, kept - 1), ~(running[:, -1] < wanted[:, 0])


def _flat_nucleus(z: Tensor, p: Tensor, wanted: Tensor) -> Tensor:
    """The same over whole rows: find the bucket of logits (1/32 nat) in which the mass is reached, sort only it."""
    buckets = 1024
    bucket = ((z.amax(1, keepdim=True) - z) * 32).clamp_(max=buckets - 1).long()
    running = p.new_zeros(len(z), buckets, dtype=torch.float64).scatter_add_(1, bucket, p.double()).cumsum(1)
    crossing = (running < wanted).sum(1, keepdim=True).clamp_(max=buckets - 1)
    before = torch.where(crossing > 0, running.gather(1, (crossing - 1).clamp(min=0)), 0)
    inside = bucket == crossing
    values, index = torch.topk(z.masked_fill(~inside, -torch.inf), int(inside.sum(1).amax()))
    return _nucleus(values, p.gather(1, index), wanted - before)[0]


def draw(logits: Tensor, temperature: float, top_k: int, top_p: float, seed: int, offset: Tensor, stream: Tensor):
    """tokens [B] int64, log_probs [B] of the distribution drawn from, policy_log_probs [B] of the unfiltered one."""
    z = logits.to(wide(logits))
    if temperature == 0:
        tokens = z.argmax(1)
        policy = torch.log_softmax(z, 1).gather(1, tokens[:, None])[:, 0]
        return tokens, torch.zeros_like(policy), policy
    if temperature != 1:
        z = z / temperature
    p = kept = torch.softmax(z, 1)
    if 0 < top_k < z.shape[1] or top_p < 1:
        kept = torch.where(z >= threshold(z, p, top_k, top_p), p, 0)
    tokens, mass = inverse_cdf(kept, uniforms(seed, stream, offset))
    policy = p.gather(1, tokens[:, None])[:, 0].log()
    if kept is p:
        return tokens, policy.clone(), policy
    return tokens, policy - mass.log().to(policy.dtype), policy
