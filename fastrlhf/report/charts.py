"""The curves of each stage: which metrics stand in which figure, and how to read them."""

from __future__ import annotations

from typing import Any, NamedTuple

from fastrlhf.config.language import Words
from fastrlhf.report.figures import Panel, Series, bars, curves, path_plot
from fastrlhf.report.folder import StageRun, best_of_n, is_histogram

OTHERS_SHOWN = 24


class Chart(NamedTuple):
    """One figure. panels: (unit, metric while training or "", metric on held-out data or ""), above each other.

    only_with: the figure is left out unless one of these metrics was recorded; without any it is required, and a gap
    is shown where no step recorded its metrics.
    """

    id: str
    title: str
    panels: tuple[tuple[str, str, str], ...] = ()
    only_with: tuple[str, ...] = ()


def _optional(figure_id: str, title: str, unit: str, metric: str, held_out: str = "") -> Chart:
    return Chart(figure_id, title, ((unit, metric, held_out),), (metric or held_out,))


_LOSSES = (("policy loss", "policy/loss", ""), ("value loss", "value/loss", ""))
_DIVERSITY = (("mean score, held out", "", "reward/eval"), ("distinct-2, held out", "", "distinct2/eval"))
_WIN_RATES = tuple((f"share of prompts, by the {judge}", "", f"win_rate/{judge}") for judge in ("reward", "judge"))
CHARTS = {
    "ppo": (
        Chart("fig-reward", "Reward", (("mean score", "reward/mean", "reward/eval"),)),
        Chart("fig-kl", "KL to the reference", (("nats per response", "kl/ref", ""),)),
        Chart("fig-reward-kl", "Reward against KL"),
        Chart("fig-length", "Response length", (("tokens", "length/mean", "length/eval"),)),
        Chart("fig-loss", "Losses", _LOSSES),
        Chart("fig-diversity", "Reward and diversity", _DIVERSITY, ("distinct2/eval",)),
        Chart("fig-win-rate", "Win rate against the SFT model", _WIN_RATES, tuple(name for *_, name in _WIN_RATES)),
        _optional("fig-entropy", "Policy entropy", "nats per token", "policy/entropy"),
        _optional("fig-clip", "Clipped tokens", "share of tokens", "policy/clip_frac"),
        _optional("fig-kl-update", "KL of the updates", "nats per token", "kl/approx"),
        _optional("fig-explained-var", "Critic: explained variance", "share of variance", "value/explained_var"),
    ),
    "sft": (
        Chart("fig-sft-loss", "Loss", (("nats per token", "loss/train", "loss/eval"),)),
        _optional("fig-sft-perplexity", "Perplexity", "perplexity", "", "perplexity/eval"),
    ),
    "reward": (
        Chart("fig-rm-accuracy", "Pair accuracy", (("share of pairs", "accuracy/train", "accuracy/eval"),)),
        Chart("fig-rm-loss", "Loss", (("nats per record", "loss/train", "loss/eval"),)),
        Chart("fig-rm-margins", "Margins on held-out pairs"),
    ),
}
HINTS = {
    "fig-reward": "Should rise, on held-out prompts too.",
    "fig-kl": "0 at first; grows as the policy moves. Never far below 0.",
    "fig-reward-kl": "What each nat of drift buys. Bending down: the reward model is being exploited.",
    "fig-length": "Growth without need means the reward likes length.",
    "fig-loss": "Noisy by nature; look for jumps. The value loss should settle.",
    "fig-diversity": "Reward up, distinct-2 down without end: the policy repeats what the reward model likes.",
    "fig-win-rate": "On held-out prompts; 0.5 is the SFT model itself, a tie is half.",
    "fig-entropy": "Towards 0: the policy says one thing only.",
    "fig-clip": "Above 0.3 for long: the steps are too large.",
    "fig-kl-update": "How far a step moves the policy it sampled from.",
    "fig-explained-var": "1 is perfect; below 0 is no help.",
    "fig-sft-loss": "Held out rising while training falls: too many epochs.",
    "fig-sft-perplexity": "exp of the held-out loss.",
    "fig-rm-accuracy": "Share of pairs ranked as people did; 0.5 is a coin.",
    "fig-rm-loss": "Held out rising while training falls: overfitting.",
    "fig-rm-margins": "Left of 0: pairs ranked the wrong way round.",
}


