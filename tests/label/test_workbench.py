"""Who judges what, over restarts: nothing is lost, doubled or shown to too many; files that a crash left."""

from __future__ import annotations

import os
import random
import stat
import subprocess
import sys

import pytest

from fastrlhf.cli import main
from fastrlhf.config.errors import UserError
from fastrlhf.data.dataset import load_feedback
from fastrlhf.label.judgement import Refused
from fastrlhf.label.store import AppendLog
from fastrlhf.label.workbench import check_annotators
from tests.label_runs import ROOT, Bench, many


def judge(bench, annotator="ann", **body):
    """Score what is on the screen -> its id."""
    item = bench.bench.screen(annotator)["item"]
    scores = [1 + i % 5 for i in range(len(item["replies"]))]
    bench.bench.judge(annotator, {"item": item["id"], "kind": "score", "scores": scores, "seconds": 1, **body})
    return item["id"]


def test_one_begins_where_one_stopped(tmp_path):
    bench = Bench(tmp_path)
    token = bench.bench.tokens["ann"]
    judge(bench)
    judge(bench, kind="skip")
    on_screen = bench.bench.screen("ann")
    assert (on_screen["judged"], on_screen["skipped"], on_screen["left"]) == (1, 1, 2)
    bench.restart()
    assert bench.bench.screen("ann") == on_screen and bench.bench.tokens["ann"] == token
    judge(bench)
    judge(bench)
    assert bench.bench.screen("ann")["item"] is None and bench.bench.screen("ann")["left"] == 0
    bench.restart()
    assert bench.bench.screen("ann")["item"] is None
    assert len(bench.rows()) == 4 and load_feedback(bench.output)[1].used == 3


def test_the_screen_tells_nothing_of_the_model(tmp_path):
    assert "secret-model" not in str(Bench(tmp_path).bench.screen("ann"))


def test_undo_goes_back_step_by_step_and_survives_a_restart(tmp_path):
    bench = Bench(tmp_path)
    first, second = judge(bench), judge(bench)
    third = bench.bench.screen("ann")["item"]["id"]
    bench.bench.undo("ann", {"item": second})
    bench.bench.undo("ann", {"item": second})  # sent again because the answer did not arrive
    with pytest.raises(Refused, match="not your last"):
        bench.bench.undo("ann", {"item": bench.items[3].id})
    bench.bench.undo("ann", {"item": first})
    for again in (False, True):
        if again:
            bench.restart()
        screen = bench.bench.screen("ann")
        assert screen["item"]["id"] == first and screen["last"] is None and screen["left"] == 4
        assert screen["item"]["before"]["scores"] == [1, 2, 3]
    assert judge(bench, scores=[5, 5, 1]) == first
    assert judge(bench) == second
    assert judge(bench) == third, "what was on the screen before comes back"
    rows = bench.rows()
    assert [row.get("undone", False) for row in rows] == [False, False, True, True, False, False, False]
    assert sorted(rows[4]["scores"]) == [1, 5, 5] and load_feedback(bench.output)[1].used == 3


def test_a_judgement_sent_twice_is_kept_once(tmp_path):
    bench = Bench(tmp_path)
    item = bench.bench.screen("ann")["item"]["id"]
    body = {"item": item, "kind": "score", "scores": [1, 2, 3], "seconds": 1}
    bench.bench.judge("ann", body)
    bench.restart()
    bench.bench.judge("ann", {**body, "seconds": 9})
    assert len(bench.rows()) == 1
    with pytest.raises(Refused, match="judged it already") as error:
        bench.bench.judge("ann", {**body, "scores": [3, 2, 1]})
    assert error.value.status == 409
    other = next(one.id for one in bench.items if one.id != item)
    with pytest.raises(Refused, match="not on your screen"):
        bench.bench.judge("ann", {**body, "item": other, "scores": [1]})
    for unknown in ("nope", None, 3, ["x"]):
        with pytest.raises(Refused, match="there is no prompt"):
            bench.bench.judge("ann", {**body, "item": unknown})
    assert len(bench.rows()) == 1


@pytest.mark.parametrize("per_prompt", [1, 2, 3])
def test_no_prompt_is_shown_to_more_people_than_it_may(tmp_path, per_prompt):
    people = ("ann", "bo", "cy", "陈")
    bench, chance, seen = Bench(tmp_path, many(12), people, per_prompt=per_prompt), random.Random(0), {}
    for turn in range(400):
        name = chance.choice(people)
        item = bench.bench.screen(name)["item"]
        if item is None:
            continue
        seen.setdefault(item["id"], set()).add(name)
        assert len(seen[item["id"]]) <= per_prompt
        if chance.random() < 0.7:
            judge(bench, name, kind=chance.choice(["score", "skip"]))
        if turn % 5 == 0:
            bench.restart()
    assert len(bench.rows()) == 12 * per_prompt
    assert {row["judgement_id"] for row in bench.rows()} == {
        f"{n}:{item}" for item, names in seen.items() for n in names
    }


def test_who_leaves_gives_back_what_was_on_the_screen(tmp_path):
    bench = Bench(tmp_path, many(2), ("ann", "bo"))
    judged, open_item = judge(bench, "ann"), bench.bench.screen("bo")["item"]["id"]
    judge(bench, "bo")
    bench.bench.undo("bo", {"item": open_item})
    bench.restart(annotators=("cy",))
    assert bench.bench.screen("cy")["item"]["id"] == open_item, "not the one that ann judged"
    assert judge(bench, "cy") == open_item and bench.bench.screen("cy")["item"] is None
    assert {row["annotator"] for row in bench.rows()} == {"ann", "bo", "cy"} and judged


