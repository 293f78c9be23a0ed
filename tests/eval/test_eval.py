"""`fastrlhf eval` end to end on tiny models: the table, the JSON and the page say the same, and mistakes are a line."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForSequenceClassification

from fastrlhf import cli
from fastrlhf.eval.table import KEYWORDS_SHOWN
from fastrlhf.inference import score
from tests import tiny
from tests.run_folders import HOSTILE

SHORT = ("--max-new-tokens", "8", "--samples", "2", "--seed", "3")
REWARD = """
def letters(prompts, responses):
    return [None if not r else float(len(r)) for r in responses]

def of_column(prompts, responses, topic):
    return [float(len(t)) for t in topic]

def of_nothing(prompts, responses, answer):
    return [1.0] * len(responses)

def blind(prompts, responses):
    return [None] * len(responses)

def of_tokens(prompts, response_ids):
    return [[1.0] * len(ids) for ids in response_ids]
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("eval")
    for name, seed in (("ours", 0), ("theirs", 1)):
        tiny.llama(seed=seed).save_pretrained(root / name)
        tiny.tokenizer().save_pretrained(root / name)
    scalar = LlamaForSequenceClassification(LlamaConfig(**tiny.SHAPE, num_labels=1))
    scalar.save_pretrained(root / "rm")
    tiny.tokenizer().save_pretrained(root / "rm")
    tiny.llama(max_position_embeddings=16).save_pretrained(root / "short")
    tiny.tokenizer().save_pretrained(root / "short")
    turns = [*tiny.chat("the cat"), {"role": "assistant", "content": "yes"}, *tiny.chat("今天的天气")]
    rows = [{"prompt": prompt, "topic": "xy"} for prompt in (*tiny.PROMPTS[:3], turns)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (root / "rules.py").write_text(REWARD)
    (root / "words.txt").write_text("e\nzz 中\n", encoding="utf-8")
    (root / "letters.txt").write_text("[a-m]\n")
    (root / "blank.txt").write_text("\n")
    (root / "bad.txt").write_text("(\n")
    (root / "none.jsonl").write_text("")
    return root


@pytest.fixture
def run(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)

    def command(*arguments: object) -> tuple[int, str, str]:
        code = cli.main(["eval", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return command


def test_table_json_and_page_say_the_same(run, tmp_path):
    lists = ("--keywords", "words.txt", "--refusals", "letters.txt")
    files = ("--json", tmp_path / "made/e.json", "--report", tmp_path / "made/e.html")
    code, out, err = run(
        "ours", "prompts.jsonl", *SHORT, "--reward", "rules.py:letters", "--against", "theirs", *lists, *files
    )
    assert code == 0, err
    made = json.loads((tmp_path / "made/e.json").read_text(encoding="utf-8"))
    assert made["models"] == ["ours", "theirs"] and made["prompt_count"] == 4 and made["sampling"]["n"] == 2
    rows = made["replies"]
    assert len(rows) == 8 and rows[0]["prompt"] == "the cat" and len(rows[7]["prompt"]) == 3

    ours = made["figures"]["ours"]
    assert ours["refusals"]["mean"] == sum(row["refusal"] is not None for row in rows) / 8
    assert ours["keywords"]["each"]["e"]["mean"] == sum("e" in row["keywords"] for row in rows) / 8
    assert ours["cut_off"]["mean"] == sum(not row["finished"] for row in rows) / 8
    assert all(row["finished"] or row["tokens"] == 8 for row in rows)
    scored = [row["score"] for row in rows if row["score"] is not None]
    assert ours["reward"]["mean"] == pytest.approx(sum(scored) / len(scored))
    assert all(row["score"] == len(row["response"]) or not row["response"] for row in rows)
    pairs = [(row["score"], row["against"]["score"]) for row in rows]
    pairs = [(a, b) for a, b in pairs if a is not None and b is not None]
    assert made["win_rate"]["rate"] == sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)

    found = made["win_rate"]
    assert f"ours wins {found['rate']:.1%}" in out and f"{found['wins']} won, {found['ties']} tied" in out
    page = (tmp_path / "made/e.html").read_text(encoding="utf-8")
    for said in ("refusals", "zz 中", "script: ", "distinct-2", "tokens, p5 / p25 / p50 / p75 / p95"):
        assert said in out and said in page
    assert page.count("<svg") == 2 and "last of 3 turns" in page and "progress" not in out
    assert "sampled 2 replies to 4 of 4 prompts" in err


def test_the_replies_are_those_of_generate_and_the_scores_those_of_a_reward_model(run, tmp_path, capsys):
    code, _, err = run("ours", "prompts.jsonl", *SHORT, "--reward", "rm", "--json", tmp_path / "e.json")
    assert code == 0, err
    rows = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))["replies"]
    files = ("--prompts", "prompts.jsonl", "--output", str(tmp_path / "r.jsonl"))
    assert cli.main(["generate", "ours", *SHORT, *files]) == 0
    said = [json.loads(line)["response"] for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [row["response"] for row in rows] == said
    scores = (str(tmp_path / "r.jsonl"), "--output", str(tmp_path / "s.jsonl"))
    assert cli.main(["score", "rm", "--prompts", *scores]) == 0
    given = [json.loads(line)["score"] for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    whole = [i for i, row in enumerate(rows) if row["finished"]]
    for i in whole:  # `score` takes every reply for a whole one, and a text for its canonical tokens
        assert rows[i]["score"] == pytest.approx(given[i], abs=0.5)
    assert len({round(row["score"], 6) for row in rows}) > 4
    capsys.readouterr()


def test_a_model_against_itself_ties_with_itself(run, tmp_path):
    rest = ("--reward", "rules.py:of_tokens", "--against", "ours", "--json", tmp_path / "e.json")
    code, out, err = run("ours", "prompts.jsonl", *SHORT, *rest)
    assert code == 0, err
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["models"] == ["ours", "ours (again)"]
    assert found["win_rate"]["ties"] == 8 and found["win_rate"]["interval"] == [0.5, 0.5]
    assert "ours wins 50.0% (95% interval 50.0% to 50.0%) against ours (again)" in out
    assert all(row["score"] == row["tokens"] for row in found["replies"]), "rewards of tokens are summed"


def test_a_model_of_another_vocabulary_is_scored_by_its_texts(run, tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<other>"])
    tiny.llama(seed=1, vocab_size=321).save_pretrained("other")
    tokenizer.save_pretrained("other")
    code, _, err = run(
        "ours", "prompts.jsonl", *SHORT, "--reward", "rm", "--against", "other", "--json", tmp_path / "e"
    )
    assert code == 0, err
    rows = json.loads((tmp_path / "e").read_text(encoding="utf-8"))["replies"]
    texts = score("rm", [row["prompt"] for row in rows], [row["against"]["response"] for row in rows])
    assert [row["against"]["score"] for row in rows] == pytest.approx(texts, abs=1e-4)
    cut = [row for row in rows if not row["finished"]]
    texts = score("rm", [row["prompt"] for row in cut], [row["response"] for row in cut])
    assert cut and [row["score"] for row in cut] != pytest.approx(texts, abs=1e-4), "a cut reply has no end"


def test_of_many_keywords_the_commonest_are_shown(run, tmp_path):
    words = [f"absent{i}" for i in range(KEYWORDS_SHOWN)]
    (tmp_path / "w.txt").write_text("\n".join([*words, "e", "a"]))
    code, out, err = run("ours", "prompts.jsonl", *SHORT, "--keywords", tmp_path / "w.txt", "--json", tmp_path / "e")
    each = json.loads((tmp_path / "e").read_text())["figures"]["ours"]["keywords"]["each"]
    assert code == 0 and list(each) == [*words, "e", "a"], err
    shown = [line.split()[0] for line in out.splitlines() if line.startswith("  ") and "%" in line]
    hits = [word for word in ("e", "a") if each[word]["mean"]]
    assert hits and set(shown[: len(hits)]) == set(hits) and len(shown) == KEYWORDS_SHOWN + 1
    assert "2 more, each at most 0.0%" in out


def test_columns_reach_the_reward_and_stdin_is_read(run, monkeypatch, tmp_path):
    rest = ("--reward", "rules.py:of_column", "--json", tmp_path / "e.json")
    assert run("ours", "prompts.jsonl", *SHORT, *rest)[0] == 0
    assert {row["score"] for row in json.loads((tmp_path / "e.json").read_text())["replies"]} == {2.0}
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n"))
    code, out, err = run("ours", "-", "--max-new-tokens", "2")
    assert code == 0 and "refusals" in out and "reward" not in out and "keywords" not in out, err


def test_a_reward_that_judges_nothing_is_said_to(run, tmp_path):
    rest = ("--reward", "rules.py:blind", "--against", "theirs", "--report", tmp_path / "e.html")
    code, out, err = run("ours", "prompts.jsonl", *SHORT, *rest)
    assert code == 0 and "no pair of replies has two scores: 0 won, 0 tied, 0 lost, 8 without a score" in out, err
    assert [line.split()[-2:] for line in out.splitlines() if line.startswith("reward, mean")] == [["n/a", "n/a"]]
    assert (tmp_path / "e.html").read_text(encoding="utf-8").count("<svg") == 1


def test_what_a_model_or_a_list_says_is_inert_on_the_page_and_in_the_terminal(run, tmp_path):
    prompts, words = tmp_path / "p.jsonl", tmp_path / "<b>words\u202e.txt"
    short = [text[:60] for text in HOSTILE]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in short if "\0" not in text))
    listed = [text.replace("\x1b", "") for text in short if "\n" not in text]
    words.write_text("\n".join([*listed, "\u202ekeyword\x1b[31m"]), encoding="utf-8")
    files = ("--keywords", words, "--report", tmp_path / "e.html", "--max-new-tokens", "4", "--raw")
    code, out, err = run("ours", prompts, *files)
    assert code == 0, err
    page = (tmp_path / "e.html").read_text(encoding="utf-8")
    for text in (page, out):
        assert "\x1b" not in text and "\u202e" not in text and "\x00" not in text
    assert "<script" not in page and "<img" not in page and "<iframe" not in page and "onerror=alert(1)&gt;" in page
    assert "default-src 'none'" in page and 'src="' not in page and 'href="http' not in page


def test_every_option_stands_in_the_docs(run):
    _, out, _ = run("--help")
    page = (Path(__file__).parents[2] / "docs/eval.md").read_text(encoding="utf-8")
    options = set(re.findall(r"--[a-z-]+", out)) - {"--help", "--debug"}
    assert len(options) >= 17 and [option for option in options if f"`{option}`" not in page] == []


MISTAKES = {
    "a reward model as policy": (["rm", "prompts.jsonl"], "FOLDER: 'rm' is a reward model, which writes no text"),
    "a reward model to compare with": (
        ["ours", "prompts.jsonl", "--reward", "rules.py:letters", "--against", "rm"],
        "--against: 'rm' is a reward model, which writes no text",
    ),
    "no judge": (
        ["ours", "prompts.jsonl", "--against", "theirs"],
        "--against: a win rate needs a judge; give --reward",
    ),
    "no prompts": (["ours", "none.jsonl"], "none.jsonl"),
    "missing prompts": (["ours", "promts.jsonl"], "PROMPTS: promts.jsonl does not exist; did you mean prompts.jsonl?"),
    "missing model": (["./our", "prompts.jsonl"], "FOLDER: ./our does not exist; did you mean ours?"),
    "missing rival": (["ours", "prompts.jsonl", "--against", "./their"], "--against: ./their does not exist"),
    "policy as reward": (["ours", "prompts.jsonl", "--reward", "theirs"], "'theirs' is no sequence classifier"),
    "missing reward": (["ours", "prompts.jsonl", "--reward", "rule.py:f"], "--reward: rule.py does not exist; did you"),
    "reward without its function": (["ours", "prompts.jsonl", "--reward", "rules.py"], "name the function in it"),
    "reward of a column": (
        ["ours", "prompts.jsonl", "--reward", "rules.py:of_nothing"],
        "its argument 'answer' is no column of the prompts; columns: topic",
    ),
    "empty keywords": (["ours", "prompts.jsonl", "--keywords", "blank.txt"], "--keywords: blank.txt is empty"),
    "missing keywords": (["ours", "prompts.jsonl", "--keywords", "w.txt"], "--keywords: w.txt cannot be read"),
    "bad pattern": (["ours", "prompts.jsonl", "--refusals", "bad.txt"], "--refusals: bad.txt:1: '(' is no regular"),
    "no samples": (["ours", "prompts.jsonl", "--samples", "0"], "n must be at least 1"),
    "a prompt that is too long": (
        ["ours", "prompts.jsonl", "--against", "short", "--reward", "rm", "--max-new-tokens", "8"],
        "--against: prompts.jsonl:2: the prompt has",
    ),
    "json over prompts": (["ours", "prompts.jsonl", "--json", "prompts.jsonl"], "--json: prompts.jsonl exists; name"),
    "one file for both": (["ours", "prompts.jsonl", "--json", "a", "--report", "a"], "is the file of --json too"),
    "nothing": ([], "required: FOLDER, PROMPTS"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_before_any_sampling(run, name):
    arguments, expected = MISTAKES[name]
    code, _, err = run(*arguments, *([] if "8" in arguments or not arguments else SHORT[:2]))
    assert code == 2 and expected in err and len(err.splitlines()) == 1, err
    assert "sampled" not in err


def test_one_file_under_two_names_is_refused_before_any_sampling(run, workplace):
    code, _, err = run("ours", "prompts.jsonl", *SHORT, "--json", "both.x", "--report", workplace / "both.x")
    assert code == 2 and "is the file of --json too; name two files" in err and not (workplace / "both.x").exists()
