"""Prompts of a forward in one row: those of like lengths attend in one call, and say what each says alone."""

from __future__ import annotations

import pytest
import torch

from fastrlhf.rollout.attention import attend_inside_prompts
from fastrlhf.rollout.kv_cache import Packed, SlotCache
from tests.operators import Operators

LENGTHS = [1, 1, 2, 3, 3, 5, 7, 7, 15, 16, 40]
CPU = torch.device("cpu")


@pytest.mark.parametrize("window, softcap", [(None, None), (4, None), (None, 5.0), (6, 5.0)])
def test_like_lengths_attend_together(window, softcap):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, sum(LENGTHS), 8) for heads in (4, 2, 2))
    found, calls = [], []
    for ragged in (1.0, 2.0, 100.0):
        packed = Packed.of(LENGTHS, list(range(len(LENGTHS))), CPU, ragged)
        calls.append(len(packed.segments))
        found.append(attend_inside_prompts(packed.segments, query, key, value, 0.3, window, softcap))
    assert calls == [len(set(LENGTHS)), 5, 1]  # 1 1 2 | 3 3 5 | 7 7 | 15 16 | 40
    for together in found[1:]:
        torch.testing.assert_close(together, found[0], atol=1e-6, rtol=1e-5)


def test_a_prompt_sees_no_other():
    query, key, value = (torch.randn(1, 2, sum(LENGTHS), 8) for _ in range(3))
    segments = Packed.of(LENGTHS, list(range(len(LENGTHS))), CPU, 100.0).segments
    before = attend_inside_prompts(segments, query, key, value, 0.3)
    ends = torch.tensor(LENGTHS).cumsum(0)
    changed = slice(int(ends[4]), int(ends[5]))  # the prompt of 5 tokens
    key[:, :, changed] += 1
    value[:, :, changed] -= 1
    same = (attend_inside_prompts(segments, query, key, value, 0.3) == before).all(-1).all(-1)[0]
    assert not same[changed].any() and same[: changed.start].all() and same[changed.stop :].all()


def test_every_token_has_its_place_in_the_cache():
    packed = Packed.of([2, 3, 3], [7, 4, 9], CPU, 2.0)
    assert packed.slots.tolist() == [7, 7, 4, 4, 4, 9, 9, 9] and packed.positions.tolist() == [0, 1, 0, 1, 2, 0, 1, 2]


def test_many_lengths_are_few_launches():
    """32 prompts of 26 lengths: the attention of a layer."""
    lengths = [10 + 190 * i // 25 for i in range(26)]
    lengths = sorted(lengths + lengths[:6])
    query, key, value = (torch.randn(1, heads, sum(lengths), 8) for heads in (4, 2, 2))
    counts = {}
    for ragged in (1.0, 2.0):
        segments = Packed.of(lengths, list(range(32)), CPU, ragged).segments
        with Operators() as operators:
            attend_inside_prompts(segments, query, key, value, 0.3)
        counts[ragged] = operators.names.total()
    assert counts == {1.0: 52, 2.0: 24}


def test_all_samples_of_all_prompts_are_copied_at_once():
    """As many launches for five slots as for one, and each gets its own."""
    cache, counts = SlotCache(3, 12, 6), []
    for layer in cache.layers:
        layer.lazy_initialization(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4))
        layer.keys.copy_(torch.arange(12.0).view(12, 1, 1, 1).expand_as(layer.keys))
    for sources, targets in (([0], [6]), ([1, 1, 1, 2, 3], [7, 8, 9, 10, 11]), ([], [])):
        with Operators() as operators:
            cache.copy(sources, targets, 4)
        counts.append(operators.names.total())
    assert counts[0] == counts[1] > 0 == counts[2]
    for layer in cache.layers:
        assert layer.keys[6:, 0, 0, 0].tolist() == [0, 1, 1, 1, 2, 3]
        assert layer.keys[6:, 4, 0, 0].tolist() == [6, 7, 8, 9, 10, 11]  # behind the length nothing is written
