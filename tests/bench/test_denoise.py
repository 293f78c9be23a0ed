"""bench.denoise: what it turns, its held-out pairs, what its figures mean, and a run on tiny sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import denoise
from bench.quickstart_data.generate import FAULTS
from fastrlhf.data.feedback import parse_feedback
from fastrlhf.reward.strength import row_of
from tests import tiny

SHIPPED = Path(__file__).parents[2] / "bench/results/denoise_cpu.json"


def test_a_fifth_of_the_judgements_is_turned_and_the_rest_is_as_it_was():
    clean, noisy, wrong = denoise.judgements(3)
    assert sum(wrong) / len(wrong) == pytest.approx(denoise.SHARE, abs=0.02)
    for before, after, turn in zip(clean, noisy, wrong, strict=True):
        assert (before == after) == (not turn) or before.scores == (0.0,)  # 3 of 1 to 5 is its own mirror
        assert sorted(after.ordered_pairs()) == sorted((j, i) if turn else (i, j) for i, j in before.ordered_pairs())
        again = parse_feedback(row_of(after, denoise.RANGE), "here", denoise.RANGE)  # as the trainer reads it
        order = [(again.responses[i], again.responses[j]) for i, j in again.ordered_pairs()]
        assert sorted(order) == sorted((after.responses[i], after.responses[j]) for i, j in after.ordered_pairs())
        if before.scores is not None and turn:
            assert after.scores == pytest.approx([-score for score in before.scores])
    assert denoise.judgements(4)[2] != wrong and denoise.judgements(3)[2] == wrong


def test_held_out_pairs_are_on_prompts_that_no_feedback_has():
    pairs = denoise.held_out(denoise.PROMPTS)
    assert len(pairs) == denoise.PROMPTS * len(FAULTS) >= 1300
    learnt = {json.dumps(row["prompt"]) for row in denoise.shipped("feedback")}
    assert not learnt & {json.dumps(row["prompt"]) for row in pairs}
    assert all(row["chosen"] != row["rejected"] for row in pairs)


def runs_of(**right: list[list[int]]) -> list[dict]:
    found = {"turned_of_weakest": 0.5, "turned_of_below_0": 0.5, "turned_found": 0.5}
    return [
        {"seed": seed, "arm": arm, "right": many[seed]} | ({"strength": found} if arm == "denoised" else {})
        for seed in range(len(right["clean"]))
        for arm, many in right.items()
    ]


def test_what_is_won_back_by_hand():
    """Two seeds, four prompts: 7 and 6 of 7 right; 5 and 5; 6 and 5: a cost of 1.5 / 7, of which a third is won."""
    runs = runs_of(clean=[[7] * 4, [6] * 4], noisy=[[5] * 4, [5] * 4], denoised=[[6] * 4, [5] * 4])
    found = denoise.won_back(runs)
    assert found["cost"] == pytest.approx((1.5 / 7,) * 3) and found["gain"] == pytest.approx((0.5 / 7,) * 3)
    assert found["share"] == pytest.approx((1 / 3,) * 3)  # all prompts alike: an interval of one point
    assert denoise.accuracies(runs)["clean"] == pytest.approx([1.0, 6 / 7])
    assert "33% of it (33% to 33%; bar 50%)" in denoise.table(runs)


def test_the_interval_is_wide_where_prompts_differ():
    runs = runs_of(clean=[[7, 7, 3, 7, 5, 7]], noisy=[[1, 5, 3, 6, 0, 6]], denoised=[[7, 2, 3, 7, 5, 1]])
    mean, low, high = denoise.won_back(runs)["share"]
    assert low < 0 < mean < high


def test_a_run_on_tiny_sizes(tmp_path, monkeypatch, capsys):
    """All arms, the result written, kept strengths read again, and a command that goes on where it stopped."""
    sft = tmp_path / "seed-0" / "sft" / "final"
    tiny.llama(max_position_embeddings=512).save_pretrained(sft)
    tiny.tokenizer().save_pretrained(sft)
    whole = denoise.shipped("feedback")[:16]
    held_out = denoise.shipped("heldout_prompts")
    monkeypatch.setattr(denoise, "shipped", lambda name: whole if name == "feedback" else held_out)
    make = denoise.config
    monkeypatch.setattr(denoise, "config", lambda *a, **f: make(*a, **f).replace(max_tokens=512))
    arguments = [str(tmp_path), "--seeds", "0", "--steps", "2", "--strength-steps", "2", "--prompts", "2"]
    arguments += ["--json", str(tmp_path / "x.json"), "--kept", str(tmp_path / "kept")]
    assert denoise.main([*arguments, "--arms", "noisy"]) == 1 and "not all arms" in capsys.readouterr().out
    assert denoise.main(arguments) in (0, 1)
    found = json.loads((tmp_path / "x.json").read_text())
    assert [r["arm"] for r in found["runs"]] == ["noisy", "clean", "denoised"]
    assert all(len(r["right"]) == 2 and 0 <= min(r["right"]) <= max(r["right"]) <= 7 for r in found["runs"])
    assert 0 <= found["runs"][2]["strength"]["turned_found"] <= 1
    assert len(list((tmp_path / "kept").glob("*.jsonl"))) == 1
    monkeypatch.setattr(denoise, "cross_fitted", None)  # not asked again
    found["runs"] = found["runs"][:2]
    (tmp_path / "x.json").write_text(json.dumps(found))
    assert denoise.main(arguments) in (0, 1) and "| denoised |" in capsys.readouterr().out


@pytest.mark.skipif(not SHIPPED.exists(), reason="not measured yet")
def test_the_shipped_result_is_whole_and_prints(capsys):
    assert denoise.main(["--print", str(SHIPPED)]) == 0
    assert "20 % turned labels cost" in capsys.readouterr().out
    runs = json.loads(SHIPPED.read_text(encoding="utf-8"))["runs"]
    assert {(r["seed"], r["arm"]) for r in runs} == {(s, a) for s in (0, 1, 2) for a in denoise.ARMS}
    assert len(runs[0]["right"]) * len(FAULTS) >= 1300
