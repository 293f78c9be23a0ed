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
from fastrlhf.rl.experience import Experience, Rollout, length_mask, scatter
from fastrlhf.rl.learner import Learner
from fastrlhf.runtime import distributed
from fastrlhf.runtime.batching import derive_seed, minibatches
from fastrlhf_kernels import gae


class Stored(NamedTuple):
    """Rollouts on the CPU: ids [tokens] int32 of prompt and response of each row, their lengths [B]; rewards and
    counted [response tokens] (fp32, bool)."""

    ids: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor
    rewards: Tensor
    counted: Tensor


def token_rewards(experience: Experience, config: PPOConfig) -> Tensor:
    """[B, T] fp32: the rewards that GAE made the returns R of, with the values V of then.

    A_t = R_t - V_t, delta_t = A_t - gamma lambda A_{t+1}, r_t = delta_t - gamma V_{t+1} + V_t, both 0 behind the end
    (so the value that `bootstrap_truncated` puts behind a cut response is part of its last reward).
    """
    mask = experience.response_mask
    values = experience.values.double().where(mask, 0.0)
    gains = (experience.returns.double() - values).where(mask, 0.0)
    next_value, next_gain = F.pad(torch.stack([values, gains])[..., 1:], (0, 1))
    rewards = gains - config.gamma * config.gae_lambda * next_gain - config.gamma * next_value + values
    return rewards.where(mask, 0.0).float()


class CriticPretraining:
    """Stores the warm-up's rollouts (`keep`), then trains on them (`run`) and drops them.

    The rewards stay what they were. At the start of each of the critic_pretrain_epochs passes the critic values all
    stored tokens anew and GAE makes returns of rewards and these values, which are the old values of the value clip
    too; then come shuffled mini-batches of mini_batch_size responses.
    """

    def __init__(self, config: PPOConfig, learner: Learner) -> None:
        self.config, self.learner = config, learner
        self.parts: list[Stored] = []
        self.packed = False

    def keep(self, rollout: Rollout, experience: Experience) -> None:
        mask, self.packed = experience.token_mask, rollout.packed
        ids = [torch.tensor(p + r, dtype=torch.int32) for p, r in zip(rollout.prompt_ids, rollout.response_ids)]
        self.parts.append(
            Stored(
                torch.cat(ids), _lengths(rollout.prompt_ids), _lengths(rollout.response_ids),
                token_rewards(experience, self.config)[mask].cpu(), experience.response_mask[mask].cpu(),
            )
        )  # fmt: skip

    def run(self) -> dict[str, float]:
        """All passes -> value/pretrain_loss_first and value/pretrain_loss: mean loss of the first and the last pass;
        value/pretrain_explained_var: of the last one."""
        rollout, rewards, token_mask, counted = self._whole()
        count, config, passes = len(rollout.response_ids), self.config, []
        for epoch in range(config.critic_pretrain_epochs):
            experience = self._valued(rollout, rewards, token_mask, counted)
            draw = torch.Generator().manual_seed(derive_seed(config.seed, "critic_pretraining", epoch))
            order = torch.randperm(count, generator=draw).tolist()
            cut = minibatches(count, config.mini_batch_size, order)
            passes.append(self.learner.update_critic(rollout, experience, cut))
        self.parts = []
        return {
            "value/pretrain_loss_first": passes[0]["value/loss"],
            "value/pretrain_loss": passes[-1]["value/loss"],
            "value/pretrain_explained_var": passes[-1]["value/explained_var"],
        }

    def _whole(self) -> tuple[Rollout, Tensor, Tensor, Tensor]:
        """Everything stored: the ids as one rollout; rewards, token_mask and response_mask [B, T]."""
        stored, device = _joined(self.parts), self.learner.device
        prompt_lengths, response_lengths = stored.prompt_lengths.tolist(), stored.response_lengths.tolist()
        sizes = [n for pair in zip(prompt_lengths, response_lengths, strict=True) for n in pair]
        pieces = [piece.tolist() for piece in stored.ids.split(sizes)]
        texts = [""] * len(prompt_lengths)  # the critic reads ids
        rollout = Rollout(texts, texts, 1, {}, pieces[::2], pieces[1::2], texts, [], [], [], packed=self.packed)
        mask = length_mask(response_lengths, device)
        rewards, counted = (scatter(x.to(device), mask) for x in (stored.rewards, stored.counted))
        return rollout, rewards, mask, counted.bool()

    @torch.no_grad()
    def _valued(self, rollout: Rollout, rewards: Tensor, token_mask: Tensor, counted: Tensor) -> Experience:
        """Values of the critic as it is, and the returns that GAE makes of the rewards and these values."""
        config, learner, values = self.config, self.learner, torch.zeros_like(rewards)

        def read() -> None:
            for rows in rollout.micro_batches(range(len(rollout.response_ids)), learner.backoff.tokens):
                batch = rollout.tokens(rows, learner.device)
                values[rows] = scatter(learner.critic.values(batch), token_mask[rows])

        learner.backoff.attempt(read)
        distributed.add_up(values)
        gains, returns = gae(rewards, values, counted, gamma=config.gamma, gae_lambda=config.gae_lambda)
        unused = torch.zeros_like(rewards)  # log-probs are of no use to the critic
        return Experience(token_mask, counted, unused, unused, values, gains, returns)

    def tensors(self) -> dict[str, Tensor]:
        """Of the checkpoint: what is stored, while the warm-up lasts."""
        return _joined(self.parts)._asdict() if self.parts else {}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.parts = [Stored(**tensors)]


def _joined(parts: Sequence[Stored]) -> Stored:
    return Stored(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _lengths(rows: Sequence[list[int]]) -> Tensor:
    return torch.tensor([len(row) for row in rows], dtype=torch.int64)
