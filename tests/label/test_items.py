"""What is put before people: replies of a file or of a model, what is left out of them, and what is refused at once."""

from __future__ import annotations

import hashlib
import json
import socket
from pathlib import Path

import pytest

from fastrlhf.cli import main
from fastrlhf.config.errors import UserError
from fastrlhf.config.language import language_of
from fastrlhf.inference import sample
from fastrlhf.label.items import read_items, user_text
from fastrlhf.label.sampling import replies_path, sampled_items
from tests import tiny
from tests.label_runs import ROWS, write_replies

SAMPLING = {"n": 3, "max_new_tokens": 5, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 1, "raw": False}


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_rows_of_a_prompt_are_one_item_in_the_order_of_the_file(tmp_path):
    said = []
    items = read_items(write_replies(tmp_path / "r.jsonl"), None, said.append)
    assert [(item.prompt, [reply.text for reply in item.replies]) for item in items] == ROWS and said == []
    first = items[0].replies[1]
    assert (first.ids, first.model, first.model_hash) == ([1, 6], "runs/secret-model", "f00d")
    assert len({item.id for item in items}) == 4
    mixed = [{"prompt": "a", "responses": ["x", "y"], "response_ids": [[1], [2]]}, {"prompt": "a", "completion": "z"}]
    (item,) = read_items(write(tmp_path / "m.jsonl", mixed), None, said.append)
    assert [(reply.text, reply.ids) for reply in item.replies] == [("x", [1]), ("y", [2]), ("z", None)]
    assert item.id != read_items(write(tmp_path / "m.jsonl", mixed[:1]), None, said.append)[0].id


def test_what_cannot_be_judged_is_left_out_and_counted(tmp_path):
    said = []
    rows = [{"prompt": "a", "responses": ["x", " ", "x", ""]}, {"prompt": "b", "response": "\n"}]
    (item,) = read_items(write(tmp_path / "r.jsonl", rows), None, said.append)
    assert [reply.text for reply in item.replies] == ["x"]
    assert said == [
        "3 replies empty are left out",
        "1 replies that repeat another one are left out",
        "1 prompts without any reply are left out",
    ]


def test_replies_to_other_prompts_are_refused_by_line(tmp_path):
    said, replies = [], write_replies(tmp_path / "r.jsonl")
    asked = write(tmp_path / "p.jsonl", [{"prompt": prompt} for prompt, _ in ROWS] + [{"prompt": "unanswered"}])
    assert len(read_items(replies, asked, said.append)) == 4
    assert said == [f"1 of 5 prompts have no reply in {replies} and are left out"]
    other = write(tmp_path / "q.jsonl", [{"prompt": prompt} for prompt, _ in ROWS[:2]])
    with pytest.raises(
        UserError, match=r"--replies: .*r.jsonl:6: the reply is to a prompt that .*q.jsonl does not have"
    ):
        read_items(replies, other, said.append)


