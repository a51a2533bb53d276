r"""Bracket syntax of prompts.

``(x)`` 1.1, ``[x]`` 1/1.1, ``(x:1.3)``, escapes ``\(`` ``\)`` ``\[`` ``\]``.
"""

from __future__ import annotations

import re

_TOKEN = re.compile(r"\\[()\[\]\\]|[()\[\]]|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[^\\()\[\]:]+|[\\:]")
_ROUND, _SQUARE = 1.1, 1 / 1.1


def parse_emphasis(prompt: str) -> list[tuple[str, float]]:
    """Split a prompt into fragments of one weight each.

    Brackets nest and multiply; one left open reaches to the end. Full-width brackets are ordinary characters.

    Returns:
        (text, weight) pairs without brackets; neighbours of equal weight are joined only where no bracket
        stood between them, because each fragment is tokenised on its own.
    """
    fragments: list[list] = [["", 1.0]]
    opened: list[tuple[str, int]] = []

    def close(kind: str, factor: float) -> bool:
        if not opened or opened[-1][0] != kind:
            return False
        for fragment in fragments[opened.pop()[1] :]:
            fragment[1] *= factor
        fragments.append(["", 1.0])
        return True

    for match in _TOKEN.finditer(prompt):
        text, weight = match[0], match[1]
        if text in ("(", "["):
            fragments.append(["", 1.0])
            opened.append((text, len(fragments) - 1))
        elif (
            (weight is not None and close("(", float(weight)))
            or (text == ")" and close("(", _ROUND))
            or (text == "]" and close("[", _SQUARE))
        ):
            pass
        else:
            fragments[-1][0] += text[1:] if len(text) == 2 and text[0] == "\\" else text
    for kind, start in opened:
        for fragment in fragments[start:]:
            fragment[1] *= _ROUND if kind == "(" else _SQUARE
    return [(text, weight) for text, weight in fragments if text] or [("", 1.0)]
