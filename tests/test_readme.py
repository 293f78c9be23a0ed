"""The two READMEs: their links lead somewhere, and their examples run as they stand, with tiny models and few steps."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest

from fastrlhf import cli
from tests import tiny

ROOT = Path(__file__).parents[1]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "kernels/README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "kernels/README.md",
        "docs/api.md",
        "docs/label.md",
        "docs/eval.md",
        "docs/overoptimisation.md",
        "docs/ratings.md",
        "docs/plan.md",
        "CHANGELOG.md",
    ],
)
def test_links_lead_to_files(name):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / name).read_text(encoding="utf-8"))
    assert [link for link in links if not ((ROOT / name).parent / link).exists()] == []


def test_there_are_six_examples():
    assert len(EXAMPLES) == 6  # those of linear_loss are called by tests/kernels/test_readme_losses.py


@pytest.mark.parametrize("code", EXAMPLES[:3], ids=["selective_log_softmax", "sft", "ppo"])
def test_example_runs(code, capsys):
    exec(compile(code, "kernels/README.md", "exec"), {})


# ------------------------------------------------------------------------------------------------- the product's README

README = (ROOT / "README.md").read_text(encoding="utf-8")
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what a reader downloads; here a tiny one takes its place
ELSEWHERE = ("fastrlhf quickstart", "fastrlhf ppo smollm2-cpu", "fastrlhf generate runs/quickstart", "fastrlhf label")
SHORT = {
    "sft": ["total_steps=1", "max_tokens=256"],
    "reward": ["total_steps=1", "max_tokens=256"],
    "ppo": ["total_steps=1", "rollout_batch_size=4", "mini_batch_size=4", "samples_per_prompt=2", "max_new_tokens=4"],
    "generate": ["--max-new-tokens", "4"],
    "eval": ["--max-new-tokens", "4"],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    """Every `fastrlhf ...` of the README's shell examples that can run here, in their order, without its comment."""
    parts = [part.strip() for block in blocks("sh") for line in block.splitlines() for part in line.split("&&")]
    lines = [re.sub(r"\s+#.*", "", part) for part in parts if part.startswith("fastrlhf ")]
    return [line for line in lines if not line.startswith(ELSEWHERE)]


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    """A reader's folder: the files that README shows under their names, and a tiny model in place of the real one."""
    root = tmp_path_factory.mktemp("reader")
    tiny.llama(max_position_embeddings=1024).save_pretrained(root / "tiny")
    tiny.tokenizer().save_pretrained(root / "tiny")
    for name, text in re.findall(r"`([\w.]+)`[^`\n]*:\n\n```(?:jsonl|yaml)\n(.*?)```", README, re.DOTALL):
        (root / name).write_text(text, encoding="utf-8")
    return root


def test_readme_shows_the_files_that_its_commands_read(reader):
    shown = {path.name for path in reader.iterdir()} - {"tiny"}
    assert shown == {"conversations.jsonl", "prompts.jsonl", "feedback.jsonl", "ppo.yaml"}
    assert len(blocks("jsonl")) + len(blocks("yaml")) == 4, "every block has a name"


def test_readme_teaches_messages():
    for block in blocks("jsonl"):
        for row in map(json.loads, block.splitlines()):
            assert row.get("prompt", row.get("messages"))[0].keys() == {"role", "content"}


def test_every_command_of_the_readme_runs_in_its_order(reader, monkeypatch, capsys):
    monkeypatch.chdir(reader)
    assert len(commands()) >= 12
    for line in commands():
        line, _, target = line.partition(" > ")
        _, verb, *arguments = shlex.split(line.replace(MODEL, "tiny"))
        code = cli.main([verb, *arguments, *SHORT.get(verb, [])])
        out, err = capsys.readouterr()
        assert code == 0, f"{line}\n{err}"
        if target:
            Path(target).write_text(out, encoding="utf-8")
    replies = [json.loads(line) for line in Path("replies.jsonl").read_text(encoding="utf-8").splitlines()]
    scores = [json.loads(line) for line in Path("scores.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(replies) == len(scores) == 2 and all(isinstance(row["score"], float) for row in scores)


@pytest.mark.parametrize("index", range(2), ids=["your own reward", "the losses alone"])
def test_python_example_of_the_readme_runs(reader, index, tmp_path, monkeypatch):
    code = blocks("python")[index].replace(MODEL, "tiny").replace("total_steps=50", "total_steps=1")
    code = code.replace("rollout_batch_size=64", "rollout_batch_size=4, mini_batch_size=4")
    monkeypatch.chdir(reader)
    (tmp_path / "example.py").write_text(code, encoding="utf-8")
    runpy.run_path(str(tmp_path / "example.py"), run_name="__main__")
    assert index == 1 or (reader / "aligned/model.safetensors").is_file()
    assert len(blocks("python")) == 2
