"""Decoder layers compiled for decoding: as many kernels as there must be, the same replies, nothing left behind.

torch's compiler makes C++ here; each graph takes seconds, so one test looks at all that one compilation shows.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from bench.regions import kernels
from fastrlhf import RolloutEngine, SamplingParams
from fastrlhf.config.errors import UserError
from fastrlhf.rollout import compiled, parity
from fastrlhf.rollout.parity import Difference
from tests import tiny
from tests.rollout.test_rollout_models import bloom, make

PROMPTS = [[5, 9, 3], [7, 4, 8, 2, 6], [11]]
PARAMS = SamplingParams(6, temperature=0.0, stop_token_ids=[])


def same(model, engine: RolloutEngine, prompts=PROMPTS) -> None:
    """The engine generates what one that compiles nothing does."""
    plain, ours = RolloutEngine(model).generate(prompts, PARAMS), engine.generate(prompts, PARAMS)
    assert ours.response_ids == plain.response_ids
    for one, other in zip(ours.policy_log_probs, plain.policy_log_probs, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=0)


def test_one_graph_of_all_layers_in_eleven_kernels_says_the_same(caplog):
    """Also after an update of the weights, whose joined copies are made anew; the model keeps its own modules."""
    model = tiny.llama(num_hidden_layers=3)
    names, before = list(model.state_dict()), counters["stats"]["unique_graphs"]
    with kernels() as graphs:
        engine = RolloutEngine(model, compile=True)
        assert engine.check(32) == ""
        same(model, engine)
    assert [len(graph) for graph in graphs] == [11] and counters["stats"]["unique_graphs"] == before + 1
    assert len(engine.compilation.regions.joined) == 6
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(torch.tensor(PROMPTS[1:2])).logits.square().sum().backward()
    optimizer.step()
    same(model, engine)
    same(model, engine, PROMPTS + PROMPTS[:2])
    assert counters["stats"]["unique_graphs"] == before + 1
    assert list(model.state_dict()) == names and type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert not [module for module in model.modules() if "forward" in vars(module)]

    def too_often(*_: object) -> None:
        raise torch._dynamo.exc.FailOnRecompileLimitHit("8")

    engine.compilation.regions.step = too_often
    same(model, engine)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("fastrlhf")] == [
        "the layers of LlamaForCausalLM changed too often to be compiled: they decode as they are"
    ]
    engine.release()
    assert engine.compilation.tensors() == []


def test_without_joined_weights_a_layer_is_fourteen_kernels(monkeypatch):
    monkeypatch.setattr(compiled, "JOINED_SHARE", 0.0)
    model = tiny.llama(num_hidden_layers=1)
    with kernels() as graphs:
        same(model, RolloutEngine(model, compile=True))
    assert [len(graph) for graph in graphs] == [14], graphs


def test_compile_without_a_compiler_is_one_sentence(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError) as raised:
        RolloutEngine(tiny.llama(), compile=True)
    assert str(raised.value) == (
        "compile = true: torch.compile needs a compiler, and no-such-compiler is not on the PATH; install it, or use "
        "compile = false"
    )


def test_auto_compiles_nothing_on_a_cpu():
    engine = RolloutEngine(tiny.llama(), compile=None)
    assert engine.check(32) == "" and engine.compilation.settled and engine.compilation.regions is None


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (bloom, "BloomForCausalLM decodes without a cache of keys and values"),
        (partial(make, "Llama"), "its decoding differs from its plain forward by 0.5 nats at position 3 of 9"),
    ],
)
def test_a_model_that_cannot_be_compiled_is_refused_or_left(monkeypatch, model, reason):
    """Asked for: an error; where it is the default: a sentence, once, and the model as it is."""
    model, other = model(), Difference(0.5, 3, 9, False)
    RolloutEngine(model).check(32)
    monkeypatch.setattr(parity, "compare", lambda *_: other)
    with pytest.raises(UserError) as raised:
        RolloutEngine(model, compile=True).check(32)
    assert str(raised.value) == f"compile = true: {reason}; use compile = auto or false"
    engine = RolloutEngine(model, compile=None)
    engine.compilation.settled = False  # as on a GPU
    assert engine.check(32) == f"decoding is not compiled: {reason}" and engine.check(32) == ""
    monkeypatch.undo()
    assert engine.generate(PROMPTS, PARAMS).response_ids == RolloutEngine(model).generate(PROMPTS, PARAMS).response_ids
