"""The engine's slots: who waits, who takes a place, what is computed how often, and what memory that needs."""

from __future__ import annotations

import gc
import logging
import math
import weakref

import pytest
import torch

from fastrlhf.rollout import trunk
from fastrlhf.rollout.cuda_graphs import bucket_of
from fastrlhf.rollout.engine import RolloutEngine
from fastrlhf.rollout.kv_cache import SlotCache
from fastrlhf.rollout.sampling import Generation, SamplingParams
from tests import tiny
from tests.rollout.decoding import before_forwards, cache_in, decode, replayed
from tests.rollout.test_rollout_models import bloom

STOPS = list(range(0, 320, 12))  # about one token in twelve: replies of very different lengths


@pytest.fixture(scope="module")
def llama():
    return tiny.llama()


def prompts(count: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 20, (count,), generator=draw).tolist()
    return [torch.randint(3, 320, (length,), generator=draw).tolist() for length in lengths]


def same(one: Generation, other: Generation) -> None:
    assert one.response_ids == other.response_ids and one.finished == other.finished
    for a, b in zip(one.policy_log_probs, other.policy_log_probs, strict=True):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=0)


def test_no_step_is_spent_on_sequences_that_ended_or_places_that_wait(llama):
    """The longest reply is many times the median: rows x steps within a tenth of the true lengths."""
    engine = RolloutEngine(llama, max_batch_tokens=8 * 80)
    out = engine.generate(prompts(60), SamplingParams(60, stop_token_ids=STOPS))
    lengths = sorted(map(len, out.response_ids))
    assert lengths[-1] > 5 * lengths[30]
    needed = sum(lengths) - len(lengths)  # the last token of a reply is not fed back
    assert needed <= out.stats["decode_row_steps"] <= 1.1 * needed
    assert out.stats["decode_steps"] <= 1.35 * needed / 8  # places are refilled: the batch stays full till the end
    assert out.stats["prefill_tokens"] == sum(map(len, prompts(60)))


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 8])
def test_samples_of_a_prompt_share_one_prefill_however_few_places_there_are(llama, budget):
    """7 samples a prompt, of different lengths: those that wait find the prompt's keys and values kept for them."""
    params = SamplingParams(12, n=7, stop_token_ids=STOPS[::2], seed=3)
    asked = prompts(4)
    positions = max(map(len, asked)) + 12
    whole = RolloutEngine(llama).generate(asked, params)
    assert len(set(map(len, whole.response_ids))) > 4
    split = RolloutEngine(llama, max_batch_tokens=budget * positions).generate(asked, params)
    same(whole, split)
    assert whole.stats["prefill_tokens"] == split.stats["prefill_tokens"] == sum(map(len, asked))


@pytest.mark.parametrize("budget", [64, 100, 200, 10_000])
def test_the_cache_keeps_within_its_budget(llama, budget):
    engine = RolloutEngine(llama, max_batch_tokens=budget)
    engine.generate(prompts(6), SamplingParams(12, n=3, stop_token_ids=[]))
    assert engine.cache.slots * engine.cache.positions <= budget
    assert engine.cache.slots == 18 or budget < 10_000


def test_any_chunking_of_the_prompts_gives_the_same(llama, monkeypatch):
    params = SamplingParams(6, stop_token_ids=[], seed=1)
    whole = RolloutEngine(llama).generate(prompts(12), params)
    sizes = []
    # A patch: the size is a constant, and prompts of 8192 tokens are too many for a test.
    monkeypatch.setattr(trunk, "PREFILL_TOKENS", 25)
    with before_forwards(llama, lambda input_ids, **_: sizes.append(input_ids.numel())):
        same(whole, RolloutEngine(llama).generate(prompts(12), params))
    packed = sizes[: -(6 - 1)]
    assert len(packed) > 3 and sum(packed) == sum(map(len, prompts(12))) and max(packed) <= 25


def test_rarer_looks_of_the_host_change_nothing(llama):
    """As on a GPU: sequences that ended go on, unseen, until the host looks."""
    params = SamplingParams(13, n=2, stop_token_ids=STOPS, seed=5)
    each = RolloutEngine(llama).generate(prompts(10), params)
    same(each, decode(llama, prompts(10), params, 6))
    rare = decode(llama, prompts(10), params, 6, steps=4)
    same(each, rare)
    assert rare.stats["decode_row_steps"] > sum(map(len, each.response_ids))


@pytest.mark.parametrize("fails", [False, True])
def test_steps_replayed_in_buckets_give_the_same(llama, caplog, fails):
    """With a stand-in for the CUDA graph: fixed addresses, rows that only fill the bucket, and the way back."""
    params = SamplingParams(13, n=4, stop_token_ids=STOPS, seed=5)
    plain = RolloutEngine(llama).generate(prompts(10), params)
    recorded = []

    def capture(step):
        if fails and len(recorded) == 1:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        replay, hidden = replayed(step)
        recorded.append(len(hidden))
        return replay, hidden

    with caplog.at_level(logging.WARNING):
        same(plain, decode(llama, prompts(10), params, 18, steps=3, capture=capture))
    assert len(recorded) == len(set(recorded)) and set(recorded) <= {1, 2, 4, 8, 12, 16, 18}
    assert (len(recorded) == 1) is fails
    assert ("decoding without CUDA graphs: operation not permitted when stream is capturing" in caplog.text) is fails


