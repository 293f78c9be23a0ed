"""A file that is no UTF-8: the error names file and line, the encoding that it probably has, and the command."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastrlhf.config.encodings import guess_encoding
from fastrlhf.config.errors import UserError
from fastrlhf.config.recipe import load_recipe
from fastrlhf.data.dataset import load_conversations, load_feedback, load_prompts
from fastrlhf.data.templates import resolve_chat_template
from fastrlhf.inference import read_prompts
from fastrlhf.label.items import read_items
from fastrlhf.label.store import AppendLog
from fastrlhf.label.summary import read_judgements
from tests import tiny

SIMPLIFIED = "雨伞应该怎么保养？用后晾干，再收起来。"
TRADITIONAL = "雨傘應該怎麼保養？用後晾乾，再收起來。"
# Python's name of an encoding, how iconv calls it, a text in it
ENCODINGS = {
    "gbk": ("gbk", "GB18030", SIMPLIFIED),
    "gb18030": ("gb18030", "GB18030", SIMPLIFIED + "䶮𠮷"),  # characters that GBK does not have
    "big5": ("big5", "BIG5", TRADITIONAL),
    "utf-16": ("utf-16", "UTF-16", SIMPLIFIED),
    "utf-16-le": ("utf-16-le", "UTF-16LE", SIMPLIFIED),
    "utf-16-be": ("utf-16-be", "UTF-16BE", SIMPLIFIED),
}


def _read(read: Callable[[str], object], name: str) -> Callable[[Path, Callable[[str], bytes], str], None]:
    """A reader of a file of that name: its second line has the text, the first one is plain ASCII."""

    def use(folder: Path, encode: Callable[[str], bytes], text: str) -> None:
        rows = [{"prompt": "Hi", "response": "Hello"}, {"prompt": text, "response": text}]
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        content = {".csv": f"prompt,response\nHi,{text}\n", ".json": f"[{lines[0]},\n{lines[1]}]"}
        data = encode(content.get(Path(name.removesuffix(".gz")).suffix, "\n".join(lines) + "\n"))
        (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        read(str(folder / name))

    return use


def _stdin(folder: Path, encode: Callable[[str], bytes], text: str) -> None:
    sys.stdin = io.TextIOWrapper(io.BytesIO(encode(f"Hi\n{text}\n")), encoding="latin-1")  # whatever the locale says
    read_prompts("-")


def _recipe(folder: Path, encode: Callable[[str], bytes], text: str) -> None:
    (folder / "r.yaml").write_bytes(encode(f"policy: x\nprompts: {text}\n"))
    load_recipe("ppo", str(folder / "r.yaml"), [])


def _template(folder: Path, encode: Callable[[str], bytes], text: str) -> None:
    (folder / "t.jinja").write_bytes(encode("{{ messages }}\n" + text))
    resolve_chat_template(tiny.tokenizer(), str(folder / "t.jinja"))


READERS = {
    "jsonl": _read(load_prompts, "a.jsonl"),
    "ndjson": _read(load_conversations, "a.ndjson"),
    "json": _read(load_feedback, "a.json"),
    "csv": _read(load_prompts, "a.csv"),
    "packed": _read(load_prompts, "a.jsonl.gz"),
    "--prompts": _read(read_prompts, "a.jsonl"),
    "label --replies": _read(lambda path: read_items(path, None, print), "a.jsonl"),
    "label --summary": _read(read_judgements, "a.jsonl"),
    "label --output": _read(lambda path: AppendLog(Path(path), print), "a.jsonl"),
    "stdin": _stdin,
    "recipe": _recipe,
    "chat template": _template,
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_of_peoples_text_names_the_encoding(reader, encoding, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", sys.stdin)
    codec, name, text = ENCODINGS[encoding]
    with pytest.raises(UserError) as error:
        READERS[reader](tmp_path, lambda content: content.encode(codec), text)
    said = str(error.value)
    assert f"iconv -f {name} -t UTF-8" in said, said
    if name in ("GB18030", "BIG5"):
        where = {"stdin": "stdin:2", "chat template": "t.jinja"}.get(reader, ":2:")
        assert where in said and text[:8] in said, said
        assert ("GBK" in said) == (name == "GB18030")
    assert "\n" not in said and "\0" not in said


def test_the_command_of_the_hint_makes_a_file_that_is_read(tmp_path):
    rows = f'{{"prompt": "{SIMPLIFIED}"}}\n'
    for codec, name, _ in ENCODINGS.values():
        if codec == "big5":
            continue
        data = subprocess.run(
            ["iconv", "-f", name, "-t", "UTF-8"], input=rows.encode(codec), capture_output=True, check=True
        ).stdout
        (tmp_path / "new.jsonl").write_bytes(data)
        assert [prompt.prompt for prompt in load_prompts(tmp_path / "new.jsonl")[0]] == [SIMPLIFIED]


@pytest.mark.parametrize(
    ("text", "codec", "expected"),
    [
        ("你好", "gbk", "GB18030"),
        ("你好", "big5", "BIG5"),
        ("問題", "big5", "BIG5"),
        ("问题,好回答,差回答", "gbk", "GB18030"),
        ("如何挑选一把好用的菜刀", "gbk", "GB18030"),
        ("如何挑選一把好用的菜刀", "big5", "BIG5"),
        ("漢字", "gbk", None),  # traditional characters in GBK: either reading has rare ones
        ("café", "latin-1", None),
        ("Grüße aus Köln, schön", "latin-1", None),
        ("Привет, как дела?", "cp1251", None),
        ("こんにちは、元気ですか", "shift-jis", None),
        ("a" * 50 + "\xff", "latin-1", None),
        ("a" * 50 + "\0", "utf-8", None),
        ("\0" * 60 + "\xff", "latin-1", None),  # what a crash leaves in a file
    ],
)
def test_what_cannot_be_told_is_not_guessed(text, codec, expected):
    assert guess_encoding(text.encode(codec)) == expected


def test_utf8_stays_utf8(tmp_path):
    for mark in ("utf-8", "utf-8-sig"):
        (tmp_path / "a.jsonl").write_bytes(f'{{"prompt": "{SIMPLIFIED}"}}\n'.encode(mark))
        assert load_prompts(tmp_path / "a.jsonl")[0][0].prompt == SIMPLIFIED
