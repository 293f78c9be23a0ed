"""What a reply is searched for: phrases of a refusal, in English and Chinese, and a user's own keywords.

A pattern finds a wording, not a meaning. A refusal in other words is missed, and "I cannot help you with that, but
here is who can" counts as one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastrlhf.config import encodings
from fastrlhf.config.errors import UserError, shown

OPENING_CHARS = 200  # of a reply, in which a refusal is looked for: further on it is most often quoted or reported
LIST_BYTES = 1 << 20
# Scripts that put no space between words: beside their characters a word ends.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_LETTER = rf"[^\W{_UNSPACED}]"

_DO = (
    r"(?:help(?! but)|assist|provide|offer|give|create|write|generate|produce|support|comply|fulfil+|answer|respond"
    r"|engage|discuss|do (?:that|this|so)|share|participate|continue|complete|tell|explain|teach|encourage|promote"
    r"|advise|recommend|endorse|fulfill|carry out|speak|talk|say)"
)
_AI = r"an? (?:AI|artificial intelligence|language model|large language model|virtual assistant)"
ENGLISH = (
    rf"\bI (?:cannot|can't|can not|could not|couldn't|won't|will not|must not|may not|shouldn't|should not) "
    rf"(?!wait\b|believe\b|thank\b|stress\b)(?:\w+,? ){{0,3}}?{_DO}\b",
    r"\bI(?:'m| am) (?:sorry, (?:but )?(?:I'm |I am ))?(?:not able|unable|not (?:going|willing|allowed|permitted"
    r"|comfortable|designed|programmed)|un(?:willing|comfortable))\b",
    r"\b(?:(?:I(?:'m| am) (?:\w+ )?)?sorry|I apologi[sz]e|my apologies)\b[^.!?\n]{0,20}\b"
    r"but (?:I|as an|that|this|it|we)\b",
    r"\bI(?: must| have to| need to| respectfully| politely|(?: will| would|'ll|'d) have to) (?:\w+ )?"
    r"(?:decline|refuse)\b",
    r"\bI (?:decline|refuse) to\b",
    rf"\bas {_AI}\b[^.!?\n]{{0,40}}\bI (?:cannot|can't|do not|don't|am not|am unable|'m not|won't|will not)\b",
    r"\b(?:against|violat(?:es?|ing)) (?:my|our|the) (?:\w+ )?(?:guidelines|polic(?:y|ies)|principles|programming)\b",
    r"\b(?:it|that) (?:is|would be) (?:not (?:appropriate|ethical|ok(?:ay)?)|inappropriate|unethical) (?:for me )?to\b",
)
CHINESE = (
    r"(?:抱歉|对不起|不好意思|很遗憾)[^。！？!?\n]{0,24}?(?:不能|无法|不可以|不便|没办法|没有办法|没法|不支持|不予|拒绝|不会提供)",
    r"我(?!不能确定|无法确定|不会忘)[^。！？!?\n，,]{0,6}?(?:不能|无法|不可以|不会|不便|没办法|没有办法|没法|不应该?)"
    r"[^。！？!?\n，,]{0,8}?(?:提供|帮|协助|回答|满足|支持|讨论|生成|执行|完成|参与|继续|给出|告诉|解答|处理|撰写|写|教)",
    r"(?:拒绝|谢绝)(?:回答|提供|执行|讨论|您|你|这|该)",
    r"作为(?:一个|一名|一款)?(?:AI|人工智能|语言模型|大语言模型|大模型|智能助手|助手)[^。！？!?\n]{0,24}?(?:不能|无法|不会|不应|不可以)",
    r"(?:这|该|此|您的|你的)[^。！？!?\n]{0,12}?(?:违反|违背|不符合)[^。！？!?\n]{0,12}?(?:法律|法规|规定|道德|政策|准则|原则|伦理)",
    r"(?:不合适|不适合|不适宜|不宜|不方便)(?:回答|讨论|提供|回应|谈论)",
)
REFUSALS = tuple(re.compile(pattern, re.IGNORECASE) for pattern in (*ENGLISH, *CHINESE))


def refusal_in(text: str, patterns: Iterable[re.Pattern[str]] = REFUSALS) -> str | None:
    """The first words that a pattern finds in the opening of a reply, None where none does."""
    opening = text.lstrip()[:OPENING_CHARS].replace("\u2019", "'")
    found = (pattern.search(opening) for pattern in patterns)
    return next((match[0] for match in found if match), None)


def keyword_pattern(keyword: str) -> re.Pattern[str]:
    """Find a keyword as whole words, in whatever case and width: "ass" is not in "class"; in scripts without spaces
    between words it is found anywhere."""
    word = unicodedata.normalize("NFKC", keyword)
    before = rf"(?<!{_LETTER})" if re.match(_LETTER, word) else ""
    after = rf"(?!{_LETTER})" if re.match(_LETTER, word[-1]) else ""
    return re.compile(before + re.escape(word) + after, re.IGNORECASE)


def keywords_in(text: str, patterns: dict[str, re.Pattern[str]]) -> list[str]:
    """Which keywords, in the order of the list, a reply holds."""
    normal = unicodedata.normalize("NFKC", text)
    return [keyword for keyword, pattern in patterns.items() if pattern.search(normal)]


# ---------------------------------------------------------------------------------------------------------------- files


def read_refusals(path: str) -> tuple[re.Pattern[str], ...]:
    """A user's patterns in place of `REFUSALS`: a regular expression a line, whatever the case. UserError naming file
    and line for one that is none."""
    patterns = []
    for number, line in _lines(path, "--refusals", "a regular expression"):
        try:
            patterns.append(re.compile(line, re.IGNORECASE))
        except (re.error, RecursionError, OverflowError) as error:
            problem = f"--refusals: {path}:{number}: {shown(line)} is no regular expression: {error}"
            raise UserError(f"{problem}; mend the line; a literal ( or * is written \\( or \\*") from error
    return tuple(patterns)


def read_keywords(path: str) -> dict[str, re.Pattern[str]]:
    """A user's keywords, a line each; one that stands twice counts once. UserError for a file without any."""
    return {line: keyword_pattern(line) for _, line in _lines(path, "--keywords", "a keyword")}


def _lines(path: str, option: str, what: str) -> Sequence[tuple[int, str]]:
    """(number, text) of the lines that are not blank."""
    try:
        with Path(path).expanduser().open("rb") as file:
            data = file.read(LIST_BYTES + 1)
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be read: {error.strerror}") from error
    if len(data) > LIST_BYTES:
        raise UserError(f"{option}: {path} is larger than {LIST_BYTES >> 20} MiB; expected {what} a line")
    try:
        text = encodings.decode(data)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{option}: {path}:{line}: not UTF-8 text; {encodings.remedy(error)}") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise UserError(f"{option}: {path} is empty; write {what} a line")
    return lines
