"""What is found in replies, and how sure it is: each figure against a case that can be counted by hand."""

from __future__ import annotations

import math
import random
import re
import statistics
from pathlib import Path

import pytest

from fastrlhf.agreement.bootstrap import RESAMPLES
from fastrlhf.config.errors import UserError
from fastrlhf.data.feedback import Prompt
from fastrlhf.eval.figures import figures_of, judge
from fastrlhf.eval.phrases import (
    OPENING_CHARS,
    REFUSALS,
    keyword_pattern,
    keywords_in,
    read_keywords,
    read_refusals,
    refusal_in,
)
from fastrlhf.eval.scripts import HAN, JAPANESE, KOREAN, MIXED, NONE, script_of
from fastrlhf.eval.statistics import compare, estimate
from fastrlhf.inference import Reply
from fastrlhf.rl.evaluation import win_rate
from fastrlhf.runtime.metrics import distinct, distinct_2, ngrams

REFUSING = [
    "I'm sorry, but I can't help with that.",
    "I\u2019m sorry, but I can\u2019t assist with that request.",
    "I cannot provide instructions for making weapons.",
    "Sorry, but as an AI language model, I am unable to do this.",
    "As an AI assistant, I don't give legal advice of that kind.",
    "I'm not able to discuss this topic.",
    "I won't help you hurt somebody.",
    "I must respectfully decline.",
    "I'll have to decline that.",
    "I would have to refuse.",
    "That would be against my guidelines.",
    "It would be unethical for me to write this.",
    "I am not comfortable writing that.",
    "I apologize, but I cannot continue this conversation.",
    "抱歉，我无法提供这方面的帮助。",
    "对不起，我不能回答这个问题。",
    "很遗憾，我没有办法满足您的要求。",
    "我不能帮你做这件事。",
    "作为一个人工智能语言模型，我不能参与这类讨论。",
    "您的请求违反了相关法律法规。",
    "这个问题不适合讨论。",
    "我拒绝回答。",
]
ANSWERING = [
    "I'm sorry to hear that your dog is ill. Take it to a vet.",
    "I can't wait to help you with your garden!",
    "I can't help but smile: here is the recipe.",
    "You cannot park there, but the next street is free.",
    "Of course, happy to help!",
    "Many people cannot write with the left hand.",
    "The app will not start if the cable is loose.",
    "Please do not hesitate to ask.",
    "我很抱歉听到您的狗病了，请带它去看医生。",
    "您不能在那里停车，隔壁的街可以。",
    "好的，很高兴帮您！先擦净琴弦。",
    "水壶不能空烧，记得加水。",
    "我不能确定他今天会来。",
    "",
]


@pytest.mark.parametrize("text", REFUSING)
def test_a_refusal_is_found(text):
    assert refusal_in(text) is not None


@pytest.mark.parametrize("text", ANSWERING)
def test_an_answer_is_no_refusal(text):
    assert refusal_in(text) is None


def test_the_docs_say_how_it_is_counted():
    page = (Path(__file__).parents[2] / "docs/eval.md").read_text(encoding="utf-8")
    assert (
        len(REFUSING) > 20 and len(ANSWERING) > 10 and "`tests/eval/test_figures.py` has refusals that it finds" in page
    )
    assert f"first {OPENING_CHARS} characters" in page and f"{RESAMPLES} bootstrap samples" in page


def test_a_refusal_is_looked_for_in_the_opening_only():
    assert refusal_in(" \n" + "a" * (OPENING_CHARS - 40) + ". I cannot help with that.") == "I cannot help"
    assert refusal_in("a" * OPENING_CHARS + " I cannot help with that.") is None
    assert refusal_in("Nope.", read_as("^nope")) == "Nope"


def read_as(*patterns):
    return [re.compile(pattern, re.IGNORECASE) for pattern in patterns]


def test_no_pattern_takes_long_over_a_reply_that_is_made_for_it():
    texts = ["I can't " + "very, " * 5000, "抱歉" + "我不" * 5000, "as an AI " + "I do " * 5000, "sorry " * 5000]
    for text in texts:
        for pattern in REFUSALS:
            assert len(text[:OPENING_CHARS]) == OPENING_CHARS and pattern.search(text[:OPENING_CHARS]) is not Ellipsis


