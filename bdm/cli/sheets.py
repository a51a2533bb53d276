"""``sheet`` and ``compare``: pictures beside each other."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, printable
from .draw_options import infer_options
from .draw_requests import base_request, check_ending, check_numbers, numbered, refuse_unusable
from .language import LANGUAGES, catalogue, told
from .quiet import quiet

if TYPE_CHECKING:
    from ..drawing.axes import Axis
    from ..drawing.library import Library
    from ..drawing.request import Request


def add_commands(commands: Any) -> None:
    """Add ``sheet`` and ``compare`` to a parser's commands."""
    sheet = commands.add_parser("sheet", help="draw a prompt with several values of up to three settings")
    infer_options(sheet)
    for name, place in (("--x", "columns"), ("--y", "rows"), ("--z", "sheets")):
        sheet.add_argument(
            name, metavar="AXIS", help=f"{place}, such as 'Steps: 10,20' or 'CFG Scale: 1-5 (+2)'"
        )
    sheet.set_defaults(run=_sheet)

    compare = commands.add_parser(
        "compare", help="draw a native prompt, its English text, and both, beside each other at one seed"
    )
    infer_options(compare)
    compare.add_argument(
        "--translate",
        metavar="TABLE",
        help="what gives the English text: a table (.tsv, .json), or the folder of a translation model",
    )
    compare.set_defaults(run=_compare)


def _sheet(options: argparse.Namespace) -> None:
    from ..drawing.grid import save_picture
    from ..drawing.sheets import axis_sheets

    x, y, z = map(_axis, (options.x, options.y, options.z))
    if x is None or (z is not None and y is None):
        raise UserError("a sheet needs --x, such as --x 'Steps: 10,20', and --z needs --y")
    paths = numbered(options.out or Path("sheet.png"), len(z.values) if z else 1)
    request, library = _request(options)
    sheets = axis_sheets(request, x, y, z, library, _drawing(options, library), _called)
    for path, one in zip(paths, sheets, strict=True):
        save_picture(one, path)
        print(printable(path))


def _axis(text: str | None) -> Axis | None:
    """An axis in any of our languages; A1111's "Nothing" is none."""
    from ..drawing.axes import AXES, read_axis

    if text is None or text.strip().lower() == "nothing":
        return None
    spoken = [catalogue(language) for language in LANGUAGES if language != "en"]
    others = {
        (one.told(f"axis: {title}") or "").removeprefix("axis: "): title for one in spoken for title in AXES
    }
    return read_axis(text, others)


def _called(title: str) -> str:
    """An axis's name in the language that is spoken."""
    return told(f"axis: {title}").removeprefix("axis: ")


def _compare(options: argparse.Namespace) -> None:
    from ..drawing.grid import save_picture
    from ..drawing.sheets import compared

    path = options.out or Path("compare.png")
    check_ending(path)
    refuse_unusable(path)
    request, library = _request(options)
    if options.translate is not None:
        request = replace(request, prompt_en=_translated(options))
    save_picture(compared(request, _drawing(options, library)), path)
    print(printable(path))


def _translated(options: argparse.Namespace) -> str:
    """The prompt in English.

    Raises:
        UserError: an English text is given too, or there is no translation of that name.
    """
    from ..text.translate import read_translation

    if options.prompt_en is not None:
        raise UserError("--translate and --prompt-en are both given; give one of them")
    (english,) = read_translation(options.translate)(options.prompt)
    return english


def _request(options: argparse.Namespace) -> tuple[Request, Library]:
    """What all pictures have in common, and where files are looked for."""
    from ..drawing.library import Library

    check_numbers(options)
    if len(options.prompt) != 1 or options.prompts is not None or options.pictures:
        raise UserError("give one prompt, without --prompts and --from")
    library = Library(options.models, [Path()])
    return replace(base_request(options, library), prompt=options.prompt[0]), library


def _drawing(options: argparse.Namespace, library: Library) -> Any:
    """Draws requests one by one, with a bar over all."""
    from tqdm import tqdm

    from ..drawing.complete import complete
    from ..drawing.painter import NONE_DRAWN, Painter, choose_device, usual_precision

    quiet()

    def draw(requests: list[Request]) -> list[Any]:
        precision = usual_precision(choose_device(options.device))
        whole = [complete(request, library, precision) for request in requests]
        painter, images = Painter(options.device), []
        for request in tqdm(whole, desc=told("drawing"), unit=told("picture")):
            (drawn,) = painter.draw([request])
            if drawn is None:
                raise UserError(NONE_DRAWN.format("a picture of the sheet"))
            images.append(drawn.image)
        return images

    return draw
