"""What a phase does, counted as its operators pass: launches, floating-point operations, bytes read and written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils.flop_counter import flop_registry

from fastrlhf.plan.counter import tensors_in

NO_KERNEL = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
NO_KERNEL |= {"_unsafe_view", "lift_fresh", "alias", "detach"}
GATHERS = {"embedding", "index", "index_select", "gather"}  # read what they return, not all of their first argument
SCATTERS = {"index_put", "index_put_", "index_copy_", "scatter", "scatter_", "masked_scatter_"}  # and write the values
BACKWARD = 2.5  # of attention's forward: five products for two
LOGIT_BYTES = 10  # a logit of `linear_ppo_loss`: written in fp32, read and written by the sweep and the products


@dataclass
class Work:
    """launched: (floating-point operations, bytes) of an operator -> how often it was launched."""

    launched: Mapping[tuple[int, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.launched: Counter[tuple[int, int]] = Counter(self.launched)

    def add(self, flops: float, size: float, times: int = 1) -> None:
        self.launched[round(flops), round(size)] += times

    def __add__(self, other: Work) -> Work:
        return Work(self.launched + other.launched)

    def copy(self) -> Work:
        return Work(self.launched)

    @property
    def launches(self) -> int:
        return sum(self.launched.values())

    @property
    def flops(self) -> int:
        return sum(flops * count for (flops, _), count in self.launched.items())

    @property
    def bytes(self) -> int:
        return sum(size * count for (_, size), count in self.launched.items())

    def count(self, function: Any, args: tuple, kwargs: dict, result: Any) -> None:
        """Count an operator that has run. Views and allocations launch nothing."""
        name = function._schema.name.partition("::")[2]
        if function.is_view or name in NO_KERNEL:
            return
        given, made = list(tensors_in(*args, *kwargs.values())), list(tensors_in(result))
        if not made:
            return  # a number for the host
        if function.namespace == "fastrlhf":
            self.add(*_ours(name, named(function, args, kwargs), given, made))
        else:
            self.add(_flops(function, name, args, kwargs, result), _bytes(name, given, made))


def named(function: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of an operator by their names, those with a default too."""
    arguments = function._schema.arguments
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
    return {**defaults, **dict(zip((a.name for a in arguments), args)), **kwargs}


def _flops(function: Any, name: str, args: tuple, kwargs: dict, result: Any) -> float:
    """Of products and attention; what works element by element is bound by its bytes."""
    if "scaled_dot_product" in name:
        return _attention(function, args, kwargs)
    known: Callable[..., int] | None = flop_registry.get(function._overloadpacket)
    return 0 if known is None else known(*args, **kwargs, out_val=result)


def _attention(function: Any, args: tuple, kwargs: dict) -> float:
    """Two products of [B, H, S, D] and [B, H, T, D]; half of them where the mask is causal."""
    given = named(function, args, kwargs)
    query, key = given["query"], given["key"]
    flops = 4 * query.numel() * key.shape[-2] * (0.5 if given["is_causal"] else 1)
    return flops * (BACKWARD if "grad_out" in given else 1)


def _bytes(name: str, given: list[Tensor], made: list[Tensor]) -> int:
    if name in GATHERS:
        return sum(map(moved, given[1:])) + 2 * sum(map(moved, made))
    if name in SCATTERS:
        return sum(map(moved, given[1:])) + moved(given[-1])
    return sum(map(moved, given)) + sum(map(moved, made))


def moved(tensor: Tensor) -> int:
    """Bytes of a tensor; an expanded one is read where it lies."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _ours(name: str, given: dict[str, Any], tensors: list[Tensor], made: list[Tensor]) -> tuple[float, int]:
    """(flops, bytes) of an operator of the kernels. Of the head: a product a forward pass; its backward makes the
    logits again and has two more; the loss has all three, and its logits pass through memory."""
    flops, size = 0, sum(map(moved, tensors)) + sum(map(moved, made))
    if name.startswith("linear_"):
        product = 2 * given["hidden"].numel() * given["weight"].shape[0]
        rows = given["hidden"].numel() // given["weight"].shape[1]
        loss = name == "linear_ppo_loss"
        flops = product * (1 if name == "linear_log_probs" else 1 + given["need_hidden"] + given["need_weight"])
        size += LOGIT_BYTES * rows * given["weight"].shape[0] * loss
    elif name == "decode_attention":
        flops = 4 * given["q"].numel() * given["k"].shape[1]
    return flops, size


def of_update(elements: int, bytes_per_weight: int) -> Work:
    """AdamW with clipping over `elements` fp32 masters: the norm reads the gradients; the update reads and writes
    masters and both moments, reads the gradients, and writes the weights of a model in another dtype."""
    work = Work()
    work.add(0, 4 * elements)
    work.add(0, (4 + 6 * 4) * elements + (bytes_per_weight * elements if bytes_per_weight < 4 else 0))
    return work
