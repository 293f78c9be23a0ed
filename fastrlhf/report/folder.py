"""A run folder as the report reads it: whatever is there, nothing assumed to be finished, damage named."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from fastrlhf.checkpoint.records import parse, read_records
from fastrlhf.config.errors import UserError
from fastrlhf.config.recipe import read_recipe

TITLES = {"sft": "Supervised fine-tuning", "reward": "Reward model", "ppo": "PPO"}
STAGES = ("sft", "reward", "ppo")  # in the order of the pipeline
ROWS_READ = 50  # of the data, for their language
Points = list[tuple[float, float]]
_OWN_METRICS = (("ppo", "kl/ref"), ("ppo", "reward/mean"), ("reward", "accuracy/train"), ("reward", "accuracy/eval"))


@dataclass
class StageRun:
    """The files of one stage; absent ones are empty. problems: FILE:LINE and reason of what could not be read."""

    dir: Path
    name: str
    metrics: list[dict[str, Any]]
    timings: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    events: list[dict[str, Any]]
    run: dict[str, Any]
    config: dict[str, Any]
    problems: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    @cached_property
    def last_step(self) -> int:
        return max((row["step"] for row in self.metrics), default=0)

    @property
    def total_steps(self) -> int | None:
        """Planned steps; None when nothing in the folder says so (an SFT run counted in epochs)."""
        known = [source.get("total_steps") for source in (self.run, self.config)]
        return next((steps for steps in known if isinstance(steps, int)), None)

    @property
    def finished(self) -> bool | None:
        """None: cannot be told."""
        if any(event.get("kind") == "kl_budget" for event in self.events):  # which ends a run before its last step
            return True
        if self.total_steps is not None:
            return self.last_step >= self.total_steps
        return True if (self.dir / "final").is_dir() else None

    def points(self, name: str) -> Points:
        """(step, value) of a metric, in order of the steps, without the values that were not finite."""
        self.used.add(name)
        values = {row["step"]: row[name] for row in self.metrics if is_number(row.get(name))}
        return sorted(values.items())

    def metric_names(self) -> list[str]:
        return sorted({name for row in self.metrics for name in row} - {"step", "nonfinite"})

    @cached_property
    def timed(self) -> dict[str, list[float]]:
        """All that timings.jsonl recorded of each figure, in its order."""
        values: dict[str, list[float]] = {}
        for row in self.timings:
            for name in row.keys() - {"step", "nonfinite"}:
                if is_number(row[name]):
                    values.setdefault(name, []).append(row[name])
        return values

    def nonfinite(self) -> dict[str, list[int]]:
        """Steps at which a metric was not finite, by metric."""
        bad: dict[str, list[int]] = {}
        for row in self.metrics:
            for name, value in row.items():
                if value is None:
                    bad.setdefault(name, []).append(row["step"])
        return bad


def load(run_dir: Path) -> list[StageRun]:
    """The stages of a run folder: itself, or its subfolders sft/, reward/, ppo/ (quickstart), in pipeline order.

    UserError when the folder does not exist or no stage in it recorded a step.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such folder; name the output_dir of a run")
    folders = [run_dir] if (run_dir / "metrics.jsonl").is_file() else [run_dir / name for name in STAGES]
    stages = [_load_stage(folder) for folder in folders if (folder / "metrics.jsonl").is_file()]
    stages = [stage for stage in stages if stage.metrics]
    if not stages:
        raise UserError(
            f"{run_dir}: holds no metrics to report; expected metrics.jsonl with at least one step, in this folder or "
            "in sft/, reward/ or ppo/ below it"
        )
    return stages


def prompts(stages: Sequence[StageRun]) -> list[str]:
    """The texts by which the page's language is chosen: prompts that the run recorded, else the first rows of its data,
    where those are lines of JSON that still lie where they lay."""
    recorded = [str(row["prompt"]) for stage in stages for row in stage.samples if "prompt" in row]
    return recorded or [text for stage in stages for text in _data_texts(stage.config.get("data"))]


