"""The branches beside the model's own that the options of ``infer`` name."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .draw_plugins import split_numbers

if TYPE_CHECKING:
    from ..drawing.library import Library
    from ..drawing.request import BranchUse


def beside_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of branches beside the model's own."""
    group.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="FOLDER[:SCALE[:START:END]]",
        help="a pipeline folder whose branch draws along, told a prompt of its own (--beside-prompt);"
        " repeatable",
    )
    group.add_argument(
        "--beside-prompt",
        action="append",
        default=[],
        metavar="PROMPT",
        help="of each branch beside, in the order of --beside (or of those of --from's pictures); a prompt"
        " file may give it instead, as beside_prompt",
    )
    group.add_argument(
        "--beside-negative", action="append", default=[], metavar="PROMPT", help="its negative prompt"
    )


def named_beside(
    options: argparse.Namespace, library: Library, base: tuple[BranchUse, ...]
) -> tuple[BranchUse, ...]:
    """The branches of a command line: those of the base, or others in their place, with the prompts given.

    Args:
        options: the command's.
        library: where folders are looked for by name.
        base: of a picture that is drawn again.

    Raises:
        UserError: another number of prompts than of branches.
    """
    uses = tuple(_named(options, library)) or base
    rows = options.prompts is not None
    for option, field, optional in (
        ("--beside-prompt", "prompt", rows or not options.beside),
        ("--beside-negative", "negative", True),
    ):
        texts = options.beside_prompt if field == "prompt" else options.beside_negative
        if len(texts) != len(uses) and (texts or not optional):
            raise UserError(
                f"{len(uses)} branches beside the model's own and {len(texts)} {option}; give one for each"
            )
        uses = tuple(replace(use, **{field: text}) for use, text in zip(uses, texts)) if texts else uses
    return uses


def _named(options: argparse.Namespace, library: Library) -> Iterator[BranchUse]:
    from ..drawing.request import BranchUse, FileRef

    for text in options.beside:
        source, numbers = split_numbers(text, "--beside", (0, 1, 3))
        window: dict[str, Any] = dict(zip(("scale", "start", "end"), numbers, strict=False))
        yield BranchUse(file=FileRef.to(library.find(source, "checkpoint")), **window)
