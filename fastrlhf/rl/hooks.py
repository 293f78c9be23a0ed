"""What only some PPO runs have, hooked in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from fastrlhf.config.stages import PPOConfig
from fastrlhf.data.encode import Example
from fastrlhf.rl.critic_warmup import CriticPretraining
from fastrlhf.rl.experience import Experience, Rollout
from fastrlhf.rl.extras import PretrainingMix, ReferenceRefresh, WeightAverage
from fastrlhf.rl.learner import Learner
from fastrlhf.rl.roles import Roles


class Extras:
    """ptx_examples: of `load_ptx`. What steps with the policy is given to the learner."""

    def __init__(self, config: PPOConfig, roles: Roles, learner: Learner, ptx_examples: list[Example]) -> None:
        self.config, self.learner = config, learner
        if ptx_examples:
            learner.ptx = PretrainingMix(config, ptx_examples, roles.policy)
        if config.ema_decay is not None:
            learner.average = WeightAverage(learner.policy_optimizer, config.ema_decay)
        self.refresh = ReferenceRefresh(roles, config.ref_refresh_every) if config.ref_refresh_every else None
        self.pretraining = CriticPretraining(config, learner) if config.critic_pretrain_epochs else None
        self._parts = {"ema": learner.average, "reference": self.refresh, "critic_pretraining": self.pretraining}

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the policy holds the weights that are evaluated and saved."""
        return nullcontext() if self.learner.average is None else self.learner.average.applied()

    def after_update(self, rollout: Rollout, experience: Experience, step: int) -> dict[str, float]:
        """step: number of the PPO step, from 0 -> metrics."""
        metrics: dict[str, float] = {}
        warmup = self.config.critic_warmup_steps
        if self.pretraining is not None and step < warmup:
            self.pretraining.keep(rollout, experience)
            if step == warmup - 1:
                metrics = self.pretraining.run()
        if self.refresh is not None and self.refresh.after_step(step + 1):
            self.learner.report("ref_refresh", f"the policy after step {step + 1} is the reference now")
        return metrics

    def state(self) -> dict[str, Any]:
        found = {"parts": sorted(self.tensors())}
        return found if self.learner.ptx is None else {**found, "ptx": self.learner.ptx.state()}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Of the checkpoint, by group; a group without tensors is left out."""
        found = {name: part.tensors() for name, part in self._parts.items() if part is not None}
        return {name: group for name, group in found.items() if group}

    def load_state(self, state: dict[str, Any], tensors: Callable[[str], dict[str, Tensor]]) -> None:
        if self.learner.ptx is not None:
            self.learner.ptx.load_state(state["ptx"])
        for name in state["parts"]:
            self._parts[name].load_tensors(tensors(name))
