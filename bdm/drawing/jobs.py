"""Pictures to draw and the files they become: what is there already, what failed, how many of each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError, first_line
from .picture_reading import picture_request
from .request import Request
from .strip_file import is_strip_of

#: So many failures are named with their reasons, the others by their rows.
_MOST_REASONS = 20

#: Of a picture's file before it is drawn.
State = Literal["missing", "other", "there"]


@dataclass(frozen=True)
class Job:
    """A request, and the file that it becomes.

    Attributes:
        path: of the picture.
        request: what to draw.
        where: the row of a prompt file that asks for it; "" where there is none.
        words: whose attention is shown in a strip beside the picture, () for those that are chosen without
            being asked; None for no strip.
    """

    path: Path
    request: Request
    where: str = field(default="", compare=False)
    words: tuple[str, ...] | None = None

    @property
    def strip(self) -> Path:
        """The file of the picture's strip."""
        return self.path.with_name(f"{self.path.stem}-attention.png")


@dataclass(frozen=True)
class Failure:
    """What gave no picture, and why: "line 3", "is not JSON ..."."""

    what: str
    why: str

    def __str__(self) -> str:
        return f"{self.what} {self.why}"


class RowsFailed(UserError):
    """Some rows gave no picture, and others did."""

    status = 3


def state(job: Job) -> State:
    """Whether a job's picture is there, with its strip: its own JSON says what the job asks for."""
    if not os.path.exists(job.path):
        return "missing"
    try:
        there = picture_request(job.path)
    except UserError:
        return "other"
    same = there.essence() == job.request.essence()
    has_strip = job.words is None or is_strip_of(job.strip, job.request, job.words)
    return "there" if same and has_strip else "other"


@dataclass(frozen=True)
class Todo:
    """Jobs, sorted by what is to be done.

    Attributes:
        kept: pictures that are there.
        waiting: pictures to draw.
        replaced: those of them whose files hold other pictures.
    """

    kept: Sequence[Job]
    waiting: Sequence[Job]
    replaced: frozenset[Path]

    @classmethod
    def of(cls, jobs: Iterable[Job], again: bool = False) -> Todo:
        """What is to be done for jobs; ``again`` draws what is there too."""
        jobs = list(jobs)
        states = [state(job) for job in jobs]
        if again:
            states = ["other" if one == "there" else one for one in states]
        found = list(zip(jobs, states, strict=True))
        return cls(
            [job for job, one in found if one == "there"],
            [job for job, one in found if one != "there"],
            frozenset(job.path for job, one in found if one == "other"),
        )

    def counts(self, failed: Iterable[Failure]) -> Counts:
        """How it ended.

        Args:
            failed: what gave no picture, of these jobs or before there were any.
        """
        failed = list(failed)
        undone = {failure.what for failure in failed}
        done = [job for job in self.waiting if describe(job) not in undone]
        redrawn = sum(job.path in self.replaced for job in done)
        return Counts(len(done) - redrawn, redrawn, len(self.kept), len(failed))


@dataclass(frozen=True)
class Counts:
    """How many pictures were drawn, drawn in place of others, kept as they were, and failed."""

    drawn: int
    redrawn: int
    kept: int
    failed: int

    @property
    def pictures(self) -> int:
        """That are there now."""
        return self.drawn + self.redrawn + self.kept

    def __str__(self) -> str:
        parts = {"drawn": self.drawn, "redrawn": self.redrawn, "kept": self.kept, "failed": self.failed}
        return ", ".join(f"{number} {name}" for name, number in parts.items() if number) or "none"


def describe(job: Job) -> str:
    """A job's name in messages."""
    return f"{job.where} ({job.path.name})" if job.where else str(job.path)


def parts(jobs: Sequence[Job], most: int) -> list[list[Job]]:
    """Jobs that can be drawn together, in their order: they differ in texts and seeds alone.

    Those with an IP-Adapter are drawn alone, as its picture is one prompt's.
    """
    groups: list[list[Job]] = []
    for job in jobs:
        alone = any(plugin.kind == "ip_adapter" for plugin in job.request.plugins)
        fits = groups and len(groups[-1]) < (1 if alone else most) and _shared(groups[-1][0]) == _shared(job)
        groups[-1].append(job) if fits else groups.append([job])
    return groups


def _shared(job: Job) -> dict[str, Any]:
    own = ("prompt", "negative", "prompt_en", "negative_en", "seed")
    shared = {name: value for name, value in job.request.essence().items() if name not in own}
    for use in shared["beside"]:
        del use["prompt"], use["negative"]
    return shared


def draw_each(
    draw: Callable[[list[Job]], Any],
    jobs: Sequence[Job],
    is_done: Callable[[Job], bool],
) -> list[Failure]:
    """Draw pictures together or, where that fails, each for itself; returns those that cannot be drawn.

    Args:
        draw: draws some and writes them.
        jobs: what to draw.
        is_done: whether one is drawn, where a part of them was.
    """
    try:
        draw(list(jobs))
        return []
    except Exception as error:  # a row may make any library fail
        if len(jobs) == 1:
            return [_failure(jobs[0], error)]
    undone = [job for job in jobs if not is_done(job)]
    return [failure for job in undone for failure in draw_each(draw, [job], is_done)]


def _failure(job: Job, error: Exception) -> Failure:
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return Failure(describe(job), f"cannot be drawn: {kind}{first_line(error, 300)}")


def refuse_common_failure(failed: Sequence[Failure]) -> None:
    """Stop where several pictures, and no others, all fail of the same, which is none's own fault.

    Raises:
        UserError: names it.
    """
    if len(failed) > 1 and len({failure.why for failure in failed}) == 1:
        raise UserError(f"{failed[0]}; so does every other line")


def refuse_failures(failed: Sequence[Failure], pictures: int) -> None:
    """Say which rows of a file gave no picture.

    Args:
        failed: in any order.
        pictures: that are there.

    Raises:
        RowsFailed: there are some; counts and names them.
        UserError: there is nothing else, and all fail of the same.
    """
    if failed:
        if not pictures:
            refuse_common_failure(failed)
        reasons = "; ".join(str(failure)[:700] for failure in failed[:_MOST_REASONS])
        rest = ", ".join(failure.what for failure in failed[_MOST_REASONS:])
        raise RowsFailed(
            f"{len(failed)} gave no picture and {pictures} did: {reasons}"
            + (f"; also {rest}" if rest else "")
        )
