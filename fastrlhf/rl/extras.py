"""Parts that only some PPO runs have: the pretraining mix (ptx), averaged weights, a reference that follows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrlhf.checkpoint.state import load_parts
from fastrlhf.config.errors import UserError
from fastrlhf.config.stages import PPOConfig
from fastrlhf.data.encode import Example, target_count
from fastrlhf.models.lora import POLICY, REFERENCE
from fastrlhf.models.token_batch import TokenBatch, target_log_probs, target_row
from fastrlhf.parallel.sharding import in_step
from fastrlhf.rl.roles import Roles
from fastrlhf.runtime.batching import Sampler, assign_rows, micro_batches
from fastrlhf.runtime.optim import Optimizer


class PretrainingMix:
    """loss = PPO's + ptx_coef * mean over target tokens of -log p(token), of mini_batch_size rows an optimizer step.

    Ouyang et al. 2022, eq. 2 (gamma is ptx_coef): the gradients of both losses are summed and clipped together, and one
    optimizer step follows. MOSS-RLHF's released code steps once for each. Log-probs are at temperature 1: these rows
    were not sampled.
    """

    def __init__(self, config: PPOConfig, examples: list[Example]) -> None:
        self.config = config
        self.examples, self.coef, self.rows = examples, config.ptx_coef, config.mini_batch_size
        self.sampler = Sampler(len(examples), config.seed)

    def draw(self) -> list[Example]:
        """The rows of the next optimizer step."""
        return [self.examples[i] for i in self.sampler.take(self.rows)]

    def backward(
        self,
        model: PreTrainedModel,
        budget: int,
        examples: Sequence[Example],
        response_tokens: Tensor,
        workspace: int | None = None,
    ) -> Tensor:
        """Add the gradients of these rows -> their mean loss, nats a target token, without ptx_coef; of this rank's
        rows, so that the ranks' sum is the whole. budget: tokens of a micro-batch. response_tokens 0-d: mean tokens of
        the responses beside these rows. workspace: as of `target_log_probs`."""
        targets, total = target_count(examples), torch.zeros((), device=model.device)
        weight = self.coef * self._unit(targets / len(examples), response_tokens)
        mine = [examples[i] for i in assign_rows([len(e.ids) for e in examples])]
        for group in in_step(model, micro_batches([len(e.ids) for e in mine], budget)):
            batch = TokenBatch.build([[target_row(mine[i])] for i in group], model.device)
            loss = -target_log_probs(model, batch, workspace=workspace).sum() / targets
            (weight * loss).backward()
            total += loss.detach()
        return total

    def _unit(self, target_tokens: float, response_tokens: Tensor) -> Tensor | float:
        """What the mean loss of a target token is multiplied by, before ptx_coef. target_tokens: mean of a row.

        sequence_sum: the sum over a row, in units in which the policy loss of a whole response is 1. Those are its own
        tokens where that loss is a mean over tokens, max_new_tokens where it is a sum over so many.
        """
        if self.config.ptx_reduction == "token_mean":
            return 1.0
        constant = self.config.loss_aggregation == "constant"
        return target_tokens / (self.config.max_new_tokens if constant else response_tokens)

    def state(self) -> dict[str, Any]:
        return self.sampler.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.sampler.load_state(state)


class WeightAverage:
    """e <- decay * e + (1 - decay) * w after every applied update of the policy, from e = w at the start.

    Polyak and Juditsky 1992, in the exponential form of InstructGPT (Ouyang et al. 2022, appendix C.4: decay 0.992).
    fp32, of what the optimizer trains: all weights or an adapter, of their fp32 masters where the model is bf16.
    Rollouts and training go on with the live weights.
    """

    def __init__(self, optimizer: Optimizer, decay: float) -> None:
        self.optimizer, self.decay, self._in_use = optimizer, decay, False
        self.weights = [master.detach().clone() for master in optimizer.masters]

    @torch.no_grad()
    def update(self) -> None:
        for average, master in zip(self.weights, self.optimizer.masters, strict=True):
            average.lerp_(master, 1.0 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Have the model hold the average, in the same storages; behind, the very bytes it held before. May nest.

        fp32 weights change places with their average, so no second copy is made; bf16 weights are made again from
        their masters.
        """
        if self._in_use:
            yield
            return
        self._in_use = True
        try:
            self._exchange(back=False)
            yield
        finally:
            self._exchange(back=True)
            self._in_use = False

    @torch.no_grad()
    def _exchange(self, *, back: bool) -> None:
        for param, master, average in zip(self.optimizer.params, self.optimizer.masters, self.weights, strict=True):
            if master is param:
                live = param.clone()
                param.copy_(average)
                average.copy_(live)
            else:
                param.copy_(master if back else average)

    def tensors(self) -> dict[str, Tensor]:
        """Tensors for the checkpoint, in the order of the optimizer's parameters."""
        return {str(i): average for i, average in enumerate(self.weights)}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        for i, average in enumerate(self.weights):
            average.copy_(tensors[str(i)])


class ReferenceRefresh:
    """pi_ref <- pi after every ref_refresh_every steps, so that the KL limits the change since the last refresh only.

    As in ProRL (Liu et al. 2025, arXiv 2505.24864), whose optimizer starts anew there too: the trainer drops the
    policy's moments. The weights are copied into the frozen model in place; with lora the policy's adapter is copied
    into a frozen adapter `reference`, which costs an adapter's memory (r * (inputs + outputs) numbers a layer) and no
    second model. Log-probs of the next rollout are equal bit for bit: kl/ref is exactly 0 (but for rounding where
    layers are compiled: those that train have other graphs). A `ref_policy` that was given is replaced at the first
    refresh.
    """

    def __init__(self, roles: Roles, every: int) -> None:
        """UserError for a given ref_policy whose weights have other names, shapes or dtypes than the policy's."""
        self.roles, self.every, self.replaced = roles, every, False
        if roles.adapters is None:
            kinds = ({n: (p.shape, p.dtype) for n, p in m.named_parameters()} for m in (roles.policy, roles.ref_policy))
            if next(kinds) != next(kinds):
                raise UserError(
                    f"ref_refresh_every = {every}: the policy does not fit into ref_policy, a model of other shapes or "
                    "dtype; leave ref_policy out or set ref_refresh_every=0"
                )

    def after_step(self, step: int) -> bool:
        """step: number of the step just done, from 1. -> whether the reference was replaced."""
        if step % self.every:
            return False
        with torch.no_grad():
            now = self._weights(POLICY)
            for name, tensor in self._weights(REFERENCE).items():
                tensor.copy_(now[name])
        self._use()
        return True

    def _use(self) -> None:
        """From here on the reference is the copy: with lora, a model that was given takes no part any more."""
        self.replaced = True
        if self.roles.adapters is not None:
            self.roles.offload.forget(self.roles.ref_policy)
            self.roles.ref_policy = None

    def _weights(self, role: str) -> dict[str, Tensor]:
        """Tensors that make the difference between policy and reference, by the same names for both."""
        adapters = self.roles.adapters
        if adapters is not None:
            return {name.replace(f".{role}.", "."): p for name, p in adapters.parameters(role).items()}
        return dict((self.roles.policy if role == POLICY else self.roles.ref_policy).named_parameters())

    def tensors(self) -> dict[str, Tensor]:
        """Tensors for the checkpoint; empty until the first refresh, the reference comes from its source then."""
        return {name: p.detach() for name, p in self._weights(REFERENCE).items()} if self.replaced else {}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        load_parts(self._weights(REFERENCE), tensors, "reference")
        self._use()
