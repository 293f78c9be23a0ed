"""The torch.library operators: schema, fake (shape) functions and autograd of what `chunked` and `losses` compute.

An operator is opaque to torch.compile, runs outside autocast (its results are fp32), and differentiates once.
`linear_log_probs` and `token_log_probs` have a backward operator of their own; `linear_ppo_loss`, `ppo_policy_loss`
and `ppo_value_loss` return the gradients they computed in the forward, and the backward scales them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import chunked, losses
from .checks import wide
from .losses import LossOptions
from .sampling import draw

HEAD = (
    "Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, Tensor? temperatures, float temperature, "
    "float logit_scale, float? logit_softcap, Tensor? lora_a, Tensor? lora_b, float lora_scale"
)


def _operator(name: str, schema: str):
    def register(body):
        def outside_autocast(*args):
            with torch.autocast(args[0].device.type, enabled=False):
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


def _head(hidden, weight, labels, bias, temperatures, temperature, logit_scale, logit_softcap, lora_a, lora_b,
          lora_scale, keep):  # fmt: skip
    """The head on the kept rows, their labels, and their indices (None when every row is kept)."""
    rows = None if bool(keep.all()) else keep.nonzero()[:, 0]
    degrees = temperature if temperatures is None else temperatures
    head = chunked.Head.build(
        hidden, weight, rows, bias, degrees, logit_scale, logit_softcap, lora_a, lora_b, lora_scale
    )
    return head, (labels if rows is None else labels[rows]).long(), rows


def _scatter(n: int, rows: Tensor | None, values: Tensor) -> Tensor:
    return values if rows is None else values.new_zeros(n).index_copy_(0, rows, values)


def _gather(rows: Tensor | None, values: Tensor | None) -> Tensor | None:
    return values if rows is None or values is None else values[rows]


def _as_outputs(grads, like) -> tuple[Tensor, ...]:
    """Operators return tensors only: an empty one stands for a gradient that nobody needs."""
    return tuple(like.new_empty(0) if g is None else g for g in grads)


# --- log-probs from hidden states -------------------------------------------------------------------------------------


@_operator(
    "linear_log_probs",
    f"({HEAD}, int ignore_index, bool return_entropy, bool batch_invariant) -> (Tensor, Tensor, Tensor, Tensor)",
)
def linear_log_probs(*args):
    *head_args, ignore_index, return_entropy, batch_invariant = args
    labels, weight = head_args[2], head_args[1]
    head, y, rows = _head(*head_args, labels != ignore_index)
    tiles = chunked.sweep_tiles(
        len(y), *weight.shape, cuda=weight.is_cuda, entropy=return_entropy, batch_invariant=batch_invariant
    )
    log_probs, entropy, m, s = chunked.sweep_forward(head, y, tiles, entropy=return_entropy, pad=batch_invariant)
    n = len(labels)
    entropy = m.new_empty(0) if entropy is None else _scatter(n, rows, entropy)
    return _scatter(n, rows, log_probs), entropy, _scatter(n, rows, m), _scatter(n, rows, s)


@linear_log_probs.register_fake
def _(hidden, weight, labels, *rest):
    dtype, n = wide(hidden, weight), len(labels)
    entropy = hidden.new_empty(n if rest[-2] else 0, dtype=dtype)
    return tuple(t if t is not None else hidden.new_empty(n, dtype=dtype) for t in (None, entropy, None, None))


@_operator(
    "linear_log_probs_backward",
    f"({HEAD}, int ignore_index, Tensor? grad, Tensor? grad_entropy, Tensor entropy, Tensor m, Tensor s, bool[4] need) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_log_probs_backward(*args):
    *head_args, ignore_index, g, ge, entropy, m, s, need = args
    hidden, weight, labels, bias = head_args[:4]
    head, y, rows = _head(*head_args, labels != ignore_index)
    tiles = chunked.sweep_tiles(len(y), *weight.shape, cuda=weight.is_cuda, entropy=ge is not None)
    m, s = _gather(rows, m), _gather(rows, s)
    g = torch.zeros_like(m) if g is None else _gather(rows, g).to(m.dtype)
    ge = None if ge is None else _gather(rows, ge).to(m.dtype)
    entropy = None if ge is None else _gather(rows, entropy)
    grads = chunked.sweep_backward(head, y, g, ge, entropy, m, s, tiles, need, weight.dtype)
    dx, dw, db, da, dlora_b = grads.finish(len(labels), rows)
    likes = (hidden, weight, bias, head_args[8], head_args[9])
    return _as_outputs(
        (None if t is None else t.to(like.dtype) for t, like in zip((dx, dw, db, da, dlora_b), likes)), m
    )


def _fake_gradients(likes, need, dtype=None):
    h, w, b, lora = need
    wanted = zip((h, w, b, lora, lora), likes)
    return tuple(
        torch.empty(t.shape, dtype=dtype or t.dtype, device=t.device) if yes else likes[0].new_empty(0, dtype=empty)
        for (yes, t), empty in ((pair, dtype or wide(likes[0], likes[1])) for pair in wanted)
    )


@linear_log_probs_backward.register_fake
def _(hidden, weight, labels, bias, *rest):
    return _fake_gradients((hidden, weight, bias, rest[4], rest[5]), rest[-1])


def _log_probs_setup(ctx, inputs, output):
    *head_args, ctx.ignore_index, ctx.return_entropy, _ = inputs
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
    grads = linear_log_probs_backward(*args, ctx.ignore_index, g, ge, entropy, m, s, need)
    return _place(grads, need, needs)


def _place(grads, need, needs) -> tuple[Tensor | None, ...]:
    """Gradients (hidden, weight, bias, A, B) at the positions of the operator's inputs."""
    out: list[Tensor | None] = [None] * len(needs)
    for i, yes, grad in zip((0, 1, 3, 8, 9), (*need, need[3]), grads):
        out[i] = grad if yes and needs[i] else None
    return tuple(out)


