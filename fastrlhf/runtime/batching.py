"""Which rows go together: the order of an epoch, mini-batches, micro-batches under a token budget, shares of ranks.

Everything here depends on numbers and lengths only, so it is the same in every rank and in a resumed run.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from itertools import pairwise

from fastrlhf.config.errors import UserError
from fastrlhf.runtime.distributed import rank, size

REMEMBERED = 8192  # prompts whose replies' lengths are known


def derive_seed(*parts: object) -> int:
    """Return an independent 63-bit seed for each (seed, purpose, number ...): streams of different steps never
    overlap."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


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
        """Return the next k indices; an epoch's end is crossed without a gap."""
        result: list[int] = []
        while len(result) < k:
            if self.cursor == self.n:
                self.epoch, self.cursor = self.epoch + 1, 0
                self._order = self._permutation()
            part = self._order[self.cursor : self.cursor + k - len(result)]
            self.cursor += len(part)
            result += part
        return result

    def state(self) -> dict[str, int]:
        """Return n, seed, epoch and cursor, as JSON can hold them."""
        return {"n": self.n, "seed": self.seed, "epoch": self.epoch, "cursor": self.cursor}

    def load_state(self, state: dict[str, int]) -> None:
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


def mini_batches(count: int, size: int, order: Sequence[int]) -> list[list[int]]:
    """Cut `order` (a permutation of 0..count-1) into pieces of `size`; the last may be smaller, none is dropped."""
    edges = [*range(0, count, size), count]
    return [list(order[a:b]) for a, b in pairwise(edges)]


# ------------------------------------------------------------------------------------------------ shares of the ranks


def shard(count: int) -> slice:
    """Return this rank's piece of 0..count-1: consecutive, sizes differ by one at most, in the order of the ranks."""
    return slice(count * rank() // size(), count * (rank() + 1) // size())


def assign_rows(sizes: Sequence[int]) -> list[int]:
    """Return this rank's rows, in ascending order; all of them where there is one rank.

    They depend on the sizes (of all ranks' rows) only.
    """
    return dealt(sizes)[rank()]


def dealt(sizes: Sequence[float]) -> list[list[int]]:
    """Return every rank's rows, as `assign_rows` has them."""
    return [sorted(rows) for rows in balanced(sizes, size())]


class ReplyLengths:
    """How long replies to each prompt of a data set were, of the last REMEMBERED prompts that were answered.

    A part of a run, the same in every rank: from it follows which rank samples what, and never what is sampled.
    """

    def __init__(self) -> None:
        self._means: dict[int, float] = {}
        self._tokens, self._replies = 0, 0

    def expected(self, prompts: Sequence[int], longest: int) -> list[float]:
        """Tokens of a reply to each prompt: the mean of its last replies, else of all so far, else `longest`."""
        usual = self._tokens / self._replies if self._replies else float(longest)
        return [self._means.get(prompt, usual) for prompt in prompts]

    def note(self, prompts: Sequence[int], lengths: Sequence[int]) -> None:
        """lengths: tokens of the replies, prompt-major, as many to each prompt."""
        samples = len(lengths) // len(prompts)
        for at, prompt in enumerate(prompts):
            self._means.pop(prompt, None)  # the newest stand last
            self._means[prompt] = sum(lengths[at * samples : (at + 1) * samples]) / samples
        self._tokens, self._replies = self._tokens + sum(lengths), self._replies + len(lengths)
        for prompt in list(self._means)[: max(0, len(self._means) - REMEMBERED)]:
            del self._means[prompt]

    def state(self) -> dict[str, list]:
        return {"means": [[prompt, mean] for prompt, mean in self._means.items()], "all": [self._tokens, self._replies]}

    def load_state(self, state: dict[str, list]) -> None:
        self._means = {int(prompt): float(mean) for prompt, mean in state["means"]}
        self._tokens, self._replies = state["all"]


def balanced(sizes: Sequence[float], count: int) -> list[list[int]]:
    """Deal rows 0..n-1 into `count` bins: the largest first, each to the bin with the least so far (Graham 1969)."""
    bins: list[list[int]] = [[] for _ in range(count)]
    loads = [0.0] * count
    for row in _largest_first(sizes):
        emptiest = loads.index(min(loads))
        bins[emptiest].append(row)
        loads[emptiest] += sizes[row]
    return bins


def _largest_first(sizes: Sequence[float]) -> list[int]:
    return sorted(range(len(sizes)), key=lambda row: (-sizes[row], row))


# ------------------------------------------------------------------------------------------- rows under a token budget


def micro_batches(
    lengths: Sequence[int], budget: int, *, joined: bool = False, counts: Sequence[int] | None = None
) -> list[list[int]]:
    """Split items 0..n-1 into as few groups as `budget` tokens each allow, of about equal size; the largest first.

    An item is a row of lengths[i] tokens, or counts[i] rows that stay together, the longest of lengths[i] tokens. The
    size of a group is rows x longest, as it is padded: rows of like length share one. joined: it is the sum of the
    lengths. A batch too large for the memory fails at once, in the first group. An item longer than the budget gets a
    group of its own: memory may suffer, the result never does.
    """
    if joined:
        return _joined_groups(lengths, budget)
    return _padded_groups(lengths, budget, counts or [1] * len(lengths))


def _padded_groups(lengths: Sequence[int], budget: int, counts: Sequence[int]) -> list[list[int]]:
    """Cut the items, longest first, into neighbours. Filling each group in turn takes the least number of groups; then
    each takes its equal share of the tokens left, as far as the rest still fits into the groups left."""
    order = _largest_first(lengths)
    total = len(order)

    def end_of(start: int, rows_allowed: int) -> int:
        """The end of the group that starts at `start` and holds at most so many rows, but one item at least."""
        end, rows = start + 1, counts[order[start]]
        while end < total and rows + counts[order[end]] <= rows_allowed:
            rows += counts[order[end]]
            end += 1
        return end

    # fewest[i]: groups that items i.. need, each filled up. From the back, because the first item of a group is its
    # longest and so decides how many rows fit.
    fewest = [0] * (total + 1)
    for i in reversed(range(total)):
        fewest[i] = 1 + fewest[end_of(i, budget // lengths[order[i]])]
    groups: list[list[int]] = []
    start, tokens_left = 0, sum(length * count for length, count in zip(lengths, counts, strict=True))
    while start < total:
        longest, groups_left = lengths[order[start]], fewest[0] - len(groups)
        equal_share = -(-tokens_left // groups_left)
        end = end_of(start, min(budget // longest, -(-equal_share // longest)))
        while fewest[end] > groups_left - 1:  # what is left would need more groups than are left: take more
            end += 1
        groups.append(order[start:end])
        tokens_left -= sum(lengths[item] * counts[item] for item in groups[-1])
        start = end
    return groups


def _joined_groups(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Deal the rows evenly into the least number of groups for which all fit; never more groups than `pack` takes, and
    its groups where the even ones do not fit."""
    order = _largest_first(lengths)
    alone = [[row] for row in order if lengths[row] >= budget]
    rest = order[len(alone) :]
    sizes = [lengths[row] for row in rest]
    groups = pack(sizes, budget)
    for count in range(-(-sum(sizes) // budget), len(groups) + 1):
        even = balanced(sizes, count)
        if all(sum(sizes[i] for i in group) <= budget for group in even):
            groups = even
            break
    return alone + sorted(([rest[i] for i in group] for group in groups), key=lambda g: -sum(lengths[row] for row in g))


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
