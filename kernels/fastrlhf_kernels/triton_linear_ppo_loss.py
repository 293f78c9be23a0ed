"""Hidden states to the PPO loss and its gradients in three matrix products, chunk by chunk of the tokens.

A chunk's logits are kept in fp32 (products of half-precision numbers are exact there), one fused kernel turns them into
loss and gradient of the logits, and that gradient lies in the operands' dtype over the logits' own memory. The two
products behind it run where torch has its fastest ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .losses import LossOptions
from .triton_linear_log_probs import Head, add_product, product
from .triton_log_probs import rows_ppo

WORKSPACE = 1 << 30  # bytes of the fp32 logits of a chunk


def chunk_rows(n: int, vocabulary: int) -> int:
    """Tokens of a chunk: as many as WORKSPACE holds, at least 128."""
    return max(1, min(n, max(128, WORKSPACE // 4 // vocabulary // 128 * 128)))


def _chunk_logits(head: Head, rows: slice, out: Tensor) -> Tensor:
    """z of some rows before the temperature, in fp32."""
    x, weight = head.x[rows], head.weight
    if head.half and x.is_cuda:
        torch.mm(x, weight.T, out_dtype=torch.float32, out=out)
    else:
        torch.mm(x.float(), weight.T.float(), out=out)
    if head.v is not None:
        out.addmm_(head.v[rows], head.lora_b.T)
    if head.bias is not None:
        out.add_(head.bias)
    if head.logit_scale != 1:
        out.mul_(head.logit_scale)
    return out if head.softcap is None else out.div_(head.softcap).tanh_().mul_(head.softcap)


def linear_ppo(
    head: Head, labels, mask, old, advantages, weights, ref, count: Tensor, options: LossOptions, need: list[bool]
):
    """(loss terms, log-probs, entropies) of the tokens [n], and (dx, dW, dbias, dA, dB) in fp32, None where not needed.

    need: x, weight, bias, lora. mask: which rows count, None for all. count: 0-d fp32, what gradients are divided by.
    """
    n, vocabulary = len(labels), len(head.weight)
    device = head.x.device
    need_x, need_w, need_bias, need_lora = need
    dtype = head.x.dtype if head.half else torch.float32
    late = dtype == torch.float16  # its smallest number is 6e-8: divide the sums, not the terms
    divisor = torch.ones_like(count) if late else count
    loss, log_probs, entropy = (torch.empty(n, dtype=torch.float32, device=device) for _ in range(3))
    make = lambda like: torch.zeros(like.shape, dtype=torch.float32, device=device)  # noqa: E731
    dx, dw = make(head.x) if need_x else None, make(head.weight) if need_w else None
    dbias = torch.zeros(vocabulary, dtype=torch.float32, device=device) if need_bias else None
    dlora_b = make(head.lora_b) if need_lora else None
    dv = make(head.v) if head.v is not None and (need_x or need_lora) else None
    rows = chunk_rows(n, vocabulary)
    buffer = torch.empty(rows, vocabulary, dtype=torch.float32, device=device)
    mask = torch.ones(n, dtype=torch.bool, device=device) if mask is None else mask
    for first in range(0, n, rows):
        cut = slice(first, min(n, first + rows))
        z = _chunk_logits(head, cut, buffer[: cut.stop - cut.start])
        dz = z.view(dtype)[:, :vocabulary]
        degrees = head.temperature[cut] if isinstance(head.temperature, Tensor) else head.temperature
        per_token = (None if t is None else t[cut] for t in (old, advantages, weights, ref))
        loss[cut], log_probs[cut], entropy[cut] = rows_ppo(
            z, labels[cut], degrees, mask[cut], *per_token, divisor, options, dz, head.logit_scale, head.softcap
        )
        if dx is not None:
            add_product(dx[cut], dz, head.weight)
        if dw is not None:
            add_product(dw, dz.T, head.x[cut])
        if dbias is not None:
            dbias += dz.sum(0, dtype=torch.float32)
        if dlora_b is not None:
            add_product(dlora_b, dz.T, head.v[cut])
        if dv is not None:
            dv[cut] = product(dz, head.lora_b)
    da = head.lora_scale * (dv.T @ head.x.float()) if need_lora else None
    if dx is not None and dv is not None:
        dx.addmm_(dv, head.lora_a, alpha=head.lora_scale)
    grads = (dx, dw, dbias, da, dlora_b)
    if late:
        grads = tuple(None if t is None else t.div_(count) for t in grads)
    return loss, log_probs, entropy, grads
