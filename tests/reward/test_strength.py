"""Preference strength: measured by ensembles, written to a file, and what is done about the weakest."""

from __future__ import annotations

import json

import pytest
import torch

from fastrlhf import UserError, cli
from fastrlhf.data.encode import Record
from fastrlhf.data.feedback import parse_feedback
from fastrlhf.eval.cross_fit import parts
from fastrlhf.reward.raters import joined
from fastrlhf.reward.strength import denoised, measured, row_of, summary, turned, weakest_first
from tests import tiny
from tests.reward_runs import EDIT, MARGIN, MIXED, PAIR, RANKING, SCORE, SCORES, config, scores_of, trainer
from tests.runs import read

RANGE = (1.0, 5.0)


def judged(row: dict, **columns: object):
    return parse_feedback({**row, **columns}, "here:1")


def records(*strengths: float | None, row: dict = PAIR) -> list[Record]:
    columns = [{} if s is None else {"strength": s} for s in strengths]
    return [Record([[1, 2], [1, 3]], judged(row, **c)) for c in columns]


# ------------------------------------------------------------------------------------------------------------ measured


def test_strength_is_the_mean_difference_over_pairs_and_members():
    pair = measured(judged(PAIR), torch.tensor([[1.0, 2.0, 0.0], [0.5, 3.0, 1.0]]))
    assert pair.strength == pytest.approx((0.5 - 1 - 1) / 3)
    assert pair.strength_sd == pytest.approx(torch.tensor([0.5, -1.0, -1.0]).std().item())
    ranking = judged(RANKING)  # [2, [0, 3], 1]: pairs 20 23 21 01 31
    scores = torch.tensor([[1.0, 0.0], [0.0, 0.0], [3.0, 0.0], [2.0, 1.0]])
    by_hand = torch.tensor([(2 + 1 + 3 + 1 + 2) / 5, (0 - 1 + 0 + 0 + 1) / 5])
    assert measured(ranking, scores).strength == pytest.approx(float(by_hand.mean()))
    assert measured(judged(SCORE), torch.tensor([[1.0, 2.0]])).strength is None  # it orders nothing


@pytest.mark.parametrize("row", [*MIXED, {**PAIR, "annotator": "ann", "source": "web"}])
def test_a_row_with_its_strength_is_the_same_judgement(row):
    feedback = measured(judged(row), torch.randn(len(judged(row).responses), 3))
    again = parse_feedback(json.loads(json.dumps(row_of(feedback, RANGE))), "here:1", RANGE)
    assert again == feedback


def test_scores_survive_any_range():
    for low, high in ((0.0, 10.0), (-0.3, 0.7), (1.0, 5.0)):
        given = [low, high, low + (high - low) / 3]
        feedback = parse_feedback({**SCORES, "scores": given}, "here", (low, high))
        again = parse_feedback(row_of(feedback, (low, high)), "here", (low, high))
        assert again.scores == pytest.approx(feedback.scores, abs=1e-8)


def test_columns_of_the_published_data_are_read():
    feedback = judged(PAIR, **{"mean preference difference": -0.4, "std preference difference": 0.1})
    assert (feedback.strength, feedback.strength_sd) == (-0.4, 0.1)
    with pytest.raises(UserError, match='here:1: field "strength" must be a number'):
        judged(PAIR, strength="strong")


# --------------------------------------------------------------------------------------------------- what is done to it


def test_a_turned_judgement_prefers_the_opposite():
    for row in (PAIR, EDIT, RANKING, SCORES, MARGIN):
        feedback = judged(row, strength=-0.5)
        other = turned(feedback)
        assert sorted(other.ordered_pairs()) == sorted((j, i) for i, j in feedback.ordered_pairs())
        assert other.strength == 0.5 and other.margin is None and turned(turned(feedback)).ordered_pairs()
        again = parse_feedback(row_of(other, RANGE), "here", RANGE)  # written and read, it is still turned
        texts = {(again.responses[i], again.responses[j]) for i, j in again.ordered_pairs()}
        assert texts == {(feedback.responses[j], feedback.responses[i]) for i, j in feedback.ordered_pairs()}
    tied = judged({**SCORES, "scores": [5, 1, 5]})
    assert turned(tied).scores == (0.0, 1.0, 0.0)


