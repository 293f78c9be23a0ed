"""What SFT and reward-model training share: optimizer steps on mini-batches of items, each with a loss of its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrlhf.config.stages import SupervisedConfig
from fastrlhf.models.lora import Adapters
from fastrlhf.preflight.outline import supervised_steps
from fastrlhf.preflight.rows import Sentences
from fastrlhf.runtime import distributed
from fastrlhf.runtime.batching import Sampler
from fastrlhf.runtime.metrics import throughput
from fastrlhf.runtime.optim import Optimizer, lr_at
from fastrlhf.trainer import Stateful, Step, Trainer


class SupervisedTrainer(Trainer):
    """A trainer whose step is one optimizer step.

    A subclass makes `model`, `adapters` and `optimizer` after this constructor. role: what an error calls the model.
    """

    role: ClassVar[str]
    model: PreTrainedModel
    adapters: Adapters | None
    optimizer: Optimizer

    def __init__(
        self,
        config: SupervisedConfig,
        *,
        items: list[Any],
        inputs: dict[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        said: Sentences,
    ) -> None:
        steps = supervised_steps(config, len(items))
        rows = (row for item in items for row in self.token_ids(item))
        about = {"inputs": inputs, "tokenizer": tokenizer, "device": device, "said": said}
        super().__init__(config, **about, total_steps=steps, rows=rows)
        self.items = items
        self.sampler = Sampler(len(items), config.seed)

    @abstractmethod
    def accumulate(self, items: list[Any]) -> tuple[Tensor, ...]:
        """Add this rank's gradients of an optimizer step -> sums over its items, the loss first."""

    @abstractmethod
    def step_metrics(self, sums: Sequence[Tensor]) -> dict[str, float]:
        """Metrics of a step beside its loss, from the sums of `accumulate` over all ranks."""

    def updated(self, sums: Sequence[Tensor], rate: float) -> None:
        """Called after an update of the model, at this learning rate, that was finite; sums: those of `accumulate`."""

    @abstractmethod
    def token_ids(self, item: Any) -> list[list[int]]:
        """The rows of tokens that the model reads for an item."""

    def step(self) -> Step:
        config = self.config
        items = [self.items[i] for i in self.sampler.take(config.mini_batch_size)]
        self.model.train()  # transformers checkpoints activations in this mode only; dropout is off in both
        with self.tracker.phase("update"):
            optimizers = {self.role: self.optimizer}
            items, sums, norms, cause = self.guard.gradients(items, self._sums, optimizers, self.token_ids)
            rate = lr_at(
                self.steps_done,
                base=config.learning_rate,
                schedule=config.lr_schedule,
                warmup_steps=config.warmup_steps,
                total_steps=self.total_steps,
            )
            result = self.optimizer.apply(rate, norms[self.role])
            if result.applied:
                self.updated(sums, rate)
            self.guard.record(self.role, result.applied, cause)
        self.steps_done += 1
        metrics = {
            "loss/train": float(sums[0]),
            "grad_norm": result.grad_norm,
            "learning_rate": rate,
            "update/skipped": float(self.guard.updates_skipped),
            "update/left_out": float(self.guard.rows_left_out),
            **self.step_metrics(sums),
        }
        tokens = sum(len(ids) for item in items for ids in self.token_ids(item))
        return Step(metrics, throughput("perf/tokens", tokens, self.device))

    def _sums(self, items: list[Any]) -> tuple[Tensor, ...]:
        """`accumulate`, over all ranks."""
        sums = self.memory.attempt(partial(self.accumulate, items), undo=self.optimizer.zero_grad)
        distributed.all_reduce_sum(*sums)
        return sums

    def parts(self) -> dict[str, Stateful]:
        return {"sampler": self.sampler}
