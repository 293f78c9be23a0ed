"""The update of a PPO step: mini-batches of the clipped policy and value losses, one optimizer step each a mini-batch.

The losses of the micro-batches of a mini-batch are sums divided by one token count, so they just add up: how a
mini-batch is split changes the memory, never the result. A critic on a trunk of its own steps before the policy, so the
gradients of only one of them exist at a time; on the policy's trunk both come from one forward and one backward. Where
memory runs out, the gradients of the mini-batch are made again from smaller micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrlhf.config.stages import PPOConfig, critic_updates, policy_updates
from fastrlhf.models import heads, loading
from fastrlhf.models.lora import POLICY, Adapters
from fastrlhf.models.token_batch import TokenBatch
from fastrlhf.rl.critic import Critic
from fastrlhf.rl.experience import Experience, Rollout
from fastrlhf.rl.extras import PretrainingMix, WeightAverage
from fastrlhf.rl.losses import fused_kl, separate_kl, sequence_ratio_loss, with_value
from fastrlhf.runtime import distributed
from fastrlhf.runtime.guards import UpdateGuard
from fastrlhf.runtime.memory import Backoff
from fastrlhf.runtime.metrics import Stats, mismatch_metrics
from fastrlhf.runtime.optim import Optimizer, Trained, lr_at, optimizer_options
from fastrlhf_kernels import PPOLoss, linear_log_probs, linear_ppo_loss, ppo_value_loss

Take = Callable[[Tensor], Tensor]  # of `Experience.take`
POLICY_STATS = ("approx_kl", "clip_frac", "entropy", "ratio")
VALUE_STATS = ("clip_frac", "sum_sq_error", "sum_return", "sum_return_sq", "count")


class Learner:
    """Policy and critic (or None) with their optimizers, gradient clips and update counts.

    adapters: what trains of the policy instead of all its weights. A critic on a trunk of its own is updated before the
    policy, so that the gradients of only one of them exist at a time; one on the policy's trunk in the same backward.
    report(kind, message, **fields) is told of every update that was skipped.
    """

    def __init__(
        self,
        config: PPOConfig,
        policy: PreTrainedModel,
        critic: Critic | None,
        adapters: Adapters | None = None,
    ) -> None:
        self.config, self.policy, self.critic = config, policy, critic
        self.guard = UpdateGuard()
        self.report: Callable[..., None] = lambda kind, message, **fields: None
        self.device = policy.device
        self.backoff = Backoff(config, self.device)
        self.policy_updates = self.critic_updates = 0
        self.ptx: PretrainingMix | None = None  # both set by `Extras`
        self.average: WeightAverage | None = None
        common = optimizer_options(config)
        self.adapters = adapters
        loading.make_trainable(policy, config.gradient_checkpointing, frozen=adapters is not None)
        parameters = dict(policy.named_parameters()) if adapters is None else adapters.parameters(POLICY)
        self.policy_optimizer = Optimizer(parameters, learning_rate=config.learning_rate, **common)
        if critic is not None:
            if critic.trunk is not policy:
                loading.make_trainable(critic.trunk, config.gradient_checkpointing)
            common["max_grad_norm"] = config.critic_max_grad_norm or config.max_grad_norm
            self.value_optimizer = Optimizer(critic.parameters(), learning_rate=config.critic_learning_rate, **common)

    def update(
        self, rollout: Rollout, experience: Experience, plan: list[list[list[int]]], step: int
    ) -> dict[str, float]:
        """ppo_epochs passes over the rollout -> mean metrics of the updates.

        plan: the rows (of all ranks) of each mini-batch of each epoch; step: number of the PPO step, from 0.
        """
        config, stats = self.config, Stats()
        warming_up = step < config.critic_warmup_steps
        joint = self.critic is not None and self.critic.shares_trunk and not warming_up
        decoded = config.old_log_probs == "rollout"  # then the first forward of the policy shows the mismatch
        mismatch = mismatch_metrics(*torch.zeros(2, 0)) if decoded else {}
        seen: list[tuple[list[int], Tensor]] | None = None
        for mini in (mini for epoch in plan for mini in epoch):
            if self.critic is not None and not joint:
                self._update(rollout, experience, mini, stats, critic=True)
            if warming_up:
                continue
            first = decoded and seen is None
            seen = self._update(rollout, experience, mini, stats, policy=True, critic=joint)
            if first:
                mismatch = self._mismatch(experience, seen)
            if config.target_kl is not None and stats.last("kl/approx") > 1.5 * config.target_kl:
                stats.add("update/stopped_early", 1.0)
                break
        return stats.means() | mismatch

    def update_critic(self, rollout: Rollout, experience: Experience, plan: list[list[int]]) -> dict[str, float]:
        """One critic update for each mini-batch of plan -> their mean metrics."""
        stats = Stats()
        for mini in plan:
            self._update(rollout, experience, mini, stats, critic=True)
        return stats.means()

    def _update(
        self,
        rollout: Rollout,
        experience: Experience,
        mini: list[int],
        stats: Stats,
        *,
        policy: bool = False,
        critic: bool = False,
    ) -> list[tuple[list[int], Tensor]]:
        """One optimizer step of the policy, of the critic, or (shared trunk) of both from one forward and backward.

        mini: its rows, of all ranks -> the rows of each of this rank's micro-batches, and the log-probs [N] of their
        response tokens before the step (0 where a row does not count).
        """
        work = partial(self.accumulate, rollout, experience, mini, policy=policy, critic=critic)
        totals, log_probs = self.backoff.attempt(work, undo=self.drop_gradients)
        distributed.add_up(*totals.values())
        if policy:
            self._step_policy(totals["policy"].tolist(), stats)
        if "ptx" in totals:
            stats.add("ptx/loss", float(totals["ptx"]))
        if critic:
            self._step_critic(totals["critic"].tolist(), stats)
        return log_probs

    def accumulate(
        self, rollout: Rollout, experience: Experience, mini: list[int], *, policy: bool, critic: bool
    ) -> tuple[dict[str, Tensor], list[tuple[list[int], Tensor]]]:
        """Add the gradients of a mini-batch, micro-batch by micro-batch, to those that are there.

        -> sums of loss and statistics by role, and what `_update` gives.
        """
        normalizer = self._normalizer(experience.response_mask, mini)
        totals = {
            "policy": torch.zeros(len(POLICY_STATS) + 1, device=self.device),
            "critic": torch.zeros(len(VALUE_STATS) + 1, device=self.device),
        }
        weights = self._policy_weights(experience, mini) if policy else None
        log_probs = []
        for rows in rollout.micro_batches(mini, self.backoff.tokens):
            batch, take = rollout.tokens(rows, self.device), experience.take(rows)
            with nullcontext() if policy else self.critic.active():
                hidden = self._hidden(batch, policy)
                losses = []
                if policy:
                    loss, info = self._policy_loss(hidden, batch, experience, rows, weights, normalizer)
                    losses.append(loss)
                    log_probs.append((rows, info["log_probs"]))
                    totals["policy"] += torch.stack([loss.detach(), *(info[n] for n in POLICY_STATS)])
                if critic:
                    loss, info = self._value_loss(hidden, experience, take, normalizer)
                    losses.append(self.config.vf_coef * loss)
                    totals["critic"] += torch.stack([loss.detach(), *(info[n].to(loss) for n in VALUE_STATS)])
                sum(losses).backward()
        if policy and self.ptx is not None:
            totals["ptx"] = self.ptx.backward(self.policy, self.backoff.tokens)
        return totals, log_probs

    def drop_gradients(self) -> None:
        """Of every role, without a step."""
        for optimizer in self.optimizers():
            optimizer.zero_grad()

    def _mismatch(self, experience: Experience, seen: list[tuple[list[int], Tensor]]) -> dict[str, float]:
        """Of the log-probs that the first update saw of a rollout's tokens, over all ranks."""
        takes = [experience.take(rows) for rows, _ in seen]
        none = torch.zeros(0, device=self.device)
        old = torch.cat([none, *(take(experience.old_log_probs) for take in takes)])
        counted = torch.cat([none.bool(), *(take(experience.response_mask) for take in takes)])
        new = torch.cat([none, *(log_probs for _, log_probs in seen)])
        return mismatch_metrics(distributed.gather(new[counted]), distributed.gather(old[counted]))

    def _hidden(self, batch: TokenBatch, policy: bool) -> Tensor:
        """[N, H] that predict the response tokens: of the policy, else of the critic."""
        if policy:
            return batch.hidden(self.policy)
        with torch.set_grad_enabled(not self.critic.shares_trunk):  # warm-up on a shared trunk: only the head learns
            return batch.hidden(self.critic.trunk)

    def _policy_loss(
        self, hidden: Tensor, batch: TokenBatch, experience: Experience, rows: list[int], weights: Tensor | None,
        normalizer: Tensor | float,
    ) -> PPOLoss:  # fmt: skip
        config, head, take = self.config, heads.lm_head(self.policy), experience.take(rows)
        weights = None if weights is None else take(weights)
        ref, counted = take(experience.ref_log_probs), take(experience.response_mask)
        if config.ratio_level == "sequence" or separate_kl(config):
            log_probs, entropy = linear_log_probs(
                hidden, head.weight, batch.labels, temperature=config.temperature, return_entropy=True, **head.kwargs()
            )
            alone = torch.ones_like(counted)[:, None]
            return sequence_ratio_loss(
                log_probs, entropy, take(experience.old_log_probs), ref, take(experience.advantages), counted,
                experience.token_mask[rows] if config.ratio_level == "sequence" else alone, config, weights=weights,
                normalizer=normalizer,
            )  # fmt: skip
        result = linear_ppo_loss(
            hidden, head.weight, batch.labels, take(experience.old_log_probs), take(experience.advantages), counted,
            temperature=config.temperature, clip_range=config.clip_range, clip_range_high=config.clip_range_high,
            dual_clip=config.dual_clip, entropy_coef=config.entropy_coef, normalizer=normalizer, weights=weights,
            **fused_kl(config, ref), **head.kwargs(),
        )  # fmt: skip
        return with_value(result, ref, counted, config, normalizer)

    def _value_loss(self, hidden: Tensor, experience: Experience, take: Take, normalizer: Tensor | float) -> PPOLoss:
        config = self.config
        return ppo_value_loss(
            self.critic.read(hidden), take(experience.values), take(experience.returns), take(experience.response_mask),
            clip_range=config.clip_range_value, normalizer=normalizer,
        )  # fmt: skip

    def _step_policy(self, totals: list[float], stats: Stats) -> None:
        rate = self._learning_rate(self.config.learning_rate, self.policy_updates, policy_updates(self.config))
        result = self.policy_optimizer.step(rate)
        self.policy_updates += 1
        if self.average is not None and result.applied:
            self.average.update()
        names = ("policy/loss", "kl/approx", "policy/clip_frac", "policy/entropy", "policy/ratio")
        for name, value in zip(names, totals, strict=True):
            stats.add(name, value)
        stats.add("policy/grad_norm", result.grad_norm)
        self._guard(result.applied, "policy")

    def _step_critic(self, totals: list[float], stats: Stats) -> None:
        rate = self._learning_rate(self.config.critic_learning_rate, self.critic_updates, critic_updates(self.config))
        result = self.value_optimizer.step(rate)
        self.critic_updates += 1
        loss_value, clipped, sq_error, total, total_sq, count = totals
        variance = total_sq - total * total / max(count, 1.0)
        stats.add("value/loss", loss_value)
        stats.add("value/clip_frac", clipped)
        stats.add("value/explained_var", 1.0 - sq_error / variance if variance > 1e-12 else 0.0)
        stats.add("value/grad_norm", result.grad_norm)
        self._guard(result.applied, "critic")

    @staticmethod
    def _normalizer(mask: Tensor, rows: list[int]) -> Tensor:
        """What a mini-batch's summed loss is divided by: its response tokens."""
        return mask[rows].sum().clamp(min=1).float()

    def _policy_weights(self, experience: Experience, rows: list[int]) -> Tensor | None:
        """[B, T] of the tokens in the policy loss: importance weights, times what makes of a mean over the mini-batch's
        tokens the mean over responses of their means, or the sum over max_new_tokens (Liu et al. 2025, dr_grpo)."""
        kind, mask = self.config.loss_aggregation, experience.response_mask
        if kind == "token_mean":
            return experience.weights
        tokens = mask[rows].sum()
        if kind == "constant":
            factor = (tokens / (len(rows) * self.config.max_new_tokens)).expand_as(experience.advantages)
        else:
            own = mask.sum(1, keepdim=True).clamp(min=1)
            factor = (tokens / mask[rows].any(1).sum().clamp(min=1) / own).expand_as(experience.advantages)
        return factor if experience.weights is None else factor * experience.weights

    def _learning_rate(self, base: float, update: int, updates: int) -> float:
        """Of optimizer step `update` out of `updates`."""
        schedule, warmup = self.config.lr_schedule, self.config.warmup_steps
        return lr_at(update, base=base, schedule=schedule, warmup_steps=warmup, total_steps=updates)

    def _guard(self, applied: bool, what: str) -> None:
        sentence = self.guard.record(applied, what)
        if sentence is not None:
            self.report("non_finite_update", sentence, update=self.policy_updates + self.critic_updates)

    def optimizers(self) -> list[Optimizer]:
        return [self.policy_optimizer] + ([] if self.critic is None else [self.value_optimizer])

    def trained(self) -> dict[str, Trained]:
        """The roles being trained, the policy first."""
        found = {"policy": Trained(self.policy, self.policy_optimizer)}
        if self.adapters is not None:
            found["policy"] = self.adapters.trained(POLICY, self.policy_optimizer)
        if self.critic is not None:
            parts = self.critic.parameters() if self.critic.trunk is self.policy else None
            found["value"] = Trained(self.critic.trunk, self.value_optimizer, parts)
        return found

    def state(self) -> dict[str, Any]:
        updates = [self.policy_updates, self.critic_updates]
        return {"guard": self.guard.state(), "updates": updates, "backoff": self.backoff.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.guard.load_state(state["guard"])
        self.policy_updates, self.critic_updates = state["updates"]
        self.backoff.load_state(state["backoff"])
