"""Passes of the critic over every rollout of its warm-up, made at the end of it.

While the critic warms up the policy is frozen, so all these rollouts are of one policy and stay on-policy data. Zheng
et al. 2023 (MOSS-RLHF, fig. 8): a critic trained before PPO starts has no early spike of the value loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastrlhf.config.stages import PPOConfig
from fastrlhf.models.token_batch import TokenRows
from fastrlhf.rl.advantages import critic_lambda
from fastrlhf.rl.experience import Experience, ValueExperience, length_mask, scatter
from fastrlhf.rl.learner import Learner
from fastrlhf.runtime import distributed
from fastrlhf.runtime.batching import derive_seed, mini_batches
from fastrlhf_kernels import gae


class Stored(NamedTuple):
    """Rollouts on the CPU: ids [tokens] int32 of prompt and response of each row, their lengths [B]; rewards and
    response_mask [response tokens] (fp32, bool)."""

    ids: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor
    rewards: Tensor
    response_mask: Tensor


def token_rewards(experience: Experience, config: PPOConfig) -> Tensor:
    """Return [B, T] fp32 the rewards that GAE made the returns R of, with the values V of then.

    A_t = R_t - V_t, delta_t = A_t - gamma lambda A_{t+1}, r_t = delta_t - gamma V_{t+1} + V_t, both 0 behind the end
    (so the value that `bootstrap_truncated` puts behind a cut response is part of its last reward).
    """
    mask = experience.response_mask
    values = experience.values.double().where(mask, 0.0)
    advantages = (experience.returns.double() - values).where(mask, 0.0)
    next_value, next_advantage = F.pad(torch.stack([values, advantages])[..., 1:], (0, 1))
    rewards = advantages - config.gamma * critic_lambda(config) * next_advantage - config.gamma * next_value + values
    return rewards.where(mask, 0.0).float()


class CriticPretraining:
    """Stores the warm-up's rollouts (`keep`), then trains on them (`run`) and drops them.

    The rewards stay what they were. At the start of each of the critic_pretrain_epochs passes the critic values all
    stored tokens anew and GAE makes returns of rewards and these values, which are the old values of the value clip
    too; then come shuffled mini-batches of mini_batch_size responses. joined: how micro-batches are put into rows.
    """

    def __init__(self, config: PPOConfig, learner: Learner, *, joined: bool) -> None:
        self.config, self.learner, self.joined = config, learner, joined
        self.parts: list[Stored] = []

    def keep(self, rows: TokenRows, experience: Experience) -> None:
        """Store a rollout of the warm-up."""
        mask = experience.token_mask
        ids = [torch.tensor(rows.whole(row), dtype=torch.int32) for row in range(len(rows))]
        self.parts.append(
            Stored(
                ids=torch.cat(ids),
                prompt_lengths=_lengths(rows.prompt_ids),
                response_lengths=_lengths(rows.response_ids),
                rewards=token_rewards(experience, self.config)[mask].cpu(),
                response_mask=experience.response_mask[mask].cpu(),
            )
        )

    def run(self) -> dict[str, float]:
        """Make all passes -> value/pretrain_loss_first and value/pretrain_loss: mean loss of the first and the last
        pass; value/pretrain_explained_var: of the last one."""
        stored, device, config = _joined(self.parts), self.learner.device, self.config
        rows = self._rows(stored)
        token_mask = length_mask(stored.response_lengths.tolist(), device)
        rewards = scatter(stored.rewards.to(device), token_mask)
        response_mask = scatter(stored.response_mask.to(device), token_mask).bool()
        passes = []
        for epoch in range(config.critic_pretrain_epochs):
            experience = self._valued(rows, rewards, token_mask, response_mask)
            draw = torch.Generator().manual_seed(derive_seed(config.seed, "critic_pretraining", epoch))
            order = torch.randperm(len(rows), generator=draw).tolist()
            cut = mini_batches(len(rows), config.mini_batch_size, order)
            passes.append(self.learner.update_critic(rows, experience, cut))
        self.parts = []
        return {
            "value/pretrain_loss_first": passes[0]["value/loss"],
            "value/pretrain_loss": passes[-1]["value/loss"],
            "value/pretrain_explained_var": passes[-1]["value/explained_var"],
        }

    def _rows(self, stored: Stored) -> TokenRows:
        """Cut the stored ids into prompts and responses again."""
        lengths = zip(stored.prompt_lengths.tolist(), stored.response_lengths.tolist(), strict=True)
        pieces = [piece.tolist() for piece in stored.ids.split([n for pair in lengths for n in pair])]
        return TokenRows(pieces[::2], pieces[1::2], self.joined)

    @torch.no_grad()
    def _valued(self, rows: TokenRows, rewards: Tensor, token_mask: Tensor, response_mask: Tensor) -> ValueExperience:
        """Read the values of the critic as it is, and make returns of the rewards and these values by GAE."""
        config, learner, values = self.config, self.learner, torch.zeros_like(rewards)

        def read() -> None:
            for group in rows.micro_batches(range(len(rows)), learner.memory.tokens):
                batch = rows.batch(group, learner.device)
                values[group] = scatter(learner.critic.values(batch), token_mask[group])

        learner.memory.attempt(read)
        distributed.all_reduce_sum(values)
        _, returns = gae(rewards, values, response_mask, gamma=config.gamma, gae_lambda=critic_lambda(config))
        return ValueExperience(token_mask, response_mask, values, returns)

    def tensors(self) -> dict[str, Tensor]:
        """Tensors for the checkpoint: what is stored, while the warm-up lasts."""
        return _joined(self.parts)._asdict() if self.parts else {}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.parts = [Stored(**tensors)]


def _joined(parts: Sequence[Stored]) -> Stored:
    return Stored(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _lengths(rows: Sequence[list[int]]) -> Tensor:
    return torch.tensor([len(row) for row in rows], dtype=torch.int64)
