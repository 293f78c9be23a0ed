"""The operators of log-probs, each with a backward operator of its own, and of the advantages' Triton kernels."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .checks import wide
from .eager import chunked, chunked_rows
from .operands import HEAD_GRADIENTS, Head, Need, Rows, Shaping, operator, or_empty


def counted_rows(head: Head, counted: Tensor, triton: bool) -> tuple[Head, Tensor | None, Tensor | None]:
    """The head on the rows that count, their indices (None: all), and which of the head's rows count (None: all do).

    On a GPU no row is left out, since the host would have to wait for their number (and a CUDA graph cannot): the rows
    that do not count are computed from zeros.
    """
    if triton:
        return head._replace(hidden=torch.where(counted[:, None], head.hidden, 0)), None, counted
    rows = None if bool(counted.all()) else counted.nonzero()[:, 0]
    return head.rows(rows), rows, None


def scatter(n: int, rows: Tensor | None, values: Tensor | None) -> Tensor | None:
    """values [k, ...] of the kept rows as [n, ...], 0 in the others."""
    if rows is None or values is None:
        return values
    return values.new_zeros(n, *values.shape[1:]).index_copy_(0, rows, values)


def gather(rows: Tensor | None, values: Tensor | None) -> Tensor | None:
    return values if rows is None or values is None else values[rows]


def where(mask: Tensor | None, values: Tensor | None, other: float = 0) -> Tensor | None:
    """values [n] or [n, K] of the rows in the mask [n], `other` in the rest."""
    if mask is None or values is None:
        return values
    return torch.where(mask if values.ndim == 1 else mask[:, None], values, other)


# --- log-probs from hidden states -------------------------------------------------------------------------------------


@operator(returns=5)
def linear_log_probs(
    head: Head, ignore_index: int, return_entropy: bool, batch_invariant: bool, kept_rows: int, triton: bool
):
    """log-prob in the labels' shape; entropy (or an empty tensor), maximum and sum of exponentials, each [n]; logits.

    The logits of the first kept_rows rows that count, in the layout of the backend, are for the backward alone.
    """
    n, labels = len(head.labels), head.labels
    part, rows, masked = counted_rows(_marked(head, ignore_index), row_counts(labels, ignore_index), triton)
    logits = _room(head, kept_rows, triton)
    options = {"entropy": return_entropy, "batch_invariant": batch_invariant, "kept": _filled(head, logits, triton)}
    if triton:
        from .gpu.linear_log_probs import linear_forward

        results = linear_forward(part, **options)
    else:
        results = chunked.linear_forward(part, **options)
    log_probs, entropy, top, total = (scatter(n, rows, where(masked, t)) for t in results)
    if labels.ndim == 2:
        log_probs = torch.where(labels != ignore_index, log_probs, 0)
    return or_empty((log_probs, entropy, top, total, logits), log_probs)


@linear_log_probs.fake
def _(head, return_entropy, kept_rows, triton, **_):
    make = partial(head.hidden.new_empty, dtype=wide(head.hidden, head.weight))
    n, logits = len(head.labels), _room(head, kept_rows, triton)
    return make(head.labels.shape), make(n if return_entropy else 0), make(n), make(n), logits


def row_counts(labels: Tensor, ignore_index: int) -> Tensor:
    """Which rows [n] have a label [n] or [n, K] that counts."""
    counted = labels != ignore_index
    return counted if labels.ndim == 1 else counted.any(1)


def _marked(head: Head, ignore_index: int) -> Head:
    """With several labels a row: those that do not count as -1, which is no column (ignore_index may be one)."""
    if head.labels.ndim == 1:
        return head
    return head._replace(labels=torch.where(head.labels != ignore_index, head.labels, -1))


def _room(head: Head, rows: int, triton: bool) -> Tensor:
    """An empty buffer for the logits of some rows: fp32 [rows, V] with V rounded up to 64 in Triton, else [V, rows]."""
    vocabulary = len(head.weight)
    shape = (rows, -(-vocabulary // 64) * 64) if triton else (vocabulary, rows)
    return head.hidden.new_empty(shape, dtype=wide(head.hidden, head.weight))


def _filled(head: Head, logits: Tensor, triton: bool) -> Tensor | None:
    """The buffer as logits [rows, V]; None: nothing is kept."""
    if not logits.numel():
        return None
    return logits[:, : len(head.weight)] if triton else logits.T


@operator(returns=5)
def linear_log_probs_backward(
    head: Head,
    ignore_index: int,
    triton: bool,
    grad: Tensor | None,
    grad_entropy: Tensor | None,
    log_probs: Tensor | None,
    entropy: Tensor,
    top: Tensor,
    total: Tensor,
    logits: Tensor,
    need: Need,
):
    """The HEAD_GRADIENTS in the dtypes of the operands, empty where they are not needed.

    log_probs: what the forward gave, for several labels a row in Triton.
    """
    n, labels = len(head.labels), head.labels
    if grad is not None and labels.ndim == 2:
        grad = torch.where(labels != ignore_index, grad, 0)
    part, rows, masked = counted_rows(_marked(head, ignore_index), row_counts(labels, ignore_index), triton)
    grad, grad_entropy = (gather(rows, where(masked, t)) for t in (grad, grad_entropy))
    entropy = None if grad_entropy is None else gather(rows, entropy)
    top, total = gather(rows, top), gather(rows, where(masked, total, 1))
    kept = _filled(head, logits, triton)
    if triton:
        from .gpu.linear_log_probs import linear_backward

        hidden, *others = linear_backward(part, grad, grad_entropy, entropy, top, total, need, kept, log_probs)
    else:
        hidden, *others = chunked.linear_backward(part, grad, grad_entropy, entropy, top, total, need, kept)
    gradients = (scatter(n, rows, hidden), *others)
    cast = [None if t is None else t.to(getattr(head, n).dtype) for n, t in zip(HEAD_GRADIENTS, gradients)]
    return or_empty(cast, top)


def empty_gradients(head: Head, need: Need, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    """Shapes of the HEAD_GRADIENTS, in `dtype` (None: that of each operand); empty tensors where not needed."""
    needed = (need.hidden, need.weight, need.bias, need.lora, need.lora)
    gradients = []
    for name, yes in zip(HEAD_GRADIENTS, needed):
        if yes:
            operand = getattr(head, name)
            gradients.append(torch.empty(operand.shape, dtype=dtype or operand.dtype, device=operand.device))
        else:
            gradients.append(head.hidden.new_empty(0, dtype=dtype or wide(head.hidden, head.weight)))
    return tuple(gradients)


@linear_log_probs_backward.fake
def _(head, need, **_):
    return empty_gradients(head, need, None)


def _prepare(ctx, arguments, outputs) -> None:
    ctx.kept = outputs[1:]
    ctx.mark_non_differentiable(*outputs[2 if arguments["return_entropy"] else 1 :])


def _prepare_linear(ctx, arguments, outputs) -> None:
    _prepare(ctx, arguments, outputs)
    if arguments["triton"] and arguments["head"].labels.ndim == 2:
        ctx.kept = (*outputs[1:], outputs[0])


def _linear_gradients(ctx, arguments, needs, grad, grad_entropy, *_) -> dict[str, Tensor]:
    need = Need("hidden" in needs, "weight" in needs, "bias" in needs, bool({"lora_a", "lora_b"} & needs))
    settings = (arguments["head"], arguments["ignore_index"], arguments["triton"])
    entropy, top, total, logits, *log_probs = ctx.kept
    kept = (log_probs[0] if log_probs else None, entropy, top, total, logits)
    gradients = linear_log_probs_backward(*settings, grad, grad_entropy, *kept, need)
    return dict(zip(HEAD_GRADIENTS, gradients))


linear_log_probs.differentiable(_prepare_linear, _linear_gradients)


# --- log-probs from logits --------------------------------------------------------------------------------------------


def rows_of(triton: bool):
    """The module whose rows_forward, rows_backward and rows_ppo run (several labels a row have their own in Triton)."""
    if triton:
        from .gpu import log_probs

        return log_probs
    return chunked_rows


@operator(returns=4)
def token_log_probs(rows: Rows, ignore_index: int, return_entropy: bool, triton: bool):
    """log-prob [...] or [..., K] as the labels; entropy (or an empty tensor), maximum and sum of exponentials [...]."""
    if triton and rows.labels.ndim == rows.logits.ndim:
        return rows_of(triton).several_forward(rows, ignore_index, return_entropy)
    return rows_of(triton).rows_forward(rows, ignore_index, return_entropy)


@token_log_probs.fake
def _(rows, return_entropy, **_):
    make = partial(torch.empty, dtype=wide(rows.logits), device=rows.logits.device)
    shape = rows.logits.shape[:-1]
    return make(rows.labels.shape), make(shape if return_entropy else 0), make(shape), make(shape)


@operator()
def token_log_probs_backward(
    rows: Rows,
    ignore_index: int,
    triton: bool,
    grad: Tensor | None,
    grad_entropy: Tensor | None,
    log_probs: Tensor | None,
    entropy: Tensor,
    top: Tensor,
    total: Tensor,
):
    """The gradient of the logits. log_probs: what the forward gave, for several labels a row in Triton."""
    kept = (entropy, top, total)
    if triton and rows.labels.ndim == rows.logits.ndim:
        return rows_of(triton).several_backward(rows, ignore_index, grad, grad_entropy, log_probs, *kept)
    return rows_of(triton).rows_backward(rows, ignore_index, grad, grad_entropy, *kept)


@token_log_probs_backward.fake
def _(rows, **_):
    return torch.empty(rows.logits.shape, dtype=rows.logits.dtype, device=rows.logits.device)


def _token_gradients(ctx, arguments, needs, grad, grad_entropy, *_) -> dict[str, Tensor]:
    settings = (arguments["rows"], arguments["ignore_index"], arguments["triton"])
    entropy, top, total, *log_probs = ctx.kept
    kept = (log_probs[0] if log_probs else None, entropy, top, total)
    return {"logits": token_log_probs_backward(*settings, grad, grad_entropy, *kept)}


def _prepare_token(ctx, arguments, outputs) -> None:
    _prepare(ctx, arguments, outputs)
    rows = arguments["rows"]
    if arguments["triton"] and rows.labels.ndim == rows.logits.ndim:
        ctx.kept = (*outputs[1:], outputs[0])


token_log_probs.differentiable(_prepare_token, _token_gradients)


# --- advantages: Triton only, and called without the dispatcher but under torch.compile -------------------------------


@operator(returns=3)
def gae(
    rewards: Tensor | None,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    gae_lambda: float,
    bootstrap_values: Tensor | None,
    shaping: Shaping,
    whiten_eps: float | None,
    group_size: int,
):
    """The shaped rewards (or an empty tensor), advantages and returns: see `gpu.gae.gae_rows`."""
    from .gpu.gae import gae_rows

    results = gae_rows(rewards, values, mask, gamma, gae_lambda, bootstrap_values, shaping, whiten_eps, group_size)
    return or_empty(results, results[1])


@gae.fake
def _(values, mask, shaping, **_):
    make = partial(values.new_empty, dtype=torch.float32)
    return make(0 if shaping.scores is None else mask.shape), make(mask.shape), make(mask.shape)


@operator()
def shape_rewards(shaping: Shaping, mask: Tensor):
    """Rewards [B, T]."""
    from .gpu.gae import shape_rewards

    return shape_rewards(shaping, mask)


@operator()
def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool, eps: float):
    """x whitened."""
    from .gpu.gae import masked_whiten

    return masked_whiten(x, mask, shift_mean, eps)


@shape_rewards.fake
@masked_whiten.fake
def _(mask, **_):
    return torch.empty(mask.shape, dtype=torch.float32, device=mask.device)
