"""A reference policy that follows: every so many steps the policy of then takes its place."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrlhf.adapters import POLICY, REFERENCE
from fastrlhf.config import UserError
from fastrlhf.roles import Roles
from fastrlhf.state import load_parts


class ReferenceRefresh:
    """pi_ref <- pi after every ref_refresh_every steps, so that the KL limits the change since the last refresh only.

    As in ProRL (Liu et al. 2025, arXiv 2505.24864); the optimizer keeps its moments. The weights are copied into the
    frozen model in place; with lora the policy's adapter is copied into a frozen adapter `reference`, which costs an
    adapter's memory (r * (inputs + outputs) numbers a layer) and no second model. Log-probs of the next rollout are
    equal bit for bit: kl/ref is exactly 0. A `ref_policy` that was given is replaced at the first refresh.
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
        """Of the checkpoint: nothing before the first refresh, the reference is made again from its source then."""
        return {name: p.detach() for name, p in self._weights(REFERENCE).items()} if self.replaced else {}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        load_parts(self._weights(REFERENCE), tensors, "reference")
        self._use()
