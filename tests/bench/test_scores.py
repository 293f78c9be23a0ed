"""bench.scores: what its kinds of data share, its differences, and the shipped result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import scores
from bench.quickstart_data.generate import FAULTS
from fastrlhf.data.feedback import parse_feedback

SHIPPED = json.loads((Path(__file__).parents[2] / "bench/results/scores_cpu.json").read_text(encoding="utf-8"))


def test_all_kinds_of_a_seed_are_the_same_judgements():
    kinds = {kind: scores.judged(kind, 3) for kind in scores.KINDS}
    halves, once = kinds.pop("pairs of mixed"), kinds.pop(scores.ONCE)
    parsed = {kind: [parse_feedback(r, "here") for r in rows] for kind, rows in kinds.items()}
    assert {len(rows) for rows in parsed.values()} == {scores.RECORDS}
    for pair, one, both, mixed in zip(*parsed.values(), strict=True):
        assert pair.prompt == one.prompt == both.prompt == mixed.prompt
        assert set(pair.responses) == set(both.responses) and one.responses[0] == both.responses[0]
        order = [tuple(map(both.responses.index, pair.responses))]
        assert one.scores[0] == both.scores[0] and both.ordered_pairs() in ([], order)
    assert [f.kind for f in parsed["mixed"][:4]] == ["pair", "score", "pair", "score"]
    assert once == halves == kinds["mixed"][::2] and len(halves) == scores.RECORDS / 2
    assert {r["score"] for r in kinds["scores"]} == {1, 2, 3, 4, 5}
    assert len({r["annotator"] for r in kinds["pairs"]}) == 6 and kinds["pairs"] != scores.judged("pairs", 4)


def test_held_out_pairs_are_new_and_of_every_fault():
    rows, learnt = scores.held_out(), {r["prompt"][0]["content"] for r in scores.judged("pairs", 0)}
    assert len(rows) == scores.PROMPTS * len(FAULTS) == SHIPPED["pairs"] >= 1300
    assert [r["fault"] for r in rows[: len(FAULTS)]] == list(FAULTS)
    assert not learnt & {r["prompt"][0]["content"] for r in rows}
    assert len({r["prompt"][0]["content"] for r in rows}) == scores.PROMPTS


def right_on(form: str, kind: str, right: str, seed: int = 0) -> dict:
    """A run, right on these of the pairs of two prompts."""
    return {"form": form, "data": kind, "seed": seed, "accuracy": right.count("1") / len(right), "right": right}


def test_differences_are_of_the_seeds_that_both_have_and_the_bars_of_their_means():
    all_but = {n: "1" * (14 - n) + "0" * n for n in range(5)}
    rows = [right_on("link", kind, all_but[1], seed) for kind in scores.KINDS for seed in (0, 1)]
    rows += [right_on("raw", "pairs", all_but[3], 1)]
    assert scores.passed(rows)
    found = scores.difference(rows, ("link", "pairs"), ("raw", "pairs"))
    assert found[0] == pytest.approx(2 / 14) and found[1] <= found[0] <= found[2] and found[1] == 0  # one prompt alone
    assert scores.difference(rows, ("link", "mixed"), ("raw", "mixed")) is None
    worse = [r for r in rows if r["data"] != "mixed"] + [right_on("link", "mixed", all_but[2], s) for s in (0, 1)]
    assert not scores.passed(worse) and "link: mixed less pairs of mixed -0.071" in scores.table(worse)
    assert "bar +0.00: missed" in scores.table(worse) and "link less raw, pairs: +0.143" in scores.table(worse)
    assert not scores.passed([r for r in rows if r["data"] != "both scored"])


def test_the_shipped_result_is_whole_and_prints(capsys, tmp_path):
    runs = SHIPPED["runs"]
    seeds = sorted({r["seed"] for r in runs})
    assert len(runs) == len(seeds) * len(scores.RUNS) and SHIPPED["records"] == scores.RECORDS
    assert {len(r["right"]) for r in runs} == {SHIPPED["pairs"]}
    (tmp_path / "x.json").write_text(json.dumps(SHIPPED))
    assert scores.main(["--print", str(tmp_path / "x.json")]) == 0
    assert "link: mixed less pairs of mixed" in capsys.readouterr().out
