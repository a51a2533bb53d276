"""Pictures in a labelled grid, for people to look at."""

from __future__ import annotations

import logging
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..errors import UserError
from ..extras import PACKAGES, package_file
from ..files import atomic_write

_NEED = "a label in Chinese"

#: Fonts with Chinese and Japanese glyphs, in order of preference (Linux, macOS, Windows).
_CJK_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "msyh.ttc",
    "simsun.ttc",
)


@cache
def label_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font that can write Chinese.

    The ``BDM_FONT`` file, a system font, or that of the ``mplfonts`` pip package. Without any, Chinese shows
    as boxes, and a warning says so.
    """
    import os

    candidates = [os.environ["BDM_FONT"]] if "BDM_FONT" in os.environ else []
    for name in (*candidates, *_CJK_FONTS, *_packaged_fonts()):
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    logging.warning(
        "no font that can write Chinese was found, so labels show boxes; name one in BDM_FONT, or run: pip"
        " install %s",
        PACKAGES[_NEED][0],
    )
    return ImageFont.load_default(size)


def _packaged_fonts() -> list[str]:
    try:
        return [str(package_file(_NEED, "mplfonts", "fonts/NotoSansCJKsc-Regular.otf"))]
    except UserError:
        return []


def labelled_grid(
    pictures: Tensor | list[Image.Image], labels: list[str] | None = None, columns: int = 8, scale: int = 1
) -> Image.Image:
    """Lay pictures out in rows, each with its label underneath.

    Args:
        pictures: (N, 3, H, W) uint8, or N PIL pictures of one size.
        labels: N texts, or None.
        columns: pictures in a row.
        scale: enlargement, by nearest neighbour, so that what is seen is what was made.
    """
    if isinstance(pictures, Tensor):
        pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pictures]
    width, height = pictures[0].width * scale, pictures[0].height * scale
    font = label_font(13)
    line = 17
    wrapped = [_wrap(text, font, width) for text in labels] if labels else [[] for _ in pictures]
    text_height = line * max(map(len, wrapped))
    gap = 4
    rows = -(-len(pictures) // columns)
    columns = min(columns, len(pictures))
    sheet = Image.new(
        "RGB", (columns * (width + gap) + gap, rows * (height + text_height + gap) + gap), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for i, (picture, lines) in enumerate(zip(pictures, wrapped, strict=True)):
        left = gap + i % columns * (width + gap)
        top = gap + i // columns * (height + text_height + gap)
        sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top))
        for n, text in enumerate(lines):
            draw.text((left + width / 2, top + height + n * line + 1), text, "black", font, anchor="ma")
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break a text into lines that fit.

    Between any two wide (Chinese, Japanese) characters, else at spaces.
    """
    pieces: list[str] = []
    for character in text:
        wide = unicodedata.east_asian_width(character) in "WF"
        if (
            pieces
            and not wide
            and not pieces[-1].endswith(" ")
            and unicodedata.east_asian_width(pieces[-1][-1]) not in "WF"
        ):
            pieces[-1] += character
        else:
            pieces.append(character)
    lines = [""]
    for piece in pieces:
        if lines[-1] and font.getlength(lines[-1] + piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return [line.strip() for line in lines]


def save_picture(picture: Image.Image, path: Path, **options: Any) -> None:
    """Write a picture whole or not at all; ``options`` go to PIL's ``save``.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial:
            picture.save(partial, format=path.suffix.lstrip(".").upper().replace("JPG", "JPEG"), **options)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}); choose another file"
        ) from None
