"""Several heads on one trunk: how they are made, saved and read, and what PPO makes of their scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from fastrlhf import PPOConfig, UserError, cli, inference
from fastrlhf.data.encode import Record
from fastrlhf.eval import reward_model as reward_eval
from fastrlhf.models.heads import last_hidden, sequence_scores
from fastrlhf.models.reward_folder import HEADS_FILE, Heads, heads_of
from fastrlhf.reward.ensemble import bootstrap
from fastrlhf.reward.head import SPREAD
from fastrlhf.rl.scorers import Ensemble, Scores
from tests import tiny
from tests.reward_runs import CAT, MIXED, PAIR, SCORES, config, trainer
from tests.runs import PAIRS, PROMPTS, ppo_trainer, resumed_equals_whole, reward_trainer

TEXTS = ["yes", "the moon looked at the cat", "天气"]


@pytest.fixture(scope="module")
def trained():
    t = trainer(config(ensemble=3, total_steps=6, learning_rate=1e-2))
    t.train()
    return t


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    trained.save(tmp_path_factory.mktemp("ensemble") / "final")
    return str(tmp_path_factory.getbasetemp() / "ensemble0" / "final")


def members(t) -> torch.Tensor:
    """[N, M] of the training rows."""
    rows = [row for record in t.items for row in record.rows]
    with torch.no_grad():
        return torch.cat([t.model.score(last_hidden(t.model, [row])) for row in rows])


# ------------------------------------------------------------------------------------------------------------ training


def test_heads_start_apart_near_a_constant_and_stay_apart(trained):
    start = trainer(config(ensemble=3))
    first = members(start)
    assert first.shape[1] == 3 and float(first.std(0).max()) < 4 * SPREAD  # the sample was of other rows
    assert float(first.std(1).min()) > 0
    again = trainer(config(ensemble=3))
    assert torch.equal(again.model.score.weight, start.model.score.weight)
    assert not torch.equal(trainer(config(ensemble=3, seed=1)).model.score.weight, start.model.score.weight)
    assert float(members(trained).std(1).mean()) > 0.01


def test_each_head_sees_each_record_as_often_as_its_draw_says():
    records = [Record([[i, i + 1]], None) for i in range(4000)]
    counts = torch.tensor([bootstrap(record, 4, 0) for record in records]).double()
    assert counts.mean(0).tolist() == pytest.approx([1.0] * 4, abs=0.06)  # Poisson(1): mean and variance 1
    assert counts.var(0).tolist() == pytest.approx([1.0] * 4, abs=0.12)
    assert float(torch.corrcoef(counts.T).fill_diagonal_(0).abs().max()) < 0.06
    assert bootstrap(records[0], 4, 0) == bootstrap(records[0], 4, 0) != bootstrap(records[0], 4, 9)


def test_the_gradient_of_a_head_is_that_of_the_records_it_sees():
    """One step by hand: the loss of head m is the mean of its weights times the records' losses, the whole the mean
    over heads."""
    t = trainer(config(ensemble=2, mini_batch_size=len(PAIRS)), data=PAIRS)
    loss, *_ = t.accumulate(t.items)
    gradient = t.model.score.weight.grad.clone()
    weight = t.model.score.weight.detach().clone().requires_grad_(True)
    total = 0.0
    for record in t.items:
        with torch.no_grad():
            states = torch.cat([last_hidden(t.model, [row]) for row in record.rows])
        margins = (states[0] - states[1]) @ weight.T
        counts = torch.tensor(bootstrap(record, 2, 0), dtype=torch.float32)
        total = total - (counts * torch.nn.functional.logsigmoid(margins)).mean() / len(t.items)
    total.backward()
    assert float(loss) == pytest.approx(float(total.detach()), rel=1e-5)
    torch.testing.assert_close(gradient, weight.grad, rtol=1e-4, atol=1e-6)


def test_resuming_an_ensemble_changes_no_byte(tmp_path):
    resumed_equals_whole(tmp_path, 1, make=reward_trainer, ensemble=2, total_steps=2)


# ------------------------------------------------------------------------------------------------------------- folders


def test_stock_code_and_every_reader_see_the_mean_head(trained, folder):
    stock = AutoModelForSequenceClassification.from_pretrained(folder)
    assert stock.score.weight.shape == (1, 32)
    torch.testing.assert_close(stock.score.weight[0], trained.model.score.weight.detach().mean(0))
    row = trained.items[0].rows[0]
    with torch.no_grad():
        mean = float(trained.model.score(last_hidden(trained.model, [row])).mean())
        assert float(stock(torch.tensor([row])).logits) == pytest.approx(mean, abs=1e-5)
    feedback = trained.items[0].feedback
    [score] = inference.score(folder, [feedback.prompt], [feedback.responses[0]])
    assert score == pytest.approx(mean, abs=1e-5)
    [[rescored, _]] = reward_eval.scores_of(folder, [feedback], raw=False, tell=lambda _: None)
    assert rescored == pytest.approx(mean, abs=1e-5)
    heads = heads_of(folder)
    torch.testing.assert_close(heads.weight, trained.model.score.weight.detach())
    note = json.loads(Path(folder, HEADS_FILE).read_text(encoding="utf-8"))["note"]
    assert "the head `score`, all that stock transformers reads, is their mean" in note


def test_training_goes_on_from_the_heads_or_from_their_mean(trained, folder):
    on = trainer(config(ensemble=3), model=folder, tokenizer=None)
    torch.testing.assert_close(on.model.score.weight, trained.model.score.weight)
    single = trainer(model=folder, tokenizer=None)
    torch.testing.assert_close(single.model.score.weight[0], trained.model.score.weight.mean(0))
    with pytest.raises(UserError, match="ensemble = 2: the model has 3 heads; go on with ensemble=3"):
        trainer(config(ensemble=2), model=folder, tokenizer=None)


def test_heads_made_of_one_head_are_about_it(tmp_path):
    one = trainer(config(total_steps=4, learning_rate=1e-2))
    one.train()
    one.save(tmp_path / "one")
    several = trainer(config(ensemble=4), model=str(tmp_path / "one"), tokenizer=None)
    away = several.model.score.weight - one.model.score.weight
    assert float((members(several) - members(one)).std(0).max()) < 4 * SPREAD and float(away.detach().std(0).min()) > 0


def test_linear_ensembles_keep_their_biases_and_their_readout(tmp_path):
    """head_only learns w_m'y + b_m of each head; scores move the biases apart from 0."""
    cfg = config(ensemble=3, head_only=True, readout="mean", readout_layer=1, total_steps=8, learning_rate=3e-2)
    t = trainer(cfg)
    t.train()
    t.save(tmp_path / "linear")
    heads, [learnt] = heads_of(tmp_path / "linear"), t.items[:1]
    torch.testing.assert_close(heads.bias, t.model.score.bias.detach())
    assert float(heads.bias.abs().min()) > 0
    feedback = learnt.feedback
    [score] = inference.score(str(tmp_path / "linear"), [feedback.prompt], [feedback.responses[0]])
    with torch.no_grad():
        each = sequence_scores(t.model, [learnt.rows[0]])[0]
    assert score == pytest.approx(float(each.mean()), abs=1e-5)
    [[several, _]] = reward_eval.scores_of(
        str(tmp_path / "linear"), [feedback], raw=False, tell=lambda _: None, heads=heads
    )
    assert several == pytest.approx(each.tolist(), abs=1e-5)
    on = trainer(config(ensemble=3, head_only=True), model=str(tmp_path / "linear"), tokenizer=None)
    torch.testing.assert_close(on.model.score.bias, t.model.score.bias)


