"""MOSS from its own folder to an aligned one: SFT, reward model, PPO and stock `pipeline()`, in Chinese."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, CodeGenForCausalLM, pipeline

from fastrlhf.cli import main
from fastrlhf.convert import convert
from fastrlhf.models.loading import load_policy
from fastrlhf.models.moss import gptj_of
from tests import moss_folders
from tests.moss_folders import META

ASKED = ["雨伞应该怎么保养？", "今天北京的天气怎么样？", "水壶怎么清洗？", "请介绍一下自己。"]
GOOD, BAD = ["用后晾干，再收起来。", "天气很好。", "用醋煮一下。", "我是MOSS。"], "不知道"


def turn(human: str, said: str, **tools: str) -> dict[str, str]:
    """A turn of MOSS's SFT files, each part in its tags."""
    return {
        "Human": f"<|Human|>: {human}<eoh>\n",
        "Inner Thoughts": f"<|Inner Thoughts|>: {tools.get('thoughts', 'None')}<eot>\n",
        "Commands": f"<|Commands|>: {tools.get('commands', 'None')}<eoc>\n",
        "Tool Responses": f"<|Results|>:{tools.get('results', ' None')}<eor>\n",
        "MOSS": f"<|MOSS|>: {said}<eom>\n",
    }


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_codegen_and_the_gptj_that_its_reward_model_is_agree():
    model = moss_folders.moon_model(300)
    ids = torch.randint(300, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = model(ids).logits, gptj_of(model)(ids).logits
    assert (ours - theirs).abs().max() < 1e-5 < ours.abs().max()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A MOSS folder through all the stages, by the command line."""
    root = tmp_path_factory.mktemp("moss")
    moss_folders.write_moon(root / "given")
    convert(str(root / "given"), str(root / "moss"))
    plugin = turn("2+2?", "4", thoughts="算一下", commands='Calculate("2+2")', results="\nCalculate(\"2+2\") => '4'\n")
    sft = [{"meta_instruction": META, "num_turns": 1, "chat": {"turn_1": turn(q, a)}} for q, a in zip(ASKED, GOOD)]
    sft.append({"meta_instruction": META, "num_turns": 2, "chat": {"turn_1": plugin, "turn_2": turn("Hi", "Hello")}})
    asked = [[{"role": "system", "content": META}, {"role": "user", "content": question}] for question in ASKED]
    pairs = [{"prompt": prompt, "chosen": good, "rejected": BAD} for prompt, good in zip(asked, GOOD)]
    files = {
        "sft": write_rows(root / "sft.jsonl", sft),
        "pairs": write_rows(root / "pairs.jsonl", pairs),
        "prompts": write_rows(root / "prompts.jsonl", [{"prompt": prompt} for prompt in asked]),
    }
    steps = ["total_steps=2", "mini_batch_size=4", "learning_rate=1e-3", "eval_every=0", "save_every=0"]
    reward, ppo = f"{root}/reward/final", ["rollout_batch_size=4", "ppo_epochs=1", "max_new_tokens=6"]
    stages = [
        ("sft", [f"model={root}/moss", f"data={files['sft']}"]),
        ("reward", [f"model={root}/sft/final", f"data={files['pairs']}", "eval_fraction=0"]),
        ("ppo", [f"policy={root}/sft/final", f"reward={reward}", f"prompts={files['prompts']}", *ppo]),
    ]
    for stage, inputs in stages:
        assert main([stage, *inputs, *steps, f"output_dir={root / stage}"]) == 0, stage
    return root


def test_moss_goes_through_all_stages_and_stock_pipeline_answers(runs, capsys):
    model = load_policy(str(runs / "ppo/final"))
    before = load_policy(str(runs / "moss")).state_dict()
    assert type(model) is CodeGenForCausalLM
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    chat = pipeline("text-generation", model=str(runs / "ppo/final"))
    messages = [{"role": "system", "content": META}, {"role": "user", "content": ASKED[0]}]
    answer = chat(messages, max_new_tokens=8, do_sample=False)[0]["generated_text"]
    assert answer[:2] == messages and answer[2]["role"] == "assistant"
    tokenizer = AutoTokenizer.from_pretrained(runs / "ppo/final")
    asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert asked == f"{META}<|Human|>: {ASKED[0]}<eoh>\n<|MOSS|>:"
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<eom>")


def test_its_reward_model_is_a_stock_classifier_and_plugin_turns_were_read(runs):
    stock = AutoModelForSequenceClassification.from_pretrained(runs / "reward/final")
    assert stock.config.num_labels == 1 and stock.config.model_type == "gptj"
    assert "5 rows read, 5 used" in (runs / "sft/log.txt").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in (runs / "ppo/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[0]["kl/ref"] == 0 and len(rows) == 2
