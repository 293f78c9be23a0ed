"""Optimizer steps: fp32 master weights, schedules, gradient clipping, and micro-batches by token budget."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from itertools import pairwise

from fastrlhf.config.errors import UserError
from fastrlhf.runtime.distributed import rank, size


def micro_batches(lengths: Sequence[int], budget: int, *, packed: bool = False) -> list[list[int]]:
    """Split rows 0..n-1 into as few groups as `budget` tokens each allow, of about equal size; the largest rows first.

    The size of a group is rows x longest, as it is padded: rows of like length share one. packed: the sum of lengths.
    A batch too large for the memory fails at once, in the first group. Depends on the lengths only. A row longer than
    the budget gets a group of its own: memory may suffer, the result never does.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    return _packed_groups(order, lengths, budget) if packed else _padded_groups(order, lengths, budget)


def _padded_groups(order: list[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Neighbours in the order of length. Filling each group is the least number; then each takes its share of the
    tokens left, as far as the rest still fits in the groups left."""
    count = len(order)
    least = [0] * (count + 1)  # groups that rows i.. need
    for i in range(count - 1, -1, -1):
        least[i] = 1 + least[min(count, i + max(1, budget // lengths[order[i]]))]
    groups, start, left = [], 0, sum(lengths)
    while start < count:
        longest = lengths[order[start]]
        share = -(-left // (least[0] - len(groups)))
        end = min(count, start + max(1, min(budget // longest, -(-share // longest))))
        while least[end] > least[0] - len(groups) - 1:
            end += 1
        groups.append(order[start:end])
        left -= sum(lengths[row] for row in order[start:end])
        start = end
    return groups


def _packed_groups(order: list[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Each row to the emptiest of k groups (Graham 1969), with the least k for which all fit; at most as many groups as
    first-fit decreasing takes, and its groups where the emptiest are no better."""
    alone = [[row] for row in order if lengths[row] >= budget]
    order = order[len(alone) :]
    found = [[order[i] for i in group] for group in pack([lengths[row] for row in order], budget)]
    for count in range(-(-sum(lengths[row] for row in order) // budget), len(found) + 1):
        groups, sizes = [[] for _ in range(count)], [0] * count
        for row in order:
            place = sizes.index(min(sizes))
            groups[place].append(row)
            sizes[place] += lengths[row]
        if max(sizes, default=0) <= budget:
            found = groups
            break
    return alone + sorted(found, key=lambda group: -sum(lengths[row] for row in group))


class Sampler:
    """An endless stream of indices 0..n-1 in which every epoch is one permutation.

    The permutation of an epoch depends on (seed, epoch, n) only, so epoch and cursor are the whole state.
    """

    def __init__(self, n: int, seed: int):
        if n < 1:
            raise ValueError(f"n must be at least 1, found {n}")
        self.n, self.seed, self.epoch, self.cursor = n, seed, 0, 0
        self._order = self._permutation()

    def _permutation(self) -> list[int]:
        order = list(range(self.n))
        random.Random(f"epoch {self.epoch} of seed {self.seed}").shuffle(order)
        return order

    def take(self, k: int) -> list[int]:
        """The next k indices; an epoch's end is crossed without a gap."""
        result: list[int] = []
        while len(result) < k:
            if self.cursor == self.n:
                self.epoch, self.cursor = self.epoch + 1, 0
                self._order = self._permutation()
            part = self._order[self.cursor : self.cursor + k - len(result)]
            self.cursor += len(part)
            result += part
        return result

    def state_dict(self) -> dict[str, int]:
        """JSON-able: n, seed, epoch, cursor."""
        return {"n": self.n, "seed": self.seed, "epoch": self.epoch, "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where state was taken. Raises UserError when the data or the seed is another."""
        for name in ("n", "seed"):
            if state[name] != getattr(self, name):
                what = "number of usable rows" if name == "n" else "seed"
                raise UserError(
                    f"the checkpoint was written with {what} {state[name]}, now it is {getattr(self, name)}; "
                    "resume with the same data and config"
                )
        self.epoch, self.cursor = state["epoch"], state["cursor"]
        self._order = self._permutation()


def pack(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of lengths in bins of at most max_tokens tokens, by first-fit decreasing (Johnson 1973).

    Deterministic: equal lengths keep their order, bins are in the order they were opened. A tree over the bins'
    free space finds the first fit in O(log n). Raises ValueError: a length above max_tokens or below 1.
    """
    n = len(lengths)
    if n and not 1 <= min(lengths) <= max(lengths) <= max_tokens:
        raise ValueError(f"lengths must be in [1, {max_tokens}], found {min(lengths)} to {max(lengths)}")
    leaves = 1 << max(0, n - 1).bit_length()
    free = [max_tokens] * (2 * leaves)  # free[i] is the largest free space among the bins below node i
    bins: list[list[int]] = []
    for index in sorted(range(n), key=lambda i: -lengths[i]):
        node = 1
        while node < leaves:
            node = 2 * node if free[2 * node] >= lengths[index] else 2 * node + 1
        if node - leaves == len(bins):
            bins.append([])
        bins[node - leaves].append(index)
        free[node] -= lengths[index]
        while node > 1:
            node //= 2
            free[node] = max(free[2 * node], free[2 * node + 1])
    return bins


# ------------------------------------------------------------------------------------------------------- sharing rows


def share(count: int) -> slice:
    """This rank's piece of 0..count-1: consecutive, sizes differ by one at most, in the order of the ranks."""
    return slice(count * rank() // size(), count * (rank() + 1) // size())


def own(sizes: Sequence[int]) -> list[int]:
    """This rank's rows, in ascending order: the largest first, each to the rank with the least so far.

    Depends on the sizes (of all ranks' rows) only. One rank: all rows.
    """
    loads, mine = [(0, r) for r in range(size())], []
    for row in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        load, least = min(loads)
        loads[least] = (load + sizes[row], least)
        if least == rank():
            mine.append(row)
    return sorted(mine)


def derive_seed(*parts: object) -> int:
    """An independent 63-bit seed for each (seed, purpose, number ...): streams of different steps never overlap."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def minibatches(count: int, size: int, order: Sequence[int]) -> list[list[int]]:
    """`order` (a permutation of 0..count-1) cut into pieces of `size`; the last may be smaller, none is dropped."""
    edges = [*range(0, count, size), count]
    return [list(order[a:b]) for a, b in pairwise(edges)]
