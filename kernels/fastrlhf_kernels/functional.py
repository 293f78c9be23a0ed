"""The public functions: argument checks, choice of backend, and the operators that differentiate.

Common to all: inputs are fp32, bf16 or fp16 (float64 runs in float64), results and statistics are fp32. Logits are
accumulated and kept in fp32 whatever the input dtype. Any strides, empty inputs allowed. Masks are bool or integer,
labels int32 or int64. `normalizer` is a number or a 0-d tensor and is never synchronised.

`backend`: "auto", "torch" or "triton" (see `backend.choose_backend`). `validate`: None reads the values of CPU tensors
(labels out of range, temperatures), True also those of CUDA tensors, False none. Wrong arguments raise ValueError.
Every differentiable function differentiates once: create_graph=True and torch.func raise RuntimeError.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, loss_ops, ops
from .backend import choose_backend
from .eager import losses
from .operands import Need, Shaping

Lora = checks.Lora


class PPOLoss(NamedTuple):
    """A loss to call .backward() on, and detached statistics.

    The statistics are 0-d, summed over the mask and divided by the same normalizer as the loss, so that they add up
    over micro-batches (exceptions are named where they are returned).
    """

    loss: Tensor
    stats: dict[str, Tensor]


class ShapedAdvantages(NamedTuple):
    """rewards, advantages, returns: [B, T] fp32, 0 outside the mask."""

    rewards: Tensor
    advantages: Tensor
    returns: Tensor


def token_log_probs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    backend: str = "auto",
    validate: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log_softmax(logits / temperature) at the labels.

    logits [..., V], labels [...]; temperature a number or a tensor of the labels' shape. Returns log_probs [...] in
    nats, or (log_probs, entropy) with return_entropy=True; gradients flow through both. Logits of -inf (suppressed
    tokens) are legal; a row of nothing else has no distribution: its results and its own gradients are NaN. Where
    label == ignore_index both are 0 and no gradient passes, even if the logits are NaN. The logits are not changed.
    The only [..., V] tensor made is the gradient.
    """
    checks.floating(logits=logits)
    triton = choose_backend(backend, logits).name == "triton"
    rows = checks.rows(logits, labels, temperature, validate)
    checks.labels_in_range(labels, logits.shape[-1], labels != ignore_index, validate)
    log_probs, entropy, _, _ = ops.token_log_probs(rows, ignore_index, return_entropy, triton)
    return (log_probs, entropy) if return_entropy else log_probs


def selective_log_softmax(
    logits: Tensor,
    index: Tensor,
    temperature: float = 1.0,
    *,
    backend: str = "auto",
    validate: bool | None = None,
) -> Tensor:
    """log_softmax(logits / temperature)[index], under the name that TRL has for it.

    logits [..., V]; index [...], or [..., K] for K entries of a row. Returns log-probs in nats in the shape of index,
    fp32 for every input but float64, 0 where index is -100. `token_log_probs` has temperatures a row and the entropy.
    """
    checks.floating(logits=logits)
    triton = choose_backend(backend, logits).name == "triton"
    rows = checks.rows(logits, index, temperature, validate, several=True)
    checks.labels_in_range(index, logits.shape[-1], index != -100, validate)
    return ops.token_log_probs(rows, -100, False, triton)[0]


