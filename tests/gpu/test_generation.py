"""Generation as only a GPU runs it: layers compiled, steps replayed from CUDA graphs that outlive a rollout.

No GPU has run this file yet.
"""

from __future__ import annotations

import pytest
import torch

from fastrlhf import RolloutEngine, SamplingParams
from fastrlhf.models.offload import Offload
from tests import tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PROMPTS = [[5, 9, 3], [7, 4, 8, 2, 6], [11], [3, 3, 8]]
PARAMS = SamplingParams(9, n=2, temperature=0.0, stop_token_ids=[])


def test_compiled_layers_in_graphs_say_what_plain_decoding_says_and_outlive_a_rollout():
    model = tiny.llama(num_hidden_layers=3).cuda()
    engine = RolloutEngine(model, compile=True)
    assert engine.check(32) == "" and engine.compilation.regions.joined
    graphs = []
    for _ in range(2):
        plain, ours = RolloutEngine(model).generate(PROMPTS, PARAMS), engine.generate(PROMPTS, PARAMS)
        assert ours.response_ids == plain.response_ids
        for one, other in zip(ours.policy_log_probs, plain.policy_log_probs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
        engine.release()
        graphs.append(engine._kept.graphs)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.1)
    assert graphs[0] is graphs[1] and not graphs[0].failed and sorted(graphs[0].graphs) == [1, 2, 4, 8]
    assert engine.give_up() and engine.cache is None


def test_a_model_fetched_on_the_side_stream_is_whole():
    model, ids = tiny.llama().requires_grad_(False).cuda(), torch.arange(5, device="cuda")[None]
    want, offload = model(ids).logits, Offload(torch.device("cuda"))
    offload.park(model)
    assert offload.fetch(model) and not next(model.parameters()).is_cuda
    with offload.here(model):
        assert torch.equal(model(ids).logits, want)
    assert not next(model.parameters()).is_cuda
