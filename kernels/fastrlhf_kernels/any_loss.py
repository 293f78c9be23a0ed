"""`linear_loss`: any torch function of log-probs as the loss, from hidden states, in three products with the head."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, ops
from .backend import choose_backend
from .workspace import row_bytes


class LinearLoss(NamedTuple):
    """A loss to call .backward() on, and detached statistics: those of the loss function, and `log_probs`."""

    loss: Tensor
    stats: dict[str, Any]


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_fn: Callable[..., Any],
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    lora: checks.Lora | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    workspace: int | None = None,
    backend: str = "auto",
    validate: bool | None = None,
) -> LinearLoss:
    """loss_fn(log_probs) of the labels' log-probs under `linear_log_probs`' head, in three products instead of four.

    hidden [..., H], weight [V, H]; labels [...], or [..., K] for K labels a row (a teacher's top-k, say). loss_fn gets
    log_probs in the labels' shape, fp32 (float64 for float64 inputs), and with return_entropy=True entropies [...] too.
    It returns the loss (0-d), or (loss, stats) with a mapping. It is plain torch under autograd and sees all tokens at
    once, so that it may couple them; gradients flow to hidden, weight, bias and lora, and to tensors of its own. Where
    label == ignore_index the log-prob is 0 and gets no gradient; a row of ignored labels alone may hold NaN.

    All that the second and third product wait for is the gradient of the log-probs. So the first product's logits are
    kept, in fp32, of as many rows as fit `workspace` bytes (default: 1/32 of the GPU's memory; 128 MiB on a CPU); those
    of the other rows are computed anew in the backward, a fourth product. Beside it a tile of the vocabulary's gradient
    is in memory. Without a gradient to compute nothing is kept.

    stats: what loss_fn gave, detached, with `log_probs` in the labels' shape and, where asked for, `token_entropy`.
    Raises ValueError as `linear_log_probs` does, for a loss_fn that takes other arguments, returns something else, or
    returns a loss that no gradient reaches the log-probs from, and for a workspace below one row of logits.
    """
    head = checks.head(
        *(hidden, weight, labels, bias, temperature, logit_scale, logit_softcap, lora, validate),
        workspace=workspace,
        several=True,
    )
    triton = choose_backend(backend, hidden, weight).name == "triton"
    checks.labels_in_range(labels, weight.shape[0], labels != ignore_index, validate)
    _check_signature(loss_fn, return_entropy)
    row = row_bytes(len(head.weight), checks.wide(head.hidden, head.weight).itemsize)
    rows = min(len(head.hidden), head.workspace // row)
    trained = (hidden, weight, bias, *(() if lora is None else lora[:2]))
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in trained)
    settings = (head, ignore_index, return_entropy, False)
    flat, entropy, *_ = ops.linear_log_probs(*settings, rows if wanted else 0, triton)
    log_probs = flat.view(labels.shape)
    given = (log_probs, entropy.view(hidden.shape[:-1])) if return_entropy else (log_probs,)
    loss, stats = _result(loss_fn(*given), log_probs, labels)
    if wanted and not torch.compiler.is_compiling() and not _reaches(loss, flat):
        raise ValueError(
            "loss_fn returned a loss without a gradient to log_probs; it must not detach them or turn gradients off"
        )
    kept = dict(zip(("log_probs", "token_entropy"), given)) | stats
    return LinearLoss(loss, {name: t.detach() if isinstance(t, Tensor) else t for name, t in kept.items()})


def _check_signature(loss_fn: Callable[..., Any], return_entropy: bool) -> None:
    """Whether loss_fn can be called with log-probs (and entropies), where Python knows its parameters."""
    if not callable(loss_fn):
        raise ValueError(f"loss_fn must be a function of log_probs, got {type(loss_fn).__name__}")
    if torch.compiler.is_compiling():
        return
    try:
        signature = inspect.signature(loss_fn)
    except (TypeError, ValueError):  # of functions written in C
        return
    takes = [_binds(signature, count) for count in (1, 2)]
    if takes[return_entropy]:
        return
    if takes[not return_entropy]:
        raise ValueError(
            "loss_fn takes log_probs alone, but return_entropy is True; give it a parameter for the entropies"
            if return_entropy
            else "loss_fn takes log_probs and entropies, but return_entropy is False; pass return_entropy=True"
        )
    raise ValueError(
        f"loss_fn must be callable as loss_fn({'log_probs, entropy' if return_entropy else 'log_probs'}), "
        f"but its parameters are {signature}"
    )


def _binds(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True


def _result(result: Any, log_probs: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """What loss_fn returned as (loss, stats), checked."""
    loss, stats = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    if not isinstance(loss, Tensor) or not isinstance(stats, Mapping):
        raise ValueError(f"loss_fn must return a 0-d tensor or (0-d tensor, dict), got {_kind(result)}")
    if loss.ndim or not loss.is_floating_point():
        raise ValueError(
            f"loss_fn returned a tensor of shape {tuple(loss.shape)} and {loss.dtype}; expected a 0-d loss, "
            "for example with .mean()"
        )
    if log_probs.shape != labels.shape:
        raise ValueError(
            f"loss_fn changed the shape of log_probs in place, from {tuple(labels.shape)} to {tuple(log_probs.shape)}; "
            "it must leave them as they are"
        )
    return loss, dict(stats)


def _kind(result: Any) -> str:
    if isinstance(result, tuple):
        return f"({', '.join(type(value).__name__ for value in result)})"
    return type(result).__name__


def _reaches(loss: Tensor, log_probs: Tensor) -> bool:
    """Whether the backward of `loss` comes to the operator that made `log_probs`."""
    goal, seen, left = log_probs.grad_fn, set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        if node is goal:
            return True
        seen.add(node)
        left += [following for following, _ in node.next_functions]
    return False
