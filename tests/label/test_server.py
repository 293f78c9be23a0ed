"""What the server answers, and to whom: tokens, hosts, origins, headers, bodies; and that model text stays text."""

from __future__ import annotations

import json
import re
import socket

import pytest

from fastrlhf.config.errors import UserError
from fastrlhf.label.security import HEADERS, POLICY
from fastrlhf.label.server import MAX_BODY, PAGE, addresses, bind
from tests.label_runs import Bench

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"), annotators=("ann", "陈"))


def post(bench, question="next", body=None, *, headers=None, client=None, annotator="ann", **more):
    client = client or bench.client()
    sent = {**JSON, **bench.headers(annotator), **(headers or {})}
    return client.post(f"/api/{question}", content=json.dumps(body or {}), headers=sent, **more)


def page(bench, annotator="ann", token=None, **options):
    token = bench.bench.tokens[annotator] if token is None else token
    return bench.client(**options).get("/", params={"annotator": annotator, "token": token})


def test_the_page_is_for_who_has_its_token(bench):
    assert page(bench).status_code == page(bench, "陈").status_code == 200
    for name, token in (("ann", ""), ("ann", bench.bench.tokens["陈"]), ("nobody", bench.bench.tokens["ann"])):
        refused = page(bench, name, token)
        assert refused.status_code == 403 and "with its token" in refused.text
    assert bench.client().get("/").status_code == 403


@pytest.mark.parametrize("question", ["next", "judge", "undo", "summary"])
@pytest.mark.parametrize(
    "headers", [{}, {"authorization": "Bearer x"}, {"authorization": ""}, {"x-annotator": "bo"}, {"authorization": "é"}]
)
def test_no_question_is_answered_without_the_token(bench, question, headers):
    known = bench.headers("ann")
    sent = {**JSON, **(known | headers if headers else {})}
    sent = {name: value.encode("latin-1") for name, value in sent.items()}
    answer = bench.client().post(f"/api/{question}", content="{}", headers=sent)
    assert answer.status_code == 403 and "token" in answer.json()["error"]


def test_a_token_is_not_another_persons(bench):
    stolen = {**bench.headers("ann"), "x-annotator": bench.headers("陈")["x-annotator"]}
    assert post(bench, headers=stolen).status_code == 403
    assert post(bench, annotator="陈").json()["annotator"] == "陈"


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8717", "localhost:8717", "localhost", "[::1]:8717", "127.0.0.1:9000", "LOCALHOST"]
)
def test_loopback_names_are_ours(bench, host):
    assert post(bench, headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8717", "10.0.0.5:8717", "localhost.evil.example", "127.0.0.1.evil.example", ""],
)
def test_other_hosts_are_refused_on_loopback(bench, host):
    for answer in (post(bench, headers={"host": host}), bench.client().get("/label.js", headers={"host": host})):
        assert answer.status_code == 403 and answer.text.startswith("Host:")


def test_served_elsewhere_addresses_and_our_own_name_are_ours(bench):
    name = socket.gethostname()
    for host, status in (("10.0.0.5:8717", 200), (f"{name}:1", 200), ("[fe80::1]:8717", 200), ("evil.example", 403)):
        assert post(bench, headers={"host": host}, client=bench.client("0.0.0.0")).status_code == status, host


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "http://127.0.0.1:8717"}, 200),
        ({"origin": "https://127.0.0.1:8717"}, 200),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "cors"}, 403),
        ({"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"}, 403),
    ],
)
def test_other_pages_may_not_use_it(bench, headers, status):
    assert post(bench, headers=headers).status_code == status


def test_a_link_in_a_mail_opens_the_page_but_no_other_page_takes_its_parts(bench):
    query = {"annotator": "ann", "token": bench.bench.tokens["ann"]}
    mail = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert bench.client().get("/", params=query, headers=mail).status_code == 200
    embedded = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
    assert bench.client().get("/label.js", headers=embedded).status_code == 403


def test_every_answer_has_the_headers(bench):
    client = bench.client()
    answers = [page(bench), client.get("/label.js"), client.get("/nothing"), client.get("/"), post(bench)]
    answers += [client.get("/", headers={"host": "evil.example"}), client.get("/../server.py")]
    for answer in answers:
        assert HEADERS.items() <= dict(answer.headers).items()
    assert "unsafe" not in POLICY and "default-src 'none'" in POLICY and "frame-ancestors 'none'" in POLICY
    assert answers[5].status_code == 403 and answers[6].status_code == 404