def test_the_weakest_share_is_turned_and_no_other():
    given = records(0.3, -0.9, None, -0.1, 1.0, 0.2)
    cfg = config(weakest="flip", weakest_share=0.4)
    done, note = denoised(given, cfg)
    turned_ones = [i for i, (a, b) in enumerate(zip(given, done)) if a.feedback.ranking != b.feedback.ranking]
    assert turned_ones == [1, 3] and done[1].feedback.strength == 0.9
    assert note == "strengths of 5 of 6 records, 2 of them below 0; the 2 weakest, up to -0.1, are turned round"


def test_the_weakest_share_is_smoothed_and_no_other():
    done, note = denoised(
        records(0.3, -0.9, None, -0.1), config(weakest="smooth", weakest_share=0.3, label_smoothing=0.4)
    )
    assert [r.smoothing for r in done] == [0.0, 0.4, 0.0, 0.0] and "smoothed by 0.4" in note
    done, note = denoised(records(None, None), config(label_smoothing=0.1))
    assert [r.smoothing for r in done] == [0.1, 0.1] and note is None


def test_the_weakest_share_is_left_out_and_no_other():
    given = records(0.3, -0.9, None, -0.1, 1.0, 0.2)
    done, note = denoised(given, config(weakest="drop", weakest_share=0.4))
    assert done == [given[i] for i in (0, 2, 4, 5)]  # what has no strength stays
    assert note == "strengths of 5 of 6 records, 2 of them below 0; the 2 weakest, up to -0.1, are left out"
    with pytest.raises(UserError, match="weakest = drop: weakest_share = 0.9 leaves none of 2 records; lower it"):
        denoised(records(0.3, -0.9), config(weakest="drop", weakest_share=0.9))


def test_strengths_above_0_are_margins_where_there_is_none():
    given = [*records(0.3, -0.9, None), *records(0.5, row=MARGIN)]
    done, _ = denoised(given, config(strength_margin=True))
    assert [r.feedback.margin for r in done] == [0.3, None, None, 0.7]
    done, _ = denoised(given, config(strength_margin=True, weakest="flip", weakest_share=0.3))
    assert [r.feedback.margin for r in done] == [0.3, 0.9, None, 0.7]  # of a turned pair the turned strength


def test_what_is_smoothed_apart_is_not_joined_with_the_rest():
    rows = [Record([[1]], judged({**SCORE, "score": s}), smoothing=a) for s, a in ((1, 0.0), (5, 0.0), (2, 0.3))]
    assert [(len(r.rows), r.smoothing) for r in joined(rows)] == [(2, 0.0), (1, 0.3)]


def test_training_learns_what_the_strengths_say(capsys):
    """Two pairs that contradict each other: with the strengths of an ensemble that believes one of them the other is
    turned, and both teach the same."""
    rows = [{**PAIR, "strength": 2.0}, {**PAIR, "chosen": "no", "rejected": PAIR["chosen"], "strength": -2.0}]
    margins = {}
    for fields in ({}, {"weakest": "flip", "weakest_share": 0.5}, {"weakest": "drop"}, {"strength_margin": True}):
        t = trainer(config(total_steps=30, mini_batch_size=2, learning_rate=3e-3, **fields), data=rows)
        t.train()
        better, worse = scores_of(t, t.items[0].rows)
        margins[tuple(fields)] = better - worse
    assert abs(margins[()]) < 0.3 and margins["weakest", "weakest_share"] > 2.0
    assert margins[("weakest",)] > 2.0  # the other is left out
    assert margins[("strength_margin",)] > 0.5  # the believed pair asks for a margin, the other for none
    assert "the 1 weakest, up to -2, are turned round" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------- the files


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """An SFT model, feedback of which one judgement contradicts thirteen others, and an ensemble of it."""
    folder = tmp_path_factory.mktemp("strength")
    tiny.llama().save_pretrained(folder / "sft")
    tiny.tokenizer().save_pretrained(folder / "sft")
    rows = [{"prompt": tiny.chat(f"the cat {i}"), "chosen": "the moon", "rejected": "no"} for i in range(14)]
    rows[5] = {**rows[5], "chosen": "no", "rejected": "the moon"}
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, SCORE, {**SCORE, "score": 1}]))
    t = trainer(
        config(ensemble=3, total_steps=25, mini_batch_size=8, learning_rate=3e-3),
        model=str(folder / "sft"),
        tokenizer=None,
        data=str(folder / "data.jsonl"),
    )
    t.train()
    t.save(folder / "ensemble")
    return folder


