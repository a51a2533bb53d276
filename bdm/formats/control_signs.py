"""Signs in and beside a ControlNet's single file that change what its weights mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .header import WeightFile
from .signs import says_yes, yaml_beside

#: Settings that have the conditions averaged over the picture: the original program's and diffusers'.
_POOLED = ("global_average_pooling", "global_pool_conditions")


@dataclass(frozen=True)
class ControlSigns:
    """What is told of a ControlNet beside its weights; each names the sign, and is empty where there is none.

    Attributes:
        differences: its encoder is kept as the difference to SD1.5's, which must be added.
        pooled: its residuals are averaged over the picture (the shuffle ControlNet).
        middle_only: only the middle block's residual is added.
    """

    differences: str = ""
    pooled: str = ""
    middle_only: str = ""


def control_signs(file: WeightFile, config: Mapping[str, Any] | None = None) -> ControlSigns:
    """What a ControlNet's file tells beside its weights.

    Args:
        file: in either layout.
        config: diffusers' configuration, where the file keeps one.

    Raises:
        UserError: a yaml beside it cannot be read.
    """
    settings = [*_settings(file), *(("its configuration", *pair) for pair in (config or {}).items())]

    def told(*names: str) -> str:
        return next(
            (f"{name} in {where}" for where, name, value in settings
             if name in names and says_yes(value, file.path, f"{name} in {where}")), ""
        )  # fmt: skip

    difference = next((key for key in file.tensors if key.rpartition(".")[2] == "difference"), "")
    # As other programs do, who have nothing but the published file's name to go by.
    named = "its file name" if "shuffle" in file.path.stem.lower() else ""
    return ControlSigns(
        f"its tensor {difference}" if difference else "", told(*_POOLED) or named, told("only_mid_control")
    )


def _settings(file: WeightFile) -> Iterator[tuple[str, str, Any]]:
    """(where, name, value) of what the header and a yaml beside the file say, at any depth."""
    for key, text in file.metadata.items():
        yield "its header", key.rpartition(".")[2], text
    found = yaml_beside(file.path)
    if found is not None:
        for name, value in _inside(found[1]):
            yield f"{found[0].name} beside it", name, value


def _inside(parameters: Mapping[Any, Any], depth: int = 0) -> Iterator[tuple[str, Any]]:
    for name, value in parameters.items():
        if isinstance(value, Mapping) and depth < 6:
            yield from _inside(value, depth + 1)
        else:
            yield str(name), value
