"""The work of `fastrlhf reward RECIPE --cross-fit FILE`: the strength of each judgement by an ensemble that has not
learnt from it.

The rows are cut into folds, what answers the same prompt together. An ensemble learns all folds but one, as the recipe
says, and measures the one that is left, for each fold in turn. A model that has learnt a wrong label often agrees with
it; one that has not does so by chance alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

from fastrlhf import inference
from fastrlhf.config.errors import UserError
from fastrlhf.config.stages import RewardConfig
from fastrlhf.data.dataset import load_feedback, reading
from fastrlhf.data.feedback import Feedback
from fastrlhf.reward.strength import measured, row_of, summary, weakest_first
from fastrlhf.reward_model import RewardTrainer
from fastrlhf.rl.scorers import score_rows
from fastrlhf.runtime import distributed

Say = Callable[[str], None]


def main(
    inputs: Mapping[str, Any], config: RewardConfig, output: str, folds: int, overwrite: bool, say: Say = print
) -> int:
    """Train the ensembles and write the rows of `data` with their strengths to `output`, weakest first -> exit code.

    inputs: those of RewardTrainer. UserError, before any training, for a recipe of one head, for less than two folds or
    more than there are prompts, and for an output that is there.
    """
    if config.ensemble is None:
        raise UserError("--cross-fit: a strength is a mean over the heads of an ensemble; give ensemble=5 too")
    if folds < 2:
        raise UserError(f"--folds: {folds}; expected at least 2, one to learn from and one to measure")
    inference.check_output(output, overwrite, "--cross-fit")
    records, counts = load_feedback(inputs["data"], score_range=config.score_range, **reading(config, "data"))
    say(f"{inputs['data']}: {counts.line()}")
    found = cross_fitted(records, folds, config, say, model=inputs["model"], tokenizer=inputs.get("tokenizer"))
    if distributed.is_lead():
        rows = [row_of(feedback, config.score_range) for feedback in weakest_first(found)]
        inference.write_rows(output, rows, "--cross-fit")
        say(f"{summary(found)}; written to {output}, weakest first")
    return 0


def cross_fitted(
    records: Sequence[Feedback], folds: int, config: RewardConfig, say: Say, *, model: Any, tokenizer: Any = None
) -> list[Feedback]:
    """The judgements with strengths, fold by fold; those that are too long for the model are left out."""
    rows, found = [row_of(feedback, config.score_range) for feedback in records], []
    mine = parts(records, folds, config.seed)
    plain = {"output_dir": None, "save_every": 0, "resume": False, "overwrite": False, "accept_changed": None}
    plain |= {"eval_every": 0, "eval_fraction": 0.0, "center_rewards": False, "columns": None, "ignore_columns": None}
    plain |= {"max_samples": None, "weakest": "keep", "weakest_share": 0.2, "strength_margin": False}
    config = config.replace(**plain, label_smoothing=0.0 if config.weakest == "smooth" else config.label_smoothing)
    for fold in range(folds):
        say(f"fold {fold + 1} of {folds}")
        learnt = [row for row, part in zip(rows, mine) if part != fold]
        kept = [row for row, part in zip(rows, mine) if part == fold]
        trainer = RewardTrainer(config, model=model, tokenizer=tokenizer, data=learnt, eval_data=kept)
        trainer.train()
        found += strengths_of(trainer)
    return found


def parts(records: Sequence[Feedback], folds: int, seed: int) -> list[int]:
    """The fold of each record; folds differ by one prompt at most. UserError where there are fewer prompts."""
    prompts = list(dict.fromkeys(repr(feedback.prompt) for feedback in records))
    if len(prompts) < folds:
        raise UserError(f"--folds: {folds}, and data has {len(prompts)} prompts; use fewer folds or more data")
    Random(f"folds {seed}").shuffle(prompts)
    fold = {prompt: i % folds for i, prompt in enumerate(prompts)}
    return [fold[repr(feedback.prompt)] for feedback in records]


def strengths_of(trainer: RewardTrainer) -> list[Feedback]:
    """The held-out judgements of a trainer of an ensemble with the strengths that it gives them."""
    held_out = trainer.eval_records
    rows = [row for record in held_out for row in record.rows]
    trainer.model.eval()
    scores = trainer.memory.attempt(lambda: score_rows(trainer.model, rows, trainer.memory.tokens))
    many = scores.split([len(record.rows) for record in held_out])
    return [measured(record.feedback, s) for record, s in zip(held_out, many, strict=True)]