def test_the_page_holds_no_script_no_style_and_nothing_from_elsewhere():
    html = (PAGE / "label.html").read_text(encoding="utf-8")
    assert re.findall(r"<script[^>]*>(?=.*?</script>)", html) == ['<script type="module" src="label.js">']
    assert not re.search(r"<style|style=|\son\w+=|javascript:|https?:", html)
    for script in PAGE.glob("*.js"):
        code = script.read_text(encoding="utf-8")
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|new Function|https?:", code
        ), script


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ({"content": b"{"}, 400),
        ({"content": b"[]"}, 400),
        ({"content": b"\xff"}, 400),
        ({"content": b'{"a": ' + b"[" * 100_000}, 400),
        ({"content": b"{}", "headers": {"content-type": "text/plain"}}, 415),
        ({"content": b" " * (MAX_BODY + 1)}, 413),
        ({"content": b'{"item": "nope", "kind": "skip"}'}, 404),
    ],
)
def test_what_no_page_sends_is_refused(bench, sent, status):
    headers = {**JSON, **bench.headers(), **sent.get("headers", {})}
    answer = bench.client().post("/api/judge", content=sent["content"], headers=headers)
    assert answer.status_code == status and answer.json()["error"] and not bench.rows()


def test_questions_are_posted_and_nothing_else_is_served(bench):
    client = bench.client()
    assert client.get("/api/next", headers=bench.headers()).status_code == 405
    for path in ("/server.py", "/page/label.html", "/%2e%2e/server.py", "/feedback.jsonl", "/.feedback.jsonl.session"):
        assert client.get(path).status_code == 404


def test_a_judgement_a_refusal_and_undo_over_http(tmp_path):
    bench = Bench(tmp_path)
    screen = post(bench).json()
    item = screen["item"]
    assert screen["language"] == "en" and sorted(item["replies"]) == ["A car.", "A nut?", "A pear."]
    gone = post(bench, "judge", {"item": item["id"], "kind": "rank", "ranking": [0, 1, 2, 3]})
    assert (
        gone.status_code == 422 and gone.json()["error"] == "reply 3 is not there: this prompt has 3, numbered from 0"
    )
    assert bench.rows() == []
    after = post(bench, "judge", {"item": item["id"], "kind": "rank", "ranking": [1, [0, 2]], "seconds": 2.5}).json()
    assert after["judged"] == 1 and after["last"] == item["id"] and after["item"]["id"] != item["id"]
    assert post(bench, "judge", {"item": item["id"], "kind": "skip"}).status_code == 409
    assert post(bench, "summary").json()["judgements"] == 1
    back = post(bench, "undo", {"item": item["id"]}).json()["item"]
    assert back["id"] == item["id"] and back["before"]["ranking"] == [[1], [0, 2]]


def test_hostile_text_goes_out_as_json_and_comes_back_unchanged(tmp_path):
    nasty = [
        "</script><script>alert(1)</script>",
        "\u202egnp.exe",
        "\x1b]0;title\x07\x1b[2J",
        "a\r\nb\u2028c",
        "{{7*7}}",
    ]
    prompt = [{"role": "user", "content": "<img src=x onerror=alert(1)>\u2066"}]
    bench = Bench(tmp_path, [(prompt, nasty)])
    answer = post(bench)
    assert answer.headers["content-type"] == "application/json"
    item = answer.json()["item"]
    assert sorted(item["replies"]) == sorted(nasty) and item["turns"] == prompt
    post(bench, "judge", {"item": item["id"], "kind": "score", "scores": [1, 2, 3, 4, 5]})
    assert bench.rows()[0]["responses"] == nasty and bench.rows()[0]["prompt"] == prompt


def test_a_port_in_use_and_addresses_that_are_not_here():
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port: {port} is in use on 127.0.0.1; name another, or 0"):
            bind("127.0.0.1", port)
    bind("127.0.0.1", port).close()
    for port in (-1, 70_000):
        with pytest.raises(UserError, match="is no port"):
            bind("127.0.0.1", port)
    for host in ("192.0.2.77", "no.such.host.invalid"):
        with pytest.raises(UserError, match="--host: .* is no address of this machine"):
            bind(host, 0)


def test_everybody_has_an_address_of_their_own(bench):
    with bind("127.0.0.1", 0) as listener:
        here = addresses(bench.bench, listener, "127.0.0.1")
        there = addresses(bench.bench, listener, "0.0.0.0")
    assert set(here) == {"ann", "陈"} and len(set(here.values())) == 2
    netloc = here["ann"].split("/")[2]
    assert netloc.startswith("127.0.0.1:") and here["陈"].startswith(f"http://{netloc}/?annotator=%E9%99%88&token=")
    assert "0.0.0.0" not in there["ann"]
