"""Argument checks: every refusal is a ValueError that names the argument, the value and what is expected.

Shapes, dtypes and devices are always checked. Values are read only where that costs no synchronisation: on CPU
tensors, outside torch.compile (`validate=True` also reads CUDA tensors, `validate=False` reads none).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .operands import Head, LossOptions, Rows, Tokens
from .workspace import default_workspace, row_bytes

Lora = tuple[Tensor, Tensor, float]  # A [r, H], B [V, r], scale
ESTIMATORS = ("k1", "k2", "k3", "abs")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def wide(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of computation and results: float64 if any input is float64, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def tensor(name: str, value: object, dtypes: Sequence[torch.dtype], what: str) -> None:
    """`value` must be a plain, dense tensor of one of `dtypes`."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
    if type(value).__name__ == "DTensor":
        raise ValueError(f"{name} is a DTensor; pass a plain tensor, for example {name}.full_tensor()")
    if value.is_quantized or value.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got {value.layout} {value.dtype}; use {name}.to_dense()")
    if value.dtype not in dtypes:
        raise ValueError(f"{name} must be {what}, got {value.dtype}")


def floating(**tensors: object) -> None:
    for name, value in tensors.items():
        if value is not None:
            tensor(name, value, FLOATS, "float32, bfloat16, float16 or float64")


def integers(**tensors: object) -> None:
    for name, value in tensors.items():
        if value is not None:
            tensor(name, value, (torch.int32, torch.int64), "int32 or int64")


def masks(**tensors: object) -> None:
    kinds = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    for name, value in tensors.items():
        tensor(name, value, kinds, "bool or integer")


def shapes(expected: Sequence[int], of: str, **tensors: Tensor | None) -> None:
    for name, value in tensors.items():
        if value is not None and tuple(value.shape) != tuple(expected):
            raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {tuple(expected)}, the shape of {of}")


def devices(**tensors: Tensor | None) -> None:
    given = [(name, value.device) for name, value in tensors.items() if value is not None]
    for name, device in given[1:]:
        if device != given[0][1]:
            raise ValueError(f"{name} is on {device} but {given[0][0]} is on {given[0][1]}; move them to one device")


def readable(value: Tensor, validate: bool | None) -> bool:
    """Whether the values of a tensor may be looked at here."""
    if torch.compiler.is_compiling() or validate is False:
        return False
    return value.device.type == "cpu" or (validate is True and value.device.type != "meta")


def labels_in_range(labels: Tensor, vocabulary: int, keep: Tensor, validate: bool | None) -> None:
    """Labels where `keep` is true must lie in [0, V)."""
    if not readable(labels, validate):
        return
    wrong = keep & ((labels < 0) | (labels >= vocabulary))
    if bool(wrong.any()):
        value = int(labels[wrong].reshape(-1)[0])
        raise ValueError(f"labels holds {value}, outside [0, {vocabulary}), the vocabulary of weight or logits")


def positive(name: str, value: float | Tensor, like: Tensor, validate: bool | None, of: str = "labels") -> None:
    """A number > 0, or a tensor of the shape of `like` (0-d tensors too) that holds such numbers."""
    if isinstance(value, Tensor):
        floating(**{name: value})
        if value.ndim:
            shapes(like.shape, of, **{name: value})
        if value.device != like.device and value.ndim:
            raise ValueError(f"{name} is on {value.device} but {of} is on {like.device}; move them to one device")
        if readable(value, validate) and bool((value <= 0).any()):
            raise ValueError(f"{name} must be > 0, got {float(value[value <= 0].reshape(-1)[0])}")
        return
    number(name, value)
    if not value > 0:
        raise ValueError(f"{name} must be > 0, got {value}")


