"""Label smoothing, margins and the language-model loss of a reward model: the numbers by hand, and what they change."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from fastrlhf import UserError, cli
from fastrlhf.config.stages import RewardConfig
from fastrlhf.data.feedback import parse_feedback
from fastrlhf.models.loading import load_reward_model
from fastrlhf.reward.losses import preference_loss, record_loss, smoothed
from tests import tiny
from tests.reward_runs import (
    CAT,
    EDIT,
    MIXED,
    MODELS,
    PAIR,
    RANKING,
    SCORE,
    SCORES,
    config,
    one_step,
    scores_of,
    trainer,
)


def test_smoothed_labels_by_hand():
    for odds in (-3.0, 0.0, 0.4, 20.0):
        p = 1 / (1 + math.exp(-odds))
        by_hand = -0.9 * math.log(p) - 0.1 * math.log1p(-p) if odds < 10 else 0.1 * odds
        assert float(smoothed(torch.tensor(odds), 0.1)) == pytest.approx(by_hand, abs=1e-6)
        assert float(smoothed(torch.tensor(odds), 0.0)) == float(-F.logsigmoid(torch.tensor(odds)))
    # The best log-odds of a label that is wrong one time in ten are log 9, however long one trains.
    odds = torch.tensor(math.log(9.0), requires_grad=True)
    smoothed(odds, 0.1).backward()
    assert float(odds.grad) == pytest.approx(0.0, abs=1e-7)


def test_smoothing_and_margin_of_a_pair_and_the_stages_of_a_ranking():
    scores = torch.tensor([0.3, -0.2, 1.1])
    pair = preference_loss(scores[:2], ((0,), (1,)), 0.7, 0.2)
    assert float(pair) == pytest.approx(float(smoothed(torch.tensor(0.5 - 0.7), 0.2)))
    stages = [smoothed(scores[2] - torch.logsumexp(scores[:2], 0), 0.2), smoothed(scores[0] - scores[1], 0.2)]
    assert float(preference_loss(scores, ((2,), (0,), (1,)), smoothing=0.2)) == pytest.approx(float(sum(stages)) / 2)


def test_of_several_heads_each_has_the_loss_that_it_would_have_alone():
    torch.manual_seed(0)
    for row in (PAIR, RANKING, SCORES, SCORE, EDIT):
        feedback = parse_feedback(row, "here")
        heads = torch.randn(len(feedback.responses), 3)
        given = feedback.scores or ()
        together = record_loss(heads, feedback, 2 * heads, given, 0.1)
        alone = [record_loss(h, feedback, 2 * h, given, 0.1) for h in heads.T]
        torch.testing.assert_close(together, torch.stack(alone))


def test_label_smoothing_keeps_a_model_from_being_sure():
    """One pair, a hundred times: the margin grows on and on, with smoothing it stays near log((1 - a) / a)."""
    rows = [PAIR]

    def margin(smoothing: float) -> float:
        t = trainer(config(total_steps=60, mini_batch_size=1, learning_rate=3e-3, label_smoothing=smoothing), data=rows)
        t.train()
        better, worse = scores_of(t, t.items[0].rows)
        return better - worse

    assert margin(0.2) == pytest.approx(math.log(4), abs=0.2)
    assert margin(0.0) > 3.0


# ------------------------------------------------------------------------------------------------------- the LM loss


def log_likelihood(t, model) -> float:
    """Mean log p of the tokens of the reply in the first record that it calls best, by stock code."""
    record = t.items[0]
    best = record.rows[record.feedback.ranking[0][0]]
    with torch.no_grad():
        log_probs = model(torch.tensor([best])).logits[0, :-1].log_softmax(-1)
    targets = torch.tensor(best[1:])
    return float(log_probs.gather(1, targets[:, None])[record.prompt_tokens - 1 :].mean())


@MODELS
@pytest.mark.parametrize("row", [PAIR, EDIT, RANKING], ids=["pair", "edit", "ranking"])
def test_the_loss_is_that_of_eq_2(make, row):
    """Loss and gradients are those of preference and beta times the mean log-likelihood of the best reply; tied
    embeddings (GPT-2) get gradients from both ends."""
    model = make()
    plain, gradients = one_step(config(mini_batch_size=1), make(), [row])
    mixed, both = one_step(config(mini_batch_size=1, lm_coef=0.5), make(), [row])
    t = trainer(config(mini_batch_size=1), model=make(), data=[row])
    assert mixed - plain == pytest.approx(-0.5 * log_likelihood(t, model), rel=1e-5)
    record = t.items[0]
    best = record.rows[record.feedback.ranking[0][0]]
    log_probs = model(torch.tensor([best])).logits[0, :-1].log_softmax(-1)
    nll = -log_probs.gather(1, torch.tensor(best[1:])[:, None])[record.prompt_tokens - 1 :].mean()
    (0.5 * nll).backward()
    trunk = dict(model.base_model.named_parameters())
    names = [name for name, _ in t.model.named_parameters()]
    prefix = f"{t.model.base_model_prefix}."
    for name, a, b in zip(names, gradients, both, strict=True):
        own = trunk.get(name.removeprefix(prefix)) if name.startswith(prefix) else None
        expected = a if own is None or own.grad is None else a + own.grad
        torch.testing.assert_close(b, expected, rtol=1e-4, atol=1e-5)


def test_micro_batches_and_kinds_without_a_best_reply_change_no_share(capsys):
    """Scores have no best reply; each other record counts once, however the rows are grouped."""
    whole, together = one_step(config(lm_coef=1.0), tiny.llama())
    parts, apart = one_step(config(lm_coef=1.0, micro_batch_tokens=1), tiny.llama())
    assert whole == pytest.approx(parts, rel=1e-5)
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    metrics = trainer(config(lm_coef=1.0)).train()
    t = trainer()
    wanted = []
    for record in t.items:
        if record.feedback.ranking:
            t.items[0] = record
            wanted.append(-log_likelihood(t, tiny.llama()))
    assert metrics["loss/lm"] == pytest.approx(sum(wanted) / len(wanted), rel=1e-4) and len(wanted) == 4
    assert "loss/lm" not in trainer().train()


def test_the_trunk_keeps_its_language(tmp_path):
    """After training on preferences the trunk says good replies no less likely with the LM loss, and less without."""
    said = {}
    for coef in (0.0, 1.0):
        t = trainer(config(total_steps=25, mini_batch_size=2, learning_rate=3e-3, lm_coef=coef), data=[PAIR, EDIT])
        before = log_likelihood(t, tiny.llama())
        t.train()
        language = tiny.llama()
        language.model.load_state_dict(t.model.model.state_dict())
        said[coef] = log_likelihood(t, language) - before
    assert said[1.0] > 1.0 and said[1.0] > said[0.0] + 1.0


def test_with_adapters_too():
    t = trainer(config(lora=2, lm_coef=1.0, total_steps=8, mini_batch_size=2, learning_rate=1e-2), data=[PAIR, EDIT])
    losses = [step.metrics["loss/lm"] for step in t]
    assert losses[-1] < losses[0] - 0.1


def test_the_language_head_of_a_loaded_model_takes_no_gradient():
    model = tiny.llama()
    trainer(config(lm_coef=1.0), model=model).train()
    assert all(p.grad is None for p in model.parameters())


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"ensemble": 1}, "ensemble = 1: one head has no other to differ from; use 2 or more, or none"),
        ({"label_smoothing": 0.5}, "label_smoothing = 0.5: expected a number >= 0 and < 0.5"),
        ({"weakest": "smooth"}, "weakest = smooth: needs to know how much; set label_smoothing above 0"),
        ({"weakest_share": 0.1}, "weakest_share = 0.1: weakest = keep leaves all records as they are"),
        ({"head_only": True, "lm_coef": 1.0}, "lm_coef = 1: head_only = true trains nothing below the head"),
    ],
)
def test_options_that_cannot_be_are_one_sentence(fields, problem):
    with pytest.raises(UserError) as error:
        RewardConfig(**fields)
    assert problem in str(error.value) and len(str(error.value).splitlines()) == 1


def test_an_lm_loss_that_nothing_could_learn_is_refused(tmp_path):
    with pytest.raises(UserError, match="lm_coef = 1: data has scores alone"):
        trainer(config(lm_coef=1.0), data=[SCORE, SCORES])
    t = trainer(data=MIXED)
    t.save(tmp_path / "rm")
    with pytest.raises(UserError, match="lm_coef = 1: model is a reward model, which has no language-model head"):
        trainer(config(lm_coef=1.0), model=str(tmp_path / "rm"), tokenizer=None)
    assert load_reward_model(str(tmp_path / "rm")).score.out_features == 1


def test_a_prompt_without_tokens_has_no_first_target():
    row = {"prompt": CAT, "chosen": "yes", "rejected": "no"}
    t = trainer(config(lm_coef=1.0, mini_batch_size=1), data=[row])
    assert t.items[0].prompt_tokens > 1 and math.isfinite(t.train()["loss/lm"])


def test_a_plan_says_what_of_them_it_leaves_out(tmp_path, capsys):
    tiny.llama().save_pretrained(tmp_path / "sft")
    tiny.tokenizer().save_pretrained(tmp_path / "sft")
    recipe = ["plan", "--stage", "reward", f"model={tmp_path}/sft", "max_tokens=64", "--gpu-memory", "24GiB"]
    assert cli.main([*recipe, "lm_coef=1", "ensemble=3", "weakest=flip", "strength_margin=true"]) == 0
    out = capsys.readouterr().out
    assert "lm_coef: its head and the log-probs" in out and "ensemble: its heads are counted as one" in out
