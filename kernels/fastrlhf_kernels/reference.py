"""The specification: every function of the package in a few lines of plain torch, in fp32 or float64.

Nothing here is lean or fast (full [N, V] logits, Python loops over time). The tests hold the backends to it,
and a reader learns from it what each function computes. Arguments are taken as already checked.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def wide(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of results: float64 if any input is float64, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def token_log_probs(logits, labels, *, temperature=1.0, ignore_index=-100, return_entropy=False):
    keep = labels != ignore_index
    z = torch.where(keep[..., None], logits.to(wide(logits)), 0)  # an ignored row may hold NaN: 0 * NaN is NaN
    z = z / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)
    log_p = torch.log_softmax(z, -1)
    picked = log_p.gather(-1, torch.where(keep, labels, 0).long()[..., None])[..., 0]
    log_probs = torch.where(keep, picked, 0)
    if not return_entropy:
        return log_probs
    p = log_p.exp()
    entropy = -(p * torch.where(p > 0, log_p, 0)).sum(-1)
    return log_probs, torch.where(keep, entropy, 0)


def linear_log_probs(hidden, weight, labels, *, ignore_index=-100, return_entropy=False, temperature=1.0, **head):
    z = linear_logits(hidden, weight, labels != ignore_index, **head)
    return token_log_probs(z, labels, temperature=temperature, ignore_index=ignore_index, return_entropy=return_entropy)


def linear_logits(hidden, weight, keep, *, bias=None, logit_scale=1.0, logit_softcap=None, lora=None):
    dtype = wide(hidden, weight)
    x = torch.where(keep[..., None], hidden.to(dtype), 0)
    z = x @ weight.to(dtype).T
    if bias is not None:
        z = z + bias.to(dtype)
    if lora is not None:
        a, b, scale = lora
        z = z + scale * (x @ a.to(dtype).T) @ b.to(dtype).T
    z = logit_scale * z
    return z if logit_softcap is None else logit_softcap * torch.tanh(z / logit_softcap)


def kl_estimate(log_probs, ref_log_probs, estimator="k1"):
    d = log_probs - ref_log_probs
    return {"k1": d, "k2": d * d / 2, "k3": torch.expm1(-d) + d, "abs": d.abs()}[estimator]


def shape_rewards(scores, log_probs, ref_log_probs, response_mask, *, kl_coef, estimator="k1"):
    mask = response_mask.bool()
    rewards = torch.where(mask, -kl_coef * kl_estimate(log_probs, ref_log_probs, estimator), 0)
    for row in range(len(scores)):
        positions = mask[row].nonzero()
        if len(positions):
            rewards[row, positions[-1]] += scores[row]
    return rewards


def gae(rewards, values, response_mask, *, gamma=1.0, gae_lambda=0.95, bootstrap_values=None):
    mask = response_mask.bool()
    advantages = torch.zeros_like(values)
    for row in range(len(values)):
        decay = gamma * (gae_lambda if isinstance(gae_lambda, float) else gae_lambda[row])  # one, or one for each row
        next_value = values.new_zeros(()) if bootstrap_values is None else bootstrap_values[row]
        next_advantage = values.new_zeros(())
        for t in reversed(mask[row].nonzero()[:, 0].tolist()):  # only response tokens: holes are skipped
            delta = rewards[row, t] + gamma * next_value - values[row, t]
            next_advantage = delta + decay * next_advantage
            next_value = values[row, t]
            advantages[row, t] = next_advantage
    return advantages, torch.where(mask, advantages + values, 0)


def shape_and_gae(
    scores,
    log_probs,
    ref_log_probs,
    values,
    response_mask,
    *,
    kl_coef,
    estimator="k1",
    token_rewards=None,
    whiten=True,
    group_size=None,
    **discounts,
):
    mask = response_mask.bool()
    rewards = shape_rewards(scores, log_probs, ref_log_probs, mask, kl_coef=kl_coef, estimator=estimator)
    if token_rewards is not None:
        rewards = rewards + torch.where(mask, token_rewards, 0)
    advantages, returns = gae(rewards, values, mask, **discounts)
    if whiten:
        size = group_size or len(values)
        groups = zip(advantages.split(size), mask.split(size))
        advantages = torch.cat([masked_whiten(rows, kept) for rows, kept in groups])
    return rewards, advantages, returns


def masked_whiten(x, mask, *, shift_mean=True, eps=1e-8):
    mask = mask.bool()
    if not mask.any():
        return torch.zeros_like(x)
    kept = x[mask]
    mean, var = kept.mean(), kept.var(unbiased=False)
    out = torch.zeros_like(x)
    out[mask] = (kept - mean) / torch.sqrt(var + eps) + (0 if shift_mean else mean)
    return out


def ppo_policy_loss(
    log_probs, old_log_probs, advantages, response_mask, *, clip_range=0.2, clip_range_high=None, **options
):
    dual_clip, weights, normalizer = (options.get(name) for name in ("dual_clip", "weights", "normalizer"))
    mask = response_mask.bool()
    lp, old, adv = (torch.where(mask, t, 0) for t in (log_probs, old_log_probs, advantages))
    weight = torch.where(mask, 1.0 if weights is None else weights, 0)
    count = mask.sum().clamp(min=1) if normalizer is None else normalizer
    high = clip_range if clip_range_high is None else clip_range_high
    ratio = torch.exp(lp - old)
    plain, clipped = -adv * ratio, -adv * ratio.clamp(1 - clip_range, 1 + high)
    loss = torch.where(plain >= clipped, plain, clipped)  # at a tie the whole gradient goes to the unclipped branch
    if dual_clip is not None:
        loss = torch.where((adv < 0) & (loss > -adv * dual_clip), -adv * dual_clip, loss)
    total = torch.where(mask, weight * loss, 0).sum() / count
    d = (lp - old).detach()
    per_token = {
        "ratio": ratio.detach(),
        "approx_kl": torch.expm1(d) - d,
        "clip_frac": (clipped > plain).to(lp.dtype),
    }
    return total, {name: torch.where(mask, x, 0).sum() / count for name, x in per_token.items()}


def ppo_value_loss(values, old_values, returns, response_mask, *, clip_range=0.2, weights=None, normalizer=None):
    mask = response_mask.bool()
    v, old, ret = (torch.where(mask, t, 0) for t in (values, old_values, returns))
    weight = torch.where(mask, 1.0 if weights is None else weights, 0)
    count = mask.sum().clamp(min=1) if normalizer is None else normalizer
    plain = (v - ret) ** 2
    clipped = plain if clip_range is None else (v.clamp(old - clip_range, old + clip_range) - ret) ** 2
    loss = torch.where(plain >= clipped, plain, clipped) / 2
    stats = {
        "clip_frac": (clipped > plain).to(v.dtype).sum() / count,
        "sum_sq_error": plain.detach().sum(),
        "sum_return": ret.sum(),
        "sum_return_sq": (ret**2).sum(),
        "count": mask.sum().to(v.dtype),
    }
    return torch.where(mask, weight * loss, 0).sum() / count, stats


POLICY = ("clip_range", "clip_range_high", "dual_clip", "weights")


def linear_ppo_loss(hidden, weight, labels, old_log_probs, advantages, response_mask, **options):
    mask = response_mask.bool()
    normalizer = options.pop("normalizer", None)
    count = mask.sum().clamp(min=1) if normalizer is None else normalizer
    policy = {name: options.pop(name) for name in POLICY if name in options}
    kl_coef, entropy_coef = options.pop("kl_coef", 0.0), options.pop("entropy_coef", 0.0)
    ref_log_probs, kl_estimator = options.pop("ref_log_probs", None), options.pop("kl_estimator", "k3")
    labels = torch.where(mask, labels, -100)  # what is left of the options belongs to the head
    log_probs, entropy = linear_log_probs(hidden, weight, labels, return_entropy=True, **options)
    loss, stats = ppo_policy_loss(log_probs, old_log_probs, advantages, mask, normalizer=count, **policy)
    if kl_coef != 0:
        kl = kl_estimate(log_probs, torch.where(mask, ref_log_probs, 0), kl_estimator)
        loss = loss + kl_coef * torch.where(mask, kl, 0).sum() / count
    loss = loss - (entropy_coef * entropy.sum() / count if entropy_coef != 0 else 0)
    stats["entropy"] = entropy.detach().sum() / count
    return loss, stats | {"log_probs": log_probs.detach(), "token_entropy": entropy.detach()}


def philox_4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10: four 32-bit words of a 128-bit counter and a 64-bit key, as in Random123."""
    c0, c1, c2, c3 = counter
    for i in range(10):
        product0, product2 = PHILOX_MULTIPLIERS[0] * c0, PHILOX_MULTIPLIERS[1] * c2
        key0, key1 = ((key[j] + i * PHILOX_WEYL[j]) & WORD for j in (0, 1))
        c0, c1 = (product2 >> 32) ^ c1 ^ key0, product2 & WORD
        c2, c3 = (product0 >> 32) ^ c3 ^ key1, product0 & WORD
    return c0, c1, c2, c3


