"""first version: every function through its reference; the lean path follows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import reference


class PPOLoss(NamedTuple):
    loss: Tensor
    stats: dict[str, Tensor]


class SampledTokens(NamedTuple):
    tokens: Tensor
    log_probs: Tensor
    policy_log_probs: Tensor


def token_log_probs(logits, labels, *, temperature=1.0, ignore_index=-100, return_entropy=False, backend="auto", validate=None):
    return reference.token_log_probs(logits, labels, temperature=temperature, ignore_index=ignore_index, return_entropy=return_entropy)


def linear_log_probs(hidden, weight, labels, *, bias=None, temperature=1.0, logit_scale=1.0, logit_softcap=None, lora=None, ignore_index=-100, return_entropy=False, batch_invariant=False, backend="auto", validate=None):
    return reference.linear_log_probs(hidden, weight, labels, bias=bias, temperature=temperature, logit_scale=logit_scale, logit_softcap=logit_softcap, lora=lora, ignore_index=ignore_index, return_entropy=return_entropy)


def kl_estimate(log_probs, ref_log_probs, estimator="k1", *, backend="auto", validate=None):
    return reference.kl_estimate(log_probs, ref_log_probs, estimator)


def shape_rewards(scores, log_probs, ref_log_probs, response_mask, *, kl_coef, estimator="k1", backend="auto", validate=None):
    with torch.no_grad():
        return reference.shape_rewards(scores, log_probs, ref_log_probs, response_mask, kl_coef=kl_coef, estimator=estimator)


def gae(rewards, values, response_mask, *, gamma=1.0, gae_lambda=0.95, bootstrap_values=None, backend="auto", validate=None):
    with torch.no_grad():
        return reference.gae(rewards, values, response_mask, gamma=gamma, gae_lambda=gae_lambda, bootstrap_values=bootstrap_values)


def masked_whiten(x, mask, *, shift_mean=True, eps=1e-8, backend="auto", validate=None):
    with torch.no_grad():
        return reference.masked_whiten(x, mask, shift_mean=shift_mean, eps=eps)


def ppo_policy_loss(log_probs, old_log_probs, advantages, response_mask, *, clip_range=0.2, clip_range_high=None, dual_clip=None, weights=None, normalizer=None, backend="auto", validate=None):
    return PPOLoss(*reference.ppo_policy_loss(log_probs, old_log_probs, advantages, response_mask, clip_range=clip_range, clip_range_high=clip_range_high, dual_clip=dual_clip, weights=weights, normalizer=normalizer))


def ppo_value_loss(values, old_values, returns, response_mask, *, clip_range=0.2, weights=None, normalizer=None, backend="auto", validate=None):
    return PPOLoss(*reference.ppo_value_loss(values, old_values, returns, response_mask, clip_range=clip_range, weights=weights, normalizer=normalizer))


def linear_ppo_loss(hidden, weight, labels, old_log_probs, advantages, response_mask, *, backend="auto", validate=None, **options):
    return PPOLoss(*reference.linear_ppo_loss(hidden, weight, labels, old_log_probs, advantages, response_mask, **options))


def sample_tokens(logits, *, temperature=1.0, top_k=0, top_p=1.0, seed, offset=0, stream=None, backend="auto", validate=None):
    with torch.no_grad():
        return SampledTokens(*reference.sample_tokens(logits, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, offset=offset, stream=stream))