def _data_texts(data: Any) -> list[str]:
    if not isinstance(data, str) or not data.endswith(".jsonl"):
        return []
    return [" ".join(_texts(row)) for row in islice(read_records(Path(data), []), ROWS_READ)]


def _texts(value: Any) -> list[str]:
    """All texts in a row, without the names of roles."""
    if isinstance(value, Mapping):
        return [text for name, part in value.items() if name not in ("role", "from") for text in _texts(part)]
    if isinstance(value, list):
        return [text for part in value for text in _texts(part)]
    return [value] if isinstance(value, str) else []


def _load_stage(folder: Path) -> StageRun:
    problems: list[str] = []
    by_step = [list(read_records(folder / f"{n}.jsonl", problems, {"step": int})) for n in ("metrics", "timings")]
    texts = [list(read_records(folder / f"{n}.jsonl", problems)) for n in ("samples", "events")]
    run = read_json(folder / "run.json", problems)
    name = run["verb"] if run.get("verb") in STAGES else _stage_name(folder, by_step[0])
    return StageRun(folder, name, *by_step, *texts, run, _config(folder / "config.yaml", problems), problems)


def _stage_name(folder: Path, metrics: Sequence[dict[str, Any]]) -> str:
    if folder.name in STAGES:
        return folder.name
    names = {name for row in metrics for name in row}
    return next((stage for stage, metric in _OWN_METRICS if metric in names), "sft")


def _config(path: Path, problems: list[str]) -> dict[str, Any]:
    """The resolved recipe; {} when there is none or it was damaged by hand."""
    if not path.is_file():
        return {}
    try:
        return read_recipe(path)[0]
    except UserError as error:
        problems.append(str(error))
        return {}


def read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    """A JSON object from a file; {} when it is absent, or damaged, which `problems` then says."""
    value = parse(path.read_bytes()) if path.is_file() else {}
    if isinstance(value, str):
        problems.append(f"{path}: {value}")
        return {}
    return value


def ends(points: Points) -> tuple[float, float, int]:
    """(mean of the first k values, mean of the last k, k): a tenth of the run, at most 10 steps."""
    k = max(1, min(10, len(points) // 10))
    values = [value for _, value in points]
    return sum(values[:k]) / k, sum(values[-k:]) / k, k


def phase_seconds(stage: StageRun) -> dict[str, float]:
    """Seconds by phase over the run, steps repeated after a kill included; "other" is the rest of the steps' time."""
    spent = {name[5:]: sum(values) for name, values in sorted(stage.timed.items()) if name.startswith("time/")}
    steps = spent.pop("step", 0.0)
    spent.pop("elapsed", None)
    other = steps - sum(spent.values())
    return {**spent, "other": other} if other > 0.01 * max(steps, 1e-9) else spent


def peak_gib(stage: StageRun) -> float | None:
    """The device's peak where there is one, else the process's."""
    values = stage.timed.get("mem/peak_gib") or stage.timed.get("mem/host_peak_gib")
    return max(values) if values else None


def is_histogram(value: Any) -> bool:
    """True for counts by the name of a bin, as the held-out margins are recorded."""
    return isinstance(value, dict) and bool(value) and all(isinstance(count, int) for count in value.values())


def best_of_n(stage: StageRun) -> Points:
    """(KL in nats, mean score) of the best of 1, 2, 4, ... samples of the reference; [] where it was not measured."""
    curve = next((e.get("curve") for e in stage.events if e.get("kind") == "best_of_n"), None)
    rows = [row for row in curve if isinstance(row, dict)] if isinstance(curve, list) else []
    return [(row["kl"], row["reward"]) for row in rows if is_number(row.get("kl")) and is_number(row.get("reward"))]


def is_number(value: Any) -> bool:
    """True for an int or float that a float can hold and that is finite; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
