"""Sheets of pictures beside each other, for people to compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from PIL import Image

from ..errors import UserError
from .axes import MOST_CELLS, Axis
from .grid import labelled_grid
from .library import Library
from .request import Request

#: Draws requests, in their order.
DrawAll = Callable[[list[Request]], list[Image.Image]]
#: Small pictures are enlarged to so many pixels at least.
_READABLE = 128


def sheet(pictures: Sequence[Image.Image], labels: Sequence[str], columns: int) -> Image.Image:
    """Pictures in rows, each with its label; all are shown at the first one's size."""
    size = pictures[0].size
    same = [one if one.size == size else one.resize(size, Image.Resampling.LANCZOS) for one in pictures]
    return labelled_grid(same, list(labels), columns, scale=max(1, _READABLE // min(size)))


def contact_sheet(requests: Sequence[Request], pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures with their prompts and seeds, about as wide as high."""
    labels = [f"{request.prompt[:60]} ({request.seed})" for request in requests]
    return sheet(pictures, labels, columns=max(1, round(len(pictures) ** 0.5 + 0.4)))


def axis_sheets(
    request: Request,
    x: Axis,
    y: Axis | None,
    z: Axis | None,
    library: Library,
    draw: DrawAll,
    called: Callable[[str], str] = str,
) -> list[Image.Image]:
    """One sheet for each value of ``z``: columns of ``x``, rows of ``y``.

    Args:
        request: what all pictures have in common.
        x: an axis.
        y: another; None for one row.
        z: another; None for one sheet.
        library: where files on an axis are looked for.
        draw: draws requests.
        called: an axis's name in the language of the sheet.

    Raises:
        UserError: a value that means nothing, or more than ``MOST_CELLS`` pictures.
    """
    cells, labels = [request], [""]
    for axis in (z, y, x):
        if axis is not None:
            pairs = [(cell, label, value) for cell, label in zip(cells, labels) for value in axis.values]
            if len(pairs) > MOST_CELLS:
                raise UserError(f"the sheet has more than {MOST_CELLS} pictures; give fewer values")
            cells = [axis.apply(cell, value, library) for cell, _, value in pairs]
            labels = [f"{label}, {axis.label(value, called)}".lstrip(", ") for _, label, value in pairs]
    pictures = draw(cells)
    columns = len(x.values)
    each = columns * (len(y.values) if y else 1)
    return [
        sheet(pictures[start : start + each], labels[start : start + each], columns)
        for start in range(0, len(pictures), each)
    ]


def compared(request: Request, draw: DrawAll) -> Image.Image:
    """The native prompt, its English text alone, and both, at one seed.

    Raises:
        UserError: there is no English text.
    """
    if not request.prompt_en:
        raise UserError("there is no English text to compare with; give it with --prompt-en, or --translate")
    three = [
        replace(request, prompt_en=""),
        replace(request, prompt="", negative="", branch_scale=0.0, beside=()),
        request,
    ]
    labels = [request.prompt, request.prompt_en, f"{request.prompt} + {request.prompt_en}"]
    return sheet(draw(three), labels, columns=3)
