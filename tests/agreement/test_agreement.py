"""How far a reward model agrees with people: each figure by hand or by another way, and what it has to beat."""

from __future__ import annotations

import math
import random

import pytest
import torch

from fastrlhf.agreement import baselines, bootstrap
from fastrlhf.agreement.bootstrap import draws, interval, moments, pearson, ratio, sums_by
from fastrlhf.agreement.figures import calibration, figures
from fastrlhf.agreement.pairs import length_of
from fastrlhf.agreement.people import reliability
from fastrlhf.agreement.words import first_sentence, lines
from fastrlhf.data.feedback import FIRST_IS_BETTER, Feedback, parse_feedback


def pair(prompt: str, better: str, worse: str, **fields: object) -> Feedback:
    return Feedback("pair", prompt, (better, worse), ranking=FIRST_IS_BETTER, **fields)


def scored(prompt: str, reply: str, score: float) -> Feedback:
    return Feedback("score", prompt, (reply,), scores=(score,), where="s.jsonl:1")


# ---------------------------------------------------------------------------------------------------------- intervals


def test_the_interval_of_a_share_is_that_of_resampled_prompts():
    sums = torch.tensor([[1.0, 1.0]] * 60 + [[0.0, 1.0]] * 40, dtype=torch.float64)
    low, high = interval(draws(sums, ratio, 0))
    error = math.sqrt(0.6 * 0.4 / 100)
    assert low == pytest.approx(0.6 - 1.96 * error, abs=0.015) and high == pytest.approx(0.6 + 1.96 * error, abs=0.015)
    # Ten judgements of one prompt that always agree are worth one: the interval stays as wide.
    low10, high10 = interval(draws(10 * sums, ratio, 0))
    assert (low10, high10) == pytest.approx((low, high))
    assert draws(sums[:1], ratio, 0) is None and interval(None) is None


def test_many_prompts_are_drawn_in_smaller_chunks(monkeypatch):
    sums = torch.tensor([[float(n % 3 == 0), 1.0] for n in range(90)], dtype=torch.float64)
    whole = draws(sums, ratio, 5)
    monkeypatch.setattr(bootstrap, "CHUNK_ROWS", 700)  # 7 at once, and 5 in the last
    assert len(draws(sums, ratio, 5)) == len(whole) == bootstrap.RESAMPLES
    assert interval(draws(sums, ratio, 5)) == pytest.approx(interval(whole), abs=0.02)


def test_clusters_are_summed_where_they_appear_again():
    assert sums_by(["b", "a", "b"], [(1.0, 2.0), (3.0, 4.0), (5.0, 6.0)]).tolist() == [[6.0, 8.0], [3.0, 4.0]]


def test_the_correlation_is_pearson_s_and_none_of_what_does_not_vary():
    generator = torch.Generator().manual_seed(0)
    xs, ys = torch.randn(2, 50, generator=generator, dtype=torch.float64) + 3
    sums = torch.tensor(moments(xs.tolist(), ys.tolist()), dtype=torch.float64)
    assert float(pearson(sums.sum(0))) == pytest.approx(float(torch.corrcoef(torch.stack([xs, ys]))[0, 1]))
    flat = torch.tensor(moments([0.1] * 7, ys[:7].tolist()), dtype=torch.float64)
    assert math.isnan(float(pearson(flat.sum(0))))


# ------------------------------------------------------------------------------------------------------------ figures

RECORDS = [
    pair("p1", "good and long", "bad", annotator="ann", source="web", margin=0.5),
    pair("p1", "good", "bad and long", annotator="bob", source="web", margin=2.0),
    Feedback("edit", "p2", ("fine", "poor"), ranking=FIRST_IS_BETTER, annotator="ann", where="f.jsonl:3"),
    Feedback("ranking", "p3", ("a", "b b", "c"), ranking=((1,), (0, 2)), annotator="ann", where="f.jsonl:4"),
]
SCORES = [[2.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 3.0, 1.0]]  # right, wrong, a tie, right twice


