"""The torch.library operators of log-probs and advantages: schema, fake (shape) functions and autograd.

An operator is opaque to torch.compile, runs outside autocast (its results are fp32), and differentiates once.
`linear_log_probs` and `token_log_probs` have a backward operator of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import chunked, chunked_rows
from .checks import wide

HEAD = (
    "Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, Tensor? temperatures, float temperature, "
    "float logit_scale, float? logit_softcap, Tensor? lora_a, Tensor? lora_b, float lora_scale"
)


def operator(name: str, schema: str):
    def register(body):
        def outside_autocast(*args):
            device = next(a.device for a in args if isinstance(a, Tensor))
            with torch.autocast(device.type, enabled=False):
                return body(*args)

        return torch.library.custom_op(f"fastrlhf::{name}", outside_autocast, mutates_args=(), schema=schema)

    return register


def once_differentiable() -> None:
    """Called by every backward: with create_graph=True the gradient mode is on in there."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("fastrlhf_kernels differentiates once: double backward (create_graph=True) is not supported")


def wanted(*groups: tuple) -> list[bool]:
    """For each group of inputs, whether a gradient will be asked of one of them."""
    grad = torch.is_grad_enabled()
    return [grad and any(isinstance(t, Tensor) and t.requires_grad for t in group) for group in groups]


def head_of_kept_rows(
    hidden, weight, labels, bias, temperatures, temperature, logit_scale, logit_softcap, lora_a, lora_b, lora_scale,
    keep,
):  # fmt: skip
    """The head on the kept rows, their labels, and their indices (None when every row is kept)."""
    rows = None if bool(keep.all()) else keep.nonzero()[:, 0]
    degrees = temperature if temperatures is None else temperatures
    head = chunked.Head.build(
        hidden, weight, rows, bias, degrees, logit_scale, logit_softcap, lora_a, lora_b, lora_scale
    )
    return head, (labels if rows is None else labels[rows]).long(), rows


def triton_head(hidden, weight, labels, bias, temperatures, temperature, logit_scale, logit_softcap, *rest):
    """The same for the Triton kernels; then their module, and which rows count if no row could be left out: while a
    CUDA graph is captured, where nothing may wait for the GPU. (Otherwise None.)
    """
    from . import triton_linear_log_probs as kernels

    *lora, keep = rest
    if hidden.is_cuda and torch.cuda.is_current_stream_capturing():
        rows, masked, hidden = None, keep, torch.where(keep[:, None], hidden, 0)
    else:
        rows, masked = None if bool(keep.all()) else keep.nonzero()[:, 0], None
    degrees = temperature if temperatures is None else temperatures
    head = kernels.Head.build(hidden, weight, rows, bias, degrees, logit_scale, logit_softcap, *lora)
    return head, gather(rows, labels).contiguous(), rows, kernels, masked


def scatter(n: int, rows: Tensor | None, values: Tensor) -> Tensor:
    return values if rows is None else values.new_zeros(n).index_copy_(0, rows, values)


def gather(rows: Tensor | None, values: Tensor | None) -> Tensor | None:
    return values if rows is None or values is None else values[rows]


def as_outputs(grads, like) -> tuple[Tensor, ...]:
    """Operators return tensors only: an empty one stands for a gradient that nobody needs."""
    return tuple(like.new_empty(0) if g is None else g for g in grads)


# --- log-probs from hidden states -------------------------------------------------------------------------------------