def figures(stage: StageRun, words: Words) -> list[dict[str, Any]]:
    """The stage's figures in order, each as report.html shows it: a plot, or why there is none."""
    charts = [c for c in CHARTS[stage.name] if not c.only_with or any(stage.points(name) for name in c.only_with)]
    special = {"fig-reward-kl": _reward_against_kl, "fig-rm-margins": _margins}
    drawn = [special.get(chart.id, _curves)(stage, chart, words) for chart in charts]
    return [figure for figure in drawn if figure]


def other_figures(stage: StageRun, words: Words) -> tuple[list[dict[str, Any]], int]:
    """Small figures of the metrics that `figures` did not use, and how many more there are."""
    names = [name for name in stage.metric_names() if name not in stage.used and stage.points(name)]
    shown = enumerate(names[:OTHERS_SHOWN])
    charts = [Chart(f"fig-{stage.name}-other-{i}", name, (("", name, ""),)) for i, name in shown]
    return [_curves(stage, chart, words) for chart in charts], len(names) - len(charts)


def _figure(chart: Chart, words: Words, **shown: Any) -> dict[str, Any]:
    """The values of a figure. shown: plot and legend (label -> whether held out), or missing (why there is no plot)."""
    hint = words(HINTS[chart.id]) if chart.id in HINTS else ""
    values = {"id": chart.id, "title": words.known(chart.title), "hint": hint, "missing": "", "legend": {}}
    return values | shown


def _curves(stage: StageRun, chart: Chart, words: Words) -> dict[str, Any]:
    """Curves against steps; panels that no step recorded are left out."""
    panels = []
    for unit, train, held_out in chart.panels:
        named = ((words("training"), train, False), (words("held out"), held_out, True))
        series = [Series(label, points, held) for label, name, held in named if (points := stage.points(name))]
        panels += [Panel(words(unit) if unit else "", series)] if series else []
    if not panels:
        names = words(" or ").join(name for _, *both in chart.panels for name in both if name)
        return _figure(chart, words, missing=words("no step recorded {names}.", names=names))
    steps = words("PPO step") if stage.name == "ppo" else words("training step")
    plot = curves(chart.id, words.known(chart.title), panels, steps)
    legend = {series.label: series.held_out for panel in panels for series in panel.series}
    return _figure(chart, words, plot=plot, legend=legend)


def _reward_against_kl(stage: StageRun, chart: Chart, words: Words) -> dict[str, Any]:
    reward, kl = dict(stage.points("reward/mean")), dict(stage.points("kl/ref"))
    both = [(kl[step], reward[step]) for step in sorted(kl.keys() & reward.keys())]
    if not both:
        return _figure(chart, words, missing=words("no step recorded both reward/mean and kl/ref."))
    best = best_of_n(stage)
    axes = words("KL to the reference (nats per response)"), words("mean score")
    plot = path_plot(chart.id, words(chart.title), both, *axes, best, (words("start"), words("end")))
    legend = {"PPO": False, words("best of 1, 2, 4, ... samples of the reference, held-out prompts"): True}
    return _figure(chart, words, plot=plot, legend=legend if best else {})


def _margins(stage: StageRun, chart: Chart, words: Words) -> dict[str, Any] | None:
    """The newest histogram of margins; None when there is none."""
    histogram = next((e["histogram"] for e in reversed(stage.events) if is_histogram(e.get("histogram"))), None)
    if not histogram:
        return None
    counts = [(_bin(name, words), name.startswith("-"), count) for name, count in histogram.items()]
    plot = bars(chart.id, words(chart.title), counts, words("score of the better minus the worse"), words("pairs"))
    return _figure(chart, words, plot=plot)


def _bin(name: str, words: Words) -> str:
    """ "-inf..-1" as "< −1", "0..1" as "0 to 1"."""
    low, _, high = name.replace("-inf", "").replace("-", "\u2212").partition("..")
    if not low:
        return f"< {high}"
    return f"≥ {low}" if high in ("inf", "") else words("{low} to {high}", low=low, high=high)
