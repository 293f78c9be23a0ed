"""The update of a PPO step: mini-batches of the clipped policy and value losses, one optimizer step each a mini-batch.

The losses of the micro-batches of a mini-batch are sums divided by one token count, so they just add up: how a
mini-batch is split changes the memory, never the result. Policy and critic step one after the other, so the
gradients of only one of them exist at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrlhf import models
from fastrlhf.batch import Experience, Rollout, TokenBatch
from fastrlhf.config import PPOConfig
from fastrlhf.guards import UpdateGuard
from fastrlhf.optim import Optimizer, lr_at
from fastrlhf.stats import Stats, mismatch_metrics
from fastrlhf_kernels import linear_log_probs, linear_ppo_loss, ppo_value_loss


def response_log_probs(model: PreTrainedModel, batch: TokenBatch, temperature: float) -> Tensor:
    """log pi(a_t | s_t) [N] fp32 of the response tokens, at the sampling temperature; no logits tensor is made."""
    head = models.lm_head(model)
    return linear_log_probs(batch.hidden(model), head.weight, batch.labels, temperature=temperature, **head.kwargs())


class Learner:
    """Policy and critic (or None) with their optimizers, gradient clips and update counts.

    report(kind, message, **fields) is told of every update that was skipped.
    """

    def __init__(self, config: PPOConfig, policy: PreTrainedModel, value_model: PreTrainedModel | None) -> None:
        self.config, self.policy, self.value_model = config, policy, value_model
        self.guard = UpdateGuard()
        self.report: Callable[..., None] = lambda kind, message, **fields: None
        self.device = policy.device
        self.policy_updates = self.critic_updates = 0
        common = {"name": config.optimizer, "max_grad_norm": config.max_grad_norm}
        models.make_trainable(policy, config.gradient_checkpointing)
        self.policy_optimizer = Optimizer(policy, learning_rate=config.learning_rate, **common)
        if value_model is not None:
            models.make_trainable(value_model, config.gradient_checkpointing)
            self.value_optimizer = Optimizer(value_model, learning_rate=config.critic_learning_rate, **common)

    def update(self, rollout: Rollout, experience: Experience, plan: list, step: int) -> dict[str, float]:
        """ppo_epochs passes over the rollout -> mean metrics of the updates.

        plan: row numbers as [epoch][mini-batch][micro-batch][row]; step: number of the PPO step, from 0.
        """
        config, stats = self.config, Stats()
        warming_up = step < config.critic_warmup_steps
        decoded = config.old_log_probs == "rollout"  # then the first forward of the policy shows the mismatch
        mismatch = mismatch_metrics(*torch.zeros(2, 0)) if decoded else {}
        seen: list[Tensor] = []
        for mini in (mini for epoch in plan for mini in epoch):
            if self.value_model is not None:
                self._update_critic(rollout, experience, mini, stats)
            if warming_up:
                continue
            first = decoded and not seen
            seen = self._update_policy(rollout, experience, mini, stats)
            if first:
                takes = [experience.take(rows) for rows in mini]
                old, own = (
                    torch.cat([take(t) for take in takes]) for t in (experience.old_log_probs, experience.response_mask)
                )
                mismatch = mismatch_metrics(torch.cat(seen)[own], old[own])
            if config.target_kl is not None and stats.last("kl/approx") > 1.5 * config.target_kl:
                stats.add("update/stopped_early", 1.0)
                break
        return stats.means() | mismatch

    def _update_policy(
        self,
        rollout: Rollout,
        experience: Experience,
        mini: list[list[int]],
        stats: Stats,
    ) -> list[Tensor]:
        """One optimizer step: the losses of the micro-batches are sums over one token count, so they just add up.

        -> the log-probs [N] of each micro-batch's response tokens before the step (0 where a row does not count).
        """
        config = self.config
        normalizer = self._normalizer(experience.response_mask, mini)
        totals, log_probs = torch.zeros(5, device=self.device), []
        for rows in mini:
            batch, take = rollout.tokens(rows, self.device), experience.take(rows)
            head = models.lm_head(self.policy)
            loss, info = linear_ppo_loss(
                batch.hidden(self.policy), head.weight, batch.labels,
                take(experience.old_log_probs), take(experience.advantages), take(experience.response_mask),
                temperature=config.temperature, clip_range=config.clip_range, clip_range_high=config.clip_range_high,
                dual_clip=config.dual_clip, entropy_coef=config.entropy_coef, normalizer=normalizer,
                weights=None if experience.weights is None else take(experience.weights),
                **self._kl_in_loss(take(experience.ref_log_probs)), **head.kwargs(),
            )  # fmt: skip
            loss.backward()
            log_probs.append(info["log_probs"])
            totals += torch.stack([loss.detach(), *(info[n] for n in ("approx_kl", "clip_frac", "entropy", "ratio"))])
        result = self.policy_optimizer.step(self._learning_rate(config.learning_rate, self.policy_updates))
        self.policy_updates += 1
        names = ("policy/loss", "kl/approx", "policy/clip_frac", "policy/entropy", "policy/ratio")
        for name, value in zip(names, totals.tolist(), strict=True):
            stats.add(name, value)
        stats.add("policy/grad_norm", result.grad_norm)
        self._guard(result.applied, "policy")
        return log_probs

    def _kl_in_loss(self, ref_log_probs: Tensor) -> dict[str, Any]:
        config = self.config
        if config.kl_in == "reward":
            return {}
        return {
            "ref_log_probs": ref_log_probs,
            "kl_coef": config.kl_coef,
            "kl_estimator": config.kl_estimator,
        }

    def _update_critic(
        self,
        rollout: Rollout,
        experience: Experience,
        mini: list[list[int]],
        stats: Stats,
    ) -> None:
        config = self.config
        normalizer = self._normalizer(experience.response_mask, mini)
        totals = torch.zeros(6, device=self.device)
        for rows in mini:
            batch, take = rollout.tokens(rows, self.device), experience.take(rows)
            values = models.scalar_outputs(self.value_model, batch.hidden(self.value_model))
            loss, info = ppo_value_loss(
                values, take(experience.values), take(experience.returns), take(experience.response_mask),
                clip_range=config.clip_range_value, normalizer=normalizer,
            )  # fmt: skip
            (config.vf_coef * loss).backward()
            names = ("clip_frac", "sum_sq_error", "sum_return", "sum_return_sq", "count")
            totals += torch.stack([loss.detach(), *(info[n].to(totals) for n in names)])
        result = self.value_optimizer.step(self._learning_rate(config.critic_learning_rate, self.critic_updates))
        self.critic_updates += 1
        loss_value, clipped, sq_error, total, total_sq, count = totals.tolist()
        variance = total_sq - total * total / max(count, 1.0)
        stats.add("value/loss", loss_value)
        stats.add("value/clip_frac", clipped)
        stats.add("value/explained_var", 1.0 - sq_error / variance if variance > 1e-12 else 0.0)
        stats.add("value/grad_norm", result.grad_norm)
        self._guard(result.applied, "critic")

    def _normalizer(self, mask: Tensor, mini: list[list[int]]) -> Tensor | float:
        """What a mini-batch's summed loss is divided by: its response tokens (dr_grpo: the constant longest length)."""
        rows = [row for group in mini for row in group]
        if self.config.advantage == "dr_grpo":
            return float(len(rows) * self.config.max_new_tokens)
        return mask[rows].sum().clamp(min=1).float()

    def _learning_rate(self, base: float, update: int) -> float:
        config = self.config
        per_step = config.ppo_epochs * -(-config.rollout_batch_size // config.mini_batch_size)
        return lr_at(
            update,
            base=base,
            schedule=config.lr_schedule,
            warmup_steps=config.warmup_steps,
            total_steps=config.total_steps * per_step,
        )

    def _guard(self, applied: bool, what: str) -> None:
        sentence = self.guard.record(applied, what)
        if sentence is not None:
            self.report("non_finite_update", sentence, update=self.policy_updates + self.critic_updates)

    def trained(self) -> dict[str, tuple[PreTrainedModel, Optimizer]]:
        """The models being trained by role, the policy first."""
        found = {"policy": (self.policy, self.policy_optimizer)}
        return found if self.value_model is None else {**found, "value": (self.value_model, self.value_optimizer)}

    def state(self) -> dict[str, Any]:
        return {"guard": self.guard.state(), "updates": [self.policy_updates, self.critic_updates]}

    def load_state(self, state: dict[str, Any]) -> None:
        self.guard.load_state(state["guard"])
        self.policy_updates, self.critic_updates = state["updates"]
