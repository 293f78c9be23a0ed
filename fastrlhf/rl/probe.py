"""Worst case first: before step 1 the largest rollout and micro-batch that the configuration allows, once.

What does not fit fails in the first minute, not in the first step that happens to draw long responses. Nothing of it
stays: no optimizer step, no random number, no gradient.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from fastrlhf.config.stages import PPOConfig
from fastrlhf.models.token_batch import TokenRows
from fastrlhf.rl.experience import Experience
from fastrlhf.rl.learner import Learner
from fastrlhf.rollout.engine import RolloutEngine, position_limits
from fastrlhf.rollout.sampling import SamplingParams
from fastrlhf.runtime import distributed
from fastrlhf.runtime.batching import shard
from fastrlhf.runtime.optim import Optimizer

MOMENT_BYTES = {"adamw": 8, "adamw8bit": 2, "paged_adamw8bit": 0}  # of a parameter, on its device


def probe_wanted(config: PPOConfig, device: torch.device) -> bool:
    """`probe` of the configuration; auto (None) is where memory is a GPU's."""
    return device.type == "cuda" if config.probe is None else config.probe


def run_probe(learner: Learner, engine: RolloutEngine, *, joined: bool, note: Callable[[str], None]) -> None:
    """Generation and update at the longest sequences; one line about it to `note`.

    UserError when even micro-batches of 1/32 of the budget do not fit.
    """
    start, device, config = time.monotonic(), learner.device, learner.config
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    prompt, response = longest(config, engine)
    _generate(config, engine, prompt, response)
    drawn = None if learner.ptx is None else learner.ptx.state()
    rows = learner.memory.attempt(lambda: _update(learner, prompt, response, joined), undo=learner.drop_gradients)
    if drawn is not None:  # the rows of the pretraining mix that it trained on are still to come
        learner.ptx.load_state(drawn)
    peak = f", peak {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB" if device.type == "cuda" else ""
    note(
        f"probe: an update on {rows} sequences of {prompt + response} tokens fits{peak} "
        f"({time.monotonic() - start:.1f} s)"
    )


def longest(config: PPOConfig, engine: RolloutEngine) -> tuple[int, int]:
    """Tokens of the longest prompt and response allowed; both together fit the model's positions."""
    positions = min(position_limits(engine.model), config.max_prompt_tokens + config.max_new_tokens)
    response = min(config.max_new_tokens, positions - 1)
    return positions - response, response


def _generate(config: PPOConfig, engine: RolloutEngine, prompt: int, response: int) -> None:
    """The whole cache of a rollout is made and every prompt computed; each token ends a response, so the first does."""
    vocabulary = engine.model.get_output_embeddings().weight.shape[0]
    ids = engine.model.get_input_embeddings().weight.shape[0]
    samples = config.samples_per_prompt
    mine = shard(config.rollout_batch_size // samples)
    prompts = [[i % ids] * prompt for i in range(mine.start, mine.stop)]
    every = range(vocabulary)
    engine.generate(prompts, SamplingParams(response, n=samples, temperature=0.0, stop_token_ids=every))
    engine.release()


def _update(learner: Learner, prompt: int, response: int, joined: bool) -> int:
    """Gradients of one micro-batch for each optimizer, dropped again -> its rows."""
    config, budget = learner.config, learner.memory.tokens
    ranks = distributed.size()
    rows = ranks * max(1, min(-(-config.mini_batch_size // ranks), budget // (prompt + response)))  # as many in each
    token_rows, experience = _stand_in(rows, prompt, response, joined, learner.device)
    critic = learner.critic
    passes = [{"policy": True, "critic": critic is not None and critic.shares_trunk}]
    if critic is not None and not critic.shares_trunk:
        passes.insert(0, {"policy": False, "critic": True})
    moments = [moments_to_come(optimizer, config) for optimizer in learner.optimizers()]
    for which in passes:
        mixed = learner.ptx.draw() if which["policy"] and learner.ptx is not None else ()
        learner.accumulate(token_rows, experience, list(range(rows)), mixed, **which)
        learner.drop_gradients()
    del moments
    return rows


def moments_to_come(optimizer: Optimizer, config: PPOConfig) -> torch.Tensor:
    """As many bytes as the optimizer's state will take from its first step on."""
    missing = [p for p in optimizer.masters if p not in optimizer.inner.state]
    count = sum(p.numel() for p in missing) * MOMENT_BYTES[config.optimizer]
    return torch.empty(count, dtype=torch.uint8, device=optimizer.masters[0].device)


def _stand_in(
    rows: int, prompt: int, response: int, joined: bool, device: torch.device
) -> tuple[TokenRows, Experience]:
    """Rows of full length, and what the losses read beside them."""
    token_rows = TokenRows([[0] * prompt] * rows, [[0] * response] * rows, joined)
    everywhere = torch.ones(rows, response, dtype=torch.bool, device=device)
    zeros, ones = torch.zeros(rows, response, device=device), torch.ones(rows, response, device=device)
    return token_rows, Experience(
        token_mask=everywhere,
        response_mask=everywhere,
        values=zeros,
        returns=ones,
        old_log_probs=zeros,
        ref_log_probs=zeros,
        advantages=ones,
        weights=ones,
    )
