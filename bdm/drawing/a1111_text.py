"""A1111's ``parameters`` text taken apart, whichever program wrote it: prompts and settings."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from ..errors import UserError

#: So many settings tell the line of settings from a prompt's, as in A1111.
_FEWEST = 3
_NEGATIVE = "Negative prompt:"
#: Lines that extensions write behind the settings.
_BEHIND = ("Template:", "Negative Template:")
_NAME = re.compile(r"\s*([^\s:,\"{\[][^:,\"]*?)\s*:\s*")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Parameters:
    """What a text says.

    Attributes:
        prompt: as it was written.
        negative: likewise.
        settings: by their names; what stood in quotes without them, objects as JSON.
        rest: what is no setting, where settings are.
    """

    prompt: str
    negative: str
    settings: dict[str, str]
    rest: tuple[str, ...] = ()


def read_parameters(text: str) -> Parameters:
    """Take a text apart: the prompt, the negative prompt, and the line of settings behind them.

    Raises:
        UserError: it has no line of settings.
    """
    lines = text.strip("\r\n").replace("\r\n", "\n").split("\n")
    while lines and lines[-1].startswith(_BEHIND):
        lines.pop()
    settings, rest = _settings(lines[-1]) if lines else ({}, [])
    if len(settings) < _FEWEST:
        raise UserError(
            "the A1111 text tells no settings (Steps: 20, Sampler: ...); give them with options instead"
        )
    said = lines[:-1]
    start = next((i for i, line in enumerate(said) if line.startswith(_NEGATIVE)), len(said))
    negative = "\n".join(said[start:]).removeprefix(_NEGATIVE).strip()
    return Parameters("\n".join(said[:start]).strip(), negative, settings, tuple(rest))


def _settings(line: str) -> tuple[dict[str, str], list[str]]:
    """(settings by name, what is none) of a line; of a name that comes twice the second is none."""
    found: dict[str, str] = {}
    rest: list[str] = []
    at = 0
    while at < len(line):
        name = _NAME.match(line, at)
        if name is None or name[1] in found:
            end = _comma(line, at)
            rest += [piece] if (piece := line[at:end].strip()) else []
        else:
            found[name[1]], end = _value(line, name.end())
        at = end + 1
    return found, rest


def _value(line: str, at: int) -> tuple[str, int]:
    """(a setting's value, where the comma behind it is); quotes and brackets hold commas together."""
    if line[at : at + 1] in ('"', "[", "{"):
        said, end = _decoded(line, at)
        if end > at and re.match(r"\s*(,|$)", line[end:]):
            return said if isinstance(said, str) else line[at:end], _comma(line, end)
    end = _comma(line, at)
    return line[at:end].strip(), end


def _decoded(line: str, at: int) -> tuple[Any, int]:
    """(a JSON value, where it ends); it ends where it begins if it is none."""
    try:
        return _DECODER.raw_decode(line, at)
    except (ValueError, RecursionError):
        return None, at


def _comma(line: str, at: int) -> int:
    end = line.find(",", at)
    return len(line) if end < 0 else end


def read_pairs(text: str) -> dict[str, str]:
    """The values within a setting, such as "ink: 0123, line: 4567".

    Raises:
        ValueError: it is no list of pairs.
    """
    found, rest = _settings(text)
    if rest:
        raise ValueError(text)
    return found
