"""A decoder run without an engine: with looks of the host as rare, and steps replayed, as on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrlhf.models.heads import lm_head
from fastrlhf.rollout.attention import attending
from fastrlhf.rollout.cuda_graphs import Capture, StepGraphs
from fastrlhf.rollout.decoder import Decoder, replayable
from fastrlhf.rollout.engine import STATS, RolloutEngine, position_limits
from fastrlhf.rollout.kv_cache import SlotCache
from fastrlhf.rollout.sampling import Generation, SamplingParams
from fastrlhf.rollout.slots import Row, Slots
from fastrlhf.rollout.trunk import CachedTrunk


def decode(
    model: PreTrainedModel,
    prompts: list[list[int]],
    params: SamplingParams,
    slots: int,
    *,
    capture: Capture | None = None,
    **how: object,
) -> Generation:
    """As the engine does, in so many slots and one for a prompt whose samples wait; how: steps, capture."""
    rows = [Row(tuple(prompt), i * params.n + j) for i, prompt in enumerate(prompts) for j in range(params.n)]
    positions = max(map(len, prompts)) + params.max_new_tokens
    cache = SlotCache(model.config.num_hidden_layers, slots + 1, positions)
    stats = dict.fromkeys(STATS, 0)
    with torch.inference_mode(), attending(model, cache):
        trunk, state = CachedTrunk(model, cache), Slots(slots, params.max_new_tokens, model.device)
        if capture is not None:
            how["graphs"] = StepGraphs(replayable(trunk, state), slots, capture)
        Decoder(trunk, lm_head(model), state, params, stats, **how).run(rows)
    return Generation(
        response_ids=[row.tokens for row in rows],
        log_probs=[row.log_probs for row in rows],
        policy_log_probs=[row.policy_log_probs for row in rows],
        finished=[row.finished for row in rows],
        stats=stats,
    )


def replayed(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A stand-in for a CUDA graph: every replay fills the tensor of the first run."""
    hidden = step()
    return (lambda: hidden.copy_(step())), hidden


@contextmanager
def before_forwards(model: PreTrainedModel, look: Callable[..., None]):
    """look(**kwargs) is called with what the trunk is given, before each of its forwards; it may raise. The engine's
    check of the model, which is once a model, lies before."""
    RolloutEngine(model).check(int(min(128, position_limits(model))))
    handle = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: look(**kwargs) and None, with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()


def cache_in(inputs: dict[str, object]) -> SlotCache:
    """The cache among the trunk's arguments, whatever this transformers calls it."""
    return next(value for value in inputs.values() if isinstance(value, SlotCache))
