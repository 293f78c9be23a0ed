"""The reward model: its losses against brute force, what it trains, what it reports, and who can load it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import permutations

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
)

from fastrlhf import RewardTrainer
from fastrlhf.models.heads import sequence_scores
from fastrlhf.models.reward_folder import HeldOut, held_out_of
from fastrlhf.reward.head import SPREAD
from fastrlhf.reward.losses import preference_loss, record_loss
from fastrlhf.reward_model import MARGIN_EDGES, margin_histogram
from tests import tiny
from tests.reward_runs import (
    CAT,
    EDIT,
    MIXED,
    MODELS,
    MOON,
    PAIR,
    RANKING,
    SCORE,
    SCORES,
    config,
    distance,
    events,
    one_step,
    same,
    scores_of,
    trainer,
    weights,
)
from tests.runs import leave_after, ppo_trainer

# -------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("margin", [None, 0.0, 0.5, 3.0])
@pytest.mark.parametrize("gap", [-2.0, 0.0, 0.3, 5.0])
def test_two_responses_are_bradley_terry(gap, margin):
    scores = torch.tensor([1.0, 1.0 + gap])
    expected = math.log1p(math.exp(-(gap - (margin or 0.0))))
    assert float(preference_loss(scores, ((1,), (0,)), margin)) == pytest.approx(expected, rel=1e-5)
    assert float(preference_loss(scores.flip(0), ((0,), (1,)), margin)) == pytest.approx(expected, rel=1e-5)


def plackett_luce(scores: list[float], order: Sequence[int]) -> float:
    """Probability of an order: the best is drawn among all, the next among the rest, and so on."""
    weights = [math.exp(scores[i]) for i in order]
    return math.prod(weights[i] / sum(weights[i:]) for i in range(len(order)))


@pytest.mark.parametrize("scores", [[0.2, -1.0, 0.7], [3.0, 3.0, -2.0, 0.5]])
def test_rankings_are_plackett_luce(scores):
    """The loss is averaged over the K-1 stages; over all rankings the probabilities add up to 1."""
    total = 0.0
    for order in permutations(range(len(scores))):
        loss = float(preference_loss(torch.tensor(scores), [(i,) for i in order]))
        expected = plackett_luce(scores, order)
        assert math.exp(-loss * (len(scores) - 1)) == pytest.approx(expected, rel=1e-5)
        total += math.exp(-loss * (len(scores) - 1))
    assert total == pytest.approx(1.0, abs=1e-5)


def test_ties_are_not_compared_with_each_other():
    """Two best of equal rank, each against the third alone; two worst, the best against both."""
    s = torch.tensor([0.5, -0.3, 1.2], requires_grad=True)
    a, b, c = (math.exp(x) for x in s.tolist())
    first = preference_loss(s, ((0, 1), (2,)))
    assert float(first.detach()) == pytest.approx(-(math.log(a / (a + c)) + math.log(b / (b + c))) / 2, rel=1e-5)
    assert float(preference_loss(s, ((2,), (1, 0))).detach()) == pytest.approx(-math.log(c / (a + b + c)), rel=1e-5)
    swapped = preference_loss(s[[1, 0, 2]], ((0, 1), (2,)))
    assert float(swapped.detach()) == pytest.approx(float(first.detach()))


@pytest.mark.parametrize("ranking", [((0,), (1,)), ((0,), (1, 2)), ((0,), (2,), (1,))])
@pytest.mark.parametrize("gap", [15.0, 100.0, 1e4])
def test_a_badly_misranked_response_keeps_its_gradient(ranking, gap):
    """log(sigmoid + 1e-5) has gradient -.03 at -15 instead of -1; log(1 + exp) is infinite at 100."""
    others = [gap] * (2 if len(ranking) == 2 and len(ranking[1]) == 1 else 3)
    scores = torch.tensor([0.0, *others[1:]], requires_grad=True)
    terms = len(ranking) - 1
    loss = preference_loss(scores, ranking) * terms
    loss.backward()
    assert loss.item() == pytest.approx(gap, rel=0.1)
    assert float(scores.grad[0]) == pytest.approx(-1.0, abs=1e-4)
    assert torch.isfinite(scores.grad).all()


def test_a_rightly_ranked_response_is_finite_too():
    scores = torch.tensor([1e4, 0.0, -1e4], requires_grad=True)
    loss = preference_loss(scores, ((0,), (1,), (2,)))
    loss.backward()
    assert loss == 0 and torch.isfinite(scores.grad).all()


def test_scores_are_read_on_their_range():
    (record,) = trainer(data=[SCORES]).items
    assert record.feedback.scores == (-1.0, 1.0, 0.0)
    wide, _ = trainer(config(score_range=(0, 10)), data=[{**SCORE, "score": 2.5}, {**SCORE, "prompt": MOON}]).items
    assert wide.feedback.scores == (-0.5,)


def test_an_edit_is_a_pair_of_edited_over_original():
    edit, pair = trainer(data=[EDIT, {"prompt": CAT, "chosen": EDIT["edited"], "rejected": EDIT["response"]}]).items
    assert edit.rows == pair.rows
    scores = torch.tensor([0.3, 1.1])
    assert record_loss(scores, edit.feedback) == record_loss(scores, pair.feedback)
    assert edit.feedback.ordered_pairs() == [(0, 1)]


def test_pairs_that_a_record_implies():
    pair, ranking, score, scores = (r.feedback for r in trainer(data=[PAIR, RANKING, SCORE, SCORES]).items)
    assert pair.ordered_pairs() == [(0, 1)] and score.ordered_pairs() == []
    assert sorted(ranking.ordered_pairs()) == [(0, 1), (2, 0), (2, 1), (2, 3), (3, 1)]
    assert sorted(scores.ordered_pairs()) == [(1, 0), (1, 2), (2, 0)]
    tied = trainer(data=[{**SCORES, "scores": [2, 2, 3]}]).items[0].feedback
    assert sorted(tied.ordered_pairs()) == [(2, 0), (2, 1)]


# ------------------------------------------------------------------------------------------------------------ one step


@MODELS
def test_the_loss_of_a_step_is_the_mean_over_records(make):
    """Each record weighs the same, whether it holds one response or four."""
    t = trainer(model=make())
    expected = []
    for record in t.items:
        scores = torch.tensor(scores_of(t, record.rows))
        expected.append(float(t.link.loss(scores, record.feedback).detach()))
    assert len(expected) == len(MIXED)
    assert t.train()["loss/train"] == pytest.approx(sum(expected) / len(expected), rel=1e-5)


@MODELS
@pytest.mark.parametrize("budget", [1, 32, 64])
def test_micro_batching_changes_nothing(make, budget):
    loss, grads = one_step(config(), make())
    other_loss, other_grads = one_step(config(micro_batch_tokens=budget), make())
    assert other_loss == pytest.approx(loss, rel=1e-6) and distance(other_grads, grads) < 2e-6


@MODELS
def test_order_of_a_batch_changes_nothing(make):
    loss, grads = one_step(config(), make())
    other_loss, other_grads = one_step(config(), make(), MIXED[::-1])
    assert other_loss == pytest.approx(loss, rel=1e-6) and distance(other_grads, grads) < 2e-6


def test_gradient_checkpointing_recomputes_and_changes_nothing():
    loss, grads = one_step(config(), tiny.llama())
    cfg, calls = config(gradient_checkpointing=True, max_grad_norm=1e9), []
    t, other = trainer(cfg), []
    t.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    t.optimizer.inner.register_step_pre_hook(lambda *_: other.extend(p.grad.clone() for p in t.optimizer.params))
    assert t.train()["loss/train"] == loss and distance(other, grads) < 1e-6 and len(calls) == 2


def test_number_of_optimizer_steps():
    t = trainer(config(total_steps=None, epochs=2, mini_batch_size=4, micro_batch_tokens=32))
    done = []
    t.optimizer.inner.register_step_post_hook(lambda *_: done.append(1))
    assert len(list(t)) == len(done) == t.total_steps == 3


def test_head_only_trains_the_head_alone():
    model = tiny.llama()
    t = trainer(config(head_only=True, total_steps=5, learning_rate=1e-2), model=model)
    before, head = weights(t.model.model), t.model.score.weight.detach().clone()
    t.train()
    assert same(before, weights(t.model.model)) and same(before, weights(model.model))
    assert not torch.equal(head, t.model.score.weight)
    assert sum(len(group["params"]) for group in t.optimizer.inner.param_groups) == 2  # w and b


def test_the_trunk_is_a_copy_and_the_head_starts_small():
    policy = tiny.llama()
    before = weights(policy)
    t = trainer(model=policy)
    assert same(weights(t.model.model), weights(policy.model))
    head = t.model.score.weight.detach().clone()
    first = torch.tensor(scores_of(t, [row for record in t.items for row in record.rows]))
    assert float(first.mean()) == pytest.approx(0, abs=1e-4)
    assert 0 < float(first.std(unbiased=False)) <= 1.001 * SPREAD
    t.train()
    assert same(before, weights(policy)) and not same(weights(t.model.model), weights(policy.model))
    assert torch.equal(trainer().model.score.weight, head)
    assert not torch.equal(trainer(config(seed=1)).model.score.weight, head)


def test_bf16_trains_on_the_cpu(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "m")
    tiny.tokenizer().save_pretrained(tmp_path / "m")
    cfg = config(total_steps=10, learning_rate=3e-3, dtype="bf16")
    t = RewardTrainer(cfg, model=str(tmp_path / "m"), data=MIXED)
    losses = [step.metrics["loss/train"] for step in t]
    assert t.model.dtype == torch.bfloat16 and t.optimizer.masters[0].dtype == torch.float32
    assert sequence_scores(t.model, [[5, 6]]).dtype == torch.float32
    assert losses[-1] < 0.7 * losses[0]


# ---------------------------------------------------------------------------------------------- what it reports


def test_held_out_figures_against_hand_computation(tmp_path):
    held = [PAIR, RANKING, SCORES, {**SCORE, "score": 2}]
    t = trainer(config(output_dir=str(tmp_path / "run"), learning_rate=0), eval_data=held)
    scores = [scores_of(t, r.rows) for r in t.eval_records]
    pair, ranking, many, single = scores
    margins = [pair[0] - pair[1]]
    margins += [ranking[i] - ranking[j] for i, j in [(2, 0), (2, 3), (2, 1), (0, 1), (3, 1)]]
    margins += [many[i] - many[j] for i, j in [(1, 0), (1, 2), (2, 0)]]
    found = t.evaluate()
    assert found["accuracy/eval"] == pytest.approx(sum(m > 0 for m in margins) / 9)
    assert found["margin/eval"] == pytest.approx(sum(margins) / 9, rel=1e-4)
    both = zip(scores, t.eval_records, strict=True)
    losses = [float(t.link.loss(torch.tensor(s), r.feedback).detach()) for s, r in both]
    assert found["loss/eval"] == pytest.approx(sum(losses) / 4, rel=1e-5)
    x, y = [*many, *single], [-1.0, 1.0, 0.0, -0.5]
    mean_x, mean_y = sum(x) / 4, sum(y) / 4
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    spread = math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))
    assert found["correlation/eval"] == pytest.approx(covariance / spread, rel=1e-4)
    (event,) = events(tmp_path / "run", "margins")
    assert sum(event["histogram"].values()) == 9
    positive = sum(n for name, n in event["histogram"].items() if float(name.split("..")[0]) >= 0)
    assert positive == sum(m >= 0 for m in margins)


def test_margins_are_counted_between_the_edges():
    bins = margin_histogram([-9.0, -0.5, -0.1, 0.0, 0.2, 0.5, 3.0, 4.0, 50.0])
    assert len(bins) == len(MARGIN_EDGES) + 1
    assert {name: n for name, n in bins.items() if n} == {
        "-inf..-4": 1, "-0.5..0": 2, "0..0.5": 2, "0.5..1": 1, "2..4": 1, "4..inf": 2,
    }  # fmt: skip


def test_what_cannot_be_measured_is_left_out():
    """Single scores have no pairs, pairs have no correlation; the best model goes by the loss then."""
    scores = trainer(data=MIXED, eval_data=[SCORE, {**SCORE, "score": 1}])
    assert scores.evaluate().keys() == {"loss/eval", "correlation/eval"} and scores.best_metric == ("loss/eval", False)
    pairs = trainer(data=MIXED, eval_data=[PAIR])
    assert "correlation/eval" not in pairs.evaluate() and pairs.best_metric == ("accuracy/eval", True)
    assert trainer().evaluate() == {}


def test_the_best_model_is_kept_for_scores_alone(tmp_path):
    cfg = config(eval_every=1, total_steps=2, output_dir=str(tmp_path / "run"))
    trainer(cfg, data=MIXED, eval_data=[SCORE]).train()
    assert (tmp_path / "run" / "best" / "config.json").exists()


def alarms(run) -> list[tuple[int, str]]:
    return [(e["step"], e["message"]) for e in events(run, "alarm")]


def record_of(folder) -> dict:
    return json.loads((folder / "held_out.json").read_text())


def test_a_model_that_ranks_by_chance_is_an_alarm_of_its_run_and_of_ppo_against_it(tmp_path):
    """learning_rate 0: the new head ranks at random, and for one of the two pairs it is wrong."""
    run = tmp_path / "reward"
    both = [PAIR, {**PAIR, "chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}]
    t = trainer(config(learning_rate=0, eval_every=1, total_steps=2, output_dir=str(run)), data=both, eval_data=both)
    t.train()
    t.save(run / "final")
    record = {"rows": 2, "step": 2, "pairs": 2, "accuracy": 0.5, "correlation": None}
    assert record_of(run / "final") == record and record_of(run / "best") == {**record, "step": 1}
    said = "the reward model ranks 50.0% of 2 held-out pairs as people did (50% is chance, an alarm below 60%)"
    assert [(step, message.partition(";")[0]) for step, message in alarms(run)] == [(2, said)]
    policies = {
        "by folder": str(run / "final"),
        "loaded": AutoModelForSequenceClassification.from_pretrained(run / "final"),
    }
    parts = [("a", 1.0, str(run / "final")), ("b", 1.0, lambda prompts, responses: [0.0] * len(responses))]
    for name, reward in {**policies, "part of a sum": parts}.items():
        ppo = ppo_trainer(reward=reward, total_steps=1, output_dir=str(tmp_path / name))
        ppo.train()
        [(step, message)] = alarms(tmp_path / name)
        assert step == 0 and "ranks 50.0% of 2 held-out pairs as people did" in message, name


def test_a_model_without_held_out_rows_is_an_alarm_a_good_one_none_and_one_of_elsewhere_a_line(tmp_path, capsys):
    cfg = config(total_steps=1, output_dir=str(tmp_path / "none"))
    t = trainer(cfg, data=MIXED)
    t.train()
    t.save(tmp_path / "none" / "final")
    [(step, message)] = alarms(tmp_path / "none")
    assert step == 0 and message.startswith("the reward model has no held-out rows, so nobody knows")
    folder = tmp_path / "none" / "final"
    for text, said in ((HeldOut(9, 1, 9, 0.9).text(), ""), ("{", "reward: '{}' brings no record of held-out pairs")):
        (folder / "held_out.json").write_text(text)
        capsys.readouterr()
        next(iter(ppo_trainer(reward=str(folder), total_steps=1)))
        out = capsys.readouterr().out
        assert "alarm" not in out and said.format(folder) in out and ("no record" in out) == bool(said)


NO_RECORDS = ["{", "[]", "7", '{"rows": "many"}', '{"rows": -1}', '{"accuracy": NaN}', '{"x": 1}', None]


@pytest.mark.parametrize("text", NO_RECORDS)
def test_a_record_that_no_training_wrote_is_none(tmp_path, text):
    (tmp_path / "held_out.json").write_text(HeldOut(3, accuracy=0.5).text())
    assert held_out_of(str(tmp_path)) == HeldOut(3, accuracy=0.5)
    (tmp_path / "held_out.json").unlink() if text is None else (tmp_path / "held_out.json").write_text(text)
    assert held_out_of(str(tmp_path)) is None


def test_what_was_measured_survives_a_resume_and_goes_with_an_adapter(tmp_path):
    cfg = config(total_steps=2, eval_every=2, save_every=1, lora=2, output_dir=str(tmp_path / "run"))
    leave_after(trainer(cfg, data=MIXED, eval_data=[PAIR, SCORE, {**SCORE, "score": 1}]), 2)
    again = trainer(cfg.replace(resume=True), data=MIXED, eval_data=[PAIR, SCORE, {**SCORE, "score": 1}])
    again.save(tmp_path / "adapter", adapter=True)
    record = record_of(tmp_path / "adapter")
    assert (record["rows"], record["step"], record["pairs"]) == (3, 2, 1) and record["accuracy"] in (0.0, 1.0)
    assert -1 <= record["correlation"] <= 1


def preference(count: int, seed: int) -> list[dict]:
    """The reply that says yes is preferred, whatever else is said."""
    draw = torch.Generator().manual_seed(seed)
    words = tiny.TEXTS[0].split()
    rows = []
    for i in range(count):
        said = [words[int(k)] for k in torch.randint(len(words), (3,), generator=draw)]
        yes, no = (" ".join([*said[: i % 3], word, *said[i % 3 :]]) for word in ("yes", "no"))
        rows.append({"prompt": tiny.chat(f"{said[0]} {i}"), "chosen": yes, "rejected": no})
    return rows


def test_it_learns_a_simple_preference(tmp_path):
    cfg = config(
        total_steps=40, mini_batch_size=16, learning_rate=5e-3, eval_every=20, output_dir=str(tmp_path / "run")
    )
    t = trainer(cfg, data=preference(64, 0), eval_data=preference(20, 1))
    *_, last = t
    assert last.metrics["accuracy/eval"] == 1.0 and last.metrics["loss/eval"] < 0.1
    assert last.metrics["accuracy/train"] == 1.0
    (told,) = events(tmp_path / "run", "agreement")  # of the last evaluation alone
    assert told["step"] == 40 and told["figures"]["pairs"] == {"pairs": 20, "accuracy": 1.0, "interval": [1.0, 1.0]}
    assert told["message"].startswith("held-out rows: The reward model ")
    assert told["figures"]["baselines"]["a constant"]["above"] == 0.5
    best = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "best")
    assert best.config.num_labels == 1


def test_judgements_of_one_prompt_are_held_out_together():
    rows = [{"prompt": tiny.chat(f"the cat {i // 4}"), "chosen": "yes", "rejected": f"no {i}"} for i in range(40)]
    t = trainer(config(eval_fraction=0.2), data=rows)
    prompts = [{json.dumps(r.feedback.prompt) for r in part} for part in (t.items, t.eval_records)]
    assert len(t.items) == 32 and len(t.eval_records) == 8 and t.sampler.n == 32
    assert not prompts[0] & prompts[1]


def test_groups_stay_within_the_budget_padding_included():
    """A pair of long replies beside rankings of many short ones: all rows of a group are as long as its longest."""
    pairs = [{"prompt": p, "chosen": "the answer is yes " * 6, "rejected": "no"} for p in tiny.PROMPTS]
    many = [{"prompt": p, "responses": ["yes", "no", "cat", "moon", "thank you"], "ranking": [0, 1, 2, 3, 4]}
            for p in tiny.PROMPTS]  # fmt: skip
    t = trainer(config(micro_batch_tokens=400), data=pairs + many)
    groups = list(t.micro_batches(t.items))
    rows = [[row for record in group for row in record.rows] for group in groups]
    assert sum(map(len, groups)) == len(t.items) and len(groups) > 2 and max(map(len, groups)) > 1
    assert all(len(group) == 1 or len(r) * max(map(len, r)) <= 400 for group, r in zip(groups, rows, strict=True))
