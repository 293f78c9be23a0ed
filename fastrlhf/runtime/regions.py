"""Decoder layers compiled region by region: what decoding and training share, and the regions of training.

A region is one decoder layer's forward, with its backward: `torch.compile` sees the layer's own code, adapters and
activation checkpointing with it. Layers of one form share one graph; what differs between them (weights) are its
inputs. Rows and tokens of a micro-batch are dynamic from the first call on, so no micro-batch of a run compiles anew,
but for the first of one row alone and the first whose sequences are joined.

Which graph a call takes follows from its form and never from the calls before it (until torch's limit of graphs is met,
of which a warning tells), and the forward that reads log-probs without gradients takes the graph that trains: a resumed
run computes the same bytes, and PPO's first ratio is 1.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import types
import weakref
from collections.abc import Callable, Hashable
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from fastrlhf.config.errors import UserError
from fastrlhf.runtime.hardware import installed

BACKEND = "inductor"
PLAIN = (Tensor, type(None), bool, int, float, str)  # of these are the arguments of a layer that trains
UNCOMPILED = (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit)
LOG = logging.getLogger(__name__)

_numbers = count()
_compiled: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def missing_compiler(device: torch.device) -> str:
    """What torch.compile lacks here, as a sentence; nothing where it can run."""
    if device.type == "cuda":
        if not installed("triton"):
            return "torch.compile needs triton on a GPU, which is not installed"
        named = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    else:
        usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        named = [os.environ.get("CXX") or usual]
    if not any(shutil.which(name) for name in named):
        return f"torch.compile needs a compiler, and {' or '.join(named)} is not on the PATH"
    return ""


def check_compiler(wanted: bool | None, device: torch.device) -> None:
    """UserError where `compile` is true and there is no compiler."""
    missing = missing_compiler(device) if wanted else ""
    if missing:
        raise UserError(f"compile = true: {missing}; install it, or use compile = false")


def rests(wanted: bool | None, device: torch.device) -> bool:
    """Whether `compile` leaves layers as they are whatever the model is: false, or auto (None) on no GPU."""
    return wanted is False or (wanted is None and device.type != "cuda")


def compiled(function: types.FunctionType) -> Callable[..., Any]:
    """The function compiled, as one graph. It is a copy with code and name of its own: torch
    keeps graphs, and counts them against its limit, by code object; and by name what it saw change from call to call,
    which between two models is every number."""
    name = f"{function.__name__}_{next(_numbers)}"
    copy = types.FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)
    return torch.compile(copy, fullgraph=True, backend=BACKEND)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The model's layers, in order. ValueError for a model that has none we know, or where somebody else changed their
    forward."""
    number = model.config.get_text_config().num_hidden_layers
    for modules in model.base_model.modules():
        if isinstance(modules, nn.ModuleList) and len(modules) == number:
            indices = [{getattr(part, "layer_idx", None) for part in layer.modules()} - {None} for layer in modules]
            if indices == [{index} for index in range(number)]:
                if any("forward" in vars(layer) for layer in modules):
                    raise ValueError(f"the layers of {type(model).__name__} have forwards that are not their own")
                return list(modules)
    raise ValueError(f"{type(model).__name__} has no list of {number} layers that each know their number")


def give_back(model: nn.Module) -> None:
    """Undo what a failed trial or an earlier trainer of the model has compiled."""
    for module in model.modules():
        call = module._compiled_call_impl
        if isinstance(call, partial) and getattr(call.func, "__func__", None) is CompiledLayers._call:
            module._compiled_call_impl = None
    _compiled.discard(model)


def is_compiled(model: nn.Module) -> bool:
    """Whether its layers run compiled where it trains."""
    return model in _compiled


class CompiledLayers:
    """The decoder layers of a model, which `attach` makes run compiled in their places.

    The modules stay what they are: names, weights, hooks and saved folders do not change, copies of the model are not
    compiled. As it is runs a layer that is given a cache of keys and values, in inference mode, in another mode than
    now (`training`), or while somebody else covers its forward, as compiled decoding does.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """ValueError as `decoder_layers` has it, and for a flash attention. What takes gradients now is what will."""
        self.model, self.layers = model, decoder_layers(model)
        if "flash" in str(model.config._attn_implementation):
            # transformers looks at the positions before it calls that of joined rows, which no graph can.
            raise ValueError("a flash attention parts the graph of a layer")
        self.training = self.layers[0].training
        self.trained = any(parameter.requires_grad for layer in self.layers for parameter in layer.parameters())
        self.trying = True  # until the first calls have shown that all is well, a failure is one
        self.steps: dict[Hashable, Callable[..., Any]] = {}

    def attach(self) -> None:
        """From here on the layers run compiled; the first call of each form compiles."""
        for layer in self.layers:
            layer._compiled_call_impl = partial(self._call, layer)  # where nn.Module.compile puts it: no copy has it
        _compiled.add(self.model)

    def _call(self, layer: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        """In the place of `nn.Module.__call__`: hooks run around the region."""
        other = layer.training is not self.training or "forward" in vars(layer) or torch.is_inference_mode_enabled()
        plain = all(isinstance(leaf, PLAIN) for leaf in pytree.tree_leaves((args, kwargs)))
        if other or not plain or not (args and isinstance(args[0], Tensor)):
            return layer._call_impl(*args, **kwargs)
        vars(layer)["forward"] = partial(self._region, layer)
        try:
            return layer._call_impl(*args, **kwargs)
        finally:
            vars(layer).pop("forward", None)

    def _region(self, layer: nn.Module, hidden: Tensor, /, *args: Any, **kwargs: Any) -> Any:
        """The layer's forward. hidden [B, L, H]."""
        graded = torch.is_grad_enabled()
        if self.trained and not hidden.requires_grad:  # else the first layer over frozen embeddings has its own graph
            hidden = hidden.detach().requires_grad_()
        torch._dynamo.maybe_mark_dynamic(hidden, (0, 1))
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):  # masks are [B, 1, L, L], what turns keys [B, L, D]
                sizes = (0, 2, 3) if leaf.ndim == 4 else tuple(range(min(leaf.ndim, 2)))
                torch._dynamo.maybe_mark_dynamic(leaf, sizes)
        with torch.set_grad_enabled(self.trained or graded):
            result = self._compiled(layer, (hidden, *args), kwargs)
        return result if graded else pytree.tree_map_only(Tensor, Tensor.detach, result)

    def _compiled(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The compiled layer. Calls that torch keeps apart have a function each: what it has learnt to be dynamic in
        one must not decide about another."""
        rows, tokens = args[0].shape[:2]
        given = tuple(name for name, value in kwargs.items() if value is not None)
        form = (rows == 1, tokens == 1, given)
        if form not in self.steps:
            self.steps[form] = compiled(_forward)
        try:
            return self.steps[form](layer, args, kwargs)
        except UNCOMPILED as error:  # adapters switched on and off in many ways, a form that the trial has not seen
            if self.trying:
                raise
            name, kind = type(self.model).__name__, type(error).__name__
            LOG.warning("some layers of %s could not be compiled (%s): they train as they are", name, kind)
            self.steps[form] = _forward
            return _forward(layer, args, kwargs)


def _forward(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The region: the layer's own code."""
    return type(layer).forward(layer, *args, **kwargs)
