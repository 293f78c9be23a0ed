"""The top of the report: one sentence that says what the run changed, and the figures behind it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fastrlhf.config.language import Words
from fastrlhf.report.folder import TITLES, StageRun, ends, is_number, peak_gib, phase_seconds
from fastrlhf.report.page import figure_of
from fastrlhf.runtime.console import duration

RATES = "{ppo} of replies to held-out prompts keep the hidden rule after PPO, {sft} after SFT."
OVER_OPTIMISED = (
    " Over-optimisation: the reward rose while distinct-2 of the held-out replies fell from {before} to {after}."
)
DIVERSITY_KEPT = 0.6  # of distinct-2 before training; the quickstart's bar too

BEFORE_AND_AFTER = (  # of verdict.json: a tile, its keys for sft and ppo, what to know
    ("Replies on topic", "on_topic_{}", "of held-out replies, either manner"),
    ("Replies considerate", "considerate_{}", "of held-out replies, whatever they say"),
    ("Rule, a topic without training prompts", "rate_{}_new_topic", "only plain text tells of it; no bar"),
)


class Tile(NamedTuple):
    """One figure of merit: its name, its value or the values before and after, and what to know about it."""

    name: str
    values: tuple[str, ...]
    note: str = ""
    bad: bool = False


def head(run_dir: Path, stages: list[StageRun], verdict: dict[str, Any], words: Words) -> dict[str, Any]:
    """The values of the page's header. stages: what came out first."""
    last = stages[0]
    seed = verdict.get("seed", last.config.get("seed"))
    facts = [str(run_dir), "" if seed is None else words("seed {seed}", seed=seed), str(last.run.get("device", ""))]
    return {
        "facts": "  ·  ".join(filter(None, facts)),
        "states": [_state(stage, words, f"{stage.name}: " if len(stages) > 1 else "") for stage in reversed(stages)],
        "sentence": _alarms(stages, words)
        + (_quickstart_sentence(verdict, words) if verdict else _sentence(last, words)),
        "tiles": _quickstart_tiles(verdict, words) if verdict else _tiles(last, words),
        "is_quickstart": bool(verdict),
        "links": {f"stage-{stage.name}": words(TITLES[stage.name]) for stage in stages},
    }


def _state(stage: StageRun, words: Words, prefix: str) -> tuple[str, str]:
    """(words, kind of badge) for how far a stage came."""
    if stage.finished is None:
        return prefix + words("{n} steps", n=stage.last_step), ""
    if stage.finished:
        return prefix + words("finished"), "good"
    progress = {"step": stage.last_step, "total": stage.total_steps}
    return prefix + words("incomplete, step {step} of {total}", **progress), "warn"


def _alarms(stages: list[StageRun], words: Words) -> str:
    """The alarms of a run, each as it was last told: they come before anything that a run may claim; "" without any."""
    told: dict[tuple[str, str], str] = {}
    for stage in reversed(stages):
        prefix = f"{stage.name}, " if len(stages) > 1 else ""
        for event in stage.events:
            if event.get("kind") == "alarm":
                where = prefix + words("step {step}", step=event.get("step", "?"))
                told[stage.name, str(event.get("alarm"))] = f"{event.get('message')} ({where})"
    if not told:
        return ""
    return (words("Alarms: {told}. ") if len(told) > 1 else words("Alarm: {told}. ")).format(
        told="; ".join(told.values())
    )


def _sentence(stage: StageRun, words: Words) -> str:
    one = stage.last_step == 1
    if stage.name == "ppo":
        steps = words("1 PPO step") if one else words("{n} PPO steps", n=stage.last_step)
    else:
        steps = words("1 step") if one else words("{n} steps", n=stage.last_step)
    tell = {"ppo": _ppo_sentence, "sft": _sft_sentence}.get(stage.name, _rm_sentence)
    text = tell(stage, steps, words)
    if stage.finished is False:
        said = text[:1].lower() + text[1:]
        return words(
            "Not finished (step {step} of {total}): {said}", step=stage.last_step, total=stage.total_steps, said=said
        )
    return text


def _change(before: float, after: float) -> str:
    size = max(abs(before), abs(after), 1e-12)
    if abs(after - before) < 0.005 * size:
        return "stayed at"
    return "rose from" if after > before else "fell from"


def _from_to(what: str, before: float, after: float, words: Words) -> str:
    tell = {
        "stayed at": words("{what} stayed at {after}"),
        "rose from": words("{what} rose from {before} to {after}"),
        "fell from": words("{what} fell from {before} to {after}"),
    }
    return tell[_change(before, after)].format(what=what, before=figure_of(before), after=figure_of(after))


