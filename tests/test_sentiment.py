"""A stock sentiment classifier as the reward, in Chinese and English, by the packaged recipe and the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from fastrlhf import PPOConfig
from fastrlhf.cli import main
from fastrlhf.models.offload import Offload
from fastrlhf.models.token_batch import TokenRows
from fastrlhf.rl.scorers import make_scorer
from fastrlhf.rollout.result import Texts
from fastrlhf.runtime.memory import MemoryBackoff
from tests import tiny

GLAD, SAD = ["好", "喜", "good", "thanks"], ["坏", "怒", "bad", "rude"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *GLAD, *SAD]


@pytest.fixture(scope="module", params=[("negative", "positive"), ("negative", "neutral", "positive")])
def classifier(request, tmp_path_factory) -> str:
    """A BERT with WordPiece tokens, trained for a moment to tell glad words from sad ones in both languages."""
    folder, labels = tmp_path_factory.mktemp("classifier"), request.param
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(**shape, vocab_size=len(WORDS), num_labels=len(labels), id2label=dict(enumerate(labels)))
    )
    texts = [*GLAD, *SAD, "UNK"]
    wanted = torch.tensor([len(labels) - 1] * 4 + [0] * 4 + [len(labels) // 2])
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(model(**batch).logits, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_it_rates_replies_of_both_languages(classifier):
    config, device = PPOConfig(), torch.device("cpu")
    memory, offload = MemoryBackoff(config, device, print), Offload(device)
    scorer = make_scorer({"model": classifier, "label": "Positive"}, tiny.tokenizer(), config, memory, offload)
    replies = ["好，喜！", "thanks, good", "坏，怒！", "rude and bad"]
    texts = Texts(["?"] * 4, ["?"] * 4, replies, {})
    scores = scorer.judge(texts, TokenRows([[3]] * 4, [[5, 1]] * 4))
    assert all(score <= 0 for score in scores) and min(scores[:2]) > -0.7 > -1.5 > max(scores[2:])


def test_the_packaged_recipe_runs_and_resumes_by_the_command_line(classifier, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny.llama().save_pretrained("policy")
    tiny.tokenizer().save_pretrained("policy")
    prompts = [{"prompt": tiny.chat(text)} for text in tiny.PROMPTS]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts), encoding="utf-8")
    fields = ["policy=policy", f"reward={{model: {classifier}, label: positive}}", "prompts=prompts.jsonl"]
    fields += ["output_dir=run", "total_steps=2", "rollout_batch_size=4", "mini_batch_size=4", "max_new_tokens=6"]
    assert main(["ppo", "sentiment", *fields, "--dry-run"]) == 0
    assert "reward: 1 * positive" in capsys.readouterr().out
    assert main(["ppo", "sentiment", *fields]) == 0 and main(["resume", "run"]) == 0
    assert main(["ppo", "run/config.yaml", "output_dir=again", "--dry-run"]) == 0
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 3 and all(row["reward/mean"] < 0 for row in rows[1:])
    assert main(["ppo", "sentiment", *fields[:1], f"reward={{model: {classifier}}}", *fields[2:3], "output_dir=x"]) == 2
    assert "positive; name one: {model: MODEL, label: LABEL}" in capsys.readouterr().err
