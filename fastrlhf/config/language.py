"""In which language a page speaks to people: Chinese or English. Errors and the files of a run are English."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

LANGUAGES = ("zh", "en")
_HAN, _LATIN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]"), re.compile(r"[A-Za-z]")
_KANA = re.compile(r"[\u3040-\u30ff]")


def language_of(texts: Iterable[str]) -> str:
    """zh where more than half of the texts that have letters are Chinese, else en.

    A text is Chinese by the share of its Chinese characters: a word has two of them, an English one five letters.
    """
    votes = [_is_chinese(text) for text in texts if _HAN.search(text) or _LATIN.search(text)]
    return "zh" if 2 * sum(votes) > len(votes) else "en"


def _is_chinese(text: str) -> bool:
    han = len(_HAN.findall(text))
    return han > 0 and 3 * han >= len(_LATIN.findall(text)) and han > len(_KANA.findall(text))  # Japanese has both


class Words:
    """What a page says, by the English of it: words("{n} steps", n=3). `language` is zh or en."""

    def __init__(self, language: str, chinese: Mapping[str, str]) -> None:
        self.language = language
        self._table = chinese if language == "zh" else None

    def __call__(self, text: str, **values: object) -> str:
        """The text in the page's language, with the values in the places that it names. KeyError: not in the table."""
        said = text if self._table is None else self._table[text]
        return said.format(**values) if values else said

    def known(self, text: str) -> str:
        """A name that a run may have made up (a phase, a metric): translated where the table has it."""
        return text if self._table is None else self._table.get(text, text)
