"""The update of a PPO step: mini-batches of the clipped policy and value losses, one optimizer step each a mini-batch.

The losses of the micro-batches of a mini-batch are sums divided by one token count, so they just add up: how a
mini-batch is split changes the memory, never the result. A critic on a trunk of its own steps before the policy, so the
gradients of only one of them exist at a time; on the policy's trunk both come from one forward and one backward, of
which the value loss reaches the critic's head alone. Where memory runs out, the gradients of the mini-batch are made
again from smaller micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastrlhf.config.stages import PPOConfig, critic_updates, policy_updates
from fastrlhf.data.encode import Example
from fastrlhf.models.heads import lm_head
from fastrlhf.models.loading import make_trainable
from fastrlhf.models.lora import POLICY
from fastrlhf.models.token_batch import TokenBatch, TokenRows
from fastrlhf.parallel.optimizers import make_optimizer
from fastrlhf.parallel.sharding import in_step
from fastrlhf.rl.experience import Experience, MiniBatch, ValueExperience
from fastrlhf.rl.extras import PretrainingMix, WeightAverage
from fastrlhf.rl.losses import aggregation_weights, normalizer_of, policy_loss, token_weights, value_loss
from fastrlhf.rl.roles import Roles
from fastrlhf.runtime import distributed
from fastrlhf.runtime.memory import MemoryBackoff
from fastrlhf.runtime.metrics import Stats, explained_variance, mismatch_metrics
from fastrlhf.runtime.optim import Optimizer, StepResult, TrainedRole, lr_at
from fastrlhf.runtime.updates import UpdateGuard

POLICY_STATS = ("approx_kl", "clip_frac", "entropy", "ratio")
VALUE_STATS = ("clip_frac", "sum_sq_error", "sum_return", "sum_return_sq", "count")


@dataclass
class Gradients:
    """What the backward passes of a mini-batch leave beside the gradients, by this rank. stopped: the policy did not
    step, because of target_kl.

    policy, critic: sums of the loss and of POLICY_STATS or VALUE_STATS; ptx: the mean loss of the pretraining mix; each
    None where it did not train. log_probs: the rows of each micro-batch, and the log-probs [N] of their response tokens
    before the step (0 where a row does not count).
    """

    policy: Tensor | None = None
    critic: Tensor | None = None
    ptx: Tensor | None = None
    log_probs: list[tuple[list[int], Tensor]] = field(default_factory=list)
    stopped: bool = False

    def sums(self) -> list[Tensor]:
        """The tensors that the ranks add up."""
        return [tensor for tensor in (self.policy, self.critic, self.ptx) if tensor is not None]


class Learner:
    """Policy and critic (or None) with their optimizers, gradient clips and update counts.

    ptx_examples: rows of the pretraining mix that steps with the policy; none: there is no mix.
    """

    def __init__(
        self,
        config: PPOConfig,
        roles: Roles,
        *,
        memory: MemoryBackoff,
        guard: UpdateGuard,
        ptx_examples: list[Example],
    ) -> None:
        self.config, self.policy, self.critic, self.adapters = config, roles.policy, roles.critic, roles.adapters
        self.memory, self.guard = memory, guard
        self.device = roles.policy.device
        self.policy_updates = self.critic_updates = 0
        make_trainable(self.policy, config.gradient_checkpointing, frozen=self.adapters is not None)
        if self.critic is not None and self.critic.owns_trunk:
            make_trainable(self.critic.trunk, config.gradient_checkpointing)
        trained = dict(self.policy.named_parameters()) if self.adapters is None else self.adapters.parameters(POLICY)
        self.policy_optimizer = make_optimizer(config, trained, memory, learning_rate=config.learning_rate)
        self.value_optimizer: Optimizer | None = None
        if self.critic is not None:
            self.value_optimizer = make_optimizer(
                config,
                self.critic.parameters(),
                memory,
                learning_rate=config.critic_learning_rate,
                max_grad_norm=config.critic_max_grad_norm,
            )
        decay = config.ema_decay
        self.average = None if decay is None else WeightAverage(self.policy_optimizer, decay)
        self.ptx = PretrainingMix(config, ptx_examples) if ptx_examples else None

    def averaged(self) -> AbstractContextManager[None]:
        """Have the policy hold the weights that are evaluated and saved, inside."""
        return nullcontext() if self.average is None else self.average.applied()

    # ------------------------------------------------------------------------------------------------------- updates

    def update(
        self, rows: TokenRows, experience: Experience, epochs: list[list[MiniBatch]], step: int
    ) -> dict[str, float]:
        """Make ppo_epochs passes over a rollout -> mean metrics of the updates. step: number of the PPO step from 0."""
        config, stats = self.config, Stats()
        warming_up = step < config.critic_warmup_steps
        joint = self.critic is not None and self.critic.shares_trunk and not warming_up
        decoded = config.old_log_probs == "rollout"  # then the first forward of the policy shows the mismatch
        first: Gradients | None = None
        left_out = set(experience.left_out)  # rows that are not finite: of no use to either role
        if left_out:
            self.guard.leave_out([[rows.whole(row)] for row in experience.left_out], "the step")
        for mini_batch in (mini_batch for epoch in epochs for mini_batch in epoch):
            if config.drop_equal_groups and not experience.response_mask[mini_batch].any():
                continue  # an update of nothing would still decay moments and weights
            if self.critic is not None and not joint:
                self._update(rows, experience, mini_batch, stats, left_out, critic=True)
            if warming_up:
                continue
            gradients = self._update(rows, experience, mini_batch, stats, left_out, policy=True, critic=joint)
            first = first or gradients
            if gradients.stopped:
                break
        mismatch = self._mismatch(experience, first) if decoded else {}
        return stats.means() | mismatch

    def update_critic(
        self, rows: TokenRows, experience: ValueExperience, mini_batches: list[MiniBatch]
    ) -> dict[str, float]:
        """Update the critic once for each mini-batch -> mean metrics."""
        stats, left_out = Stats(), set()
        for mini_batch in mini_batches:
            self._update(rows, experience, mini_batch, stats, left_out, critic=True)
        return stats.means()

    def _update(
        self,
        rows: TokenRows,
        experience: ValueExperience,
        mini_batch: MiniBatch,
        stats: Stats,
        left_out: set[int],
        *,
        policy: bool = False,
        critic: bool = False,
    ) -> Gradients:
        """One optimizer step of the policy, of the critic, or (shared trunk) of both from one forward and backward.

        left_out: rows that are not finite; those that are found here join them.
        """

        def work(kept: list[int | Example]) -> Gradients:
            mine = [row for row in kept if isinstance(row, int)]
            mixed = [row for row in kept if isinstance(row, Example)]
            gradients = self.memory.attempt(
                lambda: self.accumulate(rows, experience, mine, mixed, policy=policy, critic=critic),
                undo=self.drop_gradients,
            )
            distributed.all_reduce_sum(*gradients.sums())
            return gradients

        roles = {
            "policy": self.policy_optimizer if policy else None,
            "critic": self.value_optimizer if critic else None,
        }
        roles = {name: optimizer for name, optimizer in roles.items() if optimizer is not None}
        wanted = [row for row in mini_batch if row not in left_out]
        if not wanted:
            return Gradients()
        mix = self.ptx if policy else None
        rows_of_mix = None if mix is None else mix.state()
        kept, gradients, norms, cause = self.guard.gradients(
            wanted,
            work,
            roles,
            lambda row: row.rows if isinstance(row, Example) else [rows.whole(row)],
            beside=() if mix is None else mix.draw(),
        )
        left_out |= set(wanted) - {row for row in kept if isinstance(row, int)}
        if policy and self._too_far(gradients.policy.tolist(), stats):
            gradients.stopped = True
            self.policy_optimizer.zero_grad()
            if mix is not None:  # these rows were not learnt
                mix.load_state(rows_of_mix)
        elif policy:
            result = self._step_policy(gradients.policy.tolist(), norms["policy"], stats)
            self.guard.record("policy", result.applied, cause)
        if gradients.ptx is not None and not gradients.stopped:
            stats.add("ptx/loss", float(gradients.ptx))
        if critic:
            result = self._step_critic(gradients.critic.tolist(), norms["critic"], stats)
            self.guard.record("critic", result.applied, cause)
        return gradients

    def accumulate(
        self,
        rows: TokenRows,
        experience: ValueExperience,
        mini_batch: MiniBatch,
        mixed: Sequence[Example] = (),
        *,
        policy: bool,
        critic: bool,
    ) -> Gradients:
        """Add the gradients of a mini-batch, micro-batch by micro-batch, to those that are there, and those of rows of
        the pretraining mix.

        policy needs an `Experience`; the critic alone a `ValueExperience`.
        """
        config, result = self.config, Gradients()
        normalizer = normalizer_of(experience.response_mask, mini_batch)
        if policy:
            weights = token_weights(experience, mini_batch, config) if mini_batch else None
            kl_weights = None
            if config.kl_in == "loss" and mini_batch:
                kl_weights = aggregation_weights(experience, mini_batch, config)
            result.policy = torch.zeros(len(POLICY_STATS) + 1, device=self.device)
        if critic:
            result.critic = torch.zeros(len(VALUE_STATS) + 1, device=self.device)
        groups = rows.micro_batches(mini_batch, self.memory.tokens) if mini_batch else []
        for group in in_step(self.policy if policy else self.critic.trunk, groups):
            batch, losses = rows.batch(group, self.device), []
            with nullcontext() if policy else self.critic.active():
                hidden = self._hidden(batch, policy)
                if policy:
                    tokens, head = experience.tokens(group, weights, kl_weights), lm_head(self.policy)
                    divided = {"normalizer": normalizer, "workspace": self.memory.workspace}
                    loss, info = policy_loss(hidden, batch, tokens, config, head=head, **divided)
                    losses.append(loss)
                    result.log_probs.append((group, info["log_probs"]))
                    result.policy += torch.stack([loss.detach(), *(info[name] for name in POLICY_STATS)])
                if critic:
                    targets = experience.value_tokens(group)
                    loss, info = value_loss(self.critic.read(hidden), targets, config, normalizer=normalizer)
                    losses.append(config.vf_coef * loss)
                    result.critic += torch.stack([loss.detach(), *(info[name].to(loss) for name in VALUE_STATS)])
                sum(losses).backward()
        if mixed:
            rows_counted = experience.response_mask[mini_batch].any(1).sum().clamp(min=1)
            mean, memory = normalizer / rows_counted, self.memory
            result.ptx = self.ptx.backward(self.policy, memory.tokens, mixed, mean, memory.workspace)
        return result

    def _hidden(self, batch: TokenBatch, policy: bool) -> Tensor:
        """Return the states [N, H] that predict the response tokens: of the policy, else of the critic."""
        if policy:
            return batch.hidden(self.policy)
        with torch.set_grad_enabled(not self.critic.shares_trunk):  # warm-up on a shared trunk: only the head learns
            return batch.hidden(self.critic.trunk)

    def drop_gradients(self) -> None:
        """Forget the gradients of every role, without a step."""
        for optimizer in self.optimizers():
            optimizer.zero_grad()

    def _mismatch(self, experience: Experience, first: Gradients | None) -> dict[str, float]:
        """Compare the log-probs that the first update saw with those of decoding, over all ranks; NaN without one."""
        seen = [] if first is None else first.log_probs
        tokens = [experience.tokens(group, None) for group, _ in seen]
        none = torch.zeros(0, device=self.device)
        mask = torch.cat([none.bool(), *(t.response_mask for t in tokens)])
        decoded = torch.cat([none, *(t.old_log_probs for t in tokens)])[mask]
        trained = torch.cat([none, *(log_probs for _, log_probs in seen)])[mask]
        return mismatch_metrics(distributed.gather(trained), distributed.gather(decoded))

    # ------------------------------------------------------------------------------------------------ optimizer steps

    def _too_far(self, sums: list[float], stats: Stats) -> bool:
        """Whether the policy as it is, before the step of these sums, is beyond target_kl already (as Spinning Up
        stops)."""
        target, approx_kl = self.config.target_kl, sums[1 + POLICY_STATS.index("approx_kl")]
        if target is None or not approx_kl > 1.5 * target:
            return False
        stats.add("kl/approx", approx_kl)
        stats.add("update/stopped_early", 1.0)
        return True

    def _step_policy(self, sums: list[float], norm: float, stats: Stats) -> StepResult:
        rate = self._learning_rate(self.config.learning_rate, self.policy_updates, policy_updates(self.config))
        result = self.policy_optimizer.apply(rate, norm)
        self.policy_updates += 1
        if self.average is not None and result.applied:
            self.average.update()
        names = ("policy/loss", "kl/approx", "policy/clip_frac", "policy/entropy", "policy/ratio")
        for name, value in zip(names, sums, strict=True):
            stats.add(name, value)
        stats.add("policy/grad_norm", result.grad_norm)
        return result

    def _step_critic(self, sums: list[float], norm: float, stats: Stats) -> StepResult:
        rate = self._learning_rate(self.config.critic_learning_rate, self.critic_updates, critic_updates(self.config))
        result = self.value_optimizer.apply(rate, norm)
        self.critic_updates += 1
        loss, clip_frac, sum_sq_error, sum_return, sum_return_sq, count = sums
        stats.add("value/loss", loss)
        stats.add("value/clip_frac", clip_frac)
        stats.add("value/explained_var", explained_variance(sum_sq_error, sum_return, sum_return_sq, count))
        stats.add("value/grad_norm", result.grad_norm)
        return result

    def _learning_rate(self, base: float, update: int, updates: int) -> float:
        """The rate of optimizer step `update` out of `updates`."""
        schedule, warmup = self.config.lr_schedule, self.config.warmup_steps
        return lr_at(update, base=base, schedule=schedule, warmup_steps=warmup, total_steps=updates)

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def optimizers(self) -> list[Optimizer]:
        return [optimizer for optimizer in (self.policy_optimizer, self.value_optimizer) if optimizer is not None]

    def trained(self) -> dict[str, TrainedRole]:
        """The roles being trained, the policy first."""
        roles = {"policy": TrainedRole(self.policy, self.policy_optimizer)}
        if self.adapters is not None:
            roles["policy"] = self.adapters.trained(POLICY, self.policy_optimizer)
        if self.critic is not None:
            parts = None if self.critic.owns_trunk else self.critic.parameters()
            roles["value"] = TrainedRole(self.critic.trunk, self.value_optimizer, parts)
        return roles

    def state(self) -> dict[str, Any]:
        return {"updates": [self.policy_updates, self.critic_updates]}

    def load_state(self, state: dict[str, Any]) -> None:
        self.policy_updates, self.critic_updates = state["updates"]
