"""The tree of a prompt: what A1111's grammar makes of a text, with the place of every part in it.

Round and square brackets that weigh words may cross (``(a [b) c]``), so they are leaves here and are paired
where the weights are read (``bdm.text.prompt``). What holds other text is a node with children: scheduled and
alternating words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """Words as they are written, with their escapes.

    Attributes:
        start: place of the first character in the prompt, from 0; so in all nodes.
        text: the characters.
    """

    start: int
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Mark(Text):
    """A character that may be syntax: a bracket, a colon, a bar."""


@dataclass(frozen=True)
class Lora(Text):
    """``<lora:name:te:unet>``: an adapter and its strengths; it says nothing to the text encoders.

    Attributes:
        name: of the adapter.
        text_strength: in the text encoder.
        unet_strength: in the UNet.
    """

    name: str
    text_strength: float
    unet_strength: float


@dataclass(frozen=True)
class Scheduled:
    """``[before:after:when]``: other words from a step on; ``[after:when]`` and ``[before::when]`` too.

    Attributes:
        start: place of its bracket.
        before: what it says up to the step; None where no colon stands for it.
        after: what it says behind it.
        colons: the colons as they are written.
        when: the number as it is written, with its blanks.
    """

    start: int
    before: tuple[Node, ...] | None
    after: tuple[Node, ...]
    colons: str
    when: str

    def __str__(self) -> str:
        before = "" if self.before is None else printed(self.before) + self.colons[0]
        return f"[{before}{printed(self.after)}{self.colons[-1]}{self.when}]"

    def last_step(self, steps: int) -> int:
        """The last step, from 1, that says ``before``: a share of the steps below 1, a step from 1 on."""
        when = float(self.when)
        when = when * steps if when < 1 else when
        return steps if when >= steps else int(max(when, -1))


@dataclass(frozen=True)
class Alternation:
    """``[a|b]``: other words in each step, in turn.

    Attributes:
        start: place of its bracket.
        options: what is said in turn.
        bars: what stands between them.
    """

    start: int
    options: tuple[tuple[Node, ...], ...]
    bars: str

    def __str__(self) -> str:
        first, *others = map(printed, self.options)
        return "[" + first + "".join(map("".join, zip(self.bars, others, strict=True))) + "]"


Node = Text | Scheduled | Alternation


@dataclass(frozen=True)
class Part:
    """A prompt, or one of those that AND joins.

    Attributes:
        start: its place.
        nodes: what it says.
        weight: how strongly it pulls, 1 unless a number stands behind it.
        weight_text: colon, number and blanks as they are written.
    """

    start: int
    nodes: tuple[Node, ...]
    weight: float = 1.0
    weight_text: str = ""

    def __str__(self) -> str:
        return printed(self.nodes) + self.weight_text


@dataclass(frozen=True)
class Notice:
    """Something in a prompt that its author may have meant otherwise.

    Attributes:
        start: its place in the prompt, from 0.
        said: what it is and what is made of it.
    """

    start: int
    said: str

    def __str__(self) -> str:
        return f"character {self.start + 1}: {self.said}"


@dataclass(frozen=True)
class Prompt:
    """What a prompt says.

    Attributes:
        parts: one, or those that AND joins.
        notices: what may have been meant otherwise, by place.
    """

    parts: tuple[Part, ...]
    notices: tuple[Notice, ...] = ()

    def __str__(self) -> str:
        return "AND".join(map(str, self.parts))

    @property
    def loras(self) -> tuple[Lora, ...]:
        """The adapters that it names, in their order."""
        return tuple(node for part in self.parts for node in walk(part.nodes) if isinstance(node, Lora))


def printed(nodes: tuple[Node, ...]) -> str:
    """Nodes as they are written."""
    return "".join(map(str, nodes))


def walk(nodes: tuple[Node, ...]) -> Iterator[Node]:
    """All nodes and those inside of them."""
    for node in nodes:
        yield node
        for inner in _inside(node):
            yield from walk(inner)


def _inside(node: Node) -> tuple[tuple[Node, ...], ...]:
    if isinstance(node, Scheduled):
        return (node.before or (), node.after)
    return node.options if isinstance(node, Alternation) else ()