def test_every_group_has_its_own_accuracy():
    report = figures(RECORDS, SCORES)
    assert (report["prompts"], report["records"], report["replies"]) == (3, 4, 9)
    assert report["pairs"]["pairs"] == 5 and report["pairs"]["accuracy"] == 3.5 / 5

    def shares(way: str) -> dict[str, tuple[int, float]]:
        return {name: (group["pairs"], group["accuracy"]) for name, group in report["by"][way].items()}

    assert shares("kind") == {"edit": (1, 0.5), "pair": (2, 0.5), "ranking": (2, 1.0)}
    assert shares("source") == {"f.jsonl": (3, 2.5 / 3), "web": (2, 0.5)}
    assert shares("annotator") == {"ann": (4, 3.5 / 4), "bob": (1, 0.0)}
    assert shares("length") == {"as long": (1, 0.5), "better is longer": (3, 1.0), "better is shorter": (1, 0.0)}
    assert shares("margin") == {"stated margin, lower half": (1, 1.0), "stated margin, upper half": (1, 0.0)}
    assert report["by"]["kind"]["edit"]["interval"] is None  # one prompt
    assert report["with_scores"] is None


def test_groups_that_are_all_the_rows_are_not_repeated():
    rows = [pair(f"p{n}", "yes it is", "no", where="f.jsonl:1") for n in range(3)]
    assert set(figures(rows, [[1.0, 0.0]] * 3)["by"]) == set()


def test_the_rows_say_who_judged_and_where_they_are_from():
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "annotator": "ann", "source": "web"}
    read = parse_feedback(row, "f.jsonl:1")
    assert (read.annotator, read.source) == ("ann", "web")
    read = parse_feedback({"prompt": "p", "response": "a", "score": 3, "annotator": 7}, "f.jsonl:1")
    assert (read.annotator, read.source) == ("7", None)


def test_a_calibrated_model_has_a_small_error_and_an_overconfident_one_a_large_one():
    draw = random.Random(0)
    asked = [draw.gauss(0, 2) for _ in range(4000)]
    found = [m if draw.random() < 1 / (1 + math.exp(-m)) else -m for m in asked]  # the better reply, as it is chosen
    honest, sure = calibration(found), calibration([4 * m for m in found])
    assert honest["error"] < 0.03 < 0.1 < sure["error"]
    assert honest["nats"] < math.log(2) < sure["nats"]
    log_loss = -torch.nn.functional.logsigmoid(torch.tensor(found, dtype=torch.float64)).mean()
    assert honest["nats"] == pytest.approx(float(log_loss))
    assert sum(b["pairs"] for b in honest["bins"]) == 4000


def test_calibration_keeps_pairs_at_the_ends():
    found = calibration([0.0, 1e4, -1e4])
    assert [(b["from"], b["pairs"], b["right"]) for b in found["bins"]] == [(0.5, 1, 0.5), (0.95, 2, 0.5)]
    assert found["nats"] == pytest.approx((math.log(2) + 1e4) / 3)


# ---------------------------------------------------------------------------------------------------------- baselines


def test_length_and_a_constant_stand_beside_the_model():
    report = figures(RECORDS, SCORES)
    assert report["baselines"]["a constant"]["pairs"]["accuracy"] == 0.5
    assert report["baselines"]["length"]["pairs"]["accuracy"] == 3.5 / 5  # three longer ones, one tie
    assert report["baselines"]["length"]["above"] == pytest.approx(0.0)
    assert report["baselines"]["a constant"]["above"] == pytest.approx(0.2)
    assert length_of("Hello there, 你好!") == 6


def told_by_words(count: int) -> list[Feedback]:
    """Pairs in which one word tells the better reply."""
    draw, fill = random.Random(1), ["the", "cat", "sat", "on", "a", "mat", "today"]
    rows = []
    for n in range(count):
        rest = " ".join(draw.choices(fill, k=6))
        rows.append(pair(f"prompt {n}", f"{rest} gladly", f"{rest} never", where=f"f.jsonl:{n}"))
    return rows


