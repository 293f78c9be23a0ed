"""Running real code without its numbers: tensors that have shapes and no memory, beside small ones that have both.

Weights, and whatever is computed of them, are PyTorch's fake tensors. Token ids, positions, lengths and masks are real:
what the host decides by them, it decides as in a run. Where the host asks for a number that nobody knows (a loss, a
gradient's norm, whether two tensors are close), the number is 1: finite, positive and true.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from fastrlhf.config.errors import UserError
from fastrlhf.config.outcome import outcome
from fastrlhf.plan.counter import LiveBytes, tensors_in
from fastrlhf.plan.work import Work

aten = torch.ops.aten
KNOWN_BYTES = 16 << 20  # the largest tensor of known numbers; a larger one would take memory and time
SMALL = 1 << 12  # elements: whatever operators make of so few, it is looked at before it is computed
NUMBER = {aten._local_scalar_dense.default, aten.item.default, aten.equal.default}


class UnknownNumbers(LiveBytes):
    """Counts as `LiveBytes` does. What is computed of an unknown number has none itself; `unknown` makes the first.

    work: what the operators on unknown numbers did since the phase began; the others are the host's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._making = 0
        self._stack = ExitStack()

    def __enter__(self) -> UnknownNumbers:
        super().__enter__()
        self._stack.enter_context(_Lists())
        # It logs, with a traceback, what is raised and told here.
        self._stack.enter_context(mock.patch.object(logging.getLogger(fake_tensor.__name__), "disabled", True))
        # Of fake tensors torch swaps the insides, which it refuses for those that anything else refers to.
        self._stack.enter_context(mock.patch.object(torch.nn.Module, "_apply", _apply))
        self._stack.enter_context(mock.patch.object(FakeTensor, "__deepcopy__", _copied, create=True))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()
        super().__exit__(kind, error, trace)

    @contextmanager
    def phase(self) -> Iterator[None]:
        """Have `peak`, `rounded_peak` and `work` be those of what runs inside."""
        self.work = Work()
        with super().phase():
            yield

    def unknown(self, make: Callable[[], Any]) -> Any:
        """make(), every tensor of which is without numbers."""
        self._making += 1
        try:
            return make()
        finally:
            self._making -= 1

    def run(self, function: Any, args: tuple, kwargs: dict) -> Any:
        tensors = list(tensors_in(*args, *kwargs.values()))
        if not any(isinstance(t, FakeTensor) for t in tensors):
            return self._known(function, args, kwargs, tensors)
        if function in NUMBER:
            return _one(tensors[0].dtype)
        written = _written(function, args, kwargs)
        if written and not any(isinstance(t, FakeTensor) for t in written):
            args, kwargs = tree_map_only(FakeTensor, _ones, (args, kwargs))
            return function(*args, **kwargs)
        if function in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            args = (args[0], _positions(args[1]), *args[2:])
        with self.fake:
            result, error = outcome(lambda: function(*args, **kwargs))
        if isinstance(
            error, (RuntimeError, NotImplementedError)
        ):  # torch's rule for shapes is stricter than its kernel
            why = str(error).strip().partition("\n")[0]
            raise UserError(f"torch cannot tell what {function} takes without computing it here: {why}") from error
        if error is not None:
            raise error
        self.work.count(function, args, kwargs, result)
        return result

    def _known(self, function: Any, args: tuple, kwargs: dict, tensors: list[Tensor]) -> Any:
        """Computed, unless the result would be large or is to be unknown."""
        fixed = function._schema.is_mutable or not _SHAPE_UNKNOWN.isdisjoint(function.tags)
        looked_at = self._making or not tensors or any(t.numel() > SMALL for t in tensors)
        if looked_at and not fixed:
            with self.fake:
                shapes = function(*args, **kwargs)
            owned = [] if function.is_view else list(tensors_in(shapes))
            fresh = not tensors and any(t.is_floating_point() and t.numel() > 1 for t in owned)  # to be filled
            if self._making or fresh or any(t.untyped_storage().nbytes() > KNOWN_BYTES for t in owned):
                return shapes
        return function(*args, **kwargs)


class _Lists(TorchFunctionMode):
    """`Tensor.tolist` of unknown numbers, which torch refuses."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is Tensor.tolist and isinstance(args[0], FakeTensor):
            return _ones(args[0]).tolist()
        return function(*args, **(kwargs or {}))


_SHAPE_UNKNOWN = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


def _apply(module: torch.nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> torch.nn.Module:
    """`nn.Module._apply`, with new parameters for those that change and the very same for the others."""
    for child in module.children() if recurse else ():
        child._apply(change)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                changed = change(parameter)
            if changed is not parameter:
                module._parameters[name] = torch.nn.Parameter(changed, requires_grad=parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = change(buffer)
    return module


def _copied(tensor: FakeTensor, memo: dict[int, Any]) -> Any:
    """`Tensor.__deepcopy__`, which copies a fake tensor's mode too, with all that it knows: to free that copy crashes
    the process."""
    if id(tensor) not in memo:
        copy = tensor.detach().clone()
        parameter = isinstance(tensor, torch.nn.Parameter)
        memo[id(tensor)] = torch.nn.Parameter(copy, tensor.requires_grad) if parameter else copy
    return memo[id(tensor)]


def _one(dtype: torch.dtype) -> Any:
    return torch.ones((), dtype=dtype).item()


def _ones(tensor: Tensor) -> Tensor:
    return torch.ones(tensor.shape, dtype=tensor.dtype)


def _written(function: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors that an operator writes to."""
    if not function._schema.is_mutable:
        return []
    named = {**dict(zip((a.name for a in function._schema.arguments), args)), **kwargs}
    arguments = [a.name for a in function._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return list(tensors_in(*map(named.get, arguments)))


def _positions(indices: Any) -> list[Any]:
    """Indices without masks, whose shape would depend on numbers: where a mask is true, by dimension."""
    result: list[Any] = []
    for index in indices:
        masks = isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
        result += list(index.nonzero().unbind(1)) if masks and not isinstance(index, FakeTensor) else [index]
    return result