def entropy_from_logits(logits: Tensor, *, backend: str = "auto", validate: bool | None = None) -> Tensor:
    """The entropy of softmax(logits) in nats, under the name that TRL has for it: logits [..., V] -> [...] fp32."""
    checks.floating(logits=logits)
    labels = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_log_probs(logits, labels, return_entropy=True, backend=backend, validate=validate)[1]


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    lora: Lora | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    batch_invariant: bool = False,
    workspace: int | None = None,
    backend: str = "auto",
    validate: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`token_log_probs` of z = logit_scale * (hidden @ weight.T + bias) without the logits.

    hidden [..., H], weight [V, H], bias [V], labels [...]. Order: scale, softcap * tanh(z / softcap), temperature.
    lora = (A [r, H], B [V, r], scale) adds scale * B A to the weight. Differentiable in hidden, weight, bias, A, B;
    the backward computes the logits anew, tile by tile, and accumulates in fp32. The same bits every run.
    batch_invariant=True: a token's log-prob is bitwise the same whatever else is in the batch (slower).
    workspace: bytes for logits and their gradient (default: 1/32 of the GPU's memory; 128 MiB on a CPU). It decides how
    sums are cut, and so their last bits. ValueError where it is less than a row of logits.
    """
    operands = (hidden, weight, labels, bias, temperature, logit_scale, logit_softcap, lora, validate)
    head = checks.head(*operands, workspace=workspace)
    triton = choose_backend(backend, hidden, weight).name == "triton"
    checks.labels_in_range(labels, weight.shape[0], labels != ignore_index, validate)
    settings = (head, ignore_index, return_entropy)
    log_probs, entropy, *_ = ops.linear_log_probs(*settings, batch_invariant, 0, triton)
    if return_entropy:
        return log_probs.view(labels.shape), entropy.view(labels.shape)
    return log_probs.view(labels.shape)


def kl_estimate(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    estimator: str = "k1",
    *,
    backend: str = "auto",
    validate: bool | None = None,
) -> Tensor:
    """Per-token estimate of KL(policy || reference) in nats, from tokens drawn from the policy.

    d = log_probs - ref_log_probs: "k1" d, "k2" d * d / 2, "k3" exp(-d) - 1 + d, "abs" |d|
    (Schulman, "Approximating KL divergence", 2020). Elementwise, differentiable in both; no clamping.
    """
    choose_backend(backend, kernel=False)
    checks.floating(log_probs=log_probs, ref_log_probs=ref_log_probs)
    checks.shapes(log_probs.shape, "log_probs", ref_log_probs=ref_log_probs)
    checks.devices(log_probs=log_probs, ref_log_probs=ref_log_probs)
    checks.estimator("estimator", estimator)
    dtype = checks.wide(log_probs, ref_log_probs)
    return losses.kl_terms(log_probs.to(dtype), ref_log_probs.to(dtype), estimator)


@torch.no_grad()
def shape_rewards(
    scores: Tensor,
    log_probs: Tensor,
    ref_log_probs: Tensor,
    response_mask: Tensor,
    *,
    kl_coef: float,
    estimator: str = "k1",
    backend: str = "auto",
    validate: bool | None = None,
) -> Tensor:
    """Rewards [B, T]: -kl_coef * KL on each response token, and the score [B] added on the last response token.

    0 outside the mask. A row without response tokens drops its score. No gradient.
    """
    checks.floating(scores=scores, log_probs=log_probs, ref_log_probs=ref_log_probs)
    checks.rows_of_tokens("log_probs", log_probs)
    mask = checks.token_mask(response_mask, log_probs, "log_probs", ref_log_probs=ref_log_probs)
    checks.shapes(log_probs.shape[:1], "the rows of log_probs", scores=scores)
    checks.devices(log_probs=log_probs, scores=scores)
    checks.number("kl_coef", kl_coef)
    checks.estimator("estimator", estimator)
    if choose_backend(backend, scores, log_probs, ref_log_probs).name == "triton":
        shaping = Shaping(scores, log_probs, ref_log_probs, float(kl_coef), estimator)
        return ops.shape_rewards.direct(shaping, mask)
    return losses.shape_rewards(scores, log_probs, ref_log_probs, mask, kl_coef, estimator)


def _without_rows_of_lambda(backend: str, gae_lambda: float | Tensor) -> str:
    """The backend for this lambda: one for each row is torch's."""
    if not isinstance(gae_lambda, Tensor):
        return backend
    if backend == "triton":
        raise ValueError("gae_lambda is a tensor, which the Triton kernel does not read; use backend='torch' or 'auto'")
    return "torch"


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    *,
    gamma: float = 1.0,
    gae_lambda: float | Tensor = 0.95,
    bootstrap_values: Tensor | None = None,
    backend: str = "auto",
    validate: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al., 2016) over the response tokens of [B, T] tensors.

    Returns (advantages, returns = advantages + values), 0 outside the mask. Masked positions inside a row (tool
    output) are skipped: they neither discount nor count as a step. bootstrap_values [B]: V of the state after the
    last token, for rows that were cut off (default 0). gae_lambda [B]: one for each row, computed in torch on every
    device. No gradient.
    """
    checks.floating(rewards=rewards, values=values, bootstrap_values=bootstrap_values)
    checks.rows_of_tokens("values", values)
    mask = checks.token_mask(response_mask, values, "values", rewards=rewards)
    checks.shapes(values.shape[:1], "the rows of values", bootstrap_values=bootstrap_values)
    checks.devices(values=values, bootstrap_values=bootstrap_values)
    checks.discounts(gamma, gae_lambda, values)
    backend = _without_rows_of_lambda(backend, gae_lambda)
    if choose_backend(backend, rewards, values).name == "triton":
        discounts = (float(gamma), float(gae_lambda))
        settings = (Shaping(), None, 1)
        _, *results = ops.gae.direct(rewards, values, mask, *discounts, bootstrap_values, *settings)
        return tuple(results)
    return losses.gae(rewards, values, mask, gamma, gae_lambda, bootstrap_values)


@torch.no_grad()
def shape_and_gae(
    scores: Tensor,
    log_probs: Tensor,
    ref_log_probs: Tensor,
    values: Tensor,
    response_mask: Tensor,
    *,
    kl_coef: float,
    gamma: float = 1.0,
    gae_lambda: float | Tensor = 0.95,
    estimator: str = "k1",
    token_rewards: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    whiten: bool = True,
    group_size: int | None = None,
    eps: float = 1e-8,
    backend: str = "auto",
    validate: bool | None = None,
) -> ShapedAdvantages:
    """`shape_rewards`, then `gae`, then `masked_whiten` of the advantages (not of the returns; not with whiten=False).

    scores and bootstrap_values [B], the others [B, T]. token_rewards [B, T] are added to the shaped rewards where the
    mask is. group_size: so many consecutive rows are whitened together (default: all); it divides B.
    gae_lambda: as in `gae`. In torch the results are those of the three functions to the bit; in Triton it is one
    launch, two with whitening, and nothing waits for the GPU. No gradient. Raises ValueError as the three functions do.
    """
    optional = {"token_rewards": token_rewards, "bootstrap_values": bootstrap_values}
    checks.floating(scores=scores, log_probs=log_probs, ref_log_probs=ref_log_probs, values=values, **optional)
    checks.rows_of_tokens("values", values)
    tokens = {"log_probs": log_probs, "ref_log_probs": ref_log_probs, "token_rewards": token_rewards}
    mask = checks.token_mask(response_mask, values, "values", **tokens)
    checks.shapes(values.shape[:1], "the rows of values", scores=scores, bootstrap_values=bootstrap_values)
    checks.devices(values=values, scores=scores, bootstrap_values=bootstrap_values)
    checks.number("kl_coef", kl_coef)
    checks.number("eps", eps, low=0)
    checks.discounts(gamma, gae_lambda, values)
    backend = _without_rows_of_lambda(backend, gae_lambda)
    checks.estimator("estimator", estimator)
    checks.groups(group_size, len(values))
    size = group_size or max(1, len(values))
    if choose_backend(backend, scores, log_probs, ref_log_probs, values).name == "triton":
        shaping = Shaping(scores, log_probs, ref_log_probs, float(kl_coef), estimator)
        discounts = (float(gamma), float(gae_lambda))
        settings = (shaping, float(eps) if whiten else None, size)
        return ShapedAdvantages(*ops.gae.direct(token_rewards, values, mask, *discounts, bootstrap_values, *settings))
    rewards = losses.shape_rewards(scores, log_probs, ref_log_probs, mask, kl_coef, estimator)
    if token_rewards is not None:
        rewards = torch.where(mask, token_rewards, 0) + rewards
    advantages, returns = losses.gae(rewards, values, mask, gamma, gae_lambda, bootstrap_values)
    if whiten:
        groups = zip(advantages.split(size), mask.split(size))
        advantages = torch.cat([losses.masked_whiten(rows, kept, True, eps) for rows, kept in groups])
    return ShapedAdvantages(rewards, advantages, returns)


@torch.no_grad()
def masked_whiten(
    x: Tensor,
    mask: Tensor,
    *,
    shift_mean: bool = True,
    eps: float = 1e-8,
    backend: str = "auto",
    validate: bool | None = None,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) with mean and biased variance over the mask; 0 outside it. No gradient.

    x and mask of one shape. shift_mean=False keeps the mean: (x - mean) / sqrt(var + eps) + mean. Equal values give 0.
    """
    checks.floating(x=x)
    checks.masks(mask=mask)
    checks.shapes(x.shape, "x", mask=mask)
    checks.devices(x=x, mask=mask)
    checks.number("eps", eps, low=0)
    if choose_backend(backend, x).name == "triton":
        return ops.masked_whiten.direct(x, mask != 0, shift_mean, float(eps))
    return losses.masked_whiten(x, mask != 0, shift_mean, eps)


