"""The work of `fastrlhf reward-eval`: a reward model's scores of rows that people judged -> how far to believe it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

import torch

from fastrlhf import inference
from fastrlhf._version import __version__
from fastrlhf.agreement.figures import figures
from fastrlhf.agreement.pairs import can_tell
from fastrlhf.agreement.words import lines
from fastrlhf.config.errors import UserError
from fastrlhf.data.dataset import load_feedback
from fastrlhf.data.feedback import Feedback
from fastrlhf.models.loading import is_scalar_model, load_reward_model
from fastrlhf.models.reward_folder import Heads, heads_of
from fastrlhf.preflight.fits import check_ids, positions_of
from fastrlhf.reward.strength import measured, row_of, summary, weakest_first
from fastrlhf.rl.scorers import encode_pairs, score_rows
from fastrlhf.runtime.memory import token_budget

Say = Callable[[str], None]  # prints one line for people


def main(
    model: str,
    data: str,
    *,
    train: str | None,
    output: str | None,
    strength: str | None,
    overwrite: bool,
    score_range: tuple[float, float],
    reading: Mapping[str, Any],
    raw: bool,
    seed: int,
    say: Say,
    tell: Say,
) -> int:
    """Score, measure, print, and write `output` -> exit code.

    strength: a file for the rows with their strengths by an ensemble, weakest first. train: rows that the bag of words
    learns from. reading: how rows are read. say: prints a line of the result, tell: one of the progress. UserError,
    before the weights are loaded, for a folder that is no reward model (or, with strength, no ensemble) and for rows
    that cannot be read or tell nothing.
    """
    if not is_scalar_model(model):
        raise UserError(f"FOLDER: {model!r} is no reward model (one score a text); train one with fastrlhf reward")
    if output is not None:
        inference.check_output(output, overwrite, "--json")
    heads = None if strength is None else _heads(model, strength, overwrite)
    records = read(data, score_range, reading, tell)
    training = None if train is None else read(train, score_range, reading, tell)
    if not can_tell(records):
        raise UserError(f"DATA: {data}: no row orders two replies, and all {len(records)} rows give the same score")
    report = {"fastrlhf": __version__, "model": model, "data": data, "train": train, "seed": seed}
    scores = scores_of(model, records, raw=raw, tell=tell, heads=heads)
    if strength is not None:
        found = [measured(record, torch.tensor(several)) for record, several in zip(records, scores, strict=True)]
        inference.write_rows(strength, [row_of(f, score_range) for f in weakest_first(found)], "--strength")
        tell(f"{summary(found)}; written to {strength}, weakest first")
        scores = [[fmean(heads) for heads in several] for several in scores]
    report |= figures(records, scores, training=training, seed=seed)
    for line in lines(report):
        say(line)
    if output is not None:
        inference.write_file(output, json.dumps(report, ensure_ascii=False, indent=1) + "\n", "--json")
    return 0


def read(source: str, score_range: tuple[float, float], reading: Mapping[str, Any], tell: Say) -> list[Feedback]:
    """The judgements of a source, as reward training reads them; what became of its rows is told."""
    records, counts = load_feedback(source, score_range=score_range, **reading)
    tell(f"{source}: {counts.line()}")
    return records


def _heads(model: str, strength: str, overwrite: bool) -> Heads:
    """The heads whose differences are strengths. UserError for a model of one head, and a file that is there."""
    inference.check_output(strength, overwrite, "--strength")
    heads = heads_of(model)
    if heads is None:
        raise UserError(
            f"--strength: {model!r} has one head, and a strength is a mean over an ensemble; train it with ensemble=5"
        )
    return heads


def scores_of(
    model: str, records: list[Feedback], *, raw: bool, tell: Say, heads: Heads | None = None
) -> list[list[Any]]:
    """The raw scores of each record's responses, encoded as reward training encodes them; with heads a list of theirs
    for each response. UserError for what the model cannot read, and for a score that is not finite."""
    tokenizer = inference.reading_tokenizer(model, raw)
    both = [(record.prompt, text) for record in records for text in record.responses]
    rows = encode_pairs(tokenizer, [prompt for prompt, _ in both], [text for _, text in both])
    loaded = load_reward_model(model)
    check_ids(loaded, max(map(max, rows)))
    _check_positions(positions_of(loaded), records, [len(row) for row in rows])
    tell(f"the reward model scores {len(rows)} replies")
    head = None if heads is None else heads.beside(loaded.score)
    scores = score_rows(loaded.eval(), rows, token_budget(None, loaded.device), head)
    if not scores.isfinite().all():
        owners = [record.where for record in records for _ in record.responses]
        first = owners[int((~scores.isfinite()).nonzero()[0, 0])]
        raise UserError(f"FOLDER: {model!r} gives {first} a score that is not finite; its weights are of no use")
    found = iter(scores.tolist())
    return [[next(found) for _ in record.responses] for record in records]


def _check_positions(positions: int | None, records: list[Feedback], lengths: list[int]) -> None:
    """UserError for the first reply that the model cannot read whole."""
    owners = (record for record in records for _ in record.responses)
    for record, length in zip(owners, lengths, strict=True):
        if positions is not None and length > positions:
            raise UserError(
                f"{record.where}: prompt and reply have {length} tokens and the model has {positions} positions; leave "
                "the row out"
            )
