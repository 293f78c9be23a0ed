"""The operators of log-probs, each with a backward operator of its own, and of the advantages' Triton kernels."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .checks import wide
from .eager import chunked, chunked_rows
from .operands import HEAD_GRADIENTS, Head, Need, Rows, Shaping, operator, or_empty


def kept_rows(head: Head, keep: Tensor, triton: bool) -> tuple[Head, Tensor | None, Tensor | None]:
    """The head on the kept rows, their indices (None: all rows are kept), and which of them count (None: all do).

    The last is given where no row can be left out: while a CUDA graph is captured nothing may wait for the GPU, so
    the rows that do not count are computed from zeros.
    """
    if triton and keep.is_cuda and torch.cuda.is_current_stream_capturing():
        return head._replace(hidden=torch.where(keep[:, None], head.hidden, 0)), None, keep
    rows = None if bool(keep.all()) else keep.nonzero()[:, 0]
    return head.rows(rows), rows, None


def scatter(n: int, rows: Tensor | None, values: Tensor | None) -> Tensor | None:
    """values [k, ...] of the kept rows as [n, ...], 0 in the others."""
    if rows is None or values is None:
        return values
    return values.new_zeros(n, *values.shape[1:]).index_copy_(0, rows, values)


def gather(rows: Tensor | None, values: Tensor | None) -> Tensor | None:
    return values if rows is None or values is None else values[rows]


def where(mask: Tensor | None, values: Tensor | None, other: float = 0) -> Tensor | None:
    return values if mask is None or values is None else torch.where(mask, values, other)


# --- log-probs from hidden states -------------------------------------------------------------------------------------


@operator(returns=4)
def linear_log_probs(head: Head, ignore_index: int, return_entropy: bool, batch_invariant: bool, triton: bool):
    """log-prob, entropy (or an empty tensor), maximum and sum of exponentials, each [n]."""
    n = len(head.labels)
    part, rows, masked = kept_rows(head, head.labels != ignore_index, triton)
    if triton:
        from .gpu.linear_log_probs import linear_forward

        results = linear_forward(part, entropy=return_entropy, batch_invariant=batch_invariant)
    else:
        results = chunked.linear_forward(part, entropy=return_entropy, batch_invariant=batch_invariant)
    log_probs, entropy, top, total = (scatter(n, rows, where(masked, t)) for t in results)
    return or_empty((log_probs, entropy, top, total), log_probs)


@linear_log_probs.fake
def _(head, return_entropy, **_):
    make = partial(head.hidden.new_empty, dtype=wide(head.hidden, head.weight))
    n = len(head.labels)
    return make(n), make(n if return_entropy else 0), make(n), make(n)


@operator(returns=5)
def linear_log_probs_backward(
    head: Head,
    ignore_index: int,
    triton: bool,
    grad: Tensor | None,
    grad_entropy: Tensor | None,
    entropy: Tensor,
    top: Tensor,
    total: Tensor,
    need: Need,
):
    """The HEAD_GRADIENTS in the dtypes of the operands, empty where they are not needed."""
    keep = head.labels != ignore_index
    given = [t for t in (grad, grad_entropy) if t is not None]
    if triton and len(given) == 1:  # a row whose gradient is exactly 0 adds nothing
        keep = keep & (given[0] != 0)
    part, rows, masked = kept_rows(head, keep, triton)
    grad, grad_entropy = (gather(rows, where(masked, t)) for t in (grad, grad_entropy))
    entropy = None if grad_entropy is None else gather(rows, entropy)
    top, total = gather(rows, top), gather(rows, where(masked, total, 1))
    if triton:
        from .gpu.linear_log_probs import linear_backward

        hidden, *others = linear_backward(part, grad, grad_entropy, entropy, top, total, need)
    else:
        hidden, *others = chunked.linear_backward(part, grad, grad_entropy, entropy, top, total, need)
    gradients = (scatter(len(keep), rows, hidden), *others)
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


def _linear_gradients(ctx, arguments, needs, grad, grad_entropy, *_) -> dict[str, Tensor]:
    need = Need("hidden" in needs, "weight" in needs, "bias" in needs, bool({"lora_a", "lora_b"} & needs))
    settings = (arguments["head"], arguments["ignore_index"], arguments["triton"])
    gradients = linear_log_probs_backward(*settings, grad, grad_entropy, *ctx.kept, need)
    return dict(zip(HEAD_GRADIENTS, gradients))


linear_log_probs.differentiable(_prepare, _linear_gradients)


# --- log-probs from logits --------------------------------------------------------------------------------------------


def rows_of(triton: bool):
    """The module whose rows_forward, rows_backward and rows_ppo run."""
    if triton:
        from .gpu import log_probs

        return log_probs
    return chunked_rows


@operator(returns=4)
def token_log_probs(rows: Rows, ignore_index: int, return_entropy: bool, triton: bool):
    """log-prob, entropy (or an empty tensor), maximum and sum of exponentials, in the labels' shape."""
    return rows_of(triton).rows_forward(rows, ignore_index, return_entropy)


@token_log_probs.fake
def _(rows, return_entropy, **_):
    make = partial(torch.empty, dtype=wide(rows.logits), device=rows.logits.device)
    shape = rows.labels.shape
    return make(shape), make(shape if return_entropy else 0), make(shape), make(shape)


@operator()
def token_log_probs_backward(
    rows: Rows,
    ignore_index: int,
    triton: bool,
    grad: Tensor | None,
    grad_entropy: Tensor | None,
    entropy: Tensor,
    top: Tensor,
    total: Tensor,
):
    """The gradient of the logits."""
    return rows_of(triton).rows_backward(rows, ignore_index, grad, grad_entropy, entropy, top, total)


@token_log_probs_backward.fake
def _(rows, **_):
    return torch.empty(rows.logits.shape, dtype=rows.logits.dtype, device=rows.logits.device)


def _token_gradients(ctx, arguments, needs, grad, grad_entropy, *_) -> dict[str, Tensor]:
    settings = (arguments["rows"], arguments["ignore_index"], arguments["triton"])
    return {"logits": token_log_probs_backward(*settings, grad, grad_entropy, *ctx.kept)}


token_log_probs.differentiable(_prepare, _token_gradients)


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
