"""A head that is split over the vocabulary: log-probs from the rows of the weight that each rank holds.

Megatron-LM's vocabulary-parallel cross-entropy (Shoeybi et al. 2019, arXiv 1909.08053, section 3), from hidden states:
each rank makes the logits of its rows alone, a chunk of tokens at a time, and keeps four numbers a token (maximum, sum
of exponentials, the label's logit, sum of exponentials times logits). One collective of 4 N numbers a rank gives
log-probs and entropies; a second one, in the backward pass, sums the gradient of the hidden states. No rank holds the
whole weight, its gradient, or a logits tensor [N, V].

The trainers do not use it. With parallel = fsdp each rank has tokens of its own, and this needs the same tokens on all
ranks: their hidden states would have to be gathered, which for micro-batches of a usual size is as many bytes as the
head. It is for a head, or its gradient, that does not fit on one device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastrlhf.config.errors import UserError
from fastrlhf.runtime import distributed

CHUNK_BYTES = 128 << 20  # of the fp32 logits that a rank makes at a time


class VocabularyShard(NamedTuple):
    """This rank's rows of a head: weight [V_r, H], bias [V_r] or None; start: number of the first of them; vocabulary:
    V, of all ranks. Both may take gradients, which are those of these rows."""

    weight: Tensor
    bias: Tensor | None
    start: int
    vocabulary: int


class _Settings(NamedTuple):
    logit_scale: float
    logit_softcap: float | None
    ignore_index: int
    rows: int  # of a chunk


def shard_vocabulary(weight: Tensor, bias: Tensor | None = None) -> VocabularyShard:
    """Cut a whole head [V, H] for this rank: equal pieces, rounded up, of which the last may have fewer rows or none.
    The shard is a copy; the whole head may go."""
    size = -(-len(weight) // distributed.size())
    start = min(distributed.rank() * size, len(weight))
    rows = slice(start, start + size)
    kept = None if bias is None else bias.detach()[rows].clone()
    return VocabularyShard(weight.detach()[rows].clone(), kept, start, len(weight))


def vocabulary_parallel_log_probs(
    hidden: Tensor,
    shard: VocabularyShard,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    workspace: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """`fastrlhf_kernels.linear_log_probs` with return_entropy=True, of a head split over the ranks -> log_probs and
    entropy [N] in nats, fp32, the same on all ranks; a loss of the two (`ppo_policy_loss`, say) is a loss here too.

    hidden [N, H] and labels [N] int64 are the same on all ranks, which call this, and later the backward pass, together
    and with the same loss. temperature: a number, or [N]. workspace: bytes for the logits of a chunk of tokens. Where
    label == ignore_index both results are 0, and no gradient passes. Differentiable in hidden (each rank gets the whole
    gradient) and in the shard's weight and bias; in torch, on every device, logits accumulated in fp32. Raises
    UserError for shapes that do not fit and for a label outside of the vocabulary.
    """
    if hidden.ndim != 2 or hidden.shape[1] != shard.weight.shape[1] or labels.shape != hidden.shape[:1]:
        shapes = f"hidden {list(hidden.shape)}, weight {list(shard.weight.shape)} and labels {list(labels.shape)}"
        raise UserError(f"vocabulary_parallel_log_probs: {shapes}; expected [N, H], [V_r, H] and [N]")
    counted = labels != ignore_index
    wrong = labels[counted & ((labels < 0) | (labels >= shard.vocabulary))]
    if len(wrong):
        raise UserError(f"labels: {int(wrong[0])} is outside the vocabulary of {shard.vocabulary} tokens")
    heat = torch.as_tensor(temperature, dtype=torch.float32, device=hidden.device).expand(len(labels))
    rows = max(1, workspace // (4 * max(1, len(shard.weight))))
    settings = _Settings(logit_scale, logit_softcap, ignore_index, rows)
    return _LogProbs.apply(hidden, shard.weight, shard.bias, labels, shard.start, heat, settings)


def project(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [..., H] times weight [V, H] -> [..., V] fp32, accumulated in fp32 whatever the dtypes."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        flat = torch.mm(hidden.flatten(0, -2), weight.t().to(hidden.dtype), out_dtype=torch.float32)
        return flat.view(*hidden.shape[:-1], len(weight))
    return F.linear(hidden.float(), weight.float())


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        start: int,
        heat: Tensor,
        settings: _Settings,
    ) -> tuple[Tensor, Tensor]:
        # Of each token what this rank's rows of the vocabulary say: maximum, sum, label's logit, weighted sum.
        own = torch.zeros(4, len(labels), device=hidden.device)
        own[0] = -torch.inf
        if len(weight):
            for part in torch.arange(len(labels), device=hidden.device).split(settings.rows):
                logits, _ = _logits(hidden[part], weight, bias, heat[part], settings)
                here, place = _mine(labels[part], start, len(weight))
                own[0, part] = logits.amax(1)
                powers = (logits - own[0, part, None]).exp()
                own[1, part], own[3, part] = powers.sum(1), (powers * logits).sum(1)
                own[2, part] = logits.gather(1, place[:, None])[:, 0].where(here, 0.0)
        ranks = distributed.size()
        sums = own[None] if ranks == 1 else distributed.gather_equal(own.flatten()).view(ranks, 4, len(labels))
        highest = sums[:, 0].amax(0)
        scale = (sums[:, 0] - highest).exp()
        total = (sums[:, 1] * scale).sum(0)
        log_total = highest + total.log()
        counted = labels != settings.ignore_index
        log_probs = (sums[:, 2].sum(0) - log_total).where(counted, 0.0)
        entropy = (log_total - (sums[:, 3] * scale).sum(0) / total).where(counted, 0.0)
        ctx.save_for_backward(hidden, weight, bias, labels, heat, log_total, entropy)
        ctx.start, ctx.settings = start, settings
        return log_probs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_log_probs: Tensor, of_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, heat, log_total, entropy = ctx.saved_tensors
        counted = labels != ctx.settings.ignore_index
        of_log_probs, of_entropy = of_log_probs.where(counted, 0.0), of_entropy.where(counted, 0.0)
        of_hidden = torch.zeros(hidden.shape, device=hidden.device)
        of_weight = torch.zeros(weight.shape, device=hidden.device)
        of_bias = None if bias is None else torch.zeros(bias.shape, device=hidden.device)
        for part in torch.arange(len(labels), device=hidden.device).split(ctx.settings.rows) if len(weight) else ():
            logits, slope = _logits(hidden[part], weight, bias, heat[part], ctx.settings)
            here, place = _mine(labels[part], ctx.start, len(weight))
            surprise = logits - log_total[part, None]
            # d log p / d z = 1[label] - p, and d entropy / d z = -p (log p + entropy).
            factor = of_log_probs[part, None] + of_entropy[part, None] * (surprise + entropy[part, None])
            grad = -surprise.exp() * factor
            grad.scatter_add_(1, place[:, None], of_log_probs[part, None].where(here[:, None], 0.0))
            grad *= slope
            of_hidden[part] = grad @ weight.float()
            of_weight += grad.t() @ hidden[part].float()
            if of_bias is not None:
                of_bias += grad.sum(0)
        distributed.all_reduce_sum(of_hidden)
        whole = None if bias is None else of_bias.to(bias.dtype)
        return of_hidden.to(hidden.dtype), of_weight.to(weight.dtype), whole, None, None, None, None


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, heat: Tensor, settings: _Settings
) -> tuple[Tensor, Tensor | float]:
    """Logits [n, V_r] fp32 as they are sampled from, and their slope in those of the product: scale, softcap,
    temperature."""
    raw = project(hidden, weight)
    raw = (raw if bias is None else raw + bias.float()) * settings.logit_scale
    slope = settings.logit_scale / heat[:, None]
    if settings.logit_softcap is not None:
        bent = torch.tanh(raw / settings.logit_softcap)
        raw, slope = bent * settings.logit_softcap, slope * (1 - bent * bent)
    return raw / heat[:, None], slope


def _mine(labels: Tensor, start: int, rows: int) -> tuple[Tensor, Tensor]:
    """Which labels are of this rank's rows, and where they stand in them (0 for the others)."""
    place = labels - start
    here = (place >= 0) & (place < rows)
    return here, place.where(here, 0)
