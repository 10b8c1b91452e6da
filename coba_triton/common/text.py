"""Text that people write: its encodings, and characters that look like other ones."""

from __future__ import annotations

import codecs
import unicodedata

_DASHES = dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d", "-")
_LOOK_ALIKE = (
    _DASHES
    | dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb\uff02", '"')
    | dict.fromkeys("\u2018\u2019\u201a\u201b\uff07", "'")
    | dict.fromkeys("\u00a0\u2007\u2009\u202f\u200b\u3000", " ")
)


def decode(data: bytes) -> str:
    """Decode UTF-8, with or without a byte order mark, or UTF-16 with one, which editors on Windows write.

    Raises:
        UnicodeDecodeError: if the bytes are neither.
    """
    return data.decode("utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")


def plain_minus(text: str) -> str:
    """The text with a hyphen, as on a keyboard, for every minus sign or dash of printed papers, such as U+2212."""
    return text.translate({ord(sign): plain for sign, plain in _DASHES.items()})


def look_alike(text: str, line: int) -> str:
    """``; in line 3, ...``, which names the first character of a line that only looks like another one. Empty if none."""
    for char in "".join(text.split("\n")[line - 1 : line]):
        if char in _LOOK_ALIKE:
            name = f"U+{ord(char):04X} {unicodedata.name(char)}"
            return f"; in line {line}, {char!r} is {name}: write {_LOOK_ALIKE[char]!r}"
    return ""