def test_a_bias_that_pairs_cannot_teach_stays_untrained():
    t = trainer(config(ensemble=2, head_only=True), data=[PAIR, PAIR])
    assert not t.model.score.bias.requires_grad and t.model.score.weight.requires_grad


def test_an_adapter_folder_and_the_centre_keep_their_heads(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    replies = [{"prompt": CAT, "response": text} for text in TEXTS]
    cfg = config(ensemble=2, lora=2, total_steps=2, center_rewards=True, learning_rate=1e-2)
    t = trainer(cfg, model=str(tmp_path / "base"), tokenizer=None, sft_data=replies)
    t.train()
    t.save(tmp_path / "adapter", adapter=True)
    t.save(tmp_path / "merged")
    means = inference.score(str(tmp_path / "merged"), [CAT] * 3, TEXTS)
    assert sum(means) == pytest.approx(0.0, abs=1e-4)
    assert inference.score(str(tmp_path / "adapter"), [CAT] * 3, TEXTS) == pytest.approx(means, abs=1e-4)
    ppo = dict(policy=str(tmp_path / "base"), tokenizer=None, prompts=PROMPTS[:2], advantage="grpo")
    ppo |= {"samples_per_prompt": 2, "rollout_batch_size": 4, "total_steps": 1}
    found = {}
    for name, lora in (("adapter", 2), ("merged", None)):  # on the policy's base, and as a model of its own
        t = ppo_trainer(**ppo, reward=str(tmp_path / name), lora=lora, reward_ensemble="min")
        rollout = t.rollout(t.prompts, 2, purpose="rollout")
        found[name] = t.scorer(rollout)
    assert found["adapter"].values == pytest.approx(found["merged"].values, abs=1e-4)
    assert found["adapter"].spread == pytest.approx(found["merged"].spread, abs=1e-5) and found["merged"].spread > 0


# ----------------------------------------------------------------------------------------------------------------- PPO


@pytest.mark.parametrize("how", ["mean", "min", "mean_minus_sd"])
def test_what_becomes_of_the_scores_of_the_heads(how):
    fields = {"reward_sd_coef": 0.5} if how == "mean_minus_sd" else {}
    ensemble = Ensemble(torch.nn.Linear(1, 3), PPOConfig(reward_ensemble=how, **fields))
    scores = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 0.0], [1.0, float("nan"), 1.0]])
    deviation = 7**0.5  # of 1, 2, 6: mean 3, (4 + 1 + 9) / 2
    expected = {"mean": 3.0, "min": 1.0, "mean_minus_sd": 3 - 0.5 * deviation}[how]
    combined = ensemble.combined(scores)
    assert combined[:2].tolist() == pytest.approx([expected, 0.0]) and bool(combined[2].isnan())
    assert ensemble.take_spread().tolist() == pytest.approx([deviation, 2.0])
    assert ensemble.take_spread().tolist() == [0.0, 0.0]


