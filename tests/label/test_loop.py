"""The loop, end to end: replies of a model are judged, the file trains a reward model, which aligns the model."""

from __future__ import annotations

import json

from starlette.testclient import TestClient

from fastrlhf.cli import main
from fastrlhf.label.sampling import sampled_items
from fastrlhf.label.server import make_app
from fastrlhf.label.workbench import Workbench
from tests import tiny
from tests.label_runs import read_rows

KINDS = ("score", "rank", "edit", "rank", "score", "skip")
REWARD = "model=base data=feedback.jsonl output_dir=reward total_steps=3 mini_batch_size=4 max_tokens=96"
PPO = (
    "policy=base reward=reward/final prompts=prompts.jsonl output_dir=ppo total_steps=1 rollout_batch_size=4 "
    "mini_batch_size=4 max_new_tokens=6"
)


def judgement(item: dict, kind: str) -> dict:
    """What a person who likes long replies says, and who finds the shortest one unsafe."""
    replies = item["replies"]
    order = sorted(range(len(replies)), key=lambda place: -len(replies[place]))
    return {
        "item": item["id"],
        "kind": kind,
        "seconds": 2,
        "scores": [max(1, 5 - order.index(place)) for place in range(len(replies))],
        "ranking": order,
        "edit": {"reply": order[0], "text": replies[order[0]] + " and more"},
        "unsafe": [place == order[-1] and len(replies) > 1 for place in range(len(replies))],
    }


def test_label_reward_ppo(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny.llama().save_pretrained("base")
    tiny.tokenizer().save_pretrained("base")
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "feedback.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": tiny.chat(p)}) + "\n" for p in tiny.PROMPTS), encoding="utf-8")
    sampling = {"n": 3, "max_new_tokens": 8, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 0, "raw": False}
    items = sampled_items(str(prompts), "base", output, print, **sampling)
    bench = Workbench(items, ["ann"], output, print)
    client = TestClient(make_app(bench, "en"), base_url="http://127.0.0.1")
    headers = {"x-annotator": "ann", "authorization": f"Bearer {bench.tokens['ann']}"}

    screen = client.post("/api/next", json={}, headers=headers).json()
    for kind in KINDS:
        answer = client.post("/api/judge", json=judgement(screen["item"], kind), headers=headers)
        assert answer.status_code == 200, answer.text
        screen = answer.json()
    assert screen["item"] is None
    bench.close()
    rows = read_rows(output)
    assert len(rows) == len(tiny.PROMPTS) and rows[0]["response_ids"] and rows[0]["model_hash"]

    capsys.readouterr()
    assert main(["reward", *REWARD.split()]) == 0
    out = capsys.readouterr().out
    assert "6 rows read, 5 used, dropped: 1 skipped by the annotator" in out
    assert "rankings added: safe replies above those marked unsafe" in out  # of the edit, whose marks it cannot hold
    assert main(["ppo", *PPO.split()]) == 0
    assert (tmp_path / "ppo/final/model.safetensors").is_file()