def test_buckets():
    assert [bucket_of(n, 1000) for n in (1, 2, 3, 5, 8, 9, 12, 13, 17, 25, 33, 49, 64, 65)] == [
        1, 2, 4, 8, 8, 12, 12, 16, 24, 32, 48, 64, 64, 96
    ]  # fmt: skip
    assert bucket_of(49, 50) == 50
    assert all(n <= bucket_of(n, 400) <= max(8, 1.5 * n) for n in range(1, 401))


def test_a_used_cache_is_as_good_as_a_new_one_and_given_back(llama):
    engine = RolloutEngine(llama)
    params = SamplingParams(8, n=2, stop_token_ids=[])
    engine.generate(prompts(5), SamplingParams(8, n=2, stop_token_ids=[], seed=9))
    kept = engine.cache
    again = engine.generate(prompts(5), params)
    assert engine.cache is kept
    fresh = RolloutEngine(llama).generate(prompts(5), params)
    assert again.response_ids == fresh.response_ids
    assert all(map(torch.equal, again.log_probs, fresh.log_probs))
    engine.release()
    assert engine.cache is None
    same(engine.generate(prompts(5), params), fresh)


@pytest.fixture
def no_collector():
    """Memory comes free by reference counts alone."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_the_memory_of_the_cache_is_free_at_once(llama, no_collector):
    """A circle would keep gigabytes through scoring and update, until Python's collector happens to run."""
    engine = RolloutEngine(llama)
    engine.generate(prompts(3), SamplingParams(4))
    keys = weakref.ref(engine.cache.layers[0].keys)
    engine.release()
    assert keys() is None
    caches = []

    def capture(step):
        caches.append(weakref.ref(step.args[0].cache))
        return replayed(step)

    decode(llama, prompts(3), SamplingParams(4, stop_token_ids=[]), 3, capture=capture)
    assert [cache() for cache in caches] == [None] * 3


def test_nan_weights_do_not_outlive_themselves_in_the_cache(llama):
    engine = RolloutEngine(llama)
    params = SamplingParams(4, stop_token_ids=[])
    good = engine.generate(prompts(3), params)
    weight = llama.model.layers[0].self_attn.v_proj.weight
    before = weight.detach().clone()
    weight.data.fill_(math.nan)
    engine.generate(prompts(3), params)
    weight.data.copy_(before)
    same(engine.generate(prompts(3), params), good)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_cache_says_how_long_it_is(kind):
    """What a model may ask: before a decoding step, the tokens of the longest sequence; before prompts, nothing."""
    model, lengths = getattr(tiny, kind)(), []
    with before_forwards(model, lambda **inputs: lengths.append(cache_in(inputs).get_seq_length())):
        RolloutEngine(model).generate([[5, 6, 7], [8]], SamplingParams(4, stop_token_ids=[]))
    assert lengths == [0, 3, 4, 5]
    cache = SlotCache(1, 2, 8)
    cache.decode(torch.arange(2), torch.tensor([1, 4]), 5)
    assert cache.get_seq_length() == 4


# ------------------------------------------------------------------------------------------------- out of memory

MESSAGES = [
    "CUDA out of memory. Tried to allocate 2.00 GiB",
    "CUDA error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
    "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes",
]
FAILURES = {"torch's own": torch.OutOfMemoryError("no memory"), **{text[:35]: RuntimeError(text) for text in MESSAGES}}


def failing(error: Exception, when):
    """For `before_forwards`: raises where when(rows of the forward) says so; prompts are packed in one row."""

    def look(input_ids, **_: object) -> None:
        if when(len(input_ids)):
            raise error

    return look


@pytest.mark.parametrize("error", FAILURES.values(), ids=FAILURES)
def test_out_of_memory_halves_the_batch_until_it_fits(llama, caplog, error):
    """8 and 4 sequences are too many, 2 fit: whatever the allocator said."""
    params = SamplingParams(8, stop_token_ids=STOPS, seed=2)
    good = RolloutEngine(llama).generate(prompts(8), params)
    with caplog.at_level(logging.WARNING), before_forwards(llama, failing(error, lambda rows: rows > 2)):
        engine = RolloutEngine(llama)
        same(engine.generate(prompts(8), params), good)
    assert [record.getMessage() for record in caplog.records] == [
        "generation ran out of memory with 8 sequences: again with 4",
        "generation ran out of memory with 4 sequences: again with 2",
    ]
    assert engine.cache.slots == 2


