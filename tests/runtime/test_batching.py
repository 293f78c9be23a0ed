"""Which rows go together: the order of an epoch, mini-batches, and micro-batches under a token budget."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrlhf.config.errors import UserError
from fastrlhf.runtime import batching
from fastrlhf.runtime.batching import ReplyLengths, Sampler, balanced, dealt, micro_batches, mini_batches, pack

# ------------------------------------------------------------------------------------------------------------- sampler


@given(
    n=st.integers(1, 9), seed=st.integers(0, 3), sizes=st.lists(st.integers(0, 12), max_size=8), stop=st.integers(0, 7)
)
@settings(max_examples=60, deadline=None)
def test_sampler_resumes_exactly_and_every_epoch_is_a_permutation(n, seed, sizes, stop):
    whole = Sampler(n, seed)
    stream = [whole.take(k) for k in sizes]
    first = Sampler(n, seed)
    before = [first.take(k) for k in sizes[:stop]]
    resumed = Sampler(n, seed)
    resumed.load_state(json.loads(json.dumps(first.state())))
    assert before + [resumed.take(k) for k in sizes[stop:]] == stream
    flat = [i for part in stream for i in part]
    for start in range(0, len(flat) - n + 1, n):
        assert sorted(flat[start : start + n]) == list(range(n))
    assert list(map(len, stream)) == sizes


def test_sampler_order_depends_on_seed_and_epoch_and_is_fixed():
    a, b = Sampler(8, 0).take(24), Sampler(8, 1).take(24)
    assert a != b and a[:8] != a[8:16] != a[16:]
    assert Sampler(8, 0).take(8) == [6, 1, 4, 2, 5, 7, 3, 0]  # other numbers here break the resuming of old runs


@pytest.mark.parametrize(("other", "says"), [(Sampler(5, 0), "usable rows 5, now it is 4"), (Sampler(4, 1), "seed 1")])
def test_sampler_refuses_another_data_set(other, says):
    with pytest.raises(UserError, match=says):
        Sampler(4, 0).load_state(other.state())


def test_sampler_needs_rows():
    with pytest.raises(ValueError, match="at least 1"):
        Sampler(0, 0)


# ------------------------------------------------------------------------------------------------------------- packing


def first_fit_decreasing(lengths: list[int], room: int) -> list[list[int]]:
    """The textbook loop."""
    bins: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for bin_ in bins:
            if sum(lengths[j] for j in bin_) + lengths[i] <= room:
                bin_.append(i)
                break
        else:
            bins.append([i])
    return bins


@given(st.lists(st.integers(1, 20), max_size=40))
@settings(max_examples=100, deadline=None)
def test_packing_is_first_fit_decreasing(lengths):
    assert pack(lengths, 20) == first_fit_decreasing(lengths, 20)


@pytest.mark.parametrize("lengths", [[1, 21], [0, 3]])
def test_packing_refuses_what_fits_nowhere(lengths):
    with pytest.raises(ValueError, match=r"must be in \[1, 20\]"):
        pack(lengths, 20)


# ------------------------------------------------------------------------------------------------------ micro-batches


def filled(lengths: list[int], budget: int) -> list[list[int]]:
    """Each group filled before the next, longest first: the least number of padded groups (by exchange of rows)."""
    groups: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        if groups and (len(groups[-1]) + 1) * groups[-1][0] <= budget:
            groups[-1].append(length)
        else:
            groups.append([length])
    return groups


def least_bins(lengths: list[int], budget: int) -> int:
    """The least number of groups whose sums stay within the budget, by trying all."""
    best = len(lengths)

    def place(rest: list[int], sums: list[int]) -> None:
        nonlocal best
        if len(sums) >= best:
            return
        if not rest:
            best = len(sums)
            return
        for i, total in enumerate(sums):
            if total + rest[0] <= budget:
                place(rest[1:], [*sums[:i], total + rest[0], *sums[i + 1 :]])
        place(rest[1:], [*sums, rest[0]])

    place(sorted(lengths, reverse=True), [])
    return best


@settings(max_examples=150, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), max_size=40), budget=st.integers(1, 400), joined=st.booleans())
def test_micro_batches_hold_every_row_once_within_the_budget(lengths, budget, joined):
    groups = micro_batches(lengths, budget, joined=joined)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    held = [[lengths[row] for row in group] for group in groups]
    for group in held:
        assert len(group) == 1 or (sum(group) if joined else len(group) * max(group)) <= budget
    assert groups == micro_batches(list(lengths), budget, joined=joined)
    fewest = len(filled(lengths, budget))
    assert len(groups) <= fewest if joined else len(groups) == fewest
    if joined:  # the largest first, those over the budget before all
        assert [sum(group) for group in held] == sorted(map(sum, held), reverse=True)
    else:  # rows of like length together, the longest first
        assert sum(held, []) == sorted(lengths, reverse=True)


@settings(max_examples=150, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), max_size=8), budget=st.integers(20, 50))
def test_joined_groups_are_as_few_as_can_be_or_one_more(lengths, budget):
    """First-fit decreasing takes at most 11/9 of the least plus 6/9 (Dosa 2007): up to 3 groups that is the least or
    one more."""
    count, least = len(micro_batches(lengths, budget, joined=True)), least_bins(lengths, budget)
    assert least <= count <= 11 / 9 * least + 6 / 9


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 60), length=st.integers(1, 30), budget=st.integers(1, 300), joined=st.booleans())
def test_rows_of_one_length_are_shared_out_evenly(rows, length, budget, joined):
    sizes = [len(group) for group in micro_batches([length] * rows, budget, joined=joined)]
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)
    assert len(sizes) == -(-rows // max(1, budget // length))


def test_micro_batches_by_hand():
    assert micro_batches([3, 10, 4, 40, 4, 10], 20) == [[3], [1, 5], [2, 4, 0]]
    assert micro_batches([3, 10, 4, 40, 4, 10], 20, joined=True) == [[3], [1, 2, 0], [5, 4]]
    assert micro_batches([], 20) == micro_batches([], 20, joined=True) == []
    assert micro_batches([5, 5, 5], 10) == [[0, 1], [2]]
    assert micro_batches([5] * 10, 20) == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]  # not 4, 4, 2
    assert micro_batches([100, *[10] * 9], 200) == [[0], [1, 2, 3, 4, 5, 6, 7, 8, 9]]


# ------------------------------------------------------------------------------------- micro-batches of whole items

ITEMS = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 6)), max_size=40)  # longest row, rows


def filled_items(items: list[tuple[int, int]], budget: int) -> int:
    """The number of groups where each is filled before the next, longest first."""
    groups, rows, longest = 0, 0, 0
    for length, count in sorted(items, key=lambda item: -item[0]):
        if groups and (rows + count) * longest <= budget:
            rows += count
        else:
            groups, rows, longest = groups + 1, count, length
    return groups


@settings(max_examples=150, deadline=None)
@given(items=ITEMS, budget=st.integers(1, 600))
def test_items_of_several_rows_stay_whole_within_the_budget_padding_included(items, budget):
    """All rows of a group are padded to its longest; an item beyond the budget is alone."""
    lengths, counts = [length for length, _ in items], [count for _, count in items]
    groups = micro_batches(lengths, budget, counts=counts)
    assert sorted(item for group in groups for item in group) == list(range(len(items)))
    for group in groups:
        rows = sum(counts[item] for item in group)
        assert len(group) == 1 or rows * max(lengths[item] for item in group) <= budget
    assert len(groups) <= filled_items(items, budget)
    assert [lengths[item] for group in groups for item in group] == sorted(lengths, reverse=True)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), max_size=40), budget=st.integers(1, 400))
def test_items_of_one_row_each_are_grouped_as_rows_are(lengths, budget):
    assert micro_batches(lengths, budget, counts=[1] * len(lengths)) == micro_batches(lengths, budget)


def test_micro_batches_of_items_by_hand():
    """24 tokens hold a pair of 12, two pairs of 6, or six rows of 4."""
    assert micro_batches([12, 4, 6, 4, 6], 24, counts=[2, 4, 2, 2, 2]) == [[0], [2, 4], [1, 3]]
    assert micro_batches([10, 3], 6, counts=[5, 2]) == [[0], [1]]  # the first is beyond the budget as it is
    assert micro_batches([4, 4, 4, 4], 24, counts=[3, 1, 3, 1]) == [[0, 1], [2, 3]]  # even, not 6 rows and 2


# ------------------------------------------------------------------------------------------------ mini-batches and bins


@pytest.mark.parametrize("count", [0, 1, 6, 7])
def test_mini_batches_cut_the_order_and_drop_nothing(count):
    order = [(5 * i + 2) % count for i in range(count)] if math.gcd(5, count) == 1 else list(range(count))
    pieces = mini_batches(count, 3, order)
    assert sum(pieces, []) == order
    assert all(len(piece) == 3 for piece in pieces[:-1]) and all(1 <= len(piece) <= 3 for piece in pieces if count)


def least_load(sizes: list[int], count: int) -> int:
    """The smallest possible load of the fullest bin, by trying all."""
    loads = {(0,) * count}
    for size in sizes:
        loads = {tuple(sorted(x[:i] + (x[i] + size,) + x[i + 1 :])) for x in loads for i in range(count)}
    return min(max(x) for x in loads)


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), max_size=9), count=st.integers(1, 4))
def test_balanced_bins_are_within_a_third_of_the_best(sizes, count):
    """Graham 1969: largest first is at most 4/3 - 1/(3 bins) of the least possible load."""
    bins = balanced(sizes, count)
    assert len(bins) == count and sorted(sum(bins, [])) == list(range(len(sizes)))
    loads = [sum(sizes[row] for row in rows) for rows in bins]
    assert max(loads) <= (4 / 3 - 1 / (3 * count)) * least_load(sizes, count) + 1e-9
    assert max(loads) - min(loads) <= max(sizes, default=0)
    assert bins == balanced(list(sizes), count)


def test_balanced_by_hand():
    assert balanced([3, 9, 4, 9, 1], 2) == [[1, 2], [3, 0, 4]]  # the largest first, each to the emptiest bin
    assert balanced([], 2) == [[], []] and balanced([5, 5, 5], 1) == [[0, 1, 2]]


# -------------------------------------------------------------------------------------------- lengths that are expected


def test_replies_are_expected_to_be_as_long_as_the_last_ones_to_their_prompt(monkeypatch):
    lengths = ReplyLengths()
    assert lengths.expected([3, 5], 64) == [64, 64]  # nothing was sampled yet
    lengths.note([3, 5], [10, 20, 1, 5])
    assert lengths.expected([5, 3, 8], 64) == [3, 15, 9]  # of a prompt that is new the mean of all
    lengths.note([3], [2, 4])
    assert lengths.expected([3, 8], 64) == [3, 7]
    again = ReplyLengths()
    again.load_state(json.loads(json.dumps(lengths.state())))
    assert again.state() == lengths.state() and again.expected([3, 5, 8], 64) == lengths.expected([3, 5, 8], 64)
    monkeypatch.setattr(batching, "REMEMBERED", 2)
    lengths.note([9, 5], [1, 1])
    assert lengths.expected([3, 5, 9], 64) == [44 / 8, 1, 1]  # the one noted longest ago is forgotten


def test_ranks_are_dealt_what_takes_them_as_long(monkeypatch):
    sizes = [100, 90, 80, 70.5, 2, 1, 3, 4]  # of consecutive halves one has nearly all
    assert dealt(sizes) == [list(range(8))]  # one process reads its rows in order
    monkeypatch.setenv("WORLD_SIZE", "2")
    shares = dealt(sizes)
    assert sorted(sum(shares, [])) == list(range(8)) and all(rows == sorted(rows) for rows in shares)
    loads = [sum(sizes[row] for row in rows) for rows in shares]
    assert abs(loads[0] - loads[1]) < 2
