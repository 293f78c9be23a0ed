"""bench.ppo_step without TRL: how rounds become ratios, ratios meet bars, and bars become an exit code."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from bench import ppo_step

ROOT = Path(__file__).parents[2]


def report(seconds: float, peak: float, imports: float = 100.0) -> dict:
    """What a process prints: `seconds` split 1 : 2 : 3 over the phases."""
    phases = {name: seconds * share / 6 for name, share in zip(ppo_step.PHASES, (1, 2, 3), strict=True)}
    return {
        "seconds": seconds,
        "peak_mib": peak,
        "imports_mib": imports,
        "phases": phases,
        "versions": {},
        "device": "cpu",
    }


def sequence(sides: dict[str, list[tuple[float, float]]]):
    """A side's reports one after the other, and the order in which the sides were asked."""
    asked: list[str] = []

    def run(side: str) -> dict:
        asked.append(side)
        return report(*sides[side][asked.count(side) - 1])

    return run, asked


def test_a_ratio_is_of_one_round_and_the_median_of_the_rounds_counts():
    """The machine gets slower from round to round: medians of each side alone would compare different rounds."""
    run, asked = sequence({
        "trl": [(10.0, 1100), (40.0, 1100), (30.0, 1300)],
        "separate": [(5.0, 600), (16.0, 600), (30.0, 600)],
    })  # fmt: skip
    shown: list[str] = []
    found = ppo_step.rounds(["trl", "separate"], 3, run, shown.append)
    assert asked == ["trl", "separate", "separate", "trl", "trl", "separate"]
    assert [json.loads(line)["side"] for line in shown] == asked
    row = ppo_step.ratios(found, "separate")
    assert row["speeds"] == [2.0, 2.5, 1.0] and row["speed"] == 2.0
    assert row["phases"] == pytest.approx(dict.fromkeys(ppo_step.PHASES, 2.0))
    assert row["memory"] == pytest.approx(600 / 1100) and row["memory_above_imports"] == pytest.approx(500 / 1000)


@pytest.mark.parametrize(
    ("speed", "memory", "bar", "misses"),
    [
        (1.4, 0.8, (1.4, 0.8), 0),
        (1.39, 0.81, (1.4, 0.8), 2),
        (1.39, 0.81, (None, 0.8), 1),
        (0.1, 9.0, (None, None), 0),
        (math.nan, math.nan, (1.0, 1.0), 2),
    ],
)
def test_a_bar_is_met_or_missed(speed, memory, bar, misses):
    assert len(ppo_step.missed({"form": "separate", "speed": speed, "memory": memory}, bar)) == misses


@pytest.mark.parametrize(("ours", "memory", "code"), [(10.0, 800.0, 0), (20.0, 800.0, 1), (10.0, 1000.0, 1)])
def test_the_exit_code_and_the_file(tmp_path, capsys, ours, memory, code):
    file = tmp_path / "figures.json"
    options = ppo_step.parse(["--model", "tiny", "--forms", "separate", "--repetitions", "2", "--json", str(file)])
    run, _ = sequence({"trl": [(20.0, 1100.0)] * 2, "separate": [(ours, memory)] * 2})
    assert ppo_step.compare(options, {"model": "tiny"}, run) == code
    figures = json.loads(file.read_text())
    assert figures["ratios"][0]["speed"] == 20.0 / ours and len(figures["rounds"]) == 2
    assert bool(figures["missed"]) == ("MISSED" in capsys.readouterr().out) == bool(code)


def test_every_bar_is_of_a_form_that_runs():
    for model, bars in ppo_step.BARS.items():
        assert model in ppo_step.MODELS and set(bars) <= set(ppo_step.parse(["--model", model]).forms)


def test_a_side_that_fails_is_not_a_figure(tmp_path):
    options = ppo_step.parse([])
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho it broke >&2\nexit 7\n")
    python.chmod(0o755)
    run = ppo_step.child({"ours": python, "trl": python}, {"device": options.device})
    with pytest.raises(ppo_step.ChildFailed, match="exit code 7\nit broke"):
        run("separate")


def test_a_peer_that_cannot_be_installed_is_exit_code_3(capsys):
    """pip refuses the requirement before it looks anywhere."""
    try:
        assert ppo_step.main(["--model", "tiny"], ("test-broken", "no such==requirement")) == 3
        assert "cannot install no such==requirement" in capsys.readouterr().err
    finally:
        shutil.rmtree(ROOT / "bench" / ".venvs" / "test-broken", ignore_errors=True)