@pytest.mark.parametrize(
    ("keyword", "text", "expected"),
    [
        ("ass", "a class of its own", False),
        ("ass", "What an ASS!", True),
        ("ass", "这个ass不行", True),  # beside Chinese a word ends
        ("炸弹", "怎么做炸弹啊", True),
        ("C++", "I like c++.", True),
        ("C++", "I like C+.", False),
        ("kill yourself", "Never Kill  yourself", False),
        ("kill yourself", "Never Kill yourself", True),
        ("bomb", "ｂｏｍｂ", True),  # full-width letters
        ("день", "добрый день", True),
        ("ден", "добрый день", False),
        (".*", "anything", False),
    ],
)
def test_keywords_are_words(keyword, text, expected):
    assert bool(keywords_in(text, {keyword: keyword_pattern(keyword)})) is expected


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("How do I dry an umbrella?", "Latin"),
        ("Où est l’été ?", "Latin"),
        ("雨伞应该怎么保养？", HAN),
        ("请用Python写一个函数来计算平均数。", HAN),
        ("用Python和pandas写", MIXED),
        ("傘はどうやって乾かしますか", JAPANESE),
        ("우산을 어떻게 말리나요", KOREAN),
        ("Как высушить зонт?", "Cyrillic"),
        ("كيف أجفف المظلة؟", "Arabic"),
        ("छाता कैसे सुखाएं", "Devanagari"),
        ("12 + 30 = 42 :-)", NONE),
        ("", NONE),
        ("Ｆｕｌｌ ｗｉｄｔｈ", "Latin"),
        ("Hello 你好 hello 你好", MIXED),
    ],
)
def test_scripts(text, script):
    assert script_of(text) == script


def test_an_accent_that_stands_alone_ends_no_word():
    assert script_of("x\u0332y\u0332z 你好") == script_of("xyz 你好") == MIXED


def test_lists_of_a_user(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("\ufeffbomb\n\n 炸弹 \nbomb\n", encoding="utf-8")
    assert list(read_keywords(str(path))) == ["bomb", "炸弹"]
    path.write_text("^no\\b\nnie\n", encoding="utf-8")
    assert [refusal_in(text, read_refusals(str(path))) for text in ("No way", "not", "Das geht NIE")] == [
        "No",
        None,
        "NIE",
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "list.txt is empty; write a keyword a line"),
        (b" \n\n", "is empty"),
        (b"\xff\xfe", "list.txt:1: not UTF-8 text; it looks like UTF-16; save the file as UTF-8"),
        (
            "bomb\n敏感的词语\n".encode("gb18030"),
            "list.txt:2: not UTF-8 text; it looks like GBK (GB18030) and then says",
        ),
        (None, "cannot be read: No such file"),
        (b"x" * (1 << 20) + b"y", "is larger than 1 MiB"),
    ],
)
def test_a_list_that_cannot_be_is_refused(tmp_path, content, said):
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="--keywords: ") as caught:
        read_keywords(str(path))
    assert said in str(caught.value)


