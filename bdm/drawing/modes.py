"""What pictures are drawn from: noise alone, or pictures too. A mode more is an entry more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..errors import UserError, quoted
from .request import Mode

#: Draws: a pipeline, the arguments of its call, the mode's pictures by role, its settings.
DrawMode = Callable[[Any, dict[str, Any], Mapping[str, Image.Image], Mapping[str, Any]], Any]


@dataclass(frozen=True)
class ModeKind:
    """A mode.

    Attributes:
        draw: calls the pipeline; gives its output.
        pictures: roles of the pictures that it needs.
        settings: names of its settings, and what they are where nothing is said.
    """

    draw: DrawMode
    pictures: tuple[str, ...] = ()
    settings: Mapping[str, float | int | str] | None = None


def _text(pipe: Any, call: dict[str, Any], pictures: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    return pipe(**call)


#: By name.
MODES: dict[str, ModeKind] = {"text": ModeKind(_text)}


def check_mode(mode: Mode) -> ModeKind:
    """The kind of a mode, whose pictures and settings are all there.

    Raises:
        UserError: an unknown mode, setting or role, or a picture that is missing.
    """
    if mode.name not in MODES:
        raise UserError(f"mode {quoted(mode.name)}; allowed are {', '.join(MODES)}")
    kind = MODES[mode.name]
    roles, settings = [role for role, _ in mode.pictures], kind.settings or {}
    for role in kind.pictures:
        if role not in roles:
            raise UserError(f"mode {mode.name} needs a picture as its {role}")
    for name in roles:
        if name not in kind.pictures:
            raise UserError(f"mode {mode.name} takes no picture as its {quoted(name)}")
    for name, _ in mode.settings:
        if name not in settings:
            allowed = ", ".join(settings) or "none"
            raise UserError(f"mode {mode.name} takes no setting {quoted(name)}; allowed: {allowed}")
    return kind


def with_defaults(mode: Mode) -> Mode:
    """A mode with all of its settings said."""
    settings = dict(check_mode(mode).settings or {}) | dict(mode.settings)
    return Mode(mode.name, tuple(sorted(mode.pictures)), tuple(sorted(settings.items())))
