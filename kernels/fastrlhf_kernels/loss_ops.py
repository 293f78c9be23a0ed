"""The torch.library operators of the losses: they return the gradients they computed in the forward.

The backward only scales them. The first one gives the buffers away; a second one (retain_graph) computes them again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import chunked, losses
from .checks import wide
from .losses import LossOptions
from .ops import (  # noqa: I001
    HEAD,
    as_outputs,
    fake_gradients,
    gather,
    head_of_kept_rows,
    once_differentiable,
    operator,
    place,
    rows_of,
    scatter,
    triton_head,
)


def _torch_sweep(head_args, mask, per_token, count, options, need):
    head, y, rows = head_of_kept_rows(*head_args, mask)
    weight, dtype = head_args[1], head.x.dtype
    picked = [None if t is None else gather(rows, t).to(dtype) for t in per_token]
    count = count.to(dtype)
    if any(need):
        tiles = chunked.chunk_tiles(len(weight), cuda=weight.is_cuda)
        *found, grads = chunked.ppo_sweep(head, y, *picked, count, options, need, tiles)
        return rows, picked, count, (*found, grads.finish(len(mask), rows))
    tiles = chunked.sweep_tiles(len(y), *weight.shape, cuda=weight.is_cuda, entropy=True)
    log_probs, entropy, _, _ = chunked.sweep_forward(head, y, tiles, entropy=True)
    loss, _ = losses.policy_terms(log_probs, *picked, options)
    return rows, picked, count, (loss, log_probs, entropy, None)


def _triton_sweep(head_args, mask, per_token, count, options, need):
    from .triton_linear_ppo_loss import linear_ppo

    head, y, rows, kernels, masked = triton_head(*head_args, mask)
    picked = [None if t is None else gather(rows, t) for t in per_token]
    if masked is not None:
        picked = [None if t is None else torch.where(masked, t, 0) for t in picked]
    picked, count = [None if t is None else t.float().contiguous() for t in picked], count.float()
    if any(need):
        *found, grads = linear_ppo(head, y, masked, *picked, count, options, need)
        dx, *others = grads
        dx = dx if dx is None or rows is None else dx.new_zeros(len(mask), dx.shape[1]).index_copy_(0, rows, dx)
        return rows, picked, count, (*found, (dx, *others))
    log_probs, entropy, _, _ = kernels.linear_forward(head, y, entropy=True, batch_invariant=False)
    if masked is not None:
        log_probs, entropy = (torch.where(masked, t, 0) for t in (log_probs, entropy))
    loss, _ = losses.policy_terms(log_probs, *picked, options)
    return rows, picked, count, (loss, log_probs, entropy, None)


@operator(
    "linear_ppo_loss",
    f"({HEAD}, Tensor old_log_probs, Tensor advantages, Tensor mask, Tensor? weights, Tensor? ref_log_probs, "
    "Tensor count, float clip_low, float clip_high, float? dual_clip, float kl_coef, str kl_estimator, "
    "float entropy_coef, bool triton, bool[4] need) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_ppo_loss(*args):
    head_args, (old, adv, mask, weights, ref, count, *scalars, triton, need) = args[:11], args[11:]
    options, n = LossOptions(*scalars), len(mask)
    sweep = _triton_sweep if triton else _torch_sweep
    rows, per_token, count, (loss, log_probs, entropy, grads) = sweep(
        head_args, mask, (old, adv, weights, ref), count, options, need
    )
    old, adv, *_ = per_token
    total = loss.sum() / count
    if options.entropy_coef != 0:
        total = total - options.entropy_coef * entropy.sum() / count
    stats = (*losses.policy_stats(log_probs, old, adv, count, options), entropy.sum() / count)
    per_token = (scatter(n, rows, log_probs), scatter(n, rows, entropy))
    made = (None,) * 5 if grads is None else grads
    return total, *stats, *per_token, *as_outputs(made, log_probs)


@linear_ppo_loss.register_fake
def _(*args):
    hidden, weight, labels, bias = args[:4]
    dtype = wide(hidden, weight)
    scalars = tuple(hidden.new_empty((), dtype=dtype) for _ in range(5))
    per_token = tuple(hidden.new_empty(len(labels), dtype=dtype) for _ in range(2))
    return *scalars, *per_token, *fake_gradients((hidden, weight, bias, args[8], args[9]), args[-1], dtype)


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
    return place(scaled, ctx.need, needs)


linear_ppo_loss.register_autograd(_ppo_backward, setup_context=_ppo_setup)


TOKEN_PPO = (
    "Tensor labels, Tensor? temperatures, float temperature, Tensor old_log_probs, Tensor advantages, Tensor mask, "
    "Tensor? weights, Tensor? ref_log_probs, Tensor count, float clip_low, float clip_high, float? dual_clip, "
    "float kl_coef, str kl_estimator, float entropy_coef"
)


def token_ppo(logits, out, *args):
    """loss, ratio, approx_kl, clip_frac, mean entropy (0-d), log-probs, entropies [n]; the gradient goes to `out`."""
    labels, temperatures, temperature, old, adv, mask, weights, ref, count, *scalars, triton = args
    degrees, options = temperature if temperatures is None else temperatures, LossOptions(*scalars)
    count = count.to(wide(logits))
    loss, log_probs, entropy = rows_of(triton).rows_ppo(
        logits, labels, degrees, mask, old, adv, weights, ref, count, options, out
    )
    old, adv, flat = (t.reshape(-1) for t in (old, adv, mask))
    old, adv = (torch.where(flat, t, 0).to(loss.dtype) for t in (old, adv))
    total = (loss.sum() - options.entropy_coef * entropy.sum()) / count
    stats = losses.policy_stats(log_probs, old, adv, count, options, flat)
    return total, *stats, entropy.sum() / count, log_probs, entropy


@operator("token_ppo_loss", f"(Tensor logits, {TOKEN_PPO}, bool triton, bool need) -> ({', '.join(['Tensor'] * 8)})")
def token_ppo_loss(logits, *args):
    grad = torch.empty(logits.shape if args[-1] else 0, dtype=logits.dtype, device=logits.device)
    return *token_ppo(logits, grad.view(-1, logits.shape[-1]) if args[-1] else None, *args[:-1]), grad


@token_ppo_loss.register_fake
def _(logits, labels, *rest):
    dtype, n = wide(logits), labels.numel()
    scalars = tuple(logits.new_empty((), dtype=dtype) for _ in range(5))
    per_token = tuple(logits.new_empty(n, dtype=dtype) for _ in range(2))
    return *scalars, *per_token, torch.empty(logits.shape if rest[-1] else 0, dtype=logits.dtype, device=logits.device)


def _token_ppo_setup(ctx, inputs, output):
    ctx.where = [i for i, a in enumerate(inputs) if isinstance(a, Tensor)]
    ctx.scalars = [None if isinstance(a, Tensor) else a for a in inputs]
    ctx.save_for_backward(*(a for a in inputs if isinstance(a, Tensor)))
    ctx.grad = output[-1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _token_ppo_backward(ctx, grad, *_):
    once_differentiable()
    none = (None,) * (len(ctx.scalars) - 1)
    if grad is None:
        return None, *none
    if ctx.grad is None:  # backward a second time: the first one gave the buffer away
        args = list(ctx.scalars)
        for i, t in zip(ctx.where, ctx.saved_tensors):
            args[i] = t
        with torch.no_grad():
            ctx.grad = token_ppo_loss(*args)[-1]
    dz, ctx.grad = ctx.grad, None
    return dz.mul_(grad) if type(dz) is Tensor else (dz * grad).to(dz.dtype), *none


token_ppo_loss.register_autograd(_token_ppo_backward, setup_context=_token_ppo_setup)


class TokenPPOInPlace(torch.autograd.Function):
    """token_ppo_loss whose gradient is written over the logits: no second [N, V] tensor, one backward."""

    @staticmethod
    def forward(ctx, logits, *args):
        ctx.inputs, ctx.grad = len(args), logits.detach()
        with torch.autocast(logits.device.type, enabled=False):
            results = token_ppo(ctx.grad, ctx.grad.view(-1, logits.shape[-1]), *args)
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx, grad, *_):
        once_differentiable()
        if ctx.grad is None:
            raise RuntimeError("token_ppo_loss(inplace=True) wrote its gradient over the logits: one backward only")
        dz, ctx.grad = ctx.grad, None
        return None if grad is None else dz.mul_(grad), *(None,) * ctx.inputs


def _losses_of(triton: bool):
    """The module whose policy_loss and value_loss run."""
    if triton:
        from . import triton_ppo_losses

        return triton_ppo_losses
    return losses


@operator(
    "ppo_policy_loss",
    "(Tensor log_probs, Tensor old_log_probs, Tensor advantages, Tensor mask, Tensor? weights, Tensor count, "
    "float clip_low, float clip_high, float? dual_clip, bool triton) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def ppo_policy_loss(log_probs, old_log_probs, advantages, mask, weights, count, low, high, dual_clip, triton):
    options = LossOptions(low, high, dual_clip)
    return _losses_of(triton).policy_loss(log_probs, old_log_probs, advantages, mask, weights, count, options)


@operator(
    "ppo_value_loss",
    "(Tensor values, Tensor old_values, Tensor returns, Tensor mask, Tensor? weights, Tensor count, "
    "float? clip_range, bool triton) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def ppo_value_loss(values, old_values, returns, mask, weights, count, clip_range, triton):
    return _losses_of(triton).value_loss(values, old_values, returns, mask, weights, count, clip_range)


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


@operator(
    "ppo_losses",
    "(Tensor log_probs, Tensor values, Tensor old_log_probs, Tensor advantages, Tensor old_values, Tensor returns, "
    "Tensor mask, Tensor? weights, Tensor count, float clip_low, float clip_high, float? dual_clip, "
    "float? value_clip) -> (Tensor, Tensor, Tensor)",
)
def ppo_losses(log_probs, values, old, adv, old_values, returns, mask, weights, count, *scalars):
    """Triton only: the sums of `triton_ppo_losses` (0 and 4 are the losses), and the two gradients."""
    from .triton_ppo_losses import both_losses

    options, value_clip = LossOptions(*scalars[:3]), scalars[3]
    return both_losses(
        log_probs, old, adv, values, old_values, returns, mask, weights, count.float(), options, value_clip
    )


@ppo_losses.register_fake
def _(log_probs, values, *_):
    grads = (torch.empty(t.shape, dtype=torch.float32, device=t.device) for t in (log_probs, values))
    return log_probs.new_empty(9, dtype=torch.float32), *grads


def _losses_setup(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.dtypes, ctx.inputs = [t.dtype for t in inputs[:2]], len(inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _losses_backward(ctx, grad, *_):
    once_differentiable()
    if grad is None:
        return (None,) * ctx.inputs
    policy, value = ctx.saved_tensors
    policy, value = (policy * grad[0]).to(ctx.dtypes[0]), (value * grad[4]).to(ctx.dtypes[1])
    return policy, value, *(None,) * (ctx.inputs - 2)


ppo_losses.register_autograd(_losses_backward, setup_context=_losses_setup)
