"""Variants ``{a|b}`` and wildcards ``__name__``: one text that stands for many, as in dynamicprompts.

They are chosen before a prompt is read any further, so that what is chosen may hold all of its grammar. Known
are ``{a|b}``, weights ``{0.7::a|b}``, several at once ``{2$$a|b|c}``, ``{1-2$$ and $$a|b|c}``, all of them
inside of each other, and wildcards with patterns ``__animals/*__``, whose files' lines may hold variants too.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .grammar import Notice, Text
from .wildcards import NO_WILDCARDS, Wildcards

#: Variants within variants, and wildcards that name wildcards, at most; what is deeper stays text.
DEEPEST = 20

_TOKEN = re.compile(r"\\.|(__(?:[^_\s{}|]|_(?!_))+__)|([{}|])|(?:(?!__)[^\\{}|])+|.", re.DOTALL)
_COUNT = re.compile(r"\s*(?:(\d{1,4})|(\d{0,4})-(\d{0,4}))\$\$(?:([^$|{}]*)\$\$)?")
_WEIGHT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)::")


@dataclass(frozen=True)
class Wildcard(Text):
    """``__name__``: a line of a file."""

    @property
    def name(self) -> str:
        """Of the file, or a pattern of names."""
        return self.text[2:-2]


@dataclass(frozen=True)
class Variant:
    """``{a|b}``.

    Attributes:
        start: place of its bracket.
        options: what may be said.
        heads: what stands before each option: how many, and its weight.
    """

    start: int
    options: tuple[tuple[VariantNode, ...], ...]
    heads: tuple[str, ...]

    def __str__(self) -> str:
        each = zip(self.heads, self.options, strict=True)
        return "{" + "|".join(head + "".join(map(str, option)) for head, option in each) + "}"

    @property
    def counts(self) -> tuple[int, int]:
        """How many of the options are said together, at least and at most."""
        found = _COUNT.match(self.heads[0])
        if found is None:
            return 1, 1
        low, high = (found[1], found[1]) if found[1] else (found[2], found[3])
        return int(low or 1), int(high) if high else 10_000

    @property
    def separator(self) -> str:
        """What stands between several."""
        found = _COUNT.match(self.heads[0])
        return "," if found is None or found[4] is None else found[4]

    @property
    def weights(self) -> tuple[float, ...]:
        """How often each is chosen."""
        found = (re.search(r"([\d.]+)::\s*\Z", head) for head in self.heads)
        return tuple(min(float(each[1]), 1e9) if each else 1.0 for each in found)


VariantNode = Text | Variant


@dataclass(frozen=True)
class Variants:
    """A text with its variants.

    Attributes:
        nodes: its parts.
        notices: what may have been meant otherwise.
    """

    nodes: tuple[VariantNode, ...]
    notices: tuple[Notice, ...] = ()

    def __str__(self) -> str:
        return "".join(map(str, self.nodes))


def read_variants(text: str) -> Variants:
    """The variants of a text; ``str`` of them is the text again. What cannot be read stays text."""
    stack = [_Brace(Text(0, ""))]
    notices: list[Notice] = []
    for found in _TOKEN.finditer(text):
        leaf = Text(found.start(), found[0])
        if found[0] == "{":
            stack.append(_Brace(leaf))
        elif found[0] == "}" and len(stack) > 1:
            brace = stack.pop()
            stack[-1].add(*brace.close(leaf, notices, len(stack)))
        elif found[0] == "|" and len(stack) > 1:
            stack[-1].options.append([])
        else:
            stack[-1].add(Wildcard(found.start(), found[0]) if found[1] else leaf)
    bottom, *opened = stack
    for brace in opened:
        notices.append(Notice(brace.opener.start, "'{' is closed nowhere, so it is text"))
        bottom.add(*brace.as_text())
    return Variants(tuple(bottom.options[0]), tuple(notices))


@dataclass
class _Brace:
    """A bracket that is open."""

    opener: Text
    options: list[list[VariantNode]] = field(default_factory=lambda: [[]])

    def add(self, *nodes: VariantNode) -> None:
        here = self.options[-1]
        for node in nodes:
            if here and type(node) is Text and type(here[-1]) is Text:
                here[-1] = Text(here[-1].start, here[-1].text + node.text)
            else:
                here.append(node)

    def as_text(self) -> list[VariantNode]:
        nodes: list[VariantNode] = [self.opener]
        for i, option in enumerate(self.options):
            nodes += [*([Text(self.opener.start, "|")] if i else []), *option]
        return nodes

    def close(self, closer: Text, notices: list[Notice], depth: int) -> list[VariantNode]:
        """What the pair is: a variant, or text where it is of a kind that is not known."""
        first = str(self.options[0][0]) if self.options[0] else ""
        if first[:1] in ("@", "~", "!") or first.startswith("$$") or depth > DEEPEST:
            said = "'{' begins a form that is not known here, so it is text"
            notices.append(Notice(self.opener.start, said))
            return [*self.as_text(), closer]
        parts = [_headed(option, i == 0) for i, option in enumerate(self.options)]
        return [Variant(self.opener.start, tuple(p[1] for p in parts), tuple(p[0] for p in parts))]


def _headed(option: list[VariantNode], first: bool) -> tuple[str, tuple[VariantNode, ...]]:
    """An option's head (how many, weight, blanks) and the rest of it."""
    if not option or type(option[0]) is not Text:
        return "", tuple(option)
    node = option[0]
    place = found.end() if first and (found := _COUNT.match(node.text)) else 0
    place = found.end() if (found := _WEIGHT.match(node.text, place)) else place
    place = len(node.text) - len(node.text[place:].lstrip())
    rest = [Text(node.start + place, node.text[place:])] if node.text[place:] else []
    return node.text[:place], (*rest, *option[1:])


