"""Preference strength, and what is done about the weakest preferences (Wang et al. 2024, Secrets of RLHF in Large
Language Models Part II: Reward Modeling, section 2).

The strength of a preference is the mean over an ensemble of r(better) - r(worse). Where it is far below 0 the ensemble
is sure that the label is the wrong way round; near 0 it does not know. The weakest can be flipped, smoothed or left
out, and the strength of the others can be the margin that a pair has to keep. How often the weakest are wrong depends
on how good the ensemble is: `python -m bench.denoise` measures it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from fastrlhf.config.errors import UserError
from fastrlhf.config.stages import RewardConfig
from fastrlhf.data.encode import Record
from fastrlhf.data.feedback import Feedback


def measured(feedback: Feedback, scores: Tensor) -> Feedback:
    """The judgement with its strength and the deviation of that over the members; as it is where it orders no replies.

    scores [K, M]: of its responses by M >= 2 members. A judgement of several pairs has the mean of their differences.
    """
    pairs = feedback.ordered_pairs()
    if not pairs:
        return feedback
    better, worse = map(list, zip(*pairs))
    members = (scores[better] - scores[worse]).double().mean(0)
    return replace(feedback, strength=float(members.mean()), strength_sd=float(members.std()))


def turned(feedback: Feedback) -> Feedback:
    """The opposite judgement: the ranking from its end, the highest score for the reply that had the lowest; its
    strength is the other way round too. A margin that was given for the label goes."""
    strength = None if feedback.strength is None else -feedback.strength
    if feedback.scores is None:
        return replace(feedback, ranking=feedback.ranking[::-1], margin=None, strength=strength)
    levels = sorted(feedback.scores)
    places = sorted(range(len(levels)), key=lambda i: (-feedback.scores[i], -i))
    mirrored = dict(zip(places, levels))
    # Equal scores stay equal: all replies of a level get the mean of what the level is turned into.
    scores = []
    for score in feedback.scores:
        alike = [mirrored[i] for i, other in enumerate(feedback.scores) if other == score]
        scores.append(math.fsum(alike) / len(alike))
    return replace(feedback, scores=tuple(scores), strength=strength)


def denoised(records: Sequence[Record], config: RewardConfig) -> tuple[list[Record], str | None]:
    """What is learnt from: label smoothing, the weakest records turned, smoothed or left out, strengths as margins ->
    records in their order, and a line of what was done; None: nothing is said of strengths.

    UserError where strengths are asked for and no record has one.
    """
    known = sorted((r.feedback.strength, i) for i, r in enumerate(records) if r.feedback.strength is not None)
    if not known and (config.weakest != "keep" or config.strength_margin):
        option = "strength_margin = true" if config.weakest == "keep" else f"weakest = {config.weakest}"
        raise UserError(
            f"{option}: no row of data has a strength; write them with fastrlhf reward-eval ENSEMBLE DATA --strength "
            "FILE, and give that file as data"
        )
    if not known and not config.label_smoothing:
        return list(records), None
    weakest: set[int] = set()
    if config.weakest != "keep":
        weakest = {i for _, i in known[: math.ceil(config.weakest_share * len(known))]}
    left = [(i, record) for i, record in enumerate(records) if config.weakest != "drop" or i not in weakest]
    if not left:
        raise UserError(
            f"weakest = drop: weakest_share = {config.weakest_share:g} leaves none of {len(records)} records; lower it"
        )
    result = [_treated(record, i in weakest, config) for i, record in left]
    return result, _note(known, len(weakest), len(records), config) if known else None


def _treated(record: Record, weak: bool, config: RewardConfig) -> Record:
    feedback = turned(record.feedback) if weak and config.weakest == "flip" else record.feedback
    strength = feedback.strength or 0.0
    if config.strength_margin and strength > 0 and feedback.margin is None and feedback.scores is None:
        feedback = replace(feedback, margin=strength)
    smooth = config.label_smoothing if weak or config.weakest != "smooth" else 0.0
    return replace(record, feedback=feedback, smoothing=smooth)


def _note(known: Sequence[tuple[float, int]], weak: int, records: int, config: RewardConfig) -> str:
    below = sum(strength < 0 for strength, _ in known)
    text = f"strengths of {len(known)} of {records} records, {below} of them below 0"
    if weak:
        smoothed = f"smoothed by {config.label_smoothing:g}"
        done = {"flip": "turned round", "smooth": smoothed, "drop": "left out"}[config.weakest]
        text += f"; the {weak} weakest, up to {known[weak - 1][0]:.3g}, are {done}"
    elif config.weakest == "keep" and not config.strength_margin:
        text += "; weakest and strength_margin, which would use them, are off"
    return text + ("; margins are strengths above 0" if config.strength_margin else "")


def row_of(feedback: Feedback, score_range: tuple[float, float]) -> dict[str, Any]:
    """The judgement as a row that reward training reads as the same one, its strength in front."""
    low, high = score_range
    row = {
        "strength": feedback.strength,
        "strength_sd": feedback.strength_sd,
        "prompt": feedback.prompt,
        "annotator": feedback.annotator,
        "source": feedback.source,
        "margin": feedback.margin,
    }
    if feedback.kind in ("pair", "edit"):
        names = ("chosen", "rejected") if feedback.kind == "pair" else ("edited", "response")
        row |= {name: feedback.responses[i] for name, (i,) in zip(names, feedback.ranking)}  # which may be turned
    elif feedback.scores is not None:
        exact = (low + (score + 1) / 2 * (high - low) for score in feedback.scores)
        scores = [min(max(round(score, 9), low), high) for score in exact]
        row |= {"responses": list(feedback.responses), "scores": scores}
    else:
        row |= {"responses": list(feedback.responses), "ranking": [list(group) for group in feedback.ranking]}
    return {name: value for name, value in row.items() if value is not None}


def summary(records: Sequence[Feedback]) -> str:
    """What the strengths of these records say, in a line."""
    known = [feedback for feedback in records if feedback.strength is not None]
    below = sum(feedback.strength < 0 for feedback in known)
    unsure = sum(abs(feedback.strength) < (feedback.strength_sd or 0.0) for feedback in known)
    return (
        f"strengths of {len(known)} of {len(records)} judgements: {below} below 0, where the ensemble disagrees, "
        f"{unsure} nearer to 0 than their deviation"
    )


def weakest_first(records: Sequence[Feedback]) -> list[Feedback]:
    """By strength, so that a reader meets the doubtful labels first; those without one last."""
    return sorted(records, key=lambda f: math.inf if f.strength is None else f.strength)
