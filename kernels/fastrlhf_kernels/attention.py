"""`decode_attention`: one new token a sequence against its cached keys and values. torch here, Triton on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .backend import choose_backend
from .operands import operator


@torch.no_grad()
def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    backend: str = "auto",
    validate: bool | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v over the first `lengths` positions of each row of a cache: [B, Hq, D], dtype of q.

    q [B, Hq, D]; k and v [B, T, Hkv, D], Hq a multiple of Hkv (query head h reads key head h // (Hq / Hkv));
    lengths [B] int32 or int64, 0 to T, the new token included (0: zeros). softcap: softcap * tanh(score / softcap).
    window w: only the last w positions, as sliding-window models mean it. One dtype for all three; scores and sums are
    fp32. Any strides; what lies behind `lengths` must be finite in torch, and is not read in Triton.
    Not differentiable: it is for generation. The time does not depend on a value that the host must know.
    """
    checks.floating(q=q, k=k, v=v)
    checks.integers(lengths=lengths)
    if q.ndim != 3 or k.ndim != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}, k {tuple(k.shape)}; expected [B, Hq, D] and [B, T, Hkv, D]")
    batch, heads, size = q.shape
    if k.shape[0] != batch or k.shape[3] != size:
        raise ValueError(f"k has shape {tuple(k.shape)}; expected [{batch}, T, Hkv, {size}] to fit q")
    checks.shapes(k.shape, "k", v=v)
    if k.shape[2] == 0 or heads % k.shape[2]:
        raise ValueError(f"q has {heads} heads; expected a multiple of the {k.shape[2]} heads of k")
    for name, t in (("k", k), ("v", v)):
        if t.dtype != q.dtype:
            raise ValueError(f"{name} is {t.dtype} but q is {q.dtype}; use {name}.to(q.dtype)")
    checks.shapes((batch,), "the rows of q", lengths=lengths)
    checks.devices(q=q, k=k, v=v, lengths=lengths)
    checks.number("scale", scale)
    if softcap is not None:
        checks.positive("softcap", softcap, lengths, validate)
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(f"window must be an int >= 1 or None, got {window!r}")
    if checks.readable(lengths, validate) and bool(((lengths < 0) | (lengths > k.shape[1])).any()):
        wrong = lengths[(lengths < 0) | (lengths > k.shape[1])]
        raise ValueError(f"lengths holds {int(wrong[0])}, outside [0, {k.shape[1]}], the positions of k")
    triton = choose_backend(backend, q).name == "triton"
    return attention.direct(q, k, v, lengths, float(scale), softcap, window, triton)


@operator(name="decode_attention")
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
    triton: bool,
):
    """The heads' results, [B, Hq, D]."""
    if triton:
        from .gpu.attention import attend
    else:
        attend = _attend
    return attend(q, k, v, lengths, scale, softcap, window)


@attention.fake
def _(q, **_):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float, softcap, window) -> Tensor:
    """The queries of a key head are one small matrix: keys and values are read once, and not repeated."""
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling() and len(lengths):
        longest = max(1, int(lengths.max()))  # costs nothing here, and spares the empty end of the cache
        k, v = k[:, :longest], v[:, :longest]
    batch, positions, groups, size = k.shape
    position = torch.arange(positions, device=q.device)
    seen = position < lengths[:, None]
    if window is not None:
        seen = seen & (position >= lengths[:, None] - window)
    seen = seen[:, None, None]
    grouped = q.reshape(batch, groups, q.shape[1] // groups, size)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if softcap is None:
        out = torch.nn.functional.scaled_dot_product_attention(grouped, k, v, attn_mask=seen, scale=scale)
    else:
        wide = checks.wide(q)
        scores = scale * grouped.to(wide) @ k.to(wide).transpose(2, 3)
        scores = torch.where(seen, softcap * torch.tanh(scores / softcap), -torch.inf)
        out = torch.softmax(scores, 3) @ v.to(wide)
    out = torch.where((lengths > 0)[:, None, None, None], out, 0)
    return out.reshape(q.shape).to(q.dtype)
