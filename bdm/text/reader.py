"""A text -> the tree of a prompt, in one pass; whatever cannot be read as syntax stays text."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .grammar import Alternation, Lora, Mark, Node, Notice, Part, Prompt, Scheduled, Text
from .prompt import emphasis_notices, limited

#: Scheduled words within others, at most; what is deeper stays text.
DEEPEST = 50

_LORA = r"<(?:lora|lyco):[^<>]*>"
_FULL_MARKS = "（）：｜"
#: What a mark does, by how it is written.
_MEANING = {**{mark: mark for mark in "()[]:|"}, **dict(zip(_FULL_MARKS, "():|", strict=True))}
_PAIRS = {")": "(", "]": "["}
_NUMBER = re.compile(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*")
_AND = re.compile(r"\bAND\b")
_WEIGHT = re.compile(r":\s*([+-]?(?:\d+\.?|\d*\.\d+))\s*\Z")
_FULL_WEIGHT = re.compile(r"[:：]\s*([+-]?(?:\d+\.?|\d*\.\d+))\s*\Z")


def _tokens(marks: str) -> re.Pattern[str]:
    each = re.escape(marks)
    return re.compile(rf"({_LORA})|(\\.)|([{each}])|((?:(?!<(?:lora|lyco):)[^\\{each}])+)|.", re.DOTALL)


_ASCII, _FULL = _tokens("()[]:|"), _tokens("()[]:|" + _FULL_MARKS)


def read_prompt(text: str, full_width: bool = False, composed: bool = True) -> Prompt:
    """The tree of a prompt; ``str`` of it is the text again.

    AND is found first, then scheduled words within each part, as in A1111.

    Args:
        text: any.
        full_width: （ ） ： ｜ are read as ( ) : | are, for native prompts.
        composed: AND and the weights behind its parts are syntax; A1111 reads no negative prompt so.
    """
    notices: list[Notice] = []
    parts = [
        _read_part(piece, start, weight, full_width, notices)
        for piece, start, weight in _split(text, full_width, composed, notices)
    ]
    return Prompt(tuple(parts), tuple(sorted(notices, key=lambda notice: notice.start)))


def _split(text: str, full_width: bool, composed: bool, notices: list[Notice]) -> list[tuple[str, int, str]]:
    """(what it says, its place, its weight as written) of each part."""
    if not composed:
        return [(text, 0, "")]
    within = [found.span() for found in re.finditer(_LORA, text)]
    joints = [
        found.span()
        for found in _AND.finditer(text)
        if not any(start < found.start() < end for start, end in within)
    ]
    places = [0, *(end for _, end in joints)]
    pieces = [
        text[start:end] for start, end in zip(places, [*(s for s, _ in joints), len(text)], strict=True)
    ]
    # The weight of a native prompt that stands alone would be a score or a time (比例16:9).
    weight = None if full_width and not joints else _FULL_WEIGHT if full_width else _WEIGHT
    parts = []
    for piece, start in zip(pieces, places, strict=True):
        found = _weight_of(piece, weight)
        if found is not None and not joints:
            said = f"{found[0].strip()!r} behind the whole prompt is its weight, as in A1111"
            notices.append(Notice(start + found.start(), f"{said}; write it otherwise if it is text"))
        end = found.start() if found else len(piece)
        parts.append((piece[:end], start, piece[end:]))
    return parts


def _weight_of(piece: str, pattern: re.Pattern[str] | None) -> re.Match[str] | None:
    """The weight behind a part; looked for from its last colon on, so that long texts take no long time."""
    colon = max(piece.rfind(":"), piece.rfind("："))
    return None if pattern is None or colon < 0 else pattern.match(piece, colon)


def _read_part(text: str, start: int, weight: str, full_width: bool, notices: list[Notice]) -> Part:
    reading = _Reading(start, full_width, notices)
    nodes = reading.read(text)
    found = _FULL_WEIGHT.match(weight)
    notices += [Notice(start + place, said) for place, said in emphasis_notices(text, full_width)]
    return Part(start, nodes, limited(float(found[1])) if found else 1.0, weight)


@dataclass
class _Open:
    """A bracket that is not closed yet.

    Attributes:
        mark: the bracket.
        nodes: what has come since.
        cuts: places in ``nodes`` of colons and bars that lie in no inner bracket.
        depth: how deep scheduled words lie in it.
    """

    mark: Mark
    nodes: list[Node] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)
    depth: int = 0


class _Reading:
    """Reads one part: brackets that pair become nodes, where what is in them can be read as words.

    A bracket that cannot (an unknown form, or another kind's partner) is text, and with it all that are open
    around it. A bar in no bracket, or a lone backslash, is beyond A1111's grammar: it then schedules nothing.
    """

    def __init__(self, start: int, full_width: bool, notices: list[Notice]) -> None:
        self._start, self._full_width, self._notices = start, full_width, notices
        self._stack: list[_Open] = [_Open(Mark(start, ""))]
        self._lost: int | None = None

    def read(self, text: str) -> tuple[Node, ...]:
        """The nodes of the text."""
        leaves = []
        for found in (_FULL if self._full_width else _ASCII).finditer(text):
            leaf = self._leaf(found)
            leaves.append(leaf)
            self._take(leaf)
        self._give_up()
        if self._lost is None:
            return _joined(self._stack[0].nodes)
        if any(isinstance(node, Scheduled | Alternation) for node in self._stack[0].nodes):
            said = "stands in no [a|b]: as in A1111, nothing of the prompt is scheduled or alternates"
            self._notices.append(Notice(self._lost, f"{text[self._lost - self._start]!r} {said}"))
        return _joined(leaves)

    def _leaf(self, found: re.Match[str]) -> Text:
        start, text = self._start + found.start(), found[0]
        if found[1]:
            return _lora(start, text, self._notices)
        if found[3]:
            return Mark(start, text)
        if text == "\\" or (found[2] and text[1] == "\n"):
            self._lost = start if self._lost is None else self._lost
        return Text(start, text)

    def _take(self, leaf: Text) -> None:
        meaning = _MEANING.get(leaf.text) if isinstance(leaf, Mark) else None
        top = self._stack[-1]
        if meaning is not None and meaning in "([":
            assert isinstance(leaf, Mark)
            self._stack.append(_Open(leaf))
        elif meaning in _PAIRS and _MEANING.get(top.mark.text) == _PAIRS[meaning]:
            self._close(leaf)
        elif meaning in _PAIRS:
            self._give_up()
            self._stack[0].nodes.append(leaf)
        else:
            if meaning is not None:
                top.cuts.append(len(top.nodes))
            top.nodes.append(leaf)

    def _close(self, closer: Text) -> None:
        inner = self._stack.pop()
        made = _made(inner, closer)
        if made is None:
            self._stack.append(inner)
            self._give_up()
            self._stack[0].nodes.append(closer)
            return
        outer = self._stack[-1]
        outer.nodes += made
        deeper = any(isinstance(node, Scheduled | Alternation) for node in made)
        outer.depth = max(outer.depth, inner.depth + (len(made) == 1 and deeper))

    def _give_up(self) -> None:
        """All brackets that are open are text."""
        bottom, *others = self._stack
        for each in others:
            bottom.cuts += [len(bottom.nodes) + 1 + cut for cut in each.cuts]
            bottom.nodes += [each.mark, *each.nodes]
        for cut in bottom.cuts:
            if bottom.nodes[cut].text == "|" and self._lost is None:  # pyright: ignore[reportAttributeAccessIssue]
                self._lost = bottom.nodes[cut].start
        bottom.cuts.clear()
        self._stack = [bottom]


def _made(inner: _Open, closer: Text) -> list[Node] | None:
    """What a pair of brackets is; None where it is text."""
    start, nodes = inner.mark.start, inner.nodes
    cuts = "".join(_MEANING[nodes[cut].text] for cut in inner.cuts)  # pyright: ignore[reportAttributeAccessIssue]
    pieces = [
        _joined(nodes[a + 1 : b]) for a, b in zip([-1, *inner.cuts], [*inner.cuts, len(nodes)], strict=True)
    ]
    written = "".join(str(nodes[cut]) for cut in inner.cuts)
    if _MEANING[inner.mark.text] == "(":
        return [inner.mark, *nodes, closer] if cuts in ("", ":") else None
    if not cuts:
        return [inner.mark, *nodes, closer]
    if inner.depth >= DEEPEST:
        return None
    if set(cuts) == {"|"}:
        return [Alternation(start, tuple(pieces), written)]
    if cuts not in (":", "::") or len(pieces[-1]) != 1 or not isinstance(pieces[-1][0], Text):
        return None
    when = pieces[-1][0].text
    if not _NUMBER.fullmatch(when):
        return None
    before = pieces[0] if len(pieces) == 3 else None
    return [Scheduled(start, before, pieces[-2], written, when)]


def _lora(start: int, text: str, notices: list[Notice]) -> Text:
    """An adapter with its strengths, given by place or by name; text where they are none."""
    name, *settings = text[1:-1].split(":")[1:]
    strengths: dict[str, float] = {}
    places = iter(("te", "unet"))
    for setting in settings:
        key, equals, value = setting.rpartition("=")
        key = key.strip() if equals else next(places, "")
        number = re.fullmatch(r"\s*[+-]?(\d+\.?\d*|\.\d+)\s*", value)
        if key not in ("te", "unet") or number is None:
            said = f"{text!r} is no <lora:name:text strength:UNet strength>, so it is text"
            notices.append(Notice(start, said))
            return Text(start, text)
        strengths[key] = limited(float(value))
    if not name.strip():
        notices.append(Notice(start, f"{text!r} names no adapter, so it is text"))
        return Text(start, text)
    te = strengths.get("te", 1.0)
    return Lora(start, text, name.strip(), te, strengths.get("unet", te))


def _joined(nodes: list[Node]) -> tuple[Node, ...]:
    """The same nodes, with neighbouring text as one."""
    joined: list[Node] = []
    for node in nodes:
        if joined and type(node) is Text and type(joined[-1]) is Text:
            joined[-1] = Text(joined[-1].start, joined[-1].text + node.text)
        else:
            joined.append(node)
    return tuple(joined)
