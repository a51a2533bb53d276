"""Axes of sheets, by A1111's names: a request -> the same one with another value."""

from __future__ import annotations

import csv
import io
import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import UserError, printable, quoted
from .library import Library
from .request import FileRef, PluginUse, Request
from .samplers import named

#: Changes a request by a value's text: the request, the text, all values of the axis, the files.
Change = Callable[[Request, str, tuple[str, ...], Library], Request]
#: Cells of a sheet at most.
MOST_CELLS = 1000

_RANGE = re.compile(
    r"\s*(?P<first>[+-]?[\d.]+)\s*-\s*(?P<last>[+-]?[\d.]+)"
    r"\s*(?:\(\s*\+?\s*(?P<step>[\d.]+)\s*\)|\[\s*(?P<count>\d+)\s*\])?\s*"
)


@dataclass(frozen=True)
class Axis:
    """An axis of a sheet.

    Attributes:
        name: A1111's, or one of ours.
        values: as they are written under the pictures.
    """

    name: str
    values: tuple[str, ...]

    def apply(self, request: Request, value: str, library: Library) -> Request:
        """A request with one of the values.

        Raises:
            UserError: a value that means nothing on this axis.
        """
        return _CHANGES[self.name][0](request, value, self.values, library)

    def label(self, value: str, called: Callable[[str], str] = str) -> str:
        """What is written beside a picture of a value.

        Args:
            value: one of the axis's.
            called: an axis's name in the language of the sheet.
        """
        return value if self.name in _SAY_THEMSELVES else f"{called(self.name)}: {value}"


def read_axis(text: str, others: Mapping[str, str] = {}) -> Axis:
    """An axis as people write it: ``Steps: 10,20``, ``CFG Scale: 1-5 (+2)``, ``Seed: 1-9 [3]``.

    Args:
        text: a name, a colon, and values with commas between them; one that holds a comma stands in double
            quotes. Numbers may be ranges, with a step in round or a count in square brackets, as in A1111.
        others: names in other languages, and the axes that they are.

    Raises:
        UserError: an unknown name, an axis of A1111's that is not drawn here, no values, a range that is
            none.
    """
    name, colon, rest = text.replace("：", ":").partition(":")
    title = _title(name, others) if colon else None
    if title is None:
        raise UserError(f"axis {printable(text, 80)!r}; give NAME: VALUES, with one of {', '.join(AXES)}")
    values = [value.strip() for value in next(csv.reader([rest], skipinitialspace=True), [])]
    kind = _CHANGES[title][1]
    if kind in (int, float):
        values = [number for value in values for number in _numbers(value, kind, title)]
    if not values or (not all(values) and kind is not str):
        raise UserError(f"axis {title} has no values; give some, such as {title}: 1,2")
    return Axis(title, tuple(_orders(values) if title == _ORDER else values))


def _title(name: str, others: Mapping[str, str]) -> str | None:
    """The axis that has a name; None for none.

    Raises:
        UserError: it is one of A1111's that is not drawn here.
    """
    known = {_plain(title): title for title in _CHANGES}
    if _plain(name) not in known and _plain(name) in map(_plain, NOT_HERE):
        raise UserError(f"axis {name.strip()} is not drawn here; give one of {', '.join(AXES)}")
    return known.get(_plain(name)) or others.get(name.strip())


def _plain(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())


def _orders(words: list[str]) -> list[str]:
    """The words in every order, each as a line of a table, since they may hold commas."""
    if math.factorial(len(words)) > MOST_CELLS:
        raise UserError(f"axis {_ORDER}: {len(words)} words have more than {MOST_CELLS} orders; give fewer")
    return [_line(order) for order in itertools.permutations(words)]


def _line(words: tuple[str, ...]) -> str:
    written = io.StringIO()
    csv.writer(written, lineterminator="").writerow(words)
    return written.getvalue()


def _numbers(value: str, kind: Any, title: str) -> list[str]:
    """The numbers that a value or a range stands for."""
    found = _RANGE.fullmatch(value)
    try:
        if not found:
            return [_shown(kind(value))]
        first, last = kind(found["first"]), kind(found["last"])
        if found["count"]:
            count = int(found["count"])
            numbers = [first + (last - first) * i / max(count - 1, 1) for i in range(min(count, MOST_CELLS))]
            return [_shown(kind(round(n)) if kind is int else n) for n in numbers]
        step = kind(found["step"] or 1)
        count = int((last - first) / step + 1e-9) + 1
        if step <= 0 or not 1 <= count <= MOST_CELLS:
            raise ValueError
        return [_shown(first + step * i) for i in range(count)]
    except (ValueError, ZeroDivisionError):
        wanted = "whole numbers" if kind is int else "numbers"
        raise UserError(
            f"axis {title}: {quoted(value)}; give {wanted}, or a range such as 1-9 (+2)"
        ) from None


def _shown(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:.6g}"


def _field(name: str, kind: Any) -> tuple[Change, Any]:
    return (lambda request, value, values, library: replace(request, **{name: kind(value)})), kind


def _setting(name: str, kind: Any) -> tuple[Change, Any]:
    def change(request: Request, value: str, values: tuple[str, ...], library: Library) -> Request:
        settings = dict(request.mode.settings) | {name: kind(value)}
        return replace(request, mode=replace(request.mode, settings=tuple(sorted(settings.items()))))

    return change, kind


