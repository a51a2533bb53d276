"""What is written in a picture: A1111's ``parameters`` text, and the request that drew it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import UserError, first_line
from .picture_info import EXIF_IFD, JSON_SEGMENT, MAKER_NOTE, USER_COMMENT
from .request import Request

#: How ComfyUI begins the graph in EXIF.
_GRAPH = "prompt:"
#: EXIF's marks of a comment's encoding, and Python's names for these.
_COMMENTS = {b"UNICODE\0": "utf-16-be", b"ASCII\0\0\0": "ascii", b"\0\0\0\0\0\0\0\0": "utf-8"}


def picture_texts(path: Path) -> tuple[str, str]:
    """(A1111's text, the request's JSON) of a picture; "" for what it does not carry.

    Raises:
        UserError: it cannot be read, or is no picture.
    """
    return _texts(path, str(path))


def texts_in(content: bytes) -> tuple[str, str]:
    """The same of a picture's bytes.

    Raises:
        UserError: they are no picture.
    """
    return _texts(io.BytesIO(content), "the picture")


def _texts(source: Any, name: str) -> tuple[str, str]:
    try:
        with Image.open(source) as picture:
            if picture.format == "PNG":
                picture.load()  # texts may stand behind the pixels
                said = getattr(picture, "text", {})
                return str(said.get("parameters", "")), str(said.get("bdm", ""))
            return _exif_texts(picture)
    except OSError as error:
        raise UserError(f"{name} cannot be read as a picture ({first_line(error)}); give another") from None
    except Exception as error:  # damaged files make PIL raise SyntaxError, ValueError, struct.error ...
        raise UserError(f"{name} is a damaged picture ({first_line(error)}); give another") from None


def picture_graph(path: Path) -> str:
    """The graph of nodes that ComfyUI wrote into a picture ("prompt"); "" where there is none.

    Raises:
        UserError: it cannot be read, or is no picture.
    """
    try:
        with Image.open(path) as picture:
            if picture.format == "PNG":
                picture.load()
                return str(getattr(picture, "text", {}).get("prompt", ""))
            said = [str(value) for value in picture.getexif().values()]
            return next((one[len(_GRAPH) :] for one in said if one.startswith(_GRAPH)), "")
    except Exception as error:  # as above
        raise UserError(f"{path} is a damaged picture ({first_line(error)}); give another") from None


def _exif_texts(picture: Any) -> tuple[str, str]:
    exif = picture.getexif().get_ifd(EXIF_IFD)
    comment, note = exif.get(USER_COMMENT, b""), exif.get(MAKER_NOTE, b"")
    segments = [data for name, data in getattr(picture, "applist", []) if name == "APP9"]
    content = b"".join(data.removeprefix(JSON_SEGMENT) for data in segments if data.startswith(JSON_SEGMENT))
    if isinstance(note, bytes) and note.startswith(JSON_SEGMENT):
        content = note.removeprefix(JSON_SEGMENT)
    return _comment(comment), content.decode("utf-8", "replace")


def _comment(content: Any) -> str:
    if not isinstance(content, bytes):
        return str(content)
    encoding = _COMMENTS.get(content[:8], "utf-8")
    return content[8:].decode(encoding, "replace").rstrip("\0")


def picture_request(path: Path) -> Request:
    """The request that drew a picture.

    Raises:
        UserError: it carries none, or one of another version that is not understood.
    """
    parameters, said = picture_texts(path)
    if not said:
        if not parameters and picture_graph(path):
            raise UserError(
                f"{path} carries ComfyUI's graph, which is not drawn here; bdm info says what it holds"
            )
        raise UserError(f"{path} carries no bdm JSON, so it cannot be drawn again")
    return Request.from_json(said, f"the JSON in {path.name}")