def ppo_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    backend: str = "auto",
    validate: bool | None = None,
) -> PPOLoss:
    """The clipped policy loss of PPO (Schulman et al., 2017), for tensors of one shape, usually [B, T].

    Sum over the mask of weights * max(-A ratio, -A clip(ratio, 1 - clip_range, 1 + clip_range_high)) / normalizer,
    ratio = exp(log_probs - old_log_probs). clip_range_high defaults to clip_range; normalizer to the number of mask
    entries. dual_clip c >= 1: at most -A c where A < 0 (Ye et al., 2020). weights: per-token multipliers of the loss.
    Gradients flow to log_probs only; at a tie of the two branches, to the unclipped one. stats: `ratio`, `approx_kl`
    (expm1(d) - d with d = log_probs - old_log_probs) and `clip_frac`.
    """
    checks.floating(log_probs=log_probs)
    tokens = checks.tokens(old_log_probs, advantages, response_mask, weights, None, log_probs, "log_probs")
    triton = choose_backend(backend, log_probs, old_log_probs, advantages).name == "triton"
    options = checks.loss_options(clip_range, clip_range_high, dual_clip)
    count = checks.divisor(normalizer, tokens.mask, checks.wide(log_probs), validate)
    checks.no_transforms(log_probs)
    loss, ratio, approx_kl, clip_frac, _ = loss_ops.ppo_policy_loss(log_probs, tokens, count, options, triton)
    return PPOLoss(loss, {"ratio": ratio, "approx_kl": approx_kl, "clip_frac": clip_frac})


