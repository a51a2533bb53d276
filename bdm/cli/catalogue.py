"""Messages in another language, by templates: what stands in a message is found again, and told anew."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

#: What a template leaves open: the next value, or the one of a number.
_OPEN = re.compile(r"\{(\d?)\}")
#: Messages within messages within messages, at most.
_DEEPEST = 5
#: Parts of one message that a joint divides, at most.
_MOST_PIECES = 4


@dataclass(frozen=True)
class _Template:
    """A text with open places: what stands around them, and the same in the other language."""

    literals: tuple[str, ...]
    other: str

    @classmethod
    def of(cls, english: str, other: str) -> _Template:
        return cls(tuple(_OPEN.split(english)[::2]), other)

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
        fits = at < last and text.endswith(inner[-1])
        return [*found, text[at:last]] if fits else None

    def filled(self, values: Iterable[str]) -> str:
        """The other language's text with values."""
        said = list(values)
        numbers = iter(range(len(said)))
        return _OPEN.sub(lambda open: said[int(open[1]) if open[1] else next(numbers)], self.other)


class Catalogue:
    """Translates messages.

    Args:
        templates: English texts, with ``{}`` where a value stands, and the same in the other language, where
            ``{0}`` and ``{1}`` say another order.
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

    def told(self, text: str, depth: int = 0) -> str | None:
        """A message in the other language, what it quotes of other messages too; None for none of ours.

        Of several templates that fit, the one that says most is taken.
        """
        ways = (
            lambda: self._one(text, depth),
            lambda: self._list(text, depth, whole=True),
            lambda: self._list(text, depth),
            lambda: self._one(text, depth, within=True),
        )
        return next(filter(None, (way() for way in ways)), None)

    def _one(self, text: str, depth: int, within: bool = False) -> str | None:
        """A single message; ``within`` lets its values be lists of messages."""
        if text in self._exact:
            return self._exact[text]
        if depth > _DEEPEST:
            return None
        for template in self._open:
            values = template.values(text)
            if values is not None and (within or not any("; " in value for value in values)):
                return template.filled(self.told(value, depth + 1) or value for value in values)
        return None

    def _list(self, text: str, depth: int, whole: bool = False) -> str | None:
        """Several messages in one line: each in turn is the longest that is known.

        Of sentences some may be unknown, which stay as they are, if not the ``whole`` is to be known; between
        commas all are known or none is taken for ours.
        """
        sentences = _told_in_turn(text.split("; "), "; ", lambda part: self._one(part, depth))
        known = [other is not None for _, other in sentences]
        if (known and all(known)) or (not whole and any(known)):
            return "；".join(other or part for part, other in sentences)
        words = _told_in_turn(text.split(", "), ", ", lambda part: self._one(part, depth))
        told = [other for _, other in words if other is not None]
        return "，".join(told) if told and len(told) == len(words) else None


def _told_in_turn(
    pieces: list[str], joint: str, tell: Callable[[str], str | None]
) -> list[tuple[str, str | None]]:
    """The parts of a text that was divided, each as long as it is known, with what is told of it."""
    found: list[tuple[str, str | None]] = []
    while len(pieces) and not (len(pieces) == 1 and not found):  # a single piece is no list
        for count in range(min(_MOST_PIECES, len(pieces)), 0, -1):
            part = joint.join(pieces[:count])
            other = tell(part)
            if other is not None or count == 1:
                found.append((part, other))
                pieces = pieces[count:]
                break
    return found
