"""The evaluation itself: sample from one model or two, score, measure -> what the table, the JSON and the page show."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastrlhf import inference
from fastrlhf._version import __version__
from fastrlhf.config.errors import UserError
from fastrlhf.config.stages import PPOConfig
from fastrlhf.data.feedback import Prompt
from fastrlhf.data.templates import encode_prompt
from fastrlhf.eval.figures import Judged, figures_of, judge
from fastrlhf.eval.statistics import compare
from fastrlhf.inference import Reply
from fastrlhf.models.offload import Offload
from fastrlhf.models.token_batch import TokenRows
from fastrlhf.rl.scorers import Scorer, make_scorer, read_reward, split_rewards
from fastrlhf.rollout.result import texts_of
from fastrlhf.runtime import distributed
from fastrlhf.runtime.memory import MemoryBackoff

Say = Callable[[str], None]  # prints one line for people


@dataclass(frozen=True)
class Evaluation:
    """report: settings and figures, as the JSON has them. prompts, and the replies of each model to them, prompt-major,
    by its name; the model that is evaluated is the first."""

    report: dict[str, Any]
    prompts: list[Prompt]
    replies: dict[str, list[Judged]]

    @property
    def samples(self) -> int:
        return self.report["sampling"]["n"]

    def document(self) -> dict[str, Any]:
        """The report and every reply with what was found in it."""
        ours, *others = self.replies.values()
        rows = []
        for i, reply in enumerate(ours):
            row = {"prompt": self.prompts[i // self.samples].prompt, **_row(reply)}
            rows.append(row | {"against": _row(others[0][i])} if others else row)
        return self.report | {"replies": rows}


def _row(reply: Judged) -> dict[str, Any]:
    found = asdict(reply)
    return {"response": found.pop("text"), **found}


def evaluate(
    model: str,
    prompts: list[Prompt],
    *,
    source: str,
    against: str | None,
    reward: object,
    refusals: Sequence[re.Pattern[str]],
    keywords: dict[str, re.Pattern[str]],
    say: Say,
    **sampling: Any,
) -> Evaluation:
    """source: where the prompts come from. reward: what `read_reward` reads; None: replies have no scores, and
    `against` is refused. sampling: options of `inference.sample`.

    UserError, before any weights are loaded, for all that can be known then: a model that writes no text, a prompt that
    is too long for one of them, a reward function whose arguments no column is.
    """
    if against is not None and reward is None:
        raise UserError("--against: a win rate needs a judge; give --reward FOLDER or FILE.py:FUNCTION too")
    columns = {name for prompt in prompts for name in prompt.columns}
    parts = None if reward is None else read_reward(reward, PPOConfig(), {"the prompts": columns})
    models = {"FOLDER": model} if against is None else {"FOLDER": model, "--against": against}
    for role, folder in models.items():
        inference.check_sampling(folder, prompts, role=role, **sampling)
    names = _names(list(models.values()))
    said = {}
    for name, folder in zip(names, models.values(), strict=True):
        say(f"{name}: {len(prompts)} prompts, {sampling['n']} replies to each")
        said[name] = inference.sample_all(folder, prompts, say, **sampling)
    scores: dict[str, list[float | None]] = {}
    if parts is not None:
        judges = Judges(parts, say, raw=sampling["raw"])
        for name, folder in zip(names, models.values(), strict=True):
            say(f"{name}: the reward scores {len(prompts) * sampling['n']} replies")
            scores[name] = judges.scores(folder, prompts, said[name])
    replies = {name: judge(prompts, said[name], scores.get(name), refusals, keywords) for name in names}
    samples = sampling["n"]
    report = {
        "fastrlhf": __version__,
        "models": names,
        "prompts": source,
        "prompt_count": len(prompts),
        "sampling": sampling,
        "reward": None if reward is None else str(reward),
        "figures": {
            name: figures_of(replies[name], samples, list(keywords), scored=parts is not None) for name in names
        },
    }
    if against is not None:
        report["win_rate"] = compare(*(scores[name] for name in names), samples, sampling["seed"])
    return Evaluation(report, prompts, replies)


def _names(models: list[str]) -> list[str]:
    """The models as they were named; a model beside itself has a name of its own."""
    return [*models[:1], *(f"{name} (again)" if name == models[0] else name for name in models[1:])]


class Judges:
    """The reward, as PPO applies it: a reward model of the policy's vocabulary reads the very tokens that were sampled,
    without an end where the reply was cut; one of another vocabulary reads texts."""

    def __init__(self, reward: Any, say: Say, *, raw: bool) -> None:
        self.reward, self.raw = reward, raw
        self.config, self.device = PPOConfig(), distributed.device()
        self.memory = MemoryBackoff(self.config, self.device, lambda kind, message, **_: say(message))
        self._last: tuple[dict[str, int], Scorer] | None = None  # vocabulary it was made for

    def scores(self, model: str, prompts: Sequence[Prompt], replies: Sequence[Sequence[Reply]]) -> list[float | None]:
        """A score a reply, prompt-major; None where the reward cannot judge it."""
        tokenizer = inference.reading_tokenizer(model, self.raw)
        vocabulary = tokenizer.get_vocab()
        if self._last is None or self._last[0] != vocabulary:
            self._last = None  # its model's memory is free before another one is loaded
            scorer = make_scorer(self.reward, tokenizer, self.config, self.memory, Offload(self.device))
            self._last = vocabulary, scorer
        scorer = self._last[1]
        asked = [prompt for prompt, group in zip(prompts, replies, strict=True) for _ in group]
        flat = [reply for group in replies for reply in group]
        encoded = [encode_prompt(tokenizer, prompt.prompt) for prompt in prompts]
        ids = [row for row, group in zip(encoded, replies, strict=True) for _ in group]
        rows = TokenRows(ids, [reply.ids for reply in flat])
        rewards = scorer.judge(texts_of(asked, [reply.text for reply in flat]), rows)
        return split_rewards(rewards, rows.response_ids).values if scorer.per_token else list(rewards)