def number(name: str, value: object, low: float = -math.inf) -> None:
    """A finite number >= low."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value) or value < low:
        raise ValueError(f"{name} must be {'finite' if low == -math.inf else f'finite and >= {low:g}'}, got {value}")


def clips(clip_range: float, clip_range_high: float | None = None, dual_clip: float | None = None) -> None:
    number("clip_range", clip_range, low=0)
    if clip_range_high is not None:
        number("clip_range_high", clip_range_high, low=0)
    if dual_clip is not None:
        number("dual_clip", dual_clip, low=1)


def no_transforms(*tensors: Tensor | None) -> None:
    """torch.func would differentiate or batch through code that is written for plain autograd only."""
    if torch.compiler.is_compiling():
        return
    if any(t is not None and torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors):
        raise RuntimeError("fastrlhf_kernels does not support torch.func transforms (grad, vmap, ...); use .backward()")


def head(
    hidden,
    weight,
    labels,
    bias,
    temperature,
    logit_scale,
    logit_softcap,
    lora,
    validate,
    *,
    workspace: int | None = None,
    several: bool = False,
) -> Head:
    """The arguments of the head, checked, with the leading dimensions flattened to rows.

    workspace: bytes, None for the device's default. several: there may be K labels a row, labels [..., K].
    """
    a, b, lora_scale = (None, None, 1.0) if lora is None else _lora(lora)
    floating(hidden=hidden, weight=weight, bias=bias, lora_A=a, lora_B=b)
    integers(labels=labels)
    if weight.ndim != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected [V, H] with V >= 1")
    vocabulary, width = weight.shape
    if hidden.ndim == 0 or hidden.shape[-1] != width:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}; expected [..., {width}] to fit weight [V, {width}]")
    more = " (and one more for several labels a row)" if several else ""
    several = several and labels.ndim == hidden.ndim
    of, like = "labels", labels
    if several:
        of, like = "hidden without its last dimension", labels.new_empty(labels.shape[:-1])
    if like.shape != hidden.shape[:-1]:
        expected = f"{tuple(hidden.shape[:-1])}, the shape of hidden without its last dimension"
        raise ValueError(f"labels has shape {tuple(labels.shape)}; expected {expected}{more}")
    shapes((vocabulary,), "the rows of weight", bias=bias)
    if a is not None:
        rank = a.shape[0] if a.ndim == 2 else 0
        shapes((rank, width), "[r, H]", lora_A=a)
        shapes((vocabulary, rank), "[V, r]", lora_B=b)
    devices(hidden=hidden, weight=weight, labels=labels, bias=bias, lora_A=a, lora_B=b)
    positive("temperature", temperature, like, validate, of)
    number("logit_scale", logit_scale)
    if logit_softcap is not None:
        positive("logit_softcap", logit_softcap, like, validate, of)
    no_transforms(hidden, weight, bias, a, b)
    temperature, temperatures = split_temperature(temperature, like)
    temperatures = None if temperatures is None else temperatures.reshape(-1)
    n = like.numel()
    rows, labels = hidden.reshape(n, width), labels.reshape(n, labels.shape[-1]) if several else labels.reshape(-1)
    scalars = (temperature, logit_scale, logit_softcap, a, b, lora_scale)
    return Head(rows, weight, labels, bias, temperatures, *scalars, _workspace(workspace, hidden, weight))


def _workspace(workspace: int | None, hidden: Tensor, weight: Tensor) -> int:
    """Bytes for logits, enough for a row of them."""
    if workspace is None:
        return default_workspace(hidden.device)
    if isinstance(workspace, bool) or not isinstance(workspace, int):
        raise ValueError(f"workspace must be a number of bytes, got {type(workspace).__name__}")
    row = row_bytes(len(weight), wide(hidden, weight).itemsize)
    if workspace < row:
        raise ValueError(
            f"workspace is {workspace} bytes, less than one row of logits, {row} bytes for a vocabulary of "
            f"{len(weight)}; pass at least that"
        )
    return workspace


def _lora(lora: Lora) -> Lora:
    if not isinstance(lora, (tuple, list)) or len(lora) != 3:
        raise ValueError("lora must be (A [r, H], B [V, r], scale)")
    number("lora scale", lora[2])
    return lora


def split_temperature(temperature: float | Tensor, labels: Tensor) -> tuple[float, Tensor | None]:
    """The number, and the tensor in the shape of the labels, of which the latter counts where it is given."""
    if isinstance(temperature, Tensor):
        return 1.0, temperature.detach().to(labels.device).expand(labels.shape)
    return float(temperature), None


def token_mask(response_mask: Tensor, like: Tensor, of: str, **others: Tensor | None) -> Tensor:
    """The mask as bool, after checking that it and the other tensors have the shape and device of `like`."""
    masks(response_mask=response_mask)
    shapes(like.shape, of, response_mask=response_mask, **others)
    devices(**{of: like}, response_mask=response_mask, **others)
    return response_mask != 0


def tokens(old_log_probs, advantages, response_mask, weights, ref_log_probs, like: Tensor, of: str) -> Tokens:
    """What a policy loss takes beside its log-probs, checked against the shape of `like`, without their gradients."""
    given = {"old_log_probs": old_log_probs, "advantages": advantages, "weights": weights}
    given["ref_log_probs"] = ref_log_probs
    floating(**given)
    mask = token_mask(response_mask, like, of, **given)
    return Tokens(old_log_probs, advantages, mask, weights, ref_log_probs).map(Tensor.detach)


def rows(
    logits: Tensor, labels: Tensor, temperature: float | Tensor, validate: bool | None, *, several: bool = False
) -> Rows:
    """logits [..., V] of any floating dtype, labels [...] on the same device, a temperature > 0.

    several: there may be K labels a row, labels [..., K], at a temperature that is a number.
    """
    integers(labels=labels)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; expected [..., V] with V >= 1")
    if not several or labels.ndim != logits.ndim or labels.shape[:-1] != logits.shape[:-1]:
        shapes(logits.shape[:-1], "logits without its last dimension", labels=labels)
    devices(logits=logits, labels=labels)
    positive("temperature", temperature, labels, validate)
    no_transforms(logits)
    temperature, temperatures = split_temperature(temperature, labels)
    return Rows(logits, labels, temperatures, temperature)


def loss_options(
    clip_range, clip_range_high, dual_clip, kl_coef=0.0, kl_estimator="k3", entropy_coef=0.0, ref_log_probs=None
) -> LossOptions:
    """The numbers of a policy loss, checked."""
    clips(clip_range, clip_range_high, dual_clip)
    for name, value in (("kl_coef", kl_coef), ("entropy_coef", entropy_coef)):
        number(name, value)
    estimator("kl_estimator", kl_estimator)
    if kl_coef != 0 and ref_log_probs is None:
        raise ValueError(f"kl_coef is {kl_coef} but ref_log_probs is not given; pass it, or kl_coef=0")
    high = clip_range if clip_range_high is None else clip_range_high
    return LossOptions(clip_range, high, dual_clip, kl_coef, kl_estimator, entropy_coef)


def rows_of_tokens(name: str, value: Tensor) -> None:
    if value.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected [B, T]")


def discounts(gamma: float, gae_lambda: float | Tensor, values: Tensor) -> None:
    """Both in [0, 1]; gae_lambda may be one number for each row of values (on a GPU its range is not looked at)."""
    numbers = {"gamma": gamma, "gae_lambda": gae_lambda}
    if isinstance(gae_lambda, Tensor):
        del numbers["gae_lambda"]
        floating(gae_lambda=gae_lambda)
        shapes(values.shape[:1], "the rows of values", gae_lambda=gae_lambda)
        devices(values=values, gae_lambda=gae_lambda)
        if not gae_lambda.is_cuda and not bool(((gae_lambda >= 0) & (gae_lambda <= 1)).all()):
            raise ValueError("gae_lambda must be in [0, 1] in every row")
    for name, value in numbers.items():
        number(name, value, low=0)
        if value > 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")


def estimator(name: str, value: str) -> None:
    if value not in ESTIMATORS:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, ESTIMATORS))}")


def groups(size: int | None, rows: int) -> None:
    """None, or a number of rows that divides `rows`."""
    if size is None:
        return
    if isinstance(size, bool) or not isinstance(size, int) or size < 1 or rows % size:
        raise ValueError(f"group_size must be an int >= 1 that divides the {rows} rows of values, got {size!r}")


def divisor(normalizer: float | Tensor | None, mask: Tensor, dtype: torch.dtype, validate: bool | None) -> Tensor:
    """The divisor as a 0-d tensor on the mask's device."""
    if normalizer is None:
        return mask.sum().clamp(min=1).to(dtype)
    if isinstance(normalizer, Tensor) and normalizer.ndim:
        raise ValueError(f"normalizer has shape {tuple(normalizer.shape)}; expected a number or a 0-d tensor")
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.detach() if normalizer.is_floating_point() else normalizer.detach().to(dtype)
    positive("normalizer", normalizer, mask, validate, of="response_mask")
    if isinstance(normalizer, Tensor):
        return normalizer.to(mask.device, dtype)
    return torch.full((), float(normalizer), dtype=dtype, device=mask.device)