def _sampler(request: Request, value: str, values: tuple[str, ...], library: Library) -> Request:
    sampler, schedule = named(value)
    return replace(request, sampler=sampler, schedule=schedule)


def _schedule(request: Request, value: str, values: tuple[str, ...], library: Library) -> Request:
    sampler, schedule = named(request.sampler, value)
    return replace(request, sampler=sampler, schedule=schedule)


def _replaced(request: Request, value: str, values: tuple[str, ...], library: Library) -> Request:
    """A1111's search and replace: the first value stands in the prompts, and gives way to each."""
    if not any(values[0] in text for text in (request.prompt, request.negative, request.prompt_en)):
        raise UserError(f"axis Prompt S/R: no prompt holds {quoted(values[0])}; begin with one of its words")
    texts = {name: getattr(request, name) for name in ("prompt", "negative", "prompt_en", "negative_en")}
    return replace(request, **{name: text.replace(values[0], value) for name, text in texts.items()})


def _ordered(request: Request, value: str, values: tuple[str, ...], library: Library) -> Request:
    """A1111's orders of words: they stand in one of the prompts, and change places."""
    words = next(csv.reader([value]))
    for name in ("prompt", "prompt_en"):
        text = getattr(request, name)
        if all(word in text for word in words):
            return replace(request, **{name: _in_order(text, words)})
    raise UserError(f"axis {_ORDER}: no prompt holds all of {quoted(value)}; give words that stand in one")


def _in_order(text: str, words: list[str]) -> str:
    """A text with words in the places that they have in it now, in another order."""
    left = iter(words)
    either = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
    return re.sub(either, lambda found: next(left, found[0]), text, count=len(words))


def _size(request: Request, value: str, values: tuple[str, ...], library: Library) -> Request:
    found = re.fullmatch(r"(\d+)\s*[x×*]\s*(\d+)", value.lower())
    if not found:
        raise UserError(f"axis Size: {quoted(value)}; give WIDTHxHEIGHT, such as 512x768")
    return replace(request, width=int(found[1]), height=int(found[2]))


def _plugin(kind: str) -> tuple[Change, Any]:
    def change(request: Request, value: str, values: tuple[str, ...], library: Library) -> Request:
        others = tuple(plugin for plugin in request.plugins if plugin.kind != kind)
        if value.lower() == "none":
            return replace(request, plugins=others)
        use = PluginUse(kind=kind, file=FileRef.to(library.find(value, kind)))
        return replace(request, plugins=(*others, use))

    return change, None


def _branch(request: Request, value: str, values: tuple[str, ...], library: Library) -> Request:
    own = value.lower() == "none"
    return replace(request, branch=None if own else FileRef.to(library.find(value, "branch")))


def _upscaler(request: Request, value: str, values: tuple[str, ...], library: Library) -> Request:
    """A name of latents' or pictures', or a network's file."""
    found = library.find(value, "upscaler")
    files, settings = dict(request.mode.pictures), dict(request.mode.settings)
    files.pop("upscaler", None)
    settings.pop("upscaler", None)
    if found.is_file():
        files["upscaler"] = FileRef.to(found)
    else:
        settings["upscaler"] = value.lower()
    mode = replace(request.mode, pictures=tuple(sorted(files.items())), settings=tuple(settings.items()))
    return replace(request, mode=mode)


_ORDER = "Prompt order"
#: Axes whose values need no name beside them.
_SAY_THEMSELVES = ("Prompt S/R", "English prompt", _ORDER)

#: By name: what a value changes, and its kind: int and float may be ranges, str may be empty.
_CHANGES: dict[str, tuple[Change, Any]] = {
    "Seed": _field("seed", int),
    "Steps": _field("steps", int),
    "Hires steps": _setting("second_steps", int),
    "CFG Scale": _field("guidance", float),
    "Sampler": (_sampler, None),
    "Schedule type": (_schedule, None),
    "Prompt S/R": (_replaced, str),
    _ORDER: (_ordered, None),
    "Clip skip": _field("clip_skip", int),
    "Denoising": _setting("strength", float),
    "Hires upscaler": (_upscaler, None),
    "Size": (_size, None),
    "Checkpoint name": _plugin("checkpoint"),
    "VAE": _plugin("vae"),
    "Lora": _plugin("adapter"),
    "Branch": (_branch, None),
    "Branch scale": _field("branch_scale", float),
    "English prompt": _field("prompt_en", str),
    "English CFG Scale": _field("english_guidance", float),
    "World": _field("world", float),
    "Branch schedule": _field("branch_schedule", str),
}
#: Their names.
AXES = tuple(_CHANGES)
#: A1111's axes of what is not done here.
NOT_HERE = (
    "Var. seed", "Var. strength", "Image CFG Scale", "Hires sampler", "Negative Guidance minimum sigma",
    "Skip Early CFG", "Sigma Churn", "Sigma min", "Sigma max", "Sigma noise", "Schedule min sigma",
    "Schedule max sigma", "Schedule rho", "Beta schedule alpha", "Beta schedule beta", "Eta",
    "Initial noise multiplier", "Extra noise", "Cond. Image Mask Weight", "Styles", "UniPC Order",
    "Face restore", "Token merging ratio", "Token merging ratio high-res",
    "Always discard next-to-last sigma", "SGM noise multiplier", "Refiner checkpoint", "Refiner switch at",
    "RNG source", "FP8 mode",
)  # fmt: skip
