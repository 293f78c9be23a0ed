"""`fastrlhf generate --best-of`: the highest reward wins, `fastrlhf sft` reads the winners, and mistakes are a line."""

from __future__ import annotations

import json
import math
import random
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from fastrlhf import cli, inference
from fastrlhf.data.checks import BadRow, DroppedRow
from fastrlhf.data.feedback import Prompt, parse_conversation
from fastrlhf.eval.best_of import BestOf, Winner, choose
from fastrlhf.inference import Reply
from fastrlhf.report.page import figure_of
from fastrlhf.rl.evaluation import best_of_n_kl
from tests import tiny

SHORT = ("--max-new-tokens", "8", "--seed", "3")
REWARD = """
def letters(prompts, responses):
    return [float(len(r)) for r in responses]

def brief(prompts, responses):
    return [-float(len(r)) for r in responses]

def some(prompts, responses):
    return [None if "cat" in p else 1.0 for p in prompts]

def blind(prompts, responses):
    return [None] * len(responses)

def of_nothing(prompts, responses, answer):
    return [1.0] * len(responses)
"""
# Columns that mean something to SFT beside a prompt and a reply, and one that does not.
BESIDE = {"id": 7, "chosen": "yes", "rejected": "no", "score": 3, "completion": "yes", "label": 0, "judgement_id": "a"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("best_of")
    tiny.llama().save_pretrained(root / "base")
    tiny.tokenizer().save_pretrained(root / "base")
    torch.manual_seed(1)
    LlamaForSequenceClassification(LlamaConfig(**tiny.SHAPE, num_labels=1)).save_pretrained(root / "rm")
    tiny.tokenizer().save_pretrained(root / "rm")
    asked = [*tiny.PROMPTS[:3], [{"role": "system", "content": "please"}, *tiny.chat("今天的天气")]]
    rows = [{"prompt": prompt, **BESIDE} for prompt in asked]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (root / "rules.py").write_text(REWARD)
    return root


@pytest.fixture
def run(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)

    def command(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return command


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_winner_is_the_reply_of_the_highest_reward_among_those_of_generate(run, tmp_path):
    files = ("--prompts", "prompts.jsonl", "--output", tmp_path / "all.jsonl")
    assert run("generate", "base", *SHORT, "--samples", 4, *files)[0] == 0
    said = [row["response"] for row in rows_of(tmp_path / "all.jsonl")]
    groups = [said[i : i + 4] for i in range(0, 16, 4)]
    files = ("--prompts", "prompts.jsonl", "--output", tmp_path / "best.jsonl")
    code, out, err = run("generate", "base", *SHORT, "--best-of", 4, "--reward", "rules.py:letters", *files)
    assert (code, out) == (0, f"4 rows -> {tmp_path}/best.jsonl\n"), err
    rows = rows_of(tmp_path / "best.jsonl")
    assert [row["response"] for row in rows] == [max(group, key=len) for group in groups]
    assert [row["reward"] for row in rows] == [max(map(len, group)) for group in groups]
    assert [row["reward_mean"] for row in rows] == [pytest.approx(sum(map(len, group)) / 4) for group in groups]
    assert all((row["best_of"], row["unscored"], row["id"]) == (4, 0, 7) for row in rows)
    best, mean = (sum(row[name] for row in rows) / 4 for name in ("reward", "reward_mean"))
    line = next(line for line in err.splitlines() if line.startswith("best of 4 over 4 prompts: "))
    assert best > mean and f"reward {figure_of(best)} ± " in line and f"of all replies {figure_of(mean)} ± " in line
    assert line.endswith(f"at most {math.log(4) - 3 / 4:.2f} nats of KL to one sample of base")


def test_on_the_screen_each_winner_has_its_prompt_and_its_rewards(run, tmp_path):
    asked = ("--prompts", "prompts.jsonl", "--best-of", 3, "--reward", "rm")
    code, out, err = run("generate", "base", *SHORT, *asked, "--output", tmp_path / "best.jsonl")
    assert code == 0, err
    rows = rows_of(tmp_path / "best.jsonl")
    heads = [f" [reward {row['reward']:.6g}, mean of 3 {row['reward_mean']:.6g}]" for row in rows]
    texts = ["the cat", "please tell me about the moon", "今天的天气", "今天的天气"]
    shown = "".join(f"--- {t}{h}\n{r['response']}\n" for t, h, r in zip(texts, heads, rows, strict=True))
    code, out, err = run("generate", "base", *SHORT, *asked)
    assert code == 0 and out == shown and "best of 3 over 4 prompts" in err
    scored = ("--prompts", tmp_path / "best.jsonl", "--output", tmp_path / "scores.jsonl")
    assert run("score", "rm", *scored)[0] == 0
    whole = [row for row in rows_of(tmp_path / "scores.jsonl") if row["finished"]]
    assert all(row["score"] == pytest.approx(row["reward"], abs=0.5) for row in whole)  # `score` reads texts


def test_sft_reads_every_reply_of_generate_from_the_file_as_it_is(run, tmp_path):
    files = ("--prompts", "prompts.jsonl", "--samples", 2, "--output", tmp_path / "replies.jsonl")
    code, _, err = run("generate", "base", *SHORT, *files)
    left_out = ", ".join(sorted(BESIDE.keys() - {"id"}))
    assert code == 0 and f"columns left out, which SFT would read beside prompt and response: {left_out}\n" in err
    rows = rows_of(tmp_path / "replies.jsonl")
    assert len(rows) == 8
    for row in rows:
        read = parse_conversation(row, "here")
        reply = read.response if isinstance(row["prompt"], str) else read.messages[-1]["content"]
        assert reply == row["response"] != "yes" and row["id"] == 7


def test_a_reply_that_sft_would_not_read_is_kept_with_the_columns_that_it_would(capsys):
    [row] = inference.rows_of_replies([(Prompt("the cat", BESIDE), " ")], print)
    assert row == {"id": 7, "prompt": "the cat", "response": " "}
    assert "columns left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    "verb", [("generate",), ("generate", "--best-of", 2, "--reward", "rules.py:letters"), ("eval",)]
)
def test_a_prompt_that_is_too_long_is_named_by_its_row(run, tmp_path, verb):
    rows = [{"prompt": "the cat"}, {"prompt": "the cat " * 600}]
    long = tmp_path / "long.jsonl"
    long.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = (long,) if verb == ("eval",) else ("--prompts", long)
    code, _, err = run(verb[0], "base", *asked, *SHORT, *verb[1:])
    assert code == 2 and f"{long}:2: the prompt has " in err and "positions" in err


def test_sft_learns_the_winners_from_the_file_as_it_is(run, tmp_path):
    best = tmp_path / "winners.jsonl"
    files = ("--prompts", "prompts.jsonl", "--output", best)
    code, _, err = run("generate", "base", *SHORT, "--best-of", 4, "--reward", "rules.py:letters", *files)
    left_out = ", ".join(sorted(BESIDE.keys() - {"id"}))
    assert code == 0 and f"columns left out, which SFT would read beside prompt and response: {left_out}" in err
    rows = rows_of(best)
    for row in rows:
        read = parse_conversation(row, "here")
        reply = read.response if isinstance(row["prompt"], str) else read.messages[-1]["content"]
        assert reply == row["response"] != "yes"
    fields = ("total_steps=24", "mini_batch_size=4", "max_tokens=64", "learning_rate=1e-2", "lr_schedule=constant")
    code, out, err = run("sft", "model=base", f"data={best}", f"output_dir={tmp_path / 'run'}", *fields)
    assert code == 0, err
    greedy = ("--temperature", 0, "--max-new-tokens", 40, "--prompts", best, "--output", tmp_path / "again.jsonl")
    code, _, err = run("generate", tmp_path / "run/final", *greedy)
    assert code == 0, err
    again = [row["response"] for row in rows_of(tmp_path / "again.jsonl")]
    assert again == [row["response"] for row in rows], "the likeliest reply is the winner now, and ends where it does"


def test_of_equal_rewards_the_first_reply_wins():
    replies = [Reply(text, [1], True) for text in "abcd"]
    assert choose(Prompt("x"), replies, [1.0, 3.0, 3.0, None]) == Winner(Prompt("x"), replies[1], 3.0, 7 / 3, 1)
    assert choose(Prompt("x"), replies, [None] * 4) is None


def test_the_bound_is_the_kl_of_the_largest_of_n_uniform_numbers():
    """Its density is n u^(n-1): KL to the uniform is the mean of log(n u^(n-1))."""
    draw = random.Random(0)
    logs = [math.log(8 * max(draw.random() for _ in range(8)) ** 7) for _ in range(20000)]
    assert sum(logs) / len(logs) == pytest.approx(best_of_n_kl(8), abs=0.02)


def made(*texts: str, prompt: object = "the cat", **columns: object) -> BestOf:
    winners = [Winner(Prompt(prompt, columns, "p.jsonl:1"), Reply(t, [1], False), 1.0, 0.5, 0) for t in texts]
    return BestOf(2, len(winners) + 1, winners, [1.0, 0.0] * len(winners))


def test_what_sft_would_not_read_as_it_is_is_left_out_and_told():
    said: list[str] = []
    transcript = "\n\nHuman: hi\n\nAssistant: ho"
    rows = made("yes", " ", transcript, "a\0").rows(said.append)
    assert [row["response"] for row in rows] == ["yes"]
    assert said == ['3 of 4 winners left out, the first because of p.jsonl:1: field "response" is empty; fill it or '
                    "delete the row"]  # fmt: skip
    lines = list(made("yes").lines("base"))
    assert lines[1:] == [
        "1 of 2 prompts left out: the reward could judge none of their replies",
        "1 of 1 winners were cut off; a larger --max-new-tokens lets them end",
    ]


@pytest.mark.parametrize(
    "columns",
    [
        {"response_0": "a", "response_1": "b", "better_response_id": 0},
        {"edited": "a"},
        {"weight": 0},
        {"unsafe": True},
        {"kto_tag": False},
        {"messages": [*tiny.chat("x"), {"role": "assistant", "content": "y"}]},
        {"tools": "look"},
        {"responses": ["a", "b"], "ranking": [0, 1]},
    ],
    ids=lambda columns: "+".join(columns),
)
def test_no_column_of_the_prompt_changes_what_is_learnt(columns):
    for prompt in ("the cat", tiny.chat("the cat")):
        plain = {"prompt": prompt, "response": "the mat"}
        meant = parse_conversation(plain, "x")
        with suppress(BadRow, DroppedRow):  # as they stand SFT would stop, drop the row or learn another reply
            assert parse_conversation({**columns, **plain}, "x") != meant
        (row,) = made("the mat", prompt=prompt, topic="xy", **columns).rows(lambda line: None)
        assert parse_conversation(row, "x") == meant and row["topic"] == "xy"


ASKED = ("base", "--prompt", "the cat", *SHORT)
JUDGED = (*ASKED, "--reward", "rules.py:letters")
MISTAKES = {
    "best of none": ([*JUDGED, "--best-of", "0"], "--best-of: 0; expected at least 2 replies, among which the reward"),
    "best of one": ([*JUDGED, "--best-of", "1"], "--best-of: 1; expected at least 2"),
    "best of too many": ([*JUDGED, "--best-of", "5000"], "--best-of: 5000 replies to a prompt; at most 1024"),
    "no reward": ([*ASKED, "--best-of", "4"], "--best-of: 4 replies need a judge; give --reward FOLDER or FILE.py:"),
    "a reward alone": (JUDGED, "--reward: it chooses among several replies to a prompt; give --best-of N too"),
    "samples": ([*JUDGED, "--best-of", "4", "--samples", "1"], "--samples: --best-of 4 says how many replies are"),
    "greedy": ([*JUDGED, "--best-of", "4", "--temperature", "0"], "--temperature: 0 makes all replies to a prompt the"),
    "one token": ([*JUDGED, "--best-of", "4", "--top-k", "1"], "--top-k: 1 makes all replies to a prompt the same"),
    "no prompt": (["base", "--best-of", "4", "--reward", "rm"], "arguments are required: --prompt or --prompts FILE"),
    "missing reward": (
        [*ASKED, "--best-of", "4", "--reward", "rule.py:f"],
        "--reward: rule.py does not exist; did you",
    ),
    "policy as reward": ([*ASKED, "--best-of", "4", "--reward", "base"], "'base' is no sequence classifier"),
    "column": (
        [*ASKED, "--best-of", "4", "--reward", "rules.py:of_nothing"],
        "reward function of_nothing: its argument 'answer' is no column of the prompts; columns: none",
    ),
    "reward model as policy": (
        ["rm", "--prompt", "x", "--best-of", "4", "--reward", "rm"],
        "FOLDER: 'rm' is a reward model, which writes no text",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_before_any_sampling(run, name):
    arguments, expected = MISTAKES[name]
    code, out, err = run("generate", *arguments)
    assert code == 2 and expected in err and len(err.splitlines()) == 1 and out == "", err


def test_a_reward_that_judges_nothing_is_a_mistake_and_writes_no_file(run, tmp_path):
    asked = (*ASKED, "--best-of", 3, "--output", tmp_path / "best.jsonl", "--reward")
    code, _, err = run("generate", *asked, "rules.py:blind")
    assert code == 2 and err.splitlines()[-1].startswith("error: reward: None for all 3 replies; what it cannot"), err
    assert not (tmp_path / "best.jsonl").exists()


def test_prompts_that_the_reward_cannot_judge_are_left_out_and_counted(run, tmp_path):
    asked = ("--prompts", "prompts.jsonl", "--best-of", 2, "--reward", "rules.py:some")
    code, _, err = run("generate", "base", *SHORT, *asked, "--output", tmp_path / "best.jsonl")
    assert code == 0 and "1 of 4 prompts left out: the reward could judge none of their replies" in err
    assert [row["reward"] for row in rows_of(tmp_path / "best.jsonl")] == [1.0] * 3
