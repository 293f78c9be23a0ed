"""The yardstick of the quickstart: a rule on plain text that no annotator and no reward model ever sees.

`rule(prompt, response)` holds when the reply (a) is about what was asked and (b) is considerate. It reads words only:
no model, no reward, no length. The simulated annotators who made the feedback (`bench/quickstart_data`) judge by noisy
tastes of their own, not by this rule.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from fastrlhf.quickstart.content import FACET_WORDS, FACETS, LANGUAGES, TOPICS

_CJK = re.compile(r"[\u3400-\u9fff]")
_LATIN = re.compile(r"[A-Za-z]")
_END = re.compile(r"[.!?。！？]$")
_COURTEOUS = {
    "en": re.compile(
        r"\b(thanks?|thank you|please|glad|gladly|happy to|delighted|pleasure|welcome|hope|wish|wishing"
        r"|lovely|wonderful|do take care"
        r"|enjoy|kind regards|all the best|good luck|here for you|warmly|great question|appreciate)\b"
    ),
    "zh": re.compile(r"谢谢|感谢|多谢|您|请|高兴|乐意|荣幸|欢迎|希望|祝|愿|开心|愉快|好问题|加油|保重|放心|慢慢来|陪"),
}
_RUDE = {
    "en": re.compile(
        r"\b(ugh|seriously|lazy|stupid|whatever|no time|a child|wasting|waste|leave me|do not ask|next time|even you"
        r"|care less|clueless|bother|bothering|annoying|silly|obvious|obviously|go away|hopeless|fool|foolish"
        r"|boring|tired of)\b"
    ),
    "zh": re.compile(
        r"烦|笨|蠢|傻|懒|废话|无聊|没空|浪费|别再|少来|滚|走开|活该|随便|真是的|小孩都|自己想|没完|懂不懂|省省|丢人|服了"
    ),
}


class Question(NamedTuple):
    """What a prompt asks: language, topic index in `TOPICS[language]`, and facet ("care" or "choose")."""

    language: str
    topic: int
    facet: str


def language_of(text: str) -> str:
    """ "zh" if the text holds a Chinese character, else "en"."""
    return "zh" if _CJK.search(text) else "en"


def _names(language: str, text: str) -> list[int]:
    """Indices of the topics whose name occurs in `text` (whole words in English)."""
    topics = TOPICS[language]
    if language == "en":
        words = set(re.findall(r"[a-z]+", text.lower()))
        return [i for i, topic in enumerate(topics) if topic.name in words]
    return [i for i, topic in enumerate(topics) if topic.name in text]


def parse_prompt(prompt: str) -> Question | None:
    """The question a prompt asks, or None when it is not one of the demo's questions."""
    language = language_of(prompt)
    lowered = prompt.lower()
    topics = _names(language, prompt)
    facets = [f for f in FACETS if any(word in lowered for word in FACET_WORDS[language][f])]
    if len(topics) != 1 or len(facets) != 1:
        return None
    return Question(language, topics[0], facets[0])


def about_what_was_asked(prompt: str, response: str) -> bool:
    """True when the reply answers the question asked, whatever its manner.

    It must be in the prompt's language, name the thing asked about and no other, hold at least one piece of advice for
    this very question, none twice and none of another thing or question, and end as a sentence ends.
    """
    question = parse_prompt(prompt)
    if question is None:
        return False
    text = response.strip().lower()
    wrong_script = _LATIN if question.language == "zh" else _CJK
    if wrong_script.search(text) or not _END.search(text):
        return False
    if _names(question.language, text) != [question.topic]:
        return False
    topics = TOPICS[question.language]
    answers = topics[question.topic].facts(question.facet)
    counts = {fact: text.count(fact) for topic in topics for facet in FACETS for fact in topic.facts(facet)}
    stated = {fact: count for fact, count in counts.items() if count}
    return bool(stated) and all(fact in answers and count == 1 for fact, count in stated.items())


def considerate(response: str) -> bool:
    """True when the reply holds a courteous word and no rude one."""
    language = language_of(response)
    text = response.lower()
    return bool(_COURTEOUS[language].search(text)) and not any(_RUDE[lang].search(text) for lang in LANGUAGES)


def rule(prompt: str, response: str) -> bool:
    """The quickstart's yardstick: the reply is about what was asked and considerate. Pure text, no torch."""
    return about_what_was_asked(prompt, response) and considerate(response)
