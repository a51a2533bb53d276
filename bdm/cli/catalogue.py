"""Messages in another language, by templates: what stands in a message is found again, and told anew."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

#: What a template leaves open: the next value, a whole number, or the value of a place.
_OPEN = re.compile(r"\{(n|\d?)\}")
#: Between the messages of a list.
_JOINT = "; "
#: Messages of a list at most; of its parts that one message may hold, which has joints of its own; of joints
#: within a value.
_MOST_PIECES, _MOST_JOINED, _MOST_WITHIN = 150, 3, 6


@dataclass(frozen=True)
class _Template:
    """A text with open places: what stands around them, and the same in the other language."""

    literals: tuple[str, ...]
    other: str
    numbers: tuple[bool, ...] = ()

    @classmethod
    def of(cls, english: str, other: str) -> _Template:
        parts = _OPEN.split(english)
        return cls(tuple(parts[::2]), other, tuple(kind == "n" for kind in parts[1::2]))

    @property
    def weight(self) -> int:
        """How much of a text this template says itself."""
        return sum(map(len, self.literals))

    def values(self, text: str) -> list[str] | None:
        """What stands in the open places, if a text is one of this template's; "" nowhere."""
        first, *inner = self.literals
        if not text.startswith(first):
            return None
        if not inner:
            return [] if text == first else None
        found, at = [], len(first)
        for literal in inner[:-1]:
            end = text.find(literal, at + 1)
            if end < 0:
                return None
            found.append(text[at:end])
            at = end + len(literal)
        last = len(text) - len(inner[-1])
        if at >= last or not text.endswith(inner[-1]):
            return None
        found.append(text[at:last])
        fits = all(value.isdigit() for value, number in zip(found, self.numbers) if number)
        return found if fits else None

    def filled(self, values: Iterable[str]) -> str:
        """The other language's text with values."""
        said = list(values)
        numbers = iter(range(len(said)))
        return _OPEN.sub(lambda open: said[int(open[1]) if open[1].isdigit() else next(numbers)], self.other)


class Catalogue:
    """Translates messages.

    Args:
        templates: English texts, with ``{}`` where a value stands and ``{n}`` where a whole number does, and
            the same in the other language, where ``{0}`` and ``{1}`` say another order.
    """

    def __init__(self, templates: Mapping[str, str]) -> None:
        made = [_Template.of(english, other) for english, other in templates.items()]
        self._exact = {one.literals[0]: one.other for one in made if len(one.literals) == 1}
        self._open = sorted((one for one in made if len(one.literals) > 1), key=lambda one: -one.weight)

    @classmethod
    def read(cls, folder: Path) -> Catalogue:
        """Of the JSON files in a folder."""
        files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
        return cls({english: other for said in files for english, other in said.items()})

    def told(self, text: str) -> str | None:
        """A message in the other language, what it quotes of other messages too; None for none of ours.

        Where a message can be read in several ways, the one is taken that explains most of its characters.
        """
        found = self._best(text, {})
        return found.text if found else None

    def _best(self, text: str, known: _Known) -> _Told | None:
        """The best reading of a text; ``known`` are those of its parts that were looked for already."""
        if text not in known:
            known[text] = None
            readings = (self._sentences(text, known), self._words(text, known), self._single(text, known))
            known[text] = _heaviest(readings)
        return known[text]

    def _single(self, text: str, known: _Known) -> _Told | None:
        """A text as one message."""
        if text in self._exact:
            return _Told(self._exact[text], len(text))
        return _heaviest([self._filled(template, text, known) for template in self._open])

    def _filled(self, template: _Template, text: str, known: _Known) -> _Told | None:
        values = template.values(text)
        if values is None or any(value.count(_JOINT) > _MOST_WITHIN for value in values):
            return None
        found = [self._best(value, known) or _Told(value, 0) for value in values]
        weight = template.weight + sum(one.weight for one in found)
        return _Told(template.filled(one.text for one in found), weight, bool(template.literals[0]))

    def _sentences(self, text: str, known: _Known) -> _Told | None:
        """A text as several messages in one line, divided so that most is explained; unknown ones stay."""
        pieces = text.split(_JOINT)
        if not 1 < len(pieces) <= _MOST_PIECES:
            return None
        ways = [_Told("", 0)]
        for end in range(1, len(pieces) + 1):
            parts = {i: _JOINT.join(pieces[i:end]) for i in range(max(0, end - _MOST_JOINED), end)}
            found = {i: self._single(part, known) for i, part in parts.items() if part != text}
            found[end - 1] = found[end - 1] or _Told(parts[end - 1], 0)
            ends = [_joined(ways[i], one) for i, one in found.items() if one is not None]
            ways.append(max(ends, key=lambda one: one.weight))
        return ways[-1] if ways[-1].weight else None

    def _words(self, text: str, known: _Known) -> _Told | None:
        """A text as messages between commas, all of which are known."""
        pieces = text.split(", ")
        found: list[_Told] = []
        for piece in pieces if 1 < len(pieces) <= _MOST_PIECES else ():
            one = self._single(piece, known)
            if one is None:
                return None
            found.append(one)
        return _Told("，".join(o.text for o in found), sum(o.weight for o in found)) if found else None


@dataclass(frozen=True)
class _Told:
    """A text in the other language.

    Attributes:
        text: itself.
        weight: how many characters of the English one templates explain.
        begins: a template's words stand at its beginning, so that it is the message around others.
    """

    text: str
    weight: int
    begins: bool = False


_Known = dict[str, "_Told | None"]


def _heaviest(readings: Iterable[_Told | None]) -> _Told | None:
    """The first of those that explain most."""
    return max(filter(None, readings), key=lambda one: (one.weight, one.begins), default=None)


def _joined(before: _Told, behind: _Told) -> _Told:
    text = f"{before.text}；{behind.text}" if before.text else behind.text
    return _Told(text, before.weight + behind.weight, begins=True)