def told_by_order(count: int) -> list[Feedback]:
    """Pairs of the same words, which a bag of them cannot tell apart."""
    return [pair(f"prompt {n}", f"first word{n} last", f"last word{n} first", where="f:1") for n in range(count)]


def test_a_model_that_is_no_better_than_words_says_so_first():
    pytest.importorskip("sklearn")
    rows = told_by_words(60)
    draw = random.Random(2)
    poor = figures(rows, [[draw.random() + 0.2, draw.random()] for _ in rows])
    assert poor["baselines"]["bag of words"]["pairs"]["accuracy"] == 1.0
    assert next(lines(poor)).startswith("The reward model does not beat a bag of words (100.0% [100.0% .. 100.0%]): it")
    perfect = figures(rows, [[1.0, 0.0]] * 60)  # a tie with the words: nothing is above nothing
    assert next(lines(perfect)).startswith("The reward model does not beat a bag of words")


def test_a_model_that_sees_more_than_words_is_above_them():
    pytest.importorskip("sklearn")
    report = figures(told_by_order(60), [[1.0, 0.0]] * 60)
    words = report["baselines"]["bag of words"]
    assert words["pairs"]["accuracy"] == 0.5 and words["above"] == 0.5 and words["interval"] == [0.5, 0.5]
    own, other = "100.0% [100.0% .. 100.0%]", "50.0% [50.0% .. 50.0%]"
    said = f"The reward model ranks {own} of 60 pairs as people did, a bag of words {other}."
    assert first_sentence(report) == said


def test_a_lead_that_may_be_chance_is_not_called_one():
    pytest.importorskip("sklearn")
    rows = told_by_order(40)
    report = figures(rows, [[1.0, 0.0]] * 21 + [[0.0, 1.0]] * 19)
    assert first_sentence(report).startswith("The reward model is not shown to beat a bag of words (50.0%")


def test_the_words_are_learnt_from_other_prompts_than_they_are_asked_about():
    """Words that stand in one prompt only teach nothing about the others: memory would have 100 %."""
    pytest.importorskip("sklearn")
    draw, rows = random.Random(3), []
    for n in range(120):
        replies = [f"only{n}a", f"only{n}b"]
        draw.shuffle(replies)
        rows += [pair(f"prompt {n}", *replies, where="f:1")] * 2  # two judgements of a prompt, never in two parts
    scores, how = baselines.by_words(rows, None, 0)
    right = sum(a > b for a, b in scores)
    assert right == 0 and all(a == b for a, b in scores) and how.startswith("cross-validated on these rows, 5 parts")
    memorised, how = baselines.by_words(rows, rows, 0)
    assert all(a > b for a, b in memorised) and how == "learnt from 240 training rows"


def test_turning_every_pair_round_turns_the_words_margins():
    pytest.importorskip("sklearn")
    rows = told_by_words(30)
    turned = [pair(r.prompt, *reversed(r.responses), where=r.where) for r in rows]
    (one, _), (other, _) = baselines.by_words(rows, None, 0), baselines.by_words(turned, None, 0)
    assert [a - b for a, b in one] == pytest.approx([a - b for a, b in other], abs=1e-6)


def test_rows_of_scores_alone_are_measured_by_correlation():
    pytest.importorskip("sklearn")
    rows = [
        scored(f"p{n}", ("good " if n % 2 else "bad ") + f"thing{n % 7}", 1.0 if n % 2 else -1.0) for n in range(60)
    ]
    report = figures(rows, [[r.scores[0] * 2 + (n % 5)] for n, r in enumerate(rows)])
    assert report["pairs"] is None and "calibration" not in report
    given = torch.tensor([[r.scores[0], r.scores[0] * 2 + (n % 5)] for n, r in enumerate(rows)])
    assert report["with_scores"]["r"] == pytest.approx(float(torch.corrcoef(given.T)[0, 1]), abs=1e-6)
    assert report["baselines"]["bag of words"]["with_scores"]["r"] > 0.95
    assert first_sentence(report).startswith("The reward model does not beat a bag of words (+1.00 [")
    assert "of 60 replies" in first_sentence(report)
    assert report["baselines"]["a constant"]["with_scores"]["r"] is None