@operator(
    "linear_log_probs",
    f"({HEAD}, int ignore_index, bool return_entropy, bool batch_invariant, bool triton) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def linear_log_probs(*args):
    *head_args, ignore_index, return_entropy, batch_invariant, triton = args
    labels, weight = head_args[2], head_args[1]
    n = len(labels)
    if triton:
        head, y, rows, kernels, masked = triton_head(*head_args, labels != ignore_index)
        found = kernels.linear_forward(head, y, entropy=return_entropy, batch_invariant=batch_invariant)
        if masked is not None:
            found = [t if t.numel() == 0 else torch.where(masked, t, 0) for t in found]
        return tuple(t if t is found[1] and not return_entropy else scatter(n, rows, t) for t in found)
    head, y, rows = head_of_kept_rows(*head_args, labels != ignore_index)
    tiles = chunked.sweep_tiles(
        len(y), *weight.shape, cuda=weight.is_cuda, entropy=return_entropy, batch_invariant=batch_invariant
    )
    log_probs, entropy, m, s = chunked.sweep_forward(head, y, tiles, entropy=return_entropy, pad=batch_invariant)
    entropy = m.new_empty(0) if entropy is None else scatter(n, rows, entropy)
    return scatter(n, rows, log_probs), entropy, scatter(n, rows, m), scatter(n, rows, s)


@linear_log_probs.register_fake
def _(hidden, weight, labels, *rest):
    dtype, n = wide(hidden, weight), len(labels)
    entropy = hidden.new_empty(n if rest[-3] else 0, dtype=dtype)
    return tuple(t if t is not None else hidden.new_empty(n, dtype=dtype) for t in (None, entropy, None, None))


@operator(
    "linear_log_probs_backward",
    f"({HEAD}, int ignore_index, bool triton, Tensor? grad, Tensor? grad_entropy, Tensor entropy, Tensor m, Tensor s, "
    "bool[4] need) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_log_probs_backward(*args):
    *head_args, ignore_index, triton, g, ge, entropy, m, s, need = args
    hidden, weight, labels, bias = head_args[:4]
    likes = (hidden, weight, bias, head_args[8], head_args[9])
    if triton:
        keep = labels != ignore_index
        for grad in (g, ge):  # a row whose gradients are exactly 0 adds nothing
            keep = keep & (grad != 0) if (g is None) != (ge is None) and grad is not None else keep
        head, y, rows, kernels, masked = triton_head(*head_args, keep)
        entropy = None if ge is None else entropy
        if masked is not None:
            g, ge = (None if t is None else torch.where(masked, t, 0) for t in (g, ge))
            s = torch.where(masked, s, 1)
        picked = (None if t is None else gather(rows, t).float().contiguous() for t in (g, ge, entropy, m, s))
        dx, *others = kernels.linear_backward(head, y, *picked, need)
        dx = dx if dx is None or rows is None else dx.new_zeros(hidden.shape).index_copy_(0, rows, dx)
        return as_outputs((None if t is None else t.to(like.dtype) for t, like in zip((dx, *others), likes)), m)
    head, y, rows = head_of_kept_rows(*head_args, labels != ignore_index)
    tiles = chunked.sweep_tiles(len(y), *weight.shape, cuda=weight.is_cuda, entropy=ge is not None)
    m, s = gather(rows, m), gather(rows, s)
    g = torch.zeros_like(m) if g is None else gather(rows, g).to(m.dtype)
    ge = None if ge is None else gather(rows, ge).to(m.dtype)
    entropy = None if ge is None else gather(rows, entropy)
    grads = chunked.sweep_backward(head, y, g, ge, entropy, m, s, tiles, need, weight.dtype)
    dx, dw, db, da, dlora_b = grads.finish(len(labels), rows)
    return as_outputs((None if t is None else t.to(like.dtype) for t, like in zip((dx, dw, db, da, dlora_b), likes)), m)


def fake_gradients(likes, need, dtype=None):
    h, w, b, lora = need
    wanted = zip((h, w, b, lora, lora), likes)
    return tuple(
        torch.empty(t.shape, dtype=dtype or t.dtype, device=t.device) if yes else likes[0].new_empty(0, dtype=empty)
        for (yes, t), empty in ((pair, dtype or wide(likes[0], likes[1])) for pair in wanted)
    )


@linear_log_probs_backward.register_fake
def _(hidden, weight, labels, bias, *rest):
    return fake_gradients((hidden, weight, bias, rest[4], rest[5]), rest[-1])


def _log_probs_setup(ctx, inputs, output):
    *head_args, ctx.ignore_index, ctx.return_entropy, _, ctx.triton = inputs
    tensors = [a for a in head_args if isinstance(a, Tensor)]
    ctx.scalars = [None if isinstance(a, Tensor) else a for a in head_args]
    ctx.where = [i for i, a in enumerate(head_args) if isinstance(a, Tensor)]
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[2:], *(() if ctx.return_entropy else output[1:2]))
    ctx.set_materialize_grads(False)


def _log_probs_backward(ctx, g, ge, *_):
    once_differentiable()
    *tensors, entropy, m, s = ctx.saved_tensors
    args = list(ctx.scalars)
    for i, t in zip(ctx.where, tensors):
        args[i] = t
    needs = ctx.needs_input_grad
    need = [needs[0], needs[1], needs[3], needs[8] or needs[9]]
    if (g is None and ge is None) or not any(need):
        return (None,) * len(needs)
    grads = linear_log_probs_backward(*args, ctx.ignore_index, ctx.triton, g, ge, entropy, m, s, need)
    return place(grads, need, needs)


def place(grads, need, needs) -> tuple[Tensor | None, ...]:
    """Gradients (hidden, weight, bias, A, B) at the positions of the operator's inputs."""
    out: list[Tensor | None] = [None] * len(needs)
    for i, yes, grad in zip((0, 1, 3, 8, 9), (*need, need[3]), grads):
        out[i] = grad if yes and needs[i] else None
    return tuple(out)


linear_log_probs.register_autograd(_log_probs_backward, setup_context=_log_probs_setup)


def rows_of(triton: bool):
    """The module whose rows_forward, rows_backward and rows_ppo run."""
    if triton:
        from . import triton_log_probs

        return triton_log_probs
    return chunked_rows


# --- log-probs from logits --------------------------------------------------------------------------------------------


@operator(
    "token_log_probs",
    "(Tensor logits, Tensor labels, Tensor? temperatures, float temperature, int ignore_index, bool return_entropy, "
    "bool triton) -> (Tensor, Tensor, Tensor, Tensor)",
)
def token_log_probs(logits, labels, temperatures, temperature, ignore_index, return_entropy, triton):
    degrees = temperature if temperatures is None else temperatures
    return rows_of(triton).rows_forward(logits, labels, degrees, ignore_index, return_entropy)


@token_log_probs.register_fake
def _(logits, labels, temperatures, temperature, ignore_index, return_entropy, triton):
    make = lambda: torch.empty(labels.shape, dtype=wide(logits), device=logits.device)  # noqa: E731
    return make(), make() if return_entropy else make().new_empty(0), make(), make()


@operator(
    "token_log_probs_backward",
    "(Tensor logits, Tensor labels, Tensor? temperatures, float temperature, int ignore_index, bool triton, "
    "Tensor? grad, Tensor? grad_entropy, Tensor entropy, Tensor m, Tensor s) -> Tensor",
)
def token_log_probs_backward(logits, labels, temperatures, temperature, ignore_index, triton, g, ge, entropy, m, s):
    degrees = temperature if temperatures is None else temperatures
    return rows_of(triton).rows_backward(logits, labels, degrees, ignore_index, g, ge, entropy, m, s)


@token_log_probs_backward.register_fake
def _(logits, *_):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _token_setup(ctx, inputs, output):
    logits, labels, temperatures, temperature, ignore_index, return_entropy, triton = inputs
    ctx.scalars = (temperature, ignore_index, triton)
    ctx.save_for_backward(logits, labels, temperatures, *output[1:])
    ctx.mark_non_differentiable(*output[2:], *(() if return_entropy else output[1:2]))
    ctx.set_materialize_grads(False)


def _token_backward(ctx, g, ge, *_):
    once_differentiable()
    logits, labels, temperatures, entropy, m, s = ctx.saved_tensors
    if g is None and ge is None:
        return (None,) * 7
    grad = token_log_probs_backward(logits, labels, temperatures, *ctx.scalars, g, ge, entropy, m, s)
    return grad, *(None,) * 6


token_log_probs.register_autograd(_token_backward, setup_context=_token_setup)


# --- advantages: the Triton kernels, as an operator only under torch.compile too --------------------------------------


@operator(
    "gae",
    "(Tensor? rewards, Tensor values, Tensor mask, float gamma, float gae_lambda, Tensor? bootstrap, Tensor? scores, "
    "Tensor? log_probs, Tensor? ref_log_probs, float kl_coef, str estimator, float? whiten_eps) "
    "-> (Tensor, Tensor, Tensor)",
)
def gae_operator(rewards, values, *rest):
    shaped, advantages, returns = _gae(rewards, values, *rest)
    return values.new_empty(0, dtype=torch.float32) if shaped is None else shaped, advantages, returns


@gae_operator.register_fake
def _(rewards, values, mask, *_):
    shapes = (mask.shape if rewards is None else (0,), mask.shape, mask.shape)
    return tuple(values.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _gae(rewards, values, mask, gamma, gae_lambda, bootstrap, scores, log_probs, refs, kl_coef, estimator, whiten_eps):
    from .triton_gae import gae_rows

    shaping = None if scores is None else (scores, log_probs, refs, kl_coef, estimator)
    return gae_rows(rewards, values, mask, gamma, gae_lambda, bootstrap, shaping=shaping, whiten_eps=whiten_eps)


def gae(*args):
    """Triton only: (rewards, advantages, returns); arguments as in the operator's schema."""
    return (gae_operator if torch.compiler.is_compiling() else _gae)(*args)


@operator(
    "shape_rewards",
    "(Tensor scores, Tensor log_probs, Tensor ref_log_probs, Tensor mask, float kl_coef, str estimator) -> Tensor",
)
def shape_rewards_operator(*args):
    return _rewards().shape_rewards(*args)


@operator("masked_whiten", "(Tensor x, Tensor mask, bool shift_mean, float eps) -> Tensor")
def masked_whiten_operator(*args):
    return _rewards().masked_whiten(*args)


@shape_rewards_operator.register_fake
def _(scores, log_probs, *_):
    return torch.empty(log_probs.shape, dtype=torch.float32, device=log_probs.device)


@masked_whiten_operator.register_fake
def _(x, *_):
    return torch.empty(x.shape, dtype=torch.float32, device=x.device)


def _rewards():
    from . import triton_rewards

    return triton_rewards


def shape_rewards(*args):
    """Triton only: rewards [B, T]."""
    return shape_rewards_operator(*args) if torch.compiler.is_compiling() else _rewards().shape_rewards(*args)


def masked_whiten(*args):
    """Triton only: x whitened."""
    return masked_whiten_operator(*args) if torch.compiler.is_compiling() else _rewards().masked_whiten(*args)
