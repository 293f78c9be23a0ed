"""The values of the report's tables: samples, time and memory, configuration, events, environment."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from statistics import median_high
from typing import Any, NamedTuple

from fastrlhf.checkpoint.records import read_records
from fastrlhf.config.errors import UserError
from fastrlhf.config.inputs import INPUTS
from fastrlhf.config.language import Words
from fastrlhf.config.stages import CONFIGS
from fastrlhf.report.folder import StageRun, is_histogram, is_number, phase_seconds
from fastrlhf.report.page import figure_of

SAMPLES_SHOWN = 8
HELDOUT_SHOWN = 12
EVENTS_SHOWN = 100
PROBLEMS_SHOWN = 20
CONFIG_BYTES = 100_000
VALUE_CHARS = 300
PHASES = {"score": "scoring"}  # of a step, where the name of the metric says too little
FROM_PYTHON = "# {stage} was started from Python with objects for {names}: build the same trainer there"
MACHINE = {
    "mem/peak_gib": "GPU memory, peak (GiB)",
    "mem/host_peak_gib": "Process memory, peak (GiB)",
    "perf/rollout_tokens": "Tokens of a step (median)",
    "perf/tokens": "Tokens of a step (median)",
    "perf/rollout_idle": "Share of sampling in which ranks waited (median)",
    "perf/rollout_tokens_per_s": "Tokens per second while sampling (median)",
    "perf/tokens_per_s": "Tokens per second (median)",
}


def heldout(run_dir: Path, problems: list[str]) -> tuple[list[tuple[str, str, str]], int]:
    """(prompt, reply after SFT, reply after PPO) at even distances through heldout.jsonl, and how many there are."""
    rows = list(read_records(run_dir / "heldout.jsonl", problems, {"prompt": str, "response_ppo": str}))
    shown = rows[:: max(1, len(rows) // HELDOUT_SHOWN)][:HELDOUT_SHOWN]
    return [(row["prompt"], row.get("response_sft", ""), row["response_ppo"]) for row in shown], len(rows)


def samples(stage: StageRun, words: Words) -> list[dict[str, Any]]:
    """The first and the last recorded response to each prompt, prompts answered at least twice first."""
    seen: dict[str, list[dict[str, Any]]] = {}
    for row in stage.samples:
        if "prompt" in row and "response" in row:
            seen.setdefault(str(row["prompt"]), [row, row])[1] = row
    in_order = sorted(seen.items(), key=lambda item: item[1][0] is item[1][1])
    rows = []
    for prompt, (first, last) in in_order[:SAMPLES_SHOWN]:
        after = None if last is first else _sample(last, words, first)
        rows.append({"prompt": prompt, "before": _sample(first, words), "after": after})
    return rows


def _sample(row: dict[str, Any], words: Words, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """A response with its step and score; against `before`, good or bad."""
    score, was = row.get("score"), before.get("score") if before else None
    kind = ""
    if is_number(score) and is_number(was) and score != was:
        kind = "good" if score > was else "bad"
    shown = words("score {score}", score=figure_of(score)) if is_number(score) else words("no score")
    return {"step": row.get("step", "?"), "response": row["response"], "score": shown, "kind": kind}


def time(stage: StageRun, words: Words) -> dict[str, Any]:
    """Seconds by phase, the longest first, and figures of the machine."""
    spent = phase_seconds(stage)
    steps = max(1, len({row.get("step") for row in stage.timings} - {0, None}))
    phases = [
        (words.known(PHASES.get(name, name)), spent[name]) for name in sorted(spent, key=lambda name: -spent[name])
    ]
    return {"phases": phases, "total": sum(spent.values()), "steps": steps, "machine": _machine(stage, words)}


def _machine(stage: StageRun, words: Words) -> list[tuple[str, str]]:
    values = {name: measured for name, measured in sorted(stage.timed.items()) if not name.startswith("time/")}
    figures = {name: max(v) if name.startswith("mem/") else median_high(v) for name, v in values.items()}
    rows = [(words.known(MACHINE.get(name, name)), figure_of(value)) for name, value in figures.items()]
    return rows or [(words("nothing was recorded"), "")]


def config(stage: StageRun) -> dict[str, Any]:
    """The inputs, the fields that differ from their defaults, and the text of config.yaml."""
    given, fields, path = stage.config, CONFIGS[stage.name].model_fields, stage.dir / "config.yaml"
    usual = _defaults(stage)
    pairs = {name: (given[name], usual[name]) for name in fields if name in given}
    changed = [
        (name, _value(value), _value(default)) for name, (value, default) in pairs.items() if not _same(value, default)
    ]
    inputs = [(name, _value(given[name])) for name in INPUTS[stage.name] if name in given]
    text = path.read_bytes()[:CONFIG_BYTES].decode("utf-8", "replace") if path.is_file() else ""
    return {"inputs": inputs, "changed": changed, "text": text}


def _defaults(stage: StageRun) -> dict[str, Any]:
    """The defaults of a stage's fields; where one depends on other fields (auto), what they make of it."""
    fields = CONFIGS[stage.name].model_fields
    usual = {name: field.default for name, field in fields.items()}
    auto = [name for name, field in fields.items() if field.default is None and field.validate_default]
    try:
        config = CONFIGS[stage.name](**{n: v for n, v in stage.config.items() if n in fields and n not in auto})
    except (UserError, TypeError):  # written by hand, or by another version
        return usual
    return usual | {name: getattr(config, name) for name in auto}


