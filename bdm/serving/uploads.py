"""Pictures that clients send: base64 or bytes -> a plain PNG under the hash of its pixels."""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
from contextlib import suppress
from pathlib import Path

from PIL import Image, ImageOps

from ..drawing.known_hashes import picture_hash
from ..drawing.request import FileRef
from ..errors import UserError, first_line, printable
from ..files import atomic_write

_HASH = re.compile(r"[0-9a-f]{16}")
_FORMATS = ("PNG", "JPEG", "WEBP")
#: Pictures that are kept; the oldest go first.
_MOST_KEPT = 1000


def decoded(text: str) -> bytes:
    """The bytes of a picture in base64, with or without ``data:image/png;base64,`` before them.

    Raises:
        UserError: it is something else, such as an address or a path, neither of which is ever opened.
    """
    head, comma, rest = text.partition(",")
    content = rest if comma and head.startswith("data:") else text
    try:
        return base64.b64decode("".join(content.split()), validate=True)
    except (binascii.Error, ValueError):
        raise UserError(f"a picture is {printable(text, 30)!r}; give its bytes in base64") from None


def opened(content: bytes, most: int) -> Image.Image:
    """A picture out of bytes, in RGB, what is transparent in it white.

    Args:
        content: of a PNG, JPEG or WebP.
        most: pixels that it may have; more are refused before any are decoded.

    Raises:
        UserError: it is none, is damaged, or is too large.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as picture:
            if picture.width * picture.height > most:
                raise UserError(
                    f"a picture of {picture.width}x{picture.height}; this server takes {most} pixels"
                )
            return _on_white(picture)
    except UserError:
        raise
    except (
        Exception
    ) as error:  # damaged files make PIL raise SyntaxError, ValueError, struct.error and others
        raise UserError(
            f"a picture that cannot be opened ({first_line(error)}); give PNG, JPEG or WebP"
        ) from None


def _on_white(picture: Image.Image) -> Image.Image:
    if picture.mode in ("RGB", "L", "1"):
        return picture.convert("RGB")
    clear = picture.convert("RGBA")
    ground = Image.new("RGBA", clear.size, "white")
    return Image.alpha_composite(ground, clear).convert("RGB")


class Uploads:
    """The pictures that clients sent.

    Args:
        folder: where they are kept; it is made.
        most: pixels of each.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self._folder, self._most = folder, most
        folder.mkdir(parents=True, exist_ok=True)

    def keep(self, content: str | bytes, invert: bool = False) -> FileRef:
        """Keep a picture; returns what requests call it by.

        Args:
            content: base64, or the file's bytes.
            invert: keep its negative, such as of a mask that means the opposite.

        Raises:
            UserError: it is no picture, or too large.
        """
        picture = opened(decoded(content) if isinstance(content, str) else content, self._most)
        picture = ImageOps.invert(picture) if invert else picture
        found = picture_hash(picture)
        place = self._folder / f"{found}.png"
        if place.is_file():
            os.utime(place)
        else:
            self._make_room()
            with atomic_write(place, shared=True) as partial:
                picture.save(partial, "png")
        return FileRef(place.name, found, place)

    def place(self, found: str) -> Path:
        """Where a picture lies.

        Raises:
            UserError: nobody sent one of this hash.
        """
        place = self._folder / f"{found}.png"
        if not _HASH.fullmatch(found) or not place.is_file():
            raise UserError(f"picture {printable(found, 60)!r} is not here; send it first")
        return place

    def size(self, found: str) -> tuple[int, int]:
        """(width, height) of a picture that is here."""
        with Image.open(self.place(found)) as picture:
            return picture.size

    def _make_room(self) -> None:
        kept = sorted(self._folder.glob("*.png"), key=lambda path: path.stat().st_mtime)
        for path in kept[: max(0, len(kept) - _MOST_KEPT + 1)]:
            with suppress(OSError):
                path.unlink()
