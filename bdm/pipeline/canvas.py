"""Pictures that drawing starts from, and what of them is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from ..errors import UserError, quoted

Pictures = Image.Image | Sequence[Image.Image]


def one_for_each(pictures: Pictures, count: int, what: str) -> list[Image.Image]:
    """A picture for each one that is drawn: the only one for all, or their own.

    Raises:
        UserError: no PIL pictures, or another number of them.
    """
    given = [pictures] if isinstance(pictures, Image.Image) else list(pictures)
    if not given or not all(isinstance(picture, Image.Image) for picture in given):
        raise UserError(f"{what} is {quoted(pictures)}; give a PIL picture, or one for each that is drawn")
    if len(given) not in (1, count):
        raise UserError(f"{what}: {len(given)} pictures for {count} that are drawn; give one, or {count}")
    return given * count if len(given) == 1 else given


def rgb(picture: Image.Image) -> Image.Image:
    """A picture in RGB, what is transparent on white."""
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def fitted(picture: Image.Image, width: int, height: int) -> Image.Image:
    """A picture of a size, as it is where it has that size."""
    picture = rgb(picture)
    return (
        picture
        if picture.size == (width, height)
        else picture.resize((width, height), Image.Resampling.LANCZOS)
    )


def rounded(picture: Image.Image, factor: int) -> tuple[int, int]:
    """The size nearest to a picture's own whose sides are multiples of a factor."""
    width, height = (max(factor, round(side / factor) * factor) for side in picture.size)
    return width, height


def as_tensor(picture: Image.Image) -> Tensor:
    """(C, H, W) in [0, 1]."""
    array = np.asarray(picture, dtype=np.float32) / 255
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).movedim(2, 0)


def soft_mask(mask: Image.Image, size: tuple[int, int], blur: float) -> Image.Image:
    """A mask in grey, of a size, with a blurred edge; white is drawn anew."""
    mask = mask.convert("L")
    if mask.size != size:
        mask = mask.resize(size, Image.Resampling.LANCZOS)
    return mask.filter(ImageFilter.GaussianBlur(blur)) if blur > 0 else mask


@dataclass(frozen=True)
class Canvas:
    """A picture with room around it.

    Attributes:
        picture: with its edges drawn out over the room.
        mask: white where the room is, fading out over the picture's edge.
        size: that is wanted; the canvas itself has sides that the model can draw.
    """

    picture: Image.Image
    mask: Image.Image
    size: tuple[int, int]


def extend(
    picture: Image.Image, left: int, top: int, right: int, bottom: int, overlap: int, factor: int
) -> Canvas:
    """Make room around a picture.

    Args:
        picture: to keep.
        left: pixels of room, 0 for none; likewise the others.
        top: likewise.
        right: likewise.
        bottom: likewise.
        overlap: pixels of the picture's edge over which what is drawn fades into it.
        factor: of which the canvas's sides are multiples.
    """
    picture = rgb(picture)
    width, height = picture.width + left + right, picture.height + top + bottom
    more = (-width % factor, -height % factor)  # computed, and cut off again
    around: Any = ((top, bottom + more[1]), (left, right + more[0]))
    wide = np.pad(np.asarray(picture), (*around, (0, 0)), mode="edge")
    mask = 255 * _distances(picture.size, around, (left, top, right, bottom), overlap)
    return Canvas(Image.fromarray(wide), Image.fromarray(mask.round().astype(np.uint8)), (width, height))


def _distances(
    size: tuple[int, int], around: Any, room: tuple[int, int, int, int], overlap: int
) -> np.ndarray[Any, Any]:
    """1 outside of the picture, falling to 0 over its edge on the sides that have room."""
    width, height = size
    left, top, right, bottom = (overlap if side else 0 for side in room)
    across, down = np.arange(width) + 0.5, np.arange(height) + 0.5
    columns = np.minimum(_inside(across, left), _inside(width - across, right))
    rows = np.minimum(_inside(down, top), _inside(height - down, bottom))
    inside = np.minimum(rows[:, None], columns[None, :])
    return 1 - np.pad(inside, around)


def _inside(distance: np.ndarray[Any, Any], overlap: int) -> np.ndarray[Any, Any]:
    return np.minimum(distance / overlap, 1.0) if overlap else np.ones_like(distance)