def _same(value: Any, default: Any) -> bool:
    if isinstance(default, tuple):
        return list(default) == value
    return value == default or (default is None and value in ("auto", "none"))


def _value(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (list, dict, tuple)) else str(value)
    return text[:VALUE_CHARS]


class Note(NamedTuple):
    """One row of the table of events. kind: the word on its badge, of this colour."""

    where: str
    kind: str
    message: str
    colour: str = "warn"


def events(stage: StageRun, words: Words, *, named: bool) -> list[Note]:
    """All that a person should have been told: alarms, skipped updates, values that were not finite, damaged files."""
    notes, prefix = [], f"{stage.name}, " if named else ""
    for name, steps in stage.nonfinite().items():
        shown = ", ".join(map(str, steps[:10])) + (", …" if len(steps) > 10 else "")
        message = words("{name} at step {steps}", name=name, steps=shown)
        notes.append(Note(prefix + words("metrics"), words("not finite"), message, "bad"))
    notes += damage(stage.problems, words, prefix)
    said = [event for event in stage.events if not is_histogram(event.get("histogram"))]
    for event in said[:EVENTS_SHOWN]:
        where = prefix + words("step {step}", step=event.get("step", "?"))
        notes.append(Note(where, str(event.get("kind", "event"))[:40], str(event.get("message", ""))))
    if len(said) > EVENTS_SHOWN:
        notes.append(Note(prefix, "", words("{n} more in events.jsonl", n=len(said) - EVENTS_SHOWN)))
    return notes


def damage(problems: list[str], words: Words, prefix: str = "") -> list[Note]:
    """What could not be read and was left out, as a kill or a full disk leaves it behind."""
    where, kind = prefix + words("files"), words("damaged")
    notes = [Note(where, kind, problem) for problem in problems[:PROBLEMS_SHOWN]]
    rest = len(problems) - len(notes)
    return [*notes, Note(where, kind, words("{n} more lines or files", n=rest))] if rest else notes


def facts(run: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The entries of run.json, nested ones by their dotted names."""
    rows: list[tuple[str, str]] = []
    for name, item in run.items():
        rows += facts(item, f"{prefix}{name}.") if isinstance(item, dict) else [(f"{prefix}{name}", _value(item))]
    return [(name, value) for name, value in rows if name != "inputs"]


def commands(run_dir: Path, stages: list[StageRun], run: dict[str, Any], words: Words) -> str:
    """The command that resumes what has not ended, and the commands that do it all again."""
    if run.get("verb") == "quickstart":
        again = f"fastrlhf quickstart seed={run.get('seed', 0)} output_dir=NEW_FOLDER"
        done = (run_dir / "verdict.json").is_file()
        return again if done else f"fastrlhf resume {shlex.quote(str(run_dir))}\n{again}"
    lines = []
    for stage in reversed(stages):
        objects = stage.run.get("from_python")
        if objects:
            names = ", ".join(map(str, objects)) if isinstance(objects, list) else str(objects)
            lines.append(words(FROM_PYTHON, stage=stage.name, names=names))
            continue
        if not stage.finished and (stage.dir / "checkpoints").is_dir():
            lines.append(f"fastrlhf resume {shlex.quote(str(stage.dir))}")
        recipe = shlex.quote(str(stage.dir / "config.yaml"))
        lines.append(f"fastrlhf {stage.name} {recipe} output_dir=NEW_FOLDER resume=false overwrite=false")
    return "\n".join(lines)