def ppo_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    *,
    clip_range: float | None = 0.2,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    backend: str = "auto",
    validate: bool | None = None,
) -> PPOLoss:
    """The clipped value loss of PPO, for tensors of one shape, usually [B, T].

    Sum over the mask of weights * 0.5 * max((V - R)^2, (clip(V, V_old +- clip_range) - R)^2) / normalizer;
    clip_range=None does not clip. Gradients flow to values only. stats: `clip_frac` (divided by the normalizer) and
    the plain sums over the mask `sum_sq_error`, `sum_return`, `sum_return_sq`, `count`, from which explained variance
    follows once a step.
    """
    checks.floating(values=values, old_values=old_values, returns=returns, weights=weights)
    mask = checks.token_mask(response_mask, values, "values", old_values=old_values, returns=returns, weights=weights)
    triton = choose_backend(backend, values, old_values, returns).name == "triton"
    if clip_range is not None:
        checks.clips(clip_range)
    count = checks.divisor(normalizer, mask, checks.wide(values), validate)
    checks.no_transforms(values)
    loss, *stats, _ = loss_ops.ppo_value_loss(values, old_values, returns, mask, weights, count, clip_range, triton)
    names = ("clip_frac", "sum_sq_error", "sum_return", "sum_return_sq", "count")
    return PPOLoss(loss, dict(zip(names, stats, strict=True)))


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    lora: Lora | None = None,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
    normalizer: float | Tensor | None = None,
    workspace: int | None = None,
    backend: str = "auto",
    validate: bool | None = None,
) -> PPOLoss:
    """Hidden states to the PPO loss: `linear_log_probs`, then `ppo_policy_loss`, without the logits.

    hidden [..., H], weight [V, H], the others [...]. Adds kl_coef * KL(policy || ref) - entropy_coef * entropy, summed
    over the mask and divided by the same normalizer (`weights` multiply the clipped loss only). The gradients of
    hidden, weight, bias and lora are computed here, in the forward sweep: three matrix products instead of four, two
    with a frozen weight, one when nothing needs a gradient. Rows under a false mask are not computed: their hidden
    states may be NaN and their labels anything. stats: those of `ppo_policy_loss`, `entropy`, and per token, in the
    shape of labels, `log_probs` and `token_entropy`. workspace: bytes for the logits of a chunk of rows, as in
    `linear_log_probs`; dW is the sum over the chunks.
    """
    operands = (hidden, weight, labels, bias, temperature, logit_scale, logit_softcap, lora, validate)
    head = checks.head(*operands, workspace=workspace)
    tokens = checks.tokens(old_log_probs, advantages, response_mask, weights, ref_log_probs, labels, "labels")
    triton = choose_backend(backend, hidden, weight).name == "triton"
    checks.labels_in_range(labels, weight.shape[0], tokens.mask, validate)
    coefficients = (kl_coef, kl_estimator, entropy_coef, ref_log_probs)
    options = checks.loss_options(clip_range, clip_range_high, dual_clip, *coefficients)
    count = checks.divisor(normalizer, tokens.mask, checks.wide(hidden, weight), validate)
    need = Need(*(_wanted(*group) for group in ((hidden,), (weight,), (bias,), lora or ())))
    tokens = tokens.map(lambda t: t.reshape(-1))
    tokens = tokens if kl_coef != 0 else tokens._replace(ref_log_probs=None)
    results = loss_ops.linear_ppo_loss(head, tokens, count, options, triton, need)
    return _with_tokens(results[:7], labels)


