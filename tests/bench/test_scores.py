"""bench.scores: what its kinds of data share, its differences, and the shipped result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import scores
from fastrlhf.data.feedback import parse_feedback

SHIPPED = json.loads((Path(__file__).parents[2] / "bench/results/scores_cpu.json").read_text(encoding="utf-8"))


def row(form: str, kind: str, accuracy: float) -> dict:
    return {"form": form, "data": kind, "seed": 0, "accuracy": accuracy}


def test_all_kinds_of_a_seed_are_the_same_judgements():
    kinds = {kind: scores.judged(kind, 3) for kind in scores.KINDS}
    parsed = {kind: [parse_feedback(r, "here") for r in rows] for kind, rows in kinds.items()}
    assert {len(rows) for rows in parsed.values()} == {scores.RECORDS}
    for pair, one, both, mixed in zip(*parsed.values(), strict=True):
        assert pair.prompt == one.prompt == both.prompt == mixed.prompt
        assert set(pair.responses) == set(both.responses) and one.responses[0] == both.responses[0]
        assert one.scores[0] == both.scores[0] and both.ordered_pairs() in (
            [],
            [tuple(map(both.responses.index, pair.responses))],
        )
    assert [f.kind for f in parsed["mixed"][:4]] == ["pair", "score", "pair", "score"]
    assert {r["score"] for r in kinds["scores"]} == {1, 2, 3, 4, 5} and len(
        {r["annotator"] for r in kinds["pairs"]}
    ) == 6
    assert kinds["pairs"] != scores.judged("pairs", 4)


def test_differences_are_of_means_over_seeds():
    rows = [row("link", "pairs", a) for a in (0.7, 0.8)] + [row("link", "scores", a) for a in (0.72, 0.74)]
    rows += [row("link", "mixed", 0.76), row("raw", "pairs", 0.1)]
    assert scores.differences(rows, "link") == pytest.approx({"scores": -0.02, "mixed": 0.01})
    assert scores.passed(rows) and not scores.passed([*rows, row("link", "mixed", 0.7)])
    assert not scores.passed([*rows, row("link", "scores", 0.5)])


def test_the_shipped_result_is_whole_and_prints(capsys, tmp_path):
    runs = SHIPPED["runs"]
    seeds = sorted({r["seed"] for r in runs})
    assert len(runs) == len(seeds) * len(scores.RUNS) and SHIPPED["records"] == scores.RECORDS
    (tmp_path / "x.json").write_text(json.dumps(SHIPPED))
    assert scores.main(["--print", str(tmp_path / "x.json")]) == 0
    assert "link: mixed less its best part" in capsys.readouterr().out
