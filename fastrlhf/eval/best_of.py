"""The work of `fastrlhf generate --best-of N`: of N replies to a prompt, the one that a reward scores highest.

It needs no training, so it is what PPO has to beat, and its winners are data for SFT (rejection sampling; Stiennon et
al. 2020, Touvron et al. 2023, section 3.2.3). log N - (N - 1) / N nats is the most that choosing costs in KL
(`fastrlhf.rl.evaluation.best_of_n_kl`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import fsum
from typing import Any, NamedTuple

from fastrlhf import inference
from fastrlhf.config.errors import UserError
from fastrlhf.config.stages import PPOConfig
from fastrlhf.data.feedback import Prompt
from fastrlhf.eval.run import Judges, Say
from fastrlhf.eval.statistics import estimate
from fastrlhf.eval.table import plus_minus
from fastrlhf.inference import MOST_SAMPLES, Reply
from fastrlhf.rl.evaluation import best_of_n_kl
from fastrlhf.rl.scorers import read_reward


class Winner(NamedTuple):
    """The reply to a prompt with the highest reward, the first of several such. mean: reward of all replies to it that
    have one; unscored: how many have none."""

    prompt: Prompt
    reply: Reply
    reward: float
    mean: float
    unscored: int


@dataclass(frozen=True)
class BestOf:
    """winners: of the prompts in their order, without those whose replies the reward could not judge. scores: of all
    replies, prompt-major, n to a prompt; None: not judged."""

    n: int
    prompts: int
    winners: list[Winner]
    scores: list[float | None]

    def lines(self, model: str) -> Iterator[str]:
        """What came of it, for people."""
        best = plus_minus(estimate([winner.reward for winner in self.winners], 1))
        mean = plus_minus(estimate(self.scores, self.n))
        kl = f"at most {best_of_n_kl(self.n):.2f} nats of KL to one sample of {model}"
        rewards = f"reward {best}, of all replies {mean} (± standard error over prompts)"
        yield f"best of {self.n} over {len(self.winners)} prompts: {rewards}; {kl}"
        without = self.prompts - len(self.winners)
        if without:
            yield f"{without} of {self.prompts} prompts left out: the reward could judge none of their replies"
        cut = sum(not winner.reply.finished for winner in self.winners)
        if cut:
            yield f"{cut} of {len(self.winners)} winners were cut off; a larger --max-new-tokens lets them end"

    def rows(self, say: Say) -> list[dict[str, Any]]:
        """A row a winner, which `fastrlhf sft` reads as this prompt and this reply: the columns of the prompt, then
        prompt, response, reward, reward_mean, best_of, unscored, finished.

        Left out, and told to `say`: columns that SFT would take for a reply, a judgement or a part of the prompt, and
        winners that it would not read as they are (an empty one). UserError where no row is left.
        """
        rows, columns, problems = [], Counter[str](), []
        for winner in self.winners:
            marks = {
                "reward": winner.reward,
                "reward_mean": winner.mean,
                "best_of": self.n,
                "unscored": winner.unscored,
                "finished": winner.reply.finished,
            }
            row, problem = inference.row_for_sft(winner.prompt, winner.reply.text, **marks)
            if problem is not None:
                problems.append(problem)
                continue
            columns.update(winner.prompt.columns.keys() - row.keys())
            rows.append(row)
        if not rows:
            raise UserError(f"--output: none of the {len(self.winners)} winners can be read by SFT: {problems[0]}")
        if columns:
            say(inference.columns_left_out(columns))
        if problems:
            say(f"{len(problems)} of {len(self.winners)} winners left out, the first because of {problems[0]}")
        return rows


def check(n: int | None, reward: object, samples: int | None, temperature: float, top_k: int) -> None:
    """UserError for options of `generate` that cannot be together; None: not given."""
    if n is None:
        raise UserError("--reward: it chooses among several replies to a prompt; give --best-of N too")
    if n < 2:
        raise UserError(f"--best-of: {n}; expected at least 2 replies, among which the reward chooses")
    if n > MOST_SAMPLES:
        raise UserError(f"--best-of: {n} replies to a prompt; at most {MOST_SAMPLES}")
    if samples is not None:
        raise UserError(f"--samples: --best-of {n} says how many replies are sampled; leave --samples out")
    if reward is None:
        raise UserError(f"--best-of: {n} replies need a judge; give --reward FOLDER or FILE.py:FUNCTION too")
    if temperature == 0 or top_k == 1:
        option = "--temperature: 0" if temperature == 0 else "--top-k: 1"
        raise UserError(f"{option} makes all replies to a prompt the same; --best-of {n} needs a larger one")


def best_of(
    model: str, prompts: Sequence[Prompt], *, n: int, reward: object, say: Say, raw: bool, **sampling: Any
) -> BestOf:
    """Sample n replies to each prompt, score all of them as PPO would, keep the best; ties: the first.

    reward: what `read_reward` reads. sampling: options of `inference.sample`. UserError, before any weights are loaded,
    for all that can be known then (see `evaluate` of run.py); after the scoring where no reply has a score.
    """
    columns = {name for prompt in prompts for name in prompt.columns}
    parts = read_reward(reward, PPOConfig(), {"the prompts": columns})
    inference.check_sampling(model, prompts, n=n, raw=raw, **sampling)
    replies = inference.sample_all(model, prompts, say, n=n, raw=raw, **sampling)
    say(f"the reward scores {len(prompts) * n} replies")
    scores = Judges(parts, say, raw=raw).scores(model, prompts, replies)
    found = [
        choose(prompt, group, scores[i * n : (i + 1) * n])
        for i, (prompt, group) in enumerate(zip(prompts, replies, strict=True))
    ]
    winners = [winner for winner in found if winner is not None]
    if not winners:
        raise UserError(f"reward: None for all {len(scores)} replies; what it cannot judge it cannot choose among")
    return BestOf(n, len(prompts), winners, scores)


def choose(prompt: Prompt, replies: Sequence[Reply], scores: Sequence[float | None]) -> Winner | None:
    """The first of the replies with the highest score; None where none has a score."""
    known = [(score, reply) for score, reply in zip(scores, replies, strict=True) if score is not None]
    if not known:
        return None
    score, reply = max(known, key=lambda pair: pair[0])  # the first of several
    return Winner(prompt, reply, score, fsum(score for score, _ in known) / len(known), len(scores) - len(known))
