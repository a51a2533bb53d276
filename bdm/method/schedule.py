"""How strong a branch is over the steps of a drawing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from ..errors import UserError, quoted

_EXAMPLE = 'give segments from:to:scale, such as "0:0.2:0,0.2:1:1", or points share:scale, such as "0:0,1:1"'


@dataclass(frozen=True)
class Segments:
    """A constant scale in each of some parts of the way; 0 between them.

    Attributes:
        parts: (start, end, scale) in shares of the steps, in order; a step belongs to the part that it begins
            in: start <= i/T < end.
    """

    parts: tuple[tuple[float, float, float], ...]

    def at(self, step: int, total: int) -> float:
        """The scale in step i of T."""
        share = step / total
        return next((scale for start, end, scale in self.parts if start <= share < end), 0.0)

    def __str__(self) -> str:
        return ",".join(":".join(f"{value:.12g}" for value in part) for part in self.parts)


@dataclass(frozen=True)
class Curve:
    """A scale that goes in straight lines from point to point.

    Attributes:
        points: (share, scale) with rising shares; the first step is at share 0 and the last one at 1. Before
            the first point and behind the last one the scale is theirs.
    """

    points: tuple[tuple[float, float], ...]

    def at(self, step: int, total: int) -> float:
        """The scale in step i of T."""
        share = step / (total - 1) if total > 1 else 0.0
        before = [point for point in self.points if point[0] <= share]
        after = [point for point in self.points if point[0] > share]
        if not before or not after:
            return (before[-1] if before else after[0])[1]
        (x0, y0), (x1, y1) = before[-1], after[0]
        return y0 + (y1 - y0) * (share - x0) / (x1 - x0)

    def __str__(self) -> str:
        return ",".join(f"{share:.12g}:{scale:.12g}" for share, scale in self.points)


@dataclass(frozen=True)
class Function:
    """A scale that a function gives.

    Attributes:
        function: of the share i/T of the steps that are done.
    """

    function: Callable[[float], float]

    def at(self, step: int, total: int) -> float:
        """The scale in step i of T.

        Raises:
            UserError: it gives no finite number.
        """
        return _number(self.function(step / total), f"the branch schedule at {step / total:g}")


Schedule = Segments | Curve | Function


def read_schedule(given: Any) -> Schedule | None:
    """A branch schedule in any form that it may be given in.

    Args:
        given: text of segments ``from:to:scale`` ("0:0.2:0,0.2:1:1"; a step outside of all of them has the
            branch off) or of points ``share:scale`` ("0:0,0.5:1"), joined by straight lines; numbers, evenly
            from the first step to the last; a function of the share of the steps; a schedule; None.

    Raises:
        UserError: none of these; names the part that is wrong.
    """
    if given is None or isinstance(given, Segments | Curve | Function):
        return given
    if isinstance(given, str):
        return _read_text(given)
    if callable(given):
        return Function(cast(Callable[[float], float], given))
    if isinstance(given, Sequence) and given:
        scales = [_number(value, "the branch schedule") for value in given]
        last = max(len(scales) - 1, 1)
        return Curve(tuple((i / last, scale) for i, scale in enumerate(scales)))
    raise UserError(f"the branch schedule is {quoted(given)}; {_EXAMPLE}")


def _read_text(text: str) -> Schedule:
    normal = text.replace("：", ":").replace("，", ",")
    parts = [[_read_number(value, text) for value in part.split(":")] for part in normal.split(",")]
    widths = {len(part) for part in parts}
    if widths == {3}:
        segments = [(part[0], part[1], part[2]) for part in parts]
        _check_segments(segments, text)
        return Segments(tuple(segments))
    if widths == {2}:
        points = [(part[0], part[1]) for part in parts]
        _check_rising([share for share, _ in points], text)
        return Curve(tuple(points))
    raise UserError(f"branch schedule {quoted(text)}; {_EXAMPLE}")


def _read_number(text: str, whole: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"branch schedule {quoted(whole)}: {quoted(text)} is no number; {_EXAMPLE}")
    return value


def _check_segments(segments: Sequence[tuple[float, float, float]], text: str) -> None:
    for start, end, _ in segments:
        if not 0.0 <= start < end <= 1.0:
            raise UserError(
                f"branch schedule {quoted(text)}: {start:g} to {end:g} is no part of the steps; give shares"
                " from 0 to 1, start before end"
            )
    for (_, end, _), (start, _, _) in zip(segments, segments[1:], strict=False):
        if start < end:
            raise UserError(
                f"branch schedule {quoted(text)}: the part from {start:g} begins before {end:g}, where the"
                " one before it ends; give parts in order that do not overlap"
            )


def _check_rising(shares: Sequence[float], text: str) -> None:
    rising = all(a < b for a, b in zip(shares, shares[1:], strict=False))
    if not rising or shares[0] < 0.0 or shares[-1] > 1.0:
        raise UserError(f"branch schedule {quoted(text)}: its shares must rise, from 0 to 1 at most")


def _number(value: Any, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{what} is {quoted(value)}; give finite numbers")
    return number
