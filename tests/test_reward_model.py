"""The reward model: its losses against brute force, what it trains, what it reports, and who can load it."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from fastrlhf import PPOConfig, PPOTrainer, RewardConfig, RewardTrainer, UserError
from fastrlhf.models import sequence_scores
from fastrlhf.reward_model import (
    MARGIN_EDGES,
    margin_histogram,
    ordered_pairs,
    padding_tokenizer,
    preference_loss,
    record_loss,
)
from fastrlhf.rewards import RewardModelScorer, Scorable, score_texts
from tests import tiny

REAL = Path(__file__).parents[2] / "shared" / "data"
CAT, MOON, WEATHER = (tiny.chat(p) for p in tiny.PROMPTS[:3])
PAIR = {"prompt": CAT, "chosen": "the answer is yes", "rejected": "no"}
MARGIN = {"prompt": "the cat", "chosen": " sat on the mat", "rejected": " looked at the moon", "margin": 0.7}
RANKING = {"prompt": MOON, "responses": ["no", "the moon", "谢谢您", "yes; no"], "ranking": [2, [0, 3], 1]}
SCORE = {"prompt": WEATHER, "response": "天气很好", "score": 4}
SCORES = {"prompt": WEATHER, "responses": ["no", "the weather is yes", "天气"], "scores": [1, 5, 3]}
EDIT = {"prompt": CAT, "response": "no", "edited": "no, thank you"}
MIXED = [PAIR, MARGIN, RANKING, SCORE, SCORES, EDIT]
MODELS = pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])


def config(**fields: object) -> RewardConfig:
    base = {"total_steps": 1, "mini_batch_size": len(MIXED), "max_tokens": 64, "learning_rate": 1e-3, "eval_every": 0}
    return RewardConfig(**{**base, "lr_schedule": "constant", "eval_fraction": 0.0, **fields})


def trainer(
    cfg: RewardConfig | None = None, *, model: object = None, data: object = MIXED, **inputs: object
) -> RewardTrainer:
    inputs = {"tokenizer": tiny.tokenizer(), **inputs}
    return RewardTrainer(cfg or config(), model=model or tiny.llama(), data=data, **inputs)


def weights(model: PreTrainedModel) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    off = sum(float((x - y).double().square().sum()) for x, y in zip(a, b, strict=True))
    return math.sqrt(off / sum(float(y.double().square().sum()) for y in b))


def one_step(cfg: RewardConfig, model: PreTrainedModel, data: object = MIXED) -> tuple[float, list[Tensor]]:
    """(loss, gradients before clipping) of one optimizer step."""
    t = trainer(cfg.replace(max_grad_norm=1e9), model=model, data=data)
    grads: list[Tensor] = []
    t.optimizer.inner.register_step_pre_hook(lambda *_: grads.extend(p.grad.clone() for p in t.optimizer.params))
    return t.train()["loss/train"], grads


def scores_of(t: RewardTrainer, rows: list[list[int]]) -> list[float]:
    with torch.no_grad():
        return [float(sequence_scores(t.model, [row])) for row in rows]


def events(run: Path, kind: str) -> list[dict]:
    found = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [e for e in found if e["kind"] == kind]


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


def test_scores_are_regressed_to_the_unit_scale():
    (record,) = trainer(data=[SCORES]).records
    assert record.feedback.scores == (-1.0, 1.0, 0.0)
    loss = record_loss(torch.tensor([0.5, 0.5, 0.5]), record.feedback)
    assert float(loss) == pytest.approx((1.5**2 + 0.5**2 + 0.5**2) / 3)
    (wide,) = trainer(config(score_range=(0, 10)), data=[{**SCORE, "score": 2.5}]).records
    assert wide.feedback.scores == (-0.5,)


def test_an_edit_is_a_pair_of_edited_over_original():
    edit, pair = trainer(data=[EDIT, {"prompt": CAT, "chosen": EDIT["edited"], "rejected": EDIT["response"]}]).records
    assert edit.rows == pair.rows
    scores = torch.tensor([0.3, 1.1])
    assert record_loss(scores, edit.feedback) == record_loss(scores, pair.feedback)
    assert ordered_pairs(edit.feedback) == [(0, 1)]


def test_pairs_that_a_record_implies():
    pair, ranking, score, scores = (r.feedback for r in trainer(data=[PAIR, RANKING, SCORE, SCORES]).records)
    assert ordered_pairs(pair) == [(0, 1)] and ordered_pairs(score) == []
    assert sorted(ordered_pairs(ranking)) == [(0, 1), (2, 0), (2, 1), (2, 3), (3, 1)]
    assert sorted(ordered_pairs(scores)) == [(1, 0), (1, 2), (2, 0)]
    tied = trainer(data=[{**SCORES, "scores": [2, 2, 3]}]).records[0].feedback
    assert sorted(ordered_pairs(tied)) == [(2, 0), (2, 1)]


# ------------------------------------------------------------------------------------------------------------ one step


@MODELS
def test_the_loss_of_a_step_is_the_mean_over_records(make):
    """Each record weighs the same, whether it holds one response or four."""
    t = trainer(model=make())
    expected = []
    for record in t.records:
        scores = torch.tensor(scores_of(t, record.rows))
        expected.append(float(record_loss(scores, record.feedback)))
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
    assert sum(len(group["params"]) for group in t.optimizer.inner.param_groups) == 1


def test_the_trunk_is_a_copy_and_the_head_starts_small():
    policy = tiny.llama()
    before = weights(policy)
    t = trainer(model=policy)
    assert same(weights(t.model.model), weights(policy.model))
    head = t.model.score.weight.detach().clone()
    assert head.std() == pytest.approx(33**-0.5, rel=0.5)
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
    losses = [float(record_loss(torch.tensor(s), r.feedback)) for s, r in zip(scores, t.eval_records, strict=True)]
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
    best = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "best")
    assert best.config.num_labels == 1


def test_judgements_of_one_prompt_are_held_out_together():
    rows = [{"prompt": tiny.chat(f"the cat {i // 4}"), "chosen": "yes", "rejected": f"no {i}"} for i in range(40)]
    t = trainer(config(eval_fraction=0.2), data=rows)
    prompts = [{json.dumps(r.feedback.prompt) for r in part} for part in (t.records, t.eval_records)]
    assert len(t.records) == 32 and len(t.eval_records) == 8 and t.sampler.n == 32
    assert not prompts[0] & prompts[1]


# ---------------------------------------------------------------------------------------------------- rows and counts


def test_counts_and_template_are_printed(tmp_path, capsys):
    twin = {**PAIR, "rejected": PAIR["chosen"]}
    trainer(config(output_dir=str(tmp_path / "run")), data=[*MIXED, twin])
    log, printed = (tmp_path / "run" / "log.txt").read_text(encoding="utf-8"), capsys.readouterr().out
    for line in ("chat template: the tokenizer's own", "7 rows read, 6 used, dropped: 1 chosen equals rejected"):
        assert line in log and line in printed


LONG = {"prompt": CAT, "chosen": tiny.TEXTS[0] + tiny.TEXTS[1], "rejected": tiny.TEXTS[0]}


def test_a_record_that_is_too_long_is_dropped_and_counted(tmp_path):
    t = trainer(config(max_tokens=40, output_dir=str(tmp_path / "run")), data=[*MIXED, LONG])
    assert len(t.records) == 6
    assert "6 used, dropped: 1 longer than max_tokens = 40" in (tmp_path / "run" / "log.txt").read_text()


def test_a_record_that_is_cut_has_no_synthetic_end_and_is_counted(tmp_path):
    (whole,) = trainer(config(max_tokens=120), data=[LONG]).records
    short = len(whole.rows[1])
    cfg = config(max_tokens=short, overlong="truncate", output_dir=str(tmp_path / "run"))
    t = trainer(cfg, data=[*MIXED, LONG])
    assert t.records[-1].rows == [whole.rows[0][:short], whole.rows[1]]
    assert t.records[-1].rows[0][-1] != t.tokenizer.eos_token_id == whole.rows[1][-1]
    assert "7 used; 1 cut to max_tokens" in (tmp_path / "run" / "log.txt").read_text()


def test_a_record_whose_replies_are_equal_once_cut_is_dropped_and_counted(tmp_path):
    row = {"prompt": CAT, "chosen": tiny.TEXTS[0] + " yes", "rejected": tiny.TEXTS[0] + " no"}
    cfg = config(max_tokens=16, overlong="truncate", output_dir=str(tmp_path / "run"))
    t = trainer(cfg, data=[PAIR, row])
    assert len(t.records) == 1
    assert "dropped: 1 with equal replies within max_tokens = 16" in (tmp_path / "run" / "log.txt").read_text()


def test_a_prompt_that_leaves_no_room_is_dropped_and_counted(tmp_path):
    row = {"prompt": tiny.chat(tiny.TEXTS[0]), "chosen": "yes", "rejected": "no"}
    cfg = config(max_tokens=14, overlong="truncate", output_dir=str(tmp_path / "run"))
    assert len(trainer(cfg, data=[PAIR, row]).records) == 1
    assert "dropped: 1 with no reply within max_tokens = 14" in (tmp_path / "run" / "log.txt").read_text()


def test_nothing_left_and_bad_rows(tmp_path):
    with pytest.raises(UserError, match=r"data: nothing left.*0 used.*raise max_tokens"):
        trainer(config(max_tokens=8), data=[LONG])
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(PAIR) + "\n" + json.dumps({"prompt": CAT, "chosen": "yes"}) + "\n")
    with pytest.raises(UserError, match=r"pairs\.jsonl:2: .*rejected"):
        trainer(data=str(path))
    assert len(trainer(config(skip_bad_rows=True), data=str(path)).records) == 1


# ------------------------------------------------------------------------------------------------- who can load it


def bare_tokenizer() -> PreTrainedTokenizerFast:
    """Like GPT-2's: the only special token is the EOS, which pads too."""
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("a", "n"), ("t", "h"), ("th", "e"), ("Ġ", "the"), ("n", "o")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.add_special_tokens(["<|end|>"])
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>")
    made.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return made


