"""The engine's slots: who waits, who takes a place, what is computed how often, and what memory that needs."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from fastrlhf.rollout import decoder
from fastrlhf.rollout import decoder as decoding
from fastrlhf.rollout.cuda_graphs import StepGraphs, bucket_of
from fastrlhf.rollout.engine import RolloutEngine
from fastrlhf.rollout.sampling import Generation, SamplingParams
from tests import tiny

SHORT, LONG = 3, 24


@pytest.fixture(scope="module")
def llama():
    return tiny.llama()


def prompts(count: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 20, (count,), generator=draw).tolist()
    return [torch.randint(3, 320, (length,), generator=draw).tolist() for length in lengths]


def forced(monkeypatch: pytest.MonkeyPatch, lengths: list[int]) -> None:
    """Sequence i draws the stop token (2) as its lengths[i]-th token, and not before."""
    real, ends = decoding.sample_tokens, torch.tensor(lengths)

    def draw(logits, *, offset, stream, **options):
        sampled = real(logits, offset=offset, stream=stream, **options)
        tokens = torch.where(offset + 1 >= ends[stream], 2, sampled.tokens.clamp(min=3))
        return sampled._replace(tokens=tokens)

    monkeypatch.setattr(decoding, "sample_tokens", draw)


def same(one: Generation, other: Generation) -> None:
    assert one.response_ids == other.response_ids and one.finished == other.finished
    for a, b in zip(one.policy_log_probs, other.policy_log_probs, strict=True):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=0)


def test_no_step_is_spent_on_sequences_that_ended_or_places_that_wait(llama, monkeypatch):
    """Log-normal lengths, the longest many times the median: rows x steps within a tenth of the true lengths."""
    draw = torch.Generator().manual_seed(1)
    lengths = (12 * torch.exp(0.7 * torch.randn(60, generator=draw))).round().clamp(1, 60).long().tolist()
    forced(monkeypatch, lengths)
    engine = RolloutEngine(llama, max_batch_tokens=8 * 80)
    out = engine.generate(prompts(60), SamplingParams(60, stop_token_ids=[2]))
    assert [len(reply) for reply in out.response_ids] == lengths
    needed = sum(lengths) - len(lengths)  # the last token of a reply is not fed back
    assert needed <= out.stats["decode_row_steps"] <= 1.1 * needed
    assert out.stats["decode_steps"] <= 1.35 * needed / 8  # places are refilled: the batch stays full till the end
    assert out.stats["prefill_tokens"] == sum(map(len, prompts(60)))


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 8])
def test_samples_of_a_prompt_share_one_prefill_however_few_places_there_are(llama, monkeypatch, budget):
    """7 samples a prompt, of different lengths: those that wait find the prompt's keys and values kept for them."""
    lengths = [1 + (5 * i) % 11 for i in range(28)]
    forced(monkeypatch, lengths)
    params = SamplingParams(12, n=7, stop_token_ids=[2], seed=3)
    asked = prompts(4)
    positions = max(map(len, asked)) + 12
    whole = RolloutEngine(llama).generate(asked, params)
    split = RolloutEngine(llama, max_batch_tokens=budget * positions).generate(asked, params)
    same(whole, split)
    assert whole.stats["prefill_tokens"] == split.stats["prefill_tokens"] == sum(map(len, asked))


def test_the_cache_keeps_within_its_budget(llama, monkeypatch):
    sizes = []
    original = decoder.Decoder.run
    monkeypatch.setattr(
        decoder.Decoder, "run", lambda self, rows: sizes.append((self.cache.slots, self.cache.positions))
        or original(self, rows)
    )  # fmt: skip
    for budget in (64, 100, 200, 10_000):
        RolloutEngine(llama, max_batch_tokens=budget).generate(prompts(6), SamplingParams(12, n=3, stop_token_ids=[]))
    assert all(slots * positions <= budget for (slots, positions), budget in zip(sizes, (64, 100, 200, 10_000)))
    assert sizes[-1][0] == 18