def _ppo_sentence(stage: StageRun, steps: str, words: Words) -> str:
    held_out, train = stage.points("reward/eval"), stage.points("reward/mean")
    if not held_out and not train:
        return words("No reward was recorded in {steps}.", steps=steps)
    if len(held_out) > 1:
        what, points = words("Held-out reward"), held_out
    else:
        what, points = words("Reward"), train or held_out
    before, after, _ = ends(points)
    text = words("{change} in {steps}", change=_from_to(what, before, after, words), steps=steps)
    kl, length = stage.points("kl/ref"), stage.points("length/mean")
    if kl:
        text += words(", {kl} nats of KL from the reference policy", kl=figure_of(ends(kl)[1]))
    if length:
        change = _from_to(words("response length"), *ends(length)[:2], words)
        text += words("; {change} tokens", change=change)
    return text + words(".") + _over_optimised(stage, words)


def _over_optimised(stage: StageRun, words: Words) -> str:
    """Goodhart's law at work: held-out reward rose while the replies became each other's copies; else ""."""
    reward, diversity = stage.points("reward/eval"), stage.points("distinct2/eval")
    if len(reward) < 2 or len(diversity) < 2:
        return ""
    (low, high, _), (before, after, _) = ends(reward), ends(diversity)
    if _change(low, high) != "rose from" or after >= DIVERSITY_KEPT * before:
        return ""
    return words(OVER_OPTIMISED, before=figure_of(before), after=figure_of(after))


def _sft_sentence(stage: StageRun, steps: str, words: Words) -> str:
    train, perplexity = stage.points("loss/train"), stage.points("perplexity/eval")
    if train:
        change = _from_to(words("Training loss"), *ends(train)[:2], words)
        text = words("{change} nats per token in {steps}", change=change, steps=steps)
    else:
        text = words("No loss was recorded in {steps}", steps=steps)
    if perplexity:
        text += words("; held-out perplexity is {value}", value=figure_of(perplexity[-1][1]))
    return text + words(".")


def _rm_sentence(stage: StageRun, steps: str, words: Words) -> str:
    held_out, train = stage.points("accuracy/eval"), stage.points("accuracy/train")
    if held_out:
        share = f"{held_out[-1][1]:.1%}"
        return words(
            "The reward model ranks {share} of held-out pairs as people did, after {steps}.", share=share, steps=steps
        )
    if train:
        share = f"{ends(train)[1]:.1%}"
        return words(
            "The reward model ranks {share} of training pairs as people did, after {steps}.", share=share, steps=steps
        )
    return _sft_sentence(stage, steps, words)


TILES = {
    "ppo": (
        ("reward/eval", "Reward, held out", "score"),
        ("reward/mean", "Reward, training", "score"),
        ("kl/ref", "KL to the reference", "nats per response"),
        ("length/mean", "Response length", "tokens"),
        ("distinct2/eval", "Distinct-2, held out", "share of bigrams"),
    ),
    "sft": (
        ("loss/train", "Training loss", "nats per token"),
        ("loss/eval", "Held-out loss", "nats per token"),
        ("perplexity/eval", "Held-out perplexity", ""),
    ),
    "reward": (
        ("accuracy/eval", "Pair accuracy, held out", "share of pairs"),
        ("accuracy/train", "Pair accuracy, training", "share of pairs"),
        ("loss/eval", "Held-out loss", "nats per record"),
        ("correlation/eval", "Correlation with scores", "held out"),
    ),
}


def _tiles(stage: StageRun, words: Words) -> list[Tile]:
    tiles = []
    for name, title, unit in TILES[stage.name]:
        points = stage.points(name)
        if len(points) > 1:
            before, after, k = ends(points)
            note = words("first {k} → last {k} of {n}", k=k, n=len(points)) if k > 1 else words("first → last")
            values = (figure_of(before), figure_of(after))
        elif points:
            note, values = words("at step {step}", step=points[0][0]), (figure_of(points[0][1]),)
        else:
            continue
        bad = name == "distinct2/eval" and bool(_over_optimised(stage, words))
        tiles.append(Tile(words(title), values, words(", ").join(filter(None, (unit and words(unit), note))), bad))
    peak = peak_gib(stage)
    note = words("{n} steps", n=stage.last_step) + (words(", peak {gib} GiB", gib=f"{peak:.2f}") if peak else "")
    return [*tiles, Tile(words("Time"), (duration(sum(phase_seconds(stage).values())),), note)]


