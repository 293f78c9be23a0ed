"""Optimizer and random-number state as named tensors plus JSON, exact to the bit and without pickle.

`Optimizer.load_state_dict` is not used: it casts floating-point state to the parameter's dtype, which would
round fp32 moments of bf16 parameters. The state dictionaries are read and written directly instead, so any
optimizer whose state is made of tensors and plain numbers (torch's own, bitsandbytes' 8-bit ones) comes back
with the same dtypes and the same bytes.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from torch import Tensor

from fastrlhf.config.errors import UserError

PAGED = "paged"  # bitsandbytes' memory that moves between the card and the host
SHAPED = {"exp_avg", "exp_avg_sq", "momentum_buffer", "state1", "state2"}  # state with the shape of its parameter


def mismatch(problem: str, same: str = "model") -> UserError:
    """The error for a checkpoint that does not fit this run; what must be the same as before is the remedy."""
    return UserError(f"{problem}; resume with the same {same}")


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _parts(path: str, data: dict[str, Any]) -> list[str]:
    """PREFIX.0.quantized.absmax1 -> ["0", "quantized", "absmax1"]; the first is the parameter's index, or groupN."""
    return path.removeprefix(f"{data['prefix']}.").split(".")


def _flatten(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, leaf) of nested dictionaries; keys must be strings without a dot."""
    if not isinstance(value, dict):
        yield path, value
        return
    for key, item in value.items():
        if not isinstance(key, str) or "." in key:
            raise TypeError(f"optimizer state has the key {key!r} at {path!r}; only names without a dot can be saved")
        yield from _flatten(item, f"{path}.{key}")


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Take the optimizer's whole state as (tensors, JSON).

    Tensors are named `PREFIX.PARAMETER_INDEX.KEY` (order of `param_groups`) and are the live ones, not
    copies: save them before the next step. The JSON holds the class name, the hyper-parameters of each
    group, plain state values, and where each tensor lives when that is not beside its parameter (AdamW keeps
    `step` on the CPU).
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    homes: dict[str, str] = {}
    for index, parameter in enumerate(_parameters(optimizer)):
        for path, leaf in _flatten(optimizer.state.get(parameter, {}), f"{prefix}.{index}"):
            if not isinstance(leaf, Tensor):
                values[path] = leaf
                continue
            tensors[path] = leaf.detach()
            if getattr(leaf, "is_paged", False):
                homes[path] = PAGED
            elif leaf.device != parameter.device:
                homes[path] = leaf.device.type
    groups: list[dict[str, Any]] = []
    for index, group in enumerate(optimizer.param_groups):
        plain: dict[str, Any] = {}
        for key, value in group.items():
            if isinstance(value, Tensor):  # a learning rate may be one
                tensors[f"{prefix}.group{index}.{key}"] = value.detach()
            elif key not in ("params", "param_names"):
                plain[key] = value
        groups.append({**plain, "parameters": len(group["params"])})
    name = type(optimizer).__name__
    return tensors, {"class": name, "prefix": prefix, "groups": groups, "values": values, "places": homes}


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], data: dict[str, Any], *, copy: bool = True
) -> None:
    """Put back what `optimizer_tensors` took, into an optimizer built over the same parameters in the same
    order. copy: into memory of its own; else the state is the given tensors, which nothing may write to.

    Raises UserError when the class, the number of groups or parameters, or a tensor's shape does not match;
    nothing is changed then.
    """
    _check_optimizer(optimizer, tensors, data)
    parameters = _parameters(optimizer)
    state: dict[int, dict[str, Any]] = {}
    for path, leaf in [*tensors.items(), *data["values"].items()]:
        owner, *keys, last = _parts(path, data)
        if not owner.isdigit():  # group0: an option of the group that is a tensor, and stays where the live one is
            group = optimizer.param_groups[int(owner.removeprefix("group"))]
            group[last] = leaf.to(getattr(group[last], "device", leaf.device)).clone()
            continue
        parameter = parameters[int(owner)]
        if isinstance(leaf, Tensor) and copy:
            leaf = _at_home(optimizer, parameter, leaf, data["places"].get(path))
        # The dots of the path were nested dictionaries, which bitsandbytes has: 0.quantized.absmax1.
        node = state.setdefault(int(owner), {})
        for key in keys:
            node = node.setdefault(key, {})
        node[last] = leaf
    # The old state goes, also where the checkpoint has none: it was taken before the first step then. Parameters stand
    # in their own order, in which the saved optimizer's steps met them: in the file, 10 stands before 2.
    optimizer.state.clear()
    for index in sorted(state):
        optimizer.state[parameters[index]] = state[index]
    for group, saved in zip(optimizer.param_groups, data["groups"], strict=True):
        for key, value in saved.items():
            if key != "parameters":  # JSON made lists of tuples such as betas
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value


@torch.no_grad()
def load_parts(live: dict[str, Tensor], saved: dict[str, Tensor], where: str) -> None:
    """Copy saved tensors into the live ones of the same names, in place. UserError, and nothing changed, where names or
    shapes differ."""
    for name in sorted(live.keys() | saved.keys()):
        if name not in live or name not in saved or live[name].shape != saved[name].shape:
            raise mismatch(f"{where}: {name} does not match this run's weights", "options as before")
    for name, tensor in live.items():
        tensor.copy_(saved[name])


def _check_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
    if data["class"] != type(optimizer).__name__:
        both = f"the checkpoint's optimizer is {data['class']}, this run built {type(optimizer).__name__}"
        raise mismatch(both, "`optimizer` as before")
    sizes = [group["parameters"] for group in data["groups"]]
    live = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != live:
        raise mismatch(f"the checkpoint's optimizer holds {sizes} parameters by group, this run has {live}")
    parameters = _parameters(optimizer)
    for path, tensor in tensors.items():
        owner, *_, key = _parts(path, data)
        if owner.isdigit() and key in SHAPED and tensor.shape != parameters[int(owner)].shape:
            here = list(parameters[int(owner)].shape)
            saved = f"optimizer tensor {path} has shape {list(tensor.shape)} in the checkpoint"
            raise mismatch(f"{saved}, its parameter has {here}")


def _at_home(optimizer: torch.optim.Optimizer, parameter: Tensor, saved: Tensor, home: str | None) -> Tensor:
    """Copy a saved CPU tensor to where the optimizer keeps it; bitsandbytes' paged buffers must come from
    its own allocator.
    """
    if home == PAGED:
        buffer = optimizer.get_state_buffer(parameter, dtype=saved.dtype)
        if getattr(buffer, "is_paged", False):  # small ones are not
            return buffer.copy_(saved)
    return saved.to("cpu" if home == "cpu" else parameter.device).clone()


def seed_rng(seed: int) -> None:
    """Seed every generator that `rng_tensors` records, CUDA devices included. seed: any integer >= 0."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_tensors() -> dict[str, Tensor]:
    """State of every generator a run may draw from: Python's `random`, numpy's global one, torch CPU, and
    each CUDA device.
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)
    if name != "MT19937":
        raise UserError(f"numpy's global generator is {name}; only its default MT19937 can be checkpointed")
    tensors = {
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors.update({f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())})
    return tensors


def restore_rng(tensors: dict[str, Tensor]) -> None:
    """Put back what `rng_tensors` took. Warns when the number of CUDA devices changed: the run goes on, but
    not bit for bit.
    """
    version, *words = tensors["python"].tolist()
    gauss = tensors["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    *keys, position, has_gauss = tensors["numpy"].tolist()
    cached = tensors["numpy_gauss"].item()
    numpy.random.set_state(("MT19937", numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    saved = sum(name.startswith("cuda") for name in tensors)
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if saved != present:
        warnings.warn(
            f"the checkpoint holds random state of {saved} CUDA devices and {present} are here: "
            "not resumed bit for bit",
            stacklevel=2,
        )
    for index in range(min(saved, present)):
        torch.cuda.set_rng_state(tensors[f"cuda{index}"], index)
