"""What pictures are drawn from: noise alone, or pictures too. A mode more is an entry more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import UserError, quoted
from ..pipeline import modes
from ..pipeline.tiling import tiled_vae
from ..plugins.controlnet import open_picture
from .request import Mode

#: Whether the VAE works in tiles, by the setting's value.
TILING: dict[str, bool | None] = {"auto": None, "always": True, "never": False}

#: Draws: a pipeline, the arguments of its call, the mode's files by role, its settings.
DrawMode = Callable[[Any, dict[str, Any], Mapping[str, Path], Mapping[str, Any]], Any]


@dataclass(frozen=True)
class ModeKind:
    """A mode.

    Attributes:
        draw: calls the pipeline; gives its output.
        files: roles of the files that it needs.
        more: roles of files that it may be given.
        settings: their values where nothing is said.
    """

    draw: DrawMode
    files: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    settings: Mapping[str, float | int | str] = field(default_factory=dict)


def _text(pipe: Any, call: dict[str, Any], files: Mapping[str, Path], settings: Mapping[str, Any]) -> Any:
    with tiled_vae(pipe, call["width"] or 0, call["height"] or 0, **_tiling(settings)):
        return pipe(**call)


def _image(pipe: Any, call: dict[str, Any], files: Mapping[str, Path], settings: Mapping[str, Any]) -> Any:
    picture = open_picture(files["image"])
    return modes.image_to_image(pipe, picture, **dict(settings) | _tiling(settings), **call)


def _mask(pipe: Any, call: dict[str, Any], files: Mapping[str, Path], settings: Mapping[str, Any]) -> Any:
    picture, mask = open_picture(files["image"]), open_picture(files["mask"])
    return modes.inpaint(pipe, picture, mask, **dict(settings) | _tiling(settings), **call)


def _outpaint(pipe: Any, call: dict[str, Any], files: Mapping[str, Path], settings: Mapping[str, Any]) -> Any:
    picture = open_picture(files["image"])
    if call.pop("width") or call.pop("height"):
        raise UserError("an outpainted picture's size is its own and the room's; leave width and height out")
    return modes.outpaint(pipe, picture, **dict(settings) | _tiling(settings), **call)


def _hires(pipe: Any, call: dict[str, Any], files: Mapping[str, Path], settings: Mapping[str, Any]) -> Any:
    said = dict(settings) | _tiling(settings)
    said["second_steps"] = said["second_steps"] or None
    said["upscaler"] = files.get("upscaler", said["upscaler"])
    return modes.hires(pipe, **said, **call)


def _tiling(settings: Mapping[str, Any]) -> dict[str, bool | None]:
    said = settings["tiling"]
    if said not in TILING:
        raise UserError(f"tiling {quoted(said)}; allowed are {', '.join(TILING)}")
    return {"tiling": TILING[said]}


_AUTO: dict[str, float | int | str] = {"tiling": "auto"}
_ROOM: dict[str, float | int | str] = {"left": 0, "top": 0, "right": 0, "bottom": 0, "overlap": 16}

#: By name.
MODES: dict[str, ModeKind] = {
    "text": ModeKind(_text, settings=_AUTO),
    "image": ModeKind(_image, ("image",), settings=_AUTO | {"strength": 0.75}),
    "mask": ModeKind(_mask, ("image", "mask"), settings=_AUTO | {"strength": 0.75, "blur": 4.0}),
    "outpaint": ModeKind(_outpaint, ("image",), settings=_AUTO | _ROOM | {"strength": 1.0}),
    "hires": ModeKind(
        _hires,
        more=("upscaler",),
        settings=_AUTO | {"scale": 2.0, "strength": 0.7, "upscaler": "latent", "second_steps": 0},
    ),
}


def check_mode(mode: Mode) -> ModeKind:
    """The kind of a mode, whose files and settings are all there.

    Raises:
        UserError: an unknown mode, setting or role, a value of another kind, or a file that is missing.
    """
    if mode.name not in MODES:
        raise UserError(f"mode {quoted(mode.name)}; allowed are {', '.join(MODES)}")
    kind = MODES[mode.name]
    roles = [role for role, _ in mode.pictures]
    for role in kind.files:
        if role not in roles:
            raise UserError(f"mode {mode.name} needs a picture as its {role}")
    for role in roles:
        if role not in (*kind.files, *kind.more):
            raise UserError(f"mode {mode.name} takes no file as its {quoted(role)}")
    for name, value in mode.settings:
        if name not in kind.settings:
            raise UserError(
                f"mode {mode.name} takes no setting {quoted(name)}; allowed: {', '.join(kind.settings)}"
            )
        usual = kind.settings[name]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number if isinstance(usual, float) else type(value) is type(usual)):
            wanted = {float: "a number", int: "a whole number", str: "a text"}[type(usual)]
            raise UserError(f"mode {mode.name}: {name} is {quoted(value)}; give {wanted}")
    return kind


def with_defaults(mode: Mode) -> Mode:
    """A mode with all of its settings said, each as its kind of number."""
    usual = check_mode(mode).settings
    said = dict(usual) | dict(mode.settings)
    typed = {name: float(value) if isinstance(usual[name], float) else value for name, value in said.items()}
    return replace(mode, pictures=tuple(sorted(mode.pictures)), settings=tuple(sorted(typed.items())))
