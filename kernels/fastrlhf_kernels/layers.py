"""What stands between the matrix products of a decoder layer, for generation: norm, rotation, gate, cache.

A decoding step of a small model is bound by how many kernels it starts. Each function here is one; the same formula in
torch is five to ten. They round where transformers' modules round, so that a decoder that uses them generates what the
plain forward says. Not differentiable: they are for generation, under no_grad.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import checks
from .backend import choose_backend
from .operands import operator


@torch.no_grad()
def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: str = "auto") -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019, eq. 4), in the dtype of x.

    x [..., H] and weight [H] of one dtype. The mean is fp32; the normed x is rounded to its dtype before it meets the
    weight, as Llama's norm in transformers does. ValueError for other shapes and dtypes.
    """
    checks.floating(x=x, weight=weight)
    checks.shapes(x.shape[-1:], "the last dimension of x", weight=weight)
    if weight.dtype != x.dtype:
        raise ValueError(f"weight is {weight.dtype} but x is {x.dtype}; use weight.to(x.dtype)")
    checks.devices(x=x, weight=weight)
    if choose_backend(backend, x).name == "triton":
        from .gpu import layers

        return layers.rms_norm(x, weight, float(eps))
    wide = x.float() if x.dtype != torch.float64 else x
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


@torch.no_grad()
def silu_mul(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """silu(gate) * up (SwiGLU without its products: Shazeer 2020, eq. 5), of one shape and dtype, which it returns.

    silu(gate) is rounded to the dtype before the product. ValueError for other shapes and dtypes.
    """
    checks.floating(gate=gate, up=up)
    checks.shapes(gate.shape, "gate", up=up)
    if up.dtype != gate.dtype:
        raise ValueError(f"up is {up.dtype} but gate is {gate.dtype}; use up.to(gate.dtype)")
    checks.devices(gate=gate, up=up)
    if choose_backend(backend, gate).name == "triton":
        from .gpu import layers

        return layers.silu_mul(gate, up)
    return F.silu(gate) * up


@torch.no_grad()
def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Queries and keys turned by their positions (RoPE: Su et al. 2021, eq. 34; halves, not pairs, as transformers).

    q [B, Hq, T, D] and k [B, Hk, T, D] of any strides; cos and sin [B or 1, T, D] of their dtype: x * cos + (-x2, x1) *
    sin with x1, x2 the halves of x. Every product is rounded to the dtype. Returns new q and k of the same shapes.
    ValueError for other shapes and dtypes.
    """
    checks.floating(q=q, k=k, cos=cos, sin=sin)
    batch, _, length, size = _four(q)
    if (k.ndim, k.shape[0], *k.shape[2:]) != (4, batch, length, size):
        raise ValueError(f"k has shape {tuple(k.shape)}; expected [{batch}, Hk, {length}, {size}] to fit q")
    for name, t in (("cos", cos), ("sin", sin)):
        if t.ndim != 3 or t.shape[0] not in (1, batch) or t.shape[1:] != (length, size):
            raise ValueError(f"{name} has shape {tuple(t.shape)}; expected [{batch} or 1, {length}, {size}]")
    if size % 2 or len({q.dtype, k.dtype, cos.dtype, sin.dtype}) > 1:
        raise ValueError(f"heads of {size} in {q.dtype}, {k.dtype}, {cos.dtype}, {sin.dtype}; expected one dtype, even")
    checks.devices(q=q, k=k, cos=cos, sin=sin)
    return rotation.direct(q, k, cos, sin, choose_backend(backend, q).name == "triton")


@operator(returns=2, name="rotate")
def rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, triton: bool):
    """Both turned, each token's heads beside each other in memory: [B, T, H, D] seen as [B, H, T, D]."""
    if triton:
        from .gpu import layers

        return layers.rotate(q, k, cos, sin)
    cos, sin, half = cos[:, None], sin[:, None], q.shape[3] // 2
    turned = []
    for t in (q, k):
        out = _heads_like(t)
        torch.add(t * cos, torch.cat([-t[..., half:], t[..., :half]], -1) * sin, out=out)
        turned.append(out)
    return tuple(turned)


@rotation.fake
def _(q, k, **_):
    return _heads_like(q), _heads_like(k)


def _heads_like(t: Tensor) -> Tensor:
    batch, heads, length, size = t.shape
    return t.new_empty(batch, length, heads, size).transpose(1, 2)


@torch.no_grad()
def store_tokens(
    k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor, lengths: Tensor, *, backend: str = "auto"
) -> None:
    """Write a token's keys and values of each row into a cache: keys[slots[b], lengths[b]] = k[b].

    k and v [B, Hk, D] of any strides; keys and values [slots, positions, Hk, D] of the same dtype, changed in place;
    slots and lengths [B] int64, inside the cache (not checked: the host would wait). ValueError for other shapes.
    """
    checks.floating(k=k, v=v, keys=keys, values=values)
    checks.integers(slots=slots, lengths=lengths)
    for (name, new), (where, store) in (((("k", k), ("keys", keys))), (("v", v), ("values", values))):
        if new.ndim != 3 or store.ndim != 4 or new.shape[1:] != store.shape[2:] or new.dtype != store.dtype:
            raise ValueError(
                f"{name} is {tuple(new.shape)} of {new.dtype} and {where} {tuple(store.shape)} of {store.dtype}; "
                "expected [B, Hk, D] and [slots, positions, Hk, D] of one dtype"
            )
    checks.shapes(k.shape[:1], "the rows of k", slots=slots, lengths=lengths)
    checks.devices(k=k, v=v, keys=keys, values=values, slots=slots, lengths=lengths)
    triton = k.shape == v.shape and choose_backend(backend, k).name == "triton"
    storing.direct(k, v, keys, values, slots, lengths, triton)


@operator(returns=0, name="store_tokens", mutates=("keys", "values"))
def storing(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor, lengths: Tensor, triton: bool):
    if triton:
        from .gpu import layers

        return layers.store_tokens(k, v, keys, values, slots, lengths)
    keys[slots, lengths], values[slots, lengths] = k, v
    return None


@storing.fake
def _(**_):
    return None


def _four(q: Tensor) -> torch.Size:
    if q.ndim != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected [B, Hq, T, D]")
    return q.shape
