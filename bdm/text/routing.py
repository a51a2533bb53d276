"""Words in the native prompt that only the English side understands, told to that side.

Quality tags and trigger words are what English models learned them as. Words of content stay where they are:
a concept's English name takes its native look away.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .grammar import Mark, Prompt, Text
from .prompt import weights_by_place
from .reader import read_prompt

#: Tags that say how well a picture is made, and nothing of what is in it; and what English models call them.
QUALITY: dict[str, str] = {
    **{
        tag: tag
        for tag in (
            "masterpiece", "best quality", "high quality", "great quality", "good quality", "top quality",
            "amazing quality", "normal quality", "low quality", "bad quality", "worst quality", "highres",
            "absurdres", "incredibly absurdres", "lowres", "high resolution", "low resolution",
            "ultra high res", "ultra highres", "8k", "4k", "uhd", "8k uhd", "ultra-detailed",
            "ultra detailed", "highly detailed", "extremely detailed", "very aesthetic", "score_9",
            "score_8_up", "score_7_up", "jpeg artifacts", "bad anatomy", "bad hands", "bad proportions",
            "extra digits", "extra digit", "fewer digits", "missing fingers", "extra limbs",
        )
    },
    "杰作": "masterpiece", "傑作": "masterpiece", "最佳质量": "best quality", "最高质量": "best quality",
    "最佳品质": "best quality", "最佳畫質": "best quality", "最佳画质": "best quality",
    "高质量": "high quality", "高品质": "high quality", "高画质": "high quality", "高畫質": "high quality",
    "高分辨率": "highres", "高清": "highres", "超高清": "absurdres", "低质量": "low quality",
    "低画质": "low quality", "低畫質": "low quality", "最差质量": "worst quality",
    "最差画质": "worst quality", "低分辨率": "lowres",
}  # fmt: skip

_SEPARATOR = re.compile(r"[,，、。;；\n]")
_CJK = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]")
_EMPTY = re.compile(r"[(（]\s*(?:[:：]\s*[+-]?[.\d]+\s*)?[)）]|\[\s*\]")


@dataclass(frozen=True)
class Routed:
    """A pair of prompts behind the move.

    Attributes:
        native: what the branch is told.
        english: what the backbone is told.
        moved: the words that act on the English side now, as they stood in the native prompt.
    """

    native: str
    english: str
    moved: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """The move in one line."""
        return f"acting on the English side: {', '.join(self.moved)} (of the native prompt)"


@dataclass(frozen=True)
class _Found:
    start: int
    end: int
    said: str
    weight: float
    stays: bool = False


def route(native: str, english: str, words: Sequence[str] = ()) -> Routed:
    """Tell the English side what belongs there.

    A quality tag counts where it stands alone between commas; a trigger word wherever it stands, as
    ``embedding:word`` and ``<word>`` too. Brackets around them go along. What is scheduled or alternates
    stays, and so do words in native script, which are told to both sides.

    Args:
        native: the native prompt.
        english: the English one; moved words come before it.
        words: trigger words of what is attached, and names of embeddings.
    """
    found = sorted(_found(native, words), key=lambda one: one.start)
    if not found:
        return Routed(native, english)
    new = {_written(one): None for one in found if one.said.lower() not in english.lower()}
    told = ", ".join([*new, *filter(None, [english])])
    left = native
    for one in reversed(found):
        left = left if one.stays else _without(left, one)
    moved = dict.fromkeys(native[one.start : one.end] for one in found)
    return Routed(_tidy(left) if left != native else native, told, tuple(moved))


def _found(native: str, words: Sequence[str]) -> Iterator[_Found]:
    prompt = read_prompt(native, full_width=True)
    pattern = _pattern(words)
    for start, text, weight in _runs(native):
        for one in [*_tags(native, start, text, weight), *_triggers(start, text, weight, pattern)]:
            if _lies_in_text(prompt, one):
                yield one


def _runs(native: str) -> list[tuple[int, str, float]]:
    """(place, text, weight) of words that nothing parts but colons."""
    runs: list[tuple[int, str, float]] = []
    for start, text, weight in weights_by_place(native, full_width=True):
        if runs and runs[-1][2] == weight and runs[-1][0] + len(runs[-1][1]) == start:
            runs[-1] = (runs[-1][0], runs[-1][1] + text, weight)
        else:
            runs.append((start, text, weight))
    return runs


def _tags(native: str, start: int, text: str, weight: float) -> Iterator[_Found]:
    place = 0
    for piece in _SEPARATOR.split(text):
        tag = piece.strip()
        at = start + place + (len(piece) - len(piece.lstrip()))
        place += len(piece) + 1
        said = QUALITY.get(" ".join(tag.lower().replace("_", " ").split())) or QUALITY.get(tag.lower())
        if said and _stands_alone(native, at, at + len(tag)):
            yield _Found(at, at + len(tag), said, weight)


def _stands_alone(native: str, start: int, end: int) -> bool:
    """Whether there are only brackets, weights and blanks between a tag and the commas around it."""
    before = re.split(_SEPARATOR, native[:start])[-1]
    behind = re.split(_SEPARATOR, native[end:])[0]
    return not re.sub(r"[\s()\[\]（）]", "", before) and not re.sub(
        r"[\s()\[\]（）]|[:：]\s*[+-]?[.\d]+\s*(?=[)）])", "", behind
    )


def _pattern(words: Sequence[str]) -> re.Pattern[str] | None:
    each = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True) if word.strip())
    bounded = rf"<(?:{each})>|(?<![A-Za-z0-9_<])(?:embedding:)?(?:{each})(?![A-Za-z0-9_>])"
    return re.compile(bounded, re.IGNORECASE) if each else None


def _triggers(start: int, text: str, weight: float, pattern: re.Pattern[str] | None) -> Iterator[_Found]:
    for found in pattern.finditer(text) if pattern else ():
        stays = bool(_CJK.search(found[0]))
        yield _Found(start + found.start(), start + found.end(), found[0], weight, stays)


def _lies_in_text(prompt: Prompt, one: _Found) -> bool:
    """Whether words lie in what is said in all steps, and are no adapter's name."""
    others = (node for part in prompt.parts for node in part.nodes if type(node) not in (Text, Mark))
    return all(one.end <= node.start or node.start + len(str(node)) <= one.start for node in others)


def _written(one: _Found) -> str:
    said = re.sub(r"([()\[\]\\])", r"\\\1", one.said)
    return said if one.weight == 1 else f"({said}:{one.weight:.6g})"


def _without(text: str, one: _Found) -> str:
    """The text without some words and the comma behind them, or before them where none is behind."""
    before, behind = text[: one.start], text[one.end :]
    comma = re.match(r"\s*[,，、;；]\s*", behind)
    if comma:
        return before + behind[comma.end() :]
    return re.sub(r"[,，、;；]\s*\Z", "", before) + behind


def _tidy(text: str) -> str:
    """The text without brackets around nothing, and without commas that part nothing."""
    while (shorter := _EMPTY.sub("", text)) != text:
        text = shorter
    text = re.sub(r"([,，、;；])(?:\s*[,，、;；])+", r"\1", text)
    return text.strip().strip(",，、;；").strip()