linear_log_probs.register_autograd(_log_probs_backward, setup_context=_log_probs_setup)


# --- log-probs from logits --------------------------------------------------------------------------------------------


@_operator(
    "token_log_probs",
    "(Tensor logits, Tensor labels, Tensor? temperatures, float temperature, int ignore_index, bool return_entropy) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def token_log_probs(logits, labels, temperatures, temperature, ignore_index, return_entropy):
    degrees = temperature if temperatures is None else temperatures
    return chunked.rows_forward(logits, labels, degrees, ignore_index, return_entropy)


@token_log_probs.register_fake
def _(logits, labels, temperatures, temperature, ignore_index, return_entropy):
    make = lambda: torch.empty(labels.shape, dtype=wide(logits), device=logits.device)  # noqa: E731
    return make(), make() if return_entropy else make().new_empty(0), make(), make()


@_operator(
    "token_log_probs_backward",
    "(Tensor logits, Tensor labels, Tensor? temperatures, float temperature, int ignore_index, Tensor? grad, "
    "Tensor? grad_entropy, Tensor entropy, Tensor m, Tensor s) -> Tensor",
)
def token_log_probs_backward(logits, labels, temperatures, temperature, ignore_index, g, ge, entropy, m, s):
    degrees = temperature if temperatures is None else temperatures
    return chunked.rows_backward(logits, labels, degrees, ignore_index, g, ge, entropy, m, s)


@token_log_probs_backward.register_fake
def _(logits, *_):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _token_setup(ctx, inputs, output):
    logits, labels, temperatures, *ctx.scalars, return_entropy = inputs
    ctx.save_for_backward(logits, labels, temperatures, *output[1:])
    ctx.mark_non_differentiable(*output[2:], *(() if return_entropy else output[1:2]))
    ctx.set_materialize_grads(False)


def _token_backward(ctx, g, ge, *_):
    once_differentiable()
    logits, labels, temperatures, entropy, m, s = ctx.saved_tensors
    if g is None and ge is None:
        return (None,) * 6
    grad = token_log_probs_backward(logits, labels, temperatures, *ctx.scalars, g, ge, entropy, m, s)
    return grad, None, None, None, None, None


token_log_probs.register_autograd(_token_backward, setup_context=_token_setup)


# --- losses: gradients in the forward ---------------------------------------------------------------------------------


@_operator(
    "linear_ppo_loss",
    f"({HEAD}, Tensor old_log_probs, Tensor advantages, Tensor mask, Tensor? weights, Tensor? ref_log_probs, "
    "Tensor count, float clip_low, float clip_high, float? dual_clip, float kl_coef, str kl_estimator, "
    "float entropy_coef, bool[4] need) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_ppo_loss(*args):
    head_args, (old, adv, mask, weights, ref, count, *scalars, need) = args[:11], args[11:]
    options, weight, n = LossOptions(*scalars), head_args[1], len(mask)
    head, y, rows = _head(*head_args, mask)
    dtype = head.x.dtype
    old, adv, weights, ref = (None if t is None else _gather(rows, t).to(dtype) for t in (old, adv, weights, ref))
    count = count.to(dtype)
    grads = None
    if any(need):
        tiles = chunked.chunk_tiles(len(weight), cuda=weight.is_cuda)
        sweep = chunked.ppo_sweep(head, y, old, adv, weights, ref, count, options, need, tiles)
        loss, log_probs, entropy, grads = sweep
    else:
        tiles = chunked.sweep_tiles(len(y), *weight.shape, cuda=weight.is_cuda, entropy=True)
        log_probs, entropy, _, _ = chunked.sweep_forward(head, y, tiles, entropy=True)
        loss, _ = losses.policy_terms(log_probs, old, adv, weights, ref, options)
    total = loss.sum() / count
    if options.entropy_coef != 0:
        total = total - options.entropy_coef * entropy.sum() / count
    stats = (*losses.policy_stats(log_probs, old, adv, count, options), entropy.sum() / count)
    per_token = (_scatter(n, rows, log_probs), _scatter(n, rows, entropy))
    made = (None,) * 5 if grads is None else grads.finish(n, rows)
    return total, *stats, *per_token, *_as_outputs(made, log_probs)


@linear_ppo_loss.register_fake
def _(*args):
    hidden, weight, labels, bias = args[:4]
    dtype = wide(hidden, weight)
    scalars = tuple(hidden.new_empty((), dtype=dtype) for _ in range(5))
    per_token = tuple(hidden.new_empty(len(labels), dtype=dtype) for _ in range(2))
    return *scalars, *per_token, *_fake_gradients((hidden, weight, bias, args[8], args[9]), args[-1], dtype)


def _ppo_setup(ctx, inputs, output):
    ctx.need = inputs[-1]
    ctx.where = [i for i, a in enumerate(inputs) if isinstance(a, Tensor)]
    ctx.scalars = [None if isinstance(a, Tensor) else a for a in inputs]
    ctx.save_for_backward(*(a for a in inputs if isinstance(a, Tensor)))
    ctx.dtypes = [None if inputs[i] is None else inputs[i].dtype for i in (0, 1, 3, 8, 9)]
    ctx.grads = list(output[7:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _ppo_backward(ctx, grad, *_):
    once_differentiable()
    needs = ctx.needs_input_grad
    if grad is None:
        return (None,) * len(needs)
    if ctx.grads is None:  # backward a second time: the first one gave the buffers away
        args = list(ctx.scalars)
        for i, t in zip(ctx.where, ctx.saved_tensors):
            args[i] = t
        with torch.no_grad():
            ctx.grads = list(linear_ppo_loss(*args)[7:])
    grads, ctx.grads = ctx.grads, None
    # In place: [V, H] twice would set the peak of memory. A traced backward (tensor subclasses) must be functional.
    scaled = [
        (g.mul_(grad) if type(g) is Tensor else g * grad).to(dtype) if yes else None
        for g, dtype, yes in zip(grads, ctx.dtypes, (*ctx.need, ctx.need[3]))
    ]
    return _place(scaled, ctx.need, needs)


linear_ppo_loss.register_autograd(_ppo_backward, setup_context=_ppo_setup)


@_operator(
    "ppo_policy_loss",
    "(Tensor log_probs, Tensor old_log_probs, Tensor advantages, Tensor mask, Tensor? weights, Tensor count, "
    "float clip_low, float clip_high, float? dual_clip) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def ppo_policy_loss(log_probs, old_log_probs, advantages, mask, weights, count, clip_low, clip_high, dual_clip):
    options = LossOptions(clip_low, clip_high, dual_clip)
    return losses.policy_loss(log_probs, old_log_probs, advantages, mask, weights, count, options)


@_operator(
    "ppo_value_loss",
    "(Tensor values, Tensor old_values, Tensor returns, Tensor mask, Tensor? weights, Tensor count, "
    "float? clip_range) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def ppo_value_loss(values, old_values, returns, mask, weights, count, clip_range):
    return losses.value_loss(values, old_values, returns, mask, weights, count, clip_range)


def _loss_fake(outputs: int):
    def fake(x, *_):
        dtype = wide(x)
        scalars = tuple(x.new_empty((), dtype=dtype) for _ in range(outputs - 1))
        return *scalars, torch.empty(x.shape, dtype=dtype, device=x.device)

    return fake


def _loss_setup(ctx, inputs, output):
    ctx.save_for_backward(output[-1])
    ctx.dtype, ctx.inputs = inputs[0].dtype, len(inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _loss_backward(ctx, grad, *_):
    once_differentiable()
    (per_token,) = ctx.saved_tensors
    first = None if grad is None else (per_token * grad).to(ctx.dtype)
    return first, *(None,) * (ctx.inputs - 1)


for _op, _outputs in ((ppo_policy_loss, 5), (ppo_value_loss, 7)):
    _op.register_fake(_loss_fake(_outputs))
    _op.register_autograd(_loss_backward, setup_context=_loss_setup)


# --- sampling: an operator only under torch.compile; a decode step calls `draw` itself --------------------------------


@_operator(
    "sample_tokens",
    "(Tensor logits, float temperature, int top_k, float top_p, int seed, Tensor offset, Tensor stream) "
    "-> (Tensor, Tensor, Tensor)",
)
def sample_tokens(*args):
    return draw(*args)


@sample_tokens.register_fake
def _(logits, *_):
    n, dtype = len(logits), wide(logits)
    tokens = logits.new_empty(n, dtype=torch.int64)
    return tokens, logits.new_empty(n, dtype=dtype), logits.new_empty(n, dtype=dtype)
