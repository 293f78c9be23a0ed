"""What goes into a reward model (rows, real files) and who can load what comes out."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from fastrlhf import PPOConfig, PPOTrainer, RewardTrainer, UserError
from fastrlhf.models.offload import Offload
from fastrlhf.models.saving import padding_tokenizer
from fastrlhf.models.token_batch import TokenRows
from fastrlhf.rl.scorers import RewardModelScorer, score_texts
from fastrlhf.rollout.result import Texts
from tests import tiny
from tests.reward_runs import (
    CAT,
    MIXED,
    MODELS,
    PAIR,
    REAL,
    WEATHER,
    config,
    same,
    scores_of,
    trainer,
    weights,
)

# ---------------------------------------------------------------------------------------------------- rows and counts


def test_counts_and_template_are_printed(tmp_path, capsys):
    twin = {**PAIR, "rejected": PAIR["chosen"]}
    trainer(config(output_dir=str(tmp_path / "run")), data=[*MIXED, twin])
    log, printed = (tmp_path / "run" / "log.txt").read_text(encoding="utf-8"), capsys.readouterr().out
    for line in (": through the tokenizer's chat template", "7 rows read, 6 used, dropped: 1 chosen equals rejected"):
        assert line in log and line in printed


LONG = {"prompt": CAT, "chosen": tiny.TEXTS[0] + tiny.TEXTS[1], "rejected": tiny.TEXTS[0]}


def test_a_record_that_is_too_long_is_dropped_and_counted(tmp_path):
    t = trainer(config(max_tokens=40, output_dir=str(tmp_path / "run")), data=[*MIXED, LONG])
    assert len(t.items) == 6
    assert "6 used, dropped: 1 longer than max_tokens = 40" in (tmp_path / "run" / "log.txt").read_text()


def test_a_record_that_is_cut_has_no_synthetic_end_and_is_counted(tmp_path):
    (whole,) = trainer(config(max_tokens=120), data=[LONG]).items
    short = len(whole.rows[1])
    cfg = config(max_tokens=short, overlong="truncate", output_dir=str(tmp_path / "run"))
    t = trainer(cfg, data=[*MIXED, LONG])
    assert t.items[-1].rows == [whole.rows[0][:short], whole.rows[1]]
    assert t.items[-1].rows[0][-1] != t.tokenizer.eos_token_id == whole.rows[1][-1]
    assert "7 used; 1 cut to max_tokens" in (tmp_path / "run" / "log.txt").read_text()


def test_a_record_whose_replies_are_equal_once_cut_is_dropped_and_counted(tmp_path):
    row = {"prompt": CAT, "chosen": tiny.TEXTS[0] + " yes", "rejected": tiny.TEXTS[0] + " no"}
    cfg = config(max_tokens=16, overlong="truncate", output_dir=str(tmp_path / "run"))
    t = trainer(cfg, data=[PAIR, row])
    assert len(t.items) == 1
    assert "dropped: 1 with equal replies within max_tokens = 16" in (tmp_path / "run" / "log.txt").read_text()


def test_a_prompt_that_leaves_no_room_is_dropped_and_counted(tmp_path):
    row = {"prompt": tiny.chat(tiny.TEXTS[0]), "chosen": "yes", "rejected": "no"}
    cfg = config(max_tokens=14, overlong="truncate", output_dir=str(tmp_path / "run"))
    assert len(trainer(cfg, data=[PAIR, row]).items) == 1
    assert "dropped: 1 with no reply within max_tokens = 14" in (tmp_path / "run" / "log.txt").read_text()


def test_nothing_left_and_bad_rows(tmp_path):
    with pytest.raises(UserError, match=r"data: nothing left.*0 used.*raise max_tokens"):
        trainer(config(max_tokens=8), data=[LONG])
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(PAIR) + "\n" + json.dumps({"prompt": CAT, "chosen": "yes"}) + "\n")
    with pytest.raises(UserError, match=r"pairs\.jsonl:2: .*rejected"):
        trainer(data=str(path))
    assert len(trainer(config(skip_bad_rows=True), data=str(path)).items) == 1


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
    rows = [row for record in t.items for row in record.rows]
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
    trained = [record.rows[0] for record in t.items]
    assert [ids + reply for _, ids in ppo.prompts] == trained
    texts = Texts([], [prompt.prompt for prompt, _ in ppo.prompts], ["the answer is yes"] * 3, {})
    rows = TokenRows([ids for _, ids in ppo.prompts], [reply] * 3)
    assert isinstance(ppo.scorer, RewardModelScorer) and ppo.scorer.same_tokenizer
    expected = ppo.scorer.judge(texts, rows)
    rescored = score_texts(t.model, t.tokenizer, texts.raw_prompts, texts.responses)
    assert expected == rescored and expected == pytest.approx(scores_of(t, trained), abs=1e-5)


def test_a_policy_with_another_tokenizer_is_scored_through_its_text():
    t = trainer(data=[PAIR])
    seen: list[list[int]] = []
    t.model.model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.extend(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    scorer = RewardModelScorer(t.model, t.tokenizer, bare_tokenizer(), t.memory, Offload(t.device))
    policy_ids = bare_tokenizer()("no")["input_ids"]
    texts = Texts([], [CAT], [PAIR["rejected"]], {})
    assert not scorer.same_tokenizer
    assert (
        scorer.judge(texts, TokenRows([policy_ids], [policy_ids])) == scores_of(t, [t.items[0].rows[1]])
        and seen == [t.items[0].rows[1]] * 2
    )


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
    assert len(t.items) + len(t.eval_records) == used and len(t.eval_records) >= 3
    assert all(len(r.rows) == 2 and r.rows[0] != r.rows[1] for r in t.items)
    steps = list(t)
    assert all(math.isfinite(s.metrics["loss/train"]) and s.metrics["update/skipped"] == 0 for s in steps)
    assert 0 <= t.evaluate()["accuracy/eval"] <= 1
