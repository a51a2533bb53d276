"""Wrong captions among right ones, as in what is gathered from the web."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from .world import Row


def with_wrong_captions(rows: Sequence[Row], share: float) -> list[Row]:
    """The same rows, a share of them with the caption of another one, always the same.

    The other shows another thing on another background, so that no part of its caption is right.

    Args:
        rows: of the world, of two things and two backgrounds at least.
        share: how many of them, in [0, 1].

    Raises:
        UserError: all show one thing, or stand on one background.
    """
    chance = random.Random("wrong captions")
    chosen = set(chance.sample(range(len(rows)), round(share * len(rows))))
    return [_wrong(row, rows, chance) if i in chosen else row for i, row in enumerate(rows)]


def _wrong(row: Row, rows: Sequence[Row], chance: random.Random) -> Row:
    for _ in range(1000):
        other = chance.choice(rows)
        if other.concept != row.concept and other.colour != row.colour:
            return replace(row, caption=other.caption, language=other.language, wrong=True)
    raise UserError(
        f"wrong captions are wanted, and all {len(rows)} pictures show one thing or have one background; take"
        " more of them (data.limit, data.colours)"
    )