def scores_in_ppo(folder: str, how: str, **fields) -> Scores:
    t = ppo_trainer(reward=folder, reward_ensemble=how, **fields)
    return t.scorer(t.rollout(t.prompts[:4], 2, purpose="rollout"))


def test_ppo_is_more_careful_where_the_heads_disagree(folder):
    """The same rollout: min below mean; mean - c sd as far below it as c says; a sum of rewards weighs the
    deviation."""
    mean, low = scores_in_ppo(folder, "mean"), scores_in_ppo(folder, "min")
    careful = scores_in_ppo(folder, "mean_minus_sd", reward_sd_coef=2.0)
    assert all(a > b for a, b in zip(mean.values, low.values, strict=True))
    gaps = [a - b for a, b in zip(mean.values, careful.values, strict=True)]
    assert sum(gaps) / len(gaps) == pytest.approx(2 * mean.spread, rel=1e-4) and max(gaps) > 1.01 * min(gaps)
    summed = scores_in_ppo([("rm", -3.0, folder), ("length", 0.1, lambda prompts, responses: [1.0] * 8)], "mean")
    assert summed.spread == pytest.approx(3 * mean.spread, rel=1e-4)
    assert summed.values == pytest.approx([0.1 - 3 * value for value in mean.values], rel=1e-4)


def test_the_deviation_is_a_metric_of_a_step(folder):
    t = ppo_trainer(reward=folder, total_steps=1)
    step = next(iter(t))
    assert step.metrics["reward/ensemble_sd"] > 0
    assert "reward/ensemble_sd" not in next(iter(ppo_trainer(total_steps=1))).metrics
    assert t.value_model.score.weight.shape == (1, 32)  # the critic starts from the mean head


# ------------------------------------------------------------------------------------------------------ what is refused


def test_an_ensemble_that_is_none_is_one_sentence(folder, tmp_path):
    t = trainer(data=[PAIR, SCORES])
    t.save(tmp_path / "one")
    with pytest.raises(UserError, match=r"reward_ensemble = min: reward '.*one' has one head; train one with fastrlhf"):
        ppo_trainer(reward=str(tmp_path / "one"), reward_ensemble="min")
    with pytest.raises(UserError, match="reward_ensemble = min: reward is no folder of a reward model"):
        ppo_trainer(reward_ensemble="min")
    with pytest.raises(UserError, match="reward_sd_coef = 2: reward_ensemble = min subtracts nothing"):
        PPOConfig(reward_ensemble="min", reward_sd_coef=2.0)


@pytest.mark.parametrize(
    "damage", ["", "{}", '{"weight": [[1.0]], "bias": [0.0]}', '{"weight": [[1], [NaN]], "bias": [0, 0]}']
)
def test_damaged_heads_are_named(folder, damage, tmp_path):
    (tmp_path / HEADS_FILE).write_text(damage)
    with pytest.raises(UserError, match=f"{HEADS_FILE}: holds no `weight` and `bias` of two heads or more"):
        heads_of(tmp_path)


def test_heads_of_another_model_are_refused():
    with pytest.raises(UserError, match=f"{HEADS_FILE}: its heads read 4 states and the model has 8"):
        Heads(torch.zeros(2, 4), torch.zeros(2)).beside(torch.nn.Linear(8, 1))


def test_every_kind_of_record_teaches_every_head():
    for row in (r for r in MIXED if "score" not in r):  # one score alone is refused
        t = trainer(config(ensemble=2, mini_batch_size=1), data=[row, row])
        before = t.model.score.weight.detach().clone()
        t.train()
        seen = torch.tensor(bootstrap(t.items[0], 2, 0)) > 0
        changed = (t.model.score.weight.detach() != before).any(1)
        assert changed.tolist() == seen.tolist() or not seen.any()


def test_a_plan_of_ppo_counts_an_ensemble_as_a_reward_model(folder, tmp_path, capsys):
    tiny.llama().save_pretrained(tmp_path / "sft")
    tiny.tokenizer().save_pretrained(tmp_path / "sft")
    recipe = f"policy={tmp_path}/sft reward={folder} rollout_batch_size=4 mini_batch_size=4 max_new_tokens=8".split()
    assert cli.main(["plan", "--stage", "ppo", *recipe, "reward_ensemble=min", "--gpu-memory", "24GiB"]) == 0
    assert "rollout" in capsys.readouterr().out
