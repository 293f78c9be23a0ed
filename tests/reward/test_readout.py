"""head_only: where the linear model reads, features that are read once, its bias, and who reads the folder after it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from fastrlhf import PPOConfig, RewardConfig, RewardTrainer, UserError, inference
from fastrlhf.data.feedback import parse_feedback
from fastrlhf.eval.reward_model import scores_of
from fastrlhf.models import heads
from fastrlhf.models.heads import Readout, row_states, sequence_scores
from fastrlhf.models.loading import load_reward_model
from fastrlhf.models.reward_folder import BIAS_FILE, READOUT_FILE, as_kept, kept_readout, learnt_bias_of
from fastrlhf.models.token_batch import TokenRows
from fastrlhf.plan.phases import Measurer, Target
from fastrlhf.reward import features
from fastrlhf.reward.features import Features, candidates, choose_readout
from fastrlhf.rl.scorers import encode_pairs
from fastrlhf.rollout.result import Texts
from tests import tiny
from tests.reward_runs import CAT, EDIT, MOON, PAIR, SCORE, config, trainer
from tests.runs import leave_after, ppo_trainer

ROWS = [[5, 6, 7, 8, 9], [10, 11], [12]]
WORDS = [" yes", " no", " moon", " cat", " the", " answer", " weather", "天气", "谢谢", ";"]
LINEAR = {"head_only": True, "learning_rate": 1e-2}
MEAN_OF_1 = {**LINEAR, "readout": "mean", "readout_layer": 1}


def linear(fields: dict, **inputs: object) -> RewardTrainer:
    return trainer(config(total_steps=4, **fields), **inputs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A linear reward model on the mean of layer 1, trained on all kinds of feedback."""
    path = tmp_path_factory.mktemp("linear") / "final"
    t = linear(MEAN_OF_1)
    t.train()
    t.save(path)
    return str(path)


