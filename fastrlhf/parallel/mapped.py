"""A model whose weights wait in mapped files until a rank cuts its share of them (parallel = fsdp).

`wait` leaves of a model's parameters their shapes, dtypes and device, and no memory: a stand-in, one NaN for all
elements, that nothing can write into. What it remembers are values on the CPU, views of mapped safetensors of which
nothing is resident, and what is still to be done to them: a cast, a merged adapter. `sharding.shard` takes the values
a layer at a time, and a rank keeps its share. `running` runs such a model before that, a layer at a time too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Change = Callable[[Tensor], Tensor]


class Values(NamedTuple):
    """What a parameter will be: `changes`, in their order, of a tensor on the CPU in the parameter's dtype."""

    tensor: Tensor
    changes: tuple[Change, ...] = ()


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers that are read and gathered one at a time: the longest list of modules that lies in no other list, as
    the experts of a layer do; none where there is none."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    inner = {id(module) for outer in lists for module in outer.modules() if module is not outer}
    return list(max((one for one in lists if id(one) not in inner), key=len, default=()))


def is_mapped(tensor: Tensor) -> bool:
    """Whether its memory is a file's, not torch's own."""
    return not tensor.untyped_storage().resizable()


def waits(tensor: Tensor) -> bool:
    """Whether this is a stand-in."""
    return hasattr(tensor, "waits_for")


@torch.no_grad()
def wait(model: PreTrainedModel, device: torch.device, dtypes: Mapping[str, torch.dtype] | None = None) -> None:
    """Put stand-ins on this device in the place of the parameters, which are on the CPU. A head `score`, which code
    reads and changes before the model is cut, and buffers move there. dtypes: by name what parameters are cast to."""
    small = {id(p) for p in getattr(model, "score", nn.Module()).parameters()}
    made: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        dtype = dtypes[name] if dtypes else parameter.dtype
        if id(parameter) in small:
            values = parameter.detach().to(device, dtype, copy=True)
        else:
            values = stand_in(parameter.shape, dtype, device)
        made[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
        if id(parameter) not in small:
            made[id(parameter)].waits_for = Values(parameter.detach())
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, made[id(parameter)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))


def stand_in(shape: Iterable[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A tensor of one element, NaN where the dtype has it, with this shape."""
    value = float("nan") if dtype.is_floating_point else 0
    return torch.full((), value, dtype=dtype, device=device).expand(*shape)


@torch.no_grad()
def values_of(parameter: Tensor) -> Tensor:
    """What the parameter stands for, on its device and in its dtype; of one that does not wait the tensor itself."""
    if not waits(parameter):
        return parameter.detach()
    values = parameter.waits_for.tensor.to(parameter.device).to(parameter.dtype)
    for change in parameter.waits_for.changes:
        values = change(values)
    return values


@torch.no_grad()
def change(parameter: nn.Parameter, how: Change) -> None:
    """Put how(values) in the place of the values, now or when they are taken. It may not write into its argument."""
    if waits(parameter):
        parameter.waits_for = parameter.waits_for._replace(changes=(*parameter.waits_for.changes, how))
    else:
        parameter.copy_(how(parameter))


def derived(parameter: nn.Parameter, how: Change) -> nn.Parameter:
    """A new parameter with the values how(values), of another shape perhaps; it waits where the given one does."""
    if not waits(parameter):
        return nn.Parameter(how(parameter.detach()), requires_grad=parameter.requires_grad)
    shape = how(torch.empty(parameter.shape, device="meta")).shape
    made = nn.Parameter(stand_in(shape, parameter.dtype, parameter.device), requires_grad=parameter.requires_grad)
    made.waits_for = parameter.waits_for._replace(changes=(*parameter.waits_for.changes, how))
    return made


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with parameters of its own on the same values: two models to be cut, from one that is read."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        made = memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        if waits(parameter):
            made.waits_for = parameter.waits_for
    return copy.deepcopy(model, memo)


@contextmanager
def running(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a model that waits can be run, without gradients: its layers are on the device while they run, what is
    outside of them all the time. Any other model is left alone."""
    waiting = {id(p): p for p in model.parameters() if waits(p)}
    layers = layers_of(model) if waiting else []
    inside = {id(p) for layer in layers for p in layer.parameters()}

    def take(parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            if id(parameter) in waiting:
                parameter.data = values_of(parameter)

    def leave(parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            if id(parameter) in waiting:
                parameter.data = stand_in(parameter.shape, parameter.dtype, parameter.device)

    hooks = []
    for layer in layers:
        hooks.append(layer.register_forward_pre_hook(lambda layer, _: take(layer.parameters())))
        hooks.append(layer.register_forward_hook(lambda layer, *_: leave(layer.parameters())))
    try:
        take(parameter for key, parameter in waiting.items() if key not in inside)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        leave(waiting.values())
