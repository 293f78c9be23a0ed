"""Parts of unmodified models in one kernel each while they generate: norms, the gated MLP, the rotation by positions.

transformers writes a norm as six operations, a rotation as ten; a decoding step of a small model is their launches. A
part is swapped where it is of a form that is known and where, tried on numbers, it says what ours says; all others stay
as they are. Outside the context the model is its own again. On a GPU only (`fastrlhf_kernels.backend`).
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastrlhf.parallel.sharding import is_layered
from fastrlhf_kernels.backend import choose_backend
from fastrlhf_kernels.layers import rms_norm, rotate, silu_mul

ROTATION = "apply_rotary_pos_emb"  # of the modules of transformers that define a model
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}  # of the largest number of a result


class Swap(NamedTuple):
    """The attribute `name` of the owner becomes `ours`. Neither keeps the owner alive, nor the model behind it."""

    owner: ReferenceType[Any]
    name: str
    ours: Callable[..., Any]

    @contextmanager
    def made(self) -> Iterator[None]:
        """Swapped in this context, and as it was behind it, also after an error."""
        owner = self.owner()
        if owner is None:
            yield
            return
        original = vars(owner).get(self.name)  # None: it is its class's
        setattr(owner, self.name, self.ours)
        try:
            yield
        finally:
            if original is None:
                delattr(owner, self.name)
            else:
                setattr(owner, self.name, original)


_known: WeakKeyDictionary[PreTrainedModel, tuple[tuple[Any, ...], list[Swap]]] = WeakKeyDictionary()


@contextmanager
def fused(model: PreTrainedModel, *, without: Container[int] = ()) -> Iterator[None]:
    """The model's parts are ours in this context, where they can be, and its own behind it, also after an error.
    without: ids of modules that stay their own, and with them the rotation."""
    with ExitStack() as stack:
        for swap in swaps_of(model):
            if not without or (swap.name == "forward" and id(swap.owner()) not in without):
                stack.enter_context(swap.made())
        yield


def swaps_of(model: PreTrainedModel) -> list[Swap]:
    """What of the model can be swapped, tried once for its dtype and device; nothing without the kernels, or where
    layers are gathered as they run: then they are not there to be tried."""
    weight = model.get_input_embeddings().weight
    if is_layered(model) or model.dtype not in TOLERANCE or choose_backend("auto", weight).name != "triton":
        return []
    key = (model.dtype, model.device)
    if model not in _known or _known[model][0] != key:
        with torch.no_grad():
            _known[model] = key, [*_modules(model), *rotations(model)]
    return _known[model][1]


def _modules(model: PreTrainedModel) -> Iterator[Swap]:
    """Norms and MLPs. Modules of one class and size compute the same: one of them is tried."""
    agrees: dict[tuple[Any, ...], bool] = {}
    for module in model.base_model.modules():
        made = _norm(module) or _mlp(module)
        if made is None or "forward" in vars(module):  # a forward of its own: somebody else was here
            continue
        ours, width, kind = made
        if kind not in agrees:
            agrees[kind] = _same(module.forward, ours, _numbers(model, 2, 3, width))
        if agrees[kind]:
            yield Swap(ref(module), "forward", ours)


def _norm(module: nn.Module) -> tuple[Callable[[Tensor], Tensor], int, tuple[Any, ...]] | None:
    """An RMS norm (Llama, Qwen, Mistral ...): ours, its width, and what names all that compute the same."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    named = "RMSNorm" in type(module).__name__ and getattr(module, "bias", None) is None
    if not named or not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(eps, float):
        return None

    its = ref(module)

    def ours(x: Tensor) -> Tensor:
        return rms_norm(x, its().weight, eps)

    return ours, len(weight), (type(module), len(weight), weight.dtype, eps)


def _mlp(module: nn.Module) -> tuple[Callable[[Tensor], Tensor], int, tuple[Any, ...]] | None:
    """down(silu(gate(x)) * up(x)), whatever the three are (adapters, quantised layers)."""
    names = ("gate_proj", "up_proj", "down_proj", "act_fn")
    gate, up, down, act = (getattr(module, name, None) for name in names)
    width = getattr(gate, "in_features", None)
    if not all(isinstance(part, nn.Module) for part in (gate, up, down, act)) or not isinstance(width, int):
        return None
    if "silu" not in type(act).__name__.lower():
        return None

    its = ref(module)

    def ours(x: Tensor) -> Tensor:
        mlp = its()
        return mlp.down_proj(silu_mul(mlp.gate_proj(x), mlp.up_proj(x)))

    parts = tuple(type(part) for part in (gate, up, down))
    return ours, width, (type(module), parts, width, getattr(gate, "out_features", None))


def rotations(model: PreTrainedModel) -> Iterator[Swap]:
    """The function by which the model's attention turns queries and keys."""
    for name in sorted({type(module).__module__ for module in model.base_model.modules()}):
        original = getattr(sys.modules.get(name), ROTATION, None)
        if original is None or list(inspect.signature(original).parameters)[:4] != ["q", "k", "cos", "sin"]:
            continue
        config = model.config.get_text_config()
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        angles = _numbers(model, 2, 3, size // 2)
        angles = torch.cat([angles, angles], -1)
        inputs = (_numbers(model, 2, 4, 3, size), _numbers(model, 2, 2, 3, size), angles.cos(), angles.sin())
        if size % 2 == 0 and _same(original, rotate, *inputs):
            yield Swap(ref(sys.modules[name]), ROTATION, partial(_rotated, original))


def _rotated(original: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **options: Any):
    """`rotate` where the call is of the form that was tried; the model's own function where it is not."""
    fits = not args and not options and cos.ndim == 3 and q.shape[2:] == k.shape[2:] == cos.shape[1:]
    if fits and q.dtype == k.dtype == cos.dtype == sin.dtype and q.device == cos.device:
        return rotate(q, k, cos, sin)
    return original(q, k, cos, sin, *args, **options)


def _numbers(model: PreTrainedModel, *shape: int) -> Tensor:
    """Numbers of -3 to 3 without a pattern, which take nothing from anybody's random numbers."""
    place = torch.arange(math.prod(shape), device=model.device, dtype=torch.float32)
    return (3 * torch.sin(place * 12.9898 + 0.5 * place.sqrt())).reshape(shape).to(model.dtype)


def _same(theirs: Callable[..., Any], ours: Callable[..., Any], *inputs: Tensor) -> bool:
    """Whether both say the same of these numbers; not where either cannot read them."""
    try:
        expected, found = theirs(*inputs), ours(*inputs)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return False
    pairs = zip(expected, found, strict=True) if isinstance(expected, tuple) else [(expected, found)]
    for one, other in pairs:
        if not isinstance(one, Tensor) or one.shape != other.shape or one.dtype != other.dtype:
            return False
        atol = TOLERANCE[one.dtype] * float(one.float().abs().max())
        if not torch.allclose(one.float(), other.float(), atol=atol, rtol=0.0):
            return False
    return True
