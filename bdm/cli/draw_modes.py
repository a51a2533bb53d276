"""What the options of ``infer`` say of pictures to start from, and of how prompts are read."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from ..drawing.library import Library
    from ..drawing.request import Mode
    from ..text.rules import PromptRules

_SIDES = ("left", "top", "right", "bottom")


def mode_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of pictures to start from."""
    group.add_argument("--image", metavar="IMAGE", help="picture to start from")
    group.add_argument(
        "--strength",
        type=float,
        help="how much of it is drawn anew, above 0 to 1 (default 0.75; with --hires 0.7, with --outpaint 1)",
    )
    group.add_argument("--mask", metavar="IMAGE", help="white where --image is drawn anew, black elsewhere")
    group.add_argument("--mask-blur", type=float, metavar="PIXELS", help="of the mask's edge (default 4)")
    group.add_argument(
        "--outpaint", metavar="LEFT:TOP:RIGHT:BOTTOM", help="pixels to draw around --image, such as 0:0:32:0"
    )
    group.add_argument(
        "--hires",
        type=float,
        nargs="?",
        const=2.0,
        metavar="SCALE",
        help="draw, enlarge (default 2), and draw again from that",
    )
    group.add_argument(
        "--upscaler",
        help="of --hires: latent (the default), latent nearest, latent bicubic, lanczos, nearest, or a file"
        " that spandrel knows, such as an ESRGAN's",
    )
    group.add_argument(
        "--hires-steps", type=int, metavar="N", help="of the second pass (default: the first's)"
    )
    group.add_argument(
        "--tiling",
        choices=("auto", "always", "never"),
        help="of the VAE (default auto: for large pictures)",
    )


def rule_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of how prompts are read."""
    modes = ("a1111", "official")
    group.add_argument(
        "--emphasis",
        choices=modes,
        help="A1111's grammar in both languages (the default), or the official script's, which weighs nothing"
        " in native prompts",
    )
    group.add_argument("--chunks", choices=modes, help="how long prompts are cut and joined (default a1111)")
    group.add_argument(
        "--no-routing",
        action="store_true",
        help="leave quality tags and trigger words in the native prompt, where the branch alone reads them",
    )
    group.add_argument(
        "--simplified", action="store_true", help="read traditional characters as simplified ones"
    )
    group.add_argument(
        "--punctuation", choices=("kept", "full", "half"), help="width of the native prompt's marks"
    )
    group.add_argument(
        "--wildcards", metavar="FOLDER", help="of .txt files, whose lines stand for __name__ in prompts"
    )


def named_rules(options: argparse.Namespace, base: PromptRules) -> PromptRules:
    """How prompts are read.

    Args:
        options: the command's.
        base: what holds where they say nothing.
    """
    from dataclasses import replace

    said: dict[str, Any] = {name: getattr(options, name) for name in ("emphasis", "chunks", "punctuation")}
    said = {name: value for name, value in said.items() if value is not None}
    if options.no_routing:
        said["routing"] = False
    if options.simplified:
        said["simplified"] = True
    return replace(base, **said)


def named_mode(options: argparse.Namespace, library: Library, base: Mode) -> Mode:
    """What a command's pictures are drawn from.

    Args:
        options: the command's.
        library: where files are looked for.
        base: what holds where they say nothing of it.

    Raises:
        UserError: options that do not go together, or files that are not there.
    """
    from ..drawing.modes import check_mode
    from ..drawing.request import FileRef, Mode

    name = _name(options, base)
    same = name == base.name
    files = dict(base.pictures) if same else {}
    settings = dict(base.settings) if same else {}
    for role in ("image", "mask"):
        if getattr(options, role) is not None:
            files[role] = FileRef.to(getattr(options, role))
    settings |= _settings(options)
    if options.upscaler is not None:
        found = library.find(options.upscaler, "upscaler")
        if found.is_file():
            files["upscaler"] = FileRef.to(found)
        else:
            settings["upscaler"] = options.upscaler
            files.pop("upscaler", None)
    mode = Mode(name, tuple(sorted(files.items())), tuple(sorted(settings.items())))
    check_mode(mode)
    return mode


def _name(options: argparse.Namespace, base: Mode) -> str:
    """The mode that options ask for.

    Raises:
        UserError: two at once, or one without its picture.
    """
    asked = {"mask": options.mask, "outpaint": options.outpaint, "hires": options.hires}
    given = [name for name, value in asked.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"--{given[0]} and --{given[1]} are both given; give one of them")
    if given == ["hires"] and options.image is not None:
        raise UserError("--hires draws its own first picture; leave --image out, or give it with --strength")
    if given and given[0] != "hires" and options.image is None and base.name == "text":
        raise UserError(f"--{given[0]} needs --image, the picture that it is of")
    return given[0] if given else "image" if options.image is not None else base.name


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    said: dict[str, Any] = {
        "strength": options.strength,
        "blur": options.mask_blur,
        "scale": options.hires,
        "second_steps": options.hires_steps,
        "tiling": options.tiling,
    }
    said = {name: value for name, value in said.items() if value is not None}
    if options.outpaint is not None:
        try:
            room = [int(side) for side in options.outpaint.split(":")]
            said |= dict(zip(_SIDES, room, strict=True))
        except ValueError:
            raise UserError(
                f"--outpaint {options.outpaint}: give four numbers of pixels, such as 0:0:32:0"
            ) from None
    return said
