"""The top of the report: one sentence that says what the run changed, and the figures behind it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from fastrlhf.report.folder import TITLES, StageRun, ends, is_number, peak_gib, phase_seconds
from fastrlhf.report.page import figure_of
from fastrlhf.runtime.console import duration

DIVERSITY_KEPT = 0.6  # of distinct-2 before training; the quickstart's bar too


class Tile(NamedTuple):
    """One figure of merit: its name, its value or the values before and after, and what to know about it."""

    name: str
    values: tuple[str, ...]
    note: str = ""
    bad: bool = False


def head(run_dir: Path, stages: list[StageRun], verdict: dict[str, Any]) -> dict[str, Any]:
    """The values of the page's header. stages: what came out first."""
    last = stages[0]
    seed = verdict.get("seed", last.config.get("seed"))
    facts = [str(run_dir), "" if seed is None else f"seed {seed}", str(last.run.get("device", ""))]
    return {
        "facts": "  ·  ".join(filter(None, facts)),
        "states": [_state(stage, f"{stage.name}: " if len(stages) > 1 else "") for stage in reversed(stages)],
        "sentence": _alarms(stages) + (_quickstart_sentence(verdict) if verdict else _sentence(last)),
        "tiles": _quickstart_tiles(verdict) if verdict else _tiles(last),
        "is_quickstart": bool(verdict),
        "links": {f"stage-{stage.name}": TITLES[stage.name] for stage in stages},
    }


def _state(stage: StageRun, prefix: str) -> tuple[str, str]:
    """(words, kind of badge) for how far a stage came."""
    if stage.finished is None:
        return f"{prefix}{stage.last_step} steps", ""
    if stage.finished:
        return f"{prefix}finished", "good"
    return f"{prefix}incomplete, step {stage.last_step} of {stage.total_steps}", "warn"


def _alarms(stages: list[StageRun]) -> str:
    """The alarms of a run, each as it was last told: they come before anything that a run may claim; "" without any."""
    told: dict[tuple[str, str], str] = {}
    for stage in reversed(stages):
        prefix = f"{stage.name}, " if len(stages) > 1 else ""
        for event in stage.events:
            if event.get("kind") == "alarm":
                where = f"{prefix}step {event.get('step', '?')}"
                told[stage.name, str(event.get("alarm"))] = f"{event.get('message')} ({where})"
    return f"Alarm{'s' if len(told) > 1 else ''}: {'; '.join(told.values())}. " if told else ""


def _sentence(stage: StageRun) -> str:
    steps = f"{stage.last_step} {'PPO ' if stage.name == 'ppo' else ''}step{'s' if stage.last_step != 1 else ''}"
    tell = {"ppo": _ppo_sentence, "sft": _sft_sentence}.get(stage.name, _rm_sentence)
    text = tell(stage, steps)
    if stage.finished is False:
        return f"Not finished (step {stage.last_step} of {stage.total_steps}): {text[:1].lower()}{text[1:]}"
    return text


def _change(before: float, after: float) -> str:
    size = max(abs(before), abs(after), 1e-12)
    if abs(after - before) < 0.005 * size:
        return "stayed at"
    return "rose from" if after > before else "fell from"


def _from_to(what: str, before: float, after: float) -> str:
    change = _change(before, after)
    start = "" if change == "stayed at" else f"{figure_of(before)} to "
    return f"{what} {change} {start}{figure_of(after)}"


def _ppo_sentence(stage: StageRun, steps: str) -> str:
    held_out, train = stage.points("reward/eval"), stage.points("reward/mean")
    if not held_out and not train:
        return f"No reward was recorded in {steps}."
    what, points = ("Held-out reward", held_out) if len(held_out) > 1 else ("Reward", train or held_out)
    before, after, _ = ends(points)
    text = f"{_from_to(what, before, after)} in {steps}"
    kl, length = stage.points("kl/ref"), stage.points("length/mean")
    if kl:
        text += f", {figure_of(ends(kl)[1])} nats of KL from the reference policy"
    if length:
        text += f"; {_from_to('response length', *ends(length)[:2])} tokens"
    return f"{text}.{_over_optimised(stage)}"


def _over_optimised(stage: StageRun) -> str:
    """Goodhart's law at work: held-out reward rose while the replies became each other's copies; else ""."""
    reward, diversity = stage.points("reward/eval"), stage.points("distinct2/eval")
    if len(reward) < 2 or len(diversity) < 2:
        return ""
    (low, high, _), (before, after, _) = ends(reward), ends(diversity)
    if _change(low, high) != "rose from" or after >= DIVERSITY_KEPT * before:
        return ""
    return (
        " Over-optimisation: the reward rose while distinct-2 of the held-out replies fell from "
        f"{figure_of(before)} to {figure_of(after)}."
    )


