"""Files of attention strips: each carries the request of its picture, and which words it shows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..errors import UserError
from .picture_reading import picture_request
from .request import Request

#: Under what name a strip says its words.
_WORDS = "attention"


def strip_info(request: Request, words: Sequence[str]) -> dict[str, Any]:
    """Arguments for PIL's ``save`` that store what a strip shows.

    Args:
        request: that drew the picture, complete.
        words: that were asked for.
    """
    info = PngInfo()
    info.add_itxt("bdm", json.dumps(request.to_json(), ensure_ascii=False))
    info.add_itxt(_WORDS, json.dumps(list(words), ensure_ascii=False))
    return {"pnginfo": info}


def is_strip_of(path: Path, request: Request, words: Sequence[str]) -> bool:
    """Whether a file is the strip of a request's picture with these words."""
    try:
        with Image.open(path) as picture:
            picture.load()  # texts may stand behind the pixels
            shown = json.loads(getattr(picture, "text", {}).get(_WORDS, "null"))
        return shown == list(words) and picture_request(path).essence() == request.essence()
    except (UserError, OSError, ValueError):
        return False
