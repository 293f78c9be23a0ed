"""The critic V(s_t): a scalar head on a trunk of its own, on the policy's, or on the policy's base with an adapter.

Every form is read the same way: hidden states of the trunk that predict the response tokens, then the head in fp32.
On the policy's trunk the value loss ends at the head: its gradient, large while V is far from the returns, would be
most of what moves that trunk, and the run would end in noise (docs/options.md).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastrlhf.config.errors import UserError
from fastrlhf.models.heads import ValueHead, last_hidden, scalar_outputs
from fastrlhf.models.lora import VALUE, Adapters
from fastrlhf.models.token_batch import TokenBatch
from fastrlhf.parallel.sharding import is_whole
from fastrlhf.runtime.batching import derive_seed


class Critic:
    """trunk: the model whose hidden states are read; head: nn.Linear [1, H], or a ValueHead on the policy's trunk.

    shares_trunk: one forward gives the policy's log-probs and the values. owns_trunk: the trunk is a model of the
    critic's own. Neither holds with an adapter of its own: the layers are the policy's, the forward is another.
    """

    def __init__(
        self,
        trunk: PreTrainedModel,
        head: nn.Linear | ValueHead,
        *,
        adapters: Adapters | None = None,
        shares_trunk: bool = False,
    ) -> None:
        self.trunk, self.head, self.adapters, self.shares_trunk = trunk, head, adapters, shares_trunk

    @classmethod
    def separate(cls, model: PreTrainedModel) -> Critic:
        """A whole model of its own, with the head `score`."""
        return cls(model, model.score)

    @classmethod
    def shared_trunk(cls, policy: PreTrainedModel, seed: int) -> Critic:
        """A new head on the policy's trunk, drawn from the run's seed: values, log-probs and both losses come from one
        forward."""
        head = ValueHead(width_of(policy), seed=derive_seed(seed, "value_head"), device=policy.device)
        return cls(policy, head, shares_trunk=True)

    @classmethod
    def adapter(cls, adapters: Adapters, head: nn.Linear | None = None) -> Critic:
        """The base with the critic's own adapter, and a copy of a head (None: a zero head)."""
        own_head = zero_head(adapters.model) if head is None else copy.deepcopy(head).float().requires_grad_(True)
        return cls(adapters.model, own_head, adapters=adapters)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Have the trunk compute the critic's hidden states, inside; they may be differentiated."""
        if self.adapters is None:
            yield
            return
        with self.adapters.using(VALUE):
            yield

    def read(self, hidden: Tensor) -> Tensor:
        """hidden [..., H] -> values [...] fp32. With a shared trunk no gradient passes on to `hidden`."""
        return scalar_outputs(self.head, hidden.detach() if self.shares_trunk else hidden)

    def values(self, batch: TokenBatch) -> Tensor:
        """V(s_t) [N] fp32 of the response tokens of a batch."""
        with self.active():
            return self.read(batch.hidden(self.trunk))

    def end_values(self, rows: Sequence[list[int]], finished: Sequence[bool]) -> Tensor:
        """Return V of the state after the last token [B] fp32. rows: prompt and response of each; 0 where a stop token
        ended the response, for nothing follows."""
        values = torch.zeros(len(rows), device=self.trunk.device)
        cut = [row for row, done in enumerate(finished) if not done]
        if cut or not is_whole(self.trunk):  # of a sharded one all ranks run it
            with self.active():
                values[cut] = self.read(last_hidden(self.trunk, [rows[row] for row in cut]))
        return values

    def parameters(self) -> dict[str, Tensor]:
        """What the critic's optimizer trains, by name. With a shared trunk that is the head: the policy's optimizer
        trains the trunk."""
        if self.adapters is not None:
            return {**self.adapters.parameters(VALUE), **self._head_parameters()}
        return self._head_parameters() if self.shares_trunk else dict(self.trunk.named_parameters())

    @property
    def owns_trunk(self) -> bool:
        return self.adapters is None and not self.shares_trunk

    def _head_parameters(self) -> dict[str, Tensor]:
        return {f"score.{name}": p for name, p in self.head.named_parameters()}


def check_value_head(saved: Mapping[str, Tensor], where: str) -> None:
    """UserError for the head of a shared trunk as earlier versions made it. saved: the tensors of a checkpoint."""
    if "score.weight" in saved:
        raise UserError(
            f"{where}: its critic = shared_trunk is one linear layer, as earlier versions had it, whose runs ended in "
            "noise; this one has a hidden layer there: start again with another output_dir"
        )


def zero_head(model: PreTrainedModel) -> nn.Linear:
    """[1, H] in fp32 on the model's device: predicts 0 before it has seen a return."""
    head: Any = nn.Linear(width_of(model), 1, bias=False, device=model.device, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    return head


def width_of(model: PreTrainedModel) -> int:
    """H, the size of the states that a causal LM's head reads."""
    return model.get_output_embeddings().weight.shape[1]