def expand(text: str, seed: int, wildcards: Wildcards = NO_WILDCARDS) -> str:
    """One of the texts that a text stands for, the same for the same seed.

    Args:
        text: any; without variants and wildcards it is what it was.
        seed: chooses.
        wildcards: the files.
    """
    rng = random.Random(seed)
    return _chosen(read_variants(text).nodes, rng, wildcards, DEEPEST)


def expansions(text: str, wildcards: Wildcards = NO_WILDCARDS) -> Iterator[str]:
    """All the texts that a text stands for, one after the other; there may be very many."""
    return _all(read_variants(text).nodes, wildcards, DEEPEST)


def _chosen(nodes: Sequence[VariantNode], rng: random.Random, files: Wildcards, deep: int) -> str:
    return "".join(_one(node, rng, files, deep) for node in nodes)


def _one(node: VariantNode, rng: random.Random, files: Wildcards, deep: int) -> str:
    if isinstance(node, Variant):
        options, weights = _options(node, files, deep)
        low, high = (min(count, len(options)) for count in node.counts)
        picked = _picked(len(options), weights, rng.randint(low, max(low, high)), rng)
        return node.separator.join(_chosen(options[i], rng, files, deep) for i in picked)
    lines = _lines(node, files, deep)
    if not lines:
        return node.text
    return _chosen(read_variants(rng.choice(lines)).nodes, rng, files, deep - 1)


def _picked(options: int, weights: Sequence[float], count: int, rng: random.Random) -> list[int]:
    """Some of the options, none twice."""
    left, picked = list(range(options)), []
    for _ in range(count):
        each = [weights[i] for i in left]
        picked.append(rng.choices(left, each if sum(each) > 0 else None)[0])
        left.remove(picked[-1])
    return picked


def _options(node: Variant, files: Wildcards, deep: int) -> tuple[list[Sequence[VariantNode]], list[float]]:
    """What may be said; of a wildcard that several are chosen of, each line."""
    options: list[Sequence[VariantNode]] = []
    weights: list[float] = []
    for option, weight in zip(node.options, node.weights, strict=True):
        lines = _lines(option[0], files, deep) if len(option) == 1 and node.counts != (1, 1) else []
        said = [read_variants(line).nodes for line in lines] or [option]
        options += said
        weights += [weight / len(said)] * len(said)
    return options, weights


def _lines(node: VariantNode, files: Wildcards, deep: int) -> Sequence[str]:
    return files.lines(node.name) if isinstance(node, Wildcard) and deep > 0 else ()


def _all(nodes: Sequence[VariantNode], files: Wildcards, deep: int) -> Iterator[str]:
    for said in itertools.product(*(list(_each(node, files, deep)) for node in nodes)):
        yield "".join(said)


def _each(node: VariantNode, files: Wildcards, deep: int) -> Iterator[str]:
    if isinstance(node, Variant):
        options, _ = _options(node, files, deep)
        low, high = (min(count, len(options)) for count in node.counts)
        for count in range(low, max(low, high) + 1):
            for picked in itertools.permutations(options, count):
                for said in itertools.product(*(list(_all(each, files, deep)) for each in picked)):
                    yield node.separator.join(said)
        return
    lines = _lines(node, files, deep)
    if not lines:
        yield node.text
    for line in lines:
        yield from _all(read_variants(line).nodes, files, deep - 1)
