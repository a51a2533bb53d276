"""Requests on their way to another machine.

Their pictures travel along, their other files are looked up there: a model or a plug-in is known by its hash,
so it may lie elsewhere there, and one that is not there is named.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

from ..drawing.known_hashes import known_hashes
from ..drawing.request import FileRef, Request
from ..errors import UserError
from .uploads import Uploads

#: Contents of pictures by their hashes.
Pictures = dict[str, bytes]


def packed(request: Request) -> Pictures:
    """The pictures that a resolved request starts from or is controlled by.

    Raises:
        UserError: one cannot be read.
    """
    try:
        return {file.hash: file.source.read_bytes() for file in _pictures(request) if file.source is not None}
    except OSError as error:
        raise UserError(
            f"a picture of the request cannot be read ({error.strerror}); send it again"
        ) from None


def unpacked(request: Request, pictures: Pictures, uploads: Uploads) -> Request:
    """A request whose files have their places on this machine, as far as they are told by a path.

    Args:
        request: from another machine.
        pictures: of ``packed``.
        uploads: keeps them here.

    Raises:
        UserError: a picture that is none.
    """
    kept = {name: uploads.keep(content).source for name, content in pictures.items()}

    def placed(file: FileRef) -> FileRef:
        if file.hash in kept:
            return dataclasses.replace(file, source=kept[file.hash])
        return file if _is_here(file) else dataclasses.replace(file, source=None)

    return _with_files(request, placed)


def _is_here(file: FileRef) -> bool:
    """Whether a file's place holds it on this machine too."""
    if file.source is None or not file.hash:
        return True
    return os.path.exists(file.source) and file.hash in known_hashes(file.source).values()


def _pictures(request: Request) -> Iterator[FileRef]:
    yield from (plugin.picture for plugin in request.plugins if plugin.picture is not None)
    yield from (file for role, file in request.mode.pictures if role != "upscaler")


def _with_files(value: Any, change: Callable[[FileRef], FileRef]) -> Any:
    """A request, or a part of one, with its files changed."""
    if isinstance(value, FileRef):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_with_files(one, change) for one in value)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    own = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
    return dataclasses.replace(value, **{name: _with_files(one, change) for name, one in own.items()})
