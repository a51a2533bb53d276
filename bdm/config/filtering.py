"""How well a filter on scores of picture and caption works."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from .reading import PositiveInt, Strict


class FilteredConfig(Strict):
    """A route that was trained on what a threshold left."""

    min_score: float
    model: str


class FilterConfig(Strict):
    """A filter that ``bdm prepare`` scored (see ``bdm.evaluate.filtering``).

    ``prepared`` is its folder, of data of the emoji world with ``wrong_captions``; ``routes`` what was
    trained with several thresholds, drawn with ``guidance`` and scored by ``judge``.
    """

    kind: Literal["filter"]
    out: Path
    prepared: str
    judge: str | None = None
    routes: dict[str, FilteredConfig] = Field({})
    steps: PositiveInt = 12
    guidance: float = 2.0
    batch: PositiveInt = 32
    controls: PositiveInt = 128
    seed: int = 0