@pytest.mark.parametrize(
    ("prompts", "language"),
    [
        (["How are you?"], "en"),
        (["今天天气怎么样？"], "zh"),
        (["用 PyTorch 写一个 transformer 的训练循环，并解释每一步的作用。"], "zh"),
        (["What does 你好 mean in the English language of today?"], "en"),
        (["12 + 30 ="], "en"),
        ([[{"role": "user", "content": "你好"}]], "zh"),
        ([[{"role": "user", "content": "Hello"}]], "en"),
        (
            [[{"role": "system", "content": "You are a helpful assistant. " * 9}, {"role": "user", "content": "你好"}]],
            "zh",
        ),
        (["你好", "谢谢", "Explain the history of the Roman empire at length, please, with all its wars."], "zh"),
        (["你好", "Hello"], "en"),
        (["これはペンですか。漢字も少しあります。"], "en"),
    ],
)
def test_the_language_is_that_of_the_prompts(tmp_path, prompts, language):
    rows = [{"prompt": prompt, "response": "ok"} for prompt in prompts]
    items = read_items(write(tmp_path / "r.jsonl", rows), None, print)
    assert language_of(user_text(item.prompt) for item in items) == language


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    tiny.llama().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def test_replies_are_sampled_as_generate_does_and_kept(model, tmp_path):
    said = []
    prompts = write(tmp_path / "p.jsonl", [{"prompt": prompt, "note": 1} for prompt in [*tiny.PROMPTS, "the cat"]])
    output = tmp_path / "feedback.jsonl"
    items = sampled_items(str(prompts), str(model), output, said.append, **SAMPLING)
    texts = [reply.text for replies in sample(str(model), tiny.PROMPTS, **SAMPLING) for reply in replies]
    expected = {
        p: {t for t in texts[3 * i : 3 * i + 3] if t.strip() and "\0" not in t} for i, p in enumerate(tiny.PROMPTS)
    }
    assert {item.prompt: {reply.text for reply in item.replies} for item in items} == expected
    assert any("sampled 3 replies to 6 of 6 prompts" in line for line in said)
    assert any("left out" in line for line in said), "one of them holds a NUL character"
    reply, digest = items[0].replies[0], hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    assert reply.model == str(model) and reply.ids
    assert reply.model_hash == hashlib.sha256(f"{digest}  model.safetensors\n".encode()).hexdigest()

    kept, said[:] = replies_path(output).read_bytes(), []
    again = sampled_items(str(prompts), str(model), output, said.append, **SAMPLING)
    assert again == items and not any("sampled" in line for line in said)
    assert replies_path(output).read_bytes() == kept
    with pytest.raises(UserError, match=r"holds replies sampled with .*name another --output, or judge these replies"):
        sampled_items(str(prompts), str(model), output, said.append, **{**SAMPLING, "seed": 2})
    tiny.llama(seed=3).save_pretrained(model)
    with pytest.raises(UserError, match=r"--policy: the weights of .* are no longer those that wrote"):
        sampled_items(str(prompts), str(model), output, said.append, **SAMPLING)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "arguments are required: --output"),
        (["p.jsonl", "--output", "o.jsonl"], "give one of --policy and --replies"),
        (["--policy", "base", "--output", "o.jsonl"], "arguments are required: PROMPTS"),
        (["p.jsonl", "--policy", "./none", "--output", "o.jsonl"], "--policy: ./none does not exist"),
        (["--replies", "r.jsonl", "--output", "o.json"], "o.json must end with .jsonl"),
        (["--replies", "r.jsonl", "--output", "folder.jsonl"], "folder.jsonl is a folder"),
        (["--replies", "r.jsonl", "--output", "r.jsonl/o.jsonl"], "cannot be written"),
        (["--replies", "none.jsonl", "--output", "o.jsonl"], "none.jsonl: no such file"),
        (["--replies", "p.jsonl", "--output", "o.jsonl"], 'p.jsonl:1: field "response" is missing'),
        (["q.jsonl", "--replies", "r.jsonl", "--output", "o.jsonl"], "does not have"),
        (["--replies", "r.jsonl", "--output", "o.jsonl", "--annotators", "ann,b/o"], "--annotators: 'b/o' is no name"),
        (["--replies", "r.jsonl", "--output", "o.jsonl", "--annotators-per-prompt", "0"], "must be at least 1"),
        (["--replies", "r.jsonl", "--output", "o.jsonl", "--port", "TAKEN"], "is in use on 127.0.0.1"),
        (["--replies", "r.jsonl", "--output", "o.jsonl", "--host", "nowhere.invalid"], "is no address of this machine"),
        (["--replies", "r.jsonl", "--output", "o.jsonl", "--lang", "fr"], "invalid choice: 'fr'"),
        (["--replies", "\x1b[2J\u202er.jsonl", "--output", "o.jsonl"], "error: r.jsonl: no such file"),
        (["--summary", "p.jsonl"], "holds no judgement of fastrlhf label"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    write_replies(tmp_path / "r.jsonl")
    write(tmp_path / "p.jsonl", [{"prompt": prompt} for prompt, _ in ROWS])
    write(tmp_path / "q.jsonl", [{"prompt": "another"}])
    (tmp_path / "folder.jsonl").mkdir()
    before = sorted(tmp_path.iterdir())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        defaults = [] if "--port" in arguments or "--summary" in arguments else ["--port", "0"]
        code = main(["label", *(port if word == "TAKEN" else word for word in [*arguments, *defaults])])
    err = capsys.readouterr().err
    assert code == 2 and says in err and err.startswith("error: ") and len(err.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before
