"""Which script a text is written in. Scripts are told apart by their letters, languages are not: English, French and
pinyin are all Latin, simplified and traditional characters are both Han."""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import lru_cache

NONE, MIXED = "no letters", "mixed"
HAN, JAPANESE, KOREAN = "Chinese (Han)", "Japanese (kana, Han)", "Korean (Hangul)"
MAJORITY = 2 / 3  # of the words, for a text to be of one script
KANA_SHARE = 0.1  # of Han and kana, from which on they are Japanese
HAN_PER_WORD = 2  # a Chinese word is about two characters
_BY_NAME = {
    **dict.fromkeys(("CJK", "IDEOGRAPHIC"), "Han"),
    **dict.fromkeys(("HIRAGANA", "KATAKANA"), "Kana"),
    "MODIFIER": "",
}


def script_of(text: str) -> str:
    """The script of two thirds of a text's words, "mixed" where none has them, "no letters" where there is nothing but
    digits and signs.

    A word is a run of letters of one script; of Han and kana, which know no spaces, two characters are one.
    """
    words = _words(text)
    total = sum(words.values())
    if not total:
        return NONE
    eastern = words["Han"] + words["Kana"]
    is_japanese = words["Kana"] >= KANA_SHARE * eastern > 0
    names = {JAPANESE if is_japanese else HAN: eastern, KOREAN: words["Hangul"]}
    names |= {script: count for script, count in words.items() if script not in ("Han", "Kana", "Hangul")}
    name, most = max(names.items(), key=lambda item: item[1])
    return name if most >= MAJORITY * total else MIXED


def _words(text: str) -> Counter[str]:
    counts: Counter[str] = Counter()
    before = ""
    for character in unicodedata.normalize("NFKC", text):
        script = _script(character)
        if script in ("Han", "Kana"):
            counts[script] += 1 / HAN_PER_WORD
        elif script and script != before:
            counts[script] += 1
        if script or not unicodedata.category(character).startswith("M"):  # an accent does not end a word
            before = script
    return counts


@lru_cache(maxsize=1 << 14)
def _script(character: str) -> str:
    """The first word of a letter's Unicode name, which is its script; "" for what is no letter."""
    if not unicodedata.category(character).startswith("L"):
        return ""
    name = unicodedata.name(character, "unknown").replace("-", " ").split()[0]
    return _BY_NAME.get(name, name.capitalize())
