"""Finished runs that become shipped weights."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import Field, field_validator

from .reading import Strict


class ShippedModelConfig(Strict):
    """The parts of a bilingual pipeline (see ``bdm.assemble``)."""

    backbone: str
    branch: str
    native_text_encoder: str


class ShipConfig(Strict):
    """Which runs' results are shipped, and where (see ``bdm.ship``).

    ``parts`` names for each place under ``out`` a folder, a file of weights, or the parts of a pipeline.
    ``limit_mb`` is what ``out`` may hold in all, in 10^6 bytes.
    """

    out: Path
    limit_mb: Annotated[float, Field(gt=0)] = 130.0
    parts: Annotated[dict[str, str | ShippedModelConfig], Field(min_length=1)]

    @field_validator("parts")
    @classmethod
    def _inside(cls, value: dict[str, str | ShippedModelConfig]) -> dict[str, str | ShippedModelConfig]:
        for name in value:
            place = PurePosixPath(name)
            if place.is_absolute() or ".." in place.parts or not place.parts:
                raise ValueError(f"{name!r} is no place under out; give one such as emoji_64/judge")
        return value
