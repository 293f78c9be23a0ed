"""Held-out prompts: rewards of the policy's replies, how often they beat the SFT model's, and what best-of-n gives.

The SFT model is the reference policy as the run starts. Its replies are sampled and scored once, before step 1, and
kept in the checkpoint: a reference that moves later, or a resumed run, is compared with the same replies. They come
from the same random numbers as the policy's, so a policy that has not moved ties with every one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastrlhf.config.errors import UserError
from fastrlhf.config.stages import PPOConfig
from fastrlhf.rl.functions import UserFunction, check_no_bare_file, is_function_reference, load_function, name_of
from fastrlhf.rollout.result import ScoredRollout
from fastrlhf.runtime import distributed
from fastrlhf.runtime.metrics import distinct_2, mean

QUANTILES = {"reward/eval_p10": 0.1, "reward/eval_p50": 0.5, "reward/eval_p90": 0.9}
Sample = Callable[..., ScoredRollout]  # (samples of a prompt, *, purpose, temperature): scored replies of the reference


@dataclass
class Baseline:
    """The SFT model's reply to each held-out prompt and its score."""

    responses: list[str]
    scores: list[float | None]


class Evaluation:
    """What is measured on eval_prompts, and what has to be remembered for it."""

    def __init__(self, config: PPOConfig, judge: object, *, prompts: bool) -> None:
        """prompts: there are eval_prompts. UserError for what is asked of them without them, or never evaluated."""
        self.config, self.baseline = config, None
        asked = {"judge": judge is not None, "best_of_n": config.best_of_n > 0}
        for name in (name for name, is_asked in asked.items() if is_asked):
            if not prompts:
                raise UserError(f"{name}: measured on held-out prompts; give eval_prompts too")
            if not config.eval_every:  # the config itself refuses best_of_n then
                raise UserError(f"{name}: measured in evaluations; set eval_every above 0")
        self.judge = None if judge is None else load_judge(judge, config)

    def metrics(self, rollout: ScoredRollout, sample: Sample, report: Callable[..., None]) -> dict[str, float]:
        """rollout: the policy's scored replies to the held-out prompts, one each.

        The first call, before step 1, has `sample` answer them by the reference too, and tells report(kind, message,
        **fields) of the best-of-n curve.
        """
        if self.baseline is None:
            self._before_training(sample, report)
        scored = [s for s in rollout.scores if s is not None]
        found = {"reward/eval": mean(scored)}
        found |= {name: quantile(scored, q) for name, q in QUANTILES.items()}
        found |= {
            "length/eval": mean([float(len(r)) for r in rollout.response_ids]),
            "length/finished_eval": mean([float(f) for f in rollout.finished]),
            "distinct2/eval": distinct_2(rollout.responses),
            "win_rate/reward": win_rate(rollout.scores, self.baseline.scores),
        }
        if self.judge is not None:
            found["win_rate/judge"] = mean(self._verdicts(rollout))
        return found

    def _before_training(self, sample: Sample, report: Callable[..., None]) -> None:
        config = self.config
        replies = sample(1, purpose="eval", temperature=eval_temperature(config))
        self.baseline = Baseline(replies.responses, replies.scores)
        if config.best_of_n:
            drawn = sample(config.best_of_n, purpose="best_of_n", temperature=config.temperature).scores
            groups = [drawn[i : i + config.best_of_n] for i in range(0, len(drawn), config.best_of_n)]
            curve = best_of_n_curve(groups, config.best_of_n)
            said = ", ".join(f"n={row['n']}: {row['reward']:.4g} at {row['kl']:.3g} nats" for row in curve)
            report("best_of_n", f"mean score of the reference's best of n on eval_prompts: {said}", curve=curve)

    def _verdicts(self, rollout: ScoredRollout) -> list[float]:
        """The judge's numbers, those it could not give (None) left out. Only the lead asks: a judge may cost money."""
        ours, theirs = rollout.responses, self.baseline.responses
        judge, verdicts = self.judge, []
        if not distributed.is_lead():
            return distributed.gather(torch.zeros(0, dtype=torch.float64)).tolist()
        lists = rollout.texts.columns | {"prompts": rollout.prompts, "responses": ours, "baselines": theirs}
        for i, found in enumerate(judge(lists)):
            if found is not None:
                verdicts.append(judge.number(i, found))
                if not 0 <= verdicts[-1] <= 1:
                    raise UserError(f"{judge.what}, sample {i}: {found} is outside [0, 1]; 1: the response is better")
        return distributed.gather(torch.tensor(verdicts, dtype=torch.float64)).tolist()

    def state(self) -> dict[str, Any] | None:
        return None if self.baseline is None else dict(vars(self.baseline))

    def load_state(self, state: dict[str, Any] | None) -> None:
        self.baseline = None if state is None else Baseline(**state)


def eval_temperature(config: PPOConfig) -> float:
    return config.temperature if config.eval_temperature is None else config.eval_temperature


def load_judge(judge: object, config: PPOConfig) -> UserFunction:
    """judge(prompts, responses, baselines, **columns) -> a number in [0, 1] for each: 1 where the response is better
    than the baseline, 0.5 where neither is. UserError for what is no function."""
    check_no_bare_file(judge, "judge")
    if is_function_reference(judge):
        judge = load_function(judge, "judge")  # type: ignore[arg-type]
    if not callable(judge):
        raise UserError(f"judge: {judge!r} is neither a function nor 'module:function' or 'file.py:function'")
    lists = ("prompts", "responses", "baselines")
    how = {"timeout": config.reward_timeout, "retries": config.reward_retries}
    return UserFunction(f"judge {name_of(judge)}", judge, lists, **how)


def win_rate(scores: Sequence[float | None], baseline: Sequence[float | None]) -> float:
    """Share of the prompts whose score is above the baseline's, a tie counting half; prompts without one of the scores
    are left out."""
    pairs = [(a, b) for a, b in zip(scores, baseline, strict=True) if a is not None and b is not None]
    return mean([(a > b) + 0.5 * (a == b) for a, b in pairs])


def quantile(values: Sequence[float], q: float) -> float:
    """With linear interpolation between the order statistics; NaN for nothing."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(q)) if values else math.nan


def best_of_n_curve(groups: Sequence[Sequence[float | None]], most: int) -> list[dict[str, float]]:
    """groups: N scores of samples to each prompt -> rows {n, kl, reward} for n = 1, 2, 4, ... up to `most`.

    reward: mean over prompts of `expected_best`; None scores are no samples, and a prompt with fewer than n counts not.
    kl: `best_of_n_kl`.
    """
    rows, n = [], 1
    while n <= most:
        scored = [[s for s in group if s is not None] for group in groups]
        best = mean([expected_best(own, n) for own in scored if len(own) >= n])
        rows.append({"n": n, "kl": best_of_n_kl(n), "reward": best})
        n *= 2
    return rows


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n, nats: the KL of the best of n samples to one sample where no two score alike, else an upper
    bound of it (Stiennon et al. 2020; Hilton and Gao 2022; Beirami et al. 2024)."""
    return math.log(n) - (n - 1) / n


def expected_best(scores: Sequence[float], n: int) -> float:
    """Mean, over all subsets of n of the N scores, of the largest: sum_i C(i-1, n-1) / C(N, n) * i-th smallest.

    Unbiased for the expected best of n independent samples (Nakano et al. 2021; Hilton and Gao 2022). N >= n.
    """
    subsets = math.comb(len(scores), n)
    return sum(math.comb(i, n - 1) / subsets * score for i, score in enumerate(sorted(scores)))
