"""From a scored rollout to what the update reads: log-probs and values of the models, rewards, advantages.

Notation of a step of B responses, the longest of T tokens: tensors are [B, T], fp32, zero outside `token_mask`; a
micro-batch reads them as the [N] response tokens of its rows, in the order of its TokenBatch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf.config.stages import PPOConfig
from fastrlhf.models.token_batch import TokenRows, target_log_probs
from fastrlhf.parallel.sharding import in_step
from fastrlhf.rl.advantages import RunningMoments, equal_groups, estimate_advantages, shape_scores
from fastrlhf.rl.roles import Roles
from fastrlhf.rl.scorers import Scores
from fastrlhf.rollout.result import Rollout
from fastrlhf.runtime import distributed
from fastrlhf.runtime.batching import derive_seed, mini_batches
from fastrlhf.runtime.memory import MemoryBackoff
from fastrlhf.runtime.metrics import mismatch_metrics, rollout_metrics

MiniBatch = list[int]  # rows of the rollout, of all ranks: one optimizer step


class TokenExperience(NamedTuple):
    """The experience of some rows, token by token: all [N] over their response tokens but row_mask [B, T].

    row_mask says which token belongs to which row; response_mask which tokens count; weights None: all 1, and so
    kl_weights, which are of the KL in the loss.
    """

    row_mask: Tensor
    response_mask: Tensor
    old_log_probs: Tensor
    ref_log_probs: Tensor
    advantages: Tensor
    weights: Tensor | None
    kl_weights: Tensor | None = None


class TokenValues(NamedTuple):
    """What the critic learns from, token by token: all [N] over the response tokens of some rows."""

    response_mask: Tensor
    values: Tensor
    returns: Tensor


@dataclass(frozen=True)
class ValueExperience:
    """What the critic's update needs, all [B, T]; values are those of when the returns were made.

    token_mask: every response token; response_mask: those that count (rows without a score do not).
    """

    token_mask: Tensor
    response_mask: Tensor
    values: Tensor
    returns: Tensor

    @cached_property
    def lengths(self) -> list[int]:
        """Response tokens of each row: one look of the host at a rollout, so that no micro-batch needs another."""
        return self.token_mask.sum(1).tolist()

    def places(self, rows: Sequence[int]) -> Tensor:
        """Where the response tokens of these rows stand in a flattened [B, T]: [N] int64."""
        width = self.token_mask.shape[1]
        ranges = (torch.arange(row * width, row * width + self.lengths[row]) for row in rows)
        places = torch.cat([torch.zeros(0, dtype=torch.int64), *ranges])
        return places.to(self.token_mask.device, non_blocking=True)

    def value_tokens(self, rows: Sequence[int]) -> TokenValues:
        """Return what the value loss reads of these rows."""
        places = self.places(rows)
        return TokenValues(*(t.flatten()[places] for t in (self.response_mask, self.values, self.returns)))


@dataclass(frozen=True)
class Experience(ValueExperience):
    """What the update needs, all [B, T]. values: zeros where the estimator has no critic. weights: importance weights
    of the tokens, truncated and masked; None: all 1. left_out: rows that are not finite, which count nowhere."""

    old_log_probs: Tensor
    ref_log_probs: Tensor
    advantages: Tensor
    weights: Tensor | None
    left_out: Sequence[int] = ()

    def tokens(self, rows: Sequence[int], weights: Tensor | None, kl_weights: Tensor | None = None) -> TokenExperience:
        """Return what the policy loss reads of these rows. weights, kl_weights [B, T]: of the tokens in this
        mini-batch."""
        places = self.places(rows)
        row_mask = self.token_mask[torch.tensor(rows, dtype=torch.int64).to(places.device, non_blocking=True)]
        tensors = (self.response_mask, self.old_log_probs, self.ref_log_probs, self.advantages)
        both = (None if w is None else w.flatten()[places] for w in (weights, kl_weights))
        return TokenExperience(row_mask, *(t.flatten()[places] for t in tensors), *both)


def length_mask(lengths: Sequence[int], device: torch.device) -> Tensor:
    """[B, T] bool, true on the first lengths[b] entries of row b."""
    sizes = torch.tensor(lengths, device=device)
    return torch.arange(int(sizes.max()), device=device) < sizes[:, None]


def scatter(flat: Tensor, mask: Tensor) -> Tensor:
    """Put [N] back to [B, T] fp32, zero outside the mask."""
    return torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_scatter_(mask, flat.float())


def plan_epochs(config: PPOConfig, count: int, step: int) -> list[list[MiniBatch]]:
    """Draw the mini-batches of each epoch over `count` responses; it depends on seed, step and count only."""
    epochs = []
    for epoch in range(config.ppo_epochs):
        draw = torch.Generator().manual_seed(derive_seed(config.seed, "order", step, epoch))
        epochs.append(mini_batches(count, config.mini_batch_size, torch.randperm(count, generator=draw).tolist()))
    return epochs


@torch.no_grad()
def make_experience(
    rollout: Rollout,
    scores: Scores,
    roles: Roles,
    config: PPOConfig,
    *,
    kl_coef: float,
    moments: RunningMoments,
    first_epoch: list[MiniBatch],
    memory: MemoryBackoff,
) -> tuple[Experience, dict[str, float]]:
    """Make the experience of a rollout, and the metrics that are known before the update.

    kl_coef: the KL weight of this step. moments: of all scores so far; this rollout's join them. first_epoch: the
    mini-batches of the first pass, whose micro-batches the models read here, so that its ratio is exactly 1 and not 1
    plus rounding.
    """
    device = roles.policy.device
    token_mask = length_mask([len(ids) for ids in rollout.rows.response_ids], device)

    # 1. What the models say of these tokens: by this rank of its rows, then summed over the ranks.
    decoded = scatter(torch.cat(rollout.policy_log_probs).to(device), token_mask)
    forwards = memory.attempt(partial(_forwards, rollout, roles, config, first_epoch, token_mask, memory))
    distributed.all_reduce_sum(*(tensor for tensor in forwards if tensor is not None))
    values = forwards.values
    if values is None and rollout.values is not None:  # decoding read them on the way
        values = scatter(torch.cat(rollout.values).to(device), token_mask)

    raw = torch.tensor([math.nan if score is None else score for score in scores.values], device=device)
    left_out = _not_finite(raw.nan_to_num(0.0), decoded, *forwards, values)
    if left_out:  # a NaN would be in every row's advantage
        raw[left_out] = math.nan
        for tensor in (decoded, values, *forwards):
            if tensor is not None:
                tensor[left_out] = 0.0

    # 2. The old policy, which the ratio is against: a training forward of it, or the sampler itself.
    weights, mismatch = None, {}
    old_log_probs = decoded if forwards.old_log_probs is None else forwards.old_log_probs
    if forwards.old_log_probs is not None:  # else the first update measures the mismatch
        mismatch = mismatch_metrics(old_log_probs[token_mask], decoded[token_mask])
        weights = importance_weights(old_log_probs, decoded, config)
        if config.importance_mask is not None:
            mismatch["rollout/masked"] = float((weights[token_mask] == 0).float().mean())

    # 3. Scores, as the policy is optimised for them; rows without a score count nowhere.
    response_mask = token_mask & raw.isfinite()[:, None]
    finished = torch.tensor(rollout.finished, device=device)
    shaped = shape_scores(raw, finished, config, moments, token_mask.sum(1).float())
    groups: dict[str, float] = {}
    if config.samples_per_prompt > 1:
        equal = equal_groups(shaped, config.samples_per_prompt)
        groups["reward/equal_groups"] = float(equal.float().mean())
        if config.drop_equal_groups:  # all of an advantage of 0, which a mean over tokens would still count
            response_mask = response_mask & ~equal.repeat_interleave(config.samples_per_prompt)[:, None]
    token_rewards = None
    if scores.token_rewards is not None:  # they are in the scale of the scores
        token_rewards = scatter(torch.cat(scores.token_rewards).to(device) / moments.std, token_mask)

    # 4. Advantages and returns.
    advantages, returns = estimate_advantages(
        shaped,
        old_log_probs,
        forwards.ref_log_probs,
        values,
        response_mask,
        config,
        kl_coef,
        token_rewards=token_rewards,
        bootstrap_values=forwards.end_values,
    )
    experience = Experience(
        token_mask=token_mask,
        response_mask=response_mask,
        values=torch.zeros_like(returns) if values is None else values,
        returns=returns,
        old_log_probs=old_log_probs,
        ref_log_probs=forwards.ref_log_probs,
        advantages=advantages,
        weights=weights,
        left_out=left_out,
    )
    rows = sorted({*range(len(raw))} - {*left_out})
    seen = (tensor[rows] for tensor in (raw, old_log_probs, forwards.ref_log_probs, decoded))
    metrics = rollout_metrics(*seen, [rollout.log_probs[row] for row in rows], token_mask[rows])
    return experience, {**metrics, "kl/coef": kl_coef, **mismatch, **groups}


def importance_weights(old_log_probs: Tensor, sampled_log_probs: Tensor, config: PPOConfig) -> Tensor | None:
    """Return w = pi_old / pi_sampled [B, T] of each token, as the policy loss is weighted; None: all 1.

    importance_cap c: min(w, c) (Yao et al. 2025, TIS). importance_mask a, b: 0 where w is not in [a, b] (Ling Team
    2025, IcePop, who weigh w inside it: importance_cap = none; Liu et al. 2025, MIS, has the upper side).
    """
    if config.importance_cap is None and config.importance_mask is None:
        return None
    ratio = (old_log_probs - sampled_log_probs).exp()
    weights = ratio if config.importance_cap is None else ratio.clamp(max=config.importance_cap)
    if config.importance_mask is None:
        return weights
    low, high = config.importance_mask
    return weights.where((ratio >= low) & (ratio <= high), 0.0)


def _not_finite(*tensors: Tensor | None) -> list[int]:
    """Rows of [B] and [B, T] with a value that is not finite, or too large for its square to be; none where all are:
    then it is no matter of rows, and the update will say so. One look of the host."""
    there = [tensor for tensor in tensors if tensor is not None]
    faulty = torch.stack([~tensor.float().square().isfinite().reshape(len(tensor), -1).all(1) for tensor in there])
    rows = faulty.any(0).tolist()
    return [] if all(rows) else [row for row, bad in enumerate(rows) if bad]


class Forwards(NamedTuple):
    """What the models say of a rollout: log-probs and values [B, T], values behind each response [B]; None where nobody
    needs them, or decoding knows them already."""

    old_log_probs: Tensor | None
    ref_log_probs: Tensor
    values: Tensor | None
    end_values: Tensor | None


def _forwards(
    rollout: Rollout,
    roles: Roles,
    config: PPOConfig,
    epoch: list[MiniBatch],
    token_mask: Tensor,
    memory: MemoryBackoff,
) -> Forwards:
    """Read this rank's rows, zero elsewhere, in the micro-batches of the first epoch."""
    critic, recompute = roles.critic, config.old_log_probs == "recompute"
    shared = critic is not None and critic.shares_trunk
    zeros = partial(torch.zeros, device=token_mask.device)
    result = Forwards(
        old_log_probs=zeros(token_mask.shape) if recompute else None,
        ref_log_probs=zeros(token_mask.shape),
        values=None if critic is None or (shared and not recompute) else zeros(token_mask.shape),
        end_values=zeros(len(token_mask)) if config.bootstrap_truncated else None,
    )
    for rows in in_step(roles.policy, list(micro_batches_of(rollout.rows, epoch, memory))):
        batch, mask = rollout.rows.batch(rows, token_mask.device), token_mask[rows]
        if recompute:
            hidden = batch.hidden(roles.policy)
            log_probs = target_log_probs(roles.policy, batch, config.temperature, hidden, memory.workspace)
            result.old_log_probs[rows] = scatter(log_probs, mask)
            if shared:
                result.values[rows] = scatter(critic.read(hidden), mask)
        if critic is not None and not shared:
            result.values[rows] = scatter(critic.values(batch), mask)
        if result.end_values is not None:
            result.end_values[rows] = critic.end_values(
                [rollout.rows.whole(row) for row in rows], [rollout.finished[row] for row in rows]
            )
        with roles.reference() as model:
            log_probs = target_log_probs(model, batch, config.temperature, workspace=memory.workspace)
            result.ref_log_probs[rows] = scatter(log_probs, mask)
    return result


def micro_batches_of(rows: TokenRows, epoch: list[MiniBatch], memory: MemoryBackoff) -> Iterator[list[int]]:
    """Run over this rank's micro-batches of all mini-batches of an epoch."""
    for mini_batch in epoch:
        yield from rows.micro_batches(mini_batch, memory.tokens)