def _sft_sentence(stage: StageRun, steps: str) -> str:
    train, perplexity = stage.points("loss/train"), stage.points("perplexity/eval")
    text = f"{_from_to('Training loss', *ends(train)[:2])} nats per token" if train else "No loss was recorded"
    held_out = f"; held-out perplexity is {figure_of(perplexity[-1][1])}" if perplexity else ""
    return f"{text} in {steps}{held_out}."


def _rm_sentence(stage: StageRun, steps: str) -> str:
    held_out, train = stage.points("accuracy/eval"), stage.points("accuracy/train")
    if held_out:
        return f"The reward model ranks {held_out[-1][1]:.1%} of held-out pairs as people did, after {steps}."
    if train:
        return f"The reward model ranks {ends(train)[1]:.1%} of training pairs as people did, after {steps}."
    return _sft_sentence(stage, steps)


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


def _tiles(stage: StageRun) -> list[Tile]:
    tiles = []
    for name, title, unit in TILES[stage.name]:
        points = stage.points(name)
        if len(points) > 1:
            before, after, k = ends(points)
            note = f"first {k} → last {k} of {len(points)}" if k > 1 else "first → last"
            values = (figure_of(before), figure_of(after))
        elif points:
            note, values = f"at step {points[0][0]}", (figure_of(points[0][1]),)
        else:
            continue
        bad = name == "distinct2/eval" and bool(_over_optimised(stage))
        tiles.append(Tile(title, values, f"{unit}, {note}" if unit else note, bad))
    peak = peak_gib(stage)
    note = f"{stage.last_step} steps" + (f", peak {peak:.2f} GiB" if peak else "")
    return [*tiles, Tile("Time", (duration(sum(phase_seconds(stage).values())),), note)]


def _quickstart_sentence(verdict: dict[str, Any]) -> str:
    passed = "Passed" if verdict.get("passed") else "Not passed"
    sft, ppo = verdict.get("rate_sft"), verdict.get("rate_ppo")
    if not is_number(sft) or not is_number(ppo):
        return f"{passed}: the verdict names no rates."
    return f"{passed}: {ppo:.0%} of replies to held-out prompts keep the hidden rule after PPO, {sft:.0%} after SFT."


def _quickstart_tiles(verdict: dict[str, Any]) -> list[Tile]:
    """The bars and aims of the quickstart, each with what was measured; verdict.json alone decides about `passed`.

    An aim of an earlier stage that was not reached is no failed bar: its tile is not marked as bad.
    """

    def get(name: str) -> float:
        return verdict[name] if is_number(verdict.get(name)) else math.nan

    faults = verdict.get("rm_pair_accuracy_by_fault")
    worst = min(filter(is_number, faults.values()), default=math.nan) if isinstance(faults, dict) else math.nan
    weakest = "" if math.isnan(worst) else f"; its worst kind of fault {_percent(worst)}, aim 85%"
    diversity = get("distinct2_ppo") / (get("distinct2_sft") or math.nan)
    length = get("length_ppo") / (get("length_sft") or math.nan)
    high = math.inf
    measured = [
        ("Rule holds after PPO", get("rate_ppo"), 0.88, high, _percent, " of held-out replies"),
        ("Rule holds after SFT", get("rate_sft"), 0.0, 0.65, _percent, ", so that PPO has work to do"),
        ("Rule with prompts shuffled", get("rate_ppo_shuffled"), 0.0, 0.1, _percent, ": it depends on the prompt"),
        ("Reward-model accuracy", get("rm_pair_accuracy"), 0.85, high, _percent, f" of clean pairs{weakest}"),
        ("KL per response", get("kl_sequence_mean"), -high, 10.0, figure_of, " nats from the SFT model"),
        ("Distinct-2, PPO / SFT", diversity, DIVERSITY_KEPT, high, figure_of, ": replies stay varied"),
        ("Length, PPO / SFT", length, 1 / 1.3, 1.3, figure_of, ", and not below its inverse"),
    ]
    tiles = []
    for name, value, low, high, show, note in measured:
        met = low <= value <= high  # never for NaN: a bar that was not measured is missed
        shown = f"{'n/a' if math.isnan(value) else show(value)} {'✓' if met else '✗'}"
        word, bar = ("at least", low) if math.isinf(high) else ("at most", high)
        limit = f"{bar:g}" if show is figure_of else show(bar)
        tiles.append(Tile(name, (shown,), f"bar: {word} {limit}{note}", not met))
    topic = get("on_topic_sft")
    shown = "n/a" if math.isnan(topic) else f"{_percent(topic)}{' ✓' * (topic >= 0.95)}"
    tiles.append(Tile("SFT replies on topic", (shown,), "aim: at least 95% of held-out replies"))
    seconds = get("seconds")
    return tiles if math.isnan(seconds) else [*tiles, Tile("Time", (duration(seconds),), "the whole pipeline")]


def _percent(share: float) -> str:
    return f"{share:.1%}".replace(".0%", "%")