def test_rows_of_others_stay_as_they_are(tmp_path):
    other = '{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"judgement_id": "ann:beef", "annotator": "ann"}'
    (tmp_path / "feedback.jsonl").write_text(other, encoding="utf-8")  # without an end of line
    bench = Bench(tmp_path)
    assert any("2 rows are about other prompts or replies" in line for line in bench.said)
    judge(bench)
    assert bench.output.read_text(encoding="utf-8").startswith(other + "\n") and len(bench.rows()) == 3


@pytest.mark.parametrize("cut", [1, 2, 30, 120])
def test_a_torn_last_line_is_cut_off_and_said(tmp_path, cut):
    bench = Bench(tmp_path)
    judge(bench)
    judge(bench)
    whole = bench.output.read_bytes()
    bench.bench.close()
    bench.output.write_bytes(whole[:-cut])
    bench.start()
    kept = 2 if cut == 1 else 1  # all but its end of line: the row itself is whole
    assert len(bench.rows()) == kept and bench.output.read_bytes() == b"".join(whole.splitlines(True)[:kept])
    assert ("is cut off" in bench.said[-1]) == (cut > 1) if bench.said else cut == 1
    assert bench.bench.screen("ann")["judged"] == kept


def test_a_damaged_line_is_named_and_nothing_is_touched(tmp_path):
    (tmp_path / "feedback.jsonl").write_bytes(b'{"a": 1}\nbroken\n{"b": 2}\n{"c"')
    with pytest.raises(UserError, match=r"feedback.jsonl:2: is not JSON .*; mend the line"):
        Bench(tmp_path)


def test_a_full_disk_keeps_the_judgement_on_the_screen(tmp_path, monkeypatch):
    bench = Bench(tmp_path)
    judge(bench)
    before, screen = bench.output.read_bytes(), bench.bench.screen("ann")
    write = os.write
    with monkeypatch.context() as disk:
        disk.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:20]))
        with pytest.raises(OSError, match="No space left"):
            judge(bench)
    assert bench.output.read_bytes() == before and bench.bench.screen("ann") == screen
    judge(bench)
    assert len(bench.rows()) == 2


def test_a_file_that_is_taken_away_is_not_written_to_unseen(tmp_path):
    bench = Bench(tmp_path)
    judge(bench)
    bench.output.rename(tmp_path / "moved.jsonl")
    with pytest.raises(OSError, match="moved or removed"):
        judge(bench)
    (tmp_path / "moved.jsonl").rename(bench.output)
    judge(bench)
    assert len(bench.rows()) == 2


def test_tokens_are_for_their_owner_only(tmp_path):
    bench = Bench(tmp_path, annotators=("ann", "bo"))
    session = tmp_path / ".feedback.jsonl.session"
    assert stat.S_IMODE(session.stat().st_mode) == 0o600
    ann, bo = bench.bench.tokens["ann"], bench.bench.tokens["bo"]
    assert len(ann) >= 20 and ann != bo
    assert bench.bench.is_annotator("ann", ann) and not bench.bench.is_annotator("ann", bo)
    for name, token in (("", ""), ("cy", ""), ("ann", ""), ("ann", "é")):
        assert not bench.bench.is_annotator(name, token)


HOLD = """
import sys
from pathlib import Path
from fastrlhf.checkpoint import lock
lock.acquire(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_two_servers_on_one_output_are_refused(tmp_path, capsys):
    output = tmp_path / "feedback.jsonl"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    pipe = subprocess.PIPE
    other = subprocess.Popen([sys.executable, "-c", HOLD, output], env=environment, stdin=pipe, stdout=pipe, text=True)
    assert other.stdout.readline() == "held\n"
    try:
        with pytest.raises(UserError, match=rf"--output: .*is in use by process {other.pid} on .*name another file"):
            Bench(tmp_path)
        replies, link = tmp_path / "replies.jsonl", tmp_path / "link.jsonl"
        link.symlink_to(output)
        assert main(["label", "--replies", str(replies), "--output", str(link), "--port", "0"]) == 2
        assert f"is in use by process {other.pid}" in capsys.readouterr().err
    finally:
        other.communicate("")
    bench = Bench(tmp_path)
    judge(bench)
    bench.bench.close()
    assert not (tmp_path / ".feedback.jsonl.lock").exists()


@pytest.mark.parametrize(
    "name", ["a/b", "..", "", " ", "a b ", "a\nb", "<b>", "a:b", "a\u202eb", "x" * 65, "-a", "a&b"]
)
def test_names_that_cannot_be(name):
    with pytest.raises(UserError, match="--annotators: .* is no name"):
        check_annotators(["ann", name])


def test_names_that_can_be():
    check_annotators(["ann", "Bo Li", "陈晨", "a.b-c_d@e.f", "Ünal"])
    with pytest.raises(UserError, match="'ann' stands there twice"):
        check_annotators(["ann", "bo", "ann"])


def test_the_log_is_on_the_disk_before_it_is_said(tmp_path, monkeypatch):
    log, synced = AppendLog(tmp_path / "log.jsonl", print), []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append((tmp_path / "log.jsonl").read_bytes()))
    log.append({"a": "雨"})
    assert synced == ['{"a": "雨"}\n'.encode()]