# ------------------------------------------------------------------------------------------------------- where it reads


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize("readout", [Readout("last", 1), Readout("mean", -1), Readout("mean", 0), Readout("mean", 1)])
def test_a_readout_is_the_state_of_each_row_alone(make, readout):
    """Padding beside other rows changes nothing, and the numbers are those of transformers' hidden_states."""
    model = make()
    with torch.no_grad():
        together = row_states(model, ROWS, readout)
        for row, state in zip(ROWS, together):
            states = model.base_model(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states
            alone = states[readout.layer][0]
            expected = alone[-1] if readout.pooling == "last" else alone.mean(0)
            assert torch.allclose(state, expected, atol=1e-5)
        assert not torch.allclose(together, row_states(model, ROWS, Readout()), atol=1e-3)


def test_the_linear_model_is_w_y_plus_b_of_what_was_asked_for():
    t = linear(MEAN_OF_1)
    t.train()
    head = t.model.score
    assert head.bias is not None and float(head.bias.detach()) != 0  # scores teach it
    with torch.no_grad():
        y = row_states(t.model, ROWS, Readout("mean", 1))
        expected = y @ head.weight[0] + head.bias
        assert torch.allclose(sequence_scores(t.model, ROWS), expected, atol=1e-5)


def test_pairs_leave_the_bias_at_zero():
    t = linear(LINEAR, data=[PAIR, EDIT])
    t.train()
    assert float(t.model.score.bias) == 0.0 and BIAS_FILE not in t.beside_the_model()


@pytest.mark.parametrize("fields", [LINEAR, MEAN_OF_1], ids=["stock", "mean"])
def test_the_trunk_reads_each_row_once_in_a_run(monkeypatch, fields):
    """Three epochs with evaluations: the forwards of the trunk are those of the first, and the losses are those of a
    trunk that reads anew."""
    t = linear({**fields, "eval_every": 1}, eval_data=[PAIR, SCORE])
    forwards: list[int] = []
    t.model.base_model.register_forward_hook(
        lambda _, args, kwargs, out: forwards.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    losses = [step.metrics["loss/train"] for step in t]
    rows = sum(len(record.rows) for record in (*t.items, *t.eval_records))
    assert sum(forwards) == rows
    anew = linear({**fields, "eval_every": 1}, eval_data=[PAIR, SCORE])
    monkeypatch.setattr(Features, "of", lambda self, rows: row_states(anew.model, rows, heads.readout_of(anew.model)))
    assert [step.metrics["loss/train"] for step in anew] == pytest.approx(losses, abs=1e-5)


def test_a_resumed_run_is_the_same(tmp_path):
    how = {**MEAN_OF_1, "output_dir": str(tmp_path / "r"), "save_every": 2}
    whole = [s.metrics["loss/train"] for s in linear({**MEAN_OF_1, "output_dir": str(tmp_path / "w")})]
    leave_after(linear(how), 2)
    t = linear({**how, "resume": True})
    assert [s.metrics["loss/train"] for s in t] == pytest.approx(whole[2:], abs=1e-6)


# ----------------------------------------------------------------------------------------------------------------- auto


def planted(model, layer: int, count: int = 60) -> list[dict]:
    """Pairs whose better reply is the one with the larger mean of one direction of a layer."""
    tokenizer, rows = tiny.tokenizer(), []
    draw = torch.Generator().manual_seed(0)
    direction = torch.randn(model.config.hidden_size, generator=draw)
    for i in range(count):
        texts = ["".join(WORDS[j] for j in torch.randint(len(WORDS), (6,), generator=draw)) for _ in range(2)]
        ids = [tokenizer(f"the cat {i}{text}")["input_ids"] for text in texts]
        with torch.no_grad():
            states = [row_states(model, [row], Readout("mean", layer))[0] @ direction for row in ids]
        better = int(states[1] > states[0])
        rows.append({"prompt": f"the cat {i}", "chosen": texts[better], "rejected": texts[1 - better]})
    return rows


def test_auto_takes_what_tells_most_on_held_out_rows(capsys):
    """The replies differ in what the mean of the embeddings' first layer shows."""
    model = tiny.llama()
    rows = planted(model, 1)
    cfg = config(head_only=True, readout="auto", total_steps=1, prompt_format="raw")
    t = trainer(cfg, model=model, data=rows[:40], eval_data=rows[40:])
    chosen = heads.readout_of(t.model)
    assert chosen.pooling == "mean"
    out = capsys.readouterr().out
    assert f"readout = auto: {chosen}, of {len(candidates(2))}: loss 0." in out
    tried = choose_readout(t.model, t.items, t.eval_records, t.link, 512, 0)
    assert tried[0].readout == chosen and [x.loss for x in tried] == sorted(x.loss for x in tried)
    assert {x.readout for x in tried} == set(candidates(2))


def test_a_resumed_run_keeps_what_auto_chose(tmp_path, monkeypatch):
    fields = {**LINEAR, "readout": "auto", "output_dir": str(tmp_path / "r"), "save_every": 2}
    first = linear(fields, eval_data=[PAIR, SCORE])
    chosen, others = heads.readout_of(first.model), candidates(2)
    leave_after(first, 2)
    others.remove(chosen)
    tried = [features.Tried(r, 0.1) for r in (*others, chosen)]
    monkeypatch.setattr("fastrlhf.reward_model.choose_readout", lambda *_: tried)
    again = linear({**fields, "resume": True}, eval_data=[PAIR, SCORE])
    assert again.steps_done == 2 and heads.readout_of(again.model) == chosen
    again.train()


def test_candidates_hold_the_stock_readout_first_and_are_spread_over_the_layers():
    assert candidates(2) == [Readout("last"), Readout("mean"), Readout("last", 1), Readout("mean", 1)]
    many = candidates(30)
    assert many[0] == Readout() and len(many) == 2 * features.LAYERS == len(set(many))
    assert min(r.layer for r in many if r.layer > 0) == round(30 / features.LAYERS)


# ---------------------------------------------------------------------------------------------------------- its readers


def test_the_folder_says_that_stock_code_scores_otherwise(folder, capsys):
    path = Path(folder)
    readout, bias = (json.loads((path / name).read_text()) for name in (READOUT_FILE, BIAS_FILE))
    assert (readout["pooling"], readout["layer"]) == ("mean", 1) and "stock transformers" in readout["note"]
    assert bias["bias"] == bias["learnt"] != 0 and "stock transformers does not" in bias["note"]
    with torch.no_grad():
        ours = sequence_scores(load_reward_model(folder), [ROWS[0]])
        stock = AutoModelForSequenceClassification.from_pretrained(folder)
        theirs = stock(input_ids=torch.tensor([ROWS[0]])).logits[0]
    assert not torch.allclose(ours, theirs, atol=1e-3)
    again = linear(LINEAR, model=folder)
    capsys.readouterr()
    assert {READOUT_FILE, BIAS_FILE} <= again.beside_the_model().keys()
    said = f"stock transformers does not read {READOUT_FILE} and {BIAS_FILE} beside the weights, and scores otherwise"
    assert said in capsys.readouterr().out
    assert not {READOUT_FILE, BIAS_FILE} & trainer().beside_the_model().keys()


PROMPTS, REPLIES = [CAT, MOON], ["yes", "the moon"]


def expected(folder: str) -> list[float]:
    """Scores as they are defined, from the files of the folder alone."""
    stock = AutoModelForSequenceClassification.from_pretrained(folder)
    bias = json.loads((Path(folder) / BIAS_FILE).read_text())["bias"]
    rows = encode_pairs(tiny.tokenizer(), PROMPTS, REPLIES)
    with torch.no_grad():
        states = [stock.base_model(torch.tensor([row]), output_hidden_states=True).hidden_states[1][0] for row in rows]
        return [float(some.mean(0) @ stock.score.weight[0]) + bias for some in states]


def test_score_and_what_ppo_and_best_of_ask_read_it(folder):
    want = expected(folder)
    assert inference.score(folder, PROMPTS, REPLIES) == pytest.approx(want, abs=1e-5)
    ppo = ppo_trainer(reward=folder)
    rows = encode_pairs(tiny.tokenizer(), PROMPTS, REPLIES)
    kept = TokenRows([row[:-1] for row in rows], [row[-1:] for row in rows], joined=False)
    texts = Texts(["", ""], ["", ""], REPLIES, {})
    assert ppo.scorer.judge(texts, kept) == pytest.approx(want, abs=1e-5)
    assert ppo.critic.head.bias is None and not ppo.critic.head.weight.any()  # it reads other states


def test_a_critic_is_none_that_reads_a_mean(folder):
    with pytest.raises(UserError, match=r"value_model: the head of .+ reads the mean of all tokens of layer 1, where"):
        ppo_trainer(value_model=folder)


def test_training_goes_on_with_the_readout_and_the_bias(folder, tmp_path):
    again = linear(LINEAR, model=folder)
    assert heads.readout_of(again.model) == Readout("mean", 1)
    assert float(again.model.score.bias.detach()) == float(learnt_bias_of(folder)) != 0
    again.save(tmp_path / "next")
    assert inference.score(str(tmp_path / "next"), PROMPTS, REPLIES) == pytest.approx(expected(folder), abs=1e-5)


def test_centring_is_beside_the_bias_that_was_learnt(tmp_path):
    t = linear({**MEAN_OF_1, "center_rewards": True}, sft_data=[{"prompt": CAT, "response": "yes"}])
    t.train()
    t.save(tmp_path / "rm")
    kept = json.loads((tmp_path / "rm" / BIAS_FILE).read_text())
    assert kept["learnt"] == float(t.model.score.bias.detach()) != 0 and kept["sft_replies"] == 1
    assert inference.score(str(tmp_path / "rm"), [CAT], ["yes"]) == pytest.approx([0.0], abs=1e-5)
    assert float(load_reward_model(str(tmp_path / "rm"), centred=False).score.bias.detach()) == kept["learnt"]


def test_reward_eval_reads_it(folder):
    rows = [{"prompt": p, "response": r, "score": i + 1} for i, (p, r) in enumerate(zip(PROMPTS, REPLIES))]
    records = [parse_feedback(row, "here") for row in rows]
    scores = scores_of(folder, records, raw=False, tell=lambda _: None)
    assert [x for some in scores for x in some] == pytest.approx(expected(folder), abs=1e-5)


def test_the_plan_has_a_forward_of_the_trunk_alone_and_the_readout_of_a_folder(folder, tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    sizes = {"mini_batch_size": 4, "max_tokens": 32, "micro_batch_tokens": 64, "output_dir": "x", "dtype": "fp32"}
    measure = Measurer("reward", {"model": str(tmp_path), "data": "d"}, Target(2 << 30))
    whole = measure(RewardConfig(**sizes)).phases["update"].peak
    for readout in ("last", "auto"):
        linear = measure(RewardConfig(**sizes, head_only=True, readout=readout)).phases["update"].peak
        assert 0 < linear < whole
    ppo = PPOConfig(rollout_batch_size=4, mini_batch_size=4, max_prompt_tokens=8, max_new_tokens=4, output_dir="x")
    measure = Measurer("ppo", {"policy": str(tmp_path), "reward": folder}, Target(2 << 30))
    assert measure(ppo.replace(micro_batch_tokens=64)).phases["score"].peak > 0
    assert heads.readout_of(measure._built[1].trainer.scorer.model) == Readout("mean", 1)


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"readout_layer": 3},
            r"readout_layer = 3: the model has 2 layers; use 0 \(the embeddings\) to 2, or -3 to",
        ),
        ({"readout_layer": -4}, r"readout_layer = -4: the model has 2 layers; use 0"),
        ({"readout": "auto"}, "readout = auto: chooses on held-out rows, and there are none; give eval_data, or name"),
    ],
)
def test_a_readout_that_cannot_be(fields, sentence):
    with pytest.raises(UserError, match=f"^{sentence}"):
        linear({**LINEAR, **fields})


