"""Texts in columns of a terminal, where Chinese characters take two."""

from __future__ import annotations

import re
import unicodedata

#: Marks that begin no line.
_CLOSING = "，。；：！？、）》」”’,.;:!?)"


def columns(text: str) -> int:
    """Columns of a terminal that a text takes."""
    return sum(2 if _is_wide(character) else 1 for character in text)


def wrapped(text: str, width: int) -> list[str]:
    """A text in lines of a width, ended between words and between Chinese characters.

    A word that is longer than a line stays whole.
    """
    lines = [""]
    for piece in _pieces(" ".join(text.split())):
        if lines[-1] and columns((lines[-1] + piece).rstrip()) > width:
            lines.append("")
        lines[-1] += piece if lines[-1] or piece != " " else ""
    return [line.rstrip() for line in lines]


def _pieces(text: str) -> list[str]:
    """What a line is not ended within: words with the blank behind them, single wide characters."""
    wide = "".join(character for character in set(text) if _is_wide(character) and character not in _CLOSING)
    one = rf"[{re.escape(wide)}]" if wide else r"(?!)"
    closing = f"[{re.escape(_CLOSING)}]*"
    return re.findall(rf"{one}{closing} ?|(?:(?!{one})\S)+ ?| ", text)


def _is_wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in "WF"