def uniform(seed: int, stream: int, offset: int) -> float:
    """The one number in [0, 1) with 53 bits that belongs to (seed, stream, offset)."""
    counter = (stream & WORD, stream >> 32 & WORD, offset & WORD, offset >> 32 & WORD)
    words = philox_4x32(counter, (seed & WORD, seed >> 32 & WORD))
    return (words[0] << 21 | words[1] >> 11) * 2.0**-53


def sample_support(z: Tensor, top_k: int, top_p: float) -> Tensor:
    """Which of the logits z [V] (already divided by the temperature) may be drawn: top-k first, then top-p."""
    keep = torch.ones_like(z, dtype=torch.bool)
    if 0 < top_k <= len(z):
        keep = z >= z.sort(descending=True).values[top_k - 1]
    p = torch.softmax(torch.where(keep, z, -torch.inf).double(), -1)
    if top_p < 1:
        kept = keep.nonzero()[:, 0]  # [kept, V] is small where top_k is, [V, V] is not
        mass_before = torch.where(z[None, :] > z[kept, None], p, 0).sum(1)
        keep = torch.zeros_like(keep).index_put((kept,), mass_before < top_p)
    return keep


def sample_tokens(logits, *, temperature=1.0, top_k=0, top_p=1.0, seed, offset=0, stream=None):
    rows = range(len(logits))
    log_p = torch.log_softmax(logits.to(wide(logits)) / (temperature or 1.0), -1)
    tokens, log_probs = [], []
    for row in rows:
        if temperature == 0:
            tokens.append(int((logits[row] == logits[row].max()).nonzero()[0]))
            log_probs.append(0.0)
            continue
        keep = sample_support(logits[row].to(wide(logits)) / temperature, top_k, top_p)
        cdf = torch.where(keep, log_p[row].double().exp(), 0).cumsum(0)
        place = int(offset if isinstance(offset, int) else offset[row])
        u = uniform(seed, row if stream is None else int(stream[row]), place)
        tokens.append(int((cdf <= u * cdf[-1]).sum()))
        log_probs.append(float(log_p[row, tokens[-1]] - cdf[-1].log()))
    tokens = torch.tensor(tokens, dtype=torch.int64)
    return tokens, log_p.new_tensor(log_probs), log_p[torch.arange(len(tokens)), tokens]


def decode_attention(q, k, v, lengths, *, scale, softcap=None, window=None):
    out = torch.zeros_like(q)
    repeat = q.shape[1] // k.shape[2]
    for row, length in enumerate(lengths.tolist()):
        first = 0 if window is None else max(0, length - window)
        for head in range(q.shape[1]):
            keys, values = (t[row, first:length, head // repeat] for t in (k, v))
            scores = scale * keys @ q[row, head]
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out[row, head] = torch.softmax(scores, 0) @ values
    return out
