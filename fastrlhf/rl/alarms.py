"""Signs that a run is worthless, told while it can still be stopped: rewards that teach nothing, a reward model that
ranks no better than chance, held-out prompts that are trained on, a reward that is the length of the reply, replies of
another policy than the one that learns, a policy that runs away from its reference or into noise.

An alarm is an event of kind "alarm", told when its condition begins and again only after it was gone in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fastrlhf.config.errors import UserError
from fastrlhf.config.stages import PPOConfig
from fastrlhf.data.encode import EncodedPrompt
from fastrlhf.models.reward_folder import HeldOut
from fastrlhf.rollout.result import ScoredRollout

UNSCORABLE_SHARE = 0.5
FLAT_GROUPS_SHARE = 0.5
FLAT_STEPS = 3
KNOWN_PROMPTS_SHARE = 0.05
LENGTH_R2 = 0.5
LENGTH_REPLIES = 64
EXACT_MISMATCH = 1e-3  # nats, mean over the tokens of a step, in fp32
MISMATCH_GROWTH = 3.0  # in less precise dtypes: times that of the first step
MISMATCH_STEPS = 3
RUNAWAY_STEPS = 3
RUNAWAY_NATS = 1.0  # of entropy above the first step's: three times next to nothing is no noise yet
SAME = 1e-6  # of the larger of 1 and the reward: a reward model's rounding is no variance


class Alarms:
    """What has been seen of the last steps, and which alarms are on.

    report(kind, message, **fields) is told of each.
    """

    def __init__(self, report: Callable[..., None]) -> None:
        self.report = report
        self.on: set[str] = set()
        self.constant_steps = self.flat_group_steps = 0
        self.mismatch_steps = self.kl_steps = self.entropy_steps = 0
        self.first_entropy: float | None = None
        self.first_mismatch: float | None = None
        self.last_reward: float | None = None
        self.step = 0  # that the next alarm is of
        self.replies: list[tuple[float, float]] = []  # (tokens, reward) of the latest ones

    def compare_prompts(self, prompts: Sequence[EncodedPrompt], heldout: Sequence[EncodedPrompt] | None) -> None:
        """Alarm where too many of the held-out prompts are trained on: token for token the same."""
        trained = {tuple(ids) for _, ids in prompts}
        known = [prompt for prompt, ids in heldout or () if tuple(ids) in trained]
        if known:
            share = len(known) / len(heldout)
            message = (
                f"{len(known)} of {len(heldout)} eval_prompts ({share:.0%}) are among the training prompts, so "
                "reward/eval measures no held-out prompts; take them out of one of the two"
            )
            self._set("known_prompts", share > KNOWN_PROMPTS_SHARE, message)

    def doubt_reward_models(self, records: Mapping[str, HeldOut | None]) -> None:
        """Alarm where the record of a reward model, by its name, says that it knows nothing."""
        message = doubt_of(records)
        self._set("reward_model", bool(message), message)

    def after_scoring(self, rollout: ScoredRollout, step: int) -> None:
        """Look at the scores of a step, the step-th one, before it is learned from. UserError where there are none."""
        scores, count, self.step = rollout.scores, len(rollout.scores), step
        scored = [score for score in scores if score is not None]
        missing = count - len(scored)
        message = f"the reward could not judge {missing} of {count} responses (None); they are learned from in no way"
        self._set("unscorable", missing > UNSCORABLE_SHARE * count, message)
        if not scored:
            raise UserError(
                f"reward: None for all {count} responses of step {step}, so there is nothing to learn from; mend the "
                f"reward, or the prompts it cannot judge (the first: {rollout.prompts[0][:60]!r})"
            )
        self._constant(scored)
        if rollout.samples_per_prompt > 1:
            self._flat_groups(scores, rollout.samples_per_prompt)
        self._length([len(ids) for ids in rollout.response_ids], scores)

    def after_learning(self, mismatch: float, dtype: torch.dtype, cause: Callable[[], str]) -> None:
        """Look at `rollout/mismatch` of a step, in nats. cause: asked for a sentence where this begins an alarm."""
        if math.isnan(mismatch):  # no token was learned from
            return
        if self.first_mismatch is None:
            self.first_mismatch = max(mismatch, EXACT_MISMATCH)
        if dtype == torch.float32:
            on, limit = mismatch > EXACT_MISMATCH, f"{EXACT_MISMATCH:g}, more than fp32 rounds"
        else:
            most = MISMATCH_GROWTH * self.first_mismatch
            self.mismatch_steps = self.mismatch_steps + 1 if mismatch > most else 0
            on = self.mismatch_steps >= MISMATCH_STEPS
            limit = f"{most:.2g} for {MISMATCH_STEPS} steps, {MISMATCH_GROWTH:g} times that of the first step"
        message = ""
        if on and "mismatch" not in self.on:
            message = (
                f"log-probs of sampling and of the training forward are {mismatch:.2g} nats apart (mean over tokens; "
                f"the limit is {limit}), so the policy learns from replies of another one: {cause()}"
            )
        self._set("mismatch", on, message)

    def stop_if_runaway(self, metrics: Mapping[str, float], config: PPOConfig, checkpoint: Callable[[], str]) -> None:
        """Look at kl/ref and policy/entropy of a step that was learned from. An alarm, and UserError, where one of them
        was beyond its limit for RUNAWAY_STEPS steps: the policy writes noise then, which no later step mends, so its
        weights are not saved either. checkpoint: asked, where it stops, for a sentence on what is there to go on from.
        """
        tokens = max(metrics["length/mean"], 1.0)
        kl, entropy = metrics["kl/ref"] / tokens, metrics.get("policy/entropy")
        over = config.runaway_kl is not None and kl > config.runaway_kl
        self.kl_steps = self.kl_steps + 1 if over else 0
        problems = []
        if self.kl_steps >= RUNAWAY_STEPS:
            problems.append(f"kl/ref is {kl:.2g} nats a token (runaway_kl = {config.runaway_kl:g})")
        if entropy is not None and math.isfinite(entropy):
            if self.first_entropy is None:
                self.first_entropy = entropy
            limit = max((config.runaway_entropy or 1.0) * self.first_entropy, self.first_entropy + RUNAWAY_NATS)
            over = config.runaway_entropy is not None and entropy > limit
            self.entropy_steps = self.entropy_steps + 1 if over else 0
            if self.entropy_steps >= RUNAWAY_STEPS:
                first = f"{self.first_entropy:.2g} in the first step (runaway_entropy = {config.runaway_entropy:g})"
                problems.append(f"policy/entropy is {entropy:.2g} nats, from {first}")
        if problems:
            message = (
                f"the policy has run away: {' and '.join(problems)}, for {RUNAWAY_STEPS} steps; stopped after step "
                f"{self.step}, which is not saved ({checkpoint()}): lower learning_rate, or raise kl_coef"
            )
            self._set("runaway", True, message)
            raise UserError(message)

    def _constant(self, scored: list[float]) -> None:
        """A step of one response is compared with the step before it."""
        values = scored if len(scored) > 1 or self.last_reward is None else [*scored, self.last_reward]
        flat = len(values) > 1 and _flat(values)
        self.constant_steps = self.constant_steps + 1 if flat else 0
        self.last_reward = scored[-1]
        message = (
            f"rewards have been constant for {FLAT_STEPS} steps (now {scored[-1]:g} for all {len(scored)} responses): "
            "there is nothing to learn; is the reward given what it looks for?"
        )
        self._set("constant_rewards", self.constant_steps >= FLAT_STEPS, message)

    def _flat_groups(self, scores: Sequence[float | None], size: int) -> None:
        groups = [[s for s in scores[i : i + size] if s is not None] for i in range(0, len(scores), size)]
        groups = [group for group in groups if len(group) > 1]
        flat = sum(map(_flat, groups))
        many = flat > FLAT_GROUPS_SHARE * len(groups)
        self.flat_group_steps = self.flat_group_steps + 1 if many else 0
        message = (
            f"{flat} of {len(groups)} prompts have the same reward for all {size} responses, more than half for "
            f"{FLAT_STEPS} steps in a row; they teach a group estimator nothing: use prompts of fitting difficulty"
        )
        self._set("flat_groups", self.flat_group_steps >= FLAT_STEPS, message)

    def _length(self, lengths: Sequence[int], scores: Sequence[float | None]) -> None:
        """Over the replies of the step, and of those before it where they are few."""
        pairs = [(float(n), float(s)) for n, s in zip(lengths, scores, strict=True) if s is not None]
        self.replies = (self.replies + pairs)[-max(LENGTH_REPLIES, len(pairs)) :]
        if len(self.replies) < LENGTH_REPLIES:
            return
        share = r_squared(self.replies)
        message = (
            f"the length of a reply explains {share:.0%} of the variance of its reward (R² over {len(self.replies)} "
            "replies): the policy learns a length; see length_penalty and docs/overoptimisation.md"
        )
        self._set("length", share > LENGTH_R2, message)

    def _set(self, alarm: str, on: bool, message: str) -> None:
        if on and alarm not in self.on:
            self.report("alarm", message, alarm=alarm, step=self.step)
        (self.on.add if on else self.on.discard)(alarm)

    def state(self) -> dict[str, Any]:
        kept = {name: value for name, value in vars(self).items() if name != "report"}
        return kept | {"on": sorted(self.on), "replies": [list(pair) for pair in self.replies]}

    def load_state(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"on": set(state["on"]), "replies": [tuple(pair) for pair in state["replies"]]})


def doubt_of(records: Mapping[str, HeldOut | None]) -> str:
    """A sentence about the reward models that know nothing, by their names; "" where there is none that is known."""
    doubts = [f"the reward model {name} {r.doubt()}" for name, r in records.items() if r is not None and r.doubt()]
    return f"{', and '.join(doubts)}; the policy learns its mistakes: train a better one first" if doubts else ""


def _flat(values: Sequence[float]) -> bool:
    return max(values) - min(values) <= SAME * max(1.0, *map(abs, values))


def r_squared(pairs: Sequence[tuple[float, float]]) -> float:
    """Share of the variance of the second numbers that a line in the first explains; 0 where either is constant."""
    x, y = torch.tensor(pairs, dtype=torch.float64).T
    x, y = x - x.mean(), y - y.mean()
    spread = float((x * x).sum() * (y * y).sum())
    return float((x * y).sum()) ** 2 / spread if spread > 0 else 0.0