def _quickstart_sentence(verdict: dict[str, Any], words: Words) -> str:
    passed = words("Passed: ") if verdict.get("passed") else words("Not passed: ")
    sft, ppo = verdict.get("rate_sft"), verdict.get("rate_ppo")
    if not is_number(sft) or not is_number(ppo):
        return passed + words("the verdict names no rates.")
    return passed + words(RATES, ppo=f"{ppo:.0%}", sft=f"{sft:.0%}")


def _quickstart_tiles(verdict: dict[str, Any], words: Words) -> list[Tile]:
    """The bars and aims of the quickstart, each with what was measured; verdict.json alone decides about `passed`.

    An aim that was not reached is no failed bar: its tile is not marked as bad.
    """

    def get(name: str) -> float:
        return verdict[name] if is_number(verdict.get(name)) else math.nan

    faults = verdict.get("rm_pair_accuracy_by_fault")
    worst = min(filter(is_number, faults.values()), default=math.nan) if isinstance(faults, dict) else math.nan
    weakest = "" if math.isnan(worst) else words("; its worst kind of fault {share}, aim 85%", share=_percent(worst))
    diversity = get("distinct2_ppo") / (get("distinct2_sft") or math.nan)
    length = get("length_ppo") / (get("length_sft") or math.nan)
    gained = get("on_topic_ppo") - get("on_topic_sft")
    high = math.inf
    measured = [
        ("Rule holds after PPO", get("rate_ppo"), 0.88, high, _percent, "{bar} of held-out replies"),
        ("Rule in new wording", get("rate_ppo_new"), 0.84, high, _percent, "{bar}, aim 88%: no training prompt has it"),
        ("Replies on topic, PPO less SFT", gained, -0.03, high, _percent, "{bar}: content without manner"),
        ("Rule holds after SFT", get("rate_sft"), 0.0, 0.65, _percent, "{bar}, so that PPO has work to do"),
        ("Rule with prompts shuffled", get("rate_ppo_shuffled"), 0.0, 0.1, _percent, "{bar}: it depends on the prompt"),
        ("Reward-model accuracy", get("rm_pair_accuracy"), 0.85, high, _percent, "{bar} of clean pairs"),
        ("KL per response", get("kl_sequence_mean"), -high, 10.0, figure_of, "{bar} nats from the SFT model"),
        ("Distinct-2, PPO / SFT", diversity, DIVERSITY_KEPT, high, figure_of, "{bar}: replies stay varied"),
        ("Length, PPO / SFT", length, 1 / 1.3, 1.3, figure_of, "{bar}, and not below its inverse"),
    ]
    tiles = []
    for name, value, low, high, show, note in measured:
        met = low <= value <= high  # never for NaN: a bar that was not measured is missed
        shown = f"{'n/a' if math.isnan(value) else show(value)} {'✓' if met else '✗'}"
        word, bar = (words("bar: at least {limit}"), low) if math.isinf(high) else (words("bar: at most {limit}"), high)
        limit = word.format(limit=f"{bar:g}" if show is figure_of else show(bar))
        rest = weakest if name == "Reward-model accuracy" else ""
        tiles.append(Tile(words(name), (shown,), words(note, bar=limit) + rest, not met))
    familiar = get("rate_ppo_familiar")
    if not math.isnan(familiar):
        note = words("aim 95%: training has both frames")
        tiles.append(Tile(words("Rule in familiar wording"), (_percent(familiar),), note))
    tiles += _baseline_tiles(get, words)
    seconds = get("seconds")
    if not math.isnan(seconds):
        tiles.append(Tile(words("Time"), (duration(seconds),), words("the whole pipeline")))
    return tiles


def _baseline_tiles(get: Callable[[str], float], words: Words) -> list[Tile]:
    """What stands beside the bars; a verdict of an earlier version has none of it."""
    tiles = []
    best, kl, n = get("rate_best_of"), get("kl_best_of"), get("best_of")
    if not math.isnan(best + kl + n):
        note = words("rule holds, chosen by reward; at most {kl} nats, no PPO", kl=figure_of(kl))
        tiles.append(Tile(words("Best of {n} SFT replies", n=int(n)), (_percent(best),), note))
    for name, key, note in BEFORE_AND_AFTER:
        values = [get(key.format(stage)) for stage in ("sft", "ppo")]
        if not math.isnan(sum(values)):
            tiles.append(Tile(words(name), tuple(map(_percent, values)), words(note)))
    return tiles


def _percent(share: float) -> str:
    return f"{share:.1%}".replace(".0%", "%")
