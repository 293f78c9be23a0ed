"""Decoder layers of unmodified models compiled, region by region, for the steps of decoding.

A region is one layer's step: `torch.compile` sees the layer's own code, with the cache write, the rotation and the
attention as opaque operators (`fastrlhf_kernels`), so that it fuses what stands between the products and nothing else.
Layers of one form share one graph: what differs between them (weights, keys, values) are its inputs. Batch and cache
are dynamic, so no rollout compiles anew.

Products of one input are joined where memory allows (q, k, v; gate, up): copies of the weights, made when decoding
begins and never trained, saved or seen by anybody else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from fastrlhf.config.errors import UserError
from fastrlhf.parallel.sharding import is_sharded
from fastrlhf.rollout.attention import LayerStep, in_region, uses_interface
from fastrlhf.rollout.fused import fused, rotations
from fastrlhf.rollout.kv_cache import SlotCache
from fastrlhf.runtime.memory import total_bytes
from fastrlhf.runtime.regions import check_compiler, compiled, decoder_layers, missing_compiler, rests

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # children that multiply the same input
LOG = logging.getLogger(__name__)
JOINED_SHARE = 1 / 16  # of the device's memory, at most, for the joined copies


class Compilation:
    """Whether the layers of an engine's model decode compiled: asked for, possible, and tried once."""

    def __init__(self, model: PreTrainedModel, wanted: bool | None) -> None:
        """wanted: None is where it can be on a GPU. UserError for true where there is no compiler."""
        check_compiler(wanted, model.device)
        self.model, self.wanted = model, wanted
        self.settled = rests(wanted, model.device)
        self.regions: Regions | None = None

    def settle(self, cached: bool, trouble: Callable[[Regions], str]) -> str:
        """Decide, once -> a sentence where layers stay as they are though they need not. trouble(regions): what is
        wrong with decoding through them. cached: whether there is a cache to decode over. UserError where it was asked
        for and cannot be."""
        if self.settled:
            return ""
        reason = self._settled(cached, trouble)
        if reason and self.wanted:
            raise UserError(f"compile = true: {reason}; use compile = auto or false")
        self.settled = True
        return f"decoding is not compiled: {reason}" if reason else ""

    def _settled(self, cached: bool, trouble: Callable[[Regions], str]) -> str:
        reason = missing_compiler(self.model.device)
        if reason or not cached:
            return reason or f"{type(self.model).__name__} decodes without a cache of keys and values"
        if is_sharded(self.model):
            return "its weights are sharded, and a layer's are gathered anew each rollout"
        try:
            regions = Regions(self.model)
        except ValueError as error:
            return str(error)
        regions.refresh()
        reason = trouble(regions)
        if not reason:
            self.regions = regions
        return reason

    def refresh(self) -> None:
        """Before a rollout: joined weights are what the model's are now."""
        if self.regions is not None:
            self.regions.refresh()

    def drop(self) -> None:
        """Give the joined weights' memory back, until the next rollout."""
        if self.regions is not None:
            self.regions.drop()

    def tensors(self) -> list[Tensor]:
        """What compiled steps read beside the model's own weights."""
        joined = [] if self.regions is None else self.regions.joined
        return [tensor for join in joined for part in join.parts for tensor in part.buffers()]


