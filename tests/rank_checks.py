"""What two ranks check of parallel = fsdp, in processes that `tests/rank_runs.py` starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch.distributed.tensor import DTensor

from fastrlhf.data.feedback import Prompt
from fastrlhf.models.loading import scalar_model
from fastrlhf.parallel import sharding
from fastrlhf.rollout.engine import RolloutEngine
from fastrlhf.rollout.result import idle_share
from fastrlhf.rollout.sampling import Generation, SamplingParams
from fastrlhf.runtime import distributed
from fastrlhf.runtime.batching import shard
from tests import tiny


@contextmanager
def small_memory() -> Iterator[None]:
    """As where no model fits whole beside the shares."""
    with mock.patch.object(sharding, "fits_whole", lambda held, weights, memory: False):
        yield


def check_layer_by_layer() -> None:
    """Tokens, log-probs and scores of a model whose layers are gathered as they run are those of one that is gathered
    whole, to the bit: with more steps in one rank than in the other, with rows in one rank alone, and decoding without
    a cache. No more than one layer is there at a time."""
    model = sharding.shard(tiny.llama(seed=7, num_hidden_layers=4).requires_grad_(True))
    judge = sharding.shard(scalar_model(tiny.llama(), tiny.tokenizer(), seed=3).requires_grad_(False))
    layers, most, forwards = sharding.layers_of(model), [0], [0]

    def count(*_: object) -> None:
        there = sum(not isinstance(next(layer.parameters()), DTensor) for layer in layers)
        most[0], forwards[0] = max(most[0], there), forwards[0] + 1

    for layer in layers:
        next(layer.children()).register_forward_pre_hook(count)
    ragged = [[5 + i] * (1 + 3 * i) for i in range(5)]
    for prompts, stops in ((ragged, range(0, 40)), (ragged, ()), ([[9, 4]], range(0, 20))):
        whole = generate(model, prompts, stops)
        most[0] = forwards[0] = 0
        with small_memory():
            layered = generate(model, prompts, stops)
        assert most[0] == (1 if len(prompts) > 1 or distributed.rank() == 1 else 0)  # none without a row
        assert layered.response_ids == whole.response_ids
        for name in ("log_probs", "policy_log_probs"):
            for a, b in zip(getattr(layered, name), getattr(whole, name), strict=True):
                assert torch.equal(a, b)
        each = distributed.gather(torch.tensor([forwards[0]])).tolist()
        assert len(set(each)) == (2 if len(stops) else 1), each  # one rank went on alone
    with small_memory():
        check_two_models_in_turns(model, judge)
    with sharding.gathered(model):  # and all of it again
        assert not any(isinstance(p, DTensor) for p in model.parameters())


def check_balance() -> None:
    """A rank that is expected to sample long replies gets fewer prompts; who samples what changes no token, and what
    comes back stands in the order of the prompts."""
    tokenizer, model = tiny.tokenizer(), tiny.llama(seed=7)
    prompts = [(Prompt(prompt=str(i)), [5 + i] * (1 + i)) for i in range(6)]
    asked: list[list[int]] = []

    class Watched(RolloutEngine):
        def generate(self, prompt_ids, params, **where):
            asked.append([*where["numbers"]])
            return super().generate(prompt_ids, params, **where)

    params = SamplingParams(max_new_tokens=9, n=2, stop_token_ids=tuple(range(30)), seed=4)
    engine = Watched(model, tokenizer)
    even = engine.rollout(prompts, params)
    uneven = engine.rollout(prompts, params, expected=[30, 1, 1, 1, 1, 1])
    assert asked[1] == [[0], [1, 2, 3, 4, 5]][distributed.rank()] != asked[0]
    alone = RolloutEngine(model, tokenizer).generate([ids for _, ids in prompts], params)
    for rollout in (even, uneven):
        assert rollout.response_ids == alone.response_ids and rollout.finished == alone.finished
        for ours, theirs in zip(rollout.policy_log_probs, alone.policy_log_probs, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert 0 <= rollout.idle < 0.5  # of two ranks
    assert idle_share(3.0 if distributed.rank() else 1.0) == 1 - 2 / 3


def generate(model: torch.nn.Module, prompts: list[list[int]], stops: range | tuple[()]) -> Generation:
    params = SamplingParams(max_new_tokens=12, n=2, stop_token_ids=tuple(stops), seed=3)
    mine = shard(len(prompts))
    return RolloutEngine(model).generate(prompts[mine], params, numbers=range(mine.start, mine.stop))


def check_two_models_in_turns(one: torch.nn.Module, two: torch.nn.Module) -> None:
    """Ranks that run two models in other orders, and not as often."""
    ids = torch.arange(6)[None]
    order = [one, two, two, one] if distributed.rank() == 0 else [two, one]
    said: dict[int, torch.Tensor] = {}
    with sharding.gathered(one, two):
        assert sharding.is_layered(one) and sharding.is_layered(two)
        for model in order:
            with sharding.reading(model):
                hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            assert torch.equal(said.setdefault(id(model), hidden), hidden)
    assert not sharding.is_layered(one) and not sharding.is_whole(one)
    with sharding.gathered(one), sharding.reading(one):  # still small: the other rank has as many forwards here
        hidden = one.base_model(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.equal(hidden, said[id(one)])
