"""A callback at the ends of steps that looks on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

#: What is shown of a step: its number from 1, how many there are, (B, C, h, w) latents, to be read alone.
Look = Callable[[int, int, Tensor], None]


class Onlooker:
    """Shows the latents of each step and changes nothing, so that all savings hold (see ``Vouched``).

    Args:
        look: is shown a step; what it raises ends the drawing.
    """

    def __init__(self, look: Look) -> None:
        self._look = look

    def __call__(self, pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        self._look(step + 1, pipe.num_timesteps, values["latents"])
        return {}