def test_the_ceiling_is_spearman_and_brown_s():
    """Of 4000 replies of worth N(0, 1), rated by 10 people each with an error of N(0, 2): halves are reliable by
    1 / (1 + 4 / 5), the mean by 1 / (1 + 4 / 10), and correlates with the worth by the root of that."""
    draw = random.Random(1)
    worth = [draw.gauss(0, 1) for _ in range(4000)]
    rated = [[w + draw.gauss(0, 2) for _ in range(10)] for w in worth]
    found = reliability(rated, 0)
    assert found["replies"] == 4000 and found["people"] == 10
    assert found["halves"] == pytest.approx(5 / 9, abs=0.03) and found["mean_of_all"] == pytest.approx(
        10 / 14, abs=0.03
    )
    means = torch.tensor([[w, sum(some) / 10] for w, some in zip(worth, rated)])
    assert found["ceiling"] == pytest.approx(float(torch.corrcoef(means.T)[0, 1]), abs=0.02)
    assert reliability(rated, 0) == found and reliability([some[:1] for some in rated], 0) is None
    assert reliability(rated[:2], 0) is None and reliability([[1.0, 1.0, 1.0]] * 9, 0) is None
    assert reliability([*rated, [5.0]], 0) == found  # one person's rating has no other half


def test_what_people_say_of_each_other_is_in_the_report():
    draw = random.Random(2)
    rows = [
        parse_feedback(
            {"prompt": f"p{n}", "response": f"word{n}", "ratings": [n % 5, draw.choice((n % 5, 2))]}, "x", (0, 4)
        )
        for n in range(30)
    ]
    report = figures(rows, [[row.scores[0]] for row in rows])
    assert report["people"]["replies"] == 30 and 0 < report["people"]["halves"] < report["people"]["ceiling"] < 1
    [line] = [line for line in lines(report) if line.startswith("half of the people")]
    assert f"r = {report['people']['halves']:.3f} (30 replies); no model can pass" in line
    without = figures([scored("p", "a", 1.0), scored("q", "b", -1.0)], [[0.0], [1.0]])
    assert without["people"] is None and not any("half of the people" in line for line in lines(without))


def test_without_scikit_learn_the_row_says_what_to_install(monkeypatch):
    monkeypatch.setattr(baselines, "installed", lambda module: False)
    report = figures(told_by_words(3), [[1.0, 0.0]] * 3)
    said = list(lines(report))
    assert "no bag of words to compare with: pip install scikit-learn (extra 'eval')" in said[0]
    assert "above bag of words: not computed, pip install scikit-learn (extra 'eval')" in said


def test_one_prompt_has_no_interval_and_cannot_teach_its_words():
    pytest.importorskip("sklearn")
    report = figures([pair("p", "yes", "no")] * 3, [[1.0, 0.0]] * 3)
    assert report["pairs"]["interval"] is None
    assert report["baselines"]["bag of words"]["missing"] == "one prompt alone cannot be split; give --train"


def test_groups_of_few_pairs_are_marked():
    rows = told_by_words(25) + [Feedback("edit", "q", ("a", "b"), ranking=FIRST_IS_BETTER, where="f.jsonl:9")]
    said = list(lines(figures(rows, [[1.0, 0.0]] * 26)))
    assert any("kind of row: edit" in line and line.endswith("few") for line in said)
    assert not any("kind of row: pair" in line and line.endswith("few") for line in said)
