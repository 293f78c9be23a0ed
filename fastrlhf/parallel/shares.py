"""An optimizer of which each rank holds a share, and checkpoints of it that hold whole tensors.

What is saved is what `ddp` saves, under its names, so that a run goes on with any number of ranks and any `parallel`.
torch's distributed checkpoints (DCP) are not used: they would be a second format, and the manifest of hashes, the
atomic replacement and the Hugging Face folder of a checkpoint would not hold for it. The price: the lead holds a role's
masters and moments in its host memory while it writes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastrlhf.checkpoint.state import load_optimizer_tensors, optimizer_tensors
from fastrlhf.runtime import distributed
from fastrlhf.runtime.optim import Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state with the shape of its parameter


class SharesOptimizer(Optimizer):
    """An `Optimizer` whose masters are this rank's shares of the parameters. All ranks make it of the same model and
    call its methods together.

    owners: of each master the index of its parameter. in_fp32: of each parameter whether ddp would train it as it is;
    else a checkpoint holds its fp32 master beside the weights.
    """

    owners: list[int]
    in_fp32: list[bool]

    @abstractmethod
    def _cut(self, share: int, whole: Tensor) -> Tensor:
        """This rank's share of a whole tensor, with the shape of the master of that number."""

    @abstractmethod
    def _gathered(self, values: Sequence[Tensor]) -> dict[int, Tensor]:
        """fp32 values of all ranks, one a master, as whole tensors on the CPU, by parameter; only the lead keeps
        them."""

    def finite(self) -> bool:
        return not distributed.any_of(not super().finite())

    def _stand_in(self) -> torch.optim.Optimizer:
        """An optimizer of whole parameters, as `ddp` has it, without their memory: it holds what is saved or loaded."""
        shapes = [nn.Parameter(torch.empty(()).expand(p.shape)) for p in self.params]
        group = {key: value for key, value in self.inner.param_groups[0].items() if key != "params"}
        made = type(self.inner)(shapes, lr=group["lr"])
        made.param_groups[0].update(group)
        return made

    def checkpoint(self, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        states = [self.inner.state.get(master, {}) for master in self.masters]
        steps = torch.zeros(len(self.params))
        for owner, state in zip(self.owners, states):
            steps[owner] = float(state.get("step", 0))
        steps = torch.stack(distributed.gather_each(steps)).amax(dim=0)
        moments = {}
        for key in MOMENTS:
            zeros = (torch.zeros_like(master) for master in self.masters)
            moments[key] = self._gathered([state.get(key, zero) for state, zero in zip(states, zeros)])
        masters = self.master_tensors()
        stand_in = self._stand_in()
        if distributed.is_lead():
            for index, param in enumerate(stand_in.param_groups[0]["params"]):
                if steps[index] > 0:
                    own = {key: whole[index] for key, whole in moments.items()}
                    stand_in.state[param] = {"step": steps[index].clone(), **own}
        tensors, data = optimizer_tensors(stand_in, prefix)
        return {**tensors, **masters}, data

    def master_tensors(self) -> dict[str, Tensor]:
        """The fp32 masters of low-precision parameters, whole, in the lead; all ranks call it."""
        if all(self.in_fp32):
            return {}
        whole = self._gathered(self.masters)
        return {f"master.{i}": whole[i] for i in whole if not self.in_fp32[i]}

    def _load_state(self, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
        stand_in = self._stand_in()
        load_optimizer_tensors(stand_in, tensors, data)
        whole = stand_in.param_groups[0]["params"]
        self.inner.state.clear()
        for share, (owner, master) in enumerate(zip(self.owners, self.masters)):
            state = stand_in.state.get(whole[owner])
            if state:
                own = {key: self._cut(share, value) if key in MOMENTS else value for key, value in state.items()}
                self.inner.state[master] = {key: value.to(master.device, copy=True) for key, value in own.items()}
        group = stand_in.param_groups[0]
        self.inner.param_groups[0].update({key: value for key, value in group.items() if key != "params"})
