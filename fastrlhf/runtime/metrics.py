"""Small sums behind the metrics of a step; names and units are in docs/api.md."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_UNITS = re.compile(r"[A-Za-z0-9']+|[^\sA-Za-z0-9']")  # words of Latin script, single characters of anything else


def mean(values: Sequence[float]) -> float:
    """NaN for nothing: a metric that could not be measured is not 0."""
    return sum(values) / len(values) if values else math.nan


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """The n-grams of a text, in its order, whatever the case. Units are words in Latin script and single characters
    otherwise, so that no figure made of them depends on a tokenizer."""
    units = _UNITS.findall(text.lower())
    return list(zip(*(units[i:] for i in range(n))))


def distinct(responses: Iterable[str], n: int) -> float:
    """Distinct n-grams / all n-grams over all responses (Li et al. 2016, arXiv:1510.03055); 0.0 when there are none.

    More text repeats more: compare only over the same prompts.
    """
    grams = [gram for response in responses for gram in ngrams(response, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def distinct_2(responses: Iterable[str]) -> float:
    return distinct(responses, 2)


class Stats:
    """Named figures of the updates of one step, averaged over the updates."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def add(self, name: str, value: float) -> None:
        self._values.setdefault(name, []).append(value)

    def last(self, name: str) -> float:
        return self._values[name][-1]

    def means(self) -> dict[str, float]:
        return {name: mean(values) for name, values in self._values.items()}


def rollout_metrics(
    scores: Tensor,
    old_log_probs: Tensor,
    ref_log_probs: Tensor,
    policy_log_probs: Tensor,
    sampled_log_probs: Sequence[Tensor],
    mask: Tensor,
) -> dict[str, float]:
    """Metrics known before the update. scores [B] (NaN: unscorable); log-probs [B, T], zero outside mask [B, T].

    kl/ref: mean over sequences of sum_t log pi(a_t) - log pi_ref(a_t), in nats. rollout/kept_mass: mean probability
    that top-k and top-p left to sample from (1 without them).
    """
    good = scores[scores.isfinite()]
    truncation = policy_log_probs[mask].cpu() - torch.cat(list(sampled_log_probs))
    kl = (old_log_probs - ref_log_probs).sum(1)
    return {
        "reward/mean": mean(good.tolist()),
        "reward/std": float(good.std(correction=0)) if good.numel() else math.nan,
        "reward/unscorable": float(scores.numel() - good.numel()),
        "kl/ref": float(kl.mean()),
        "rollout/kept_mass": float(truncation.exp().mean()),
    }


def explained_variance(sum_sq_error: float, sum_return: float, sum_return_sq: float, count: float) -> float:
    """1 - squared error / squared deviation of the returns from their mean, from sums over `count` tokens.

    0.0 where the returns do not vary: there is nothing to explain.
    """
    variance = sum_return_sq - sum_return * sum_return / max(count, 1.0)
    return 1.0 - sum_sq_error / variance if variance > 1e-12 else 0.0


def mismatch_metrics(trained: Tensor, decoded: Tensor) -> dict[str, float]:
    """How far the training forward and decoding are apart, of log-probs [N] of the same weights and tokens.

    Mean and largest |difference| in nats, and the effective share of the samples, (sum w)^2 / (N sum w^2) with
    w = exp(trained - decoded) (Kong 1992): 1 where they agree.
    """
    if trained.numel() == 0:
        return dict.fromkeys(("rollout/mismatch", "rollout/mismatch_max", "rollout/ess"), math.nan)
    d = trained.double() - decoded.double()
    w = d.clamp(-50, 50).exp()
    figures = torch.stack([d.abs().mean(), d.abs().max(), w.sum().square() / (len(w) * w.square().sum())])
    return dict(zip(("rollout/mismatch", "rollout/mismatch_max", "rollout/ess"), figures.tolist(), strict=True))


def throughput(name: str, tokens: float, device: torch.device) -> dict[str, float]:
    """Token count of the step under `name`; mem/peak_gib on a GPU since the last step."""
    found = {name: float(tokens)}
    if device.type == "cuda":
        found["mem/peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        torch.cuda.reset_peak_memory_stats(device)
    return found
