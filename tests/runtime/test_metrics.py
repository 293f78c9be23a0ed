"""Sums behind the metrics, counted by hand."""

from __future__ import annotations

import pytest

from fastrlhf.runtime.metrics import distinct_2


@pytest.mark.parametrize(
    ("responses", "distinct", "all_of_them"),
    [
        (["the cat saw The Cat"], 3, 4),  # the cat, cat saw, saw the, the cat: letters' case does not matter
        (["雨伞好", "雨伞"], 2, 3),  # single characters, and no bigram across two replies
        (["don't stop!", "用Wi用"], 4, 4),  # don't stop, stop !; 用 wi, wi 用
        (["yes", "", "是"], 0, 1),
        ([], 0, 1),
    ],
)
def test_distinct_2_by_hand(responses, distinct, all_of_them):
    assert distinct_2(responses) == distinct / all_of_them


def test_copies_of_one_reply_have_little_distinct_2():
    varied = [f"reply {i} is about topic {i + 50}" for i in range(20)]
    assert distinct_2(varied[:1] * 20) < distinct_2(varied) / 5
