r"""Emphasis, as A1111 reads it: words in brackets and their weights.

``(x)`` weighs 1.1, ``[x]`` 1/1.1, ``(x:1.3)`` 1.3; ``\(`` ``\)`` ``\[`` ``\]`` ``\\`` are the characters
themselves. The rules are those of A1111's ``parse_prompt_attention``, but for two: a number of several dots
is text, where A1111 stops, and no weight leaves ``LARGEST``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

#: No weight is larger, so that products of many are still numbers; at 1,000 a picture is lost already.
LARGEST = 1e300

ROUND, SQUARE = 1.1, 1 / 1.1
_BREAK = re.compile(r"\bBREAK\b")
_NUMBER = r"\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*"
_ASCII = re.compile(rf"\\[()\[\]\\]?|[()\[\]]|:{_NUMBER}\)|[^\\()\[\]:]+|:")
_FULL = re.compile(rf"\\[()\[\]\\（）]?|[()\[\]（）]|[:：]{_NUMBER}[)）]|[^\\()\[\]:（）：]+|[:：]")
_LIKE_NUMBER = re.compile(r":\s*[+-]?([.\d]+)\s*\)")


@dataclass
class _Fragment:
    """Words between two brackets.

    Attributes:
        text: the words.
        start: their place in the prompt.
        weight: of all brackets that are closed around them.
        breaks: this is the word BREAK.
    """

    text: str
    start: int
    weight: float = 1.0
    breaks: bool = False


@dataclass
class _Brackets:
    """Fragments, and the brackets that are open, by kind; each is the count of fragments before it."""

    fragments: list[_Fragment] = field(default_factory=list)
    opened: dict[str, list[int]] = field(default_factory=lambda: {"(": [], "[": []})

    def close(self, kind: str, factor: float) -> None:
        for fragment in self.fragments[self.opened[kind].pop() :]:
            fragment.weight = limited(fragment.weight * factor)

    def close_all(self) -> None:
        """Whatever is open reaches to the end."""
        for kind, factor in (("(", ROUND), ("[", SQUARE)):
            places, count = self.opened[kind], 0
            products: dict[float, list[float]] = {}
            for i, fragment in enumerate(self.fragments if places else ()):
                while count < len(places) and places[count] <= i:
                    count += 1
                fragment.weight = _multiplied(fragment.weight, factor, count, products)
            places.clear()


def _multiplied(weight: float, factor: float, times: int, known: dict[float, list[float]]) -> float:
    """A weight times a factor, so many times one after the other, which a power would round otherwise."""
    chain = known.setdefault(weight, [weight])
    while len(chain) <= times:
        chain.append(limited(chain[-1] * factor))
    return chain[times]


def limited(weight: float) -> float:
    """A weight, at most ``LARGEST`` in either direction."""
    return max(-LARGEST, min(LARGEST, weight))


def parse_emphasis(prompt: str, full_width: bool = False, breaks: bool = True) -> list[tuple[str, float]]:
    """Split a prompt into runs of one weight each, every one of which is tokenised on its own.

    Round and square brackets are paired each for themselves; one left open reaches to the end, and one that
    closes nothing is text.

    Args:
        prompt: any text.
        full_width: （ ） ： are read as ( ) : are, for native prompts.
        breaks: the word BREAK is a run of its own, of weight -1 outside of brackets.

    Returns:
        (text, weight) pairs without brackets; ("", 1.0) alone for a text of nothing.
    """
    runs: list[tuple[str, float]] = []
    for fragment in _fragments(prompt, full_width, breaks).fragments:
        if runs and runs[-1][1] == fragment.weight:
            runs[-1] = (runs[-1][0] + fragment.text, fragment.weight)
        else:
            runs.append((fragment.text, fragment.weight))
    return runs or [("", 1.0)]


def is_break(text: str, weight: float) -> bool:
    """Whether a run ends the chunk: BREAK outside of brackets. Inside of them A1111 reads it as a word."""
    return text == "BREAK" and weight == -1


def weights_by_place(prompt: str, full_width: bool = False) -> list[tuple[int, str, float]]:
    """(place, text, weight) of the words between brackets."""
    return [(each.start, each.text, each.weight) for each in _fragments(prompt, full_width, False).fragments]


def emphasis_notices(prompt: str, full_width: bool = False) -> Iterator[tuple[int, str]]:
    """(place, what is made of it) of brackets, numbers and BREAKs that may have been meant otherwise."""
    for found in _LIKE_NUMBER.finditer(prompt):
        if found[1].count(".") > 1 or found[1] == ".":
            yield found.start(), f"{found[0]!r} is no number, so it is text"
    for fragment in _fragments(prompt, full_width, True).fragments:
        if fragment.breaks and fragment.weight != -1:
            yield fragment.start, "BREAK inside of brackets is a word, as in A1111; put it outside"
        if abs(fragment.weight) >= LARGEST:
            yield fragment.start, f"weights beyond {LARGEST:g} are cut to that"


def _fragments(prompt: str, full_width: bool, breaks: bool) -> _Brackets:
    brackets = _Brackets()
    fragments, opened = brackets.fragments, brackets.opened
    for found in (_FULL if full_width else _ASCII).finditer(prompt):
        text, number, start = found[0], found[1], found.start()
        if text.startswith("\\"):
            fragments.append(_Fragment(text[1:], start))
        elif text in "(（[":
            opened["[" if text == "[" else "("].append(len(fragments))
        elif number is not None and opened["("]:
            brackets.close("(", limited(float(number)))
        elif text in (")", "）") and opened["("]:
            brackets.close("(", ROUND)
        elif text == "]" and opened["["]:
            brackets.close("[", SQUARE)
        else:
            fragments += _words(text, start) if breaks else [_Fragment(text, start)]
    brackets.close_all()
    return brackets


def _words(text: str, start: int) -> Iterator[_Fragment]:
    """Words, cut at each BREAK; the blanks around it are dropped."""
    place, after = 0, False
    for found in _BREAK.finditer(text):
        yield _piece(text[place : found.start()], start + place, after, True)
        yield _Fragment("BREAK", start + found.start(), -1.0, True)
        place, after = found.end(), True
    yield _piece(text[place:], start + place, after, False)


def _piece(text: str, start: int, after: bool, before: bool) -> _Fragment:
    kept = text.rstrip() if before else text
    kept = kept.lstrip() if after else kept
    return _Fragment(kept, start + (len(text) - len(text.lstrip()) if after else 0))