TOKENIZERS = {
    "own pad": tiny.tokenizer,
    "pad is eos": lambda: tiny.tokenizer(pad_is_eos=True),
    "nothing but eos": bare_tokenizer,
}


@MODELS
@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_stock_transformers_give_our_scores(make, tokenizer, tmp_path):
    t = trainer(config(total_steps=2), model=make(), tokenizer=tokenizer())
    t.train()
    t.save(tmp_path / "rm")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    tok = AutoTokenizer.from_pretrained(tmp_path / "rm")
    assert model.config.num_labels == 1 and model.config.architectures == [type(t.model).__name__]
    rows = [row for record in t.records for row in record.rows]
    batch = tok.pad({"input_ids": rows}, return_tensors="pt")
    assert batch["attention_mask"].sum() < batch["attention_mask"].numel()
    with torch.no_grad():
        stock = model(**batch).logits
    assert stock.shape == (len(rows), 1)
    torch.testing.assert_close(stock[:, 0], torch.tensor(scores_of(t, rows)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_the_padding_token_ends_no_reply_and_changes_no_text(tokenizer, tmp_path):
    before = tokenizer()
    after = padding_tokenizer(before)
    after.save_pretrained(tmp_path)
    after = AutoTokenizer.from_pretrained(tmp_path)
    assert after.pad_token_id != after.eos_token_id == before.eos_token_id
    assert after.get_vocab() == before.get_vocab()
    for text in [*tiny.TEXTS, "yes, yes the<|end|> thean"]:
        assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after.apply_chat_template(CAT, tokenize=False) == before.apply_chat_template(CAT, tokenize=False)


def test_a_tokenizer_with_a_pad_of_its_own_keeps_it():
    given = tiny.tokenizer()
    assert padding_tokenizer(given).pad_token_id == given.pad_token_id == 0


def test_ids_and_score_are_those_of_ppo(tmp_path):
    """The same prompt and reply: bit for bit the same ids in reward training, in PPO and for `fastrlhf score`."""
    data = [{"prompt": p, "chosen": "the answer is yes", "rejected": "no"} for p in (CAT, "thank you", WEATHER)]
    t = trainer(config(total_steps=3), data=data)
    t.train()
    t.save(tmp_path / "rm")
    cfg = PPOConfig(total_steps=1, rollout_batch_size=4, mini_batch_size=4, max_new_tokens=4, eval_every=0)
    prompts = [{"prompt": row["prompt"]} for row in data]
    ppo = PPOTrainer(cfg, policy=tiny.llama(), tokenizer=tiny.tokenizer(), reward=str(tmp_path / "rm"), prompts=prompts)
    reply = ppo.tokenizer("the answer is yes", add_special_tokens=False)["input_ids"] + [ppo.tokenizer.eos_token_id]
    trained = [record.rows[0] for record in t.records]
    assert [ids + reply for _, ids in ppo.prompts] == trained
    batch = Scorable(
        prompts=[], responses=["the answer is yes"] * 3, raw_prompts=[p.prompt for p, _ in ppo.prompts],
        prompt_ids=[ids for _, ids in ppo.prompts], response_ids=[reply] * 3, columns={},
    )  # fmt: skip
    assert isinstance(ppo.scorer, RewardModelScorer) and ppo.scorer.same_tokenizer
    expected = ppo.scorer(batch)
    rescored = score_texts(t.model, t.tokenizer, batch.raw_prompts, batch.responses)
    assert expected == rescored and expected == pytest.approx(scores_of(t, trained), abs=1e-5)


def test_a_policy_with_another_tokenizer_is_scored_through_its_text():
    t = trainer(data=[PAIR])
    seen: list[list[int]] = []
    t.model.model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.extend(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    scorer = RewardModelScorer(t.model, t.tokenizer, bare_tokenizer(), None)
    policy_ids = bare_tokenizer()("no")["input_ids"]
    batch = Scorable([], [PAIR["rejected"]], [CAT], [policy_ids], [policy_ids], {})
    assert not scorer.same_tokenizer
    assert scorer(batch) == scores_of(t, [t.records[0].rows[1]]) and seen == [t.records[0].rows[1]] * 2


def test_a_reward_model_goes_on_training_from_its_folder(tmp_path):
    whole = trainer(config(total_steps=2))
    whole.train()
    whole.save(tmp_path / "rm")
    more = RewardTrainer(config(), model=str(tmp_path / "rm"), data=MIXED)
    assert same(weights(more.model), weights(whole.model)) and more.tokenizer.chat_template == tiny.CHAT_TEMPLATE
    more.train()
    assert not same(weights(more.model), weights(whole.model))


def test_a_loaded_reward_model_is_trained_in_place():
    model = trainer().model
    before, t = weights(model), trainer(model=model)
    t.train()
    assert t.model is model and not same(before, weights(model))


def test_a_classifier_of_more_labels_is_refused():
    shape = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    model = LlamaForSequenceClassification(LlamaConfig(**shape, num_attention_heads=4, num_labels=2))
    with pytest.raises(UserError, match=r"model: .*scalar head `score` \(num_labels=1\)"):
        trainer(model=copy.deepcopy(model))


# --------------------------------------------------------------------------------------------------------- real data


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hh_harmless_1000.jsonl.gz", "1000 rows read, 997 used, dropped: 3 transcripts with an empty last turn"),
        ("dpo_zh_demo.json", "300 rows read, 300 used"),
    ],
)
def test_real_feedback_unchanged(name, said, tmp_path):
    """Read as it is; every row is used or named."""
    if not REAL.is_dir():
        pytest.skip("../shared/data is not there")
    run = tmp_path / "run"
    cfg = config(total_steps=3, mini_batch_size=2, max_tokens=8192, eval_fraction=0.01, output_dir=str(run))
    t = trainer(cfg, model=tiny.llama(max_position_embeddings=8192), data=str(REAL / name))
    assert f"data: {said}\n" in (run / "log.txt").read_text(encoding="utf-8")
    used = int(said.split(" used")[0].split()[-1])
    assert len(t.records) + len(t.eval_records) == used and len(t.eval_records) >= 3
    assert all(len(r.rows) == 2 and r.rows[0] != r.rows[1] for r in t.records)
    steps = list(t)
    assert all(math.isfinite(s.metrics["loss/train"]) and s.metrics["update/skipped"] == 0 for s in steps)
    assert 0 <= t.evaluate()["accuracy/eval"] <= 1