def test_out_of_memory_keeps_what_had_ended(llama):
    """The prompts of replies that were complete are not computed again."""
    params, asked, calls = SamplingParams(24, stop_token_ids=STOPS, seed=2), prompts(8), []
    good = RolloutEngine(llama).generate(asked, params)

    def once(rows: int) -> bool:
        calls.append(rows)
        return len(calls) == 8

    with before_forwards(llama, failing(torch.OutOfMemoryError("no memory"), once)):
        out = RolloutEngine(llama).generate(asked, params)
    same(out, good)
    again = [prompt for prompt, reply in zip(asked, good.response_ids, strict=True) if len(reply) > 7]
    assert 0 < len(again) < 8
    assert out.stats["prefill_tokens"] == sum(map(len, asked)) + sum(map(len, again))


@pytest.mark.parametrize("error", FAILURES.values(), ids=FAILURES)
def test_out_of_memory_with_one_sequence_is_an_error(llama, error):
    with before_forwards(llama, failing(error, lambda rows: True)), pytest.raises(type(error)) as raised:
        RolloutEngine(llama).generate(prompts(8), SamplingParams(8))
    assert raised.value is error and llama.config._attn_implementation != "fastrlhf"


def test_other_errors_pass_through_at_once(llama, caplog):
    error, calls = RuntimeError("shapes do not match"), []
    look = failing(error, lambda rows: calls.append(rows) or True)
    with before_forwards(llama, look), pytest.raises(RuntimeError, match="shapes do not match"):
        RolloutEngine(llama).generate(prompts(8), SamplingParams(8))
    assert calls == [1] and caplog.records == []


@pytest.mark.parametrize("error", [FAILURES["torch's own"], RuntimeError("CUDA error: out of memory")])
def test_a_graph_that_finds_no_memory_is_no_reason_to_go_without(llama, error):
    """It is passed on, for fewer sequences; and the self-check of a model does not call it unsupported."""

    def capture(step):
        raise error

    with pytest.raises(type(error)) as raised:
        decode(llama, prompts(2), SamplingParams(3, stop_token_ids=[]), 2, capture=capture)
    assert raised.value is error
    unsure = bloom()
    with before_forwards(unsure, failing(error, lambda rows: True)), pytest.raises(type(error)) as raised:
        RolloutEngine(unsure).generate([[5, 6]], SamplingParams(3))
    assert raised.value is error


@pytest.fixture
def as_on_a_gpu(llama, monkeypatch):
    """An engine that keeps what it made over `release`, and a list of the rows of each step that it records."""
    recorded = []

    def capture(step):
        replay, hidden = replayed(step)
        recorded.append(len(hidden))
        return replay, hidden

    engine = RolloutEngine(llama)
    monkeypatch.setattr(engine, "keeps", True)
    monkeypatch.setattr(engine, "capture", lambda: capture)
    return engine, recorded


def test_graphs_are_recorded_once_the_largest_first(llama, as_on_a_gpu):
    """They outlive rollouts, smaller ones and updates in place; not weights that moved."""
    engine, recorded = as_on_a_gpu
    params = SamplingParams(9, n=2, stop_token_ids=STOPS, seed=3)
    for round, asked in enumerate((prompts(9), prompts(9), prompts(7))):
        same(engine.generate(asked, params), RolloutEngine(llama).generate(asked, params))
        engine.release()
        with torch.no_grad():
            llama.model.layers[0].mlp.up_proj.weight.mul_(1.1)
        assert recorded == [18, 16, 12, 8, 4, 2, 1], round
    weight = llama.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data / 1.1**3
    same(engine.generate(prompts(9), params), RolloutEngine(llama).generate(prompts(9), params))
    assert recorded == 2 * [18, 16, 12, 8, 4, 2, 1]


def test_what_is_kept_is_given_up_when_memory_is_short(llama, as_on_a_gpu, monkeypatch, caplog):
    """When the update asks, and when the allocator had to look for memory since the last rollout."""
    engine, recorded = as_on_a_gpu
    params = SamplingParams(4, stop_token_ids=[])
    engine.generate(prompts(3), params)
    engine.release()
    keys = weakref.ref(engine.cache.layers[0].keys)
    assert engine.give_up() and keys() is None and not engine.give_up()
    engine.generate(prompts(3), params)
    engine.release()
    assert engine.cache is None and recorded == [3, 2, 1] * 2

    engine.keeps, retries = True, [4]
    monkeypatch.setattr("fastrlhf.rollout.engine._allocator_retries", lambda device: retries[0])
    for more, recordings in ((0, 3), (0, 3), (1, 4)):
        retries[0] += more
        engine.generate(prompts(3), params)
        engine.release()
        assert recorded == [3, 2, 1] * recordings
    assert engine.cache is None and "the GPU's memory is short" in caplog.text


def test_a_failure_that_is_not_of_recording_is_loud(llama, as_on_a_gpu, monkeypatch):
    engine, _ = as_on_a_gpu

    def capture(step):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(engine, "capture", lambda: capture)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        engine.generate(prompts(3), SamplingParams(4, stop_token_ids=[]))
