"""What pictures ask for that are drawn again: by their own request, or by A1111's text alone."""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError, printable

if TYPE_CHECKING:
    from ..drawing.a1111_request import Read
    from ..drawing.library import Library
    from ..drawing.request import Request


def said_by(path: Path, options: argparse.Namespace, library: Library) -> Request:
    """The request that a picture asks for.

    Args:
        path: of the picture.
        options: the command's; files that they name are not looked for.
        library: where files are looked for.

    Raises:
        UserError: the picture carries none; its A1111 text says what is not drawn here, or needs what is not
            here, and ``--partly`` is not given.
    """
    from ..drawing.a1111_request import read_a1111
    from ..drawing.picture_reading import picture_request, picture_texts

    parameters, said = picture_texts(path)
    if said or not parameters:
        return picture_request(path)
    read = _without_replaced(read_a1111(parameters, library), options)
    _refuse_others(path, read, options)
    logging.warning("%s carries A1111's text alone, and is drawn as far as that tells", path.name)
    for note in read.notes:
        logging.warning("%s: another picture comes out: %s", path.name, note)
    left_out = [*read.unknown, *read.missing]
    if left_out:
        logging.warning("%s: another picture comes out, without %s", path.name, _joined(left_out))
    native = bool(options.prompt) and not read.request.prompt and read.request.branch_scale == 0
    return replace(read.request, branch_scale=1.0) if native else read.request


def _without_replaced(read: Read, options: argparse.Namespace) -> Read:
    """Without the files that the options replace."""
    given = {"checkpoint": options.checkpoint or options.model, "vae": options.vae, "branch": options.branch}
    replaced = [kind for kind, file in given.items() if file]
    plugins = tuple(plugin for plugin in read.request.plugins if plugin.kind not in replaced)
    missing = tuple(file for file in read.missing if file.partition(" ")[0] not in replaced)
    return replace(read, request=replace(read.request, plugins=plugins), missing=missing)


def _refuse_others(path: Path, read: Read, options: argparse.Namespace) -> None:
    lacking = [role for role in read.lacks if getattr(options, role) is None]
    if lacking:
        wanted = " and ".join(f"--{role}" for role in lacking)
        raise UserError(f"{path} was drawn from a picture, which its text does not hold; give {wanted}")
    if options.partly:
        return
    if read.unknown:
        raise UserError(
            f"{path}: A1111's text says what is not drawn here: {_joined(read.unknown)}; draw the rest with"
            " --partly"
        )
    if read.missing:
        raise UserError(
            f"not here: {'; '.join(read.missing)}. Give the folders that hold them with --models, or draw"
            " without them with --partly"
        )


def _joined(said: tuple[str, ...] | list[str]) -> str:
    return ", ".join(printable(one, 120) for one in said)
