"""Workbenches on a few replies, and people who judge: in this process, or over HTTP with a server of their own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from starlette.testclient import TestClient

from fastrlhf.label.items import Item, read_items
from fastrlhf.label.server import make_app
from fastrlhf.label.workbench import Workbench

ROOT = Path(__file__).parents[1]
Rows = list[tuple[Any, list[str]]]
ROWS: Rows = [
    ("Name a fruit.", ["A pear.", "A car.", "A nut?"]),
    ([{"role": "user", "content": "What is tea?"}], ["Leaves in hot water.", "A drink."]),
    ("雨伞怎么保养？", ["晾干再收。", "不知道。", "放在太阳下。", "扔掉。"]),
    ("Say one thing.", ["One."]),
]


def many(count: int) -> Rows:
    return [(f"Question {i}?", [f"Answer {i} {letter}" for letter in "abcd"]) for i in range(count)]


def write_replies(path: Path, rows: Rows = ROWS) -> Path:
    """As `generate --output` writes them, a reply a row, with what the sampling of `label` adds."""
    about = {"model": "runs/secret-model", "model_hash": "f00d"}
    lines = [
        json.dumps({"prompt": prompt, "response": text, "response_ids": [i, len(text)], **about}, ensure_ascii=False)
        for prompt, texts in rows
        for i, text in enumerate(texts)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Bench:
    """A workbench in a folder; `said`: what it told the terminal. It can be killed and started again."""

    def __init__(self, folder: Path, rows: Rows = ROWS, annotators: tuple[str, ...] = ("ann",), **options: Any) -> None:
        self.output, self.said, self.options = folder / "feedback.jsonl", [], {"annotators": annotators, **options}
        self.items: list[Item] = read_items(write_replies(folder / "replies.jsonl", rows), None, self.said.append)
        self.start()

    def start(self, **options: Any) -> None:
        self.options |= options
        self.bench = Workbench(self.items, output=self.output, say=self.said.append, **self.options)

    def restart(self, **options: Any) -> None:
        """As after kill -9: nothing of the old process is asked to tidy up."""
        self.bench.close()
        self.start(**options)

    def rows(self) -> list[dict[str, Any]]:
        return read_rows(self.output)

    def client(self, host: str = "127.0.0.1", base: str = "http://127.0.0.1:8717") -> TestClient:
        return TestClient(make_app(self.bench, "en", host), base_url=base)

    def headers(self, annotator: str = "ann") -> dict[str, str]:
        return {"x-annotator": quote(annotator), "authorization": f"Bearer {self.bench.tokens[annotator]}"}


class Server:
    """`fastrlhf label` in a process of its own, with the address of each annotator."""

    def __init__(self, folder: Path, *arguments: str, port: int = 0, **environment: str) -> None:
        command = [sys.executable, "-m", "fastrlhf", "label", *arguments, "--port", str(port)]
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"} | environment
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.said, self.addresses = [], {}
        wanted = next((a.split(",") for b, a in zip(arguments, arguments[1:]) if b == "--annotators"), ["annotator"])
        while len(self.addresses) < len(wanted):
            line = self.process.stdout.readline()
            assert line, "".join(self.said)
            self.said.append(line)
            if address := re.search(r"http://\S+", line):
                name = parse_qs(urlsplit(address[0]).query)["annotator"][0]
                self.addresses[name] = address[0]
        self.port = urlsplit(address[0]).port

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()

    def stop(self) -> str:
        """Ctrl-C -> what it said at the end."""
        self.process.send_signal(signal.SIGINT)
        rest = self.process.communicate(timeout=60)[0]
        assert self.process.returncode == 0, rest
        return rest


def ask(address: str, question: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the page at an address would be answered; urllib.error.HTTPError carries a refusal."""
    parts = urlsplit(address)
    query = {name: values[0] for name, values in parse_qs(parts.query).items()}
    request = urllib.request.Request(
        f"{parts.scheme}://{parts.netloc}/api/{question}",
        data=json.dumps(body or {}).encode(),
        headers={
            "content-type": "application/json",
            "x-annotator": quote(query["annotator"]),
            "authorization": f"Bearer {query['token']}",
        },
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)
