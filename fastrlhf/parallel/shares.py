"""An optimizer of which each rank holds a share, and checkpoints of it that hold whole tensors.

What is saved is what `ddp` saves, under its names, so that a run goes on with any number of ranks and any `parallel`.
torch's distributed checkpoints (DCP) are not used: they would be a second format, and the manifest of hashes, the
atomic replacement and the Hugging Face folder of a checkpoint would not hold for it. Tensors are gathered one after the
other as the lead writes them (`Gathering`), so that no rank holds more than its share and one of them (with zero, one
bucket of them).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastrlhf.checkpoint.state import load_optimizer_tensors, optimizer_tensors
from fastrlhf.checkpoint.weight_files import Header, Streamed
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
    def _gathered(self, values: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """fp32 values of all ranks, one a master, as whole tensors on the CPU with their parameter's number, one after
        the other; all ranks run through it, and the lead alone is given them."""

    def finite(self) -> bool:
        return not distributed.any_of(not super().finite())

    def _stand_in(self) -> torch.optim.Optimizer:
        """An optimizer of whole parameters, as `ddp` has it, without their memory: it holds what is saved or loaded."""
        shapes = [nn.Parameter(torch.empty(()).expand(p.shape)) for p in self.params]
        group = {key: value for key, value in self.inner.param_groups[0].items() if key != "params"}
        made = type(self.inner)(shapes, lr=group["lr"])
        made.param_groups[0].update(group)
        return made

    def checkpoint(self, prefix: str) -> tuple[Streamed, dict[str, Any]]:
        """As `Optimizer.checkpoint`, of tensors that are gathered as they are taken."""
        states = [self.inner.state.get(master, {}) for master in self.masters]
        steps = torch.zeros(len(self.params))
        for owner, state in zip(self.owners, states):
            steps[owner] = float(state.get("step", 0))
        steps = torch.stack(distributed.gather_each(steps)).amax(dim=0)
        stand_in = self._stand_in()
        for index, param in enumerate(stand_in.param_groups[0]["params"]):
            if steps[index] > 0:
                stand_in.state[param] = {"step": steps[index].clone(), **dict.fromkeys(MOMENTS, param)}
        tensors, data = optimizer_tensors(stand_in, prefix)
        masters = {f"master.{i}": p for i, p in enumerate(self.params) if not self.in_fp32[i]}
        headers = {name: Header(tuple(tensor.shape), torch.float32) for name, tensor in {**tensors, **masters}.items()}
        return Streamed(headers, self._parts(prefix, steps)), data

    def _parts(self, prefix: str, steps: Tensor) -> Iterator[dict[str, Tensor]]:
        updated = [index for index, count in enumerate(steps.tolist()) if count > 0]
        yield {f"{prefix}.{index}.step": steps[index].clone() for index in updated}
        for key in MOMENTS if updated else ():
            states = (self.inner.state.get(master, {}) for master in self.masters)
            values = [
                state.get(key, torch.zeros((), device=m.device).expand_as(m)) for state, m in zip(states, self.masters)
            ]
            for index, whole in self._gathered(values):
                if steps[index] > 0:
                    yield {f"{prefix}.{index}.{key}": whole}
        if not all(self.in_fp32):
            for index, whole in self._gathered(self.masters):
                if not self.in_fp32[index]:
                    yield {f"master.{index}": whole}

    def _load_state(self, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
        stand_in = self._stand_in()
        load_optimizer_tensors(stand_in, tensors, data, copy=False)  # mapped files, of which a share is read
        whole = stand_in.param_groups[0]["params"]
        self.inner.state.clear()
        for share, (owner, master) in enumerate(zip(self.owners, self.masters)):
            state = stand_in.state.get(whole[owner])
            if state:
                own = {key: self._cut(share, value) if key in MOMENTS else value for key, value in state.items()}
                self.inner.state[master] = {key: value.to(master.device, copy=True) for key, value in own.items()}
        group = stand_in.param_groups[0]
        self.inner.param_groups[0].update({key: value for key, value in group.items() if key != "params"})


class Gathering:
    """What is written of a run that no rank holds whole: by name, parts that all ranks gather together, in one order.
    The lead takes them in this order (`take`), and whatever becomes of it, in the end all ranks `finish`."""

    def __init__(self, sources: Mapping[str, Iterator[dict[str, Tensor]]]) -> None:
        self.left = dict(sources)

    def take(self, name: str) -> Iterator[dict[str, Tensor]]:
        """The parts of one of them, after all those before it."""
        if name != next(iter(self.left)):
            raise RuntimeError(f"{name} is asked for, and it is the turn of {next(iter(self.left))}")
        left = self.left[name]  # where its reader stops early the rest stays, which `yield from` would end
        while (part := next(left, None)) is not None:
            yield part
        del self.left[name]

    def finish(self) -> None:
        """Run through what nobody has taken."""
        for parts in self.left.values():
            for _ in parts:
                pass
        self.left.clear()
