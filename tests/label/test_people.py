"""Four people at once over HTTP, a server that is killed in between: 200 judgements, none lost, none doubled."""

from __future__ import annotations

import http.client
import random
import threading
import time
import urllib.error

from fastrlhf.cli import main
from fastrlhf.data.dataset import load_feedback
from tests.label_runs import Server, ask, many, read_rows, write_replies

PEOPLE = ("ann", "bo", "cy", "陈")
PROMPTS, PER_PROMPT, KILLS = 100, 2, 2


class Person(threading.Thread):
    """Judges until nothing is left, as the page does: what gets no answer is asked again, what is refused is shown."""

    def __init__(self, name: str, address: str) -> None:
        super().__init__(daemon=True)
        self.address, self.chance, self.kept, self.seen = address, random.Random(name), {}, []
        self.refused: list[str] = []

    def ask(self, question: str, body: dict | None = None) -> dict:
        while True:
            try:
                return ask(self.address, question, body)
            except urllib.error.HTTPError as refusal:
                self.refused.append(refusal.read().decode())
                raise
            except (OSError, http.client.HTTPException):  # the server is gone, perhaps in the middle of its answer
                time.sleep(0.02)

    def run(self) -> None:
        screen = self.ask("next")
        self.language = screen["language"]
        while screen["item"] is not None:
            item, count = screen["item"]["id"], len(screen["item"]["replies"])
            self.seen.append(item)
            order = self.chance.sample(range(count), count)
            body = {"item": item, "kind": "rank", "ranking": order, "seconds": 1.5}
            self.kept[item] = [screen["item"]["replies"][place] for place in order]
            screen = self.ask("judge", body)
            if self.chance.random() < 0.05:
                screen = self.ask("undo", {"item": screen["last"]})


def test_nothing_is_lost_or_doubled(tmp_path):
    chinese = [(prompt.replace("Question", "问题"), replies) for prompt, replies in many(PROMPTS)]
    write_replies(tmp_path / "replies.jsonl", chinese)
    output = tmp_path / "feedback.jsonl"
    arguments = ("--replies", "replies.jsonl", "--output", output.name, "--annotators", ",".join(PEOPLE))
    arguments += ("--annotators-per-prompt", str(PER_PROMPT))
    server = Server(tmp_path, *arguments)
    people = [Person(name, server.addresses[name]) for name in PEOPLE]
    for person in people:
        person.start()
    for part in range(1, KILLS + 1):
        while output.read_bytes().count(b"\n") < part * PROMPTS * PER_PROMPT // (KILLS + 1):
            time.sleep(0.005)
        server.kill()
        again = Server(tmp_path, *arguments, port=server.port)
        assert again.addresses == server.addresses, "who has the page open goes on"
        server = again
    for person in people:
        person.join(timeout=300)
    said = server.stop()

    assert {person.language for person in people} == {"zh"}, "the page speaks the language of the prompts"
    assert all(not person.is_alive() and not person.refused for person in people), [p.refused for p in people]
    last = {row["judgement_id"]: row for row in read_rows(output)}
    assert len(last) == PROMPTS * PER_PROMPT == sum(len(person.kept) for person in people) == 200
    for name, person in zip(PEOPLE, people):
        mine = [row for row in last.values() if row["annotator"] == name]
        assert len(mine) == len(person.kept), "what was confirmed is there"
        for row in mine:
            ranked = [row["responses"][i] for i in row["ranking"]]
            assert ranked == person.kept[row["judgement_id"].rpartition(":")[2]]
    shown = [item for person in people for item in set(person.seen)]
    assert all(shown.count(item) == PER_PROMPT for item in shown)
    feedback, counts = load_feedback(output)
    assert len(feedback) == 200 and all(item.kind == "ranking" for item in feedback)
    assert f"{len(read_rows(output))} rows in feedback.jsonl; next: fastrlhf reward" in said


def test_the_summary_of_a_file_is_printed(tmp_path, capsys):
    write_replies(tmp_path / "replies.jsonl", many(2))
    arguments = ("--replies", "replies.jsonl", "--output", "feedback.jsonl", "--host", "127.0.0.1")
    server = Server(tmp_path, *arguments, "--lang", "zh", "--open", BROWSER="false")  # a browser that fails
    address = server.addresses["annotator"]
    screen = ask(address, "next")
    assert screen["language"] == "zh"
    ask(address, "judge", {"item": screen["item"]["id"], "kind": "score", "scores": [5, 1], "seconds": 4})
    assert server.stop().startswith("no browser could be opened here; open the address above in one\n")
    assert main(["label", "--summary", str(tmp_path / "feedback.jsonl")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("1 judgements (1 score) of 1 prompts; 0 skipped") and "annotator: 1 judgements, 4 s" in out
