"""The values of settings in A1111's text, each read whole or refused by a ValueError."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any


def read_finite(said: str) -> float:
    """A finite number."""
    value = float(said)
    if not math.isfinite(value):
        raise ValueError(said)
    return value


def read_interval(said: str) -> tuple[float, float]:
    """Two numbers with a dash between them."""
    start, end = map(read_finite, said.split("-"))
    return start, end


def read_size(said: str) -> tuple[int, int]:
    """(width, height) of a size such as 512x768."""
    width, height = map(int, said.split("x"))
    if width < 1 or height < 1:
        raise ValueError(said)
    return width, height


def read_flag(said: str) -> bool:
    """True or False, by their names."""
    return one_of(said, ("True", "False")) == "True"


def one_of(said: str, allowed: tuple[str, ...]) -> str:
    """A text that is one of some."""
    if said not in allowed:
        raise ValueError(said)
    return said


def read_object(said: str) -> dict[str, str]:
    """A JSON object of texts."""
    found = json.loads(said)
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError(said)
    return found


def read_positive(said: str) -> int:
    """A whole number from 1 on."""
    if (value := int(said)) < 1:
        raise ValueError(said)
    return value


def read_seed(said: str) -> int:
    """A seed of a request."""
    if not 0 <= (value := int(said)) < 2**63:
        raise ValueError(said)
    return value


#: A1111's names of numbers, ours, and how they are read.
NUMBERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "Steps": ("steps", read_positive),
    "CFG scale": ("guidance", read_finite),
    "Seed": ("seed", read_seed),
    "Clip skip": ("clip_skip", read_positive),
}
#: Further ones that only our texts say.
OUR_NUMBERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "Branch scale": ("branch_scale", read_finite),
    "Branch schedule": ("branch_schedule", str),
    "World": ("world", read_finite),
    "English CFG scale": ("english_guidance", read_finite),
    "Precision": ("precision", lambda said: one_of(said, ("fp32", "fp16", "bf16"))),
}
