"""The curves of each stage: which metrics stand in which figure, and how to read them."""

from __future__ import annotations

from fastrlhf.report.figures import Panel, Series, bars, curves, path_plot
from fastrlhf.report.folder import TITLES, StageRun, best_of_n, is_histogram
from fastrlhf.report.page import figure, missing

OTHERS_SHOWN = 24


def stage_section(stage: StageRun) -> str:
    draw = {"ppo": _ppo_figures, "sft": _sft_figures, "reward": _rm_figures}[stage.name]
    figures = "".join(draw(stage))
    others = _other_figures(stage)
    title = f"<h2>{TITLES[stage.name]}</h2>"
    return f'<section id="stage-{stage.name}">{title}<div class="figures">{figures}</div>{others}</section>'


def _chart(stage: StageRun, figure_id: str, title: str, hint: str, *panels: tuple[str, str, str]) -> str:
    """One figure. panels: (unit, metric while training, metric on held-out data or ""); empty panels are left out."""
    drawn, legend = [], {}
    for unit, train, held_out in panels:
        found = [
            Series(label, points, held)
            for label, name, held in (("training", train, False), ("held out", held_out, True))
            if name and (points := stage.points(name))
        ]
        legend |= {series.label: series.held_out for series in found}
        drawn += [Panel(unit, found)] if found else []
    if not drawn:
        names = " or ".join(name for _, *both in panels for name in both if name)
        return missing(figure_id, title, f"no step recorded {names}.")
    svg = curves(figure_id, title, drawn, f"{'PPO' if stage.name == 'ppo' else 'training'} step")
    return figure(figure_id, title, svg, hint, list(legend.items()))


def _ppo_figures(stage: StageRun) -> list[str]:
    required = [
        _chart(stage, "fig-reward", "Reward", "Should rise, on held-out prompts too.",
               ("mean score", "reward/mean", "reward/eval")),
        _chart(stage, "fig-kl", "KL to the reference", "0 at first; grows as the policy moves. Never far below 0.",
               ("nats per response", "kl/ref", "")),
        _reward_against_kl(stage),
        _chart(stage, "fig-length", "Response length", "Growth without need means the reward likes length.",
               ("tokens", "length/mean", "length/eval")),
        _chart(stage, "fig-loss", "Losses", "Noisy by nature; look for jumps. The value loss should settle.",
               ("policy loss", "policy/loss", ""), ("value loss", "value/loss", "")),
    ]  # fmt: skip
    optional = [
        ("policy/entropy", "fig-entropy", "Policy entropy", "Towards 0: the policy says one thing only.",
         "nats per token"),
        ("policy/clip_frac", "fig-clip", "Clipped tokens", "Above 0.3 for long: the steps are too large.",
         "share of tokens"),
        ("kl/approx", "fig-kl-update", "KL of the updates", "How far a step moves the policy it sampled from.",
         "nats per token"),
        ("value/explained_var", "fig-explained-var", "Critic: explained variance", "1 is perfect; below 0 is no help.",
         "share of variance"),
    ]  # fmt: skip
    more = _win_rates(stage) + [
        _chart(stage, figure_id, title, hint, (unit, name, ""))
        for name, figure_id, title, hint, unit in optional
        if stage.points(name)
    ]
    if stage.points("distinct2/eval"):
        hint = "Reward up, distinct-2 down without end: the policy repeats what the reward model likes."
        more.insert(0, _chart(stage, "fig-diversity", "Reward and diversity", hint,
                              ("mean score, held out", "", "reward/eval"),
                              ("distinct-2, held out", "", "distinct2/eval")))  # fmt: skip
    return required + more


def _reward_against_kl(stage: StageRun) -> str:
    figure_id, title = "fig-reward-kl", "Reward against KL"
    reward, kl = dict(stage.points("reward/mean")), dict(stage.points("kl/ref"))
    both = [(kl[step], reward[step]) for step in sorted(kl.keys() & reward.keys())]
    if not both:
        return missing(figure_id, title, "no step recorded both reward/mean and kl/ref.")
    best = best_of_n(stage)
    svg = path_plot(figure_id, title, both, "KL to the reference (nats per response)", "mean score", best)
    hint = "What each nat of drift buys. Bending down: the reward model is being exploited."
    legend = [("PPO", False), ("best of 1, 2, 4, ... samples of the reference, held-out prompts", True)]
    return figure(figure_id, title, svg, hint, legend if best else ())


def _win_rates(stage: StageRun) -> list[str]:
    panels = [
        (f"share of prompts, by the {judge}", "", name)
        for judge, name in (("reward", "win_rate/reward"), ("judge", "win_rate/judge"))
        if stage.points(name)
    ]
    title, hint = "Win rate against the SFT model", "On held-out prompts; 0.5 is the SFT model itself, a tie is half."
    return [_chart(stage, "fig-win-rate", title, hint, *panels)] if panels else []


def _sft_figures(stage: StageRun) -> list[str]:
    figures = [
        _chart(stage, "fig-sft-loss", "Loss", "Held out rising while training falls: too many epochs.",
               ("nats per token", "loss/train", "loss/eval")),
    ]  # fmt: skip
    if stage.points("perplexity/eval"):
        figures.append(
            _chart(stage, "fig-sft-perplexity", "Perplexity", "exp of the held-out loss.",
                   ("perplexity", "", "perplexity/eval")))  # fmt: skip
    return figures


def _rm_figures(stage: StageRun) -> list[str]:
    figures = [
        _chart(stage, "fig-rm-accuracy", "Pair accuracy", "Share of pairs ranked as people did; 0.5 is a coin.",
               ("share of pairs", "accuracy/train", "accuracy/eval")),
        _chart(stage, "fig-rm-loss", "Loss", "Held out rising while training falls: overfitting.",
               ("nats per record", "loss/train", "loss/eval")),
    ]  # fmt: skip
    histogram = next((e["histogram"] for e in reversed(stage.events) if is_histogram(e.get("histogram"))), None)
    if histogram:
        title = "Margins on held-out pairs"
        svg = bars("fig-rm-margins", title, list(histogram.items()), "score of the better minus the worse", "pairs")
        figures.append(figure("fig-rm-margins", title, svg, "Left of 0: pairs ranked the wrong way round."))
    return figures


def _other_figures(stage: StageRun) -> str:
    names = [name for name in stage.metric_names() if name not in stage.used]
    curved = [(name, points) for name in names if (points := stage.points(name))]
    if not curved:
        return ""
    drawn = [
        _chart(stage, f"fig-{stage.name}-other-{i}", name, "", ("", name, ""))
        for i, (name, _) in enumerate(curved[:OTHERS_SHOWN])
    ]
    rest = f"<p>{len(curved) - len(drawn)} more are in metrics.jsonl.</p>" if len(curved) > len(drawn) else ""
    return (
        f"<details><summary>Every other metric ({len(drawn)})</summary>"
        f'<div class="figures small">{"".join(drawn)}</div>{rest}</details>'
    )