def token_ppo_loss(
    logits: Tensor,
    labels: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
    normalizer: float | Tensor | None = None,
    backend: str = "auto",
    validate: bool | None = None,
) -> PPOLoss:
    """Logits to the PPO loss: `linear_ppo_loss` for logits [..., V] that exist already; the others [...].

    The gradient of the logits is computed here, in one pass of two reads and one write, in the logits' dtype. Rows
    under a false mask may hold NaN. stats as there.
    """
    checks.floating(logits=logits)
    triton = choose_backend(backend, logits).name == "triton"
    rows = checks.rows(logits, labels, temperature, validate)
    tokens = checks.tokens(old_log_probs, advantages, response_mask, weights, ref_log_probs, labels, "labels")
    checks.labels_in_range(labels, logits.shape[-1], tokens.mask, validate)
    coefficients = (kl_coef, kl_estimator, entropy_coef, ref_log_probs)
    options = checks.loss_options(clip_range, clip_range_high, dual_clip, *coefficients)
    count = checks.divisor(normalizer, tokens.mask, checks.wide(logits), validate)
    tokens = tokens if kl_coef != 0 else tokens._replace(ref_log_probs=None)
    results = loss_ops.token_ppo_loss(rows, tokens, count, options, triton, _wanted(logits))
    return _with_tokens(results[:7], labels)


def _wanted(*tensors: Tensor | float | None) -> bool:
    """Whether a gradient will be asked of one of these."""
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def _with_tokens(results: tuple[Tensor, ...], labels: Tensor) -> PPOLoss:
    """The outputs of a fused loss: loss, four statistics, log-probs and entropies of the tokens."""
    loss, *numbers, log_probs, entropy = results
    stats = dict(zip(("ratio", "approx_kl", "clip_frac", "entropy"), numbers, strict=True))
    stats |= {"log_probs": log_probs.view(labels.shape), "token_entropy": entropy.view(labels.shape)}
    return PPOLoss(loss, stats)
