"""The torch path of functions that are given logits: blocks of rows, each read once forward and once backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .checks import wide
from .chunked import FLOOR, MIB, inside_slice
from .losses import LossOptions, policy_terms


def _blocks(logits: Tensor, first: int = 0) -> Iterator[tuple[Tensor, int]]:
    """Two-dimensional views [rows, V] of logits [..., V] and the flat index of their first row, never a copy."""
    if logits.ndim == 2:
        rows = max(1, 8 * MIB // 4 // logits.shape[1])
        for lo in range(0, len(logits), rows):
            yield logits[lo : lo + rows], first + lo
    elif logits.ndim == 1:
        yield logits[None], first
    else:
        size = logits[0].numel() // logits.shape[-1] if len(logits) else 0
        for i, part in enumerate(logits):
            yield from _blocks(part, first + i * size)


def _merge(logits: Tensor) -> Tensor:
    """Leading dimensions merged where the strides allow it."""
    try:
        return logits.view(-1, logits.shape[-1])
    except RuntimeError:
        return logits


def _scaled(block: Tensor, keep: Tensor, temperature: Tensor | float, dtype: torch.dtype) -> Tensor:
    """A copy of some rows of logits, divided by the temperature; rows that do not count are 0."""
    z = block.to(dtype, copy=True)
    if isinstance(temperature, Tensor) or temperature != 1:
        z.div_(temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    return z if bool(keep.all()) else z.masked_fill_(~keep[:, None], 0)


def rows_forward(logits: Tensor, labels: Tensor, temperature: Tensor | float, ignore_index: int, entropy: bool):
    """token_log_probs: log-prob, entropy (or an empty tensor), maximum and sum of exponentials, in blocks of rows."""
    dtype, shape = wide(logits), labels.shape
    labels, n = labels.reshape(-1).long(), labels.numel()
    temperature = temperature.reshape(-1).to(dtype) if isinstance(temperature, Tensor) else temperature
    log_probs, m, s, h = (torch.zeros(n, dtype=dtype, device=logits.device) for _ in range(4))
    for block, first in _blocks(_merge(logits)) if n else ():
        cut = slice(first, first + len(block))
        keep = labels[cut] != ignore_index
        z = _scaled(block, keep, temperature[cut] if isinstance(temperature, Tensor) else temperature, dtype)
        inside, column = inside_slice(labels[cut], 0, z.shape[1])
        target = torch.where(inside, z.gather(1, column)[:, 0], torch.nan)
        m[cut] = z.amax(1)
        z.sub_(m[cut, None])
        target = target - m[cut]
        if entropy:
            e = z.clamp_(min=FLOOR).exp()
            s[cut] = e.sum(1)
            h[cut] = torch.where(keep, s[cut].log() - z.mul_(e).sum(1) / s[cut], 0)
        else:
            s[cut] = z.exp_().sum(1)
        log_probs[cut] = torch.where(keep, target - s[cut].log(), 0)
    h = h.view(shape) if entropy else h.new_empty(0)
    return log_probs.view(shape), h, m.view(shape), s.view(shape)


def rows_backward(logits, labels, temperature, ignore_index, g, ge, entropy, m, s) -> Tensor:
    """The gradient of the logits: dz = 1[y] g - p (g + ge (log p + entropy)), then / temperature."""
    dtype, n = wide(logits), labels.numel()
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    flat = out.view(n, logits.shape[-1])
    labels, m, s = labels.reshape(-1).long(), m.reshape(-1), s.reshape(-1)
    g, ge, entropy = (None if t is None else t.reshape(-1).to(dtype) for t in (g, ge, entropy))
    g = torch.zeros_like(m) if g is None else g
    temperature = temperature.reshape(-1).to(dtype) if isinstance(temperature, Tensor) else temperature
    for block, first in _blocks(_merge(logits)) if n else ():
        cut = slice(first, first + len(block))
        keep = labels[cut] != ignore_index
        degrees = temperature[cut] if isinstance(temperature, Tensor) else temperature
        z = _scaled(block, keep, degrees, dtype).sub_(m[cut, None])
        if ge is None:
            z.exp_().mul_((-g[cut] / s[cut])[:, None])
        else:
            e = z.clamp_(min=FLOOR).exp()
            z.add_((entropy[cut] - s[cut].log())[:, None]).mul_(ge[cut, None]).add_(g[cut, None])
            z.mul_(e).mul_((-1 / s[cut])[:, None])
        inside, column = inside_slice(labels[cut], 0, z.shape[1])
        z.scatter_add_(1, column, torch.where(inside, g[cut], 0)[:, None])
        z.div_(degrees[:, None] if isinstance(degrees, Tensor) else degrees)
        flat[cut] = z if bool(keep.all()) else z.masked_fill_(~keep[:, None], 0)
    return out


def rows_ppo(logits, labels, temperature, mask, old, advantages, weights, ref, count, options: LossOptions, out):
    """Log-prob -> clipped loss -> gradient of the logits: (loss terms, log-probs, entropies), each [n].

    `out` [n, V]: where the gradient goes, in its dtype, or None for none; it may be the logits themselves.
    """
    dtype, n = wide(logits), labels.numel()
    labels, mask = labels.reshape(-1).long(), mask.reshape(-1)
    old, advantages, weights, ref = (
        None if t is None else torch.where(mask, t.reshape(-1), 0).to(dtype) for t in (old, advantages, weights, ref)
    )
    degrees = temperature.reshape(-1).to(dtype)[:, None] if isinstance(temperature, Tensor) else None
    loss, log_probs, entropy = (torch.zeros(n, dtype=dtype, device=logits.device) for _ in range(3))
    for block, first in _blocks(_merge(logits)) if n else ():
        cut = slice(first, first + len(block))
        keep = mask[cut]
        z = _scaled(block, keep, temperature if degrees is None else degrees[cut, 0], dtype)
        inside, column = inside_slice(labels[cut], 0, z.shape[1])
        m = z.amax(1)
        target = torch.where(inside, z.gather(1, column)[:, 0] - m, torch.nan)
        e = z.sub_(m[:, None]).clamp_(min=FLOOR).exp()
        s = e.sum(1)
        h = s.log() - (z * e).sum(1) / s
        log_probs[cut], entropy[cut] = torch.where(keep, target - s.log(), 0), torch.where(keep, h, 0)
        per_token = (None if t is None else t[cut] for t in (old, advantages, weights, ref))
        terms, g = policy_terms(log_probs[cut], *per_token, options)
        loss[cut], g = torch.where(keep, terms, 0), torch.where(keep, g, 0) / count
        if out is None:
            continue
        if options.entropy_coef == 0:
            dz = e.mul_((-g / s)[:, None])
        else:
            z.add_((h - s.log())[:, None]).mul_(-options.entropy_coef / count).add_(g[:, None])
            dz = e.mul_(z).mul_((-1 / s)[:, None])
        dz.scatter_add_(1, column, torch.where(inside, g, 0)[:, None]).div_(
            temperature if degrees is None else degrees[cut]
        )
        out[cut] = dz.masked_fill_(~keep[:, None], 0)
    return loss, log_probs, entropy
