"""Rows of prompt files -> pictures to draw and their files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..text.wildcards import NO_WILDCARDS, Wildcards
from .chosen import with_chosen
from .jobs import Failure, Job
from .picture_names import ENDINGS, apart, check_pattern, picture_name, safe_name
from .prompt_file import Row
from .request import BranchUse, Request
from .samplers import named

#: Default name of a row's picture.
NUMBERED = "[number].png"


@dataclass(frozen=True)
class _Picture:
    """A picture of a row: the row's number, the picture's in it, how many it has, its own file's name."""

    row: int
    number: int
    count: int
    file: str
    where: str
    request: Request

    def name(self, pattern: str | None) -> str:
        own = _own_name(self.file) if self.file and pattern is None else ""
        name = own or picture_name(pattern or NUMBERED, self.request, self.row, self.number)
        return _numbered(name, self.number) if self.count > 1 and pattern is None else name


def row_jobs(
    rows: Sequence[Row],
    base: Request,
    folder: Path,
    pattern: str | None = None,
    count: int = 1,
    wildcards: Wildcards = NO_WILDCARDS,
) -> tuple[list[Job], list[Failure]]:
    """The pictures that rows ask for.

    Args:
        rows: of a prompt file.
        base: what is asked for where a row says nothing. Picture i of the file uses its seed + i, unless its
            row says otherwise.
        folder: where the pictures go.
        pattern: of their names (see ``bdm.drawing.picture_names``). By default a row's own name, or
            ``00000.png`` for the first, which is ``00000-0.png`` where a row has several. A row that cannot
            be read keeps its number.
        count: pictures for each row.
        wildcards: files that prompts may name; of variants one is chosen by the picture's seed.

    Returns:
        The pictures, and the rows that ask for none that could be drawn.

    Raises:
        UserError: a pattern that says nothing.
    """
    check_pattern(pattern or NUMBERED)
    failed: list[Failure] = []
    pictures: list[_Picture] = []
    for index, row in enumerate(rows):
        try:
            pictures += _pictures(index, row, base, count, wildcards)
        except UserError as error:
            failed.append(Failure(row.where, str(error)))
    names = apart(picture.name(pattern) for picture in pictures)
    jobs = [
        Job(folder / name, picture.request, picture.where)
        for name, picture in zip(names, pictures, strict=True)
    ]
    return jobs, failed


def _pictures(index: int, row: Row, base: Request, usual_count: int, wildcards: Wildcards) -> list[_Picture]:
    if row.wrong:
        raise UserError(row.wrong)
    said: dict[str, Any] = dict(row.said)
    file, count = said.pop("file", ""), said.pop("count", usual_count)
    if "beside_prompt" in said:
        said["beside"] = _told(said.get("beside", base.beside), said.pop("beside_prompt"))
    first = said.pop("seed", base.seed + index * usual_count)
    try:
        if said.keys() & {"sampler", "schedule"}:
            sampler, schedule = said.get("sampler", base.sampler), said.get("schedule", "")
            said["sampler"], said["schedule"] = named(sampler, schedule)
        requests = [replace(base, seed=first + i, **said) for i in range(count)]
    except UserError as error:
        raise UserError(f"asks for {error}") from None
    chosen = [with_chosen(request, wildcards) for request in requests]
    return [_Picture(index, i, count, file, row.where, request) for i, request in enumerate(chosen)]


def _told(beside: Sequence[BranchUse], prompt: str) -> tuple[BranchUse, ...]:
    """The only branch beside the model's own, told another prompt.

    Raises:
        UserError: there are none, or several.
    """
    if len(beside) != 1:
        raise UserError(
            f"says beside_prompt, and there are {len(beside)} branches beside the model's own; give one with"
            " --beside, or what each is told in beside"
        )
    return (replace(beside[0], prompt=prompt),)


def _own_name(file: str) -> str:
    """The name that a row gives its picture, as a file of a kind that is written."""
    name = safe_name(file)
    return name if Path(name).suffix.lower() in ENDINGS else f"{name}.png"


def _numbered(name: str, number: int) -> str:
    path = Path(name)
    return path.with_stem(f"{path.stem}-{number}").name
