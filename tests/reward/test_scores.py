"""Scores as data of a reward model: people's own scales, the link to the raw output, implied pairs, the first loss."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from fastrlhf import UserError
from fastrlhf.data.feedback import Feedback, parse_feedback
from fastrlhf.models.reward_folder import LINK_FILE, link_of
from fastrlhf.reward.head import settle_head
from fastrlhf.reward.link import ScoreLink
from fastrlhf.reward.losses import SCORE_WEIGHT, implied_ranking, preference_loss
from fastrlhf.reward.raters import PRIOR, TOGETHER, raters_of
from tests import tiny
from tests.reward_runs import CAT, EDIT, MOON, PAIR, WEATHER, config, scores_of, trainer
from tests.runs import leave_after

WORDS = ["yes", "no", "the moon", "the cat", "天气", "thank you", "the answer is yes", "谢谢您"]


def scored(score: float, *, prompt: object = CAT, reply: str = "yes", by: str | None = None) -> dict:
    return {"prompt": prompt, "response": reply, "score": score} | ({"annotator": by} if by else {})


def given(score: float, by: str | None = None) -> Feedback:
    return parse_feedback(scored(score, by=by), "here:1")


def apart(count: int) -> list[dict]:
    """Scores of 1 to 5 of replies to prompts that all differ."""
    return [scored(1 + i % 5, prompt=tiny.chat(f"the cat {i}"), reply=WORDS[i % 8]) for i in range(count)]


# ------------------------------------------------------------------------------------------------------------- people


def test_each_person_is_read_on_their_own_scale():
    """Ann is generous, Bob uses the middle alone: 4 of hers and 2 of his are both below their means."""
    records = [given(s, "ann") for s in (4, 5, 5, 4)] + [given(s, "bob") for s in (2, 3, 2, 3)]
    raters = raters_of(records)
    mean, variance = 0.25, 0.3125  # of all eight on [-1, 1]: .5 1 1 .5 and -.5 0 -.5 0
    ann = (4 * 0.75 + PRIOR * mean) / (4 + PRIOR), (4 * 0.0625 + PRIOR * variance) / (4 + PRIOR)
    assert raters.mean == pytest.approx(mean) and raters.deviation == pytest.approx(math.sqrt(variance))
    assert raters.people["ann"] == pytest.approx((ann[0], math.sqrt(ann[1])))
    assert raters.read(given(4, "ann"))[0] == pytest.approx((0.5 - ann[0]) / math.sqrt(ann[1]))
    strange, nobody = raters.read(given(4, "eve")), raters.read(given(4))
    assert strange == nobody == pytest.approx([(0.5 - mean) / math.sqrt(variance)])
    pooled = nobody[0] - raters.read(given(2))[0]
    assert raters.read(given(4, "ann"))[0] - raters.read(given(2, "bob"))[0] < 0.7 * pooled
    assert raters.alike == 0 and raters.note() == "scores of 2 annotators: each is read on their own mean and deviation"


def test_who_rated_once_or_always_alike_is_read_on_everyones_scale(capsys):
    rows = apart(20) + [scored(5, prompt=MOON, by="once")]
    rows += [scored(3, prompt=tiny.chat(f"moon {i}"), by="alike") for i in range(4)]
    t = trainer(data=rows)
    read = "scores of 2 annotators: each is read on their own mean and deviation"
    assert f"{read}; 2 gave one rating or always the same, so theirs are read mostly on everyone's" in (
        capsys.readouterr().out
    )
    raters = t.link.raters
    for name, score in (("once", 5), ("alike", 3)):
        mean, deviation = raters.people[name]
        assert 0.5 * raters.deviation < deviation <= raters.deviation
        assert min(raters.mean, score / 2 - 1.5) <= mean <= max(raters.mean, score / 2 - 1.5)


def test_scores_that_are_all_the_same_are_one_sentence():
    rows = [scored(4, prompt=tiny.chat(f"the cat {i}")) for i in range(3)]
    with pytest.raises(
        UserError, match=r"^data: all scores and labels to learn from are 4 \(3 of them, the first at .+"
    ):
        trainer(data=[PAIR, *rows])
    liked = [{"prompt": tiny.chat(f"the cat {i}"), "completion": "yes", "label": True} for i in range(3)]
    with pytest.raises(UserError, match=r"labels to learn from are 5 \(3 of them.*or leave these rows out"):
        trainer(data=liked)


# ----------------------------------------------------------------------------------------------------------- the link


def test_scores_and_pairs_have_a_scale_each():
    """Raw outputs of a model that tells pairs apart with confidence are no fault of its scores: a link that is learnt
    reads 1 to 5 off them exactly, and nothing pulls the raw output into [-1, 1]."""
    link = ScoreLink(raters_of([given(s) for s in (1, 2, 3, 4, 5)]), (1.0, 5.0))
    raw = {score: torch.tensor([3.0 * score - 6.0], requires_grad=True) for score in (1, 2, 3, 4, 5)}

    def loss() -> torch.Tensor:
        return torch.stack([link.loss(raw[score], given(score)) for score in raw]).mean()

    assert float(loss().detach()) > 5 * SCORE_WEIGHT
    for _ in range(1000):
        loss().backward()
        link.step(link.take_gradient(), 1.0)
    assert float(loss().detach()) < 2e-3 * SCORE_WEIGHT
    known = json.loads(link.text())
    for score, value in raw.items():
        assert known["scale"] * float(value.detach()) + known["offset"] == pytest.approx(score, abs=0.2)
        value.grad = None
    loss().backward()
    assert all(abs(float(value.grad)) < 1e-2 * SCORE_WEIGHT for value in raw.values())


def test_the_scale_stays_positive():
    link = ScoreLink(raters_of([given(1), given(5)]), (1.0, 5.0))
    for _ in range(400):  # raw outputs the wrong way round: the best that a link can do is to look away
        torch.stack([link.loss(torch.tensor([-6.0 + 3 * s]) * -1, given(s)) for s in (1, 5)]).mean().backward()
        link.step(link.take_gradient(), 1.0)
    assert 0 < link.scale < 0.5


def test_a_run_learns_scale_and_offset_at_their_own_rate():
    t = trainer(config(total_steps=5, learning_rate=1e-6), data=[PAIR, *apart(10)])
    before = t.link.state()["values"]
    t.train()
    moved = [abs(a - b) for a, b in zip(before, t.link.state()["values"])]
    assert 1e-3 < max(moved) <= 5 * 0.0101
    pairs = trainer(config(total_steps=2), data=[PAIR, EDIT])
    frozen = trainer(config(total_steps=2, learning_rate=0), data=apart(5))
    for still in (pairs, frozen):
        still.train()
        assert still.link.state() == {"values": [0.0, 0.0], "moments": {}}


@pytest.mark.parametrize("fields", [{}, {"lora": 2}])
def test_resume_continues_the_link_to_the_bit(tmp_path, fields):
    data = [PAIR, *apart(11)]
    how = {"total_steps": 4, "mini_batch_size": 4, "save_every": 2, **fields}
    whole = trainer(config(**how, output_dir=str(tmp_path / "whole")), data=data)
    whole.train()
    leave_after(trainer(config(**how, output_dir=str(tmp_path / "run")), data=data), 2)
    t = trainer(config(**how, output_dir=str(tmp_path / "run"), resume=True), data=data)
    assert t.steps_done == 2 and t.link.state() != whole.link.state()
    t.train()
    assert t.link.state() == whole.link.state() and t.link.state()["moments"]
    for name, run in (("a", whole), ("b", t)):
        run.save(tmp_path / name)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert LINK_FILE in files and all(
        (tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in files
    )


def test_it_lies_beside_the_weights_and_training_goes_on_from_it(tmp_path):
    t = trainer(config(total_steps=3), data=apart(10))
    t.train()
    t.save(tmp_path / "rm")
    scale, offset = link_of(tmp_path / "rm")
    row = t.items[0].rows[0]
    [raw] = scores_of(t, [row])
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    assert float(stock(input_ids=torch.tensor([row])).logits) == pytest.approx(raw, abs=1e-5)

    other = [scored(s, prompt=WEATHER, reply=w) for s, w in ((0, "yes"), (10, "no"))]
    on = trainer(config(score_range=(0.0, 10.0)), model=str(tmp_path / "rm"), data=other)
    assert json.loads(on.link.text())["scale"] == pytest.approx(scale, rel=1e-5)
    assert json.loads(on.link.text())["offset"] == pytest.approx(offset, rel=1e-5)
    assert scores_of(on, [row]) == pytest.approx([raw], abs=1e-5)  # its head is no new one

    (tmp_path / "rm" / LINK_FILE).unlink()
    plain = trainer(model=str(tmp_path / "rm"), data=apart(5))
    assert plain.link.state()["values"] == [0.0, 0.0] and scores_of(plain, [row]) == pytest.approx([raw], abs=1e-5)
    pairs = trainer(data=[PAIR])
    pairs.save(tmp_path / "pairs")
    assert not (tmp_path / "pairs" / LINK_FILE).exists()


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"scale": 0, "offset": 1}', '{"scale": 1}', '{"scale": NaN, "offset": 1}']
)
def test_a_damaged_link_is_one_sentence(tmp_path: Path, text):
    (tmp_path / LINK_FILE).write_text(text)
    with pytest.raises(UserError, match=r"score_link.json: holds no numbers `scale` > 0 and `offset`; remove the file"):
        link_of(tmp_path)


# ------------------------------------------------------------------------------------------------------- implied pairs


def test_scores_of_one_record_imply_an_order():
    assert implied_ranking((0.5, -1.0, 0.5, 1.0)) == ((3,), (0, 2), (1,))
    record = parse_feedback({"prompt": "p", "responses": ["a", "b"], "scores": [2, 4]}, "here:1")
    link, raw = ScoreLink(raters_of([record]), (1.0, 5.0)), torch.tensor([0.3, -0.2])
    squares = SCORE_WEIGHT * 0.5 * ((0.3 + 1) ** 2 + (-0.2 - 1) ** 2) / 2
    pair = float(preference_loss(raw, ((1,), (0,))))
    assert float(link.loss(raw, record).detach()) == pytest.approx(squares + pair, rel=1e-5)
    tied = parse_feedback({"prompt": "p", "responses": ["a", "b"], "scores": [4, 4]}, "here:1")
    assert float(link.loss(raw, tied).detach()) == pytest.approx(
        SCORE_WEIGHT * 0.5 * ((0.3 - 1) ** 2 + (-0.2 - 1) ** 2) / 2, rel=1e-5
    )


def test_rows_of_one_prompt_and_person_are_learnt_together():
    rows = [scored(1, reply="no", by="ann"), scored(5, reply="yes", by="bob"), PAIR, scored(4, reply="yes", by="ann")]
    t = trainer(data=[*rows, scored(2, prompt=MOON, by="ann")])
    assert [len(r.rows) for r in t.items] == [2, 1, 2, 1] and [r.judgements for r in t.items] == [2, 1, 1, 1]
    ann = t.items[0]
    assert ann.feedback.responses == ("no", "yes") and ann.feedback.ordered_pairs() == [(1, 0)]
    losses = [float(t.link.loss(torch.tensor(scores_of(t, r.rows)), r.feedback).detach()) for r in t.items]
    weighed = (2 * losses[0] + losses[1] + losses[2] + losses[3]) / 5
    cfg = config(mini_batch_size=4)
    first = trainer(cfg, data=[*rows, scored(2, prompt=MOON, by="ann")]).train()["loss/train"]
    assert first == pytest.approx(weighed, rel=1e-5)  # a row of the source weighs one, joined or not
    many = trainer(data=[scored(1 + i % 5, reply=f"yes {i}") for i in range(10)])
    assert [len(r.rows) for r in many.items] == [TOGETHER, TOGETHER, 2]


def test_ratings_of_several_people_are_learnt_as_their_mean_and_stay_beside_their_replies():
    """A reply is one row, whatever the number of its ratings, and where records are joined each keeps its own."""
    rated = [
        {"prompt": MOON, "response": "yes", "ratings": [1, 5, 3]},
        {"prompt": MOON, "response": "no", "ratings": [2, 1]},
    ]
    means = [{"prompt": MOON, "response": "yes", "score": 3}, {"prompt": MOON, "response": "no", "score": 1.5}]
    one, other = trainer(data=rated), trainer(data=means)
    [joined] = one.items
    assert joined.rows == other.items[0].rows and joined.feedback.ratings == ((-1.0, 1.0, 0.0), (-0.5, -1.0))
    assert joined.feedback.scores == other.items[0].feedback.scores == (0.0, -0.75)
    assert one.train()["loss/train"] == other.train()["loss/train"]
    [mixed] = trainer(data=[rated[0], means[1]]).items
    assert mixed.feedback.scores == (0.0, -0.75) and mixed.feedback.ratings is None  # of one of them nobody knows


def test_the_order_of_scores_is_learnt_through_the_preference_loss():
    """Two replies scored 5 and 4, beside others at 1: their margin grows as that of a pair does."""
    rows = [scored(5, reply="yes"), scored(4, reply="no"), scored(1, prompt=MOON), scored(1, prompt=WEATHER)]
    t = trainer(config(total_steps=30, learning_rate=3e-3), data=rows)
    *_, last = t
    high, low = scores_of(t, t.items[0].rows)
    assert high - low > 1.2 and last.metrics["accuracy/train"] == 1.0  # the squares alone end at a margin below 1


# ------------------------------------------------------------------------------------------------------ the first loss


def test_a_row_that_is_not_finite_does_not_spoil_the_head():
    model = trainer(data=apart(5)).model
    before = model.score.weight.detach().clone()
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = math.nan
    settle_head(model, [[7, 7]])
    assert torch.equal(model.score.weight, before)
    settle_head(model, [[3, 4], [7, 7], [5, 6, 8], [9, 9, 3]])
    assert model.score.weight.isfinite().all() and not torch.equal(model.score.weight, before)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_the_first_loss_is_that_of_a_constant(make):
    """Pairs: log 2. Scores: half their variance, which is 1 in deviations, by the weight. States are far from 0, as
    those of real models are."""
    model = make()
    final = model.model.norm if hasattr(model, "model") else model.transformer.ln_f
    with torch.no_grad():
        final.weight.mul_(20)
        if getattr(final, "bias", None) is not None:
            final.bias.add_(30)
    pairs = [
        {"prompt": tiny.chat(f"the cat {i}"), "chosen": WORDS[i % 8], "rejected": WORDS[(i + 3) % 8]} for i in range(24)
    ]
    assert trainer(config(mini_batch_size=24), model=model, data=pairs).train()["loss/train"] == pytest.approx(
        math.log(2), abs=0.05
    )
    scores = trainer(config(mini_batch_size=25), model=model, data=apart(25)).train()["loss/train"]
    assert scores == pytest.approx(0.5 * SCORE_WEIGHT, abs=0.15 * SCORE_WEIGHT)
