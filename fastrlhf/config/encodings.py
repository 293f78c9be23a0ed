"""Text files of people are UTF-8. What another one probably is, so that the error can name it and how to convert it."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from itertools import groupby

SAMPLE_BYTES = 1 << 16  # of a file that are looked at
SHOWN_CHARS = 20
LEAST_COMMON = 0.7  # share of a text's characters that must be common ones of the encoding
_BOMS = (  # UTF-32 first: its mark begins with the one of UTF-16
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def decode(data: bytes) -> str:
    """Text of UTF-8 data, with or without a byte order mark. Raises UnicodeDecodeError; zero bytes of UTF-16 count."""
    if b"\0" in data and guess_encoding(data) is not None:
        raise UnicodeDecodeError("utf-8", data, data.index(b"\0"), data.index(b"\0") + 1, "a zero byte")
    return data.decode("utf-8-sig")


def remedy(error: UnicodeDecodeError) -> str:
    """What to do about data that are no UTF-8: the encoding they probably have, what they say when read so, and the
    command that converts them."""
    data = bytes(error.object)
    name = guess_encoding(data)
    if name is None:
        return "save the file as UTF-8"
    label = {"GB18030": "GBK (GB18030)"}.get(name, name)
    text = data[:SAMPLE_BYTES].decode(name, "replace")
    says = max(("".join(run) for is_ascii, run in groupby(text, str.isascii) if not is_ascii), key=len, default="")
    shown = f' and then says "{says[:SHOWN_CHARS]}"' if says.strip("\ufeff\ufffd") else ""
    return f"it looks like {label}{shown}; save the file as UTF-8: iconv -f {name} -t UTF-8 OLD > NEW"


def guess_encoding(data: bytes) -> str | None:
    """The encoding that data which are no UTF-8 probably have, as iconv calls it: UTF-16, UTF-16LE, UTF-16BE, UTF-32,
    GB18030 or BIG5. None: it cannot be told.

    UTF-16 without a mark shows in zero bytes at every other place. GBK and Big5 are valid for nearly the same bytes;
    but both standards put the characters in use into their first plane, so the encoding is the one in which more of
    the text is made of those.
    """
    data = data[:SAMPLE_BYTES]
    for mark, name in _BOMS:
        if data.startswith(mark):
            return name
    zeros = [data[start::2].count(0) for start in (0, 1)]
    if sum(zeros):
        many = max(zeros) > len(data) // 8 or not _is_utf8(data)  # not a zero byte that got into a text of UTF-8
        likely = many and min(zeros) <= max(zeros) // 8
        return ("UTF-16LE" if zeros[1] > zeros[0] else "UTF-16BE") if likely else None
    shares = {name: _common(data.decode(name, "replace"), name) for name in _IS_COMMON}
    best = max(shares, key=shares.__getitem__)
    return best if shares[best] >= LEAST_COMMON else None


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_common_gb(pair: bytes) -> bool:
    """GB 2312: punctuation and full-width letters in rows 1 to 3, the 3755 commonest characters in rows 16 to 55."""
    return (0xA1 <= pair[0] <= 0xA3 or 0xB0 <= pair[0] <= 0xD7) and pair[1] >= 0xA1


def _is_common_big5(pair: bytes) -> bool:
    """Big5: punctuation from A1 to A3, the 5401 commonest characters from A4 to C6."""
    return 0xA1 <= pair[0] <= 0xC6


_IS_COMMON: dict[str, Callable[[bytes], bool]] = {"GB18030": _is_common_gb, "BIG5": _is_common_big5}
# Both sets overlap; in texts of few characters these decide.
_COMMONEST = frozenset(
    "的一是不了在有人我他她它这這中大来來上国國个個到说說们們为為子和你您地出道也时時年得就那要下以生会會自着著去之过過家学學对對可里裡"
    "后後小么麼心多天而能好都然没沒请請问問吗嗎什怎样樣，。？！、：；「」“”（）"
)


def _common(text: str, encoding: str) -> float:
    """Share of the characters beyond ASCII that are common ones of an encoding; up to twice that for the commonest."""
    characters = [c for c in text if not c.isascii()]
    pairs = [(c, c.encode(encoding)) for c in characters if c != "\ufffd"]
    points = sum((c in _COMMONEST) + _IS_COMMON[encoding](pair) for c, pair in pairs if len(pair) == 2)
    return points / max(1, len(characters))
