"""The top of the report: one sentence that says what the run changed, and the figures behind it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fastrlhf.report.folder import TITLES, StageRun, ends, peak_gib, phase_seconds
from fastrlhf.report.page import badge, esc, figure_of, tile
from fastrlhf.runtime.console import duration

DIVERSITY_KEPT = 0.6  # of distinct-2 before training; the quickstart's bar too


def head(run_dir: Path, stages: list[StageRun], verdict: dict[str, Any]) -> str:
    last = stages[0]
    sentence = _quickstart_sentence(verdict) if verdict else _sentence(last)
    tiles = _quickstart_tiles(verdict) if verdict else _tiles(last)
    css = "tiles bars" if verdict else "tiles"
    states = "".join(_state(stage, named=len(stages) > 1) for stage in reversed(stages))
    links = [("samples", "Samples"), *((f"stage-{s.name}", TITLES[s.name]) for s in stages)]
    links += [("time", "Time and memory"), ("config", "Configuration"), ("events", "Events"), ("environment", "Rerun")]
    nav = "".join(f'<a href="#{anchor}">{esc(name)}</a>' for anchor, name in links)
    seed = verdict.get("seed", last.config.get("seed"))
    facts = [str(run_dir), f"seed {seed}" if seed is not None else "", str(last.run.get("device", ""))]
    return (
        f'<header><div class="eyebrow"><span>{esc("  ·  ".join(filter(None, facts)))}</span>{states}</div>'
        f'<h1 id="verdict">{esc(sentence)}</h1><div class="{css}">{"".join(tiles)}</div><nav>{nav}</nav></header>'
    )


def _state(stage: StageRun, *, named: bool) -> str:
    name = f"{stage.name}: " if named else ""
    of = f"step {stage.last_step} of {stage.total_steps}"
    if stage.finished is None:
        return badge(f"{name}{stage.last_step} steps")
    return badge(f"{name}finished", "good") if stage.finished else badge(f"{name}incomplete, {of}", "warn")


def _sentence(stage: StageRun) -> str:
    steps = f"{stage.last_step} {'PPO ' if stage.name == 'ppo' else ''}step{'s' if stage.last_step != 1 else ''}"
    tell = {"ppo": _ppo_sentence, "sft": _sft_sentence}.get(stage.name, _rm_sentence)
    said = tell(stage, steps)
    if stage.finished is False:
        return f"Not finished (step {stage.last_step} of {stage.total_steps}): {said[:1].lower()}{said[1:]}"
    return said


def _change(before: float, after: float) -> str:
    size = max(abs(before), abs(after), 1e-12)
    return "stayed at" if abs(after - before) < 0.005 * size else "rose from" if after > before else "fell from"


def _from_to(what: str, before: float, after: float) -> str:
    change = _change(before, after)
    return (
        f"{what} {change} {figure_of(after) if change == 'stayed at' else f'{figure_of(before)} to {figure_of(after)}'}"
    )


def _ppo_sentence(stage: StageRun, steps: str) -> str:
    held, train = stage.points("reward/eval"), stage.points("reward/mean")
    if not held and not train:
        return f"No reward was recorded in {steps}."
    what, points = ("Held-out reward", held) if len(held) > 1 else ("Reward", train or held)
    before, after, _ = ends(points)
    said = f"{_from_to(what, before, after)} in {steps}"
    kl, length = stage.points("kl/ref"), stage.points("length/mean")
    if kl:
        said += f", {figure_of(ends(kl)[1])} nats of KL from the reference policy"
    if length:
        said += f"; {_from_to('response length', *ends(length)[:2])} tokens"
    return f"{said}.{_over_optimised(stage)}"


def _over_optimised(stage: StageRun) -> str:
    """What Goodhart's law looks like: held-out reward rose while the replies became each other's copies; else ""."""
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
    said = f"{_from_to('Training loss', *ends(train)[:2])} nats per token" if train else "No loss was recorded"
    held = f"; held-out perplexity is {figure_of(perplexity[-1][1])}" if perplexity else ""
    return f"{said} in {steps}{held}."


def _rm_sentence(stage: StageRun, steps: str) -> str:
    held, train = stage.points("accuracy/eval"), stage.points("accuracy/train")
    if held:
        return f"The reward model ranks {held[-1][1]:.1%} of held-out pairs as people did, after {steps}."
    if train:
        return f"The reward model ranks {ends(train)[1]:.1%} of training pairs as people did, after {steps}."
    return _sft_sentence(stage, steps)


def _tiles(stage: StageRun) -> list[str]:
    specs = {
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
    }[stage.name]
    tiles = []
    for name, title, unit in specs:
        points = stage.points(name)
        if len(points) > 1:
            before, after, k = ends(points)
            how = f"first {k} → last {k} of {len(points)}" if k > 1 else "first → last"
            bad = name == "distinct2/eval" and bool(_over_optimised(stage))
            changed = f"{figure_of(before)} → {figure_of(after)}"
            tiles.append(tile(title, changed, f"{unit}, {how}".lstrip(", "), bad=bad))
        elif points:
            tiles.append(tile(title, figure_of(points[0][1]), f"{unit}, at step {points[0][0]}".lstrip(", ")))
    seconds, peak = sum(phase_seconds(stage).values()), peak_gib(stage)
    note = f"{stage.last_step} steps" + (f", peak {peak:.2f} GiB" if peak else "")
    return [*tiles, tile("Time", duration(seconds), note)]


def _quickstart_sentence(verdict: dict[str, Any]) -> str:
    passed = "Passed" if verdict.get("passed") else "Not passed"
    sft, ppo = verdict.get("rate_sft"), verdict.get("rate_ppo")
    if not isinstance(sft, (int, float)) or not isinstance(ppo, (int, float)):
        return f"{passed}: the verdict names no rates."
    return f"{passed}: {ppo:.0%} of replies to held-out prompts keep the hidden rule after PPO, {sft:.0%} after SFT."


def _quickstart_tiles(verdict: dict[str, Any]) -> list[str]:
    """The bars of the quickstart, each with what was measured; verdict.json alone decides about `passed`."""
    get = {name: value for name, value in verdict.items() if isinstance(value, (int, float))}.get
    faults = verdict.get("rm_pair_accuracy_by_fault")
    worst = min(faults.values()) if isinstance(faults, dict) and faults else get("rm_pair_accuracy")

    def ratio(a: str, b: str) -> float | None:
        above, below = get(a), get(b)
        return above / below if above is not None and below else None

    high, diversity, length = math.inf, ratio("distinct2_ppo", "distinct2_sft"), ratio("length_ppo", "length_sft")
    measured = [
        ("Rule holds after PPO", get("rate_ppo"), 0.88, high, _percent, " of held-out replies"),
        ("Rule holds after SFT", get("rate_sft"), 0.0, 0.65, _percent, ", so that PPO has work to do"),
        ("Rule with prompts shuffled", get("rate_ppo_shuffled"), 0.0, 0.1, _percent, ": it depends on the prompt"),
        ("SFT replies on topic", get("on_topic_sft"), 0.95, high, _percent, " of held-out replies"),
        ("Reward-model accuracy", worst, 0.85, high, _percent, ", for every kind of fault"),
        ("KL per response", get("kl_sequence_mean"), -high, 10.0, figure_of, " nats from the SFT model"),
        ("Distinct-2, PPO / SFT", diversity, DIVERSITY_KEPT, high, figure_of, ": replies stay varied"),
        ("Length, PPO / SFT", length, 1 / 1.3, 1.3, figure_of, ", and not below its inverse"),
    ]
    tiles = []
    for name, value, low, high, show, note in measured:
        met = value is not None and low <= value <= high
        shown = f"{'n/a' if value is None else show(value)} {'✓' if met else '✗'}"
        word, bar = ("at least", low) if math.isinf(high) else ("at most", high)
        limit = f"{bar:g}" if show is figure_of else show(bar)
        tiles.append(tile(name, shown, f"bar: {word} {limit}{note}", bad=not met))
    seconds = get("seconds")
    return [*tiles, *([tile("Time", duration(seconds), "the whole pipeline")] if seconds is not None else [])]


def _percent(share: float) -> str:
    return f"{share:.1%}".replace(".0%", "%")
