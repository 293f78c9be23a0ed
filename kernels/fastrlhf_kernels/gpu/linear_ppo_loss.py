"""Hidden states to the PPO loss and its gradients in three matrix products, chunk by chunk of the tokens.

Of two plans. "exponentials" is in `exponential_ppo.py`; "softmax", here, takes every option: a chunk's logits
are kept in fp32 (products of half-precision numbers are exact there), one fused kernel turns them into loss and
gradient of the logits, and that gradient lies in the operands' dtype over the logits' own memory. The two products
behind it run where torch has its fastest ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..operands import Head, LossOptions, Need, Rows, Tokens
from . import autotune, exponential_ppo, tuning
from .head import DenseHead, add_product, product
from .log_probs import rows_ppo

WORKSPACE = 1 << 30  # bytes of the fp32 logits of a chunk


def chunk_rows(n: int, vocabulary: int, size: int = 4) -> int:
    """Tokens of a chunk: as many as WORKSPACE holds at `size` bytes a logit, at least 128."""
    return max(1, min(n, max(128, WORKSPACE // size // vocabulary // 128 * 128)))


def _chunk_logits(head: DenseHead, rows: slice, out: Tensor) -> Tensor:
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


def choose_plan(head: DenseHead, options: LossOptions, plans: dict[str, Callable[[], object]]) -> str:
    """The faster plan: measured here where FASTRLHF_AUTOTUNE=1, otherwise as `tuning.ppo_plan` has it."""
    if not exponential_ppo.possible(head, options):
        return "softmax"
    chip, (vocabulary, width) = tuning.chip_of(head.x.device), head.weight.shape
    capturing = head.x.is_cuda and torch.cuda.is_current_stream_capturing()
    if not autotune.wanted() or head.x.is_meta or capturing:
        return tuning.ppo_plan(chip, width)
    tokens = 1 << (len(head) - 1).bit_length()
    question = f"linear_ppo_loss {chip.name} H={width} V={vocabulary} N<={tokens} torch {torch.__version__}"
    return autotune.fastest(question, plans, head.x.device)


def linear_ppo(head: Head, tokens: Tokens, count: Tensor, options: LossOptions, need: Need):
    """(loss terms, log-probs, entropies) of the tokens, each [n] fp32, and the HEAD_GRADIENTS in fp32.

    count: 0-d fp32, what gradients are divided by.
    """
    dense, n, vocabulary = DenseHead(head), len(tokens.mask), len(head.weight)
    given = (dense, tokens, count, options, need)
    plans = {
        "softmax": lambda: softmax_ppo(*given, chunk_rows(n, vocabulary)),
        "exponentials": lambda: exponential_ppo.exponential_ppo(*given, chunk_rows(n, vocabulary, 2)),
    }
    return plans[choose_plan(dense, options, plans)]()


def softmax_ppo(head: DenseHead, tokens: Tokens, count: Tensor, options: LossOptions, need: Need, rows: int):
    """As `linear_ppo`, `rows` tokens at a time."""
    n, vocabulary = len(head), len(head.weight)
    dtype = head.x.dtype if head.half else torch.float32
    late = dtype == torch.float16  # its smallest number is 6e-8: divide the sums, not the terms
    divisor = torch.ones_like(count) if late else count
    make = partial(torch.zeros, dtype=torch.float32, device=head.x.device)
    loss, log_probs, entropy = make(n), make(n), make(n)
    dx = make(*head.x.shape) if need.hidden else None
    dw = make(*head.weight.shape) if need.weight else None
    dbias = make(vocabulary) if need.bias else None
    dlora_b = make(*head.lora_b.shape) if need.lora else None
    dv = make(*head.v.shape) if head.v is not None and (need.hidden or need.lora) else None
    buffer = torch.empty(rows, vocabulary, dtype=torch.float32, device=head.x.device)
    each, number = head.temperature
    for first in range(0, n, rows):
        cut = slice(first, min(n, first + rows))
        z = _chunk_logits(head, cut, buffer[: cut.stop - cut.start])
        dz = z.view(dtype)[:, :vocabulary]
        part = Rows(z, head.labels[cut], None if each is None else each[cut], number)
        some = tokens.map(lambda t, cut=cut: t[cut])
        results = rows_ppo(part, some, divisor, options, dz, head.logit_scale, head.softcap)
        loss[cut], log_probs[cut], entropy[cut] = results
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
    da = head.lora_scale * (dv.T @ head.x.float()) if need.lora else None
    if dx is not None and dv is not None:
        dx.addmm_(dv, head.lora_a, alpha=head.lora_scale)
    grads = (dx, dw, dbias, da, dlora_b)
    if late:
        grads = tuple(None if t is None else t.div_(count) for t in grads)
    return loss, log_probs, entropy, grads
