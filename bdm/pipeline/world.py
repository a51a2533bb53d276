"""One number between two worlds: that of the native texts and the backbone's English one.

An English name turns the picture's world at once; what then matters is how long the branch acts (the measured
curve is in docs/modes.md).
"""

from __future__ import annotations

from typing import Any

from ..errors import UserError
from ..method.schedule import Segments
from ..plugins.kind import finite

#: Share of the steps for which the branch acts where the English world has all the say.
SHORTEST = 0.5


def settings_of(world: float, schedule: Any = None) -> tuple[Segments | None, bool]:
    """What draws in a world.

    Args:
        world: 0 is the native one, where nothing is said in English; from there to 1 the English prompt is
            said and the branch acts in a first part of the steps: all of them near 0, half of them at 1.
        schedule: of the branch, if one is given too.

    Returns:
        The branch's schedule, and whether the English prompt is said.

    Raises:
        UserError: a number outside of 0 to 1, or a schedule beside it.
    """
    world = finite(world, "world")
    if not 0.0 <= world <= 1.0:
        raise UserError(f"world {world:g}: give a number from 0 (native) to 1 (English)")
    if schedule is not None:
        raise UserError("both world and branch_schedule are given; give one of them")
    if world == 0.0:
        return None, False
    return Segments(((0.0, 1.0 - world * (1.0 - SHORTEST), 1.0),)), True
