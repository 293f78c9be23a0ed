"""The page of `fastrlhf label` in headless Chromium, 1400 and 390 pixels wide: every judgement by mouse and keys."""

from __future__ import annotations

import json

import pytest

from tests.browser import CHROMIUM, Browser
from tests.label_runs import Server, read_rows, write_replies

pytestmark = [pytest.mark.real, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")]

LONG = "\n".join(f"{i}. Shake the water off, wipe the ribs and leave it open for an hour." for i in range(60))
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script> \u202egnp.exe \x1b[31mred \u200bx"
CHAT = [
    {"role": "system", "content": "Be brief. <b>x</b>"},
    {"role": "user", "content": "How do I dry an umbrella?"},
    {"role": "assistant", "content": "Where is it?"},
    {"role": "user", "content": "In the hall \u2067אבג\u2069."},
]
ROWS = [(CHAT, ["Open it.", LONG, HOSTILE, "I do not know."]), ("Name a fruit.", ["A pear.", "A car.", "A nut?"])]
ROWS += [(f"Question {i}?", [f"Reply {i} one.", f"Reply {i} two, longer.", f"Reply {i} three."]) for i in range(8)]
SIZES = {1400: 900, 390: 844}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.fixture(params=SIZES)
def page(request, browser, tmp_path):
    """A page with its server, and what it takes to judge on it."""
    write_replies(tmp_path / "replies.jsonl", ROWS)
    server = Server(tmp_path, "--replies", "replies.jsonl", "--output", "feedback.jsonl")
    browser.log.clear()
    browser.open(server.addresses["annotator"], request.param, SIZES[request.param])
    browser.wait("document.querySelector('.reply')")
    yield Page(browser, server, tmp_path / "feedback.jsonl", request.param)
    server.kill()


class Page:
    def __init__(self, browser, server, output, width):
        self.browser, self.server, self.output, self.width = browser, server, output, width
        self.press = browser.tap if width < 700 else browser.click

    def kept(self, count: int) -> dict:
        """The last of `count` rows, once they are there and the next prompt is on the screen."""
        self.browser.wait("!document.body.classList.contains('busy')")
        rows = read_rows(self.output)
        assert len(rows) == count, self.browser.js("document.querySelector('#error').textContent")
        return rows[-1]

    def shown(self) -> list[str]:
        """Texts of the replies in the order of the screen (short ones only)."""
        return self.browser.js("[...document.querySelectorAll('.reply .text')].map(e => e.textContent)")

    def wide(self) -> int:
        return self.browser.js("document.documentElement.scrollWidth")


def by_text(row: dict, name: str) -> dict:
    return dict(zip(row["responses"], row[name]))


def test_by_mouse(page):
    b = page.browser
    page.press("#skip")
    assert page.kept(1)["skipped"] is True
    shown = page.shown()
    page.press(".reply[data-reply='0'] [data-value='4']")
    page.press(".reply[data-reply='2'] [data-value='2']")
    page.press(".reply[data-reply='1'] .mark")
    page.press("#save")
    row = page.kept(2)
    assert by_text(row, "scores") == {shown[0]: 4, shown[1]: 1, shown[2]: 2}
    assert by_text(row, "unsafe") == {shown[0]: False, shown[1]: True, shown[2]: False}
    assert by_text(row, "positions") == {text: place for place, text in enumerate(shown)} and 0 < row["seconds"] < 300

    page.press("[data-mode=rank]")
    shown = page.shown()
    touch = page.width < 700
    page.press(".reply[data-reply='1'] [data-value='1']")
    b.drag("[data-chip='0']", "[data-drop='gap:1']", touch=touch)  # behind the first: 1 > 0
    b.drag("[data-chip='2']", "[data-drop='tie:2']", touch=touch)  # beside 0: 1 > 0 = 2
    b.drag("[data-chip='1']", "[data-drop='gap:2']", touch=touch)  # behind both: 0 = 2 > 1
    assert page.wide() == page.width
    page.press("#save")
    row = page.kept(3)
    order = {row["responses"][i]: k for k, g in enumerate(row["ranking"]) for i in (g if isinstance(g, list) else [g])}
    assert order == {shown[0]: 0, shown[2]: 0, shown[1]: 1}

    page.press("[data-mode=edit]")
    shown = page.shown()
    page.press(".reply[data-reply='1'] .wide")
    b.js("document.querySelector('textarea').select()")
    b.type("Reply better 好")
    assert b.js("document.querySelector('.diff ins').textContent") and b.js(
        "document.querySelector('.diff del').textContent"
    )
    page.press("#save")
    row = page.kept(4)
    assert (row["response"], row["edited"]) == (shown[1], "Reply better 好")

    page.press("#undo")
    assert page.kept(5)["undone"] is True
    assert b.js("document.querySelector('textarea').value") == "Reply better 好"
    page.press("[data-mode=score]")
    page.press(".reply[data-reply='0'] [data-value='5']")
    page.press("#save")
    assert page.kept(6)["scores"] == [5] and "edited" not in page.kept(6)
    page.press("#summary")
    b.wait("document.querySelector('.summary table')")
    assert page.wide() == page.width and b.log == []


def test_by_keys(page):
    b = page.browser
    b.key("n")
    assert page.kept(1)["skipped"] is True
    shown = page.shown()
    b.key("4", "2", "x", "Enter")  # the third is unsafe
    row = page.kept(2)
    assert by_text(row, "scores") == {shown[0]: 4, shown[1]: 2, shown[2]: 1}
    assert by_text(row, "unsafe")[shown[2]] is True

    b.key("r")
    shown = page.shown()
    b.key("2", "1", "2", "Enter")
    row = page.kept(3)
    order = {row["responses"][i]: k for k, g in enumerate(row["ranking"]) for i in (g if isinstance(g, list) else [g])}
    assert order == {shown[1]: 0, shown[0]: 1, shown[2]: 1}

    shown = page.shown()
    b.key("1", "1", "0", "j", "k", "Enter")  # one has no place: nothing is saved, and that is said
    assert not b.js("document.querySelector('#error').hidden") and len(read_rows(page.output)) == 3
    b.key("e", "j", "Enter")
    b.key("Enter")  # a new line in the text, no save
    b.type("更好")
    b.key("Escape", "z")
    assert page.kept(4)["undone"] is True, "outside the text a letter is a key again"
    b.key("r", "Enter")
    page.kept(5)
    b.key("e")
    focus = b.js("[...document.querySelectorAll('.reply')].findIndex(e => e.classList.contains('focus'))")
    shown = page.shown()
    b.key("Enter")
    b.type(" nx12?")
    b.key("Enter", ctrl=True)
    row = page.kept(6)
    assert (row["response"], row["edited"]) == (shown[focus], shown[focus] + " nx12?")
    b.key("?")
    assert b.js("document.querySelector('#help').open")
    b.key("Escape")
    assert not b.js("document.querySelector('#help').open") and b.log == []


def test_a_conversation_a_long_reply_and_hostile_text(page):
    b = page.browser
    turns = b.js(
        "[...document.querySelectorAll('.turn')].map(e => [e.className, e.querySelector('.text').textContent])"
    )
    expected = [("turn " + m["role"], m["content"]) for m in CHAT]
    expected[3] = ("turn user", "In the hall U+2067אבגU+2069.")
    assert [tuple(turn) for turn in turns] == expected
    texts = page.shown()
    nasty = "<img src=x onerror=alert(1)><script>alert(2)</script> U+202Egnp.exe U+001B[31mred U+200Bx"
    assert nasty in texts, texts
    assert b.js("document.querySelectorAll('main img, main script, main b:not(.letter)').length") == 0
    assert b.js("[...document.querySelectorAll('.text')].every(e => getComputedStyle(e).unicodeBidi === 'isolate')")
    (place,) = (i for i, text in enumerate(texts) if text.startswith("0. Shake"))
    assert len(texts[place]) < 800
    page.press(f".reply[data-reply='{place}'] .fold")
    assert page.shown()[place] == LONG
    b.key("o")
    assert len(page.shown()[place]) < 800 and page.wide() == page.width
    assert b.js("document.body.innerText").find("secret-model") == -1 and b.log == []
    b.open(page.server.addresses["annotator"][:-3], page.width, 800)
    b.wait("document.body.innerText.includes('with its token')")


def test_both_languages_and_a_server_that_is_gone_for_a_while(page):
    b = page.browser
    assert b.js("document.querySelector('#save').textContent").startswith("Save scores")
    page.press("#language")
    assert b.js("document.querySelector('#save').textContent").startswith("保存打分")
    assert b.js("document.documentElement.lang") == "zh-CN" and page.wide() == page.width
    blank = "JSON.stringify(m.WORDS[l], (k, v) => typeof v === 'string' ? '' : v)"
    en, zh = b.js(f"import('./words.js').then(m => ['en', 'zh'].map(l => {blank}))")
    assert en == zh and len(en) > 500, "every word stands in both languages"
    arguments = ("--replies", "replies.jsonl", "--output", "feedback.jsonl")
    page.server.kill()
    b.key("3", "Enter")
    b.wait("document.querySelector('#error').textContent.includes('标注不会丢失')")
    page.server = Server(page.output.parent, *arguments, port=page.server.port)
    b.wait("document.querySelector('#progress').textContent.includes('1')")
    assert page.kept(1)["scores"] == [3]
    page.server.kill()
    browser_log = [line for line in b.log if "ERR_CONNECTION_REFUSED" not in line]
    assert browser_log == []


@pytest.mark.parametrize("page", [1400], indirect=True)
def test_the_difference_of_two_texts_is_whole_and_short(browser, page):
    """Kept and removed parts are the text before, kept and added ones the text after; only what differs is marked."""
    pairs = [("", "a"), ("a b c", "a x c"), ("今天天气很好", "今天北京天气好"), ("one two", "one two"), ("x" * 9, "")]
    pairs += [("the quick brown fox\njumps", "the slow brown fox\njumped over"), ("word " * 3000, "other " * 3000)]
    found = browser.js(f"import('./text.js').then(m => {json.dumps(pairs)}.map(([a, b]) => m.difference(a, b)))")
    for (before, after), parts in zip(pairs, found, strict=True):
        assert "".join(text for kind, text in parts if kind <= 0) == before
        assert "".join(text for kind, text in parts if kind >= 0) == after
    assert found[1] == [[0, "a "], [-1, "b"], [1, "x"], [0, " c"]]
    assert found[2] == [[0, "今天"], [1, "北京"], [0, "天气"], [-1, "很"], [0, "好"]]
    assert found[3] == [[0, "one two"]]