def test_any_chunking_of_the_prompts_gives_the_same(llama, monkeypatch):
    params = SamplingParams(6, stop_token_ids=[], seed=1)
    whole = RolloutEngine(llama).generate(prompts(12), params)
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 25)
    forwards = []
    handle = llama.model.register_forward_pre_hook(
        lambda module, args, kwargs: forwards.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        same(whole, RolloutEngine(llama).generate(prompts(12), params))
    finally:
        handle.remove()
    packed = forwards[: -(6 - 1)]
    assert len(packed) > 3 and sum(packed) == sum(map(len, prompts(12))) and max(packed) <= 25


def test_rarer_looks_of_the_host_change_nothing(llama, monkeypatch):
    """As on a GPU: sequences that ended go on, unseen, until the host looks."""
    forced(monkeypatch, [1 + (7 * i) % 13 for i in range(20)])
    params = SamplingParams(13, n=2, stop_token_ids=[2], seed=5)
    each = RolloutEngine(llama, max_batch_tokens=6 * 40).generate(prompts(10), params)
    plain = decoder.Decoder.__init__

    def patient(self, *args):
        plain(self, *args)
        self.steps = 4

    monkeypatch.setattr(decoder.Decoder, "__init__", patient)
    same(each, RolloutEngine(llama, max_batch_tokens=6 * 40).generate(prompts(10), params))


@pytest.mark.parametrize("fails", [False, True])
def test_steps_replayed_in_buckets_give_the_same(llama, monkeypatch, caplog, fails):
    """With a stand-in for the CUDA graph: fixed addresses, rows that only fill the bucket, and the way back."""
    forced(monkeypatch, [1 + (7 * i) % 13 for i in range(40)])
    params = SamplingParams(13, n=4, stop_token_ids=[2], seed=5)
    plain = RolloutEngine(llama, max_batch_tokens=14 * 40).generate(prompts(10), params)
    recorded, construct = [], decoder.Decoder.__init__

    def capture(step):
        if fails and len(recorded) == 1:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        hidden = step()
        recorded.append(len(hidden))
        return (lambda: hidden.copy_(step())), hidden

    def init(self, *args):
        construct(self, *args)
        self.steps = 3
        self.graphs = StepGraphs(lambda count: self._step(count, self.cache.positions), self.slots, capture)

    monkeypatch.setattr(decoder.Decoder, "__init__", init)
    with caplog.at_level(logging.WARNING):
        same(plain, RolloutEngine(llama, max_batch_tokens=14 * 40).generate(prompts(10), params))
    assert len(recorded) == len(set(recorded)) and set(recorded) <= {1, 2, 4, 8, 12, 16, 18}  # 18 places
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


def test_out_of_memory_halves_the_batch_once_and_keeps_what_had_ended(llama, monkeypatch, caplog):
    forced(monkeypatch, lengths := [SHORT, LONG] * 4)
    params = SamplingParams(LONG, stop_token_ids=[2], seed=2)
    good = RolloutEngine(llama).generate(prompts(8), params)
    forward, calls = decoder.Decoder._forward, []

    def failing(self):
        calls.append(len(self.rows))
        if len(calls) == SHORT + 4:
            raise torch.OutOfMemoryError("no memory")
        forward(self)

    monkeypatch.setattr(decoder.Decoder, "_forward", failing)
    with caplog.at_level(logging.WARNING):
        out = RolloutEngine(llama).generate(prompts(8), params)
    same(out, good)
    assert [len(reply) for reply in out.response_ids] == lengths
    assert "out of memory with 8 sequences: again with 4" in caplog.text
    assert out.stats["prefill_tokens"] == sum(map(len, prompts(8))) + sum(map(len, prompts(8)[1::2]))
    monkeypatch.setattr(decoder.Decoder, "_forward", lambda self: (_ for _ in ()).throw(torch.OutOfMemoryError("x")))
    with pytest.raises(torch.OutOfMemoryError):
        RolloutEngine(llama).generate(prompts(8), params)
    assert llama.config._attn_implementation != "fastrlhf"