def test_options_that_would_do_nothing():
    with pytest.raises(UserError, match="readout_layer = 1: readout = auto chooses the layer too; leave it out"):
        RewardConfig(head_only=True, readout="auto", readout_layer=1)
    with pytest.raises(UserError, match="readout = mean: head_only = false trains what the last token's state is made"):
        RewardConfig(readout="mean")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {**LINEAR, "readout": "last"},
            "readout: the last token of layer -1 is not what the head of .+ reads, the",
        ),
        (
            {**LINEAR, "readout": "auto", "eval_fraction": 0.5},
            "readout: auto is not what the head of .+ reads, the",
        ),
        ({}, "model: the head of .+ reads the mean of all tokens of layer 1; use head_only = true to go on"),
    ],
)
def test_who_cannot_go_on_with_it(folder, fields, sentence):
    with pytest.raises(UserError, match=f"^{sentence}"):
        linear(fields, model=folder)


def test_an_adapter_holds_no_bias_of_a_linear_model(tmp_path):
    t = linear(LINEAR)
    t.train()
    t.save(tmp_path / "rm")
    with pytest.raises(UserError, match="model: the head of .+ has a bias, which an adapter does not hold; leave lora"):
        linear({"lora": 2}, model=str(tmp_path / "rm"))


@pytest.mark.parametrize("text", ["{", '{"pooling": "max", "layer": 1}', '{"pooling": "mean", "layer": true}', "[]"])
def test_a_damaged_readout_is_an_error_that_names_it(tmp_path, text):
    (tmp_path / READOUT_FILE).write_text(text)
    with pytest.raises(UserError, match=f"{READOUT_FILE}: holds no `pooling`"):
        kept_readout(tmp_path)
    (tmp_path / READOUT_FILE).write_text('{"pooling": "mean", "layer": 9}')
    with pytest.raises(UserError, match=f"{READOUT_FILE}: layer = 9: the model has 2 layers"):
        as_kept(tiny.llama(), tmp_path, centred=False)