class Part(nn.Module):
    """Columns `start` to `stop` of a joined product, in the place of the linear layer that computed them.

    Its siblings multiply the same input by the same weight: in a region they are one product.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, start: int, stop: int) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.start, self.stop = start, stop

    def forward(self, x: Tensor) -> Tensor:
        return in_region[-1].product(x, self.weight, self.bias)[..., self.start : self.stop]


class Joined:
    """The weights of linear layers that stand side by side in `parent`, in one tensor."""

    def __init__(self, parent: nn.Module, names: tuple[str, ...]) -> None:
        self.parent, self.names = parent, names
        self.linears: list[nn.Linear] = [getattr(parent, name) for name in names]
        self.parts: list[Part] = []

    def bytes(self) -> int:
        return sum(linear.weight.numel() * linear.weight.element_size() for linear in self.linears)

    def refresh(self) -> None:
        """What the linear layers hold now, in the memory that compiled code and CUDA graphs know."""
        weights = [linear.weight.detach() for linear in self.linears]
        biases = [linear.bias.detach() for linear in self.linears if linear.bias is not None]
        if self.parts and self.parts[0].weight.dtype == weights[0].dtype:
            torch.cat(weights, out=self.parts[0].weight)
            if biases:
                torch.cat(biases, out=self.parts[0].bias)
            return
        weight, bias = torch.cat(weights), torch.cat(biases) if biases else None
        stops = list(accumulate((linear.out_features for linear in self.linears), initial=0))
        self.parts = [Part(weight, bias, start, stop) for start, stop in pairwise(stops)]

    def drop(self) -> None:
        self.parts = []

    @contextmanager
    def active(self) -> Iterator[None]:
        """The parts stand where the linear layers stood."""
        try:
            for name, part in zip(self.names, self.parts, strict=False):
                self.parent._modules[name] = part
            yield
        finally:
            for name, linear in zip(self.names, self.linears, strict=True):
                self.parent._modules[name] = linear


class Regions:
    """The compiled decoder layers of a model. Raises ValueError for a model whose layers are not found."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.name = type(model).__name__
        self.layers = known_layers(model)
        inside = {id(module) for layer in self.layers for module in layer.modules()}
        self.rotations = list(rotations(model))
        self.outside = partial(fused, model, without=inside)
        self.joined = [join for layer in self.layers for join in _joins(layer)]
        if sum(join.bytes() for join in self.joined) > JOINED_SHARE * total_bytes(model.device):
            self.joined = []
        self.step: Callable[..., Any] = compiled(_layer_step)

    def refresh(self) -> None:
        """Before a rollout: the joined weights are what the model's are now."""
        for join in self.joined:
            join.refresh()

    def drop(self) -> None:
        """Give the joined weights' memory back, until the next rollout."""
        for join in self.joined:
            join.drop()

    @contextmanager
    def active(self, cache: SlotCache) -> Iterator[None]:
        """In this context, in which `cache` decodes, the model's layers are the compiled ones."""
        with ExitStack() as stack:
            stack.enter_context(self.outside())
            for swap in self.rotations:
                stack.enter_context(swap.made())
            for join in self.joined:
                stack.enter_context(join.active())
            stack.callback(_uncovered, self.layers)
            stack.callback(in_region.clear)  # an error left it as it was
            for index, layer in enumerate(self.layers):
                layer.forward = partial(self._run, cache, index, layer)
            yield

    def _run(self, cache: SlotCache, index: int, layer: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        """The layer's forward."""
        names = [name for name, value in kwargs.items() if value is cache]
        if len(names) != 1:
            raise ValueError(f"{type(layer).__name__} is not given its cache by name")
        others = {name: value for name, value in kwargs.items() if value is not cache}
        store = cache.layers[index]
        state = (store.keys, store.values, cache.rows, cache.lengths, cache.seen)
        for tensor in (store.keys, store.values):
            torch._dynamo.maybe_mark_dynamic(tensor, (0, 1))
        for value in pytree.tree_leaves((state[2:], args, others)):
            if isinstance(value, Tensor) and value.ndim and len(value) == len(cache.rows):
                torch._dynamo.maybe_mark_dynamic(value, 0)
        try:
            return self.step(layer, names[0], state, args, others)
        except torch._dynamo.exc.FailOnRecompileLimitHit:  # adapters switched on and off in many ways, or the like
            LOG.warning("the layers of %s changed too often to be compiled: they decode as they are", self.name)
            self.step = _layer_step
            return self.step(layer, names[0], state, args, others)


def _uncovered(layers: list[nn.Module]) -> None:
    for layer in layers:
        vars(layer).pop("forward", None)


def _layer_step(layer: nn.Module, name: str, state: tuple[Tensor, ...], args: tuple, kwargs: dict[str, Any]) -> Any:
    """The region: the layer's own code, over a cache that is its own alone."""
    step = LayerStep(*state)
    in_region.append(step)
    result = type(layer).forward(layer, *args, **{name: step}, **kwargs)
    in_region.pop()
    return result


def known_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The model's layers, in order. ValueError as `decoder_layers` has it, and for a model with an attention of its
    own."""
    if not uses_interface(model):
        raise ValueError(f"{type(model).__name__} does not call the attention it is configured with")
    return decoder_layers(model)


def _joins(layer: nn.Module) -> Iterator[Joined]:
    for module in layer.modules():
        for names in TOGETHER:
            parts = [module._modules.get(name) for name in names]
            if all(type(part) is nn.Linear for part in parts):  # neither adapters nor quantised
                kinds = {(p.in_features, p.weight.dtype, p.weight.device, p.bias is None) for p in parts}
                if len(kinds) == 1:
                    yield Joined(module, names)