def test_reward_eval_writes_them_weakest_first(workplace, capsys):
    output = workplace / "strength.jsonl"
    command = ["reward-eval", str(workplace / "ensemble"), str(workplace / "data.jsonl"), "--strength", str(output)]
    assert cli.main(command) == 0
    rows = read(output)
    assert len(rows) == 16 and [r for r in rows if "strength" not in r] == rows[14:]
    assert rows[0]["chosen"] == "no" and rows[0]["strength"] < 0 < rows[1]["strength"]
    assert all(row["strength_sd"] > 0 for row in rows[:14])
    assert [row["strength"] for row in rows[:14]] == sorted(row["strength"] for row in rows[:14])
    said = capsys.readouterr()
    assert "strengths of 14 of 16 judgements: 1 below 0, where the ensemble disagrees" in said.err
    t = trainer(config(weakest="flip", weakest_share=0.05), data=str(output))
    assert [r.feedback.responses[r.feedback.ranking[0][0]] for r in t.items if r.feedback.ranking] == ["the moon"] * 14
    assert cli.main(command) == 2 and "exists" in capsys.readouterr().err


def test_cross_fit_measures_each_judgement_by_the_others(workplace, capsys):
    """Each fold's ensemble has not seen the judgement that contradicts the rest, and says so."""
    output = workplace / "cross.jsonl"
    recipe = f"model={workplace}/sft data={workplace}/data.jsonl output_dir={workplace}/run ensemble=2 total_steps=25"
    recipe += " mini_batch_size=8 learning_rate=3e-3 max_tokens=64 lr_schedule=constant"
    assert cli.main(["reward", *recipe.split(), "--cross-fit", str(output), "--folds", "2"]) == 0
    rows = read(output)
    assert len(rows) == 16 and rows[0]["chosen"] == "no" and rows[0]["strength"] < -0.5
    assert not (workplace / "run").exists()  # no model is kept
    assert "fold 2 of 2" in capsys.readouterr().err


def test_folds_keep_prompts_whole():
    many = [judged({**PAIR, "prompt": f"the cat {i % 7}"}) for i in range(21)]
    fold = parts(many, 3, seed=0)
    assert all(fold[i] == fold[i + 7] == fold[i + 14] for i in range(7))
    assert sorted(fold.count(k) for k in range(3)) == [6, 6, 9]
    with pytest.raises(UserError, match="--folds: 9, and data has 7 prompts; use fewer folds or more data"):
        parts(many, 9, seed=0)


def test_what_a_person_is_told():
    many = [r.feedback for r in records(0.3, -0.9, None)]
    assert summary(many).startswith("strengths of 2 of 3 judgements: 1 below 0")
    assert [f.strength for f in weakest_first(many)] == [-0.9, 0.3, None]


# ------------------------------------------------------------------------------------------------------ what is refused


def test_strengths_without_an_ensemble_are_one_sentence(workplace, tmp_path, capsys):
    with pytest.raises(UserError, match="weakest = flip: no row of data has a strength; write them with fastrlhf"):
        trainer(config(weakest="flip"))
    with pytest.raises(UserError, match="strength_margin = true: no row of data has a strength"):
        trainer(config(strength_margin=True))
    trainer(data=[PAIR, EDIT]).save(tmp_path / "one")
    data, output = str(workplace / "data.jsonl"), str(tmp_path / "out.jsonl")
    assert cli.main(["reward-eval", str(tmp_path / "one"), data, "--strength", output]) == 2
    assert (
        "has one head, and a strength is a mean over an ensemble; train it with ensemble=5" in capsys.readouterr().err
    )
    recipe = f"model={workplace}/sft data={data} output_dir={tmp_path}/run".split()
    for more, problem in (
        ([], "--cross-fit: a strength is a mean over the heads of an ensemble; give ensemble=5 too"),
        (["ensemble=2", "--folds", "1"], "--folds: 1; expected at least 2, one to learn from and one to measure"),
        (["ensemble=1"], "ensemble = 1: one head has no other to differ from; use 2 or more, or none"),
    ):
        assert cli.main(["reward", *recipe, *more, "--cross-fit", output]) == 2
        error = capsys.readouterr().err
        assert problem in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out.jsonl").exists()