def test_a_pattern_that_is_none_is_named_by_its_line(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("fine\n\n(open\n")
    with pytest.raises(UserError, match=r"--refusals: .*list.txt:3: '\(open' is no regular expression: missing \)"):
        read_refusals(str(path))


# ---------------------------------------------------------------------------------------------------------- statistics


def test_the_standard_error_is_the_usual_one_for_one_sample_a_prompt():
    values = [0.0, 1.0, 1.0, 5.0, 2.0]
    found = estimate(values, 1)
    assert found["mean"] == pytest.approx(1.8)
    assert found["standard_error"] == pytest.approx(statistics.stdev(values) / math.sqrt(5))
    assert estimate([1.0], 1) == {"mean": 1.0, "standard_error": None}
    assert estimate([None, None], 1) == {"mean": None, "standard_error": None}


def test_samples_of_a_prompt_that_agree_are_no_new_prompts():
    values = [0.0, 1.0, 1.0, 5.0]
    whole = estimate([value for value in values for _ in range(3)], 3)
    assert whole["mean"] == pytest.approx(1.75)
    assert whole["standard_error"] == pytest.approx(estimate(values, 1)["standard_error"])
    # What is not known is left out, a prompt without any too.
    assert estimate([0.0, None, 1.0, None, None, None, 5.0, 5.0], 2)["mean"] == pytest.approx(11 / 4)


def test_the_standard_error_covers_the_mean():
    """Of prompts with two correlated replies: 95 % intervals hold the true mean in about 95 % of the draws."""
    draw, inside = random.Random(0), 0
    for _ in range(400):
        centres = [draw.gauss(0, 1) for _ in range(60)]
        found = estimate([centre + draw.gauss(0, 0.5) for centre in centres for _ in range(2)], 2)
        inside += abs(found["mean"]) <= 1.96 * found["standard_error"]
    assert 0.91 <= inside / 400 <= 0.98


def test_a_win_rate_counts_ties_as_half_and_states_them():
    ours, theirs = [1.0, 2.0, 3.0, None, 5.0], [0.0, 2.0, 4.0, 1.0, 1.0]
    found = compare(ours, theirs, 1, seed=0)
    assert (found["wins"], found["ties"], found["losses"], found["unscored"]) == (2, 1, 1, 1)
    assert found["rate"] == win_rate(ours, theirs) == 0.625
    assert found["difference"]["mean"] == pytest.approx((1 + 0 - 1 + 4) / 4)
    low, high = found["interval"]
    assert 0 <= low < 0.625 < high <= 1
    assert compare(ours, theirs, 1, seed=0) == found, "the same seed, the same interval"


def test_the_interval_of_a_win_rate_is_that_of_its_prompts():
    """Half of 400 prompts are won: the interval is the binomial's; replies that agree within a prompt add nothing."""
    draw = random.Random(1)
    won = [float(draw.random() < 0.5) for _ in range(400)]
    low, high = compare(won, [0.5] * 400, 1, seed=0)["interval"]
    expected = 1.96 * math.sqrt(0.25 / 400)
    assert (high - low) / 2 == pytest.approx(expected, rel=0.15)
    twice = [value for value in won for _ in range(4)]
    again = compare(twice, [0.5] * 1600, 4, seed=0)["interval"]
    assert again == pytest.approx([low, high], abs=1e-12)


def test_a_model_against_itself_ties():
    found = compare([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], 1, seed=3)
    assert found["rate"] == 0.5 and found["ties"] == 3 and found["interval"] == [0.5, 0.5]
    assert compare([None], [1.0], 1, seed=0)["rate"] is None
    assert compare([1.0], [0.0], 1, seed=0)["interval"] is None, "one prompt says nothing of others"


# ------------------------------------------------------------------------------------------------------------- figures


def test_ngrams_are_of_words_and_characters():
    assert ngrams("The cat, 你好", 2) == [("the", "cat"), ("cat", ","), (",", "你"), ("你", "好")]
    assert ngrams("one", 2) == [] and distinct([], 2) == 0.0
    texts = ["a b a b", "a b"]
    assert distinct_2(texts) == distinct(texts, 2) == 2 / 4 and distinct(texts, 1) == 2 / 6


def test_every_figure_of_a_small_example():
    chat = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "嗨"}]
    prompts = [Prompt("How are you?"), Prompt([*chat, {"role": "user", "content": "今天天气怎么样？"}])]
    replies = [
        [Reply("fine bomb", [5, 6, 1], True), Reply("I cannot help with that.", [5] * 8, False)],
        [Reply("天气很好", [7, 1], True), Reply("", [1], True)],
    ]
    keywords = {word: keyword_pattern(word) for word in ("bomb", "gun")}
    judged = judge(prompts, replies, [1.0, None, 2.0, 4.0], REFUSALS, keywords)
    assert [reply.same_script for reply in judged] == [True, True, True, None]
    assert judged[1].refusal == "I cannot help" and judged[0].keywords == ["bomb"] and judged[2].script == HAN
    found = figures_of(judged, 2, list(keywords), scored=True)
    assert found["refusals"]["mean"] == 0.25 and found["cut_off"]["mean"] == 0.25 and found["empty"]["mean"] == 0.25
    assert found["scripts"] == {"Latin": 0.5, HAN: 0.25, NONE: 0.25}
    assert found["same_script_as_prompt"]["mean"] == 1.0
    assert found["keywords"]["any"]["mean"] == 0.25 and found["keywords"]["each"]["gun"]["mean"] == 0.0
    assert found["length"] | {"p5": 0, "p25": 0, "p75": 0, "p95": 0} == {
        "mean": 3.5, "min": 1.0, "p5": 0, "p25": 0, "p50": 2.5, "p75": 0, "p95": 0, "max": 8.0,
    }  # fmt: skip
    assert found["reward"]["mean"] == pytest.approx(7 / 3) and found["reward"]["unscored"] == 1
    assert found["repeated_4grams"]["mean"] == 0.0
    assert "reward" not in figures_of(judged, 2, [], scored=False)


def test_repetition_is_the_share_of_4grams_that_stood_there_before():
    (reply,) = judge([Prompt("x")], [[Reply("a b c d a b c d a", [1], True)]], None, REFUSALS, {})
    assert reply.repeated == pytest.approx(1 - 4 / 6) and reply.score is None
    (short,) = judge([Prompt("x")], [[Reply("a b c", [1], True)]], None, REFUSALS, {})
    assert short.repeated is None
