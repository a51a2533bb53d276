"""A picture file -> the picture as people see it, in RGB: upright, opaque, eight bits a colour."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageColor

#: EXIF's tag of the orientation, and what each of its values asks for.
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
#: Those that turn a picture by a quarter.
_QUARTERS = (5, 6, 7, 8)
#: What Pillow calls pictures of 16 bits of grey.
_GREY16 = ("I;16", "I;16L", "I;16B", "I;16N")


@contextmanager
def opened(content: bytes | Path | Any) -> Iterator[Image.Image]:
    """A picture file, without what Pillow would warn of: a run sees millions, and uses or refuses each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as file:
            yield file


def see(file: Image.Image, background: str = "white") -> Image.Image:
    """The picture of an opened file, in RGB; of an animation the first one.

    It is turned as its EXIF says. Transparent parts show the background. 16 bits of grey become eight.

    Args:
        file: as ``Image.open`` gives it.
        background: colour, as ``PIL.ImageColor`` reads it.

    Raises:
        ValueError: its values have no range that is known.
        Exception: whatever Pillow's decoders raise on damaged files.
    """
    turn, picture = _TURNS.get(_orientation(file)), _opaque(_eight_bits(file), background)
    return picture if turn is None else picture.transpose(turn)


def _opaque(picture: Image.Image, background: str) -> Image.Image:
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    seen = picture.convert("RGBA")
    ground = Image.new("RGBA", seen.size, (*ImageColor.getrgb(background)[:3], 255))
    return Image.alpha_composite(ground, seen).convert("RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    if picture.mode in _GREY16 or (picture.mode == "I" and picture.format == "PNG"):
        values = np.asarray(picture).astype(np.uint32)
        grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
        clear = picture.info.get("transparency")
        if not isinstance(clear, int):
            return grey
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
        return grey
    if picture.mode in ("I", "F"):
        raise ValueError(f"its values (mode {picture.mode}) have no range that is known")
    return picture


def seen_size(file: Image.Image) -> tuple[int, int]:
    """Width and height of an opened file's picture as it is seen, without decoding it."""
    turned = _orientation(file) in _QUARTERS
    return (file.height, file.width) if turned else (file.width, file.height)


def _orientation(file: Image.Image) -> Any:
    try:
        return file.getexif().get(_ORIENTATION)
    except Exception:  # damaged EXIF says nothing; the picture may be whole
        return None
