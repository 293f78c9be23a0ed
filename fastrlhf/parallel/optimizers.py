"""The optimizer of a stage, in the form that `parallel` names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from fastrlhf.config.base import StageConfig
from fastrlhf.parallel.sharding import ShardedOptimizer
from fastrlhf.parallel.zero import ZeroOptimizer
from fastrlhf.runtime import distributed
from fastrlhf.runtime.memory import MemoryBackoff
from fastrlhf.runtime.optim import Optimizer

FORMS: dict[str, type[Optimizer]] = {"ddp": Optimizer, "zero": ZeroOptimizer, "fsdp": ShardedOptimizer}


def make_optimizer(
    config: StageConfig,
    model: nn.Module | Mapping[str, nn.Parameter],
    memory: MemoryBackoff,
    *,
    learning_rate: float,
    max_grad_norm: float | None = None,
) -> Optimizer:
    """Build the optimizer that a stage's config names, over a model or parameters by name; of one rank all forms of
    `parallel` are the same. max_grad_norm None: the config's."""
    kind = FORMS[config.parallel if distributed.size() > 1 else "ddp"]
    return kind(
        model,
        name=config.optimizer,
        learning_rate=learning_rate,
        max_grad_norm=config.max_grad_norm if max_grad_norm is None else max_grad_norm,
        betas=config.adam_betas,
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        memory=memory,
    )
