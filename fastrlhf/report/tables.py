"""The parts of the report that are tables: samples, time and memory, configuration, events, environment."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from fastrlhf.config.inputs import INPUTS
from fastrlhf.config.stages import CONFIGS
from fastrlhf.report.folder import TITLES, StageRun, is_histogram, phase_seconds, read_json, read_rows
from fastrlhf.report.page import badge, esc, figure_of, table, text_cell

SAMPLES_SHOWN = 8
HELDOUT_SHOWN = 12
EVENTS_SHOWN = 100
MACHINE = {
    "mem/peak_gib": "GPU memory, peak (GiB)",
    "mem/host_peak_gib": "Process memory, peak (GiB)",
    "perf/rollout_tokens": "Tokens of a step (median)",
    "perf/rollout_tokens_per_s": "Tokens per second while sampling (median)",
    "perf/tokens_per_s": "Tokens per second (median)",
}


def samples(run_dir: Path, stages: list[StageRun]) -> str:
    parts = []
    heldout = [row for row in read_rows(run_dir / "heldout.jsonl") if {"prompt", "response_ppo"} <= row.keys()]
    if heldout:
        rows = [
            [text_cell(row["prompt"]), text_cell(row.get("response_sft", "")), text_cell(row["response_ppo"])]
            for row in heldout[:: max(1, len(heldout) // HELDOUT_SHOWN)][:HELDOUT_SHOWN]
        ]
        parts.append(f'<p class="hint">{len(rows)} of {len(heldout)} held-out prompts, at even distances.</p>')
        parts.append(table(["Prompt", "After SFT", "After PPO"], rows, css="samples stack"))
    for stage in stages:
        rows = _before_after(stage)
        if rows:
            title = f"<h3>{TITLES[stage.name]}: sample prompts</h3>" if heldout or len(stages) > 1 else ""
            parts += [title, table(["Prompt", "Before", "After"], rows, css="samples stack")]
    if not parts:
        parts = ["<p>No samples were recorded (samples.jsonl is absent or empty).</p>"]
    return f'<section id="samples"><h2>Samples, before and after</h2>{"".join(parts)}</section>'


def _before_after(stage: StageRun) -> list[list[str]]:
    """The first and the last recorded response to each prompt, prompts answered at least twice first."""
    seen: dict[str, list[dict[str, Any]]] = {}
    for row in stage.samples:
        if "prompt" in row and "response" in row:
            pair = seen.setdefault(str(row["prompt"]), [row, row])
            pair[1] = row
    rows = []
    in_order = sorted(seen.items(), key=lambda item: item[1][0] is item[1][1])
    for prompt, (first, last) in in_order[:SAMPLES_SHOWN]:
        after = text_cell(last["response"], _source(last, first)) if last is not first else ""
        rows.append([text_cell(prompt), text_cell(first["response"], _source(first)), after])
    return rows


def _source(row: dict[str, Any], before: dict[str, Any] | None = None) -> str:
    """Step and score of a sample; against `before`, green or red."""
    score, was = row.get("score"), before.get("score") if before else None
    said = f"<span>step {esc(row.get('step', '?'))}</span>"
    if not isinstance(score, (int, float)):
        return said + badge("no score")
    kind = "" if not isinstance(was, (int, float)) or score == was else "good" if score > was else "bad"
    sign = {"good": "▲ ", "bad": "▼ "}.get(kind, "")
    return said + badge(f"{sign}score {figure_of(score)}", kind)


# ------------------------------------------------------------------------------------------- time, config, events


def time(stages: list[StageRun]) -> str:
    parts = []
    for stage in stages:
        spent = phase_seconds(stage)
        total, steps = sum(spent.values()), max(1, len({row.get("step") for row in stage.timings} - {0, None}))
        rows = [
            [esc(name), f"{seconds:.1f}", f"{seconds / steps:.3f}", f"{seconds / total:.0%}" if total else "",
             f'<div class="bar" style="width:{100 * seconds / max(total, 1e-9):.1f}%"></div>']
            for name, seconds in sorted(spent.items(), key=lambda item: -item[1])
        ]  # fmt: skip
        rows.append([f"<strong>{esc('all')}</strong>", f"{total:.1f}", f"{total / steps:.3f}", "", ""])
        header = ["Phase", "Seconds", "Per step", "Share", ""]
        facts = table(["Memory and speed", "Value"], _machine_rows(stage), css="", numbers=[1])
        phases = table(header, rows, css="share", numbers=[1, 2, 3])
        parts.append(f"<h3>{TITLES[stage.name]}</h3>" if len(stages) > 1 else "")
        parts.append(f'<div class="columns"><div>{phases}</div><div>{facts}</div></div>')
    return f'<section id="time"><h2>Time and memory</h2>{"".join(parts)}</section>'


def _machine_rows(stage: StageRun) -> list[list[str]]:
    values: dict[str, list[float]] = {}
    for row in stage.timings:
        for name, value in row.items():
            if not name.startswith("time/") and name not in ("step", "nonfinite") and isinstance(value, (int, float)):
                values.setdefault(name, []).append(value)
    rows = []
    for name, found in sorted(values.items()):
        is_peak = name.startswith("mem/")
        value = max(found) if is_peak else sorted(found)[len(found) // 2]
        rows.append([esc(MACHINE.get(name, name)), esc(figure_of(value))])
    return rows or [["nothing was recorded", ""]]


def config(stages: list[StageRun]) -> str:
    parts = []
    for stage in stages:
        fields = CONFIGS[stage.name].model_fields
        inputs = [[esc(name), _value(stage.config[name])] for name in INPUTS[stage.name] if name in stage.config]
        changed = [
            [esc(name), _value(stage.config[name]), _value(field.default)]
            for name, field in fields.items()
            if name in stage.config and not _same(stage.config[name], field.default)
        ]
        whole = stage.dir / "config.yaml"
        text = whole.read_bytes()[:100_000].decode("utf-8", "replace") if whole.is_file() else ""
        parts.append(f"<h3>{TITLES[stage.name]}</h3>" if len(stages) > 1 else "")
        if not text:
            parts.append("<p>No config.yaml in the folder.</p>")
            continue
        left = table(["Input", "Value"], inputs, css="") if inputs else ""
        right = table(["Changed field", "Value", "Default"], changed, css="") if changed else "<p>All defaults.</p>"
        parts.append(f'<div class="columns"><div>{left}</div><div>{right}</div></div>')
        parts.append(f"<details><summary>The whole config.yaml</summary><pre>{esc(text)}</pre></details>")
    return f'<section id="config"><h2>Configuration</h2>{"".join(parts)}</section>'


def _same(value: Any, default: Any) -> bool:
    if isinstance(default, tuple):
        return list(default) == value
    return value == default or (default is None and value in ("auto", "none"))


def _value(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (list, dict, tuple)) else str(value)
    return f"<code>{esc(text[:300])}</code>"


def events(stages: list[StageRun]) -> str:
    """What a person should have been told: alarms, skipped updates, values that were not finite, damaged files."""
    rows = []
    for stage in stages:
        where = f"{stage.name}, " if len(stages) > 1 else ""
        for name, steps in stage.nonfinite().items():
            shown = ", ".join(map(str, steps[:10])) + (", …" if len(steps) > 10 else "")
            said = f"<code>{esc(name)}</code> at step {esc(shown)}"
            rows.append([esc(where + "metrics"), badge("not finite", "bad"), said])
        if stage.torn_lines:
            said = f"{stage.torn_lines} unreadable line(s) skipped, as a kill leaves behind"
            rows.append([esc(where + "files"), badge("torn", "warn"), esc(said)])
        told = [event for event in stage.events if not is_histogram(event.get("histogram"))]
        for event in told[:EVENTS_SHOWN]:
            kind, message = str(event.get("kind", "event")), event.get("message", "")
            rows.append([esc(f"{where}step {event.get('step', '?')}"), badge(kind[:40], "warn"), text_cell(message)])
        if len(told) > EVENTS_SHOWN:
            rows.append([esc(where), "", f"{len(told) - EVENTS_SHOWN} more in events.jsonl"])
    found = (
        table(["Where", "Kind", "What happened"], rows, css="stack events")
        if rows
        else "<p>None: no alarm, no skipped update.</p>"
    )
    return f'<section id="events"><h2>Events and alarms</h2>{found}</section>'


def environment(run_dir: Path, stages: list[StageRun]) -> str:
    """How to go on or do it again, and on what it ran."""
    run = read_json(run_dir / "run.json") or stages[0].run
    commands = _commands(run_dir, stages, run)
    facts = [[esc(name), _value(value)] for name, value in _flat(run) if name not in ("inputs",)]
    known = table(["run.json", ""], facts, css="") if facts else "<p>No run.json in the folder.</p>"
    return (
        f'<section id="environment"><h2>Do it again</h2><pre id="command">{esc(commands)}</pre>'
        f"<details><summary>Environment</summary>{known}</details></section>"
        f"<footer>Written by fastrlhf from the files in <code>{esc(run_dir)}</code>; "
        f"<code>fastrlhf report {esc(shlex.quote(str(run_dir)))}</code> writes it anew.</footer>"
    )


def _commands(run_dir: Path, stages: list[StageRun], run: dict[str, Any]) -> str:
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
            lines.append(
                f"# {stage.name} was started from Python with objects for {names}: build the same trainer there"
            )
            continue
        if not stage.finished and (stage.dir / "checkpoints").is_dir():
            lines.append(f"fastrlhf resume {shlex.quote(str(stage.dir))}")
        recipe = shlex.quote(str(stage.dir / "config.yaml"))
        lines.append(f"fastrlhf {stage.name} {recipe} output_dir=NEW_FOLDER resume=false overwrite=false")
    return "\n".join(lines)


def _flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, item in value.items():
        rows += _flat(item, f"{prefix}{name}.") if isinstance(item, dict) else [(f"{prefix}{name}", item)]
    return rows
