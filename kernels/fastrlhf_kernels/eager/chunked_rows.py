"""The torch path of functions that are given logits: blocks of rows, each read once forward and once backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..checks import wide
from ..operands import LossOptions, Rows, Tokens
from .chunked import FLOOR, MIB, add_at_labels, at_labels, inside_slice, sum_of_labels
from .losses import policy_terms


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


def _divisors(rows: Rows, dtype: torch.dtype) -> Callable[[slice], Tensor | float]:
    """The temperature of some rows: one number, or a column with a number a row."""
    if rows.temperatures is None:
        return lambda cut: rows.temperature
    column = rows.temperatures.reshape(-1, 1).to(dtype)
    return lambda cut: column[cut]


def _scaled(block: Tensor, keep: Tensor, divisor: Tensor | float, dtype: torch.dtype) -> Tensor:
    """A copy of some rows of logits, divided by the temperature; rows that do not count are 0."""
    z = block.to(dtype, copy=True)
    if isinstance(divisor, Tensor) or divisor != 1:
        z.div_(divisor)
    return z if bool(keep.all()) else z.masked_fill_(~keep[:, None], 0)


def _flat_labels(rows: Rows) -> Tensor:
    """The labels as [n], or as [n, K] where there are several a row."""
    labels = rows.labels.long()
    if labels.ndim < rows.logits.ndim:
        return labels.reshape(-1)
    return labels.reshape(labels.shape[:-1].numel(), labels.shape[-1])


def _counted(labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Which labels [n] or [n, K] count, and which rows [n]."""
    keep = labels != ignore_index
    return keep, keep if keep.ndim == 1 else keep.any(1)


def rows_forward(rows: Rows, ignore_index: int, entropy: bool):
    """token_log_probs: log-prob, entropy (or an empty tensor), maximum and sum of exponentials, in blocks of rows."""
    dtype, shape, device = wide(rows.logits), rows.logits.shape[:-1], rows.logits.device
    labels, divisors = _flat_labels(rows), _divisors(rows, dtype)
    n = len(labels)
    log_probs = torch.zeros(labels.shape, dtype=dtype, device=device)
    m, s, h = (torch.zeros(n, dtype=dtype, device=device) for _ in range(3))
    for block, first in _blocks(_merge(rows.logits)) if n else ():
        cut = slice(first, first + len(block))
        keep, live = _counted(labels[cut], ignore_index)
        z = _scaled(block, live, divisors(cut), dtype)
        inside, column = inside_slice(labels[cut], 0, z.shape[1])
        target = torch.where(inside, at_labels(z, column, labels[cut]), torch.nan)
        m[cut] = z.amax(1)
        z.sub_(m[cut, None])
        target = target - _like(m[cut], target)
        if entropy:
            e = z.clamp_(min=FLOOR).exp()
            s[cut] = e.sum(1)
            h[cut] = torch.where(live, s[cut].log() - z.mul_(e).sum(1) / s[cut], 0)
        else:
            s[cut] = z.exp_().sum(1)
        log_probs[cut] = torch.where(keep, target - _like(s[cut].log(), target), 0)
    h = h.view(shape) if entropy else h.new_empty(0)
    return log_probs.view(rows.labels.shape), h, m.view(shape), s.view(shape)


def _like(per_row: Tensor, per_label: Tensor) -> Tensor:
    """[n] so that it goes with [n] or [n, K]."""
    return per_row if per_label.ndim == 1 else per_row[:, None]


def rows_backward(rows: Rows, ignore_index: int, g, ge, entropy: Tensor, m: Tensor, s: Tensor) -> Tensor:
    """The gradient of the logits: dz = 1[y] g - p (g + ge (log p + entropy)), then / temperature."""
    logits, dtype, labels = rows.logits, wide(rows.logits), _flat_labels(rows)
    out, n = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device), len(labels)
    flat = out.view(n, logits.shape[-1])
    m, s = m.reshape(-1), s.reshape(-1)
    ge, entropy = (None if t is None else t.reshape(-1).to(dtype) for t in (ge, entropy))
    g = m.new_zeros(labels.shape) if g is None else g.reshape(labels.shape).to(dtype)
    g = torch.where(labels != ignore_index, g, 0)
    whole, divisors = sum_of_labels(g), _divisors(rows, dtype)
    for block, first in _blocks(_merge(logits)) if n else ():
        cut = slice(first, first + len(block))
        keep, live = _counted(labels[cut], ignore_index)
        z = _scaled(block, live, divisors(cut), dtype).sub_(m[cut, None])
        if ge is None:
            z.exp_().mul_((-whole[cut] / s[cut])[:, None])
        else:
            e = z.clamp_(min=FLOOR).exp()
            z.add_((entropy[cut] - s[cut].log())[:, None]).mul_(ge[cut, None]).add_(whole[cut, None])
            z.mul_(e).mul_((-1 / s[cut])[:, None])
        inside, column = inside_slice(labels[cut], 0, z.shape[1])
        add_at_labels(z, column, inside & keep, g[cut])
        z.div_(divisors(cut))
        flat[cut] = z if bool(live.all()) else z.masked_fill_(~live[:, None], 0)
    return out


def rows_ppo(rows: Rows, tokens: Tokens, count: Tensor, options: LossOptions, out: Tensor | None):
    """Log-prob -> clipped loss -> gradient of the logits: (loss terms, log-probs, entropies), each [n].

    tokens [n]: 0 where their mask is false. `out` [n, V]: where the gradient goes, in its dtype, or None for none.
    """
    dtype, labels = wide(rows.logits), rows.labels.reshape(-1).long()
    n, divisors = len(labels), _divisors(rows, dtype)
    loss, log_probs, entropy = (torch.zeros(n, dtype=dtype, device=labels.device) for _ in range(3))
    for block, first in _blocks(_merge(rows.logits)) if n else ():
        cut = slice(first, first + len(block))
        part = tokens.map(lambda t, cut=cut: t[cut])
        z = _scaled(block, part.mask, divisors(cut), dtype)
        inside, column = inside_slice(labels[cut], 0, z.shape[1])
        m = z.amax(1)
        target = torch.where(inside, z.gather(1, column)[:, 0] - m, torch.nan)
        e = z.sub_(m[:, None]).clamp_(min=FLOOR).exp()
        s = e.sum(1)
        h = s.log() - (z * e).sum(1) / s
        log_probs[cut], entropy[cut] = torch.where(part.mask, target - s.log(), 0), torch.where(part.mask, h, 0)
        terms, g = policy_terms(log_probs[cut], part, options)
        loss[cut], g = torch.where(part.mask, terms, 0), torch.where(part.mask, g, 0) / count
        if out is None:
            continue
        if options.entropy_coef == 0:
            dz = e.mul_((-g / s)[:, None])
        else:
            z.add_((h - s.log())[:, None]).mul_(-options.entropy_coef / count).add_(g[:, None])
            dz = e.mul_(z).mul_((-1 / s)[:, None])
        dz.scatter_add_(1, column, torch.where(inside, g, 0)[:, None]).div_(divisors(cut))
        out[cut] = dz.masked_fill_(~part.mask[:, None], 0)
    return loss, log_probs, entropy
